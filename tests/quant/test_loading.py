"""Models that are quantised while they load, and files that are quantised already."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import tiny
from topwork import AutoModelForCausalLM, BitsAndBytesConfig, describe
from topwork.errors import CheckpointError, ConfigError
from topwork.quant import QuantisedLinear, Summary

IDS = torch.tensor([[5, 17, 200, 3, 42, 99]])
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
SIZES = {"hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("base")
    tiny.model(**SIZES).to(torch.bfloat16).save_pretrained(home)
    return home


def load(folder, **fields):
    config = BitsAndBytesConfig(**fields) if fields else None
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


def test_linears_of_the_trunk_are_quantised_as_they_are_read(folder):
    plain, made = load(folder), load(folder, **NF4)
    layers = {p: m for p, m in made.named_modules() if isinstance(m, QuantisedLinear)}
    assert len(layers) == 2 * 7
    assert type(made.lm_head) is torch.nn.Linear
    assert made.num_parameters() == plain.num_parameters()
    for path, layer in layers.items():
        wanted = QuantisedLinear.of(plain.get_submodule(path), layer.format)
        assert torch.equal(layer.dequantised_weight(), wanted.dequantised_weight())
    assert "14 linears in nf4, double" in describe(made)
    error = (made(IDS).logits - plain(IDS).logits).norm() / plain(IDS).logits.norm()
    assert 0 < error < 0.5


def test_skipped_modules_stay_as_they_are(folder):
    made = load(folder, **NF4, llm_int8_skip_modules=["layers.0", "down_proj"])
    assert Summary.of(made).layers == 6
    assert type(made.model.layers[0].mlp.up_proj) is torch.nn.Linear


@torch.no_grad()
def test_eight_bits_are_nearer_than_four(folder):
    wanted = load(folder)(IDS).logits
    errors = [
        float((load(folder, **fields)(IDS).logits - wanted).norm())
        for fields in ({"load_in_8bit": True}, NF4, {"load_in_4bit": True})
    ]
    assert 0 < errors[0] < 0.3 * errors[1]
    assert errors[1] < errors[2]


def test_a_quantised_model_is_saved_and_read_with_the_same_values(folder, tmp_path):
    made = load(folder, **NF4)
    made.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(again(IDS).logits, made(IDS).logits)
    assert again.quantization_config.bnb_4bit_use_double_quant
    with pytest.raises(ConfigError, match="quantised already"):
        load(tmp_path, **NF4)


def test_dequantize_gives_plain_linears_of_the_same_values(folder, tmp_path):
    made = load(folder, **NF4)
    wanted = made(IDS).logits
    made.dequantize().save_pretrained(tmp_path)
    assert Summary.of(made).layers == 0
    assert torch.equal(load(tmp_path)(IDS).logits, wanted)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_files_pass_between_here_and_transformers(folder, tmp_path, kind, double):
    pytest.importorskip("bitsandbytes")
    import transformers

    fields = {**NF4, "bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": double}
    peer_config = transformers.BitsAndBytesConfig(**fields, bnb_4bit_compute_dtype=torch.bfloat16)
    auto = transformers.AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = auto.from_pretrained(folder, quantization_config=peer_config, dtype=torch.bfloat16)
        peer.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    wanted = load(folder, **fields)
    for path, module in wanted.named_modules():
        if isinstance(module, QuantisedLinear):
            theirs = dequantised(peer.get_submodule(path))
            assert torch.equal(ours.get_submodule(path).dequantised_weight(), theirs), path
            torch.testing.assert_close(module.dequantised_weight(), theirs, rtol=0.02, atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        back = auto.from_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    q = "model.layers.1.mlp.down_proj"
    assert torch.equal(dequantised(back.get_submodule(q)), dequantised(peer.get_submodule(q)))


def dequantised(linear):
    import bitsandbytes.functional as bnb

    return bnb.dequantize_4bit(linear.weight.data, linear.weight.quant_state)


PEAK = """
import sys, torch
from pathlib import Path
from topwork import AutoModelForCausalLM, BitsAndBytesConfig
def held(name):
    return int(Path("/proc/self/status").read_text().partition(name)[2].split()[0]) * 1024
warm = AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
before = held("VmRSS:")
Path("/proc/self/clear_refs").write_text("5")
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True))
size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
print(held("VmHWM:") - before, size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_loading_holds_the_quantised_model_and_one_shard(folder, tmp_path):
    big = tiny.model(hidden_size=512, intermediate_size=2048, num_hidden_layers=16)
    big.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="24MB")
    files = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert len(files) > 4
    code = [sys.executable, "-c", PEAK, str(tmp_path), str(folder)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split())
    assert size < 0.3 * sum(files)
    assert peak <= size + max(files), (peak, size, max(files))


def test_damaged_codes_and_wrong_settings_are_named(folder, tmp_path):
    load(folder, **NF4).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_use_double_quant"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj.weight.absmax"):
        load(tmp_path)
    config["quantization_config"] = {"quant_method": "aqlm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="aqlm"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="one of load_in_4bit"):
        BitsAndBytesConfig()
    with pytest.raises(ConfigError, match="nearest: 'load_in_4bit'"):
        BitsAndBytesConfig.of({"load_in_4bits": True})
    with pytest.raises(ConfigError, match="nearest: 'bfloat16'"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat15")
