"""What an adapter does to one layer: a method says it in a `Graft`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.peft import sites, targets, usual
from topwork.peft.tensors import Matrix, Shared

if TYPE_CHECKING:
    from topwork.peft.layer import AdaptedLayer


class Graft:
    """One adapter on one layer. A method's file overrides what it does differently.

    `config` is the adapter's, `path` the layer's in the model, `shared` what the method keeps once
    for all layers. The parameters live in the layer, under the names of peft's files.
    """

    KINDS: ClassVar[tuple[sites.Kind, ...]] = ("linear",)
    """The layers it goes to."""
    USUAL: ClassVar[dict[str, Any]] = usual.LINEARS
    """model_type → the modules it goes to where none are named."""
    BY_ROW: ClassVar[bool] = True
    """Whether the rows of a pass may go through different adapters."""
    SHOWN: ClassVar[dict[str, str]] = {}
    """What the layer shows of its adapters, by their names: peft's attribute → the graft's."""

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        """`config` with what it leaves open decided for `model`."""
        if config.target_modules is None:
            return replace(config, target_modules=targets.usual_of(model, cls.USUAL))
        return config

    @classmethod
    def of(cls, config: Any, site: sites.Site) -> type[Graft]:
        """The graft that a layer gets; a method may have several."""
        return cls

    def __init__(
        self, layer: AdaptedLayer, name: str, config: Any, path: str, shared: Shared
    ) -> None:
        self.layer = layer
        self.name = name
        self.config = config
        self.path = path
        self.shared = shared
        self.owner: Graft | None = None
        """The graft whose parameters this one uses: that of the layer that owns a tied weight."""

    @classmethod
    def paths(cls, config: Any, model: nn.Module) -> list[str]:
        """The layers that the adapter goes to."""
        return targets.target_names(model, config, cls.KINDS)

    def enter(self, model: nn.Module) -> None:
        """It stands in `model` now."""

    def leave(self) -> None:
        """It is taken out of the model."""

    # -- what a method says ----------------------------------------------------------------------

    def create(self) -> dict[str, Tensor | nn.Module]:
        """The parameters, by the names that they have in files."""
        raise NotImplementedError

    def before(self, x: Tensor) -> Tensor:
        """The layer's input, changed."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """The layer's output `y` for the input `x`, changed."""
        return y + sites.apply_weight(self.base, x, self.delta()).to(y.dtype)

    def beside(self, x: Tensor, y: Tensor, first: Tensor) -> Tensor:
        """The same beside others of its method, which made `y` of `first`."""
        return self.after(x, y)

    def delta(self) -> Tensor:
        """What is added to the weight, [out, in, *kernel] fp32."""
        raise NotImplementedError

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in, *kernel] and bias, both fp32, with the adapter in them."""
        return weight + self.delta(), bias

    def merged_beside(
        self, weight: Tensor, bias: Tensor | None, first: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The same beside others of its method, which made `weight` of `first`."""
        return self.merged(weight, bias)

    def term(self) -> ops.LoraTerm | None:
        """The whole of it as one low-rank term, where it is one: then the fast path is taken."""
        return None

    def joined(self, parts: ops.LinearParts) -> ops.LinearParts | None:
        """`parts` with the adapter among them, where it is a low-rank term; else None."""
        term = self.term()
        if term is None or parts.gain is not None:
            return None
        return replace(parts, terms=(*parts.terms, term))

    def instead(self, base: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """What computes in place of the layer below."""
        return base

    @classmethod
    def share(cls, config: Any, layers: list[tuple[str, sites.Site]]) -> dict[str, Tensor]:
        """What the method keeps once for all layers of an adapter, by the names in files."""
        return {}

    @classmethod
    def share_from(cls, config: Any, layers: list[Any], model: nn.Module) -> dict[str, Tensor]:
        """The same, where it follows from the weights of `model`."""
        return cls.share(config, layers)

    def token_term(self) -> ops.LoraTerm | None:
        """Its term on the tokens on which it acts, for a caller that knows those."""
        return self.term()

    def whole(self, x: Tensor) -> Tensor | None:
        """The layer's output at once, where no other adapter computes on it; None: step by step."""
        return None

    def changes(self) -> dict[str, Tensor]:
        """What is added to the layer's own parameters, by their names, while it computes."""
        return {}

    @classmethod
    def besides(cls, config: Any, model: nn.Module) -> list[tuple[str, type[Graft], Any]]:
        """Grafts of other kinds that the adapter has too: (path, kind, their configuration)."""
        return []

    @classmethod
    def companions(cls, config: Any, model: nn.Module, paths: list[str]) -> dict[str, str]:
        """Layers that an adapter goes to because they share a weight: path → the owner's."""
        return {}

    @classmethod
    def during(cls, config: Any, call: dict[str, Any]) -> AbstractContextManager[None]:
        """Within it the layers know what the arguments of a `call` say to the method, which takes
        them out."""
        return nullcontext()

    @classmethod
    def penalty(cls, config: Any, grafts: list[Any]) -> Tensor | None:
        """What is added to the loss while an adapter is trained."""
        return None

    # -- what a method may use -------------------------------------------------------------------

    def parameter(self, name: str) -> Any:
        """A parameter of this adapter by its name in `create`."""
        layer = self.layer if self.owner is None else self.owner.layer
        found = getattr(layer, name)[self.name]
        return found.weight if isinstance(found, Matrix) else found

    def __getitem__(self, name: str) -> Any:
        """The same to compute with: fp32, where it is kept in half precision."""
        found = self.parameter(name)
        half = isinstance(found, Tensor) and found.dtype in (torch.float16, torch.bfloat16)
        return found.float() if half else found

    def has(self, name: str) -> bool:
        home = getattr(self.layer, name, None)
        return home is not None and self.name in home

    @property
    def base(self) -> Any:
        return self.layer.base_layer

    @property
    def site(self) -> sites.Site:
        return self.layer.site

    @property
    def weight(self) -> Tensor:
        """The base's frozen weight [out, in, *kernel], fp32."""
        original = self.layer.original
        weight = self.base if original is None else original[0]
        weight = weight if isinstance(weight, Tensor) else sites.read_weight(weight)
        return weight.detach().float()

    def over(self, vector: Tensor, y: Tensor) -> Tensor:
        """`vector` [out] shaped to stand over the layer's output `y`."""
        return sites.per_output(vector, y, self.site.kind)

    def empty(self, *shape: int) -> Tensor:
        """A new fp32 tensor where the base layer is."""
        return torch.empty(*shape, device=self.layer.device)

    def meets(self, given: dict[str, Tensor]) -> None:
        """A file's tensors, by the names of `saved`, are about to be taken over."""

    def saved(self) -> Iterable[tuple[str, Tensor]]:
        """What goes to the file, by names below the layer's."""
        return self.layer.held(self.name)

    @property
    def parameters(self) -> Iterator[nn.Parameter]:
        for _, tensor in self.layer.held(self.name):
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point():
                yield tensor

    def trains(self, train: bool) -> None:
        """Mark this adapter's parameters as trained or not."""
        for parameter in self.parameters:
            parameter.requires_grad_(train)
