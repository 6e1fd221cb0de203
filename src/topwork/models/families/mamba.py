"""Mamba: no attention; every layer is a selective state space behind a norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.models.base import CausalModel, Model, backbone
from topwork.models.config import Config, ConfigReader
from topwork.models.heads import BareModel
from topwork.models.packing import packed_positions
from topwork.nn.cache import KVCache
from topwork.nn.mamba import MambaMixer, MambaSpec, RecurrentStore
from topwork.nn.norms import NormSpec
from topwork.ops.recompute import recomputed
from topwork.weights import Rename, Table

TINY = {
    "hidden_size": 40, "num_hidden_layers": 2, "state_size": 6, "time_step_rank": 5,
}  # fmt: skip
CASES = [
    {},
    {"expand": 1, "conv_kernel": 2, "use_conv_bias": False},
    {"use_bias": True, "layer_norm_epsilon": 0.1, "hidden_act": "relu"},
    {"residual_in_fp32": False, "time_step_rank": "auto", "state_size": 1},
    {"tie_word_embeddings": True, "conv_kernel": 1},
]


@dataclass(frozen=True)
class MambaModelSpec:
    """A whole model; `wide`: the stream between the blocks is fp32."""

    vocab: int
    hidden: int
    norm: NormSpec
    layers: tuple[MambaSpec, ...]
    wide: bool = True
    tied: bool = True


def read_spec(read: ConfigReader) -> MambaModelSpec:
    read.ignore(
        "d_inner", "d_model", "fused_add_norm", "intermediate_size", "n_layer",
        "rescale_prenorm_residual", "rms_norm", "ssm_cfg", "time_step_init_scheme",
        "use_associative_scan", "use_mambapy",
    )  # fmt: skip
    hidden, rank = read.need("hidden_size"), read("time_step_rank", "auto")
    mixer = MambaSpec(
        width=int(read("expand", 2) * hidden),
        state=read("state_size", 16),
        kernel=read("conv_kernel", 4),
        rank=math.ceil(hidden / 16) if rank == "auto" else rank,
        activation=read("hidden_act", "silu"),
        bias=read("use_bias", False),
        conv_bias=read("use_conv_bias", True),
        step_min=read("time_step_min", 0.001),
        step_max=read("time_step_max", 0.1),
        step_floor=read("time_step_floor", 1e-4),
        step_scale=read("time_step_scale", 1.0),
    )
    return MambaModelSpec(
        vocab=read.need("vocab_size"),
        hidden=hidden,
        norm=NormSpec(eps=read("layer_norm_epsilon", 1e-5)),
        layers=(mixer,) * read.need("num_hidden_layers"),
        wide=read("residual_in_fp32", True),
        tied=read("tie_word_embeddings", True),
    )


class MambaBlock(nn.Module):
    """x + mixer(norm(x)); the stream is fp32 where the configuration says so."""

    def __init__(self, mixer: MambaSpec, spec: MambaModelSpec) -> None:
        super().__init__()
        self.norm = spec.norm.build(spec.hidden)
        self.mixer = MambaMixer(mixer, spec.hidden)
        self.wide = spec.wide

    def forward(
        self, x: Tensor, place: Tensor, real: Tensor | None, store: RecurrentStore | None
    ) -> Tensor:
        y = self.mixer(self.norm(x.to(self.mixer.D.dtype)), place, real, store)
        return (x.float() if self.wide else x) + y


class Mamba(nn.Module):
    """Embedding, blocks and the final norm."""

    embedding = "embeddings"

    def __init__(self, spec: MambaModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = nn.Embedding(spec.vocab, spec.hidden)
        self.layers = nn.ModuleList(MambaBlock(mixer, spec) for mixer in spec.layers)
        self.norm_f = spec.norm.build(spec.hidden)
        self.checkpointing = False

    @property
    def block_list(self) -> Any:
        return self.layers

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def trunk(self) -> Mamba:
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        layout: ops.Layout | None = None,
        cache: KVCache | None = None,
        **padding: Any,
    ) -> Tensor:
        """ids [B, T] or embeddings [B, T, C] → hidden [B, T, C].

        The module has the name of the contract's `backbone`: called as that, without a layout, it
        takes `lengths` or `attention_mask` and finds the layout first.
        """
        if layout is None:
            return backbone(self, input_ids, inputs_embeds=inputs_embeds, cache=cache, **padding)  # type: ignore[arg-type]
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        dtype, back = x.dtype, None
        if any(isinstance(n, tuple) for n in layout.lengths or ()):
            # A state cannot be shared by branches that go on from it: each begins on its own.
            plain = ops.unshared(layout.lengths or (), x.device)
            x, back, layout = x[:, plain.take], plain.back, ops.Layout(plain.lengths)
        place, real = places(layout, x)
        for i, block in enumerate(self.layers):
            store = None if cache is None else cache.stores[i]
            if not isinstance(store, RecurrentStore | None):
                raise ConfigError("Mamba's memory is its state: use the cache of new_cache()")
            if self.checkpointing and self.training and torch.is_grad_enabled():
                x = recomputed(block, x, place, real, store)
            else:
                x = block(x, place, real, store)
        x = self.norm_f(x).to(dtype)
        return x if back is None else x[:, back]


def places(layout: ops.Layout, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """How many tokens of its own text stand before each [B, T], and which are real."""
    tokens = x.shape[1]
    if layout.lengths is not None:
        return packed_positions(layout.lengths, x.device), None
    if layout.keep is None:
        return torch.arange(layout.past, layout.past + tokens, device=x.device)[None], None
    keep = layout.keep
    if bool((keep[:, 1:] < keep[:, :-1]).any()):
        raise ConfigError("a recurrent state cannot skip padding behind a text: pad on the left")
    place = (keep.long().cumsum(1) - 1).clamp_(min=0)
    return place[:, layout.past :], keep[:, layout.past :]


class CausalMamba(CausalModel):
    """A `Mamba` under its name on the Hub and its `lm_head`."""

    def __init__(self, config: Config, read: ConfigReader) -> None:
        super().__init__(config)
        spec = read_spec(read)
        self.add_module("backbone", Mamba(spec))
        self.lm_head = nn.Linear(spec.hidden, spec.vocab, bias=False)
        self.table = TABLE
        self.tied = {"lm_head.weight": "backbone.embeddings.weight"} if spec.tied else {}
        self.tie_weights()

    # The checkpoint calls the trunk as the contract calls what it does: the module serves as both.
    @property
    def backbone(self) -> Mamba:  # type: ignore[override]
        # A view of the model with adapters has an entry of its own.
        return vars(self).get("backbone") or self.trunk

    @property
    def trunk(self) -> Mamba:
        try:
            return self._modules["backbone"]  # type: ignore[return-value]
        except KeyError:
            raise AttributeError("backbone") from None

    @property
    def layer_count(self) -> int:
        return self.trunk.layer_count

    def new_cache(self, batch_size: int | None = None) -> KVCache:
        return KVCache([RecurrentStore() for _ in range(self.layer_count)])


TABLE = Table(old=(Rename("embedding", "embeddings"),), prefix="backbone.")


def bare(config: Config, read: ConfigReader) -> Model:
    table = Table(old=TABLE.old, prefix=TABLE.prefix, drop=(r"^lm_head\.",))
    return BareModel(config, Mamba(read_spec(read)), table=table)


MODELS = {"base": bare, "causal-lm": CausalMamba}
