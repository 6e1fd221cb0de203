"""`BitsAndBytesConfig`: what is quantised when a model is loaded, under the usual names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from topwork.errors import ConfigError, nearest
from topwork.quant.blocks import Blocks
from topwork.quant.linear import Format, QuantisedLinear
from topwork.quant.rows import Rows
from topwork.quant.tiles import Tiles


@dataclass(frozen=True, kw_only=True)
class BitsAndBytesConfig:
    """Linears of the trunk in 4 or 8 bits; embeddings, norms and heads stay as they are.

    8 bits are LLM.int8's (arXiv:2208.07339): outside training activations are rounded too, but for
    the columns of outliers.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_skip_modules: list[str] | None = None
    """Paths, or parts of paths, of linears that stay as they are."""
    bnb_4bit_quant_type: str = "fp4"
    """"nf4" or "fp4"."""
    bnb_4bit_use_double_quant: bool = False
    """Quantise the factors of the blocks too: 4.13 bits a weight in place of 4.5."""
    bnb_4bit_compute_dtype: str | torch.dtype | None = None
    """The dtype of the products; None: that of the activations."""
    llm_int8_threshold: float | None = 6.0
    """From which size on a value makes its column one of outliers; 0: none is. None: weights alone
    are rounded, which is nearer to the model, and faster on processors when it generates."""
    bnb_4bit_quant_storage: str | torch.dtype = "uint8"
    """No effect: codes lie in bytes; files that store them otherwise are read."""

    def __post_init__(self) -> None:
        if self.load_in_8bit == self.load_in_4bit:
            raise ConfigError("set one of load_in_4bit=True and load_in_8bit=True")
        Blocks(self.bnb_4bit_quant_type)
        _ = self.compute, self.format  # both refuse what is not known

    @classmethod
    def of(cls, given: Any) -> BitsAndBytesConfig:
        """From itself, a dictionary, or an object with `to_dict` (another library's)."""
        if isinstance(given, cls):
            return given
        values = given if isinstance(given, Mapping) else getattr(given, "to_dict", dict)()
        known = {f.name for f in fields(cls)}
        inert = {"quant_method", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"}
        if values.get("llm_int8_has_fp16_weight"):
            raise ConfigError(
                "llm_int8_has_fp16_weight=True keeps the weights in 16 bits and trains them: load "
                "the model without quantization_config for that"
            )
        for key in values:
            if key not in known | inert and not key.startswith("_"):
                raise ConfigError(f"quantization_config: {key!r} is not known{nearest(key, known)}")
        return cls(**{key: value for key, value in values.items() if key in known})

    def to_dict(self) -> dict[str, Any]:
        """As it stands in config.json."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        names = {k: str(v).removeprefix("torch.") for k, v in values.items() if "dtype" in k}
        kept: dict[str, Any] = {"bnb_4bit_compute_dtype": names["bnb_4bit_compute_dtype"]}
        if self.compute is None:
            kept = {"bnb_4bit_compute_dtype": "bfloat16"}
        if self.llm_int8_threshold is None:
            kept["llm_int8_threshold"] = 6.0
        storage = str(self.bnb_4bit_quant_storage).removeprefix("torch.")
        return {**values, **kept, "bnb_4bit_quant_storage": storage, "quant_method": "bitsandbytes"}

    @property
    def compute(self) -> torch.dtype | None:
        given = self.bnb_4bit_compute_dtype
        if given is None or isinstance(given, torch.dtype):
            return given
        found = getattr(torch, given, None)
        if not isinstance(found, torch.dtype):
            names = ("bfloat16", "float16", "float32")
            raise ConfigError(
                f"bnb_4bit_compute_dtype={given!r} is not known{nearest(str(given), names)}"
            )
        return found

    @property
    def format(self) -> Format:
        if self.load_in_8bit:
            return (
                Tiles("int8") if self.llm_int8_threshold is None else Rows(self.llm_int8_threshold)
            )
        return Blocks(self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant)

    def skips(self, path: str) -> bool:
        """Whether the linear at `path` stays as it is by `llm_int8_skip_modules`."""
        return any(f".{part}." in f".{path}." for part in self.llm_int8_skip_modules or ())


def linears_of(model: nn.Module, trunk: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of `trunk` by their paths in `model`."""
    start = next(path for path, module in model.named_modules() if module is trunk)
    for path, module in trunk.named_modules(prefix=start):
        if type(module) is nn.Linear:
            yield path, module


def prepare(
    model: nn.Module,
    trunk: nn.Module,
    config: BitsAndBytesConfig,
    coded: bool,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Put empty quantised linears in place of those that `config` names, to be filled from a file:
    with codes where the file is `coded`, else with weights that are quantised one by one.
    `dtype`: the weights' own, where the file does not tell it."""
    format_, chosen = config.format, []
    for path, module in linears_of(model, trunk):
        if config.skips(path):
            continue
        try:
            format_.check(module.out_features, module.in_features)
        except ConfigError:
            if coded:
                raise
            continue
        chosen.append((path, module))
    if not chosen:
        raise ConfigError(f"{type(model).__name__} has no linear that can be held in {format_}")
    for path, module in chosen:
        made = QuantisedLinear(
            module.in_features, module.out_features, format_, module.bias,
            dtype, config.compute, coded,
        )  # fmt: skip
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, made)


@dataclass(frozen=True)
class Summary:
    """The quantised linears of a model: how many, their weights, the bytes that hold them."""

    layers: int
    numbers: int
    nbytes: int
    formats: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Summary:
        found = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
        return cls(
            len(found),
            sum(m.shape.numel() for m in found),
            sum(b.nbytes for m in found for b in m.buffers()),
            tuple(sorted({str(m.format) for m in found})),
        )

    def __str__(self) -> str:
        bits = 8 * self.nbytes / max(1, self.numbers)
        kinds = " and ".join(self.formats)
        return (
            f"{self.layers} linears in {kinds}: {self.numbers:,} weights in "
            f"{self.nbytes / 1e6:.1f} MB ({bits:.2f} bits each)"
        )
