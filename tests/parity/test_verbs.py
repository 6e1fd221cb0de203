"""The verbs against peft: several adapters, mixing, weighted sums, batches, status, heads."""

from __future__ import annotations

import json
import re

import pytest
import torch
import transformers

import peft
import topwork
from parity.bases import IDS, base, close, our_base, randomise
from topwork.errors import CheckpointError, ConfigError
from topwork.peft import PeftModel, get_peft_model

TARGETS = ["q_proj", "v_proj", "down_proj"]


def pair(kinds, tmp_path, mixed=False, options=({}, {})):
    """The peer's model with adapters "default" and "other", and ours from its files."""
    first, second = (
        getattr(peft, kind)(**{"target_modules": TARGETS, **more})
        for kind, more in zip(kinds, options)
    )
    theirs = peft.get_peft_model(base("qwen2"), first, mixed=mixed)
    theirs.add_adapter("other", second)
    for name in ("default", "other"):
        theirs.set_adapter(name)
        randomise(theirs, seed=len(name))
    ours = None
    for name, config in (("default", first), ("other", second)):
        alone = peft.get_peft_model(base("qwen2"), config)
        given = {
            k.replace(f".{name}", ".default"): v
            for k, v in theirs.state_dict().items()
            if f".{name}" in k
        }
        given = {re.sub(r"base_layer\.(oft|lora|lokr|hada)", r"\1", k): v
                 for k, v in given.items()}  # fmt: skip
        alone.load_state_dict(given, strict=False)
        alone.save_pretrained(tmp_path / name)
        if ours is None:
            ours = PeftModel.from_pretrained(base("qwen2"), tmp_path / name)
        else:
            ours.load_adapter(tmp_path / name, name)
    return theirs.eval(), ours


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


LORA = ("LoraConfig", "LoraConfig")


def test_several_active_adapters_add_up(tmp_path):
    theirs, ours = pair(LORA, tmp_path)
    theirs.base_model.set_adapter(["default", "other"])
    ours.set_adapter(["default", "other"])
    close(logits(ours), logits(theirs))
    theirs.base_model.set_adapter("other")
    ours.set_adapter("other")
    close(logits(ours), logits(theirs))


