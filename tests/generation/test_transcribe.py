"""Transcription with Whisper against transformers, token by token and second by second."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from topwork import AutoModelForSpeechSeq2Seq
from topwork.errors import ConfigError
from topwork.generation.times import cut, time_rules
from topwork.generation.transcribe import compression

# Letters 0 … 59, then what Whisper adds: end, start, two languages, two tasks, a mark of what came
# before, of silence, of no times, and 21 times.
END, START, EN, DE, TRANSLATE, TRANSCRIBE, BEFORE, SILENT, UNTIMED, FIRST = range(60, 70)
SIZES = {
    "vocab_size": 91, "num_mel_bins": 12, "d_model": 24, "encoder_layers": 1, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "max_source_positions": 20, "max_target_positions": 30,
    "pad_token_id": END, "bos_token_id": END, "eos_token_id": END,
    "decoder_start_token_id": START, "begin_suppress_tokens": None,
}  # fmt: skip
SPEECH = {
    "lang_to_id": {"<|en|>": EN, "<|de|>": DE},
    "task_to_id": {"translate": TRANSLATE, "transcribe": TRANSCRIBE},
    "no_timestamps_token_id": UNTIMED, "prev_sot_token_id": BEFORE, "is_multilingual": True,
    "alignment_heads": [[0, 1], [1, 3], [1, 0]], "max_length": 30,
    "suppress_tokens": [3, 4, BEFORE, SILENT], "begin_suppress_tokens": [7, END],
}  # fmt: skip


def peer(seed=0, scale=0.4, **changes):
    torch.manual_seed(seed)
    config = transformers.WhisperConfig(**SIZES)
    model = transformers.WhisperForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * scale)
    for name, value in {**SPEECH, **changes}.items():
        setattr(model.generation_config, name, copy.deepcopy(value))
    for name, value in SIZES.items():
        if name.endswith("token_id"):
            setattr(model.generation_config, name, value)
    return model


@pytest.fixture(params=range(2))
def pair(request, tmp_path):
    theirs = peer(request.param)
    theirs.save_pretrained(tmp_path)
    return theirs, AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)


def sound(frames=40, count=2):
    torch.manual_seed(5)
    return torch.randn(count, 12, frames)


def same(theirs, ours, features, **options):
    wanted = theirs.generate(features, **copy.deepcopy(options))
    found = ours.generate(features, **options)
    assert found.tolist() == wanted.tolist(), options
    return found


def test_one_window_equals_the_peer(pair):
    """Language heard or given, both tasks, beams, prompts."""
    theirs, ours = pair
    for options in (
        {},
        {"language": "de"},
        {"language": ["english", "german"], "task": "translate"},
        {"task": "transcribe", "max_new_tokens": 5},
        {"num_beams": 3, "max_new_tokens": 9, "language": "en"},
        {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6, "language": "en"},
        {"prompt_ids": torch.tensor([BEFORE, 5, 9]), "language": "en"},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "language": "en"},
        {"temperature": 0.0, "language": "en"},
    ):
        same(theirs, ours, sound(), **options)


def test_times_equal_the_peer(pair):
    theirs, ours = pair
    for options in (
        {"language": "en"},
        {"max_new_tokens": 12},
        {"num_beams": 2, "task": "transcribe"},
        {"prompt_ids": torch.tensor([BEFORE, 5, 9]), "language": "de"},
    ):
        same(theirs, ours, sound(), return_timestamps=True, **options)


@pytest.mark.parametrize("latest", [None, 3])
def test_parts_and_their_seconds_equal_the_peer(latest, tmp_path):
    for seed in range(3):
        theirs = peer(seed, max_initial_timestamp_index=latest)
        theirs.save_pretrained(tmp_path / str(seed))
        ours = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / str(seed))
        options = {"return_timestamps": True, "language": "en", "return_segments": True}
        for frames in (40, 130):
            wanted = theirs.generate(sound(frames, 1), **options)
            found = ours.generate(sound(frames, 1), **options)
            assert found.sequences.tolist() == wanted["sequences"].tolist()
            for ours_row, theirs_row in zip(found.segments, wanted["segments"]):
                assert len(ours_row) == len(theirs_row)
                for a, b in zip(ours_row, theirs_row):
                    assert a.tokens == b["tokens"].tolist()
                    assert a.start == pytest.approx(float(b["start"]))
                    assert a.end == pytest.approx(float(b["end"]))


def test_long_sounds_equal_the_peer_alone_and_together(pair):
    theirs, ours = pair
    mask = torch.ones(2, 130, dtype=torch.long)
    mask[1, 77:] = 0
    for options in (
        {"language": "en"},
        {"language": "en", "condition_on_prev_tokens": True},
        {"max_new_tokens": 8, "num_beams": 2},
    ):
        same(theirs, ours, sound(130, 1), **options)
        if not options.get("condition_on_prev_tokens"):
            same(theirs, ours, sound(130), attention_mask=mask, **options)
    prompt = torch.tensor([BEFORE, 5, 9])
    same(theirs, ours, sound(130, 1), language="en", prompt_ids=prompt, max_new_tokens=6)
    for kind in ("first-segment", "all-segments"):
        same(theirs, ours, sound(130, 1), language="en", prompt_ids=prompt, max_new_tokens=6,
             condition_on_prev_tokens=True, prompt_condition_type=kind)  # fmt: skip


def test_second_tries_happen_when_the_peer_makes_them(pair):
    """Thresholds that are met or not: nothing is drawn, for the second temperature is 0 too."""
    theirs, ours = pair
    for options in (
        {"compression_ratio_threshold": 1.2, "logprob_threshold": -1.0},
        {"compression_ratio_threshold": 0.1},
        {"logprob_threshold": -99.0, "no_speech_threshold": 0.0},
        {"logprob_threshold": 0.0, "no_speech_threshold": 0.005},
        {"logprob_threshold": -1.5, "no_speech_threshold": 0.01},
    ):
        for frames in (90,):
            wanted = theirs.generate(
                sound(frames, 1), language="en", return_timestamps=True,
                temperature=(0.0, 0.0), **options,
            )  # fmt: skip
            found = ours.generate(
                sound(frames, 1), language="en", return_timestamps=True,
                temperature=(0.0, 0.0), **options,
            )  # fmt: skip
            assert found.tolist() == wanted.tolist(), (options, frames)


def test_a_higher_temperature_draws(pair):
    _, ours = pair
    cold = ours.generate(sound(40, 1), language="en")
    torch.manual_seed(0)
    warm = [ours.generate(sound(40, 1), language="en", temperature=1.5).tolist() for _ in range(4)]
    assert any(row != cold.tolist() for row in warm)
    tried = ours.generate(
        sound(40, 1), language="en", temperature=(0.0, 1.5), compression_ratio_threshold=0.1,
        seed=3,
    )  # fmt: skip
    assert (
        tried.tolist()
        == ours.generate(sound(40, 1), language="en", temperature=1.5, seed=3).tolist()
    )


def test_the_seconds_of_tokens_equal_the_peer(pair):
    theirs, ours = pair
    for frames in (40, 130):
        for options in ({"language": "en"}, {"language": "en", "num_beams": 2}):
            data = sound(frames, 1)
            mask = torch.ones(1, frames, dtype=torch.long)
            mask[:, frames - 12 :] = frames > 40  # of one window, the end may be filling
            both = {"return_timestamps": True, "return_token_timestamps": True,
                    "return_segments": True, "attention_mask": mask, **options}  # fmt: skip
            wanted, found = theirs.generate(data, **both), ours.generate(data, **both)
            assert found.sequences.tolist() == wanted["sequences"].tolist()
            for a, b in zip(found.segments[0], wanted["segments"][0]):
                torch.testing.assert_close(
                    torch.tensor(a.token_timestamps).float(), b["token_timestamps"].float()
                )


def test_older_files_force_what_stands_before_the_text(tmp_path):
    for forced in ([[1, DE], [2, TRANSLATE], [3, UNTIMED]], [[1, None], [2, TRANSCRIBE]]):
        theirs = peer(1, forced_decoder_ids=forced)
        theirs.save_pretrained(tmp_path)
        ours = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
        for options in ({}, {"return_timestamps": True}, {"language": "en"}):
            same(theirs, ours, sound(), **options)


def test_a_model_of_english_alone_takes_no_language(tmp_path):
    theirs = peer(2, is_multilingual=False)
    for name in ("lang_to_id", "task_to_id"):
        delattr(theirs.generation_config, name)
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    same(theirs, ours, sound())
    same(theirs, ours, sound(), return_timestamps=True)
    with pytest.raises(ConfigError, match="English alone"):
        ours.generate(sound(), language="de")


# -- the rules by themselves ----------------------------------------------------------------------


def test_the_rules_of_times_equal_the_peers_processor_on_every_prefix():
    config = transformers.GenerationConfig(eos_token_id=END)
    config.no_timestamps_token_id, config.max_initial_timestamp_index = UNTIMED, 4
    torch.manual_seed(0)
    for begin in (1, 3):
        theirs = transformers.generation.logits_process.WhisperTimeStampLogitsProcessor(
            config, begin_index=begin
        )
        ours = time_rules(begin, END, FIRST, 4)
        for length in range(7):
            made = torch.randint(0, 60, (40, length))
            times = torch.rand(40, length) < 0.5
            made = torch.where(times, torch.randint(FIRST, 91, (40, length)), made)
            seen = torch.cat((torch.full((40, begin), START), made), 1)
            scores = torch.randn(40, 91) * 3
            assert torch.equal(ours(seen, scores), theirs(seen, scores))


def test_parts_are_cut_at_pairs_of_times():
    t = FIRST

    def parts(tokens, frames=40):
        found, step = cut(tokens, FIRST, 10.0, frames, 2, None)
        return [(round(p.start, 2), round(p.end, 2), p.tokens) for p in found], step

    whole = [t, 1, 2, t + 5, t + 5, 3, t + 9]
    assert parts(whole) == (
        [(10.0, 10.1, [t, 1, 2, t + 5]), (10.1, 10.18, [t + 5, 3, t + 9])], 40,
    )  # fmt: skip
    unfinished = [t, 1, t + 5, t + 5, 3, 4]
    assert parts(unfinished) == ([(10.0, 10.1, [t, 1, t + 5, t + 5])], 10)
    assert parts([1, 2]) == ([(10.0, 10.4, [1, 2])], 40)
    assert parts([t, 1, t + 7]) == ([(10.0, 10.14, [t, 1, t + 7])], 40)


def test_a_text_that_repeats_itself_compresses_well():
    assert compression([5, 6, 7] * 30, 51865) > 2.4 > compression(list(range(90)), 51865)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"language": "klingon"}, "klingon"),
        ({"language": "french"}, r"does not know <\|fr\|>"),
        ({"language": ["en"]}, "1 languages for 2 sounds"),
        ({"language": 3}, "language=3"),
        ({"task": "translation"}, "nearest: 'translate'"),
        ({"max_new_tokens": 29}, "30 places of the decoder"),
        ({"prompt_condition_type": "all-segments"}, "condition_on_prev_tokens"),
        ({"prompt_condition_type": "some"}, "prompt_condition_type='some'"),
        ({"no_speech_threshold": 0.5}, "logprob_threshold"),
        ({"assistant_model": object()}, "assistant_model is not offered"),
        ({"tempature": 0.5}, "temperature"),
        ({"frames": 80, "return_timestamps": False}, "more than a window of 40"),
        ({"frames": 80}, "attention_mask"),
        ({"bins": 5}, r"\[batch, 12, 40\]"),
    ],
)
def test_bad_calls_say_what_is_wrong(options, words, tmp_path):
    peer().save_pretrained(tmp_path)
    ours = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path)
    features = torch.randn(2, options.pop("bins", 12), options.pop("frames", 40))
    with pytest.raises(ConfigError, match=words):
        ours.generate(features, **options)
