"""Shadow: a small trained network runs beside the frozen decoder, and at each block what it sees
otherwise is put into the block's input."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import shadowing
from topwork.peft.config import LayerConfig, a_share, at_least
from topwork.peft.graft import Graft
from topwork.peft.sites import Kind
from topwork.peft.targets import ends, walk
from topwork.peft.tensors import Matrix


@dataclass(kw_only=True)
class ShadowConfig(LayerConfig):
    """h ← h + α W_up W_down (h - s) before a block, s ← (1 - g) s + g T(h), g = σ(G(h)), after it;
    the first s is the shadow's own last hidden state.

    `target_modules` are whole blocks, one after the other; None: all.
    """

    r: int = 8
    """The rank of W_up W_down."""
    shadow_alpha: float = 0.1
    shadow_dropout: float = 0.2
    """On h - s."""
    init_weights: bool = True
    """W_up starts at zero; False: at random."""
    shadow_model: str = "mirror"
    """The shadow: the base's family anew ("mirror"), or a folder or Hub id."""
    shadow_num_hidden_layers: int | None = None
    """Of a mirror; None: 1. The sizes below: None: the base's."""
    shadow_hidden_size: int | None = None
    shadow_num_attention_heads: int | None = None
    shadow_intermediate_size: int | None = None
    share_embeddings: bool = True
    """A mirror of the base's width reads the base's embeddings."""
    update_hidden_size: int | None = None
    """The width within T and G; None: `r`."""
    auxiliary_loss_weight: float = 0.05
    """How much the shadow's own loss counts where there are labels."""
    peft_type: str = "SHADOW"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("r", self.r, 1)
        a_share("shadow_dropout", self.shadow_dropout)
        at_least("auxiliary_loss_weight", self.auxiliary_loss_weight, 0)
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ConfigError("layers_to_transform has no meaning where target_modules is a regex")
        given = [name for name in shadowing.SIZES if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and given:
            raise ConfigError(f"shadow_model={self.shadow_model!r} has sizes already: {given}")

    @property
    def beyond_rows(self) -> str | None:
        return "has a shadow that reads the text too"


class Shadow(Graft):
    KINDS: ClassVar[tuple[Kind, ...]] = ("other",)
    config: ShadowConfig

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        if config.target_modules is not None:
            return config
        path, stack = shadowing.stack_of(model)
        return replace(config, target_modules=[f"{path}.{i}" for i in range(len(stack))])

    @classmethod
    def paths(cls, config: Any, model: nn.Module) -> list[str]:
        """The blocks; as in peft, one that is named whole needs no number to be among
        `layers_to_transform`."""
        stacks = {n: m for n, m in walk(model) if isinstance(m, nn.ModuleList)}
        blocks = [f"{name}.{i}" for name, stack in stacks.items() for i in range(len(stack))]
        wanted, numbers = config.target_modules, config.layers_to_transform
        numbers = [numbers] if isinstance(numbers, int) else numbers
        found = [path for path in blocks if _among(path, wanted)]
        if config.exclude_modules:
            found = [path for path in found if not _among(path, config.exclude_modules)]
        if numbers is not None:
            found = [p for p in found if p in wanted or int(p.rpartition(".")[2]) in numbers]
        if not found:
            raise ConfigError(f"target_modules={wanted!r} finds no block among {', '.join(blocks)}")
        places = [path.rpartition(".") for path in found]
        first = int(places[0][2])
        if [(p, int(n)) for p, _, n in places] != [
            (places[0][0], first + i) for i in range(len(places))
        ]:
            raise ConfigError(f"SHADOW goes through blocks one after the other, not {found}")
        return found

    @classmethod
    def share_from(cls, config: Any, layers: list[Any], model: nn.Module) -> dict[str, Any]:
        return shadowing.made(config, model)

    def create(self) -> dict[str, Tensor | nn.Module]:
        config, width = self.config, shadowing.width_of(self.shared.home)
        down, up = (
            nn.Linear(*sizes, bias=False) for sizes in ((width, config.r), (config.r, width))
        )
        if config.init_weights:
            nn.init.zeros_(up.weight)
        inner = config.update_hidden_size or config.r
        updates = [
            nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)).to(
                self.layer.device
            )
            for _ in range(2)
        ]
        return {
            "shadow_down": Matrix(down.weight.detach().to(self.layer.device)),
            "shadow_up": Matrix(up.weight.detach().to(self.layer.device)),
            "shadow_update_transform": updates[0],
            "shadow_update_gate": updates[1],
        }

    def saved(self) -> list[tuple[str, Tensor]]:
        """In files a name stands between, "default" whatever the adapter's."""
        held = (name.partition(".") for name, _ in self.layer.held(self.name))
        names = [f"{home}.default.{rest}" for home, _, rest in held]
        return list(zip(names, (tensor for _, tensor in self.layer.held(self.name))))

    # Between its blocks the decoder carries [hidden, shadow] as one tensor [B, T, 2C].

    @property
    def _is_first(self) -> bool:
        return self.path == self.shared.layers[0][0]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the block was given, and the shadow beside it."""
        if self._is_first:
            return x, shadowing.first_state(x)
        hidden, shadow = x.chunk(2, -1)
        return hidden, shadow

    def before(self, x: Tensor) -> Tensor:
        if self.layer.rows is not None:
            raise ConfigError("adapter_names: a shadow is of all rows")
        hidden, shadow = self._parts(x)
        apart = F.dropout(hidden - shadow, self.config.shadow_dropout, self.layer.training)
        down, up = (self[name] for name in ("shadow_down", "shadow_up"))
        added = F.linear(F.linear(apart.to(down.dtype), down), up)
        return hidden + (self.config.shadow_alpha * added).to(hidden.dtype)

    def after(self, x: Tensor, y: Any) -> Any:
        out = y if isinstance(y, Tensor) else y[0]
        if self.path == self.shared.layers[-1][0]:
            return y
        shadow = self._parts(x)[1]
        transform, gate = (
            getattr(self.layer, f"shadow_update_{part}")[self.name]
            for part in ("transform", "gate")
        )
        seen = out.to(transform[0].weight.dtype)
        share = gate(seen).sigmoid()
        moved = torch.lerp(shadow.to(share.dtype), transform(seen), share)
        carried = torch.cat([out, moved.to(out.dtype)], -1)
        return carried if isinstance(y, Tensor) else (carried, *y[1:])


def _among(path: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, path) is not None
    return any(ends(path, entry) for entry in wanted)


CONFIG = ShadowConfig
GRAFT = Shadow
