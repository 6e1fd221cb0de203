"""A layer with adapters: the layer below (`base_layer`) and what each adapter adds to it.

    x → before → base layer → after → y

A method says in a `Graft` what it does before and after, and to the weight when it is merged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import sites
from topwork.peft.graft import Graft
from topwork.peft.rounding import Rounding
from topwork.peft.rows import Rows
from topwork.peft.tensors import Bare, Tensors, hold
from topwork.peft.views import ByAdapter


class AdaptedLayer(nn.Module):
    """`base_layer` with named adapters of any methods. Parameter names are those of peft.

    Adapter parameters are fp32 and compute in the base's dtype. Of several active adapters those
    of one method stand side by side, and a method that came later stands around the earlier ones.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer = base
        self.site = sites.site_of(base)
        self.grafts: dict[str, Graft] = {}
        self.active: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self.disabled = False
        self.rows: Rows | None = None
        self.original: tuple[Tensor | nn.Module, Tensor | None] | None = None
        self.kept: dict[str, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "grafts"):
                raise
        showing = {n: g for n, g in self.grafts.items() if name in g.SHOWN}
        if not showing:
            return getattr(self.base_layer, name)
        return ByAdapter(showing, next(iter(showing.values())).SHOWN[name])

    def __setattr__(self, name: str, value: Any) -> None:
        if any(name in g.SHOWN for g in self.__dict__.get("grafts", {}).values()):
            getattr(self, name).update(value)
        else:
            super().__setattr__(name, value)

    @property
    def wrapped_module(self) -> nn.Module:
        return self.base_layer

    @property
    def device(self) -> torch.device:
        base = self.base_layer
        return next(chain(base.parameters(), base.buffers(), [torch.empty(0)])).device

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    @property
    def in_features(self) -> int:
        return self.site.inputs or self.base_layer.in_features  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        return self.site.outputs or self.base_layer.out_features  # type: ignore[return-value]

    # -- adapters --------------------------------------------------------------------------------

    @property
    def active_adapters(self) -> list[str]:
        return list(self.active)

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        return self.disabled

    def enable_adapters(self, enabled: bool) -> None:
        """Compute with the adapters or without."""
        self.disabled = not enabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and (unless `inference_mode`) the trainable ones."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.active = tuple(names)
        for name, graft in self.grafts.items():
            graft.trains(name in names and not inference_mode)

    def swapped(self) -> Any:
        """`TrainableTokens.swapped` of the only adapter that acts, if it has that."""
        using = [] if self._differs() else self._using()
        return getattr(using[0], "swapped", lambda: None)() if len(using) == 1 else None

    def set_scale(self, adapter: str, scale: float) -> None:
        """Let a LoRA adapter count `scale` times what its configuration says."""
        graft: Any = self.grafts.get(adapter)
        if hasattr(graft, "scale_of"):
            graft.scale = graft.scale_of(graft.config) * scale

    def scale_layer(self, scale: float) -> None:
        """Let the active LoRA adapters count `scale` times as much."""
        grafts: list[Any] = [self.grafts[name] for name in self.active if name in self.grafts]
        for graft in grafts:
            if hasattr(graft, "scale_of"):
                graft.scale *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; None: count as the configurations say."""
        if scale is not None:
            return self.scale_layer(1 / scale)
        for name in self.active:
            self.set_scale(name, 1.0)
        return None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the layout in which the layer stores it."""
        delta = self.grafts[adapter].delta()
        return delta.t() if self.site.transposed else delta

    def add(self, name: str, graft: Graft) -> None:
        """Put the parameters of `graft` in place under `name`."""
        if self.site.kind not in graft.KINDS:
            sites.refuse(graft.config.peft_type, graft.path, self.base_layer, graft.KINDS)
        self.grafts[name] = graft
        for home, made in (graft.create() if graft.owner is None else {}).items():
            if home not in self._modules:
                leafs = nn.ModuleDict() if isinstance(made, nn.Module) else Tensors()
                self.add_module(home, leafs.train(self.training))
            self._modules[home] = hold(getattr(self, home), name, made)

    def remove(self, name: str) -> None:
        for home in list(self.children()):
            if isinstance(home, (nn.ModuleDict, Tensors)) and name in home:
                del home[name]
        if name in self.grafts:
            self.grafts.pop(name).leave()
        self.active = tuple(n for n in self.active if n != name)

    def held(self, name: str) -> Iterator[tuple[str, Tensor]]:
        """The parameters of adapter `name`, each under its name in files."""
        for home, leafs in self.named_children():
            if not isinstance(leafs, (nn.ModuleDict, Tensors)) or name not in leafs:
                continue
            leaf = leafs[name]
            if isinstance(leaf, Bare):
                yield home, leaf.weight
            elif isinstance(leaf, nn.Module):
                for rest, tensor in (*leaf.named_parameters(), *leaf.named_buffers()):
                    yield f"{home}.{rest}", tensor
            else:
                yield home, leaf

    # -- computing -------------------------------------------------------------------------------

    def _using(self) -> list[Graft]:
        """What computes, where all rows go through the same."""
        if self.disabled or self.merged_adapters:
            return []
        names = self.active if self.rows is None else self.rows.through(self.grafts)[0]
        return [self.grafts[name] for name in names if name in self.grafts]

    def _differs(self) -> bool:
        """Whether rows go through different adapters here."""
        if self.rows is None or self.disabled or self.merged_adapters:
            return False
        return len(self.rows.through(self.grafts)) > 1

    def linear_parts(self) -> ops.LinearParts | None:
        """What this layer computes, so that a block can run several as one function."""
        if self.site.kind != "linear" or self._differs():
            return None
        parts = sites.linear_parts(self.base_layer)
        for graft in self._using():
            parts = None if parts is None else graft.joined(parts)
        return parts

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.rows is not None and self._differs():
            return self._by_rows(x, self.rows)
        parts = self.linear_parts()
        if parts is not None:
            return ops.lora_linears(x, (parts,), self.training)[0]
        using = self._using()
        if len(using) == 1 and (y := using[0].whole(x)) is not None:
            return y
        changes = [graft.changes() for graft in using]
        if any(changes):
            weights = self._parameters_with(changes)
            return torch.func.functional_call(self.base_layer, weights, (x, *args), kwargs)
        return self._through(x, using, lambda x: self.base_layer(x, *args, **kwargs))

    def _parameters_with(self, changes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The base's parameters that adapters change."""
        weights: dict[str, Tensor] = {}
        for change in changes:
            for name, delta in change.items():
                weight = weights.get(name, self.base_layer.get_parameter(name))
                weights[name] = weight + delta.to(weight.dtype)
        return weights

    def _through(self, x: Tensor, using: list[Graft], base: Callable[[Tensor], Tensor]) -> Tensor:
        if not using:
            return base(x)
        outermost = self.grafts_in_order(using)[-1]
        side_by_side = [g for g in using if type(g) is type(outermost)]
        inside = [g for g in using if type(g) is not type(outermost)]
        seen = x
        for graft in side_by_side:
            seen, base = graft.before(seen), graft.instead(base)
        y = first = self._through(seen, inside, base)
        for graft in side_by_side:
            y = graft.beside(x, y, first)
        return y

    def grafts_in_order(self, using: list[Graft]) -> list[Graft]:
        """`using` with the methods in the order in which they came to this layer."""
        kinds = list(dict.fromkeys(type(graft) for graft in self.grafts.values()))
        return sorted(using, key=lambda graft: kinds.index(type(graft)))

    def _by_rows(self, x: Tensor, rows: Rows) -> Tensor:
        def of(name: str) -> Callable[[Tensor], Tensor]:
            using = [self.grafts[n] for n in rows.members(name) if n in self.grafts]
            if not all(graft.BY_ROW for graft in using):
                raise ConfigError(f"adapter_names: {using[0].path} has one adapter for all rows")
            return lambda part: self._through(part, using, self.base_layer)

        return rows.apply(x, of)

    # -- merging ---------------------------------------------------------------------------------

    @torch.no_grad()
    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep: bool = True
    ) -> Rounding | None:
        """Put adapters (default: the active ones) into the base's weight; `keep` the original for
        `unmerge`.

        Returns what a quantised weight lost of it.
        """
        names, safe = adapter_names or list(self.active), safe_merge
        chosen = [
            self.grafts[n] for n in names if n in self.grafts and n not in self.merged_adapters
        ]
        if not chosen:
            return None
        names = [graft.name for graft in chosen]
        base, weight = self.base_layer, getattr(self.base_layer, "weight", None)
        # A tied weight is merged into once, by the layer that owns the adapter.
        chosen = [g for g in chosen if g.owner is None or g.owner.base.weight is not weight]
        if not chosen:
            self.merged_adapters += names
            return None
        changes = [graft.changes() for graft in chosen]
        if any(changes):
            self._merge_changes(changes, safe, keep)
            self.merged_adapters += names
            return None
        held: Tensor | None = getattr(base, "bias", None)
        before = sites.read_weight(base)
        weight, bias = before.float(), None if held is None else held.float()
        first, kind = chosen[0].weight, type(self.grafts_in_order(chosen)[0])
        for graft in self.grafts_in_order(chosen):
            first, kind = (first, kind) if type(graft) is kind else (weight, type(graft))
            weight, bias = graft.merged_beside(weight, bias, first)
        finite = weight.isfinite().all() and (bias is None or bias.isfinite().all())
        if safe and not bool(finite):
            raise ConfigError(
                f"merging {names} into {chosen[0].path} gives values that are not finite; "
                "this layer is as it was"
            )
        if keep and self.original is None:
            self.original = (sites.kept_weight(base), None if held is None else held.clone())
        sites.write_weight(base, weight)
        if bias is not None and held is not None:
            held.copy_(bias)
        self.merged_adapters += names
        return Rounding.of(chosen[0].path, base, before, weight)

    def _merge_changes(self, changes: list[dict[str, Tensor]], safe: bool, keep: bool) -> None:
        for name, weight in self._parameters_with(changes).items():
            own = self.base_layer.get_parameter(name)
            if safe and not bool(weight.isfinite().all()):
                raise ConfigError(f"merging into {name} gives values that are not finite")
            if keep:
                self.kept.setdefault(name, own.clone())
            own.copy_(weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the original weight back, exactly."""
        for name, weight in self.kept.items():
            self.base_layer.get_parameter(name).copy_(weight)
        self.merged_adapters, self.kept = [], {}
        if self.original is None:
            return
        (weight, bias), self.original = self.original, None
        sites.put_back(self.base_layer, weight)
        if bias is not None:
            self.base_layer.bias.copy_(bias)  # type: ignore[union-attr, operator]
