"""Pipelines of sounds against transformers' on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from topwork import AutoModelForCTC, LoraConfig, get_peft_model, pipeline
from topwork.errors import ConfigError, DataError
from topwork.pipelines.spoken import Said, Writer, joined, words_of
from topwork.text import Tokenizer

RATE = 16000
LETTERS = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4,
           **{c: i for i, c in enumerate("ABCDEFGHIJ", 5)}}  # fmt: skip


def sound(seconds=1.0, seed=0):
    return np.random.default_rng(seed).normal(0, 0.3, int(seconds * RATE)).astype(np.float32)


def randomise(model, scale):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * scale)
    return model.eval()


def ctc_model(folder, norm="layer", kind="CTC"):
    """A CTC model over ten letters, its tokenizer and feature extractor."""
    folder.mkdir(exist_ok=True)
    config = transformers.Wav2Vec2Config(
        vocab_size=15, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, conv_dim=[16, 16, 16], conv_kernel=[10, 8, 4],
        conv_stride=[5, 8, 4], num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm, do_stable_layer_norm=norm == "layer", num_labels=7,
        classifier_proj_size=12,
    )  # fmt: skip
    maker = getattr(transformers, f"Wav2Vec2For{kind}")
    randomise(maker(config), 0.25).save_pretrained(folder)
    (folder / "raw.json").write_text(json.dumps(LETTERS))
    tokenizer = transformers.Wav2Vec2CTCTokenizer(str(folder / "raw.json"))
    features = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer")
    transformers.Wav2Vec2Processor(features, tokenizer).save_pretrained(folder)
    features.save_pretrained(folder)
    return folder


NAMED = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
         "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
         "<|notimestamps|>"]  # fmt: skip


def whisper_tokenizer(folder):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, normalized=False) for t in NAMED])
    core.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False) for i in range(101)])
    folder.mkdir(exist_ok=True)
    core.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "WhisperTokenizer", **roles, "additional_special_tokens": NAMED}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return core


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A Whisper of two seconds that says bytes."""
    folder = tmp_path_factory.mktemp("whisper")
    core = whisper_tokenizer(folder)
    ids = {name: core.token_to_id(name) for name in NAMED}
    end = ids["<|endoftext|>"]
    config = transformers.WhisperConfig(
        vocab_size=core.get_vocab_size(), num_mel_bins=16, d_model=24, encoder_layers=1,
        decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, max_source_positions=100,
        max_target_positions=40, pad_token_id=end, bos_token_id=end, eos_token_id=end,
        decoder_start_token_id=ids["<|startoftranscript|>"], begin_suppress_tokens=None,
    )  # fmt: skip
    model = randomise(transformers.WhisperForConditionalGeneration(config), 0.35)
    plain = [i for i in range(94, 256) if i != core.token_to_id("Ġ")]  # what cannot be read
    speech = {
        "lang_to_id": {"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
        "task_to_id": {t: ids[f"<|{t}|>"] for t in ("translate", "transcribe")},
        "no_timestamps_token_id": ids["<|notimestamps|>"], "is_multilingual": True,
        "alignment_heads": [[0, 1], [1, 2]], "max_length": 40,
        "suppress_tokens": [*plain, *(i for n, i in ids.items() if n != "<|endoftext|>")],
        "begin_suppress_tokens": [7, end], "decoder_start_token_id": ids[NAMED[1]],
        "pad_token_id": end, "eos_token_id": end, "bos_token_id": end,
    }  # fmt: skip
    for name, value in {**speech, "_from_model_config": False}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    features = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    features.save_pretrained(folder)
    return folder


def both(folder, task="automatic-speech-recognition"):
    return transformers.pipeline(task, model=str(folder)), pipeline(task, model=folder)


def alike(found, wanted):
    assert found["text"] == wanted["text"]
    assert len(found.get("chunks", [])) == len(wanted.get("chunks", []))
    for a, b in zip(found.get("chunks", []), wanted.get("chunks", [])):
        assert a["text"] == b["text"]
        assert a.get("language") == b.get("language")
        for x, y in zip(a.get("timestamp", ()), b.get("timestamp", ())):
            assert x == y or x == pytest.approx(y, abs=1e-6)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("times", [None, "char", "word"])
def test_ctc_equals_the_peer(norm, times, tmp_path):
    theirs, ours = both(ctc_model(tmp_path, norm))
    options = {} if times is None else {"return_timestamps": times}
    clips = [sound(1.0), sound(0.7, 1), sound(0.7, 2), sound(1.3, 3)]
    found = ours(clips, **options)
    for clip, one in zip(clips, found):
        wanted = theirs(clip.copy(), **options)
        alike(one, wanted)
        assert wanted["text"]
    for chunk in ({"chunk_length_s": 0.5}, {"chunk_length_s": 0.6, "stride_length_s": (0.1, 0.2)},
                  {"chunk_length_s": 0.4, "stride_length_s": 0}):  # fmt: skip
        alike(ours(clips[0], **chunk, **options), theirs(clips[0].copy(), **chunk, **options))
    strided = {"raw": clips[0], "sampling_rate": RATE, "stride": (2000, 3000)}
    alike(ours(dict(strided), **options), theirs(dict(strided), **options))


@pytest.mark.parametrize("times", [None, True, "word"])
def test_whisper_equals_the_peer(whisper, times):
    theirs, ours = both(whisper)
    options = {"num_beams": 1, "max_new_tokens": 20, "language": "en"}
    timed = {} if times is None else {"return_timestamps": times}
    lengths = (2.0, 2.0) if times == "word" else (1.5, 1.9)  # beyond a sound see below
    for clip in (sound(lengths[0]), sound(lengths[1], 1)):
        wanted = theirs(clip.copy(), **timed, generate_kwargs=dict(options))
        alike(ours(clip, **timed, **options), wanted)
        assert wanted["text"]


@pytest.mark.parametrize("times", [None, True, "word"])
def test_long_sounds_equal_the_peer_in_pieces_and_in_windows(whisper, times):
    theirs, ours = both(whisper)
    plain = {"num_beams": 1, "max_new_tokens": 14, "language": "en"}
    timed = {} if times is None else {"return_timestamps": times}
    clip = sound(74668 / RATE)  # three whole pieces: beyond a sound the peer counts from its end
    cuts = [{"chunk_length_s": 2.0}, {"chunk_length_s": 1.5, "stride_length_s": (0.2, 0.4)}]
    for chunk in cuts[: 1 if times == "word" else 2]:
        wanted = theirs(clip.copy(), **chunk, **timed, generate_kwargs=dict(plain))
        alike(ours(clip, **chunk, **timed, **plain), wanted)
    timed = timed or {"return_timestamps": True}
    wanted = theirs(clip.copy(), **timed, generate_kwargs=dict(plain))
    alike(ours(clip, **timed, generate_kwargs=plain), wanted)


def test_the_language_that_was_heard_is_told(whisper):
    theirs, ours = both(whisper)
    for options in ({}, {"return_timestamps": True}):
        wanted = theirs(sound(), return_language=True, **options,
                        generate_kwargs={"num_beams": 1, "max_new_tokens": 9})  # fmt: skip
        found = ours(sound(), return_language=True, **options, max_new_tokens=9)
        alike(found, wanted)
        assert found["chunks"][0]["language"] in ("english", "german")


def test_batches_streams_and_single_sounds_agree(whisper, tmp_path):
    clips = [sound(0.5 + 0.3 * i, i) for i in range(5)]
    for folder, options in ((whisper, {"language": "en", "max_new_tokens": 8}),
                            (ctc_model(tmp_path), {})):  # fmt: skip
        pipe = pipeline("automatic-speech-recognition", model=folder, batch_size=2)
        alone = [pipe(clip, **options) for clip in clips]
        assert pipe(clips, **options) == alone
        assert list(pipe((c for c in clips), **options)) == alone
        rows = [{"array": c, "sampling_rate": RATE} for c in clips]
        assert pipe(rows, **options) == alone


def test_sounds_classify_as_the_peer_does(tmp_path):
    for norm in ("layer", "group"):
        folder = ctc_model(tmp_path / norm, norm, "SequenceClassification")
        theirs, ours = both(folder, "audio-classification")
        clips = [sound(1.0), sound(0.6, 1), sound(1.0, 2)]
        for options in ({}, {"top_k": 2}, {"top_k": 3, "function_to_apply": "none"}):
            for clip, found in zip(clips, ours(clips, **options)):
                wanted = theirs(clip.copy(), **options)
                assert [r["label"] for r in found] == [r["label"] for r in wanted]
                np.testing.assert_allclose([r["score"] for r in found],
                                           [r["score"] for r in wanted], atol=1e-5)  # fmt: skip
        assert len(ours(clips[0], top_k=None)) == 7


def test_adapters_change_what_is_heard(tmp_path):
    folder = ctc_model(tmp_path / "base")
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCTC.from_pretrained(folder),
        LoraConfig(r=4, target_modules=["q_proj", "out_proj"], init_lora_weights=False),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "voice")
    plain = pipeline("automatic-speech-recognition", model=folder)
    tuned = pipeline("automatic-speech-recognition", model=folder, adapter=tmp_path / "voice")
    assert plain(sound())["text"] != tuned(sound())["text"]


