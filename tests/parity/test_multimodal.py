"""Every family of texts with images against transformers, option by option, on tiny models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import save_file

import peft
from topwork.errors import CheckpointError, ConfigError
from topwork.generation.engine import Engine
from topwork.models import AutoModelForImageTextToText, Config
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of
from topwork.models.multimodal import GridPlaces
from topwork.peft import LoraConfig, PeftModel, get_peft_model
from topwork.weights import save_weights

# BLIP, which looks at its image across, has tests of its own (test_image_answers).
NAMES = [n for n in ALL if "image-text-to-text" in tasks_of(n) and n != "blip"]
TEXT = {
    "vocab_size": 61, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 5, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
GEMMA = {**TEXT, "head_dim": 8}
TOWER = {
    "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
SIGLIP = {"model_type": "siglip_vision_model", **TOWER}
BOTH = ["sliding_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 2, 1]}
GRID = {"depth": 2, "num_heads": 3, "patch_size": 4, "in_channels": 3, "spatial_merge_size": 2}
IMAGE = 50
WHOLE = {"tie_word_embeddings": False, "image_token_index": IMAGE}
WHOLE_ID = {"tie_word_embeddings": False, "image_token_id": IMAGE}
# What each family's test models are made of, before the case's own options.
TINY = {
    "gemma3": {
        **WHOLE, "mm_tokens_per_image": 4, "vision_config": SIGLIP,
        "text_config": {"model_type": "gemma3_text", **GEMMA, "layer_types": BOTH,
                        "sliding_window": 9, "query_pre_attn_scalar": 8},
    },
    "idefics3": {
        **WHOLE_ID, "scale_factor": 2, "vision_config": TOWER,
        "text_config": {"model_type": "llama", **TEXT},
    },
    "llava": {
        **WHOLE, "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "text_config": {"model_type": "llama", **TEXT},
    },
    "paligemma": {
        **WHOLE, "tie_word_embeddings": True, "vision_config": SIGLIP, "projection_dim": 40,
        "hidden_size": 40, "text_config": {"model_type": "gemma", **GEMMA},
    },
    "qwen2_vl": {
        **WHOLE_ID, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53,
        "vision_config": {**GRID, "embed_dim": 24, "hidden_size": 40, "mlp_ratio": 1},
        "text_config": {**TEXT, "rope_parameters": ROPE},
    },
    "qwen2_5_vl": {
        **WHOLE_ID, "video_token_id": 51, "vision_start_token_id": 52, "vision_end_token_id": 53,
        "vision_config": {**GRID, "hidden_size": 24, "out_hidden_size": 40, "depth": 3,
                          "intermediate_size": 28, "window_size": 24, "fullatt_block_indexes": [1]},
        "text_config": {**TEXT, "rope_parameters": ROPE},
    },
}  # fmt: skip
TINY["smolvlm"] = TINY["idefics3"]
ROWS = [(name, case) for name in NAMES for case in family_of(name).CASES]
IDS = [f"{name}-{family_of(name).CASES.index(case)}" for name, case in ROWS]


def test_every_family_has_its_row():
    assert set(NAMES) == set(TINY)
    assert all(len(family_of(name).CASES) >= 3 for name in NAMES)


def merged(base, case):
    """`case` over `base`, nested configurations too."""
    out = dict(base)
    for key, value in case.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        deep = nested and not key.startswith("rope")
        out[key] = merged(out[key], value) if deep else value
    return out


def values_of(family, case):
    return json.loads(json.dumps(merged(TINY[family], case)))


def peer(family, case):
    """The peer's model, every parameter of it random."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **values_of(family, case))
    model = transformers.AutoModelForImageTextToText.from_config(
        config, attn_implementation="eager"
    )
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.3 if value.dim() > 1 else 0.5))
    return model.eval()


@pytest.fixture(scope="module", params=ROWS, ids=IDS)
def row(request, tmp_path_factory):
    family, case = request.param
    folder = tmp_path_factory.mktemp("theirs")
    theirs = peer(family, case)
    theirs.save_pretrained(folder)
    ours = AutoModelForImageTextToText.from_pretrained(folder)
    return SimpleNamespace(family=family, case=case, folder=folder, theirs=theirs, ours=ours)


