"""BLIP's captions and answers, and ViLT's answers, against transformers, on tiny models."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

import peft
from topwork.errors import CheckpointError, ConfigError
from topwork.models import (
    AutoModelForImageTextToText,
    AutoModelForVisualQuestionAnswering,
    Config,
)
from topwork.models.auto import tasks_of
from topwork.models.families import NAMES as ALL
from topwork.models.families import family as family_of
from topwork.peft import LoraConfig, PeftModel, get_peft_model

TEXT = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2,
    "sep_token_id": 3, "pad_token_id": 0,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
BLIP = {"text_config": TEXT, "vision_config": VISION}
ASKED = {"text_config": TEXT, "vision_config": {**VISION, "hidden_size": 24,
                                                "num_attention_heads": 3}}  # fmt: skip
VILT = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2,
    "num_attention_heads": 3, "max_position_embeddings": 20, "image_size": 16, "patch_size": 4,
    "num_labels": 7, "id2label": {i: f"answer {i}" for i in range(7)},
}  # fmt: skip
# Kind → (family, what we load it with, the peer's class, its smallest configuration).
KINDS = {
    "captions": ("blip", AutoModelForImageTextToText, "BlipForConditionalGeneration", BLIP),
    "answers": ("blip", AutoModelForVisualQuestionAnswering, "BlipForQuestionAnswering", ASKED),
    "labels": ("vilt", AutoModelForVisualQuestionAnswering, "ViltForQuestionAnswering", VILT),
}
ROWS = [(kind, case) for kind, (family, *_) in KINDS.items() for case in family_of(family).CASES]
IDS = [f"{kind}-{family_of(KINDS[kind][0]).CASES.index(case)}" for kind, case in ROWS]


def test_every_family_that_answers_has_its_row():
    asked = {name for name in ALL if "visual-question-answering" in tasks_of(name)}
    assert asked == {family for family, auto, *_ in KINDS.values() if "Visual" in auto.__name__}
    assert "image-text-to-text" in tasks_of("blip")


def values_of(base, case):
    nested = {k: {**base[k], **v} for k, v in case.items() if isinstance(v, dict)}
    return json.loads(json.dumps({**base, **case, **nested}))


def peer(kind, case):
    torch.manual_seed(0)
    family, _, name, base = KINDS[kind]
    config = transformers.AutoConfig.for_model(family, **values_of(base, case))
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.3 if value.dim() > 1 else 0.5))
    return model.eval()


@pytest.fixture(scope="module", params=ROWS, ids=IDS)
def row(request, tmp_path_factory):
    kind, case = request.param
    folder = tmp_path_factory.mktemp("theirs")
    theirs = peer(kind, case)
    theirs.save_pretrained(folder)
    ours = KINDS[kind][1].from_pretrained(folder)
    return SimpleNamespace(kind=kind, case=case, folder=folder, theirs=theirs, ours=ours)


def draw(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def call_of(row, padded=True):
    """Questions (or captions) of 9 and 6 tokens with their images."""
    ids = torch.randint(4, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padded:
        ids[1, 6:], mask[1, 6:] = 0, 0
    call = {"input_ids": ids, "attention_mask": mask}
    if row.kind == "labels":
        channels = row.ours.vilt.spec.channels
        keep = torch.ones(2, 24, 32, dtype=torch.long)
        keep[1, 16:] = 0
        keep[1, :, 24:] = 0
        pixels = draw(2, channels, 24, 32) * keep[:, None]
        types = ids % row.ours.vilt.spec.types
        return {**call, "pixel_values": pixels, "pixel_mask": keep, "token_type_ids": types}
    return {**call, "pixel_values": draw(2, 3, 16, 16)}


def labels_of(row, call):
    if row.kind == "labels":
        return {"labels": torch.rand(2, 7, generator=torch.Generator().manual_seed(2))}
    ids = call["input_ids"] if row.kind == "captions" else call["input_ids"].flip(0) * 3 % 61
    if row.kind == "captions":
        return {"labels": ids.masked_fill(ids == 0, -100)}
    return {"labels": ids, "decoder_attention_mask": call["attention_mask"].flip(0)}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def test_logits_and_gradients_equal_the_peer(row):
    call = call_of(row)
    call |= labels_of(row, call)
    found, wanted = row.ours(**call), row.theirs(**call)
    if row.kind != "answers":
        real = call["attention_mask"].bool() if row.kind == "captions" else slice(None)
        assert relative(found.logits[real], wanted.logits[real]) < 1e-5
    if row.kind == "answers":  # the peer counts padding that it was given as labels
        call = call_of(row, padded=False)
        call |= {"labels": call["input_ids"].flip(0)}
        found, wanted = row.ours(**call), row.theirs(**call)
    assert relative(found.loss, wanted.loss) < 1e-5
    found.loss.backward()
    wanted.loss.backward()
    used = {n: p.grad for n, p in row.theirs.named_parameters() if p.grad is not None}
    floor = 5e-2 * max(grad.norm() for grad in used.values())
    mine = dict(row.ours.named_parameters())
    for name, grad in used.items():
        (place,) = row.ours.table.places(name, mine)
        error = (mine[place.name].grad - grad).norm()
        assert error < 1e-5 * max(grad.norm(), floor), name
    row.theirs.zero_grad()
    row.ours.zero_grad()


def test_padded_questions_get_the_answers_of_questions_alone(row):
    if row.kind == "captions":
        return
    call, alone = call_of(row), []
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    run = row.ours if row.kind == "labels" else lambda **c: row.ours.generate(**c, **options)
    for i, size in enumerate((9, 6)):
        one = {k: v[i : i + 1] for k, v in call.items()}
        for name in ("input_ids", "attention_mask", "token_type_ids"):
            if name in one:
                one[name] = one[name][:, :size]
        if i == 1 and row.kind == "labels":
            one = {**one, "pixel_values": one["pixel_values"][:, :, :16, :24], "pixel_mask": None}
        found = run(**one)
        alone.append(found.logits if row.kind == "labels" else found)
    both = run(**call)
    if row.kind == "labels":
        torch.testing.assert_close(both.logits, torch.cat(alone), rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(both, torch.cat(alone))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generated_tokens_equal_the_peers(row, options):
    if row.kind == "labels":
        return
    call = call_of(row, padded=False)
    if row.kind == "captions":
        call = {"pixel_values": call["pixel_values"]}
    asked = {"max_new_tokens": 8, "do_sample": False, **options}
    wanted = row.theirs.generate(**call, **asked)
    assert torch.equal(row.ours.generate(**call, **asked), wanted)
    if row.kind == "captions":  # a caption that is begun
        prompt = torch.tensor([[9, 17, 23, 2], [9, 8, 41, 2]])
        wanted = row.theirs.generate(**call, input_ids=prompt.clone(), **asked)
        assert torch.equal(row.ours.generate(**call, input_ids=prompt, **asked), wanted)


def test_what_we_save_loads_in_the_peer(row, tmp_path):
    row.ours.save_pretrained(tmp_path, max_shard_size=20_000)
    again, info = getattr(transformers, KINDS[row.kind][2]).from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    call = call_of(row, padded=False)
    call |= labels_of(row, call)
    with torch.no_grad():
        assert relative(again(**call).loss, row.ours(**call).loss) < 1e-5


def test_each_option_acts(row):
    call = call_of(row, padded=False)
    call |= labels_of(row, call)
    base = KINDS[row.kind][3]
    for key, value in row.case.items():
        for inner in value if isinstance(value, dict) else (None,):
            values = json.loads((row.folder / "config.json").read_text())
            at, usual = (values, base) if inner is None else (values[key], base[key])
            name = key if inner is None else inner
            at.pop(name, None)
            if name in usual:
                at[name] = usual[name]
            if name == "tie_word_embeddings":
                continue  # a file that holds a head of its own has one
            try:
                plain = KINDS[row.kind][1].from_pretrained(row.folder, config=Config(**values))
            except CheckpointError:
                continue  # the parameters differ
            with torch.no_grad():
                found, wanted = plain(**call), row.ours(**call)
            pairs = ((found.logits, wanted.logits), (found.loss, wanted.loss))
            assert max(relative(*pair) for pair in pairs) > 3e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_peers_both_ways(kind, tmp_path):
    theirs = peer(kind, {})
    theirs.save_pretrained(tmp_path / "base")
    ours = KINDS[kind][1].from_pretrained(tmp_path / "base")
    row = SimpleNamespace(kind=kind, ours=ours)
    call = call_of(row, padded=False)
    call |= labels_of(row, call)
    model = get_peft_model(ours, LoraConfig(r=4, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value) * 0.1)
    model.save_pretrained(tmp_path / "adapter")
    wanted = model.eval()(**call).loss
    assert relative(theirs(**call).loss, wanted) > 1e-4
    read = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    assert relative(read(**call).loss, wanted) < 1e-5
    read.save_pretrained(tmp_path / "again")
    ours = KINDS[kind][1].from_pretrained(tmp_path / "base")
    back = PeftModel.from_pretrained(ours, tmp_path / "again").eval()
    assert relative(back(**call).loss, wanted) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_gives_the_same_loss_and_gradients(kind):
    family, auto, _, base = KINDS[kind]
    torch.manual_seed(1)
    ours = auto.from_config(Config(**{"model_type": family, **base})).train()
    row = SimpleNamespace(kind=kind, ours=ours)
    call = call_of(row)
    call |= labels_of(row, call)
    found = []
    for on in (False, True):
        ours.zero_grad()
        if kind == "labels":
            ours.trunk.checkpointing = on
        else:
            (ours.gradient_checkpointing_enable if on else ours.gradient_checkpointing_disable)()
        ours(**call).loss.backward()
        found.append({n: p.grad for n, p in ours.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_images_and_questions_are_named(kind):
    family, auto, _, base = KINDS[kind]
    ours = auto.from_config(Config(**{"model_type": family, **base}))
    call = call_of(SimpleNamespace(kind=kind, ours=ours))
    with pytest.raises(ConfigError, match=r"no image: pixel_values"):
        ours(**{**call, **labels_of(SimpleNamespace(kind=kind), call), "pixel_values": None})
    if kind == "captions":
        with pytest.raises(ConfigError, match="input_ids or labels"):
            ours(pixel_values=call["pixel_values"])
    else:
        with pytest.raises(ConfigError, match=r"input_ids"):
            ours(**{**call, "input_ids": None})
    long = torch.ones(2, 40, dtype=torch.long)
    run = ours.generate if kind == "answers" else ours
    with pytest.raises(ConfigError, match="40 tokens"):
        run(input_ids=long, pixel_values=call["pixel_values"])
