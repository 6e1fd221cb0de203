"""Dropout of attention's probabilities: its masks, its mean, its gradient, its memory."""

from __future__ import annotations

import importlib

import pytest
import torch

from topwork import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, Config
from topwork.errors import ConfigError
from topwork.ops import Layout, Rule, ScoreTerms, attention
from topwork.ops.disentangled import disentangled_attention

home = importlib.import_module("topwork.ops.attention")
RATE = 0.3
GPT2 = {"model_type": "gpt2", "vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4,
        "n_positions": 64, "attn_pdrop": RATE, "resid_pdrop": 0.2, "embd_pdrop": 0.1}  # fmt: skip
LLAMA = {"model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
         "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 64, "attention_dropout": RATE}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4,
        "attention_probs_dropout_prob": RATE}  # fmt: skip
BART = {"model_type": "bart", "vocab_size": 61, "d_model": 32, "encoder_layers": 2,
        "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "attention_dropout": RATE,
        "pad_token_id": 1, "decoder_start_token_id": 2,
        "encoder_layerdrop": 0.3, "decoder_layerdrop": 0.3}  # fmt: skip
MODELS = {
    "gpt2": (AutoModelForCausalLM, GPT2, "attn_pdrop"),
    "llama": (AutoModelForCausalLM, LLAMA, "attention_dropout"),
    "bert": (AutoModelForMaskedLM, BERT, "attention_probs_dropout_prob"),
    "bart": (AutoModelForSeq2SeqLM, BART, "attention_dropout"),
}


def made(name, **changes):
    """A model with weights of some size, in training."""
    auto, values, _ = MODELS[name]
    torch.manual_seed(0)
    return auto.from_config(Config(**{**values, "initializer_range": 0.3, **changes})).train()


def rows(batch=2, queries=9, keys=9, heads=4, kv_heads=2, size=8, dtype=torch.float32):
    made = torch.Generator().manual_seed(0)
    shapes = [(batch, queries, heads, size), (batch, keys, kv_heads, size)]
    return [torch.randn(s, generator=made, dtype=dtype) for s in (*shapes, shapes[1])]


def test_the_share_of_dropped_probabilities_is_the_rate_and_no_two_are_tied():
    """One-hot values make the output the probabilities themselves."""
    count, keys = 400, 16
    q, k = torch.zeros(count, keys, 2, 8), torch.zeros(count, keys, 1, 8)
    v = torch.eye(keys).expand(count, 1, keys, keys).transpose(1, 2)
    torch.manual_seed(1)
    kept = attention(q, k, v, Layout(), Rule(1.0, causal=False, dropout=RATE)) > 0
    assert kept.float().mean().item() == pytest.approx(1 - RATE, abs=0.003)  # 6 deviations
    for axis in range(4):  # rows, queries, heads, keys
        alone = kept.float().mean([d for d in range(4) if d != axis])
        spread = (RATE * (1 - RATE) / (kept.numel() / kept.shape[axis])) ** 0.5
        assert ((alone - (1 - RATE)).abs() < 5 * spread).all()
    flat = kept.float() - (1 - RATE)
    for shift, axis in ((1, 3), (1, 1), (1, 2), (1, 0), (3, 3)):
        both = (flat * flat.roll(shift, axis)).mean() / (RATE * (1 - RATE))
        assert abs(both.item()) < 0.015


@pytest.mark.parametrize(
    ("layout", "rule", "terms"),
    [
        (Layout(), Rule(0.4, dropout=RATE), ScoreTerms()),
        (Layout((4, 5, 5, 4)), Rule(0.4, window=3, dropout=RATE), ScoreTerms()),
        (Layout(((3, 2, 4), 9)), Rule(0.4, dropout=RATE), ScoreTerms(sinks=torch.ones(4))),
    ],
    ids=["rows", "packed", "branches"],
)
def test_the_mean_over_many_masks_is_the_output_without(layout, rule, terms):
    q, k, v = rows()
    if layout.lengths:
        q, k, v = (t.flatten(0, 1)[None] for t in (q, k, v))
    plain = attention(q, k, v, layout, Rule(rule.scale, window=rule.window), terms)
    torch.manual_seed(2)
    draws = torch.stack([attention(q, k, v, layout, rule, terms) for _ in range(1000)])
    error = (draws.mean(0) - plain).abs()
    assert (error < 5 * draws.std(0) / 1000**0.5 + 1e-6).all()
    assert draws.std(0).max() > 0.1