def draw(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pictures(row, counts):
    """Inputs for rows with so many images each: what the model takes, tokens of each image."""
    spec, family = row.ours.spec, row.family
    total = sum(counts)
    if family in ("qwen2_vl", "qwen2_5_vl"):
        merge = spec.images.tower.merge
        sides = [(2, 3), (1, 2), (4, 3), (3, 1)]
        grids = torch.tensor([[1, merge * sides[i % 4][0], merge * sides[i % 4][1]]
                              for i in range(total)])  # fmt: skip
        pixels = draw(int(grids.prod(-1).sum()), spec.images.tower.pixels)
        sizes = (grids.prod(-1) // merge**2).tolist()
        return {"pixel_values": pixels, "image_grid_thw": grids}, sizes
    side, channels = row.ours.spec.images.tower.patches.image[0], 3
    if family in ("idefics3", "smolvlm"):
        most = max(counts)
        pixels = torch.zeros(len(counts), most, channels, side, side)
        mask = torch.zeros(len(counts), most, side, side, dtype=torch.bool)
        for i, count in enumerate(counts):
            pixels[i, :count] = draw(count, channels, side, side, seed=i)
            mask[i, :count] = True
        mask[0, 0, :, 8:] = False  # a tile that is padded on its right
        tokens = (side // 4) ** 2 // row.ours.spec.images.projector.shuffle**2
        return {"pixel_values": pixels, "pixel_attention_mask": mask}, [tokens] * total
    pixels = draw(total, channels, side, side)
    one = row.ours.get_image_features(pixels[:1])
    return {"pixel_values": pixels}, [len(one)] * total


def texts(row, counts, length=None, left=False):
    """Rows of text with images inside: the whole call of the peer and of ours."""
    images, sizes = pictures(row, counts)
    image = row.ours.spec.image_token
    rng, sizes = torch.Generator().manual_seed(5), list(sizes)
    rows = []
    for count in counts:
        ids = torch.randint(3, 49, (4,), generator=rng).tolist()
        for _ in range(count):
            ids += [image] * sizes.pop(0) + torch.randint(3, 49, (3,), generator=rng).tolist()
        rows.append(ids)
    width = max(map(len, rows))
    pads = [width - len(ids) for ids in rows]
    ids = torch.tensor([[0] * n + r if left else r + [0] * n for r, n in zip(rows, pads)])
    mask = torch.tensor(
        [[0] * n + [1] * len(r) if left else [1] * len(r) + [0] * n for r, n in zip(rows, pads)]
    )
    call = {"input_ids": ids, "attention_mask": mask, **images}
    if row.family in ("qwen2_vl", "qwen2_5_vl"):
        call["mm_token_type_ids"] = (ids == image).long()
    if row.family == "gemma3":
        call["token_type_ids"] = (ids == image).long()
    if row.family == "paligemma":
        types = torch.zeros_like(ids)
        types[:, -2:] = 1
        call["token_type_ids"] = types
    return call


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def test_logits_and_gradients_equal_the_peer(row):
    call = texts(row, [2, 1, 1] if row.family != "paligemma" else [1, 1, 1])
    real = call["attention_mask"].bool()
    labels = call["input_ids"].masked_fill(~real | (call["input_ids"] >= 49), -100)
    wanted, found = row.theirs(**call, labels=labels), row.ours(**call, labels=labels)
    assert relative(found.logits[real], wanted.logits[real]) < 1e-5
    assert relative(found.loss, wanted.loss) < 1e-5
    wanted.loss.backward()
    found.loss.backward()
    used = {n: p.grad for n, p in row.theirs.named_parameters() if p.grad is not None}
    floor = 5e-2 * max(grad.norm() for grad in used.values())
    mine = dict(row.ours.named_parameters())
    assert sum(p.grad is not None for p in mine.values()) == len(used)
    for name, grad in used.items():
        (place,) = row.ours.table.places(name, mine)
        error = (mine[place.name].grad - grad).norm()
        assert error < 1e-5 * max(grad.norm(), floor), name
    row.theirs.zero_grad()
    row.ours.zero_grad()


def test_packed_rows_and_cached_steps_agree_with_rows_alone(row):
    """Rows with other numbers of images, of which one has none."""
    ours = row.ours
    counts = [1, 1, 1] if row.family == "paligemma" else [2, 1, 0]
    call = texts(row, counts, left=True)
    mask = call["attention_mask"].bool()
    shared = {k: v for k, v in call.items() if k not in ("input_ids", "attention_mask")}
    flat = {k: v[mask][None] if v.shape == mask.shape else v for k, v in shared.items()}
    with torch.no_grad():
        padded = ours(**call).logits[mask]
        packed = ours(call["input_ids"][mask][None], lengths=tuple(mask.sum(1).tolist()), **flat)
        torch.testing.assert_close(packed.logits[0], padded, rtol=1e-4, atol=1e-5)
        if row.family == "paligemma":
            call["token_type_ids"][:, :-1] = 0  # the last token alone is no prompt
            padded = ours(**call).logits[mask]
        cache, width = ours.new_cache(), mask.shape[1]
        begun = {k: v[:, : width - 1] if v.shape == mask.shape else v for k, v in call.items()}
        first = ours(**begun, past_key_values=cache).logits
        last = ours(
            call["input_ids"][:, -1:], attention_mask=call["attention_mask"], past_key_values=cache
        ).logits
        cached = torch.cat((first, last), 1)[mask]
        torch.testing.assert_close(cached, padded, rtol=1e-4, atol=1e-5)


def generation_call(row):
    counts = [1, 1, 1] if row.family == "paligemma" else [2, 1, 1]
    call = texts(row, counts, left=True)
    if row.family == "paligemma":
        call["token_type_ids"][:] = 0
    return call


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2}],
                         ids=["greedy", "beams", "copies"])  # fmt: skip
