"""EVA (arXiv:2410.07170): A from the principal directions of a layer's inputs, ranks by how much
of their variance those explain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import inject
from topwork.peft.methods._lora_data import hooks, leading, linears
from topwork.peft.methods._lora_options import EvaConfig
from topwork.peft.methods.lora import LoraConfig
from topwork.peft.targets import by_pattern

PREFIX = "base_model.model."


class Directions:
    """Principal directions [n, in] of rows that come in batches: incremental PCA (Ross 2008)."""

    def __init__(self, count: int, tau: float) -> None:
        self.count = count
        self.tau = tau
        self.seen = 0
        self.total = 0.0
        """Σ (x - mean)² so far."""
        self.converged = torch.zeros(count, dtype=torch.bool)

    def add(self, x: Tensor) -> None:
        """Take rows x [T, in] in, if they are not fewer than the directions."""
        new, x = len(x), x.float()
        if new < self.count:
            return
        mean = x.mean(0)
        rows = x - mean
        self.total += rows.square().sum().item()
        if not self.seen:
            self.mean = mean
            _, self.values, self.vectors = self._leading(rows)
        else:
            shift = (self.seen * new / (self.seen + new)) ** 0.5 * (self.mean - mean)
            self.total += shift.square().sum().item()
            before = self.vectors
            rows = torch.cat((self.values[:, None] * before, rows, shift[None]))
            _, self.values, self.vectors = self._leading(rows)
            self.converged = F.cosine_similarity(self.vectors, before).cpu() >= self.tau
            self.mean = (self.seen * self.mean + new * mean) / (self.seen + new)
        self.seen += new

    def _leading(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(42)
            u, s, vh = leading(rows, self.count)
        largest = vh.abs().argmax(1)
        signs = vh[torch.arange(len(vh)), largest].sign()
        return u * signs, s, vh * signs[:, None]

    @property
    def explained(self) -> Tensor:
        """The share [n] of the variance along each direction."""
        return self.values.square() / max(self.total, 1e-30)


class _Search:
    """The passes over the data: which layers share an input, directions, ranks."""

    def __init__(self, modules: dict[str, nn.Module], config: LoraConfig) -> None:
        self.modules = modules
        self.options = config.eva_config or EvaConfig()
        ranks = {path: by_pattern(config.rank_pattern, path, config.r) for path in modules}
        self.budget = sum(ranks.values())
        self.most = {path: round(r * self.options.rho) for path, r in ranks.items()}
        for path, module in modules.items():
            sides = module.in_features if hasattr(module, "in_features") else module.nx  # type: ignore[union-attr]
            self.most[path] = min(self.most[path], int(sides))  # type: ignore[arg-type]
        self.ranks = dict(self.most)

    def share(self, run: Callable[[], Any]) -> None:
        """See which layers are given the very same input, and search each input once."""
        self.owner: dict[str, str] = {}
        last: list[Any] = [None, None]

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                if path in self.owner:
                    return
                if args[0] is not last[0]:
                    last[:] = args[0], path
                self.owner[path] = last[1]

            return self.modules[path].register_forward_pre_hook(hook)

        with hooks([watch(path) for path in self.modules]):
            run()
        unseen = [path for path in self.modules if path not in self.owner]
        if unseen:
            raise ConfigError(f"EVA: the model did not call {', '.join(unseen[:20])}")
        for owner in set(self.owner.values()):
            group = [path for path, o in self.owner.items() if o == owner]
            self.most |= dict.fromkeys(group, max(self.most[path] for path in group))
        self.found = {
            path: Directions(self.most[path], self.options.tau)
            for path in self.modules
            if self.owner[path] == path
        }
        self.ranks = dict(self.most)

    @property
    def waiting(self) -> list[str]:
        """The inputs whose needed directions still turn."""
        return [p for p, d in self.found.items() if not bool(d.converged[: self.ranks[p]].all())]

    def look(self, run: Callable[[], Any], rows: Callable[[Tensor], Tensor]) -> None:
        """One batch: better directions, and ranks by them."""

        def watch(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                self.found[path].add(rows(args[0]))

            return self.modules[path].register_forward_pre_hook(hook)

        with hooks([watch(path) for path in self.waiting]):
            run()
        if all(found.seen for found in self.found.values()):
            self.ranks = self._distributed()

    def _distributed(self) -> dict[str, int]:
        """The budget of ranks, given to the directions that explain most."""
        pairs = [
            (path, share)
            for path in sorted(self.modules, key=lambda p: self.owner[p] != p)
            for share in self.found[self.owner[path]].explained[: self.most[path]]
        ]
        best = torch.stack([share for _, share in pairs]).argsort(descending=True)
        ranks = dict.fromkeys(self.modules, 0)
        for at in best[: self.budget].tolist():
            ranks[pairs[at][0]] += 1
        for path, owner in self.owner.items():  # the owner's directions must serve them all
            if ranks[owner] < ranks[path]:
                ranks[owner], ranks[path] = ranks[path], ranks[owner]
        return ranks


def _rows_of(batch: Mapping[str, Any], options: EvaConfig) -> Callable[[Tensor], Tensor]:
    """Chooses of a layer's input the rows that count: real tokens, with a label if wanted."""
    ids = batch.get("input_ids")
    if ids is None:
        return lambda x: x.flatten(0, -2)
    keep = batch.get("attention_mask", torch.ones_like(ids)).bool()
    wanted = keep
    if options.use_label_mask and batch.get("labels") is not None:
        wanted = keep & (batch["labels"] != options.label_mask_value)

    def rows(x: Tensor) -> Tensor:
        if x.shape[:2] == wanted.shape:
            return x[wanted]
        flat = x.flatten(0, -2)
        return flat[wanted[keep]] if len(flat) == int(keep.sum()) else flat

    return rows


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable[Mapping[str, Any]],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[Any, Any], Any] = lambda model, batch: model(**batch),
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """Path → A [rank, in] for the linears of a `PeftModel` (or those that `peft_config` targets).

    `dataloader` gives batches of arguments and is gone over until the directions stand still.
    `show_progress_bar` has no effect.
    """
    batches = list(dataloader)
    if not batches:
        raise ConfigError("EVA: the dataloader is empty")
    adapted = hasattr(model, "peft_config")
    if peft_config is None and not adapted:
        raise ConfigError("EVA: a model without adapters needs peft_config")
    config = model.peft_config[adapter_name] if peft_config is None else peft_config
    modules = (
        {g.path: g.base for g in inject.grafts_of(model, adapter_name) if g.site.kind == "linear"}
        if adapted
        else linears(model, config)
    )
    search, training = _Search(modules, config), model.training
    model.eval()
    try:
        with model.disable_adapter() if adapted else nullcontext():
            search.share(lambda: forward_fn(model, batches[0]))
            while search.waiting:
                for batch in batches:
                    if search.waiting:
                        rows = _rows_of(batch, search.options)
                        search.look(lambda b=batch: forward_fn(model, b), rows)
                few = [path for path, found in search.found.items() if not found.seen]
                if few:
                    raise ConfigError(
                        f"EVA: no batch has the {search.most[few[0]]} tokens that {few[0]} needs; "
                        "give larger batches, or a smaller r or rho"
                    )
    finally:
        model.train(training)
    return {path: _matrix(search, path) for path in modules}


