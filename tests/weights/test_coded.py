"""Checkpoints of other quantisers, written here by their formulas, digit by digit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from topwork import AutoModelForCausalLM, BitsAndBytesConfig
from topwork.errors import CheckpointError, ConfigError
from topwork.quant import Summary
from topwork.weights.coded import AWQ_ORDER, E2M1, decoded

IN, OUT, GROUP = 64, 32, 16
Q = "model.layers.0.self_attn.q_proj"


def words(codes, bits, dim, order=None):
    """Digits into int32 words along `dim`, the lowest first, with plain integers."""
    codes = codes.movedim(dim, -1)
    count = 32 // bits
    order = order or range(count)
    rows = []
    for row in codes.reshape(-1, codes.shape[-1]).tolist():
        made = []
        for at in range(0, len(row), count):
            word = sum(row[at + column] << (bits * i) for i, column in enumerate(order))
            made.append(word - 2**32 if word >= 2**31 else word)
        rows.append(made)
    packed = torch.tensor(rows, dtype=torch.int32)
    return packed.view(*codes.shape[:-1], -1).movedim(-1, dim)


def draw(high, *shape):
    return torch.randint(0, high, shape)


def gptq(bits=4, shuffled=False, second=False):
    torch.manual_seed(bits)
    codes, zeros = draw(2**bits, IN, OUT), draw(2**bits - 1, IN // GROUP, OUT) + 1
    scales = (torch.rand(IN // GROUP, OUT) + 0.5).half()
    places = torch.arange(IN) // GROUP
    parts = {"qweight": words(codes, bits, 0), "scales": scales}
    parts["qzeros"] = words(zeros if second else zeros - 1, bits, 1)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
    if shuffled:
        places = places[torch.randperm(IN)]
        parts["g_idx"] = places.int()
    if second:
        settings["checkpoint_format"] = "gptq_v2"
    weight = (codes - zeros[places]) * scales[places].float()
    return settings, {Q + "." + k: v for k, v in parts.items()}, weight.t().half()


def awq():
    torch.manual_seed(1)
    codes, zeros = draw(16, IN, OUT), draw(16, IN // GROUP, OUT)
    scales = (torch.rand(IN // GROUP, OUT) + 0.5).half()
    places = torch.arange(IN) // GROUP
    parts = {
        "qweight": words(codes, 4, 1, AWQ_ORDER), "qzeros": words(zeros, 4, 1, AWQ_ORDER),
        "scales": scales,
    }  # fmt: skip
    weight = (codes - zeros[places]) * scales[places].float()
    settings = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    return settings, {Q + "." + k: v for k, v in parts.items()}, weight.t().half()


COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def packed(bits=4, zero=False):
    torch.manual_seed(2)
    half, places = 2 ** (bits - 1), torch.arange(IN) // GROUP
    codes, scales = draw(2**bits, OUT, IN) - half, torch.rand(OUT, IN // GROUP).bfloat16()
    zeros = draw(2**bits, OUT, IN // GROUP) - half if zero else torch.zeros(OUT, IN // GROUP).int()
    parts = {
        "weight_packed": words(codes + half, bits, 1), "weight_scale": scales,
        "weight_shape": torch.tensor([OUT, IN]),
    }  # fmt: skip
    if zero:
        parts["weight_zero_point"] = words(zeros + half, bits, 0)
    weight = (codes - zeros[:, places]) * scales[:, places].float()
    return COMPRESSED, {Q + "." + k: v for k, v in parts.items()}, weight.bfloat16()


def scaled(scale_shape, dtype=torch.float8_e4m3fn):
    torch.manual_seed(3)
    values = (torch.randn(OUT, IN) * 20).to(dtype)
    scales = torch.rand(scale_shape).bfloat16()
    parts = {"weight": values, "weight_scale": scales, "input_scale": torch.ones(1)}
    weight = (values.float() * scales.float()).bfloat16()
    return COMPRESSED, {Q + "." + k: v for k, v in parts.items()}, weight


def tiles():
    torch.manual_seed(4)
    values = (torch.randn(OUT, IN) * 20).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3)  # tiles of 24 x 24 over 32 x 64: the last ones are short
    rows, columns = torch.arange(OUT) // 24, torch.arange(IN) // 24
    parts = {"weight": values, "weight_scale_inv": scales}
    weight = (values.float() * scales[rows][:, columns]).bfloat16()
    settings = {"quant_method": "fp8", "weight_block_size": [24, 24]}
    return settings, {Q + "." + k: v for k, v in parts.items()}, weight


def mxfp4():
    torch.manual_seed(5)
    codes, exponents = draw(16, 2, OUT, 2, 32), draw(20, 2, OUT, 2) + 115
    levels = torch.tensor([*E2M1, *(-v for v in E2M1)])
    weight = (levels[codes] * 2.0 ** (exponents[..., None] - 127)).flatten(2).transpose(1, 2)
    name = "model.layers.0.mlp.experts.down_proj"
    parts = {
        name + "_blocks": (codes[..., 0::2] | codes[..., 1::2] << 4).byte(),
        name + "_scales": exponents.byte(),
    }
    return {"quant_method": "mxfp4"}, parts, weight.bfloat16()


CASES = {
    "gptq": gptq(), "gptq-2": gptq(2), "gptq-8": gptq(8), "gptq-shuffled": gptq(shuffled=True),
    "gptq-v2": gptq(second=True), "awq": awq(), "packed": packed(),
    "packed-zero": packed(zero=True), "packed-8": packed(8), "fp8-one": scaled((1,)),
    "fp8-rows": scaled((OUT, 1)), "int8-rows": scaled((OUT, 1), torch.int8),
    "fp8-tiles": tiles(), "mxfp4": mxfp4(),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_codes_become_the_weights_that_they_stand_for(case):
    settings, parts, wanted = CASES[case]
    other = torch.ones(3)
    readers = [(k, lambda v=v: v) for k, v in {**parts, "norm.weight": other}.items()]
    found = {key: read() for key, read in decoded(readers, settings)}
    (name,) = set(found) - {"norm.weight"}
    assert name == Q + ".weight" or case == "mxfp4"
    assert found["norm.weight"] is other
    assert found[name].dtype == wanted.dtype
    assert torch.equal(found[name], wanted)


@pytest.fixture(params=["gptq", "awq", "packed", "fp8-rows", "fp8-tiles"])
def coded_folder(request, tmp_path):
    settings, parts, wanted = CASES[request.param]
    model = tiny.model(hidden_size=IN, num_attention_heads=2, head_dim=OUT // 2)
    model.to(wanted.dtype).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[Q + ".weight"]
    save_file({**tensors, **{k: v.contiguous() for k, v in parts.items()}},
              tmp_path / "model.safetensors")  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return tmp_path, wanted


def test_a_model_loads_from_codes_and_may_be_quantised_again(coded_folder):
    folder, wanted = coded_folder
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.get_submodule(Q).weight, wanted)
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    again = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    assert Summary.of(again).layers == 14
    model.save_pretrained(folder / "plain")
    plain = AutoModelForCausalLM.from_pretrained(folder / "plain")
    assert torch.equal(plain.get_submodule(Q).weight, wanted)


def test_what_cannot_be_read_is_named():
    settings, parts, _ = gptq()
    with pytest.raises(ConfigError, match="nearest: 'gptq'"):
        list(decoded([], {"quant_method": "gptqq"}))
    with pytest.raises(ConfigError, match="3 bits"):
        list(decoded([], {**settings, "bits": 3}))
    with pytest.raises(ConfigError, match="'gemv'"):
        list(decoded([], {"quant_method": "awq", "version": "gemv"}))
    del parts[Q + ".qzeros"]
    readers = [(k, lambda v=v: v) for k, v in parts.items()]
    ((_, read),) = decoded(readers, settings)
    with pytest.raises(CheckpointError, match=Q):
        read()
