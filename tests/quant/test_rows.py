"""LLM.int8: values, products and files are bitsandbytes', gradients those of the decoded weight."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from topwork import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LoraConfig,
    describe,
    get_peft_model,
    ops,
)
from topwork.errors import CheckpointError, ConfigError
from topwork.ops.int8 import int8_product, integer_product
from topwork.quant import QuantisedLinear, Rows, Tiles

IDS = torch.tensor([[5, 17, 200, 3, 42, 99], [250, 1, 7, 30, 31, 32]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("base")
    model = tiny.model(hidden_size=64, intermediate_size=96).to(torch.bfloat16)
    for layer in model.model.layers:  # a few channels reach the threshold
        layer.input_layernorm.weight.data[[3, 40]] = 12.0
    model.save_pretrained(home)
    return home


def load(folder, dtype="auto", **fields):
    config = BitsAndBytesConfig(**fields) if fields else None
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def inputs(dtype, rows=7):
    x = torch.randn(rows, 40)
    x[:, 5] *= 9
    x[0, 11] = -6.5
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("bias", [False, True])
def test_the_layer_computes_as_bitsandbytes(dtype, threshold, rows, bias):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, bias=bias).to(dtype)
    ours = QuantisedLinear.of(linear, Rows(threshold)).eval()
    theirs = bnb.nn.Linear8bitLt(40, 24, bias, has_fp16_weights=False, threshold=threshold)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu").eval()
    x = inputs(dtype, rows)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs(x)
        for _ in range(2):
            assert torch.equal(ours(x), wanted)
        assert torch.equal(ours.held["codes"], theirs.state.CB)
        assert torch.equal(ours.held["absmax"], theirs.state.SCB)
        assert torch.equal(ours.train()(x), theirs.train()(x))


@torch.no_grad()
def test_outliers_are_what_makes_it_near():
    torch.manual_seed(0)
    linear = nn.Linear(40, 24)
    x = inputs(torch.float32)
    x[:, 5] *= 5
    errors = [
        float((QuantisedLinear.of(linear, Rows(t)).eval()(x) - linear(x)).norm())
        for t in (6.0, 0.0)
    ]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("x", [torch.zeros(3, 40), torch.randn(2, 3, 40), torch.randn(0, 40)])
def test_zeros_batches_and_nothing_go_through(x):
    linear = nn.Linear(40, 24)
    linear.weight.data[4] = 0
    made = QuantisedLinear.of(linear, Rows()).eval()
    y = made(x)
    assert y.shape == (*x.shape[:-1], 24)
    torch.testing.assert_close(y, linear(x), rtol=0.1, atol=0.05)


@pytest.mark.parametrize("inner", [8, 1024, 2500])
def test_the_products_of_codes_are_exact(inner):
    a, b = (torch.randint(-127, 128, (n, inner), dtype=torch.int8) for n in (5, 8))
    a[0], b[0] = 127, 127  # beyond what fp32 counts
    wanted = (a.long() @ b.long().t()).int()
    assert torch.equal(int8_product.reference(a, b), wanted)
    assert torch.equal(integer_product(a, b), wanted)


def test_the_gradient_is_that_of_the_decoded_weight():
    linear = nn.Linear(40, 24)
    made = QuantisedLinear.of(linear, Rows())
    weight, dy = made.dequantised_weight(), torch.randn(7, 24)
    for training in (True, False):
        x = inputs(torch.float32).requires_grad_()
        made.train(training)(x).backward(dy)
        torch.testing.assert_close(x.grad, dy @ weight)


def test_lora_trains_and_generates_on_it(folder):
    base = load(folder, torch.float32, load_in_8bit=True)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(base, config)
    plain = load(folder, torch.float32)
    for path, module in plain.named_modules():
        if type(module) is nn.Linear and path != "lm_head":
            module.weight.data = base.get_submodule(path).base_layer.dequantised_weight()
    same = get_peft_model(plain, config)
    same.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False
    )
    grads = []
    for found in (model, same):
        found.train()(IDS, labels=IDS).loss.backward()
        grads.append({n: p.grad for n, p in found.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert len(grads[0]) == 28
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-3, atol=1e-5, msg=name)
    with torch.no_grad():
        error = (model.eval()(IDS).logits - same.eval()(IDS).logits).norm()
        assert 0 < error < 0.1 * same(IDS).logits.norm()  # activations are rounded, not in training
    assert model.generate(IDS, max_new_tokens=3, eos_token_id=None).shape == (2, 9)


def test_a_model_in_8_bits_is_saved_and_read(folder, tmp_path):
    made = load(folder, load_in_8bit=True, llm_int8_skip_modules=["layers.0.mlp"])
    assert "11 linears in llm.int8, threshold=6" in describe(made)
    made.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert again.model.layers[1].mlp.up_proj.dtype == torch.bfloat16
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight_format"] = torch.tensor(2, dtype=torch.uint8)
    tensors[f"{name}.SCB"] = tensors[f"{name}.SCB"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"SCB is \[95\].*|one kind of GPU") as error:
        load(tmp_path)
    assert "one kind of GPU" in str(error.value)


def test_files_pass_between_here_and_transformers(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    import transformers

    auto = transformers.AutoModelForCausalLM
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        peer = auto.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
        peer.save_pretrained(tmp_path / "theirs")
        wanted = peer(IDS).logits
    ours = load(tmp_path / "theirs")
    layers = {p: m for p, m in ours.named_modules() if isinstance(m, QuantisedLinear)}
    assert {type(layer.format) for layer in layers.values()} == {Rows}
    assert len(layers) == 14
    for path, layer in layers.items():
        x = (3 * torch.randn(5, layer.in_features)).bfloat16()
        with torch.no_grad():
            assert torch.equal(layer(x), peer.get_submodule(path)(x)), path
    direct = load(folder, load_in_8bit=True)
    assert torch.equal(ours(IDS).logits, direct(IDS).logits)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        back = auto.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
        assert torch.equal(back(IDS).logits, wanted)


def test_weights_alone_are_rounded_without_a_threshold(folder, tmp_path):
    made = load(folder, load_in_8bit=True, llm_int8_threshold=None)
    assert isinstance(made.model.layers[0].self_attn.q_proj.format, Tiles)
    with pytest.raises(ConfigError, match="call dequantize"):
        made.save_pretrained(tmp_path)


def test_settings_without_meaning_are_refused():
    with pytest.raises(ConfigError, match="llm_int8_has_fp16_weight=True keeps the weights"):
        BitsAndBytesConfig.of({"load_in_8bit": True, "llm_int8_has_fp16_weight": True})
    with pytest.raises(ConfigError, match="must not be below 0"):
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=-1.0)
    facts = json.loads(json.dumps(BitsAndBytesConfig(load_in_8bit=True).to_dict()))
    assert BitsAndBytesConfig.of(facts).llm_int8_threshold == 6.0
    assert ops.int8_product.variants
