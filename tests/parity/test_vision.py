"""Every vision family against transformers (eager): option by option, head by head."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import peft
from topwork import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from topwork.errors import CheckpointError, ConfigError, TopworkWarning
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of
from topwork.models.vision import VisionTower

TASKS = {
    "base": AutoModel,
    "image-classification": AutoModelForImageClassification,
    "zero-shot-image-classification": AutoModelForZeroShotImageClassification,
}
SIDES = {"clip_vision_model", "clip_text_model", "siglip_vision_model", "siglip_text_model"}
NAMES = [name for name in ALL if set(tasks_of(name)) & set(list(TASKS)[1:]) or name in SIDES]
DUAL = ("clip", "siglip")
LAYERS = {"hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
          "num_attention_heads": 4}  # fmt: skip
VISION = {**LAYERS, "image_size": 16, "patch_size": 4}
TEXT = {**LAYERS, "vocab_size": 61, "max_position_embeddings": 12, "eos_token_id": 60,
        "bos_token_id": 59}  # fmt: skip
ROWS = [
    (name, i, task)
    for name in NAMES
    for i in range(len(family_of(name).CASES))
    for task in TASKS
    if task in tasks_of(name)
]
each_row = pytest.mark.parametrize(
    ("family", "case", "task"), ROWS, ids=[f"{n}-{i}-{t}" for n, i, t in ROWS]
)
each_family = pytest.mark.parametrize("family", NAMES)
LOOKING = [name for name in NAMES if "text" not in name]


def options_of(family, case):
    given = json.loads(json.dumps(family_of(family).CASES[case]))
    if family in DUAL:
        return {
            **given,
            "vision_config": {**VISION, **given.get("vision_config", {})},
            "text_config": {**TEXT, **given.get("text_config", {})},
        }
    return {**(TEXT if "text" in family else VISION), **given}


def peer(family, case, task, **changes):
    """The peer's model with every parameter random."""
    config = transformers.AutoConfig.for_model(
        family, **{**options_of(family, case), "num_labels": 3, **changes}
    )
    torch.manual_seed(0)
    maker = getattr(transformers, TASKS[task].__name__)
    if family == "siglip_text_model":
        model = transformers.SiglipTextModel._from_config(config, attn_implementation="eager")
    else:
        model = maker.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() > 1 else 0.5))
    return model.eval()


def part_of(config, name):
    return getattr(config, f"{name}_config", config)


def inputs(model, task, images=2, size=None):
    """Images, and texts that end with the end token at several places."""
    torch.manual_seed(1)
    batch, names = {}, type(model).__name__
    vision = part_of(model.config, "vision")
    if "Text" not in names:
        side = size or vision.image_size
        side = (side, side) if isinstance(side, int) else tuple(side)
        batch["pixel_values"] = torch.randn(images, vision.num_channels, *side)
    if task == "image-classification":
        batch["labels"] = torch.tensor([2, 0] * images)[:images]
    elif "Text" in names or hasattr(model.config, "text_config"):
        ids = torch.randint(3, 58, (images, 9))
        end = part_of(model.config, "text").eos_token_id
        for i in range(images):
            ids[i, 5 + i :] = 60 if end == 2 else end
        batch["input_ids"] = ids
    return batch


FOUND = ("last_hidden_state", "pooler_output", "logits", "logits_per_image", "logits_per_text",
         "image_embeds", "text_embeds")  # fmt: skip


def found_in(output):
    return {n: v for n in FOUND if (v := getattr(output, n, None)) is not None}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def gradients(model, batch):
    """Of a fixed mix of all outputs, by name; those that are not zero."""
    model.zero_grad(set_to_none=True)
    outputs = found_in(model(**batch)).values()
    mixes = [(v * torch.arange(v.numel(), dtype=v.dtype).cos().view_as(v)).mean() for v in outputs]
    sum(mixes).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {name: gradient for name, gradient in grads.items() if gradient.any()}


