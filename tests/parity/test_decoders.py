"""Every decoder family against transformers (eager), option by option, on tiny random models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import peft
from topwork.errors import CheckpointError, ConfigError
from topwork.models import AutoModel, AutoModelForCausalLM, Config
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of
from topwork.peft import PeftModel
from topwork.peft.usual import LINEARS
from topwork.weights import save_weights
from topwork.weights.table import cut

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
ROWS = [(name, case) for name in NAMES for case in family_of(name).CASES]
IDS = [f"{name}-{family_of(name).CASES.index(case)}" for name, case in ROWS]
ROPE = {
    "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "rotary_pct",
    "rotary_emb_base", "original_max_position_embeddings",
}  # fmt: skip
# What the peer fills in from an option: without the option it must go too.
DERIVED = {
    "sliding_window_pattern": {"layer_types", "_sliding_window_pattern"},
    "no_rope_layer_interval": {"layer_types", "no_rope_layers"},
    "no_rope_layers": {"layer_types"},
    "max_window_layers": {"layer_types"},
    "interleave_moe_layer_step": {"moe_layers"},
    "num_experts": {"num_local_experts"},
}
# Options that ask for the same numbers by another way.
SAME_NUMBERS = {"reorder_and_upcast_attn", "residual_in_fp32"}  # the latter in bf16 alone


def tiny(family):
    """The sizes of the family's test models: its own `TINY` where it names them otherwise."""
    return getattr(family_of(family), "TINY", SIZES)


def attention(case):
    """The peer's eager Falcon adds ALiBi twice (transformers 5.23); its sdpa does not."""
    return {"attn_implementation": "sdpa" if case.get("alibi") else "eager"}


def peer(family, case):
    """The peer's model, every parameter and buffer of it random."""
    torch.manual_seed(0)
    values = json.loads(json.dumps({**BASE, **tiny(family), **case}))
    config = transformers.AutoConfig.for_model(family, **values)
    model = transformers.AutoModelForCausalLM.from_config(config, **attention(case))
    with torch.no_grad():
        buffers = [b for n, b in model.named_buffers() if n in model.state_dict()]
        for value in (*model.parameters(), *buffers):
            value.copy_(torch.randn_like(value) * (0.3 if value.dim() > 1 else 0.5))
    return model.eval()


@pytest.fixture(scope="module", params=ROWS, ids=IDS)
def row(request, tmp_path_factory):
    """One case: the peer's model, its folder, and ours loaded from there."""
    family, case = request.param
    folder = tmp_path_factory.mktemp("theirs")
    theirs = peer(family, case)
    theirs.save_pretrained(folder)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    return SimpleNamespace(family=family, case=case, folder=folder, theirs=theirs, ours=ours)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def gradient(model, name):
    """The gradient of what the peer calls `name`."""
    (place,) = model.table.places(name, dict(model.named_parameters()))
    grad = model.get_parameter(place.name).grad
    if place.pack is None:
        return grad
    return cut(grad[place.index] if place.pack.numbered else grad, place.pack)[place.part]


def test_logits_and_gradients_equal_the_peer(row):
    ids = torch.randint(0, 61, (2, 23), generator=torch.Generator().manual_seed(1))
    labels = ids.masked_fill(ids % 3 == 0, -100)
    wanted, found = row.theirs(ids, labels=labels), row.ours(ids, labels=labels)
    assert relative(found.logits, wanted.logits) < 1e-5
    assert relative(found.loss, wanted.loss) < 1e-5
    wanted.loss.backward()
    found.loss.backward()
    used = {n: p.grad for n, p in row.theirs.named_parameters() if p.grad is not None}
    # A gradient that is zero in exact arithmetic (a key's bias without rotary) is noise in both.
    floor = 5e-2 * max(grad.norm() for grad in used.values())
    for name, grad in used.items():
        error = (gradient(row.ours, name) - grad).norm()
        assert error < 1e-5 * max(grad.norm(), floor), name
    row.theirs.zero_grad()
    row.ours.zero_grad()


def test_padded_rows_packed_rows_and_cached_steps_agree(row):
    ours, text = row.ours, str(row.ours.config.to_dict())
    if "dynamic" in text or (
        "longrope" in text and row.case["original_max_position_embeddings"] < 15
    ):
        return  # beyond its context the longest row sets the angles of all, as in the peer
    ids = torch.randint(0, 61, (3, 14), generator=torch.Generator().manual_seed(2))
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


def test_what_we_save_loads_in_the_peer(row, tmp_path):
    row.ours.save_pretrained(tmp_path, max_shard_size=20_000)
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, **attention(row.case)
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert relative(again(ids).logits, row.ours(ids).logits) < 1e-5