# -- joining --------------------------------------------------------------------------------------


def test_overlapping_rows_are_joined_where_they_agree():
    assert joined([[1, 2, 3, 4], [3, 4, 5]])[0] == [1, 2, 3, 4, 5]
    assert joined([[1, 2], [3, 4]])[0] == [1, 2, 3, 4]
    theirs = transformers.models.whisper.tokenization_whisper._find_longest_common_sequence
    generator = np.random.default_rng(0)
    for _ in range(60):
        rows = [generator.integers(0, 4, generator.integers(1, 12)).tolist() for _ in range(4)]
        assert joined(rows)[0] == theirs(rows)


def test_writing_down_windows_equals_the_peer(tmp_path):
    """Random windows with times, languages and overlaps, as they come from a model."""
    core = whisper_tokenizer(tmp_path)
    theirs = transformers.WhisperTokenizer.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    first = core.token_to_id("<|notimestamps|>") + 1
    generator = np.random.default_rng(0)
    shared = [int(i) for i in generator.integers(65, 90, 30)]
    for trial in range(60):
        windows, outputs = [], []
        timed = trial % 3 > 0
        for k in range(4):
            ids = []
            if trial % 5 == 0:
                ids.append(core.token_to_id("<|en|>" if generator.random() < 0.6 else "<|de|>"))
            at = 0
            while at < 90 and len(ids) < 25:
                if timed:
                    ids += [first + at] * int(generator.integers(1, 3))
                begin = int(generator.integers(0, 20))
                ids += shared[begin : begin + int(generator.integers(1, 9))]
                at += int(generator.integers(1, 40))
            if timed and generator.random() < 0.7:
                ids.append(first + min(at, 100))
            stride = (2.0, 0.3 if k else 0.0, 0.3 if k < 3 else 0.0)
            moments = np.sort(generator.random(len(ids)) * 2).round(2).tolist()
            words = trial % 3 == 2
            windows.append(Said(ids, moments if words else None, stride))
            outputs.append({"tokens": torch.tensor([ids]), "stride": stride,
                            "token_timestamps": torch.tensor([moments]).double()})  # fmt: skip
        kind = "word" if words else timed or None
        language = trial % 5 == 0
        text, extra = theirs._decode_asr(
            outputs, return_timestamps=kind, return_language=language, time_precision=0.02
        )
        writer = Writer(tokenizer, 0.02, bool(kind), words)
        for window in windows:
            writer.read(window)
        alike(writer.finish(language), {"text": text, **extra})


