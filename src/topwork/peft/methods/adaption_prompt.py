"""LLaMA-Adapter (arXiv:2303.16199): the last layers' queries also look at learned tokens, through a
gate that starts at zero.

    what attention gives + gate · softmax(q kᵀ / √D) v,   k and v of the learned tokens, unturned
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from topwork import ops
from topwork.errors import ConfigError
from topwork.peft import targets
from topwork.peft.config import LayerConfig, at_least
from topwork.peft.graft import Graft
from topwork.peft.prompts import NAMES, sizes_of


@dataclass(frozen=True)
class Place:
    """A family's attention, by the names of its parts.

    `query` gives q first, `key_value` k and v last. What is looked up joins before the linear
    `out`, or `behind` it. `turned`: queries are turned by their places (rotary).
    """

    attention: str
    query: str
    key_value: tuple[str, ...]
    out: str
    behind: bool = False
    turned: bool = True


LLAMA = Place("self_attn", "q_proj", ("k_proj", "v_proj"), "o_proj")
PLACES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "gpt2": Place("attn", "c_attn", ("c_attn",), "c_proj", behind=True, turned=False),
}


def place_of(model: Any) -> Place:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in PLACES:
        raise ConfigError(f"ADAPTION_PROMPT knows {', '.join(PLACES)}, not model_type {kind!r}")
    return PLACES[kind]


@dataclass(kw_only=True)
class AdaptionPromptConfig(LayerConfig):
    """`adapter_len` learned tokens in each of the last `adapter_layers` layers.

    `target_modules` is the name of attention; None: the family's.
    """

    adapter_len: int | None = None
    adapter_layers: int | None = None
    peft_type: str = "ADAPTION_PROMPT"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("adapter_len", "adapter_layers"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None:
                raise ConfigError(f"ADAPTION_PROMPT goes to the last layers: {name} has no meaning")
        if not isinstance(self.target_modules, str | None):
            raise ConfigError("ADAPTION_PROMPT: target_modules is the name of attention, one text")

    @property
    def is_adaption_prompt(self) -> bool:
        return True

    def to_file(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """In files the tensors stand below attention rather than its last linear."""
        found = {}
        for key, tensor in tensors.items():
            path, _, leaf = key.rpartition(".")
            own = leaf in ("adaption_prompt", "adaption_gate")
            found[f"{path.rpartition('.')[0]}.{leaf}" if own else key] = tensor
        return found


class AdaptionPrompt(Graft):
    """On attention's last linear. Its companion on the queries' linear hands them over."""

    BY_ROW = False
    config: AdaptionPromptConfig
    queries: Tensor | None = None
    """[B, T, at least H D], of the call that is going on."""
    turn: tuple[Tensor, Tensor, bool] | None = None
    """cos and sin [B, T, D/2], and whether neighbours turn together."""
    handle: Any = None

    @classmethod
    def settle(cls, config: Any, model: nn.Module) -> Any:
        place = place_of(model)
        for name in ("adapter_len", "adapter_layers"):
            if getattr(config, name) is None:
                raise ConfigError(f"ADAPTION_PROMPT needs {name}")
        return replace(config, target_modules=config.target_modules or place.attention)

    @classmethod
    def paths(cls, config: Any, model: nn.Module) -> list[str]:
        name, wanted = config.target_modules, config.adapter_layers
        found = [path for path, _ in targets.walk(model) if targets.ends(path, name)]
        if len(found) < wanted:
            raise ConfigError(
                f"adapter_layers={wanted}, but {type(model).__name__} has {len(found)} modules "
                f"called {name!r}"
            )
        return [f"{path}.{place_of(model).out}" for path in found[-wanted:]]

    @classmethod
    def companions(cls, config: Any, model: nn.Module, paths: list[str]) -> dict[str, str]:
        query = place_of(model).query
        return {f"{path.rpartition('.')[0]}.{query}": path for path in paths}

    def create(self) -> dict[str, Tensor | nn.Module]:
        prompt = self.empty(1, self.config.adapter_len or 0, self.site.outputs).normal_()
        return {
            "adaption_prompt": nn.Parameter(prompt),
            "adaption_gate": nn.Parameter(self.empty(1).zero_()),
        }

    def enter(self, model: nn.Module) -> None:
        if self.owner is not None:
            return
        self.place = place_of(model)
        sizes = sizes_of(model)
        self.heads = next(sizes[n] for n in NAMES["num_attention_heads"] if sizes.get(n))
        self.attention: Any = model.get_submodule(self.path.rpartition(".")[0])
        if self.place.turned:
            self.handle = self.attention.register_forward_pre_hook(self._see, with_kwargs=True)

    def leave(self) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _see(self, attention: Any, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        """How attention turns the queries of this call."""
        if "position_embeddings" in call:
            cos, sin = (part.chunk(2, -1)[0] for part in call["position_embeddings"])
            self.turn = cos, sin, False
        else:
            rotary = attention.spec.rotary
            self.turn = (*args[1][rotary], rotary.interleaved)

    def before(self, x: Tensor) -> Tensor:
        return x if self.owner is not None or self.place.behind else x + self._looked_up()

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        if isinstance(self.owner, AdaptionPrompt):
            self.owner.queries = y
            return y
        if self.place.behind:
            return y + self._looked_up()
        bias = self.base.bias  # counted twice, as in peft
        return y if bias is None else y + bias.to(y.dtype)

    def _looked_up(self) -> Tensor:
        """[B, T, H D]."""
        queries, turn = self.queries, self.turn
        assert queries is not None
        self.queries = self.turn = None
        width = self.site.inputs
        size = width // self.heads
        q = queries[..., :width].unflatten(-1, (self.heads, size))
        if turn is not None:
            if turn[0].shape[1] != q.shape[1] or turn[0].shape[0] not in (1, len(q)):
                raise ConfigError(f"adapter_names: {self.path} has one adapter for all rows")
            q = ops.rotary(q, *turn)
        prompt = self["adaption_prompt"][0].to(q.dtype)
        linears = [targets.base_of(getattr(self.attention, n)) for n in self.place.key_value]
        made = torch.cat([linear(prompt) for linear in linears], -1)
        # Where one linear gives all three, the queries come first.
        made = made[:, width if self.place.query in self.place.key_value else 0 :]
        k, v = (part.unflatten(-1, (-1, size)) for part in made.chunk(2, -1))  # [n, K, D]
        grouped = q.unflatten(2, (k.shape[1], -1))  # [B, T, K, H/K, D]
        scores = torch.einsum("btkgd,nkd->btkgn", grouped, k) * size**-0.5
        weights = self["adaption_gate"] * scores.float().softmax(-1)
        return torch.einsum("btkgn,nkd->btkgd", weights.to(v.dtype), v).flatten(2)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise ConfigError(
            f"{self.path}: ADAPTION_PROMPT is learned tokens: no weight to merge into"
        )


CONFIG = AdaptionPromptConfig
GRAFT = AdaptionPrompt