def saved(model, folder):
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@each_row
def test_outputs_and_gradients_equal_the_peer(family, case, task, tmp_path):
    theirs = peer(family, case, task)
    theirs.save_pretrained(tmp_path)
    ours = TASKS[task].from_pretrained(tmp_path)
    batch = inputs(theirs, task)
    more = {"return_loss": True} if family in DUAL and "labels" not in batch else {}
    wanted, found = theirs(**batch, **more), ours(**batch, **more)
    exact = copy.deepcopy(theirs).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    truth = found_in(exact(**wide))
    assert found_in(wanted).keys() == found_in(found).keys()
    for name, value in found_in(wanted).items():
        limit = max(1e-5, 3 * relative(value, truth[name]))
        assert relative(getattr(found, name), value) < limit < 3e-4, name
    if getattr(wanted, "loss", None) is not None:
        assert relative(found.loss, wanted.loss) < 1e-5
    # In double, each gradient by itself: some are so small beside the terms that cancel in them
    # that single precision, in which the peer's eager softmax stays, leaves nothing to compare.
    exact.set_attn_implementation("sdpa")
    wanted, found = gradients(exact, wide), gradients(ours.double(), wide)
    noise = 1e-10 * max(gradient.norm() for gradient in wanted.values())
    pieces = {}
    for name, gradient in wanted.items():
        pieces.setdefault(place_of(ours, name), []).append(gradient)
    zero = torch.zeros(())
    for name in pieces.keys() | found.keys():
        parts = pieces.get(name, [zero])
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        assert (found.get(name, zero) - whole).norm() < 1e-5 * whole.norm() + noise, name


def place_of(ours, name):
    """Where the peer's parameter `name` lies in our model."""
    wanted = dict(ours.named_parameters())
    (place,) = ours.table.places(name, wanted)
    return place.name


@each_row
def test_what_we_save_loads_in_the_peer(family, case, task, tmp_path):
    theirs = peer(family, case, task)
    before = saved(theirs, tmp_path / "theirs")
    TASKS[task].from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    home = "text_model." if "text" in family else "vision_model."
    assert {k.removeprefix(home) for k in after} == {k.removeprefix(home) for k in before}
    again, info = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@each_family
def test_both_layouts_load_the_same(family, tmp_path):
    """The Hub's names, and those that the peer has in memory now; with and without a prefix."""
    for task in tasks_of(family):
        theirs = peer(family, 1, task)
        stored = saved(theirs, tmp_path / "hub")
        newer = {k: v.contiguous() for k, v in theirs.state_dict().items()}
        home = "text_model." if "text" in family else "vision_model."
        layouts = [stored, newer]
        if family in SIDES:
            layouts.append({home + k.removeprefix(home): v for k, v in stored.items()})
        if task == "base" and family not in DUAL and family not in SIDES:
            layouts.append({f"{family}.{k}": v for k, v in stored.items()})
        batch = inputs(theirs, task)
        wanted = found_in(theirs(**batch))
        for layout in layouts:
            layout[f"{home}embeddings.position_ids"] = torch.arange(5)[None]
            if family not in DUAL and family not in SIDES:
                layout.pop(f"{home}embeddings.position_ids")
            save_file(layout, tmp_path / "hub" / "model.safetensors")
            found = found_in(TASKS[task].from_pretrained(tmp_path / "hub")(**batch))
            for name, value in wanted.items():
                assert relative(found[name], value) < 1e-5, name


@pytest.mark.parametrize("family", DUAL)
def test_a_tower_loads_from_the_files_of_both(family, tmp_path):
    theirs = peer(family, 0, "base")
    theirs.save_pretrained(tmp_path)
    batch = inputs(theirs, "base")
    wanted = theirs(**batch)
    config = AutoConfig.from_pretrained(tmp_path)
    vision = AutoModel.from_pretrained(tmp_path, config=config.part("vision_config"))
    text = AutoModel.from_pretrained(tmp_path, config=config.part("text_config"))
    found = vision(batch["pixel_values"])
    assert relative(found.pooler_output, pooled(wanted, "vision", family, theirs)) < 1e-5
    seen = text(batch["input_ids"]).last_hidden_state
    assert relative(seen, wanted.text_model_output.last_hidden_state) < 1e-5
    with pytest.warns(TopworkWarning, match="classifier"):
        headed = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert headed(batch["pixel_values"]).logits.shape == (2, 5)
    with pytest.raises(ConfigError, match="nearest: 'vision_config'"):
        config.part("vison_config")