@pytest.mark.parametrize("kinds", [
    ("LoraConfig", "LoHaConfig"), ("LoKrConfig", "LoraConfig"),
    ("OFTConfig", "LoraConfig"), ("LoraConfig", "OFTConfig"),
], ids="-".join)  # fmt: skip
def test_methods_mix_as_in_the_peers_mixed_model(kinds, tmp_path):
    options = [{"oft_block_size": 4} if k == "OFTConfig" else {} for k in kinds]
    theirs, ours = pair(kinds, tmp_path, mixed=True, options=options)
    theirs.set_adapter(["default", "other"])
    ours.set_adapter(["default", "other"])
    wanted = logits(theirs)
    close(logits(ours), wanted)
    ours.merge_adapter()
    close(logits(ours), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("on", ["theirs", "ours"])
def test_each_row_of_a_batch_goes_through_its_adapter(on, tmp_path):
    theirs, ours = pair(LORA, tmp_path)
    if on == "ours":
        ours = PeftModel.from_pretrained(our_base("qwen2", tmp_path), tmp_path / "default")
        ours.load_adapter(tmp_path / "other", "other")
    ids = IDS.repeat(2, 1)
    names = ["other", "__base__", "default", "other"]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    call = {"input_ids": ids, "attention_mask": mask, "adapter_names": names}
    with torch.no_grad():
        wanted, found = theirs(**call).logits, ours(**call).logits
        close(found[mask.bool()], wanted[mask.bool()], rtol=1e-4)
        if on == "ours":
            real = ids[mask.bool()][None]
            lengths = tuple(mask.sum(1).tolist())
            packed = ours(real, lengths=lengths, adapter_names=names).logits
            close(packed[0], wanted[mask.bool()], rtol=1e-4)
    with pytest.raises(ConfigError, match="no adapter 'othr'"):
        ours(input_ids=ids, adapter_names=["othr"] * 4)
    with pytest.raises(ConfigError, match="3 entries"):
        ours(input_ids=ids, adapter_names=names[:3])
    with pytest.raises(ConfigError, match="5 entries for 4 rows"):
        ours(ids, adapter_names=["other"] * 5)
    ours.train()
    with pytest.raises(ConfigError, match="for inference"):
        ours(input_ids=ids, adapter_names=names)
    ours.eval().add_adapter("words", topwork.PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(ConfigError, match="'words' is virtual tokens"):
        ours(input_ids=ids, adapter_names=["words"] * 4)


KINDS = [
    ("linear", {}), ("cat", {}), ("svd", {}), ("svd", {"svd_rank": 3}),
    ("svd", {"svd_clamp": 0.9}), ("ties", {"density": 0.5}), ("ties_svd", {"density": 0.4}),
    ("ties", {"density": 0.6, "majority_sign_method": "frequency"}),
    ("dare_linear", {"density": 0.5}), ("dare_ties", {"density": 0.5}),
    ("dare_linear_svd", {"density": 0.5}), ("magnitude_prune", {"density": 0.5}),
    ("magnitude_prune_svd", {"density": 0.5}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options"), KINDS, ids=[f"{k}-{i}" for i, (k, _) in enumerate(KINDS)]
)
def test_weighted_adapters_equal_the_peers(kind, options, tmp_path):
    targets = {"target_modules": ["embed_tokens", "q_proj"], "r": 4}
    theirs, ours = pair(LORA, tmp_path, options=(targets, {**targets, "lora_alpha": 16}))
    for model in (theirs, ours):
        torch.manual_seed(7)
        model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "new", kind, **options)
        model.set_adapter("new")
    if "dare" in kind:  # random entries: the order of layers is ours
        assert not torch.allclose(logits(ours), logits(base("qwen2")), atol=1e-3)
    else:
        close(logits(ours), logits(theirs), rtol=1e-3, atol=1e-4)


def test_weighted_ia3_and_what_cannot_be_combined(tmp_path):
    kinds = ("IA3Config", "IA3Config")
    more = {"feedforward_modules": ["down_proj"]}
    theirs, ours = pair(kinds, tmp_path, options=(more, more))
    for model in (theirs, ours):
        model.add_weighted_adapter(["default", "other"], [0.6, 0.7], "new")
        model.set_adapter("new")
    close(logits(ours), logits(theirs))
    with pytest.raises(ConfigError, match="'linear'"):
        ours.add_weighted_adapter(["default", "other"], [1, 1], "x", "cat")
    _, ours = pair(LORA, tmp_path, options=({"r": 2}, {"r": 3}))
    with pytest.raises(ConfigError, match=r"one rank, got \[2, 3\]"):
        ours.add_weighted_adapter(["default", "other"], [1, 1], "x", "linear")
    with pytest.raises(ConfigError, match="nearest: 'ties'"):
        ours.add_weighted_adapter(["default", "other"], [1, 1], "x", "tiess")
    with pytest.raises(ConfigError, match="needs a density"):
        ours.add_weighted_adapter(["default"] * 2, [1, 1], "x", "ties")


def test_status_tells_what_is_where(tmp_path):
    theirs, ours = pair(LORA, tmp_path)
    ours.set_adapter("other")
    theirs.set_adapter("other")
    ours.merge_adapter(["other"])
    theirs.merge_adapter(["other"])
    wanted, found = theirs.get_model_status(), ours.get_model_status()
    same = ("base_model_type", "peft_types", "trainable_params", "total_params", "enabled",
            "num_adapter_layers", "active_adapters", "merged_adapters", "available_adapters",
            "requires_grad", "devices")  # fmt: skip
    assert {k: getattr(found, k) for k in same} == {k: getattr(wanted, k) for k in same}
    layers = {layer.name: layer for layer in ours.get_layer_status()}
    for layer in theirs.get_layer_status():
        assert layers[layer.name].merged_adapters == layer.merged_adapters
        assert layers[layer.name].requires_grad == layer.requires_grad
    with pytest.raises(ConfigError, match="no layer with an adapter"):
        topwork.get_layer_status(base("qwen2"))


def test_adapters_without_a_wrapper_and_their_state(tmp_path):
    theirs, ours = base("qwen2"), base("qwen2")
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS), theirs)
    randomise(theirs)
    ours = topwork.inject_adapter_in_model(topwork.LoraConfig(target_modules=TARGETS), ours)
    given = peft.get_peft_model_state_dict(theirs)
    assert set(topwork.get_peft_model_state_dict(ours)) == set(given)
    result = topwork.set_peft_model_state_dict(ours, given)
    assert result == ([], [])
    close(logits(ours), logits(theirs))
    wrapped = get_peft_model(base("qwen2"), topwork.LoraConfig(target_modules=TARGETS))
    peers = peft.get_peft_model(base("qwen2"), peft.LoraConfig(target_modules=TARGETS))
    assert set(topwork.get_peft_model_state_dict(wrapped)) == set(
        peft.get_peft_model_state_dict(peers)
    )
    wrong = {k: v[:1] for k, v in topwork.get_peft_model_state_dict(wrapped).items()}
    with pytest.raises(CheckpointError, match=r"is \[1, 40\], but \[8, 40\] here"):
        topwork.set_peft_model_state_dict(wrapped, wrong)


