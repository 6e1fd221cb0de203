"""NF4 and FP4 in flat blocks with double quantisation (QLoRA, arXiv:2305.14314), value for value
and tensor for tensor as bitsandbytes has them.

A block of 64 weights has one factor, its largest absolute value. Doubly quantised, the factors
less their mean are rounded to 8 bits of a dynamic tree (arXiv:1511.04561) in blocks of 256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from topwork import ops
from topwork.errors import CheckpointError, ConfigError, nearest
from topwork.ops.native.decode import Weight
from topwork.quant.tiles import NORMAL, packed

# 1 bit of sign, 2 of exponent, 1 of fraction; the largest is 1, and the least lies below its kind.
_FLOAT = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0]
LEVELS = {"nf4": NORMAL, "fp4": [v / 12 for v in (*_FLOAT, *(-v for v in _FLOAT))]}
NESTED = 256  # factors to a block of theirs
CHUNK = 2**22  # weights that are quantised at a time
STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class Blocks:
    """4 bits in flat blocks that run on over the ends of rows.

    Held: `codes` uint8 [⌈n/2⌉]; `absmax` fp32 [⌈n/block⌉], or where `double` uint8 of that shape
    with `nested_absmax` fp32 [⌈n/block/256⌉], `nested_map` fp32 [256] and `offset` fp32 [];
    `levels` fp32 [16].
    """

    kind: str = "nf4"
    double: bool = False
    block: int = 64

    def __post_init__(self) -> None:
        if self.kind not in LEVELS:
            raise ConfigError(
                f"bnb_4bit_quant_type={self.kind!r} is not known{nearest(self.kind, LEVELS)}; "
                f"one of {', '.join(LEVELS)}"
            )

    def check(self, outputs: int, inputs: int) -> None:
        """Every shape goes into blocks."""

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """`weight` [out, in] as it is held."""
        flat = weight.flatten()
        levels = torch.tensor(LEVELS[self.kind], device=weight.device)
        chunk = CHUNK // self.block * self.block
        parts = [
            ops.encode_blocks(flat[at : at + chunk].float(), levels, self.block)
            for at in range(0, len(flat), chunk)
        ]
        codes, factors = (torch.cat(p) for p in zip(*parts))
        held = {"codes": codes, "absmax": factors, "levels": levels}
        return held | self._doubled(factors) if self.double else held

    def _doubled(self, factors: Tensor) -> dict[str, Tensor]:
        table = torch.tensor(dynamic_map(), device=factors.device)
        offset = factors.mean()
        blocks = F.pad(factors - offset, (0, -len(factors) % NESTED)).view(-1, NESTED)
        most = blocks.abs().amax(1)
        scaled = blocks * (1.0 / most.clamp(min=1e-38))[:, None]
        places = torch.bucketize(scaled.flatten(), (table[1:] + table[:-1]) / 2)
        codes = places[: len(factors)].to(torch.uint8)
        return {"absmax": codes, "nested_absmax": most, "nested_map": table, "offset": offset}

    def factors(self, held: Mapping[str, Tensor]) -> Tensor:
        """The factor of each block, fp32."""
        if not self.double:
            return held["absmax"]
        values = held["nested_map"][held["absmax"].int()]
        outer = held["nested_absmax"].repeat_interleave(NESTED)[: len(values)]
        return values.mul_(outer).add_(held["offset"])

    def decode(self, held: Mapping[str, Tensor], out: Tensor) -> Tensor:
        """Fill `out` [out, in] with the weight."""
        factors = self.factors(held)
        return ops.decode_blocks(held["codes"], factors, held["levels"], self.block, out)

    def native(
        self, held: Mapping[str, Tensor], shape: torch.Size, bias: Tensor | None
    ) -> Weight | None:
        """A copy in the tiles of the decoding kernels, with factors in bf16; None where blocks run
        over the ends of rows.
        """
        outputs, inputs = shape
        if inputs % self.block or outputs % 16 or held["codes"].device.type != "cpu":
            return None
        codes = torch.stack((held["codes"] >> 4, held["codes"] & 15), 1).view(shape)
        factors = self.factors(held).view(-1, 16, inputs // self.block).transpose(1, 2)
        scale = factors.to(torch.bfloat16).contiguous()
        levels = held["levels"].float().contiguous()
        return Weight(
            packed(codes).contiguous(), outputs, inputs, "code4", scale, levels, self.block, bias
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.kind}, double" if self.double else self.kind

    # -- bitsandbytes' files ---------------------------------------------------------------------

    def stored(
        self, held: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """The tensors of a file, by names below the layer's."""
        facts: dict[str, Any] = {
            "quant_type": self.kind,
            "blocksize": self.block,
            "dtype": _name(dtype),
            "shape": list(shape),
        }
        found = {
            "weight": held["codes"][:, None],
            "weight.absmax": held["absmax"],
            "weight.quant_map": held["levels"],
        }
        if self.double:
            facts |= {
                "nested_blocksize": NESTED,
                "nested_dtype": "float32",
                "nested_offset": held["offset"].item(),
            }
            found["weight.nested_absmax"] = held["nested_absmax"]
            found["weight.nested_quant_map"] = held["nested_map"]
        text = json.dumps(facts).encode()
        return found | {STATE + self.kind: torch.tensor(list(text), dtype=torch.uint8)}

    def names(self) -> tuple[str, ...]:
        """The names in `stored`."""
        nested = ("weight.nested_absmax", "weight.nested_quant_map") if self.double else ()
        return ("weight", "weight.absmax", "weight.quant_map", *nested, STATE + self.kind)

    def read(
        self, name: str, tensor: Tensor, shape: torch.Size
    ) -> tuple[dict[str, Tensor], torch.dtype | None]:
        """What a file's tensor `name` gives to hold, and the weight's dtype if it tells it.

        Raises CheckpointError when it is not what a weight of `shape` has.
        """
        if name.startswith(STATE):
            return self._facts(tensor, shape)
        count = shape.numel()
        blocks = -(-count // self.block)
        home, size, dtype = {
            "weight": ("codes", -(-count // 2), torch.uint8),
            "weight.absmax": ("absmax", blocks, torch.uint8 if self.double else torch.float32),
            "weight.quant_map": ("levels", 16, torch.float32),
            "weight.nested_absmax": ("nested_absmax", -(-blocks // NESTED), torch.float32),
            "weight.nested_quant_map": ("nested_map", 256, torch.float32),
        }[name]
        if name == "weight":
            tensor = tensor.contiguous().view(torch.uint8)  # some store it under another type
        if tensor.numel() != size or tensor.dtype != dtype:
            raise CheckpointError(
                f"{name} is {list(tensor.shape)} {tensor.dtype} in the file; a weight "
                f"{list(shape)} in {self} has {size} values of {dtype}"
            )
        return {home: tensor.flatten()}, None

    def _facts(
        self, tensor: Tensor, shape: torch.Size
    ) -> tuple[dict[str, Tensor], torch.dtype | None]:
        try:
            facts = json.loads(bytes(tensor.tolist()))
            wanted = {"quant_type": self.kind, "blocksize": self.block, "shape": list(shape)}
            if self.double:
                wanted["nested_blocksize"] = NESTED
            wrong = {key: facts.get(key) for key in wanted if facts.get(key) != wanted[key]}
            dtype = getattr(torch, facts["dtype"])
            offset = float(facts["nested_offset"]) if self.double else 0.0
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{STATE}{self.kind} cannot be read: {error!r}") from error
        if wrong:
            raise CheckpointError(f"{STATE}{self.kind} says {wrong}, wanted {wanted}")
        return ({"offset": torch.tensor(offset)} if self.double else {}), dtype


@cache
def dynamic_map() -> list[float]:
    """256 values in [-1, 1]: decades of falling precision, each cut evenly, and 0 and 1."""
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1)
        middles = (ends[:-1] + ends[1:]) / 2
        values += (10 ** (decade - 6) * middles).tolist() + (
            -(10 ** (decade - 6)) * middles
        ).tolist()
    return sorted(values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