def pooled(output, side, family, theirs):
    """The peer puts the projected vector in the pooled one's place."""
    batch = inputs(theirs, "base")
    if family == "siglip":
        return output.vision_model_output.pooler_output
    return theirs.vision_model(batch["pixel_values"]).pooler_output


@pytest.mark.parametrize("family", LOOKING)
def test_images_of_other_sizes_get_positions_from_between(family, tmp_path):
    for size in ((24, 24), (32, 12), (18, 21)):
        theirs = peer(family, 0, "base")
        theirs.save_pretrained(tmp_path)
        ours = AutoModel.from_pretrained(tmp_path)
        batch = inputs(theirs, "base", size=size)
        more = {} if "dinov2" in family else {"interpolate_pos_encoding": True}
        wanted, found = found_in(theirs(**batch, **more)), found_in(ours(**batch, **more))
        for name, value in wanted.items():
            assert relative(found[name], value) < 1e-5, name
        if more:
            with pytest.raises(ConfigError, match="interpolate_pos_encoding=True"):
                ours(**batch)


@pytest.mark.parametrize("family", ["vit", "dinov2", "clip_vision_model", "siglip_vision_model"])
def test_hidden_states_of_every_layer_equal_the_peer(family, tmp_path):
    theirs = peer(family, 0, "base")
    theirs.save_pretrained(tmp_path)
    ours = AutoModel.from_pretrained(tmp_path)
    batch = inputs(theirs, "base")
    wanted = theirs(**batch, output_hidden_states=True).hidden_states
    found = ours(**batch, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 3
    for i, state in enumerate(wanted):
        assert relative(found[i], state) < 1e-5
        assert torch.equal(ours.features(batch["pixel_values"], i - 3), found[i])
    with pytest.raises(ConfigError, match="2 blocks"):
        ours.features(batch["pixel_values"], 4)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers"])
def test_masked_patches_equal_the_peer(family, tmp_path):
    theirs = peer(family, 0, "base")
    theirs.save_pretrained(tmp_path)
    batch = {**inputs(theirs, "base"), "bool_masked_pos": torch.rand(2, 16) < 0.5}
    found = AutoModel.from_pretrained(tmp_path)(**batch)
    assert relative(found.last_hidden_state, theirs(**batch).last_hidden_state) < 1e-5


def test_padding_of_texts_is_not_seen(tmp_path):
    for family in DUAL:
        theirs = peer(family, 0, "base")
        theirs.save_pretrained(tmp_path)
        ours = AutoModel.from_pretrained(tmp_path)
        batch = inputs(theirs, "base")
        batch["attention_mask"] = torch.ones(2, 9, dtype=torch.long)
        batch["attention_mask"][0, 6:] = 0
        found, wanted = found_in(ours(**batch)), found_in(theirs(**batch))
        for name in ("text_embeds", "logits_per_image"):
            assert relative(found[name], wanted[name]) < 1e-5
        features = ours.get_text_features(batch["input_ids"], batch["attention_mask"])
        assert (
            relative(features / features.norm(dim=-1, keepdim=True), wanted["text_embeds"]) < 1e-5
        )


@pytest.mark.parametrize("family", LOOKING)
def test_padded_patches_are_not_seen(family, tmp_path):
    """Towers that see images of several sizes in one batch: places and a mask for the patches."""
    if family in DUAL:
        return
    torch.manual_seed(0)
    ours = AutoModel.from_config(Config(model_type=family, **options_of(family, 0))).eval().trunk
    images = torch.randn(2, 3, 16, 16)
    places = torch.arange(16).expand(2, -1)
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 10:] = False
    other = images.clone()
    other[1, :, 12:] += 1.0  # the last row of patches, which is padding
    found, again = (ours(x, patch_positions=places, patch_mask=keep) for x in (images, other))
    lead = ours.spec.patches.lead
    real = slice(0, lead + 10)
    torch.testing.assert_close(found.last_hidden_state[1, real], again.last_hidden_state[1, real])
    assert not torch.allclose(ours(images).last_hidden_state[1], ours(other).last_hidden_state[1])
    torch.testing.assert_close(
        ours(images, patch_positions=places).last_hidden_state, ours(images).last_hidden_state
    )