def test_a_hot_swap_keeps_the_parameters_and_takes_the_others_numbers(tmp_path):
    _, ours = pair(LORA, tmp_path, options=({"r": 8}, {"r": 3, "lora_alpha": 5}))
    before = dict(ours.named_parameters())
    ours.set_adapter("other")
    wanted = logits(ours)
    ours.set_adapter("default")
    topwork.hotswap_adapter(ours, tmp_path / "other", "default")
    close(logits(ours), wanted)
    ours.set_adapter("other")
    topwork.hotswap_adapter(ours, tmp_path / "default", "other")  # of a larger rank
    assert not torch.allclose(logits(ours), wanted, atol=1e-3)
    alone = PeftModel.from_pretrained(base("qwen2"), tmp_path / "default")
    close(logits(ours), logits(alone))
    assert all(before[name] is parameter for name, parameter in ours.named_parameters())


@pytest.mark.parametrize("kind", ["LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig"])
def test_any_method_converts_to_lora_as_near_as_its_rank_allows(kind, tmp_path):
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    targets = ["o_proj", "down_proj"]  # without a bias, which IA3 would scale too
    config = getattr(topwork, kind)(target_modules=targets, **more)
    ours = get_peft_model(base("qwen2"), config)
    randomise(ours)
    topwork.save_as_lora(tmp_path, ours.eval(), 24)
    close(logits(peft.PeftModel.from_pretrained(base("qwen2"), tmp_path)), logits(ours), atol=1e-4)
    share, _ = topwork.convert_to_lora(ours, 0.5)
    assert share.r < 24


def test_a_tuned_model_less_its_base_is_an_adapter(tmp_path):
    tuned = get_peft_model(base("qwen2"), topwork.LoraConfig(target_modules=TARGETS, r=3))
    randomise(tuned)
    whole = tuned.merge_and_unload()
    config, tensors = topwork.extract_lora(whole, base("qwen2"), 3)
    assert len(tensors) == 2 * 2 * len(TARGETS)
    ours = get_peft_model(base("qwen2"), config)
    assert topwork.set_peft_model_state_dict(ours, tensors) == ([], [])
    close(logits(ours), logits(whole), atol=1e-4)