def test_a_file_in_the_layout_of_the_memory_loads_too(row, tmp_path):
    if not row.ours.table.rules:
        pytest.skip("the layouts are one")
    (tmp_path / "config.json").write_text((row.folder / "config.json").read_text())
    save_weights(row.ours, tmp_path, tied=row.ours.tied)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, value in row.ours.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_each_option_acts(row):
    """The case would fail if an option were ignored: without it the logits differ."""
    ids = torch.arange(40)[None] % 61
    values = row.ours.config.to_dict()
    for option, value in row.case.items():
        defaults = {**BASE, **tiny(row.family)}
        if value in (None, defaults.get(option)) or option in SAME_NUMBERS:
            continue
        if option == "floor_scale" and not row.case.get("attn_temperature_tuning", True):
            continue
        gone = {option, *DERIVED.get(option, ())} | (ROPE if option in ROPE else set())
        without = {k: v for k, v in values.items() if k not in gone}
        without |= {k: defaults[k] for k in gone if k in defaults}
        try:
            plain = AutoModelForCausalLM.from_pretrained(row.folder, config=Config(**without))
        except (CheckpointError, ConfigError):
            continue  # the parameters differ, or the other options have no meaning without it
        with torch.no_grad():
            found, wanted = plain(ids, labels=ids), row.ours(ids, labels=ids)
        pairs = ((found.logits, wanted.logits), (found.loss, wanted.loss))
        assert max(relative(*pair) for pair in pairs) > 3e-5, option


def test_the_old_config_generation_reads_the_same(row):
    values = json.loads((row.folder / "config.json").read_text())
    values["torch_dtype"] = values.pop("dtype")
    rope = values.pop("rope_parameters", {})
    if "full_attention" in rope:
        full, sliding = rope["full_attention"], rope["sliding_attention"]
        values["rope_local_base_freq"] = sliding["rope_theta"]
        rope = full
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope and rope.get("rope_type") != "proportional":
            values[key] = rope.pop(key)
    if rope:
        values["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    old = AutoModelForCausalLM.from_pretrained(row.folder, config=Config(**values))
    ids = torch.arange(40)[None] % 61
    with torch.no_grad():
        assert torch.equal(old(ids).logits, row.ours(ids).logits)


def test_the_bare_model_has_the_peers_names_and_hidden_states(row):
    if "base" not in tasks_of(row.family):
        pytest.skip("the family has no bare model")
    ours, trunk = AutoModel.from_pretrained(row.folder), row.theirs.base_model
    trunk = row.theirs.model if trunk is row.theirs else trunk
    ids = torch.arange(40)[None]
    with torch.no_grad():
        found, wanted = ours(ids).last_hidden_state, trunk(ids).last_hidden_state
    assert relative(found, wanted) < 1e-5
    if not ours.table.rules:
        assert set(ours.state_dict()) == set(trunk.state_dict())


def test_the_states_between_the_blocks_equal_the_peers(row):
    """Of rows of two lengths; padding does not count."""
    ids, mask = torch.arange(2 * 17).view(2, 17), torch.ones(2, 17).long()
    mask[1, 12:] = 0
    with torch.no_grad():
        row.theirs(ids[:, :4])  # else its dynamic rotary angles are those of a longer text before
        wanted = row.theirs(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        found = row.ours(ids, attention_mask=mask, output_hidden_states=True).hidden_states
        alone = row.ours(ids[:1], output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == len(alone)
    if row.family == "mamba":  # there the peer leaves out the first, and has the last unnormed too
        found, wanted, alone = found[1:], (*wanted[:-2], wanted[-1]), alone[1:]
    for ours, theirs, one in zip(found, wanted, alone):
        assert relative(ours[mask == 1], theirs[mask == 1]) < 1e-5
        torch.testing.assert_close(one, ours[:1], rtol=1e-4, atol=1e-5)
    assert row.ours(ids).hidden_states is None


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_within_the_peers_own_spread(name, tmp_path):
    """As near to the fp32 model as the peer's own bf16 one is, give or take."""
    case = family_of(name).CASES[0]
    theirs = peer(name, case).to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ours.dtype == torch.bfloat16
    ids = torch.randint(0, 61, (4, 40), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        exact = peer(name, case)
        exact.load_state_dict({k: v.float() for k, v in theirs.state_dict().items()})
        wanted = exact(ids).logits

    def error(model):
        """Of the middle token: where rounding sends a token to another expert, both are far off."""
        with torch.no_grad():
            off = (model(ids).logits.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        return off.median()

    assert error(ours) < 1.3 * error(theirs) + 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_adapters_on_the_usual_targets_pass_both_ways(name, tmp_path):
    base = peer(name, family_of(name).CASES[0])
    base.save_pretrained(tmp_path / "base")
    ids = torch.arange(26).view(2, 13)
    options = {"r": 3, "lora_alpha": 7, "fan_in_fan_out": name == "gpt2"}
    theirs = peft.get_peft_model(
        base,
        peft.LoraConfig(**options, target_modules=LINEARS[name], init_lora_weights=False),
    ).eval()
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter", is_trainable=True)
    wanted, found = theirs(ids, labels=ids), adapted(ids, labels=ids)
    assert relative(found.logits, wanted.logits) < 1e-5
    wanted.loss.backward()
    found.loss.backward()
    by_name = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert set(trained) == set(by_name)
    floor = 5e-2 * max(grad.norm() for grad in by_name.values())
    for key, grad in trained.items():
        error = (grad - by_name[key]).norm()
        assert error < 1e-5 * max(by_name[key].norm(), floor), key
    adapted.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(peer(name, family_of(name).CASES[0]), tmp_path / "ours")
    with torch.no_grad():
        assert relative(again(ids).logits, wanted.logits) < 1e-5
        assert relative(adapted.merge_and_unload()(ids).logits, wanted.logits) < 1e-5