@pytest.mark.parametrize("family", LOOKING)
def test_bf16_stays_near(family, tmp_path):
    task = "image-classification" if family not in SIDES else "base"
    theirs = peer(family, 0, task)
    theirs.save_pretrained(tmp_path)
    ours = TASKS[task].from_pretrained(tmp_path, dtype="bfloat16")
    batch = inputs(theirs, task)
    batch.pop("labels", None)
    wanted = found_in(theirs(**batch))
    for name, value in found_in(ours(**batch)).items():
        assert value.dtype == torch.bfloat16
        assert relative(value.float(), wanted[name]) < 0.05, name


@pytest.mark.parametrize("family", [n for n in LOOKING if n not in SIDES])
def test_an_adapter_goes_to_the_peer_and_back(family, tmp_path):
    """Trained here with its new head, loaded by peft on the peer's model, and the other way."""
    task = "image-classification"
    theirs = peer(family, 0, task)
    theirs.save_pretrained(tmp_path / "base")
    targets = ["q_proj", "v_proj", "fc1"] if family in DUAL else ["query", "value", "dense"]
    config = LoraConfig(r=3, target_modules=targets, modules_to_save=["classifier"])
    ours = get_peft_model(TASKS[task].from_pretrained(tmp_path / "base"), config)
    batch = inputs(theirs, task)
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], 1e-3)
    first = ours(**batch).loss
    for _ in range(3):
        optimizer.zero_grad()
        ours(**batch).loss.backward()
        optimizer.step()
    assert ours(**batch).loss < first
    ours.eval().save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in key for key in state)
    fresh = TASKS[task].from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(again(**batch).logits, ours(**batch).logits)
    if family in DUAL:
        theirs = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
        assert relative(theirs(**batch).logits, ours(**batch).logits) < 1e-5
        return
    # The peer has other names in memory, and refuses an adapter with those of the Hub.
    with pytest.raises(ValueError, match="target_modules"):
        peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter"))


@pytest.mark.parametrize("family", [n for n in LOOKING if n not in SIDES])
def test_an_adapter_of_the_peers_layout_loads_here(family, tmp_path):
    theirs = peer(family, 0, "image-classification")
    theirs.save_pretrained(tmp_path / "base")
    batch = inputs(theirs, "image-classification")
    targets = ["q_proj", "v_proj", "fc1", "out_proj" if family in DUAL else "o_proj"]
    config = peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["classifier"])
    theirs = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    ours = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    assert relative(ours(**batch).logits, theirs(**batch).logits) < 1e-5
    ours.load_adapter(tmp_path / "adapter", "again")
    ours.set_adapter("again")
    assert relative(ours(**batch).logits, theirs(**batch).logits) < 1e-5
    ours.save_pretrained(tmp_path / "back")
    fresh = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    back = PeftModel.from_pretrained(fresh, tmp_path / "back" / "again")
    torch.testing.assert_close(back(**batch).logits, ours(**batch).logits)


@pytest.mark.parametrize("family", [n for n in LOOKING if n not in SIDES])
def test_checkpointed_blocks_give_the_same_gradients(family):
    torch.manual_seed(0)
    config = Config(model_type=family, **options_of(family, 0), num_labels=3)
    ours = AutoModelForImageClassification.from_config(config).train()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    ours(**batch).loss.backward()
    wanted = {n: p.grad for n, p in ours.named_parameters()}
    ours.zero_grad(set_to_none=True)
    ours.gradient_checkpointing_enable()
    ours(**batch).loss.backward()
    for name, parameter in ours.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], msg=name)