def _matrix(search: _Search, path: str) -> Tensor:
    found, rank = search.found[search.owner[path]], search.ranks[path]
    vectors = found.vectors[:rank]
    return vectors / found.values[:rank, None].sqrt() if search.options.whiten else vectors.clone()


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable[Mapping[str, Any]] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[Any, Any], Any] = lambda model, batch: model(**batch),
    adapter_name: str = "default",
    show_progress_bar: bool = True,
) -> None:
    """Start the adapter by EVA: the ranks, and the A that `get_eva_state_dict` finds (or gave).

    Layers of rank 0 lose their adapter; layers that EVA does not go to start as usual.
    """
    config = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError("initialize_lora_eva_weights needs init_lora_weights='eva'")
    if list(model.active_adapters) != [adapter_name]:
        raise ConfigError(f"EVA: {adapter_name!r} must be the only active adapter")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError("initialize_lora_eva_weights needs a dataloader or eva_state_dict")
        eva_state_dict = get_eva_state_dict(
            model, dataloader, forward_fn=forward_fn, adapter_name=adapter_name
        )
    found = {path.removeprefix(PREFIX): a for path, a in eva_state_dict.items()}
    changed = _with_ranks(config, [g.path for g in inject.grafts_of(model, adapter_name)], found)
    bare = model.get_base_model()
    inject.remove(bare, adapter_name, model.base_model)
    model.peft_config[adapter_name] = inject.inject(bare, adapter_name, changed, model.base_model)
    model.set_adapter(adapter_name)
    for graft in inject.grafts_of(model, adapter_name):
        if graft.path in found:
            graft.parameter("lora_A").copy_(found[graft.path])


def _with_ranks(config: LoraConfig, paths: list[str], found: Mapping[str, Tensor]) -> LoraConfig:
    options = config.eva_config or EvaConfig()
    ranks, alphas = dict(config.rank_pattern), dict(config.alpha_pattern)
    for path in paths:
        r = by_pattern(config.rank_pattern, path, config.r)
        alpha = by_pattern(config.alpha_pattern, path, config.lora_alpha)
        new = len(found[path]) if path in found else r
        if new and options.adjust_scaling_factors:
            alphas = {f"^{path}": alpha * new / r} | alphas if new != r else alphas
        ranks = {f"^{path}": new} | ranks if new and new != r else ranks
    kept = [path for path in paths if path not in found or len(found[path])]
    return replace(config, rank_pattern=ranks, alpha_pattern=alphas, target_modules=kept)
