"""`PeftModel`: a model with named adapters, the verbs that people know, and peft's files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from topwork import hub
from topwork.errors import ConfigError, TopworkWarning, nearest
from topwork.peft import (
    entry,
    inject,
    prompts,
    rounding,
    shadowing,
    state,
    status,
    store,
    weighted,
)
from topwork.peft.config import LayerConfig, PeftConfig
from topwork.peft.holder import Holder
from topwork.peft.layer import AdaptedLayer
from topwork.peft.methods import xlora
from topwork.peft.rows import Rows, copies_of
from topwork.peft.tensors import check_name


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Freeze `model` (any module) and graft an adapter on it.

    `mixed` and `low_cpu_mem_usage` need not be said: methods mix always, and adapters are made
    where the base is. `autocast_adapter_dtype=False` keeps the adapter in the base's dtype.
    """
    inject.tell_of_others(model)
    if revision is not None:
        peft_config = replace(peft_config, revision=revision)
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype)


class PeftModel(nn.Module):
    """`model` with adapters. What it does not know itself it asks of the wrapped model."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
    ) -> None:
        super().__init__()
        self.base_model = Holder(model)
        self.base_model.__dict__["owner"] = self  # no submodule of it
        self.peft_config: dict[str, PeftConfig] = {}
        self._active: tuple[str, ...] = ()
        self.entry = entry.Entry(self)
        self.prompt_encoder = nn.ModuleDict()
        model.requires_grad_(False)
        if inject.checkpoints_reentrantly(model):
            inject.let_inputs_have_gradients(model)
        self.add_adapter(adapter_name, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
        self.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "prompt_encoder"):
                raise
            return getattr(self.base_model.home_of(name), name)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's call; its outputs are those of the given tokens.

        `adapter_names`: one adapter for each row of the batch (or each packed document of
        `lengths`), "__base__" for none. `task_ids` [B]: for multitask prompt tuning.
        """
        with self.rows_by_adapter(adapter_names, {**dict(zip(("input_ids",), args)), **kwargs}):
            output = self.entry.call("forward", args, kwargs)
        penalty = self.penalty() if self.training else None
        if penalty is not None and getattr(output, "loss", None) is not None:
            output.loss = output.loss + penalty
        return output

    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's `generate`; `adapter_names` as in `forward`."""
        copies = copies_of(self.get_base_model(), kwargs)
        with self.rows_by_adapter(adapter_names, copies=copies):
            return self.entry.call("generate", args, kwargs)

    def backbone(self, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The wrapped model's `backbone` under the active adapters."""
        return self.entry.backbone(input_ids, **kwargs)

    def new_cache(self, *args: Any, **kwargs: Any) -> Any:
        """A cache of the wrapped model, with room for what the active adapters put there."""
        return self.entry.new_cache(*args, **kwargs)

    def penalty(self) -> Tensor | None:
        """What the active adapters' methods add to the loss (AdaLoRA's orthogonality)."""
        return entry.penalty(self.base_model, self.peft_config, list(self._active))

    @property
    def learns_by_task(self) -> bool:
        """Whether calls must say `task_ids`."""
        return any(self.peft_config[name].tasks is not None for name in self._active)

    @property
    def own_targets(self) -> int:
        """How many labels the active method has itself for each text (CPT: its context's)."""
        prompt = self.entry.prompt
        return 0 if prompt is None else prompt.own_targets

    @contextmanager
    def beside(self) -> Iterator[Callable[[Tensor, Tensor], Tensor | None]]:
        """Within it a call of `backbone` over a flat row is remembered, and what is given tells
        the summed loss that the active method counts beside that of `targets` [N] at `positions`
        [N] (a shadow's answers, CPT's context); None without one."""
        with self.entry.kept() as states:
            yield lambda positions, targets: self.entry.own_loss(states, positions, targets)

    def update_and_allocate(self, global_step: int) -> None:
        """AdaLoRA, AdaMSS: allocate anew, between the backward pass and the end of gradients."""
        for name in self._active:
            grafts = inject.grafts_of(self.base_model, name)
            if grafts and (run := getattr(type(grafts[0]), "update_and_allocate", None)):
                run(self.peft_config[name], grafts, global_step)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    prepare_model_for_gradient_checkpointing = staticmethod(inject.let_inputs_have_gradients)

    # -- adapters --------------------------------------------------------------------------------

    def _layers(self) -> Iterator[AdaptedLayer]:
        return inject.layers_of(self.base_model)

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str:
        """The first active adapter."""
        return self._active[0]

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapter]

    @property
    def peft_type(self) -> str:
        return self.active_peft_config.peft_type

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Create an adapter beside those that are there; it does not become active."""
        check_name(adapter_name, self.peft_config)
        others = [n for n, c in self.peft_config.items() if getattr(c, "bias", "none") != "none"]
        if others and getattr(peft_config, "bias", "none") != "none":
            raise ConfigError(
                f"{others[0]!r} trains biases of the base; two adapters would share them"
            )
        model = self.get_base_model()
        origin = getattr(getattr(model, "config", None), "_name_or_path", None)
        named = peft_config.base_model_name_or_path or origin
        config = replace(peft_config, base_model_name_or_path=named)
        self.entry.added(adapter_name, config.peft_type)
        if isinstance(config, prompts.PromptLearningConfig):
            made, encoder = prompts.made_for(model, adapter_name, config)
            self.peft_config[adapter_name] = made
            self.prompt_encoder[adapter_name] = encoder.train(self.training)
            return
        if isinstance(config, xlora.XLoraConfig):
            made = xlora.attach(self.base_model, model, adapter_name, config)
            self.peft_config[adapter_name] = made
            return
        if not isinstance(config, LayerConfig):
            raise ConfigError(f"{type(config).__name__} names no method")
        self.peft_config[adapter_name] = inject.inject(model, adapter_name, config, self.base_model)
        if not autocast_adapter_dtype:
            inject.cast_to_base(model, adapter_name, self.base_model)
        inject.set_trained(model, (adapter_name,), False, self.base_model)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and (unless `inference_mode`) the trainable ones."""
        wanted = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        if not wanted:
            raise ConfigError("set_adapter needs a name; disable_adapter() computes without any")
        configs = [self._known(name) for name in wanted]
        inject.check_whole(self.base_model, wanted)
        train = not inference_mode
        inject.activate(self.get_base_model(), self._expanded(wanted), train, self.base_model)
        xlora.train(self.base_model, self.peft_config, wanted, train)
        for name, prompt in self.prompt_encoder.items():
            prompt.requires_grad_(name in wanted and not inference_mode)
        for _, parameter in state.bias_parameters(self.base_model, configs[0]):
            parameter.requires_grad_(not inference_mode)
        self._active = wanted

    def _expanded(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """The adapters on layers that stand for `names`."""
        return tuple(e for n in names for e in xlora.experts_of(n, self._known(n)))

    def _known(self, name: str) -> PeftConfig:
        if name not in self.peft_config:
            raise ConfigError(f"there is no adapter {name!r}{nearest(name, self.peft_config)}")
        return self.peft_config[name]

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        """Take adapters out. If no active one stays, the first that is left becomes so."""
        several = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        names = self._expanded(several)
        if any(name in layer.merged_adapters for layer in self._layers() for name in names):
            raise ConfigError(f"{adapter_name!r} is merged; unmerge_adapter() before deleting it")
        for name in names:
            inject.remove(self.get_base_model(), name, self.base_model)
        for name in several:
            xlora.detach(self.base_model, name)
            del self.peft_config[name]
            self.prompt_encoder._modules.pop(name, None)
        left = tuple(n for n in self._active if n not in several)
        self._active = left or tuple(self.peft_config)[:1]
        if self._active:
            self.set_adapter(list(self._active))

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        """Let adapters be trained, or not; which ones are active stays."""
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        for name in names:
            self._known(name)
            if name in self.prompt_encoder:
                self.prompt_encoder[name].requires_grad_(requires_grad)
        layers = self._expanded(names)
        inject.set_trained(self.get_base_model(), layers, requires_grad, self.base_model)
        for name in names:
            if isinstance(self.peft_config[name], xlora.XLoraConfig):
                xlora.train(self.base_model, self.peft_config, (name,), requires_grad)

    def disable_adapter_layers(self) -> None:
        """Compute as without adapters from now on."""
        self.entry.off = True
        for part in (*self._layers(), *inject.saved_of(self.base_model)):
            part.enable_adapters(False)

    def enable_adapter_layers(self) -> None:
        """Compute with the active adapters again."""
        self.entry.off = False
        for part in (*self._layers(), *inject.saved_of(self.base_model)):
            part.enable_adapters(True)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within it the model computes as without adapters; merged ones are out of the weights."""
        biased = [n for n in self._active if getattr(self.peft_config[n], "bias", "none") != "none"]
        if biased:
            warnings.warn(
                f"disable_adapter: the biases that {', '.join(biased)} trains are the base's own, "
                "so they stay as trained",
                TopworkWarning,
                stacklevel=3,
            )
        before, self.entry.off = self.entry.off, True
        try:
            with inject.disabled(self.get_base_model()):
                yield
        finally:
            self.entry.off = before

    @contextmanager
    def use_adapter(self, adapter_name: str) -> Iterator[None]:
        """Within it the model computes with that adapter alone; which one is trained stays."""
        self._known(adapter_name)
        before, self._active = self._active, (adapter_name,)
        try:
            with inject.using(self.get_base_model(), self._expanded(self._active)):
                yield
        finally:
            self._active = before

    @contextmanager
    def rows_by_adapter(
        self, names: list[str] | None, call: dict[str, Any] | None = None, copies: int = 1
    ) -> Iterator[None]:
        """Within it each row of a batch goes through its own adapter ("__base__": none)."""
        if names is None:
            yield
            return
        for name in names:
            if name != "__base__" and self._known(name).is_prompt_learning:
                raise ConfigError(f"adapter_names: {name!r} is virtual tokens, not of one row")
        if self.training:
            raise ConfigError("adapter_names is for inference; call eval() first")
        members = {name: self._expanded((name,)) for name in set(names) & self.peft_config.keys()}
        rows = Rows(names, call or {}, members, copies)
        parts = [*self._layers(), *inject.saved_of(self.base_model)]
        for part in parts:
            part.rows = rows
        self.entry.by_row = True
        try:
            yield
        finally:
            self.entry.by_row = False
            for part in parts:
                part.rows = None

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """Make one LoRA (or IA3) adapter out of several: "linear", "cat", "svd", "ties",
        "dare_linear", "dare_ties", "magnitude_prune", and the last four with "_svd".

        `density`: the share of entries that those four keep. `svd_clamp`: the quantile at which
        the new matrices are cut off. `svd_full_matrices` and `svd_driver` change nothing.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ConfigError(f"{len(adapters)} adapters and {len(weights)} weights were given")
        configs = [self._known(name) for name in adapters]
        kind = "linear" if len(adapters) == 1 else combination_type
        config = weighted.combined_config(configs, kind, svd_rank)
        self.add_adapter(adapter_name, config)
        sources = list(zip(adapters, weights))
        how = (kind, density, majority_sign_method, svd_clamp)
        for layer in self._layers():
            weighted.fill(layer.grafts, adapter_name, sources, how)

    def get_layer_status(self) -> list[status.LayerStatus]:
        return status.get_layer_status(self)

    def get_model_status(self) -> status.ModelStatus:
        return status.get_model_status(self)

    # -- merging ---------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Put adapters (default: the active ones) into the base weights; `unmerge_adapter` puts
        the weights back exactly, for which a copy of each is kept."""
        self._merge(adapter_names, safe_merge, keep=True)

    def _merge(self, names: list[str] | None, safe: bool, keep: bool) -> None:
        for name in names or self._active:
            if self._known(name).is_prompt_learning:
                raise ConfigError(f"{name!r} is virtual tokens: there is no weight to merge into")
        inject.own_weights(self.get_base_model())
        chosen = None if names is None else list(self._expanded(tuple(names)))
        wanted = [(la, la.active if chosen is None else chosen) for la in self._layers()]
        new = any(n in la.grafts and n not in la.merged_adapters for la, ns in wanted for n in ns)
        if keep and not new:
            warnings.warn("all these adapters are merged already", TopworkWarning, stacklevel=3)
        lost = [layer.merge(safe, list(names), keep) for layer, names in wanted]
        rounding.report(lost)

    def unmerge_adapter(self) -> None:
        for layer in self._layers():
            layer.unmerge()

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with adapters (default: the active ones) in its weights and nothing of
        Topwork's left. `safe_merge` refuses a merge that gives values that are not finite."""
        self._merge(adapter_names, safe_merge, keep=False)
        return inject.strip(self.get_base_model())

    def unload(self) -> nn.Module:
        """The base model as it was."""
        self.unmerge_adapter()
        for module in inject.saved_of(self.base_model):
            module.active = ()
        return inject.strip(self.get_base_model())

    def unload_shadow(self, adapter_name: str | None = None) -> nn.Module:
        """The shadow of an adapter (default: the active one) as a model of its own, a copy."""
        return shadowing.unloaded(self, adapter_name or self.active_adapter)

    # -- counting --------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) numbers of parameters."""
        return status.counted(self)

    def print_trainable_parameters(self) -> None:
        print(status.share(self))

    # -- files -----------------------------------------------------------------------------------

    def adapter_state(self, name: str = "default") -> dict[str, Tensor]:
        """The adapter's tensors under the names of `adapter_model.safetensors`."""
        self._known(name)
        return store.tensors_of(self, name)

    def save_pretrained(
        self,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | str = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | Path | None = None,
    ) -> None:
        """Write each adapter as peft does: "default" into the folder, others below it by name.

        `save_embedding_layers`: write the base's embeddings too; "auto": where the base has
        another number of words than the one of its name.
        `path_initial_model_for_weight_conversion`: the adapter as it was before training, where
        its start changed the base (PiSSA …); what is written then goes with the base as it was.
        """
        if not safe_serialization:
            raise ConfigError("safe_serialization=False is refused: pickles run code when read")
        initial = path_initial_model_for_weight_conversion
        for name in (selected_adapters or list(self.peft_config)) if is_main_process else ():
            self._known(name)
            store.save(self, name, Path(save_directory), save_embedding_layers, initial)

    def push_to_hub(self, repo_id: str, **where: Any) -> str:
        """Put the adapters' files into a repository of the Hub; `where` as in `hub.upload`."""
        return hub.upload(self.save_pretrained, repo_id, **where)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        key_mapping: dict[str, str] | None = None,
        **where: Any,
    ) -> Self:
        """`model` with the adapter of a folder or Hub id that Topwork, peft or `adapters` wrote.

        `key_mapping`: patterns of names in the file and what stands for them in `model`.
        """
        folder = store.folder_of(model_id, where)
        read = config or PeftConfig.from_pretrained(folder)
        config = replace(state.retargeted(read, model, folder), inference_mode=not is_trainable)
        state.make_room(model, config, folder)
        peft_model = cls(model, config, adapter_name, autocast_adapter_dtype)
        store.fill(peft_model, adapter_name, folder, where.get("allow_bin", False), key_mapping)
        return peft_model.eval()

    def load_adapter(
        self,
        model_id: str | Path,
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        key_mapping: dict[str, str] | None = None,
        **where: Any,
    ) -> store.LoadResult:
        """Add the adapter of a folder or Hub id under `adapter_name`; it does not become active.

        Every tensor has its place and every place its tensor, else CheckpointError: so the result,
        which peft gives, names none.
        """
        folder = store.folder_of(model_id, where)
        config = PeftConfig.from_pretrained(folder)
        config = state.retargeted(config, self.get_base_model(), folder)
        config = replace(config, inference_mode=not is_trainable)
        state.make_room(self.get_base_model(), config, folder)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype)
        store.fill(self, adapter_name, folder, where.get("allow_bin", False), key_mapping)
        self.set_requires_grad(adapter_name, is_trainable)
        return store.LoadResult([], [])
