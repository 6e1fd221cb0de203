"""A linear layer whose weight is held in few bits; activations are untouched, unless the format
multiplies by itself (LLM.int8 outside training).

Few rows go through the native decoding kernels where the format has them; many rows through the
weight as it is made for the call, in a buffer that all layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import CheckpointError
from topwork.ops.native.decode import Weight
from topwork.quant.tiles import FOUR, Tiles


class Format(Protocol):
    """How a weight [out, in] is held: a frozen value without tensors of its own."""

    @property
    def kind(self) -> str: ...
    def check(self, outputs: int, inputs: int) -> None: ...
    def encode(self, weight: Tensor) -> dict[str, Tensor]: ...
    def decode(self, held: Mapping[str, Tensor], out: Tensor) -> Tensor: ...


class QuantisedLinear(nn.Module):
    """x Wᵀ + b with W [out, in] held in `format`. Made from a linear's weight by `of`.

    `dtype` is the weight's own: its values are rounded to it. `compute`: the dtype of the product,
    default that of x. The layer is empty, fit to be filled from a file, until `set_weight` or
    `take`; `coded` says that the file holds codes.
    """

    def __init__(
        self, inputs: int, outputs: int, format: Format, bias: Tensor | None = None,
        dtype: torch.dtype = torch.float32, compute: torch.dtype | None = None,
        coded: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        format.check(outputs, inputs)
        self.in_features, self.out_features = inputs, outputs
        self.format, self.dtype, self.compute, self.coded = format, dtype, compute, coded
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self._native: tuple[Any, Weight | None] | None = None

    @classmethod
    def of(
        cls, linear: nn.Linear, format: Format | str, group: int = 32,
        compute: torch.dtype | None = None,
    ) -> QuantisedLinear:  # fmt: skip
        """The linear with its weight quantised; a format by name is one of `Tiles`."""
        format = Tiles(format, group) if isinstance(format, str) else format
        weight = linear.weight
        shape = linear.in_features, linear.out_features
        made = cls(*shape, format, linear.bias, weight.dtype, compute)
        made.set_weight(weight)
        return made.train(linear.training)

    # -- the protocol of a linear ----------------------------------------------------------------

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Quantise `weight` [out, in]."""
        for name, tensor in self.format.encode(weight).items():
            self._hold(name, tensor)

    def dequantised_weight(self) -> Tensor:
        """W [out, in] in the dtype that it had."""
        return self.packed(self.dtype).dense()

    @property
    def weight(self) -> ops.Packed:
        """The weight as what it is: frozen, and made when it is needed."""
        return self.packed(self.dtype)

    def packed(self, dtype: torch.dtype) -> ops.Packed:
        """The weight, to be made in `dtype`."""
        device = next(self.buffers(), torch.empty(0)).device
        return ops.Packed(self.shape, dtype, device, self._fill)

    def _fill(self, out: Tensor) -> Tensor:
        if out.dtype == self.dtype:
            return self.format.decode(self.held, out)
        return out.copy_(self.dequantised_weight())

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def kind(self) -> str:
        return self.format.kind

    @property
    def held(self) -> dict[str, Tensor]:
        """What the format holds, by name."""
        if not self._buffers:
            raise CheckpointError("this quantised layer has no weight yet")
        return self._buffers  # type: ignore[return-value]

    def linear_parts(self) -> ops.LinearParts | None:
        """The layer as a part of a fused function; None where it must be called."""
        hooked = self._forward_hooks or self._forward_pre_hooks or self._multiply is not None
        if hooked or self.compute not in (None, self.dtype):
            return None
        return ops.LinearParts(self.weight, self.bias)

    def native_weight(self) -> Weight | None:
        """The weight as the native decoding kernels take it, if they do."""
        tell = getattr(self.format, "native", None)
        if tell is None or self._forward_hooks or self._forward_pre_hooks:
            return None
        state = tuple(
            (t.data_ptr(), 0 if t.is_inference() else t._version) for t in self.held.values()
        )
        if self._native is None or self._native[0] != state:  # making it may cost a pass
            self._native = state, tell(self.held, self.shape, self.bias)
        return self._native[1]

    @property
    def _multiply(self) -> Callable[..., Tensor] | None:
        """The format's own product, where it has one."""
        return None if self.training else getattr(self.format, "multiply", None)

    def forward(self, x: Tensor) -> Tensor:
        multiply = self._multiply
        if multiply is not None:
            return multiply(self.held, x, self.bias)
        dtype = self.compute or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return ops.linear(x.to(dtype), self.packed(dtype), bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"

    # -- files -----------------------------------------------------------------------------------

    def wanted(self) -> tuple[str, ...]:
        """The names, below its own, of the tensors that fill this layer."""
        return self.format.names() if self.coded else ("weight",)  # type: ignore[attr-defined]

    def take(self, name: str, tensor: Tensor) -> None:
        """One of `wanted` from a file."""
        if not self.coded:
            self.dtype = tensor.dtype
            self.set_weight(tensor)
            return
        held, dtype = self.format.read(name, tensor, self.shape)  # type: ignore[attr-defined]
        self.dtype = dtype or self.dtype
        for key, value in held.items():
            self._hold(key, value)

    def _hold(self, name: str, tensor: Tensor) -> None:
        if name in self._buffers:
            self._buffers[name] = tensor
        else:
            self.register_buffer(name, tensor)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        stored = getattr(self.format, "stored", None)
        if stored is None or not self._buffers:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, tensor in stored(self.held, self.shape, self.dtype).items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, *rest: Any, **more: Any
    ) -> None:
        if hasattr(self.format, "stored"):
            state = dict(state)
            for name in self.format.names():  # type: ignore[attr-defined]
                if prefix + name in state:
                    tensor = state.pop(prefix + name)
                    held, dtype = self.format.read(name, tensor, self.shape)  # type: ignore[attr-defined]
                    self.dtype = dtype or self.dtype
                    for key, value in held.items():
                        self._hold(key, value.clone())
            for key, value in self._buffers.items():
                state[prefix + key] = value
        super()._load_from_state_dict(state, prefix, *rest, **more)


def quantise(
    model: nn.Module,
    kind: str = "int4",
    *,
    group: int = 32,
    head: str | None = "int8",
    skip: Callable[[str], bool] = lambda path: False,
) -> nn.Module:
    """Replace the linears of `model` in place, except those whose path `skip` accepts.

    `head`: the kind of the output head (`lm_head`), which keeps its embedding where they are tied;
    None leaves it as it is. Linears of a shape that does not go into blocks are left too.
    """
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or skip(path):
            continue
        chosen = head if path.rpartition(".")[2] == "lm_head" else kind
        columns = group if chosen in FOUR else 32
        if chosen is None or module.in_features % columns or module.out_features % 16:
            continue
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, QuantisedLinear.of(module, chosen, group))
    tied = getattr(model, "tied", None)
    if tied:
        model.tied = {}  # type: ignore[assignment]
    return model


def dequantise(model: nn.Module) -> nn.Module:
    """Replace the quantised linears of `model` in place by plain ones of the same values."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantisedLinear):
            weight = module.dequantised_weight()
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None,
                             device="meta")  # fmt: skip
            made.weight = nn.Parameter(weight, requires_grad=False)
            made.register_parameter("bias", module.bias)
            home, _, name = path.rpartition(".")
            setattr(model.get_submodule(home), name, made.train(module.training))
    return model
