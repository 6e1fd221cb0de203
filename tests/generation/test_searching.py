"""Beams, guessing ahead and contrastive search."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from helpers_generation import IDS, MASK, PADDED
from topwork import AutoModelForCausalLM
from topwork.errors import ConfigError

BEAMS = [
    {},
    {"eos_token_id": [5, 9, 30, 41]},
    {"eos_token_id": list(range(0, 50, 3)), "num_return_sequences": 3},
    {"eos_token_id": list(range(0, 50, 3)), "length_penalty": 2.0, "early_stopping": True},
    {"eos_token_id": list(range(0, 50, 3)), "length_penalty": -1.0, "num_return_sequences": 4},
    {"eos_token_id": list(range(0, 50, 3)), "length_penalty": 1.5, "early_stopping": "never"},
    {"eos_token_id": [5, 9], "min_new_tokens": 5, "repetition_penalty": 1.4},
    {"no_repeat_ngram_size": 2, "num_return_sequences": 2},
]


@pytest.mark.parametrize("options", BEAMS, ids=range(len(BEAMS)))
@pytest.mark.parametrize("mask", [MASK, PADDED], ids=["whole", "left-padded"])
def test_beams_equal_the_peer(pair, mask, options):
    theirs, model = pair
    options = {
        "num_beams": 4, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 2,
        "return_dict_in_generate": True, "output_scores": True, **options,
    }  # fmt: skip
    ids = IDS.masked_fill(mask == 0, 0)
    wanted = theirs.generate(ids, attention_mask=mask, **options)
    found = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores)
    if "no_repeat_ngram_size" in options and mask is PADDED:
        return  # the peer counts padding as text and forbids a second padding id
    for mine, peers in zip(found.scores, wanted.scores):
        torch.testing.assert_close(mine, peers, rtol=1e-4, atol=1e-4)


def test_beam_samples_equal_the_peers_with_the_same_draws(pair):
    theirs, model = pair
    options = {"num_beams": 3, "do_sample": True, "max_new_tokens": 10, "pad_token_id": 2,
               "eos_token_id": [5, 9], "top_k": 9, "temperature": 1.5}  # fmt: skip
    torch.manual_seed(3)
    wanted = theirs.generate(IDS, attention_mask=MASK, **options)
    torch.manual_seed(3)
    assert torch.equal(model.generate(IDS, **options), wanted)


def test_the_best_of_many_beams_is_the_best_of_all_sequences(llama):
    _, model = llama
    ids = IDS[:1]
    out = model.generate(
        ids, num_beams=53, max_new_tokens=2, num_return_sequences=3, return_dict_in_generate=True
    )
    with torch.no_grad():
        first = model(ids).logits[0, -1].log_softmax(-1)
        every = torch.cat((ids.expand(53, -1), torch.arange(53)[:, None]), 1)
        total = first[:, None] + model(every).logits[:, -1].log_softmax(-1)
    best = total.flatten().topk(3)
    torch.testing.assert_close(out.sequences_scores, best.values / 2)
    assert torch.equal(out.sequences[:, -2] * 53 + out.sequences[:, -1], best.indices)


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stops", [None, [5, 9]])
@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_guessing_ahead_gives_the_tokens_of_plain_decoding(pair, drawn, stops, schedule):
    _, model = pair
    ids = IDS[:1, :4].repeat(1, 3)
    options = {
        "max_new_tokens": 25, "do_sample": drawn, "seed": 5, "eos_token_id": stops, "top_k": 4,
        "repetition_penalty": 1.1, "num_assistant_tokens_schedule": schedule,
    }  # fmt: skip
    wanted = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=4, **options), wanted)
    # The model itself as its assistant is always right, a perturbed one is mostly wrong.
    assert torch.equal(model.generate(ids, assistant_model=model, **options), wanted)
    other = AutoModelForCausalLM.from_config(model.config)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), model.parameters()):
            mine.copy_(its + 0.02 * torch.randn_like(its))
    found = model.generate(ids, assistant_model=other, num_assistant_tokens=5, **options)
    assert torch.equal(found, wanted)


def test_right_guesses_save_passes(llama):
    _, model = llama
    passes = []
    handle = model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    plain = model.generate(IDS[:1], max_new_tokens=24)
    count = len(passes)
    again = model.generate(plain[:, :-12], max_new_tokens=12)
    passes.clear()
    prompt = torch.cat((again, plain[:, :-12]), 1)[:, -50:]
    model.generate(prompt, max_new_tokens=12, prompt_lookup_num_tokens=6)
    handle.remove()
    assert count == 24
    assert len(passes) <= 12


def test_an_assistant_of_another_vocabulary_is_refused(pair):
    config = type(pair[1].config)(**{**pair[1].config.to_dict(), "vocab_size": 60})
    with pytest.raises(ConfigError, match="vocabulary of 60"):
        pair[1].generate(IDS[:1], assistant_model=AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("mask", [MASK, PADDED], ids=["whole", "left-padded"])
def test_contrastive_search_follows_its_formula(pair, mask):
    _, model = pair
    alpha, k = 0.6, 4
    ids = IDS.masked_fill(mask == 0, 0)
    found = model.generate(ids, attention_mask=mask, penalty_alpha=alpha, top_k=k, max_new_tokens=6)
    for row in range(2):
        text = IDS[row][mask[row] == 1]
        for _ in range(6):
            with torch.no_grad():
                chances, tokens = model(text[None]).logits[0, -1].softmax(-1).topk(k)
                values = []
                for chance, token in zip(chances, tokens):
                    hidden = model.backbone(torch.cat((text, token[None]))[None])[0]
                    alike = F.cosine_similarity(hidden[-1:], hidden[:-1]).max()
                    values.append((1 - alpha) * chance - alpha * alike)
            text = torch.cat((text, tokens[torch.stack(values).argmax()][None]))
        assert torch.equal(found[row, 12:], text[-6:])
