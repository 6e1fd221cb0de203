"""Features of sounds, processors and the tokenizers of speech against transformers'."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Core

from topwork import AutoFeatureExtractor, AutoProcessor, AutoTokenizer
from topwork.errors import CheckpointError, ConfigError, DataError
from topwork.media.features import mel_filters
from topwork.text.ctc import CtcTokenizer

VOCAB = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "T": 6, "A": 7, "'": 8}


def sounds(*sizes):
    generator = np.random.default_rng(0)
    return [generator.normal(0.1, 0.3, n).astype(np.float32) for n in sizes]


# -- spectrograms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"feature_size": 20, "n_fft": 256, "hop_length": 100},
                                     {"feature_size": 128, "chunk_length": 2},
                                     {"sampling_rate": 8000, "chunk_length": 5}])  # fmt: skip
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"padding": "longest", "truncation": False, "return_attention_mask": True},
        {"do_normalize": True, "return_attention_mask": True},
        {"max_length": 12345, "pad_to_multiple_of": 128},
    ],
)
def test_spectrograms_equal_the_peer(options, call, tmp_path):
    theirs = transformers.WhisperFeatureExtractor(**options)
    theirs.save_pretrained(tmp_path)
    ours = AutoFeatureExtractor.from_pretrained(tmp_path)
    rate = theirs.sampling_rate
    clips = sounds(30000, 61234, 500)
    wanted = theirs(clips, sampling_rate=rate, return_tensors="pt", **call)
    found = ours(clips, sampling_rate=rate, return_tensors="pt", **call)
    assert wanted.keys() == found.keys()
    torch.testing.assert_close(found["input_features"], wanted["input_features"], atol=2e-5, rtol=0)
    if "attention_mask" in wanted:
        assert torch.equal(found["attention_mask"], wanted["attention_mask"])
    alone = ours(clips[0], return_tensors="np", **call)["input_features"]
    np.testing.assert_allclose(
        alone, theirs(clips[0], sampling_rate=rate, return_tensors="np", **call)["input_features"],
        atol=2e-5,
    )  # fmt: skip


def test_the_mel_filters_are_those_that_files_list_and_triangles_of_equal_area(tmp_path):
    theirs = transformers.WhisperFeatureExtractor()
    np.testing.assert_allclose(mel_filters(80, 400, 16000), theirs.mel_filters, atol=1e-9)
    wide = mel_filters(40, 4096, 16000)
    np.testing.assert_allclose(wide.sum(0) * 16000 / 4096, 1.0, rtol=0.05)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    values = json.loads(path.read_text())
    old = {**values, "mel_filters": theirs.mel_filters.T.tolist()}  # as the first files had them
    path.write_text(json.dumps(old))
    assert AutoFeatureExtractor.from_pretrained(tmp_path).feature_size == 80
    old["mel_filters"][3][7] += 0.1
    path.write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="other mel_filters"):
        AutoFeatureExtractor.from_pretrained(tmp_path)


def test_a_loud_tone_stands_in_its_own_band_and_quiet_is_cut_at_80_db():
    from topwork.media import LogMel

    rate = 16000
    wave = np.sin(2 * np.pi * 2000 * np.arange(rate) / rate).astype(np.float32)
    found = LogMel(chunk_length=2)(wave, return_tensors="np")["input_features"][0]
    band = found[:, 20:80].mean(1).argmax()
    centre = mel_filters(80, 400, rate)[:, band].argmax() * rate / 400
    assert abs(centre - 2000) < 60
    assert found.max() - found.min() == pytest.approx(2.0)  # 8 decades of power, by 4


def test_dither_is_noise_of_its_size():
    from topwork.media import LogMel

    still = np.zeros(16000, np.float32)
    made = LogMel(chunk_length=1, dither=1e-3)
    first, second = (made(still)["input_features"] for _ in range(2))
    assert not np.array_equal(first, second)


# -- samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"return_attention_mask": True}, {"do_normalize": False}])
@pytest.mark.parametrize(
    "call",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 700, "truncation": True},
        {"padding": True, "pad_to_multiple_of": 128, "return_attention_mask": True},
        {},
    ],
)
def test_samples_equal_the_peer(options, call, tmp_path):
    theirs = transformers.Wav2Vec2FeatureExtractor(**options)
    theirs.save_pretrained(tmp_path)
    ours = AutoFeatureExtractor.from_pretrained(tmp_path)
    clips = sounds(900, 333, 600)
    wanted, found = theirs(clips, sampling_rate=16000, **call), ours(clips, **call)
    assert wanted.keys() == found.keys()
    for key in wanted:
        for a, b in zip(found[key], wanted[key]):
            np.testing.assert_allclose(a, b, atol=1e-6)
    alone = ours(clips[1])
    np.testing.assert_allclose(
        alone["input_values"][0],
        theirs(clips[1], sampling_rate=16000)["input_values"][0],
        atol=1e-6,
    )
    rows = [{"input_values": c} for c in clips]
    wanted = theirs.pad(rows, padding=True, return_tensors="pt")
    found = ours.pad(rows, return_tensors="pt")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_options_are_read_replaced_and_written_back(tmp_path):
    transformers.WhisperFeatureExtractor(feature_size=32).save_pretrained(tmp_path)
    ours = AutoFeatureExtractor.from_pretrained(tmp_path, chunk_length=5)
    assert (ours.feature_size, ours.chunk_length, ours.n_samples) == (32, 5, 80000)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "ours")
    assert isinstance(again, transformers.WhisperFeatureExtractor)
    assert (again.feature_size, again.chunk_length) == (32, 5)
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "ours") == ours


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"feature_extractor_type": "SpeechT5FeatureExtractor"}, ConfigError, "SpeechT5"),
        ({"image_processor_type": "ViTImageProcessor"}, ConfigError, "of images"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "hop_lenght": 3}, ConfigError,
         "hop_length"),
        ({"feature_extractor_type": "WhisperFeatureExtractor", "padding_side": "left"},
         ConfigError, "padding_side='left'"),
        (None, CheckpointError, "preprocessor_config.json"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_meant_are_refused(values, error, words, tmp_path):
    if values is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(error, match=words):
        AutoFeatureExtractor.from_pretrained(tmp_path)


def test_bad_calls_say_what_is_wrong():
    from topwork.media import LogMel, Waveform

    mel, wave = LogMel(), Waveform()
    with pytest.raises(ConfigError, match="the model wants 16000 hertz"):
        mel(sounds(100)[0], sampling_rate=8000)
    with pytest.raises(DataError, match="sound 1 is empty"):
        wave([sounds(10)[0], np.zeros(0, np.float32)])
    with pytest.raises(DataError, match="the list is empty"):
        wave([])
    with pytest.raises(DataError, match="sound 0 has 150 samples, too few"):
        mel(sounds(150)[0], padding=False)
    with pytest.raises(ConfigError, match="padding=True"):
        wave(sounds(10, 20), return_tensors="pt")
    with pytest.raises(ConfigError, match="padding='right'"):
        wave(sounds(10), padding="right")
    with pytest.raises(ConfigError, match="max_length"):
        wave(sounds(10), truncation=True)


# -- CTC -------------------------------------------------------------------------------------------


def ctc_files(folder, vocab=VOCAB, **options):
    folder.mkdir(exist_ok=True)
    (folder / "raw.json").write_text(json.dumps(vocab))
    theirs = transformers.Wav2Vec2CTCTokenizer(str(folder / "raw.json"), **options)
    features = transformers.Wav2Vec2FeatureExtractor()
    transformers.Wav2Vec2Processor(features, theirs).save_pretrained(folder)
    return theirs


FRAMES = [
    [5, 5, 0, 5, 4, 4, 6, 7, 0, 0, 7, 4, 8, 3, 1],
    [4, 4, 6, 0, 4],
    [0, 0],
    [6, 2, 9, 7, 7, 4],
]


@pytest.mark.parametrize(
    "options", [{}, {"do_lower_case": True}, {"word_delimiter_token": "'", "unk_token": "</s>"}]
)
def test_ctc_tokenizers_equal_the_peer(options, tmp_path):
    theirs = ctc_files(tmp_path, **options)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(ours, CtcTokenizer)
    for text in ("TEA EAT", "tea", "T  E A'", "<s>TEA</s>", "X\nA", "A <pad> E", ""):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    for row in FRAMES:
        assert ours.decode(row) == theirs.decode(row)
        assert ours.decode(row, group_tokens=False) == theirs.decode(row, group_tokens=False)
        skipped = theirs.decode(row, skip_special_tokens=True)
        if "word_delimiter_token" not in options:
            assert ours.decode(row, skip_special_tokens=True) == skipped
        wanted = theirs.decode(row, output_char_offsets=True, output_word_offsets=True)
        found = ours.decode(row, output_char_offsets=True, output_word_offsets=True)
        assert found.text == wanted.text
        assert found.char_offsets == wanted.char_offsets
        assert found.word_offsets == wanted.word_offsets
    assert ours.batch_decode(FRAMES) == theirs.batch_decode(FRAMES)
    square = np.array([row[:3] + [0] * (3 - len(row)) for row in FRAMES])
    for rows in (square, torch.from_numpy(square), list(square)):
        assert ours.batch_decode(rows) == theirs.batch_decode(square.tolist())
    for key in ("pad_token_id", "bos_token_id", "unk_token_id", "word_delimiter_token_id"):
        assert getattr(ours, key) == getattr(theirs, key), key
    ours.save_pretrained(tmp_path / "ours")
    reread = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert reread.decode(FRAMES[0]) == ours.decode(FRAMES[0])
    if "word_delimiter_token" not in options:  # the peer forgets it when it reads its own files
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
        assert again.decode(FRAMES[0]) == ours.decode(FRAMES[0])
        assert again("TEA A")["input_ids"] == ours("TEA A")["input_ids"]


def test_a_vocabulary_of_several_languages_needs_one(tmp_path):
    nested = {"eng": VOCAB, "deu": {**VOCAB, "Ä": 9}}
    theirs = ctc_files(tmp_path, nested, target_lang="deu")
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert ours("ÄT")["input_ids"] == theirs("ÄT")["input_ids"] == [9, 6]
    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "vocab.json").read_text()) == nested
    with pytest.raises(ConfigError, match=r"target_lang='dau'.*nearest: 'deu'"):
        CtcTokenizer.of_vocabulary(nested, target_lang="dau")


def test_padded_labels_and_features_come_from_one_processor(tmp_path):
    ctc_files(tmp_path)
    theirs = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    ours = AutoProcessor.from_pretrained(tmp_path)
    clips = sounds(300, 200)
    made = [ours(c, text=t) for c, t in zip(clips, ("TEA", "A"))]
    assert made[0]["labels"] == theirs(clips[0], text="TEA", sampling_rate=16000)["labels"]
    features = [{"input_values": row["input_values"][0]} for row in made]
    labels = [{"input_ids": row["labels"]} for row in made]
    found = ours.pad(features, labels, return_tensors="pt")
    wanted = theirs.pad(features, labels=labels, return_tensors="pt")
    assert torch.equal(found["labels"], wanted["labels"])
    torch.testing.assert_close(found["input_values"], wanted["input_values"])
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(again, transformers.Wav2Vec2Processor)
    assert again.decode([6, 6, 7]) == ours.decode([6, 6, 7]) == "TA"
    assert AutoProcessor.from_pretrained(tmp_path / "ours").decode([6, 7]) == "TA"
    with pytest.raises(ConfigError, match="audio or text"):
        ours()


# -- Whisper ---------------------------------------------------------------------------------------


def whisper_files(folder, times=True):
    """Bytes as tokens, then what Whisper adds; time tokens may be left out of the vocabulary."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Core(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|zh|>", "<|de|>",
             "<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>",
             "<|notimestamps|>"]  # fmt: skip
    core.add_special_tokens([AddedToken(t, normalized=False) for t in named])
    if times:
        core.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False) for i in range(1501)])
    folder.mkdir(exist_ok=True, parents=True)
    core.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), "<|endoftext|>")
    config = {"tokenizer_class": "WhisperTokenizer", **roles, "additional_special_tokens": named}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    transformers.WhisperFeatureExtractor(feature_size=12).save_pretrained(folder)
    return core