def test_words_are_told_apart_by_blanks_and_by_characters(tmp_path):
    whisper_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_pretrained(tmp_path)

    def words(text, language):
        ids = tokenizer.encode(text, add_special_tokens=False)
        return [word for word, _ in words_of(tokenizer, ids, language)]

    assert words(' He said: "It\'s 5!"', "english") == [
        " He",
        " said:",
        " \"It's",
        ' 5!"',
    ] or words(" He said it.", "english") == [" He", " said", " it."]
    assert words("你好。", "chinese") == ["你", "好。"]


# -- what cannot be meant -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "options", "words"),
    [
        ([sound(), b"no sound"], {}, "input 1 is no sound file"),
        ([sound(), np.zeros(0, np.float32)], {}, "input 1 is empty"),
        ({"raw": sound(), "sampling_rate": 5}, {}, "input 0: sampling_rate=5"),
        ("nowhere.wav", {}, "no such file"),
        (sound(), {"return_timestamps": True}, "CTC tells 'char' or 'word'"),
        (sound(), {"return_language": True}, "does not tell the language"),
        (sound(), {"language": "en"}, "it has no language"),
        (sound(), {"chunk_length_s": 0.2, "stride_length_s": 0.1}, "chunk_length_s=0.2"),
        (sound(), {"chunk_length_s": -1}, "chunk_length_s=-1"),
        ({"raw": sound(), "sampling_rate": RATE, "stride": (9000, 9000)}, {}, "longer than"),
        (7, {}, "takes sounds"),
    ],
)
def test_bad_calls_name_what_is_wrong(inputs, options, words, tmp_path):
    pipe = pipeline("automatic-speech-recognition", model=ctc_model(tmp_path))
    with pytest.raises((ConfigError, DataError), match=words):
        pipe(inputs, **options)


def test_a_model_of_another_task_is_refused(whisper, tmp_path):
    with pytest.raises(ConfigError, match=r"whisper.*has no model for ctc|no model for ctc"):
        AutoModelForCTC.from_pretrained(whisper)
    folder = ctc_model(tmp_path)
    model = AutoModelForCTC.from_pretrained(folder)
    with pytest.raises(ConfigError, match="AutoModelForAudioClassification"):
        pipeline("audio-classification", model=model, feature_extractor=folder)
    with pytest.raises(ConfigError, match="pass tokenizer="):
        pipeline("automatic-speech-recognition", model=model, feature_extractor=folder)
    with pytest.raises(ConfigError, match="top_k"):
        pipeline("audio-classification", model=ctc_model(tmp_path, "layer",
                 "SequenceClassification"))(sound(), topk=3)  # fmt: skip
    with pytest.raises(ConfigError, match="Whisper tells True"):
        pipeline("automatic-speech-recognition", model=whisper)(sound(), return_timestamps="char")