SETTINGS = [
    (Layout(), {}, ScoreTerms()),
    (Layout(), {"causal": False}, ScoreTerms(bias=torch.randn(4, 11, 12))),
    (Layout(), {"window": 3, "softcap": 2.0}, ScoreTerms(sinks=torch.randn(4))),
    (Layout(), {"chunk": 4}, ScoreTerms(slopes=torch.rand(4))),
    (Layout(past=3), {}, ScoreTerms(bias=torch.randn(4, 12, 12))),
    (Layout(keep=torch.arange(9) >= torch.tensor([[2], [0]])), {}, ScoreTerms()),
    (Layout(past=3, keep=torch.arange(12) >= torch.tensor([[2], [0]])), {"window": 5},
     ScoreTerms(bias=torch.randn(4, 12, 12))),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "options", "terms"), SETTINGS)
def test_blocks_give_the_definition_forward_and_backward(layout, options, terms, monkeypatch):
    """With a mask that is a function of the probability alone, so that blocks do not matter."""
    monkeypatch.setattr(home, "dropped", lambda x, rate, seed: x + rate * torch.sin(3 * x))
    monkeypatch.setitem(home.BLOCK, False, 2 * 4 * 12 * 2)  # two queries at a time
    rule = Rule(0.4, dropout=RATE, **options)
    inputs = [t.requires_grad_() for t in rows(keys=9 + layout.past, dtype=torch.float64)]
    outputs = [
        run(*inputs, layout, rule, terms) for run in (attention, attention.reference)
    ]  # fmt: skip
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    up = torch.randn(outputs[0].shape, dtype=torch.float64)
    for found, wanted in zip(*(torch.autograd.grad(y, inputs, up) for y in outputs)):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_the_gradient_is_that_of_the_mask_that_was_drawn(monkeypatch):
    """By finite differences, the seed held; in blocks, so that each draws its own."""
    monkeypatch.setitem(home.BLOCK, False, 2 * 4 * 5 * 2)

    def fixed(*inputs):
        torch.manual_seed(3)
        return attention(*inputs, Layout(), Rule(0.5, dropout=RATE))

    inputs = [t.requires_grad_() for t in rows(queries=5, keys=5, size=3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(fixed, inputs)


def test_the_gradient_of_disentangled_attention_is_that_of_its_mask():
    q, k, v = rows(batch=1, queries=5, keys=5, heads=2, kv_heads=2, size=3, dtype=torch.float64)
    index = torch.arange(5)[:, None] - torch.arange(5)[None] + 4
    table = torch.randn(9, 2, 3, dtype=torch.float64)

    def fixed(*inputs):
        torch.manual_seed(3)
        return disentangled_attention(*inputs, inputs[3], index, Layout((2, 3)), 0.5, RATE)

    assert torch.autograd.gradcheck(fixed, [t.requires_grad_() for t in (q, k, v, table)])


def test_no_row_of_scores_is_kept_for_the_backward_pass():
    q, k, v = (t.requires_grad_() for t in rows(batch=1, queries=256, keys=256))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        attention(q, k, v, Layout((200, 56)), Rule(0.4, dropout=RATE))
    assert max(kept, default=0) <= q.numel()


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_gives_the_same_loss_and_gradient_with_and_without_checkpointing(name):
    ids = torch.randint(5, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    found = {}
    for way in ("plain", "again", "checkpointed", "other seed"):
        model = made(name)
        if way == "checkpointed":
            model.gradient_checkpointing_enable()
        torch.manual_seed(5 + (way == "other seed"))
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        found[way] = [loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    for way in ("again", "checkpointed"):
        for a, b in zip(found["plain"], found[way], strict=True):
            assert torch.equal(a, b), way
    assert found["other seed"][0] != found["plain"][0]


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_untouched_and_a_rate_of_zero_draws_nothing(name):
    ids = torch.randint(5, 61, (2, 12), generator=torch.Generator().manual_seed(1))
    off = {k: 0.0 for k in MODELS[name][1] if "drop" in k}
    off |= {"hidden_dropout_prob": 0.0} if name == "bert" else {}
    off |= {"dropout": 0.0} if name == "bart" else {}
    with torch.no_grad():
        torch.manual_seed(7)
        state = torch.get_rng_state()
        plain = made(name, **off)
        torch.set_rng_state(state)
        without = plain(ids, labels=ids).logits
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(
            made(name).eval()(ids, labels=ids).logits, plain.eval()(ids, labels=ids).logits
        )
        torch.testing.assert_close(without, plain.eval()(ids, labels=ids).logits)
        alone = {**off, MODELS[name][2]: RATE}
        assert not torch.allclose(made(name, **alone)(ids, labels=ids).logits, without, atol=1e-3)


@pytest.mark.parametrize("rate", [1.0, -0.1, "much"])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(ConfigError, match=r"attention_dropout=.*is no rate"):
        made("llama", attention_dropout=rate)


def test_a_rate_that_a_family_does_not_know_is_refused():
    with pytest.raises(ConfigError, match=r"attention_dropout=0\.1"):
        made("gpt2", attention_dropout=0.1)
    made("gpt2", attention_dropout=0.0)