@pytest.fixture(params=[True, False], ids=["times", "above"])
def whispers(request, tmp_path):
    core = whisper_files(tmp_path, request.param)
    theirs = transformers.WhisperTokenizer.from_pretrained(tmp_path)
    return theirs, AutoTokenizer.from_pretrained(tmp_path), core


def spoken(core, *parts):
    """Ids of texts and times (numbers)."""
    first = core.token_to_id("<|notimestamps|>") + 1
    ids = []
    for part in parts:
        whole = core.encode(part, add_special_tokens=False).ids if isinstance(part, str) else None
        ids += [first + round(part / 0.02)] if whole is None else whole
    return ids


def test_times_are_left_out_written_or_counted_as_the_peer_does(whispers):
    theirs, ours, core = whispers
    rows = [
        spoken(core, 0.0, " Hello there.", 2.4, 2.4, " And more", 5.0),
        spoken(
            core, "<|startoftranscript|><|en|><|transcribe|>", 0.0, " one", 1.0, "<|endoftext|>"
        ),
        spoken(core, 0.0, " a", 29.0, 0.0, " b", 4.0, 4.0, " c", 6.0, 6.0, 0.5, " d", 2.0),
        spoken(core, "<|startofprev|> old<|startoftranscript|>", 0.0, " new", 1.0, 1.0),
        spoken(core, " no times"),
        spoken(core, 3.0, 3.0),
        [],
    ]
    for row in rows:
        for skip in (False, True):
            for times in (False, True):
                options = {"skip_special_tokens": skip, "decode_with_timestamps": times}
                assert ours.decode(row, **options) == theirs.decode(row, **options), (row, options)
        if row:
            wanted = theirs.decode(row, output_offsets=True)
            found = ours.decode(row, output_offsets=True)
            assert found.text == wanted["text"]
            assert [o["text"] for o in found.offsets] == [o["text"] for o in wanted["offsets"]]
            for a, b in zip(found.offsets, wanted["offsets"]):
                assert a["timestamp"] == pytest.approx(b["timestamp"])
    assert ours.batch_decode(rows[:2], skip_special_tokens=True) == theirs.batch_decode(
        rows[:2], skip_special_tokens=True
    )


