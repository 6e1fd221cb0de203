"""Each key of the peer's GenerationConfig acts, is known to change nothing, or is refused."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import transformers

from topwork.errors import ConfigError
from topwork.generation.config import INERT, REFUSED, GenerationConfig

PEERS = sorted(transformers.GenerationConfig().to_dict())
OURS = {field.name for field in fields(GenerationConfig)}
IDS = torch.tensor([[5, 17, 9, 33, 9, 33, 21, 5, 17, 9]])
SAMPLED = {"do_sample": True, "seed": 3}
BEAMS = {"num_beams": 3, "eos_token_id": 7}
# Key → what goes with it, and a value that shows in what comes back.
ACTS = {
    "bad_words_ids": ({}, lambda plain: [[plain[0]]]),
    "begin_suppress_tokens": ({}, lambda plain: [plain[0]]),
    "suppress_tokens": ({}, lambda plain: [plain[2]]),
    "sequence_bias": ({}, lambda plain: {(plain[1],): -90.0}),
    "eos_token_id": ({}, lambda plain: plain[1]),
    "pad_token_id": ({"eos_token_id": 2, "ids": IDS.repeat(2, 1), **SAMPLED, "temperature": 3.0,
                      "suppress_tokens": list(range(6, 53))}, lambda plain: 4),
    "forced_bos_token_id": ({"ids": IDS[:, :1]}, lambda plain: (plain[0] + 1) % 53),
    "forced_eos_token_id": ({}, lambda plain: (plain[-1] + 1) % 53),
    "do_sample": ({"seed": 3, "temperature": 3.0}, True),
    "temperature": (SAMPLED, 9.0),
    "top_k": (SAMPLED | {"temperature": 3.0}, 1),
    "top_p": (SAMPLED | {"temperature": 3.0}, 0.05),
    "top_h": (SAMPLED | {"temperature": 3.0}, 0.05),
    "min_p": (SAMPLED | {"temperature": 3.0}, 0.9),
    "typical_p": (SAMPLED | {"temperature": 3.0}, 0.05),
    "epsilon_cutoff": (SAMPLED | {"temperature": 3.0, "top_k": 0}, 0.3),
    "eta_cutoff": (SAMPLED | {"temperature": 3.0, "top_k": 0}, 0.9),
    "repetition_penalty": ({}, 9.0),
    "no_repeat_ngram_size": ({"max_new_tokens": 40}, 1),
    "exponential_decay_length_penalty": ({"eos_token_id": 7}, (1, 9.0)),
    "min_length": ({"eos_token_id": 7, "sequence_bias": {(7,): 90.0}}, 14),
    "min_new_tokens": ({"eos_token_id": 7, "sequence_bias": {(7,): 90.0}}, 4),
    "max_length": ({"max_new_tokens": None}, 12),
    "max_new_tokens": ({}, 3),
    "max_time": ({}, 1e-9),
    "guidance_scale": ({}, 9.0),
    "num_beams": ({}, 4),
    "length_penalty": (BEAMS | {"sequence_bias": {(7,): 8.0}}, -5.0),
    "early_stopping": (BEAMS | {"sequence_bias": {(7,): 2.0}, "length_penalty": 3.0}, True),
    "num_return_sequences": ({"num_beams": 3}, 2),
    "penalty_alpha": ({"top_k": 6}, 0.9),
    "output_scores": ({"return_dict_in_generate": True}, True),
    "output_logits": ({"return_dict_in_generate": True}, True),
    "return_dict_in_generate": ({}, True),
    "renormalize_logits": ({"return_dict_in_generate": True, "output_scores": True}, True),
}  # fmt: skip
# What must not show in the tokens, or acts in encoder-decoders; and where it is tested.
ELSEWHERE = {
    "bos_token_id": "tests/generation/test_generate.py",
    "cache_implementation": "tests/nn/test_cache.py",
    "decoder_start_token_id": "tests/parity/test_seq2seq.py",
    "max_matching_ngram_size": "tests/generation/test_searching.py",
    "num_assistant_tokens": "tests/generation/test_searching.py",
    "num_assistant_tokens_schedule": "tests/generation/test_searching.py",
    "prefill_chunk_size": "tests/generation/test_generate.py",
    "prompt_lookup_num_tokens": "tests/generation/test_searching.py",
    "remove_invalid_values": "tests/generation/test_processors.py",
    "stop_strings": "tests/generation/test_text_ends_and_streams.py",
}


def test_every_key_of_the_peer_has_its_place():
    places = [OURS, INERT, set(REFUSED)]
    assert not [key for key in PEERS if sum(key in place for place in places) != 1]
    assert set(PEERS) & OURS == set(ACTS) | set(ELSEWHERE)


def outcome(model, options):
    """All that comes back, as plain numbers."""
    given = {"max_new_tokens": 8, "ids": IDS, **options}
    out = model.generate(given.pop("ids"), **given)
    if isinstance(out, torch.Tensor):
        return out.tolist()
    parts = [out.sequences.tolist()]
    for name in ("scores", "logits"):
        found = getattr(out, name, None)
        parts.append(None if found is None else [step.tolist() for step in found])
    return parts


@pytest.mark.parametrize("key", ACTS)
def test_the_key_acts(llama, key):
    model = llama[1]
    beside, value = ACTS[key]
    plain = outcome(model, beside)
    if callable(value):
        value = value(plain[0][beside.get("ids", IDS).shape[1] :])
    assert outcome(model, {**beside, key: value}) != plain


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_the_key_is_refused_with_the_reason(llama, key):
    neutral, reason = REFUSED[key]
    GenerationConfig.of({key: neutral}, {key: neutral})
    value = {None: "some", False: True}.get(neutral, 5)
    for file, call in (({}, {key: value}), ({key: value}, {})):
        with pytest.raises(ConfigError, match=key) as error:
            GenerationConfig.of(file, call)
        assert reason in str(error.value)


def test_inert_keys_are_taken(llama):
    plain = outcome(llama[1], {})
    for key in INERT & set(PEERS):
        assert outcome(llama[1], {key: None}) == plain, key
