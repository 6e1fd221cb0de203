"""Constrained decoding: whatever the model wants, the text has the asked form."""

from __future__ import annotations

import json
import re

import pytest
import torch
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers

from topwork import AutoModelForCausalLM, Tokenizer
from topwork.errors import ConfigError
from topwork.generation import Engine
from topwork.models import Config

Constraint = pytest.importorskip("topwork.generation.constraints").Constraint
pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    core = Core(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<end>"])
    return Tokenizer(core, {"eos_token": "<end>"})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Config(
        model_type="llama", vocab_size=260, hidden_size=32, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=256, eos_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("kind", "fits"),
    [
        ({"json_schema": SCHEMA}, lambda text: set(json.loads(text)) == {"name", "age"}),
        ({"json_schema": json.dumps(SCHEMA)}, lambda text: json.loads(text)["name"] in "ann bob"),
        ({"regex": r"[a-c]{3}-\d{2}"}, re.compile(r"[a-c]{3}-\d{2}").fullmatch),
        ({"grammar": 'start: "(" start ")" | "x"'}, re.compile(r"\(*x\)*").fullmatch),
    ],
    ids=["schema", "schema as text", "regex", "grammar"],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["drawn", "beams"])
def test_the_text_has_the_asked_form(model, tokenizer, kind, fits, options):
    torch.manual_seed(1)
    ids = torch.tensor([tokenizer.encode("say:"), tokenizer.encode("tell")])
    out = model.generate(
        ids, max_new_tokens=120, do_sample=not options, temperature=2.0,
        logits_processor=[Constraint(tokenizer, **kind)], pad_token_id=0, **options,
    )  # fmt: skip
    whole = 0
    for row in out[:, ids.shape[1] :]:
        text = tokenizer.decode(row.tolist(), skip_special_tokens=True)
        if 0 in row.tolist():
            assert fits(text), text
            whole += 1
    assert whole or options or "grammar" in kind  # the likeliest text need not end


def test_requests_of_the_engine_follow_their_own_constraints(model, tokenizer):
    engine = Engine(model)
    kinds = [r"a{2,4}", r"[0-9]{3}", None]
    asked = [
        engine.submit(
            tokenizer.encode("go"), max_new_tokens=9, do_sample=True, seed=i,
            logits_processor=[Constraint(tokenizer, regex=kind)] if kind else [],
        )
        for i, kind in enumerate(kinds)
    ]  # fmt: skip
    list(engine.run())
    for kind, request in zip(kinds, asked):
        assert request.error is None
        if kind:
            text = tokenizer.decode(request.new_ids, skip_special_tokens=True)
            assert re.fullmatch(kind, text), text


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({}, "one of"), ({"regex": "a", "grammar": "b"}, "one of"), ({"regex": "("}, "understood"),
        ({"grammar": "start: missing"}, "understood"), ({"json_schema": "{"}, "understood"),
    ],
)  # fmt: skip
def test_what_is_no_constraint_is_refused(tokenizer, kind, words):
    with pytest.raises(ConfigError, match=words):
        Constraint(tokenizer, **kind)
