"""Models in a single .gguf file (llama.cpp's format, version 3): configuration and tensors.

The `gguf` library reads the file and undoes its quantisation, one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from topwork.errors import CheckpointError, nearest

ARCHITECTURES = ("llama", "qwen2", "qwen3")
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GgufFile:
    """One open file. CheckpointError when it is damaged, truncated or of an unknown kind."""

    def __init__(self, path: Path) -> None:
        import gguf

        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except Exception as error:  # the library raises many kinds for a damaged file
            raise CheckpointError(f"{path}: damaged or no GGUF file: {error}") from error
        self.architecture = str(self._need("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise CheckpointError(
                f"{path}: architecture {self.architecture!r} is not supported"
                f"{nearest(self.architecture, ARCHITECTURES)}; known: {', '.join(ARCHITECTURES)}"
            )

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of `key`; "*" stands for the architecture."""
        found = self._reader.get_field(key.replace("*", getattr(self, "architecture", "*")))
        return default if found is None else found.contents()

    def _need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path}: the metadata lacks {key!r}")
        return value

    def config(self) -> dict[str, Any]:
        """What config.json would say of this model."""
        heads = self._need("*.attention.head_count")
        hidden = self._need("*.embedding_length")
        tensors = {t.name: t for t in self._reader.tensors}
        config: dict[str, Any] = {
            "model_type": self.architecture,
            "hidden_size": hidden,
            "intermediate_size": self._need("*.feed_forward_length"),
            "num_hidden_layers": self._need("*.block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self.get("*.attention.head_count_kv", heads),
            "head_dim": self.get("*.attention.key_length", hidden // heads),
            "max_position_embeddings": self._need("*.context_length"),
            "rms_norm_eps": self._need("*.attention.layer_norm_rms_epsilon"),
            "rope_theta": self.get("*.rope.freq_base", 10000.0),
            "vocab_size": int(tensors["token_embd.weight"].shape[1]),
            "tie_word_embeddings": "output.weight" not in tensors,
            "bos_token_id": self.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.get("tokenizer.ggml.padding_token_id"),
        }
        scaling = self.get("*.rope.scaling.type", "none")
        if scaling in ("linear", "yarn"):
            config["rope_scaling"] = {
                "rope_type": scaling,
                "factor": self._need("*.rope.scaling.factor"),
            }
            original = self.get("*.rope.scaling.original_context_length")
            if scaling == "yarn" and original:
                config["rope_scaling"]["original_max_position_embeddings"] = original
        elif scaling != "none":
            raise CheckpointError(f"{self.path}: rope scaling {scaling!r} is not supported")
        if "rope_freqs.weight" in tensors:
            raise CheckpointError(
                f"{self.path}: its rope_freqs tensor (Llama 3.1 scaling) is not supported yet"
            )
        return config

    def tensors(self) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        """Each tensor's name in the module, and a function that reads it as fp32."""
        for tensor in self._reader.tensors:
            yield self._module_name(tensor.name), partial(self._read, tensor)

    def _module_name(self, name: str) -> str:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if match is None or match.group(2) not in NAMES:
            raise CheckpointError(f"{self.path}: unknown tensor {name!r}")
        layer, part, leaf = match.groups()
        home = NAMES[part] if layer is None else f"model.layers.{layer}.{NAMES[part]}"
        return f"{home}.{leaf}"

    def _read(self, tensor: Any) -> Tensor:
        import gguf

        try:
            array = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(f"{self.path}: {tensor.name}: cannot read {kind}") from error
        value = torch.from_numpy(array.copy()).float()
        value = value.reshape([int(n) for n in reversed(tensor.shape)])
        for part, key in (("attn_q.", "head_count"), ("attn_k.", "head_count_kv")):
            if self.architecture == "llama" and part in tensor.name:
                heads = self.get(f"*.attention.{key}", self._need("*.attention.head_count"))
                # llama.cpp interleaves the two halves of each head; "rotate half" wants them apart.
                value = value.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        return value