def test_what_stands_before_a_text_equals_the_peer(whispers, tmp_path):
    theirs, ours, _ = whispers
    named = {"German": "<|de|>", "mandarin": "<|zh|>", "en": "<|en|>", "<|de|>": "<|de|>"}
    for language, token in named.items():
        ours.set_prefix_tokens(language=language, task="transcribe")
        names = ours.convert_ids_to_tokens(ours("hi")["input_ids"])
        assert names[:4] == ["<|startoftranscript|>", token, "<|transcribe|>", "<|notimestamps|>"]
        assert names[4:] == ["h", "i", "<|endoftext|>"]
    theirs.set_prefix_tokens(language="english", task="translate", predict_timestamps=True)
    ours.set_prefix_tokens(language="english", task="translate", predict_timestamps=True)
    assert ours("hi there")["input_ids"] == theirs("hi there")["input_ids"]
    wanted = theirs.get_decoder_prompt_ids(language="en", task="transcribe")
    assert ours.get_decoder_prompt_ids(language="en", task="transcribe") == wanted
    assert ours.get_prompt_ids("a name") == theirs.get_prompt_ids("a name").tolist()
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert again("hi")["input_ids"] == ours("hi")["input_ids"]
    reread = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert reread("hi")["input_ids"] == ours("hi")["input_ids"]
    assert reread.language == "en"


def test_languages_tasks_and_prompts_that_cannot_be_meant_are_refused(whispers):
    _, ours, _ = whispers
    with pytest.raises(ConfigError, match=r"language='Germann'.*'german'"):
        ours.set_prefix_tokens(language="Germann")
    with pytest.raises(ConfigError, match=r"no token <\|fr\|>"):
        ours.set_prefix_tokens(language="french")
    with pytest.raises(ConfigError, match=r"task='translation'.*'translate'"):
        ours.set_prefix_tokens(task="translation")
    assert ours.language is None
    with pytest.raises(ConfigError, match=r"special token <\|en\|>"):
        ours.get_prompt_ids("a <|en|> b")


def test_the_peer_reads_our_whisper_processor(tmp_path):
    whisper_files(tmp_path)
    ours = AutoProcessor.from_pretrained(tmp_path)
    ours.save_pretrained(tmp_path / "ours")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "ours")
    assert isinstance(again, transformers.WhisperProcessor)
    clip = sounds(4000)[0]
    torch.testing.assert_close(
        ours(clip, return_tensors="pt")["input_features"],
        again(clip, sampling_rate=16000, return_tensors="pt")["input_features"],
        atol=2e-5, rtol=0,
    )  # fmt: skip
