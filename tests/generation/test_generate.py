from __future__ import annotations

import pytest
import torch

from helpers_generation import IDS, MASK, PADDED
from topwork import AutoModelForCausalLM
from topwork.errors import ConfigError, TopworkError
from topwork.generation import GenerationConfig


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 18},
        {"repetition_penalty": 1.7},
        {"eos_token_id": [5, 9, 30, 41]},
        {"eos_token_id": list(range(0, 50, 2)), "min_new_tokens": 4},
        {"eos_token_id": list(range(0, 50, 2)), "min_length": 15},
        {"bad_words_ids": [[5], [9, 30], [30, 41]], "eos_token_id": 41},
        {"sequence_bias": {(7,): 2.0, (7, 8): 9.0, (8, 11): -4.0, (11, 7, 8): 3.0}},
        {"suppress_tokens": list(range(10, 40)), "begin_suppress_tokens": [41, 42]},
        {"forced_eos_token_id": 3, "eos_token_id": 3},
        {"exponential_decay_length_penalty": (3, 1.8), "eos_token_id": [5, 9]},
        {"remove_invalid_values": True, "renormalize_logits": True},
        {"guidance_scale": 1.6},
        {"prefill_chunk_size": 5},
    ],
)
@pytest.mark.parametrize("mask", [MASK, PADDED], ids=["whole", "left-padded"])
def test_greedy_tokens_equal_the_peer(pair, mask, options):
    theirs, model = pair
    options = {"do_sample": False, "pad_token_id": 0, **options}
    if "max_length" not in options:
        options["max_new_tokens"] = 20
    ids = IDS.masked_fill(mask == 0, 0)
    wanted = theirs.generate(ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(ids, attention_mask=mask, **options), wanted)


def test_forbidden_ngrams_equal_the_peer(pair):
    theirs, model = pair
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0}
    ids = IDS[:, :4].repeat(1, 2)
    for n in (1, 2, 3):
        wanted = theirs.generate(ids, attention_mask=MASK[:, :8], no_repeat_ngram_size=n, **options)
        assert torch.equal(model.generate(ids, no_repeat_ngram_size=n, **options), wanted)


@pytest.mark.parametrize("mask", [MASK, PADDED], ids=["whole", "left-padded"])
def test_what_comes_back_equals_the_peer(pair, mask):
    theirs, model = pair
    ids = IDS.masked_fill(mask == 0, 0)
    options = {
        "attention_mask": mask, "max_new_tokens": 7, "repetition_penalty": 1.3, "do_sample": False,
        "eos_token_id": [5, 9], "pad_token_id": 0, "return_dict_in_generate": True,
        "output_scores": True, "output_logits": True,
    }  # fmt: skip
    wanted, found = theirs.generate(ids, **options), model.generate(ids, **options)
    assert torch.equal(found["sequences"], wanted.sequences)
    for mine, peers in ((found.scores, wanted.scores), (found.logits, wanted.logits)):
        assert len(mine) == len(peers)
        for one, other in zip(mine, peers):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_guidance_away_from_a_prompt_equals_the_peer(pair):
    theirs, model = pair
    options = {
        "negative_prompt_ids": IDS[:, 3:7] + 20, "guidance_scale": 2.5, "do_sample": False,
        "max_new_tokens": 12, "pad_token_id": 0,
    }  # fmt: skip
    wanted = theirs.generate(IDS, attention_mask=MASK, **options)
    assert torch.equal(model.generate(IDS, **options), wanted)
    assert not torch.equal(model.generate(IDS, max_new_tokens=12), wanted)


def test_callers_processors_criteria_and_prefixes_act_as_in_the_peer(pair):
    theirs, model = pair

    def allowed(row, ids):
        return [10 + row, 20, 21, int(ids[-1])]

    def odd(ids, scores):
        return scores + (ids[:, -1:] % 2) * torch.arange(53)

    def by_three(ids, scores):
        return (ids[:, 12:] % 3 == 0).sum(1) > 2

    for options in (
        {"prefix_allowed_tokens_fn": allowed},
        {"logits_processor": [odd]},
        # The peer fills ended rows only where there is an end token.
        {"stopping_criteria": [by_three], "eos_token_id": 52},
        {"prefix_allowed_tokens_fn": allowed, "num_beams": 3},
    ):
        wanted = theirs.generate(
            IDS, attention_mask=MASK, max_new_tokens=10, do_sample=False, pad_token_id=2, **options
        )
        found = model.generate(IDS, max_new_tokens=10, pad_token_id=2, **options)
        assert torch.equal(found, wanted), options


def test_time_ends_the_decoding(pair):
    assert pair[1].generate(IDS, max_new_tokens=40, max_time=1e-9).shape == IDS.shape


def test_presence_and_frequency_are_taken_from_what_was_made(pair):
    _, model = pair
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(
        IDS, presence_penalty=0.5, frequency_penalty=1.5, output_logits=True, **options
    )
    made = out.sequences[:, 12:]
    for step, (scores, logits) in enumerate(zip(out.scores, out.logits)):
        counts = torch.stack([torch.bincount(row[:step], minlength=53) for row in made])
        wanted = logits - 0.5 * (counts > 0) - 1.5 * counts
        torch.testing.assert_close(scores, wanted)


def test_each_row_of_a_batch_comes_out_as_alone(pair):
    _, model = pair
    ids = IDS.masked_fill(PADDED == 0, 0)
    together = model.generate(ids, attention_mask=PADDED, max_new_tokens=9)
    alone = model.generate(IDS[1:, 5:], max_new_tokens=9)
    assert torch.equal(together[1, 12:], alone[0, 7:])


