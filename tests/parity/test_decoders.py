"""Every decoder family against transformers (eager), option by option, on tiny random models."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
import transformers

from topwork.errors import CheckpointError, ConfigError
from topwork.models import AutoModelForCausalLM, Config
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL

NAMES = [name for name in ALL if "causal-lm" in tasks_of(name)]
BASE = {
    "vocab_size": 61,
    "tie_word_embeddings": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SIZES = {
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
ROWS = [
    (name, case)
    for name in NAMES
    for case in importlib.import_module(f"topwork.models.families.{name}").CASES
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(ROWS)]
each_case = pytest.mark.parametrize(("family", "case"), ROWS, ids=IDS)


def tiny(family):
    """The sizes of the family's test models: its own `TINY` where it names them otherwise."""
    return getattr(importlib.import_module(f"topwork.models.families.{family}"), "TINY", SIZES)


def attention(case):
    """The peer's eager Falcon adds ALiBi twice (transformers 5.23); its sdpa does not."""
    return {"attn_implementation": "sdpa" if case.get("alibi") else "eager"}


@pytest.fixture
def pair(family, case, tmp_path):
    """The peer's model and ours, loaded from the peer's folder; every parameter is random."""
    torch.manual_seed(0)
    values = json.loads(json.dumps({**BASE, **tiny(family), **case}))
    config = transformers.AutoConfig.for_model(family, **values)
    theirs = transformers.AutoModelForCausalLM.from_config(config, **attention(case))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.dim() > 1 else 0.5))
    theirs.eval().save_pretrained(tmp_path / "theirs")
    return theirs, AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


@each_case
def test_logits_and_gradients_equal_the_peer(pair):
    theirs, ours = pair
    ids = torch.randint(0, 61, (2, 23))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    wanted, found = theirs(ids, labels=labels), ours(ids, labels=labels)
    assert relative(found.logits, wanted.logits) < 1e-5
    assert relative(found.loss, wanted.loss) < 1e-5
    wanted.loss.backward()
    found.loss.backward()
    # A gradient that is zero in exact arithmetic (a key's bias without rotary) is noise in both.
    floor = 1e-2 * max(parameter.grad.norm() for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        error = (ours.get_parameter(name).grad - parameter.grad).norm()
        assert error < 1e-5 * max(parameter.grad.norm(), floor), name


@each_case
def test_padded_rows_packed_rows_and_cached_steps_agree(pair):
    _, ours = pair
    if "dynamic" in str(ours.config.to_dict()):
        return  # beyond its context the longest row sets the angles of all, as in the peer
    ids = torch.randint(0, 61, (3, 14))
    sizes = [14, 9, 4]
    with torch.no_grad():
        alone = [ours(ids[i : i + 1, :n]).logits[0] for i, n in enumerate(sizes)]
        packed = ours(
            torch.cat([ids[i, :n] for i, n in enumerate(sizes)])[None], lengths=tuple(sizes)
        ).logits[0]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-5)
        for side in ("left", "right"):
            rows, mask = torch.zeros_like(ids), torch.zeros_like(ids)
            for i, n in enumerate(sizes):
                where = slice(14 - n, 14) if side == "left" else slice(0, n)
                rows[i, where], mask[i, where] = ids[i, :n], 1
            padded = ours(rows, attention_mask=mask).logits
            for i in range(3):
                torch.testing.assert_close(padded[i][mask[i] == 1], alone[i], rtol=1e-4, atol=1e-5)
        cache = ours.new_cache()
        mask = torch.zeros_like(ids)
        rows = torch.zeros_like(ids)
        for i, n in enumerate(sizes):
            rows[i, 14 - n :], mask[i, 14 - n :] = ids[i, :n], 1
        pieces, at = [], 0
        for step in (11, 1, 2):
            part = slice(at, at + step)
            pieces.append(
                ours(rows[:, part], attention_mask=mask[:, : at + step], past_key_values=cache)
                .logits
            )  # fmt: skip
            at += step
        cached = torch.cat(pieces, 1)
        for i in range(3):
            torch.testing.assert_close(cached[i][mask[i] == 1], alone[i], rtol=1e-4, atol=1e-5)


@each_case
def test_what_we_save_loads_in_the_peer(case, pair, tmp_path):
    theirs, ours = pair
    ours.save_pretrained(tmp_path / "ours", max_shard_size=20_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, **attention(case)
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.randint(0, 61, (1, 20))
    with torch.no_grad():
        assert relative(again(ids).logits, theirs(ids).logits) < 1e-6


@each_case
def test_each_option_acts(family, case, pair, tmp_path):
    """The case would fail if the option were ignored: without it the logits differ."""
    if not case or case.get("tie_word_embeddings") or case.get("sliding_window", 1) is None:
        return
    _, ours = pair
    without = {k: v for k, v in ours.config.to_dict().items() if k not in case}
    without |= {k: v for k, v in tiny(family).items() if k in case}
    if "rope_parameters" in without:
        without["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if {"rope_scaling", "rope_parameters"} & set(case):
        without["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "mistral":
        without["sliding_window"] = None
    try:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", config=Config(**without))
    except (CheckpointError, ConfigError):
        return  # the parameters differ, or the other options have no meaning without it
    ids = torch.randint(0, 61, (1, 40))
    with torch.no_grad():
        assert relative(plain(ids).logits, ours(ids).logits) > 1e-4


@pytest.mark.parametrize("family", [name for name in NAMES if tiny(name) is SIZES])
def test_the_old_config_generation_reads_the_same(family, tmp_path):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **BASE, **SIZES, head_dim=8, rope_theta=77.0)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    values["rope_theta"] = values.pop("rope_parameters")["rope_theta"]
    values["rope_scaling"] = None
    values["torch_dtype"] = values.pop("dtype")
    file.write_text(json.dumps(values))
    ids = torch.randint(0, 61, (1, 20))
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        assert relative(ours, theirs.eval()(ids).logits) < 1e-5