@pytest.mark.parametrize(("task", "model"), [
    ("SEQ_CLS", "AutoModelForSequenceClassification"),
    ("TOKEN_CLS", "AutoModelForTokenClassification"),
    ("QUESTION_ANS", "AutoModelForQuestionAnswering"),
])  # fmt: skip
def test_heads_of_a_task_are_trained_and_saved(task, model, tmp_path):
    config = transformers.BertConfig(
        vocab_size=37, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=30, num_labels=3 if task != "QUESTION_ANS" else 2,
    )  # fmt: skip

    def bare():
        torch.manual_seed(0)
        return getattr(transformers, model).from_config(config).eval()

    theirs = peft.get_peft_model(bare(), peft.LoraConfig(task_type=task))
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    ours = PeftModel.from_pretrained(bare(), tmp_path / "theirs", is_trainable=True)
    trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == trained
    name = "start_logits" if task == "QUESTION_ANS" else "logits"
    with torch.no_grad():
        close(getattr(ours(IDS), name), getattr(theirs(IDS), name))
        fresh = get_peft_model(bare(), topwork.LoraConfig(task_type=task)).eval()
        randomise(fresh)
        fresh.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(bare(), tmp_path / "ours")
        close(getattr(again(IDS), name), getattr(fresh(IDS), name))
        merged = fresh.merge_and_unload()
        close(getattr(merged(IDS), name), getattr(again(IDS), name), atol=1e-4)


def test_embeddings_in_a_file_are_taken(tmp_path):
    options = {"target_modules": ["embed_tokens", "q_proj"]}
    theirs = peft.get_peft_model(base("qwen2"), peft.LoraConfig(**options))
    randomise(theirs)
    with torch.no_grad():
        theirs.get_input_embeddings().base_layer.weight += 0.1
    theirs.eval().save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = PeftModel.from_pretrained(base("qwen2"), tmp_path / "theirs")
    close(logits(ours), logits(theirs))
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    close(logits(peft.PeftModel.from_pretrained(base("qwen2"), tmp_path / "ours")), logits(theirs))


def test_the_base_that_a_file_names_is_loaded_and_the_card_tells_it(tmp_path):
    model = our_base("qwen2", tmp_path)
    config = topwork.LoraConfig(
        target_modules=TARGETS, task_type="CAUSAL_LM",
        base_model_name_or_path=str(tmp_path / "base"),
    )  # fmt: skip
    ours = get_peft_model(model, config)
    randomise(ours)
    ours.eval().save_pretrained(tmp_path / "adapter")
    again = topwork.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    close(logits(again), logits(ours))
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f'base_model: "{tmp_path / "base"}"' in card
    assert "# LORA adapter" in card
    assert "| `lora_alpha` | `8` |" in card
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="names no base model"):
        topwork.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


def test_lora_plus_groups_equal_the_peers():
    options = {"target_modules": ["embed_tokens", *TARGETS], "use_dora": True}
    more = {"lr": 1e-3, "loraplus_lr_ratio": 16, "loraplus_weight_decay": 0.1}
    found, wanted = (
        library.create_loraplus_optimizer(
            get(base("qwen2"), library.LoraConfig(**options)), torch.optim.AdamW, **more
        )
        for library, get in (
            (topwork, get_peft_model),
            (_Peer, peft.get_peft_model),
        )
    )

    def groups(optimizer):
        sizes = {}
        for group in optimizer.param_groups:
            key = (group["lr"], group["weight_decay"])
            sizes[key] = sizes.get(key, 0) + sum(p.numel() for p in group["params"])
        return {k: v for k, v in sizes.items() if v}

    assert groups(found) == groups(wanted)


class _Peer:
    from peft.optimizers import create_loraplus_optimizer

    create_loraplus_optimizer = staticmethod(create_loraplus_optimizer)
    LoraConfig = peft.LoraConfig


def test_scales_precision_and_names():
    model = get_peft_model(base("qwen2"), topwork.LoraConfig(target_modules=TARGETS))
    randomise(model)
    model.eval()
    plain = logits(model)
    with topwork.rescale_adapter_scale(model, 0.0):
        close(logits(model), logits(base("qwen2")))
    assert torch.equal(logits(model), plain)
    topwork.cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="without dots"):
        model.add_adapter("a.b", topwork.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="cannot be named 'keys'"):
        model.add_adapter("keys", topwork.LoraConfig(target_modules=TARGETS))
    with pytest.raises(ConfigError, match="pickles"):
        model.save_pretrained("x", safe_serialization=False)
