"""Bottleneck adapters as the `adapters` library (AdapterHub) has them, in its places and files:
Houlsby's (arXiv:1902.00751), Pfeiffer's (arXiv:2005.00247), parallel ones (arXiv:2110.04366).

Where a block adds h, what attention or the MLP gives, to its stream r (and then normalises, if it
is a post-norm block), an adapter puts another value in place of h:

    sequential   h + f(h);   with `original_ln_before`  h + f(norm(h + r))
    parallel     h + f(r)
    f(x) = s · (U act(D x + b) + c)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError, nearest
from topwork.nn.layers import ACTIVATIONS as COMMON
from topwork.peft import sites, targets
from topwork.peft.config import LayerConfig, a_share, one_of
from topwork.peft.graft import Graft
from topwork.peft.methods import _bn_files as files

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **COMMON,
    "leakyrelu": F.leaky_relu,
    "leaky_relu": F.leaky_relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "linear": lambda x: x,
}
STARTS = ("bert", "mam_adapter", "houlsby")


@dataclass(frozen=True)
class Place:
    """Where in a block an adapter stands, by paths from the block.

    `linear` gives h, and the input of `stream` is r; `norm` takes their sum in post-norm blocks.
    `home`: what the library calls the place in files.
    """

    linear: str
    stream: str
    home: str
    norm: str | None = None


BERT = {
    "mh_adapter": Place(
        "attention.output.dense", "attention.self.query", "attention.output",
        "attention.output.LayerNorm",
    ),
    "output_adapter": Place("output.dense", "intermediate.dense", "output", "output.LayerNorm"),
}  # fmt: skip
LLAMA = {
    "mh_adapter": Place("self_attn.o_proj", "input_layernorm", "attention_adapters"),
    "output_adapter": Place("mlp.down_proj", "post_attention_layernorm", "output_adapters"),
}
GPT2 = {
    "mh_adapter": Place("attn.c_proj", "ln_1", "attention_adapters"),
    "output_adapter": Place("mlp.c_proj", "ln_2", "output_adapters"),
}
PLACES = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), BERT),
    **dict.fromkeys(("llama", "mistral"), LLAMA),
    "gpt2": GPT2,
}


@dataclass(kw_only=True)
class BnConfig(LayerConfig):
    """Fields, defaults and files of the `adapters` library. `SeqBnConfig`, `DoubleSeqBnConfig` and
    `ParBnConfig` are the choices that people know."""

    ALSO_INERT: ClassVar[frozenset[str]] = files.INERT
    WEIGHTS: ClassVar[str] = files.WEIGHTS

    mh_adapter: bool = True
    """After attention."""
    output_adapter: bool = True
    """After the MLP."""
    reduction_factor: float | dict[str, float] = 16
    """The width over the bottleneck's; or by layer: {"1": 8, "default": 16}."""
    non_linearity: str = "relu"
    original_ln_before: bool = False
    """The adapter reads h + r, through the block's norm where that stands behind the sum."""
    original_ln_after: bool = True
    """What comes out is added to r and normalised as h would be; False: it is the new stream."""
    ln_before: bool = False
    """A norm of its own on what the adapter reads."""
    ln_after: bool = False
    """One on what it gives."""
    residual_before_ln: bool | str = True
    """What is added to f: True: h; "post_add": h + r; False: what f reads."""
    adapter_residual_before_ln: bool = False
    """It is added before `ln_after` rather than behind it."""
    is_parallel: bool = False
    scaling: float | str = 1.0
    """A number, "learned", or "channel": one learned number per channel."""
    leave_out: list[int] = field(default_factory=list)
    """Layers, counted from 0, that get none."""
    dropout: float = 0.0
    init_weights: str = "bert"
    """"bert": N(0, 0.02); "houlsby": N(0, 0.01), cut at two deviations; "mam_adapter": as a linear
    begins, and nothing is added at the start."""
    name: str = "default"
    """The adapter's in files."""
    model_type: str | None = None
    hidden_size: int | None = None
    """Of the model; found out when the adapter is put on it."""
    model_class: str | None = None
    """What a file says of the model; without effect."""
    peft_type: str = "BN"

    def __post_init__(self) -> None:
        super().__post_init__()
        for option in ("target_modules", "exclude_modules", "layers_to_transform"):
            if getattr(self, option) is not None:
                raise ConfigError(
                    f"{option} has no meaning for BN: mh_adapter, output_adapter and leave_out say "
                    "where it goes; BottleneckConfig goes to modules by name"
                )
        if not (self.mh_adapter or self.output_adapter):
            raise ConfigError("mh_adapter and output_adapter are both off: nothing is adapted")
        one_of("non_linearity", self.non_linearity.lower(), tuple(ACTIVATIONS))
        one_of("residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        one_of("init_weights", self.init_weights, STARTS)
        if isinstance(self.scaling, str):
            one_of("scaling", self.scaling, ("learned", "channel"))
        a_share("dropout", self.dropout)
        factors = self.reduction_factor
        for factor in factors.values() if isinstance(factors, dict) else (factors,):
            if factor <= 0:
                raise ConfigError(f"reduction_factor={factors} must be above 0")

    def width(self, layer: int, size: int) -> int:
        """The bottleneck's width in `layer` of a model of `size`."""
        factors = self.reduction_factor
        if isinstance(factors, dict):
            by_layer = {str(key): value for key, value in factors.items()}
            found = by_layer.get(str(layer), by_layer.get("default"))
            if found is None:
                raise ConfigError(f"reduction_factor={factors} has neither {layer} nor 'default'")
            factors = found
        return max(1, int(size // factors))

    @property
    def reads_stream(self) -> bool:
        return self.is_parallel or self.original_ln_before or not self.original_ln_after

    # -- files -----------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path, **changes: Any) -> None:
        """Write `adapter_config.json` as the `adapters` library does."""
        files.write_config(self, folder)

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        places = PLACES[str(self.model_type)].values()
        moves = {p.linear: f"{p.home}.adapters.{self.name}" for p in places}
        return {files.disk_name(key, moves): tensor for key, tensor in tensors.items()}

    def from_file(self, tensors: dict[str, Tensor], wanted: Iterable[str]) -> dict[str, Tensor]:
        return files.renamed(tensors, wanted)


@dataclass(kw_only=True)
class SeqBnConfig(BnConfig):
    """Pfeiffer's: after the MLP, reading the sum (the library's `seq_bn`)."""

    mh_adapter: bool = False
    original_ln_before: bool = True


@dataclass(kw_only=True)
class DoubleSeqBnConfig(BnConfig):
    """Houlsby's: after attention and after the MLP (`double_seq_bn`)."""

    non_linearity: str = "swish"


@dataclass(kw_only=True)
class ParBnConfig(BnConfig):
    """Beside the MLP, reading the stream (`par_bn`)."""

    mh_adapter: bool = False
    reduction_factor: float | dict[str, float] = 2
    is_parallel: bool = True
    scaling: float | str = 4.0
    init_weights: str = "mam_adapter"


@dataclass
class Stream:
    """What passes from where a block's stream is seen to where the adapter computes."""

    norm: nn.Module | None
    held: Tensor | None = None

    def take(self) -> Tensor:
        """r, once."""
        held, self.held = self.held, None
        if held is None:
            raise ConfigError("a BN adapter computes before its block's stream was seen")
        return held


@dataclass(frozen=True)
class Placed:
    """What one graft knows: the adapter's settings, its layer and its stream."""

    config: BnConfig
    layer: int
    stream: Stream
    peft_type: str = "BN"


class Within(Graft):
    """A part of a BN adapter on one layer."""

    KINDS = ("linear", "other")
    config: Any

    def create(self) -> dict[str, Tensor | nn.Module]:
        return {}

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(
            f"a bottleneck adapter ({self.path}) is not linear: it cannot be merged into a weight"
        )


class Seen(Within):
    """Where the stream is seen."""

    def before(self, x: Tensor) -> Tensor:
        self.config.stream.held = x
        return x


class LeftOut(Within):
    """A norm that does not act, since what the adapter gives is the stream."""

    def instead(self, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: x


class Bn(Within):
    """The adapter, on the linear that gives h."""

    KINDS = ("linear",)

    @classmethod
    def settle(cls, config: BnConfig, model: nn.Module) -> BnConfig:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in PLACES:
            raise ConfigError(
                f"BN does not know the blocks of model_type {kind!r}{nearest(str(kind), PLACES)}; "
                f"it knows {', '.join(PLACES)}. BottleneckConfig goes to any linear"
            )
        if config.model_type not in (None, kind):
            raise ConfigError(
                f"adapter {config.name!r} was made for model_type {config.model_type!r}, "
                f"not {kind!r}"
            )
        base: Any = model
        sizes = [
            sites.site_of(targets.base_of(base.get_submodule(path))).outputs
            for path, _, _ in _places(config, kind, model)
        ]
        if config.hidden_size not in (None, sizes[0]):
            raise ConfigError(
                f"adapter {config.name!r} was made for hidden_size {config.hidden_size}; this "
                f"{type(model).__name__} has {sizes[0]}"
            )
        return replace(config, model_type=kind, hidden_size=sizes[0])

    @classmethod
    def besides(cls, config: BnConfig, model: nn.Module) -> list[tuple[str, type[Graft], Any]]:
        parts: list[tuple[str, type[Graft], Any]] = []
        for path, layer, place in _places(config, str(config.model_type), model):
            block = path.removesuffix(place.linear)
            norm = None if place.norm is None else model.get_submodule(block + place.norm)
            stream = Stream(None if norm is None else targets.base_of(norm))
            own = Placed(config, layer, stream)
            parts.append((path, cls, own))
            if config.reads_stream:
                parts.append((block + place.stream, Seen, own))
            if place.norm is not None and not config.original_ln_after:
                parts.append((block + place.norm, LeftOut, own))
        return parts

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, size = self.config.config, self.site.outputs
        width = config.width(self.config.layer, size)
        return {"adapters": Mlp(config, size, width).to(self.layer.device)}

    def saved(self) -> Iterable[tuple[str, Tensor]]:
        own = self.layer.adapters[self.name]  # type: ignore[index]
        return [(f"adapters.{key}", t) for key, t in own.state_dict(keep_vars=True).items()]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """h = `y` → what the block adds to its stream in its place."""
        placed: Placed = self.config
        config, norm = placed.config, placed.stream.norm
        f: Any = self.layer.adapters[self.name]  # type: ignore[index]
        r = placed.stream.take() if config.reads_stream else None
        if config.is_parallel:
            made = y + f(cast(Tensor, r), None)
            return made if config.original_ln_after else made - r
        seen = total = y
        if config.original_ln_before:
            total = y + cast(Tensor, r)
            seen = total if norm is None else norm(total)
        rest = {True: y, False: seen, "post_add": total}[config.residual_before_ln]
        made = f(seen, rest)
        return made if config.original_ln_after else made - r


class Mlp(nn.Module):
    """f, under the library's names; what it reads and gives is [..., size]."""

    def __init__(self, config: BnConfig, size: int, width: int) -> None:
        super().__init__()
        self.config = config
        if isinstance(config.scaling, str):
            self.scaling = nn.Parameter(torch.ones(size if config.scaling == "channel" else 1))
        else:
            self.scaling = float(config.scaling)
        parts: list[nn.Module] = [nn.Linear(size, width)]
        if config.ln_before:
            self.adapter_norm_before = nn.LayerNorm(size)
            parts.insert(0, self.adapter_norm_before)
        self.adapter_down = nn.Sequential(*parts)
        self.adapter_up = nn.Linear(width, size)
        if config.ln_after:
            self.adapter_norm_after = nn.LayerNorm(size)
        _start(config.init_weights, cast(nn.Linear, parts[-1]), self.adapter_up)

    def forward(self, x: Tensor, rest: Tensor | None) -> Tensor:
        """f(x), with `rest` added to it."""
        config = self.config
        inner = _norm(self.adapter_norm_before, x) if config.ln_before else x
        inner = _linear(cast(nn.Linear, self.adapter_down[-1]), inner)
        y = _linear(self.adapter_up, ACTIVATIONS[config.non_linearity.lower()](inner))
        s = self.scaling
        y = y * (s.to(y.dtype) if isinstance(s, Tensor) else s)
        y = F.dropout(y, config.dropout, self.training)
        if rest is not None and config.adapter_residual_before_ln:
            y, rest = y + rest, None
        y = _norm(self.adapter_norm_after, y) if config.ln_after else y
        return y if rest is None else y + rest


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(
        x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps
    )


@torch.no_grad()
def _start(how: str, down: nn.Linear, up: nn.Linear) -> None:
    down.bias.zero_()
    up.bias.zero_()
    if how == "mam_adapter":
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        up.weight.zero_()
        return
    for layer in (down, up):
        if how == "bert":
            nn.init.normal_(layer.weight, std=0.02)
        else:
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)


def _places(config: BnConfig, kind: str, model: nn.Module) -> list[tuple[str, int, Place]]:
    """(path of the linear, number of its layer, place) of each adapter."""
    chosen = [place for key, place in PLACES[kind].items() if getattr(config, key)]
    found = []
    for path, _ in targets.walk(model):
        for place in chosen:
            match = re.search(rf"(?:^|\.)(\d+)\.{re.escape(place.linear)}$", path)
            if match and int(match[1]) not in config.leave_out:
                found.append((path, int(match[1]), place))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no block for BN (leave_out={config.leave_out})"
        )
    return found


CONFIG = BnConfig
GRAFT = Bn