def test_a_seed_repeats_and_another_differs(pair):
    _, model = pair
    options = {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3}
    first = model.generate(IDS, seed=1, **options)
    assert first.shape == (6, 24)
    assert torch.equal(first, model.generate(IDS, seed=1, **options))
    assert not torch.equal(first, model.generate(IDS, seed=2, **options))


def test_a_streamer_sees_the_prompt_each_token_and_the_end(pair):
    class Sink:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen.append(value.clone())

        def end(self):
            self.ended = True

    sink = Sink()
    out = pair[1].generate(IDS, max_new_tokens=4, streamer=sink)
    assert torch.equal(sink.seen[0], IDS)
    assert torch.equal(torch.stack(sink.seen[1:], 1), out[:, 12:])
    assert sink.ended


@pytest.mark.parametrize(
    ("ids", "options", "words"),
    [
        (IDS[:, :0], {}, "empty"),
        (IDS + 50, {}, "vocabulary"),
        (IDS, {"attention_mask": PADDED.flip(1)}, "on the left"),
        (IDS, {"attention_mask": PADDED[:, 1:]}, "attention_mask"),
        (IDS.repeat(1, 9), {}, "context is 64"),
        (IDS, {"max_length": 5}, "no room"),
        (IDS, {"temprature": 1}, "nearest: 'temperature'"),
        (IDS, {"temperature": 0.0, "do_sample": True}, "do_sample=False"),
        (IDS, {"max_new_tokens": -1}, "max_new_tokens=-1"),
        (IDS, {"num_return_sequences": 2}, "do_sample=True"),
        (IDS, {"num_return_sequences": 4, "num_beams": 3}, "num_beams=3"),
        (IDS, {"bad_words_ids": [[60]]}, r"bad_words_ids names \[60\]"),
        (IDS, {"sequence_bias": {(-1,): 2.0}}, r"sequence_bias names \[-1\]"),
        (IDS, {"sequence_bias": [3]}, "sequence_bias"),
        (IDS, {"eos_token_id": 53}, r"eos_token_id names \[53\]"),
        (IDS, {"min_length": -2}, "min_length=-2"),
        (IDS, {"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size=1.5"),
        (IDS, {"top_p": 0.0}, "top_p=0.0"),
        (IDS, {"early_stopping": "soon", "num_beams": 2}, '"never"'),
        (IDS, {"num_beam_groups": 2}, "diverse beams"),
        (IDS, {"output_attentions": True}, "call the model instead"),
        (IDS, {"cache_implementation": "paged_out"}, "one of dynamic"),
        (IDS, {"num_beams": 2, "prompt_lookup_num_tokens": 3}, "neither beams"),
        (IDS, {"prompt_lookup_num_tokens": 3}, "one row"),
        (IDS, {"prefix_allowed_tokens_fn": lambda row, ids: []}, "allows no token"),
    ],
)
def test_bad_input_says_what_is_wrong(pair, ids, options, words):
    with pytest.raises(ConfigError, match=words):
        pair[1].generate(ids, **options)


def test_damaged_weights_stop_the_decoding_and_the_mode_is_kept(pair, tmp_path):
    pair[1].save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TopworkError, match="not numbers"):
        model.generate(IDS)
    assert model.training


def test_the_call_comes_before_the_file(pair):
    config = GenerationConfig.of({"max_length": 9, "top_p": 0.5, "num_beams": 1}, {"top_p": 0.9})
    assert (config.max_length, config.top_p) == (9, 0.9)
    assert GenerationConfig.of({"max_length": 9}, {"max_new_tokens": 2}).max_length is None
    assert GenerationConfig.of({"eos_token_id": 3}, {"eos_token_id": None}).stops == []
    assert GenerationConfig.of({"top_k": 7}, {"top_k": None}).top_k == 0
    with pytest.raises(ConfigError, match="dola_layers='high'"):
        GenerationConfig.of({"dola_layers": "high"}, {})


def test_config_json_is_read_where_there_is_no_generation_config(pair):
    model = pair[1]
    plain = model.generate(IDS, max_new_tokens=20)
    files, model.generation_config = model.generation_config, {}
    try:
        model.config.repetition_penalty = 1.7
        wanted = model.generate(IDS, max_new_tokens=20)
        assert not torch.equal(wanted, plain)
        model.generation_config = {"repetition_penalty": 1.0}
        assert torch.equal(model.generate(IDS, max_new_tokens=20), plain)
        assert torch.equal(model.generate(IDS, max_new_tokens=20, repetition_penalty=1.7), wanted)
    finally:
        model.generation_config = files
        del model.config.repetition_penalty


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}], ids=str)
def test_longrope_beyond_its_original_length_decodes_as_without_a_cache(options, padded):
    from topwork.models import AutoModelForCausalLM, Config

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        Config(
            model_type="phi3", vocab_size=61, hidden_size=32, intermediate_size=24,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
            max_position_embeddings=64, original_max_position_embeddings=16, initializer_range=0.4,
            rope_scaling={"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5],
                          "long_factor": [2.0, 4.0, 8.0, 9.0]},
        )
    ).eval()  # fmt: skip
    ids = torch.randint(3, 61, (2 if not options.get("prompt_lookup_num_tokens") else 1, 10))
    mask = torch.ones_like(ids)
    if padded and len(ids) > 1:
        mask[1, :3] = 0
    found = model.generate(ids, attention_mask=mask, max_new_tokens=14, **options)
    whole, keep = ids, mask
    for _ in range(14):
        with torch.no_grad():
            following = model(whole, attention_mask=keep).logits[:, -1].argmax(-1)
        whole = torch.cat((whole, following[:, None]), 1)
        keep = torch.cat((keep, keep.new_ones(len(keep), 1)), 1)
    assert torch.equal(found, whole)
