"""How a call enters the model under its adapters: with virtual tokens, with what adapters must know
of the tokens (aLoRA's invocation, X-LoRA's scalings, a shadow, Poly's tasks), or as it is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError
from topwork.peft import calls, inject, methods, prompts, scalings, shadowing, state
from topwork.peft.graft import Graft
from topwork.peft.invocation import Invocations, invocations


class Entry:
    """The calls of one `PeftModel`."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.off = False
        """Adapters are disabled."""
        self.by_row = False
        """Rows go through adapters of their own."""
        self._invoked: Invocations | None = None
        self._task_ids: Tensor | None = None
        self._aside: list[Tensor] | None = None
        self._told: dict[str, type[Graft]] = {}
        self._made: Any = None

    def added(self, name: str, peft_type: str) -> None:
        """There is an adapter `name`: see whether calls tell its method something."""
        if callable(getattr(self.model, "backbone", None)):
            self._made = None
            self._view()  # which a graph cannot make
        kind = getattr(methods.method(peft_type), "GRAFT", Graft)
        self._told.pop(name, None)
        if kind.during.__func__ is not Graft.during.__func__:
            self._told[name] = kind

    @property
    def model(self) -> Any:
        return self.owner.get_base_model()

    @property
    def prompt(self) -> prompts.Prompt | None:
        """The virtual tokens of the active adapter."""
        encoders = self.owner.prompt_encoder
        found = [n for n in self.owner.active_adapters if n in encoders and not self.off]
        return encoders[found[0]] if found else None

    @property
    def router(self) -> scalings.Router | shadowing.Runner | None:
        """What reads the tokens before the layers do: X-LoRA's classifier, a shadow."""
        owner = self.owner
        found = getattr(owner.base_model, state.ROUTER, None)
        if self.off or (found is not None and found.owner in owner.active_adapters):
            return None if self.off else found
        return shadowing.runner_of(owner.base_model, owner.active_adapters, owner.peft_config)

    @property
    def invocations(self) -> Invocations | None:
        """aLoRA's, where one may act."""
        configs = self.owner.peft_config
        names = configs if self.by_row else self.owner.active_adapters
        return invocations({name: configs[name] for name in names})

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The wrapped model's method `name`."""
        if name == "forward" and kwargs.get("labels") is not None:
            router = self.router
            if isinstance(router, shadowing.Runner):
                return self._shadowed(router, args, kwargs)
        return self._run(name, args, kwargs)

    def _run(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ours = callable(getattr(self.model, "backbone", None))
        run = self._ours if ours else self._theirs
        with self._telling(kwargs):
            return run(name, args, kwargs)

    @contextmanager
    def _telling(self, call: dict[str, Any]) -> Iterator[None]:
        """Within it the layers know what the arguments of a `call` say to their methods."""
        with self.telling(self.owner.active_adapters, call):
            yield

    @contextmanager
    def telling(self, names: Iterable[str], call: dict[str, Any]) -> Iterator[None]:
        """The same for the adapters `names`."""
        with ExitStack() as stack:
            for name in names:
                if name in self._told:
                    stack.enter_context(self._told[name].during(self.owner.peft_config[name], call))
            yield

    def _ours(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model, waiting = self.model, self.invocations
        if self.prompt is None and waiting is None and self.router is None:
            return (model if name == "forward" else getattr(model, name))(*args, **kwargs)
        if waiting is not None and name == "generate":
            waiting.prompts = waiting.starts(args[0] if args else kwargs["input_ids"])
            self._invoked = waiting
        self._task_ids = kwargs.pop("task_ids", None)
        view = self._view()
        try:
            if name == "forward" and self.prompt is not None and self.prompt.weighs:
                return self._weighed(view, self.prompt, args, kwargs)
            return getattr(view, name)(*args, **kwargs)
        finally:
            self._invoked = None

    def _view(self) -> Any:
        """The model's modules, whose own methods find this object's `backbone` and `new_cache`."""
        if self._made is None or not torch.compiler.is_compiling():
            self._made = copy.copy(self.model)
            # Not by setattr: a module may stand under that name (Mamba's trunk).
            vars(self._made).update(backbone=self.backbone, new_cache=self.new_cache)
        return self._made

    def _weighed(
        self, view: Any, prompt: prompts.Prompt, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call with the loss of the virtual tokens' method."""
        kinds, labels = kwargs.pop("input_type_mask", None), kwargs.pop("labels", None)
        if len(args) > 2:
            raise ConfigError(
                f"{prompt.config.peft_type}: give what follows attention_mask by name"
            )
        if labels is None:
            return view.forward(*args, **kwargs)
        with self.kept() as states:
            output = view.forward(*args, **kwargs)
        if not states:
            raise ConfigError("labels do not go with a cache that holds the virtual tokens")
        context = view.head(states[0])
        output.loss = prompt.loss(context, output.logits, labels, kinds, kwargs.get("lengths"))
        return output

    def _shadowed(
        self, shadow: shadowing.Runner, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A call whose loss has the shadow's own in it."""
        with self.kept() as states:
            output = self._run("forward", args, kwargs)
        own = shadow.loss(self.model, states[0], kwargs)
        if own is not None and getattr(output, "loss", None) is not None:
            output.loss = output.loss + shadow.config.auxiliary_loss_weight * own
            output.shadow_loss = own.detach()
        return output

    @contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """Within it the states of which the active method has a loss of its own are kept: those of
        virtual tokens [documents, n, C], of a shadow [B, T, C]."""
        self._aside = []
        try:
            yield self._aside
        finally:
            self._aside = None

    def own_loss(self, states: list[Tensor], positions: Tensor, targets: Tensor) -> Tensor | None:
        """The summed loss that is of kept `states`, beside that of `targets` at `positions`."""
        router, prompt = self.router, self.prompt
        if prompt is not None and prompt.weighs:
            return prompt.total(self.model, states[0])
        if not isinstance(router, shadowing.Runner):
            return None
        return router.total(self.model, states[0], positions, targets)

    def _theirs(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model, prompt, waiting, router = self.model, self.prompt, self.invocations, self.router
        if prompt is None:
            around: AbstractContextManager[Any] = nullcontext()
            if waiting is not None:
                around = waiting.hooked(model)
            elif router is not None:
                around = router.hooked(model, **self._keep(router))
                if name == "generate" and not (router.weighs and _one_by_one(model, kwargs)):
                    kwargs |= {"use_cache": False}
            with around:
                return (model if name == "forward" else getattr(model, name))(*args, **kwargs)
        call = {**dict(zip(("input_ids", "attention_mask"), args)), **kwargs}
        return (calls.forward if name == "forward" else calls.generate)(model, prompt, call)

    def backbone(self, input_ids: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The wrapped model's `backbone`; `task_ids` [B] for methods that ask for them."""
        model, prompt, router = self.model, self.prompt, self.router
        if prompt is not None:
            kwargs.setdefault("task_ids", self._task_ids)
            return prompts.through_backbone(model, prompt, input_ids, aside=self._aside, **kwargs)
        if router is not None:
            return router.through(model, input_ids, **kwargs, **self._keep(router))
        waiting = self._invoked or self.invocations
        mask, cache = kwargs.get("attention_mask"), kwargs.get("cache")
        past = 0 if cache is None else cache.length
        with self._telling(kwargs), ExitStack() as stack:
            if waiting is not None:
                told = waiting.within(input_ids, mask, kwargs.get("lengths"), cache, past)
                stack.enter_context(told)
            return model.backbone(input_ids, **kwargs)

    def _keep(self, router: Any) -> dict[str, Any]:
        return {"aside": self._aside} if router.weighs else {}

    def new_cache(self, *args: Any, **kwargs: Any) -> Any:
        """A cache of the wrapped model, with room for virtual tokens or for X-LoRA's first pass."""
        cache = self.model.new_cache(*args, **kwargs)
        if self.prompt is not None:
            return prompts.PromptCache(cache, self.prompt.config.num_virtual_tokens)
        if self.router is not None:
            return self.router.new_cache(self.model, cache, *args, **kwargs)
        return cache


def _one_by_one(model: Any, call: dict[str, Any]) -> bool:
    """Whether `generate` of transformers goes on with one text a row, and never back."""
    given = call.get("generation_config") or model.generation_config
    beams = call.get("num_beams") or getattr(given, "num_beams", None) or 1
    return beams == 1 and call.get("assistant_model") is None


def penalty(home: nn.Module, configs: dict[str, Any], names: list[str]) -> Tensor | None:
    """What the methods of the adapters `names` add to the loss."""
    total: Tensor | None = None
    for name in names:
        grafts = inject.grafts_of(home, name)
        found = type(grafts[0]).penalty(configs[name], grafts) if grafts else None
        if found is not None:
            total = found if total is None else total + found
    return total