def test_dropout_and_dropped_parts_act_in_training_alone():
    torch.manual_seed(0)
    images = torch.randn(8, 3, 16, 16)
    for family, option in (
        ("vit", "hidden_dropout_prob"), ("vit", "attention_probs_dropout_prob"),
        ("dinov2", "drop_path_rate"), ("dinov2", "attention_probs_dropout_prob"),
        ("clip_vision_model", "attention_dropout"),
    ):  # fmt: skip
        config = Config(model_type=family, **VISION, **{option: 0.5})
        ours = AutoModel.from_config(config).eval()
        calm = ours(images).last_hidden_state
        assert torch.equal(ours(images).last_hidden_state, calm)
        ours.train()
        assert not torch.equal(ours(images).last_hidden_state, ours(images).last_hidden_state)


def test_dropped_parts_leave_the_mean_as_it_is():
    torch.manual_seed(0)
    config = Config(model_type="dinov2", **{**VISION, "num_hidden_layers": 1}, drop_path_rate=0.5)
    ours = AutoModel.from_config(config).train()
    image = torch.randn(1, 3, 16, 16)
    ((before, once),) = [list(ours.states(ours.embed(image)))]
    kept = [list(ours.states(ours.embed(image.expand(64, -1, -1, -1))))[1] for _ in range(40)]
    calm = list(ours.eval().states(ours.embed(image)))[1]
    added = torch.cat(kept).mean(0) - before[0]
    assert relative(added, (calm - before)[0]) < 0.1
    assert not torch.equal(once, calm)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"hidden_act": "gelo"}, "nearest: 'gelu'"),
        ({"pooler_act": "tahn"}, "nearest: 'tanh'"),
        ({"patch_size": 32}, "patch_size"),
        ({"image_size": 0}, "image_size"),
        ({"a_new_option": 3}, "a_new_option=3"),
        ({"model_type": "clip", "vision_config": {"a_new_option": 3}}, "a_new_option=3"),
        ({"model_type": "siglip", "text_config": {"hidden_act": "gelo"}}, "nearest: 'gelu'"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_refused(changes, words):
    base = {} if changes.get("model_type") in DUAL else VISION
    with pytest.raises(ConfigError, match=words):
        AutoModel.from_config(Config(**{"model_type": "vit", **base, **changes}))


def test_bad_calls_say_what_is_wrong(tmp_path):
    torch.manual_seed(0)
    vit = AutoModelForImageClassification.from_config(Config(model_type="vit", **VISION))
    with pytest.raises(ConfigError, match=r"\[2, 1, 16, 16\] must be \[batch, 3"):
        vit(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ConfigError, match="smaller than a patch"):
        vit(torch.zeros(1, 3, 3, 16), interpolate_pos_encoding=True)
    with pytest.raises(ConfigError, match="no token for masked"):
        AutoModel.from_config(Config(model_type="vit", **VISION))(
            torch.zeros(1, 3, 16, 16), bool_masked_pos=torch.ones(1, 16)
        )
    clip = AutoModel.from_config(Config(model_type="clip", **options_of("clip", 0)))
    ids, images = torch.zeros(1, 13).long(), torch.zeros(2, 3, 16, 16)
    with pytest.raises(ConfigError, match="truncation=True, max_length=12"):
        clip(ids, images)
    with pytest.raises(ConfigError, match="1 texts and 2 images"):
        clip(ids[:, :9], images, return_loss=True)
    with pytest.raises(ConfigError, match="no model for causal-lm"):
        AutoModelForCausalLM.from_config(Config(model_type="vit", **VISION))


def test_a_lost_tensor_of_the_tower_is_an_error(tmp_path):
    state = saved(peer("vit", 0, "base"), tmp_path)
    lost = "encoder.layer.0.attention.attention.query.weight"
    save_file({k: v for k, v in state.items() if k != lost}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"missing: .*{lost}"):
        AutoModel.from_pretrained(tmp_path)


def test_each_family_has_its_rows():
    towers = [
        name
        for name in ALL
        if any(task in tasks_of(name) for task in list(TASKS)[1:])
        or name.endswith(("_vision_model", "_text_model"))
    ]
    assert {name for name, _, _ in ROWS} == set(NAMES) == set(towers)
    assert all(len(family_of(name).CASES) >= 3 for name in NAMES)
    assert isinstance(AutoModel.from_config(Config(model_type="vit", **VISION)), VisionTower)
