"""Adapters on quantised bases (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import tiny
from topwork import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from topwork.errors import TopworkWarning
from topwork.peft import IA3Config, LoHaConfig, OFTConfig
from topwork.quant import Blocks, QuantisedLinear, dequantise
from topwork.quant.config import linears_of

IDS = torch.tensor([[5, 17, 200, 3, 42, 99, 7, 250]])
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}


NF4 = Blocks("nf4", double=True)


def base(form=NF4, dtype=torch.float32):
    model = tiny.model(hidden_size=64, intermediate_size=96).to(dtype)
    for path, linear in list(linears_of(model, model.trunk)):
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, QuantisedLinear.of(linear, form))
    return model


def grads_of(model):
    model(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(**LORA),
        LoraConfig(**LORA, use_dora=True),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoHaConfig(r=2, target_modules=["q_proj", "up_proj"], init_weights=False),
        OFTConfig(oft_block_size=8, target_modules=["q_proj", "up_proj"]),
    ],
    ids=lambda c: c.peft_type + ("-dora" if getattr(c, "use_dora", False) else ""),
)
def test_gradients_are_those_on_the_dequantised_base(config, checkpointing):
    made = base()
    plain = dequantise(copy.deepcopy(made))
    found = []
    for model in (made, plain):
        if checkpointing:
            prepare_model_for_kbit_training(model)
        torch.manual_seed(1)
        found.append(grads_of(get_peft_model(model, copy.deepcopy(config)).train()))
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_of_the_weights_is_saved_for_the_backward_pass():
    model = get_peft_model(base(dtype=torch.bfloat16), LoraConfig(**LORA))
    held = {b.untyped_storage().data_ptr() for b in (*model.buffers(), *model.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(IDS).logits.sum()
    large = [t for t in kept if t.untyped_storage().data_ptr() not in held and t.numel() >= 64 * 64]
    assert not large, [t.shape for t in large]


def test_training_lowers_the_loss_and_leaves_the_codes(tmp_path):
    model = prepare_model_for_kbit_training(base())
    before = {n: b.clone() for n, b in model.named_buffers()}
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=12, learning_rate=2e-2,
        per_device_train_batch_size=4, logging_steps=1, save_strategy="no", seed=3,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=args, train_dataset=tiny.chats(8), processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.6 * losses[0]
    for name, buffer in trainer.model.get_base_model().named_buffers():
        assert torch.equal(buffer, before[name.replace(".base_layer", "")])
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    trained = trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, trained(IDS).logits)


def test_a_merge_tells_what_it_loses_and_comes_apart_exactly():
    model = get_peft_model(base(), LoraConfig(**LORA)).eval()
    before = model(IDS).logits
    codes = {n: b.clone() for n, b in model.named_buffers()}
    with pytest.warns(TopworkWarning, match=r"14 quantised layers .* dequantize\(\) first"):
        model.merge_adapter()
    assert not torch.equal(model(IDS).logits, before)
    model.unmerge_adapter()
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers())
    assert torch.equal(model(IDS).logits, before)


def test_the_loss_that_is_told_is_that_of_the_outputs():
    model = get_peft_model(base(), LoraConfig(**LORA)).eval()
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    layer.requires_grad_(False)
    x = torch.randn(20000, 96)
    plain, wanted = layer.base_layer(x), layer(x)
    told = layer.merge(["default"], False, False)
    error = (layer(x) - wanted).norm() / wanted.norm()
    assert told.error == pytest.approx(float(error), rel=0.05)
    effect = (wanted - plain).norm() / wanted.norm()
    assert told.effect == pytest.approx(float(effect), rel=0.05)


def test_a_merge_after_dequantize_loses_nothing():
    model = get_peft_model(base(), LoraConfig(**LORA)).eval()
    wanted = model(IDS).logits
    model.dequantize()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, wanted, rtol=1e-4, atol=1e-4)


def test_outputs_and_gradients_are_those_of_peft_on_the_values_of_bitsandbytes(tmp_path):
    bnb = pytest.importorskip("bitsandbytes.functional")
    import transformers

    import peft

    tiny.model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)
    ours = get_peft_model(ours, LoraConfig(**LORA))
    ours.save_pretrained(tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    # Their own product of fp32 inputs is formed in bf16 on this kind of processor.
    for linear in theirs.model.modules():
        if isinstance(linear, torch.nn.Linear):
            codes, state = bnb.quantize_4bit(linear.weight.data, quant_type="nf4")
            linear.weight.data = bnb.dequantize_4bit(codes, state)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter", is_trainable=True)
    wanted = theirs(IDS, labels=IDS)
    torch.testing.assert_close(ours(IDS).logits, wanted.logits, rtol=1e-4, atol=1e-4)
    wanted.loss.backward()
    grads = grads_of(ours)
    peers = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    assert grads.keys() == peers.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, peers[name], rtol=1e-4, atol=1e-5, msg=name)