def test_generated_tokens_equal_the_peers(row, options):
    call = generation_call(row)
    if options and row.case != family_of(row.family).CASES[0]:
        return
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    asked = {**plain, **options}
    if "num_return_sequences" in options:  # the peer asks for beams or draws
        asked |= {"do_sample": True, "top_k": 1}
        found = row.ours.generate(**call, **asked)
        alone = row.ours.generate(**call, **plain)
        assert torch.equal(found, alone.repeat_interleave(2, 0))
        return
    wanted = row.theirs.generate(**call, **asked)
    assert torch.equal(row.ours.generate(**call, **asked), wanted)


WAYS = [{"cache_implementation": "static"}, {"cache_implementation": "sliding_window"},
        {"prompt_lookup_num_tokens": 3}, {"prefill_chunk_size": 4}]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=lambda way: next(iter(way)) + str(*way.values()))
@pytest.mark.parametrize("name", NAMES)
def test_every_way_of_decoding_gives_the_greedy_tokens(name, way, tmp_path):
    peer(name, {}).save_pretrained(tmp_path)
    row = SimpleNamespace(family=name, ours=AutoModelForImageTextToText.from_pretrained(tmp_path))
    call = texts(row, [1] if name == "paligemma" else [2])
    if name == "paligemma":
        call["token_type_ids"][:] = 0
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    options["bad_words_ids"] = [[IMAGE]]
    if "prefill_chunk_size" in way and row.ours.spec.ahead is not None:
        with pytest.raises(ConfigError, match="would cut a prompt whose tokens look ahead"):
            row.ours.generate(**call, **options, **way)
        return
    wanted = row.ours.generate(**call, **options)
    assert torch.equal(row.ours.generate(**call, **options, **way), wanted)


def test_texts_without_images_are_gone_on_with_too(row):
    ids = torch.randint(3, 49, (2, 7), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    options["suppress_tokens"] = [IMAGE]
    wanted = row.theirs.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(row.ours.generate(ids, attention_mask=mask, **options), wanted)
    guided = row.ours.generate(ids, attention_mask=mask, guidance_scale=1.5, **options)
    assert guided.shape == wanted.shape


def test_generating_with_the_cache_gives_what_whole_passes_give(row):
    call = generation_call(row)
    made = row.ours.generate(
        **call, max_new_tokens=5, do_sample=False, eos_token_id=None, bad_words_ids=[[IMAGE]]
    )
    new = made.shape[1] - call["input_ids"].shape[1]
    again = {**call, "input_ids": made}
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        if name in call:
            end = 0 if name == "mm_token_type_ids" or row.family == "gemma3" else 1
            end = 1 if name == "attention_mask" else end
            again[name] = torch.nn.functional.pad(call[name], (0, new), value=end)
    with torch.no_grad():
        logits = row.ours(**again).logits
        logits[..., IMAGE] = -torch.inf
        best = logits.argmax(-1)
    assert torch.equal(best[:, -new - 1 : -1], made[:, -new:])


def test_what_we_save_loads_in_the_peer(row, tmp_path):
    row.ours.save_pretrained(tmp_path, max_shard_size=20_000)
    again, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    call = generation_call(row)
    real = call["attention_mask"].bool()
    with torch.no_grad():
        assert relative(again(**call).logits[real], row.ours(**call).logits[real]) < 1e-5


def test_the_layouts_of_the_memory_ours_and_the_peers_load_too(row, tmp_path):
    """Newer files: `model.language_model.*`; ours: as the Hub has them."""
    for folder, state in (("ours", None), ("theirs", row.theirs.state_dict())):
        home = tmp_path / folder
        home.mkdir()
        (home / "config.json").write_text((row.folder / "config.json").read_text())
        if state is None:
            save_weights(row.ours, home, tied=row.ours.tied)
        else:
            tied = {} if row.ours.tied else {"lm_head.weight": state["lm_head.weight"]}
            kept = {k: v for k, v in state.items() if k != "lm_head.weight"} | tied
            save_file({k: v.contiguous() for k, v in kept.items()}, home / "model.safetensors")
        again = AutoModelForImageTextToText.from_pretrained(home)
        for name, value in row.ours.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), name


