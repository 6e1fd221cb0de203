"""Each field of each part's spec is set by some case of some family: none stands for nothing."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass

import pytest

from topwork.models import Config
from topwork.models.config import ConfigReader
from topwork.models.decoder import BlockNorms, DecoderSpec, HeadSpec, LayerSpec
from topwork.models.families import NAMES, family
from topwork.nn.latent import LatentAttentionSpec
from topwork.nn.layers import AttentionSpec, MlpSpec, PlainMlpSpec, QkNorm, Temperature
from topwork.nn.moe import (
    ExpertsSpec,
    GroupedRouter,
    MoeSpec,
    SigmoidRouter,
    SoftmaxRouter,
    TopKSoftmaxRouter,
)
from topwork.nn.norms import NORMS, NormSpec
from topwork.nn.rotary import SCALINGS, RotarySpec

SIZES = {
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
PARTS = (
    DecoderSpec, LayerSpec, HeadSpec, BlockNorms, AttentionSpec, LatentAttentionSpec, MlpSpec,
    PlainMlpSpec, QkNorm, NormSpec, RotarySpec, Temperature, MoeSpec, ExpertsSpec, SoftmaxRouter,
    TopKSoftmaxRouter, SigmoidRouter, GroupedRouter,
)  # fmt: skip
# Acting in training alone: tests/parity/test_dropout.py; with images: test_multimodal.py there.
ELSEWHERE = {
    (LayerSpec, "dropout"), (DecoderSpec, "embedding_dropout"), (AttentionSpec, "dropout"),
    (LatentAttentionSpec, "dropout"), (RotarySpec, "sections"),
}  # fmt: skip


def walk(part, seen):
    if is_dataclass(part):
        for field in fields(part):
            value = getattr(part, field.name)
            seen.setdefault((type(part), field.name), set()).add(repr(value))
            walk(value, seen)
    elif isinstance(part, tuple):
        for one in part:
            walk(one, seen)


@pytest.fixture(scope="module")
def values():
    seen = {}
    for name in NAMES:
        home = family(name)
        if hasattr(home, "spec"):
            for case in home.CASES:
                sizes = getattr(home, "TINY", SIZES)
                config = Config(model_type=name, **{"vocab_size": 61, **sizes, **case})
                walk(home.spec(ConfigReader(config)), seen)
    return seen


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.__name__)
def test_every_field_takes_a_value_of_its_own_in_some_case(part, values):
    unset = [
        field.name
        for field in fields(part)
        if (part, field.name) not in ELSEWHERE
        and not values.get((part, field.name), set())
        - (set() if field.default is MISSING else {repr(field.default)})
    ]
    assert not unset, f"no case sets {unset} of {part.__name__}"


def test_every_norm_and_every_rotary_scaling_is_in_some_case(values):
    assert {repr(kind) for kind in NORMS} == values[NormSpec, "kind"]
    assert {repr(kind) for kind in SCALINGS} == values[RotarySpec, "kind"]
