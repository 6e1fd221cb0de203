"""8 bits with one factor per row, as bitsandbytes has them (LLM.int8, arXiv:2208.07339)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from topwork import ops
from topwork.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Rows:
    """Activations are rounded to 8 bits too, but for columns that reach `threshold` (0: none).

    In training they are not rounded, as in bitsandbytes on processors. Held: `codes` int8
    [out, in] and `absmax` fp32 [out].
    """

    threshold: float = 6.0
    kind: str = "llm.int8"

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ConfigError(f"llm_int8_threshold={self.threshold} must not be below 0")

    def check(self, outputs: int, inputs: int) -> None:
        """Every shape goes into rows."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """`weight` [out, in] as it is held."""
        codes, most = ops.encode_rows(weight)
        return {"codes": codes, "absmax": most}

    def decode(self, held: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Fill `out` [out, in] with the weight."""
        return ops.decode_rows(held["codes"], held["absmax"], out)

    def multiply(self, held: Mapping[str, Tensor], x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b: [..., in] → [..., out], in 8 bits."""
        return ops.int8_linear(x, held["codes"], held["absmax"], bias, self.threshold)

    def __str__(self) -> str:
        return f"{self.kind}, threshold={self.threshold:g}"

    # -- bitsandbytes' files ---------------------------------------------------------------------

    def stored(
        self, held: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of a file, by names below the layer's."""
        in_rows = torch.tensor(0, dtype=torch.uint8)
        return {"weight": held["codes"], "SCB": held["absmax"], "weight_format": in_rows}

    def names(self) -> tuple[str, ...]:
        """The names in `stored`."""
        return ("weight", "SCB", "weight_format")

    def read(
        self, name: str, tensor: Tensor, shape: torch.Size
    ) -> tuple[dict[str, Tensor], torch.dtype | None]:
        """What a file's tensor `name` gives to hold; the file does not tell the weight's dtype.

        Raises CheckpointError when it is not what a weight of `shape` has.
        """
        if name == "weight_format":
            if tensor.numel() != 1 or int(tensor) != 0:
                raise CheckpointError(
                    f"weight_format is {tensor.tolist()}: codes in the order of one kind of GPU "
                    "are not read; rows (0) are"
                )
            return {}, None
        home, size, dtype = {
            "weight": ("codes", shape, torch.int8),
            "SCB": ("absmax", shape[:1], torch.float32),
        }[name]
        if tensor.shape != size or tensor.dtype != dtype:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} in the file; a weight "
                f"{list(shape)} in 8 bits has {list(size)} of {dtype}"
            )
        return {home: tensor}, None