# A file that holds a head of its own has one, whatever the option says.
SAME = {"image_token_index", "tie_word_embeddings"}


def test_each_option_acts(row):
    """The case would fail if an option were ignored: without it the logits differ."""
    call = texts(row, [1, 1] if row.family == "paligemma" else [2, 1])
    paths = []
    for key, value in row.case.items():
        paths += [(key, k) for k in value] if isinstance(value, dict) else [(key,)]
    for path in paths:
        values = json.loads((row.folder / "config.json").read_text())
        base = TINY[row.family]
        at, usual = values, base
        for key in path[:-1]:
            at, usual = at[key], usual.get(key, {})
        if path[-1] in SAME or path[-1] == "model_type":
            continue
        at.pop(path[-1], None)
        if path[-1] in usual:
            at[path[-1]] = usual[path[-1]]
        if path[-1] in ("max_window_layers", "use_sliding_window", "sliding_window"):
            at.pop("layer_types", None)
        try:
            plain = AutoModelForImageTextToText.from_pretrained(row.folder, config=Config(**values))
            with torch.no_grad():
                found, wanted = plain(**call).logits, row.ours(**call).logits
        except (CheckpointError, ConfigError):
            continue  # the parameters differ, or the image has another number of tokens
        assert relative(found, wanted) > 3e-5, path


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_the_peers_both_ways(name, tmp_path):
    """On the usual linears of the decoder, trained a little; peft reads it and computes the same,
    and we read what peft writes."""
    theirs = peer(name, family_of(name).CASES[0])
    theirs.save_pretrained(tmp_path / "base")
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    row = SimpleNamespace(family=name, ours=ours)
    call = texts(row, [1, 1])
    real = call["attention_mask"].bool()
    labels = call["input_ids"].masked_fill(call["input_ids"] >= 49, -100)
    model = get_peft_model(ours, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for _ in range(2):
        model(**call, labels=labels).loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.3 * parameter.grad / (parameter.grad.norm() + 1e-9)
                    parameter.grad = None
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = model.eval()(**call).logits[real]
        plain = theirs(**call).logits[real]
    assert relative(plain, wanted) > 1e-3
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert relative(read(**call).logits[real], wanted) < 1e-5
    read.save_pretrained(tmp_path / "again")
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    back = PeftModel.from_pretrained(ours, tmp_path / "again").eval()
    with torch.no_grad():
        assert relative(back(**call).logits[real], wanted) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_and_the_tower_load_in_four_bits(name, tmp_path):
    theirs = peer(name, {})
    theirs.save_pretrained(tmp_path)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path)
    coded = AutoModelForImageTextToText.from_pretrained(
        tmp_path, quantization_config={"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    )
    kinds = {type(module).__name__ for module in coded.trunk.modules()}
    assert kinds - {type(module).__name__ for module in whole.trunk.modules()}
    call = texts(SimpleNamespace(family=name, ours=whole), [1, 1])
    real = call["attention_mask"].bool()
    with torch.no_grad():
        error = relative(coded(**call).logits[real], whole(**call).logits[real])
    assert 0 < error < 0.9


@pytest.mark.parametrize("name", NAMES)
def test_bf16_stays_near_the_peers_bf16(name, tmp_path):
    theirs = peer(name, family_of(name).CASES[0])
    theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    ours = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert ours.dtype == torch.bfloat16
    exact = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    call = texts(SimpleNamespace(family=name, ours=exact), [1, 1])
    low = {**call, "pixel_values": call["pixel_values"].to(torch.bfloat16)}
    real = call["attention_mask"].bool()
    with torch.no_grad():
        wanted = exact(**call).logits[real]
        errors = [relative(m(**low).logits.float()[real], wanted) for m in (ours, theirs)]
    assert errors[0] < 1.3 * errors[1] + 5e-3


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_gives_the_same_gradients(name):
    config = Config(**{"model_type": name, **values_of(name, {})})
    torch.manual_seed(1)
    ours = AutoModelForImageTextToText.from_config(config).train()
    call = texts(SimpleNamespace(family=name, ours=ours), [1, 1])
    labels = call["input_ids"].masked_fill(call["input_ids"] >= 49, -100)
    found = []
    for on in (False, True):
        ours.zero_grad()
        (ours.gradient_checkpointing_enable if on else ours.gradient_checkpointing_disable)()
        ours(**call, labels=labels).loss.backward()
        found.append({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_images_and_placeholders_that_disagree_are_named(name):
    ours = AutoModelForImageTextToText.from_config(
        Config(**{"model_type": name, **values_of(name, {})})
    )
    call = texts(SimpleNamespace(family=name, ours=ours), [1, 1])
    count = int((call["input_ids"] == IMAGE).sum())
    images = {k: v for k, v in call.items() if "mask" in k or "grid" in k or "pixel" in k}
    images.pop("attention_mask")
    with pytest.raises(
        ConfigError, match=rf"{count} image tokens .id {IMAGE}., but no pixel_values"
    ):
        ours(call["input_ids"])
    with pytest.raises(ConfigError, match=f"{count} image tokens"):
        ours.generate(call["input_ids"], max_new_tokens=1)
    fewer = call["input_ids"].clone()
    fewer[0][fewer[0] == IMAGE] = 5
    with pytest.raises(ConfigError, match="an image too many"):
        ours(fewer, **images)
    more = call["input_ids"].clone()
    more[0, 0] = IMAGE
    with pytest.raises(ConfigError, match=rf"{count + 1} image tokens .*an image is missing"):
        ours(more, **images)
    with pytest.raises(ConfigError, match=r"image tokens .*are read by model.generate"):
        Engine(ours).submit(call["input_ids"][0])
    with pytest.raises(ConfigError, match="has no input 'pixel_value'"):
        ours(call["input_ids"], pixel_value=call["pixel_values"])


def test_old_flat_files_of_qwen2_vl_read_the_same(tmp_path):
    theirs = peer("qwen2_vl", {})
    theirs.save_pretrained(tmp_path)
    new = AutoModelForImageTextToText.from_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text = values.pop("text_config")
    rope = text.pop("rope_parameters")
    text.pop("model_type")
    flat = {**text, **values, "rope_theta": rope["rope_theta"],
            "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}  # fmt: skip
    flat["vision_config"].pop("rope_parameters", None)
    old = AutoModelForImageTextToText.from_pretrained(tmp_path, config=Config(**flat))
    call = texts(SimpleNamespace(family="qwen2_vl", ours=new), [2, 1])
    with torch.no_grad():
        assert torch.equal(old(**call).logits, new(**call).logits)


def test_grids_that_do_not_fit_the_patches_are_named():
    ours = AutoModelForImageTextToText.from_config(
        Config(**{"model_type": "qwen2_5_vl", **values_of("qwen2_5_vl", {})})
    )
    call = texts(SimpleNamespace(family="qwen2_5_vl", ours=ours), [1, 1])
    grids = call["image_grid_thw"]
    with pytest.raises(ConfigError, match=r"describes .* patches, but pixel_values has"):
        ours(**{**call, "image_grid_thw": grids + torch.tensor([0, 2, 0])})
    with pytest.raises(ConfigError, match="multiples of spatial_merge_size=2"):
        ours(**{**call, "image_grid_thw": torch.tensor([[1, 1, len(call["pixel_values"])]])})
    with pytest.raises(ConfigError, match="need image_grid_thw"):
        ours(call["input_ids"], pixel_values=call["pixel_values"])


def test_positions_of_a_grid_are_the_formulas():
    """Text counts on; an image of 2 x 3 tokens stands on its grid; text goes on behind 3."""
    ids = torch.tensor([9, 9, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE, 9])
    places, ahead = GridPlaces(2).places(ids, IMAGE, [[1, 4, 6]])
    wanted = [[0, 0, 0], [1, 1, 1], [2, 2, 2], [2, 2, 3], [2, 2, 4], [2, 3, 2], [2, 3, 3],
              [2, 3, 4], [5, 5, 5]]  # fmt: skip
    assert places.tolist() == wanted
    assert ahead == 6 - 9
