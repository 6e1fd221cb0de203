"""The model that is served: its engine, its adapters by name, and the limits of a request."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from topwork.errors import ConfigError, TopworkError, nearest
from topwork.generation import Engine
from topwork.generation.constraints import Constraint
from topwork.generation.engine import room_of
from topwork.peft import PeftModel
from topwork.serve.answers import Answer
from topwork.serve.asked import Asked, RequestError
from topwork.text import Tokenizer

CHUNK = 256
"""Tokens of a prompt whose logits are held at a time."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What requests may take."""

    max_rows: int = 32
    """Answers that are made at a time; more wait."""
    max_waiting: int = 256
    """Requests that may be open; more are told to come back later (429)."""
    max_new_tokens: int = 4096
    """Of one answer, whatever it asks for."""
    max_seconds: float = 600.0
    """After which an answer ends as it stands."""
    max_body: int = 4 << 20
    """Bytes of a request."""
    cache_tokens: int = 32768
    """Tokens of all answers and their prompts that are kept at a time."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name}={value} must be positive")


@dataclass
class Served:
    """`model` under `name`, and its adapters under theirs."""

    model: Any
    tokenizer: Tokenizer
    name: str
    limits: Limits = field(default_factory=Limits)
    processed_logprobs: bool = False
    loads_adapters: bool = False
    """Whether clients may have adapters loaded from folders of this machine."""
    open: int = 0
    started: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        if not callable(getattr(self.model, "new_cache", None)):
            raise ConfigError(
                f"{type(self.model).__name__} makes no text token by token: serve a causal model"
            )
        self.engine = Engine(
            self.model, max_rows=self.limits.max_rows, cache_tokens=self.limits.cache_tokens
        )
        if self.name in self.adapters:
            raise ConfigError(f"an adapter has the model's name, {self.name!r}; call it otherwise")

    # -- names -----------------------------------------------------------------------------------

    @property
    def adapters(self) -> list[str]:
        return list(getattr(self.engine.model, "peft_config", {}))

    def adapter_of(self, name: str | None) -> str | None:
        """The adapter that a request's `model` means; None: the model itself."""
        if name is None or name == self.name:
            return None
        if name not in self.adapters:
            known = [self.name, *self.adapters]
            raise RequestError(
                f"there is no model {name!r}{nearest(name, known)}; there are {', '.join(known)}",
                "model", 404, "model_not_found",
            )  # fmt: skip
        return name

    async def load(self, name: str, path: str) -> None:
        """Load an adapter from a folder, between two steps of the engine."""
        self._may_load()
        if not name or name in (self.name, *self.adapters):
            raise RequestError(f"lora_name={name!r}: that name is taken, or empty", "lora_name")
        if not Path(path).is_dir():
            raise RequestError(
                f"lora_path={path!r} is no folder of the server's machine", "lora_path"
            )

        def run() -> None:
            model = self.engine.model
            if isinstance(model, PeftModel):
                model.load_adapter(path, adapter_name=name)
            else:
                self.engine.swap(PeftModel.from_pretrained(model, path, adapter_name=name).eval())

        try:
            await self.engine.apart(run)
        except TopworkError as error:
            raise RequestError(f"lora_path={path!r}: {error}", "lora_path") from error

    async def unload(self, name: str) -> None:
        """Forget an adapter that was loaded."""
        self._may_load()
        if name not in self.adapters:
            raise RequestError(
                f"there is no adapter {name!r}{nearest(name, self.adapters)}", "lora_name", 404
            )
        await self.engine.apart(lambda: self._forget(name))

    def _forget(self, name: str) -> None:
        model = self.engine.model
        if len(self.adapters) == 1:
            self.engine.swap(model.unload())
        else:
            model.delete_adapter(name)

    def _may_load(self) -> None:
        if not self.loads_adapters:
            raise RequestError("adapters are loaded at the start alone: --adapter", status=403)

    # -- requests --------------------------------------------------------------------------------

    def rules(self, asked: Asked) -> list[list[Constraint]]:
        """The constraint of each answer, if there is one. Not for the event loop: a large schema
        takes its time."""
        if not asked.constraint:
            return []
        vocabulary = self.engine.model.config.vocab_size
        try:
            first = Constraint(self.tokenizer, vocab_size=vocabulary, **asked.constraint)
        except TopworkError as error:
            raise RequestError(str(error), "response_format") from error
        return [[first.fresh()] for _ in range(asked.count * len(asked.prompts))]

    async def heard(self, asked: Asked) -> list[list[Any]]:
        """What the model says of each prompt's tokens, as vLLM tells it: nothing of the first, then
        {id: {"logprob", "rank"}} of the token and of the likeliest ones. Read between two steps."""
        count = asked.prompt_logprobs
        if count is None:
            return []
        adapter = self.adapter_of(asked.model)
        for prompt in asked.prompts:
            self._limit(asked, prompt, adapter)
        try:
            return [
                await self.engine.apart(partial(self._read, prompt, adapter, count))
                for prompt in asked.prompts
            ]
        except TopworkError as error:
            raise RequestError(f"prompt_logprobs: {error}", "prompt_logprobs") from error

    @torch.inference_mode()
    def _read(self, prompt: list[int], adapter: str | None, count: int) -> list[Any]:
        model = self.engine.model
        ids = torch.tensor([prompt], device=model.device)
        peft = isinstance(model, PeftModel)
        told: list[Any] = [None]
        with model.rows_by_adapter([adapter or "__base__"]) if peft else nullcontext():
            hidden = model.backbone(ids)[0, :-1]
            for rows, given in zip(hidden.split(CHUNK), ids[0, 1:].split(CHUNK)):
                said = model.head(rows[None])[0].float().log_softmax(-1)
                own = said.gather(1, given[:, None])
                ranks = ((said > own).sum(1) + 1).tolist()
                best = said.topk(count)
                likeliest = zip(best.indices.tolist(), best.values.tolist())
                for token, value, rank, top in zip(
                    given.tolist(), own[:, 0].tolist(), ranks, likeliest
                ):
                    places = enumerate(zip(*top), 1)
                    entry = {str(t): {"logprob": v, "rank": place} for place, (t, v) in places}
                    entry[str(token)] = {"logprob": value, "rank": rank}
                    told.append(entry)
        return told

    def answers(self, asked: Asked, rules: Sequence[Sequence[Constraint]] = ()) -> list[Answer]:
        """Queue all answers that a request wants; RequestError where one of them cannot be made."""
        adapter = self.adapter_of(asked.model)
        count = asked.count * len(asked.prompts)
        if self.open + count > self.limits.max_waiting:
            raise RequestError("the server is busy; try again later", status=429, code="busy")
        found: list[Answer] = []
        try:
            for prompt in asked.prompts:
                for i in range(asked.count):
                    rule = rules[len(found)] if rules else ()
                    found.append(self._answer(asked, prompt, adapter, i, len(found), rule))
        except TopworkError as error:
            self.open += len(found)
            self.leave(found)
            raise error if isinstance(error, RequestError) else RequestError(str(error)) from error
        self.open += len(found)
        return found

    def leave(self, answers: Sequence[Answer]) -> None:
        """Nobody waits for these any more; what still runs of them ends."""
        self.open -= len(answers)
        for answer in answers:
            self.engine.leave(answer.request)

    def _answer(
        self, asked: Asked, prompt: list[int], adapter: str | None, repeat: int, index: int,
        rule: Sequence[Constraint],
    ) -> Answer:  # fmt: skip
        options = {**asked.options, **self._ends(asked)}
        if repeat and options.get("seed") is not None:
            options["seed"] += repeat
        request = self.engine.submit(
            prompt,
            adapter=adapter,
            tokenizer=self.tokenizer,
            logits_processor=rule,
            top_logprobs=asked.logprobs,
            max_new_tokens=self._limit(asked, prompt, adapter),
            max_time=self.limits.max_seconds,
            stop_strings=asked.stops or None,
            **options,
        )
        events = self.engine.follow(request)
        return Answer(index, request, events, asked, self.tokenizer, self.processed_logprobs)

    def _ends(self, asked: Asked) -> dict[str, Any]:
        """The ids that end an answer, where they are not those of the model's files."""
        if not (asked.stop_ids or asked.ignore_eos):
            return {}
        own = [] if asked.ignore_eos else self._own_ends()
        return {"eos_token_id": [*own, *asked.stop_ids] or None}

    def _own_ends(self) -> list[int]:
        model = self.engine.model
        files: Mapping[str, Any] = model.generation_config
        ids = files.get("eos_token_id", model.config.get("eos_token_id"))
        return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    def _limit(self, asked: Asked, prompt: list[int], adapter: str | None) -> int:
        context = self.engine.model.config.get("max_position_embeddings")
        lead, passes = room_of(self.engine.model, adapter)
        room = min(context or 1 << 62, self.limits.cache_tokens // passes - lead) - len(prompt)
        wanted = self.limits.max_new_tokens if asked.limit is None else asked.limit
        if room < 1 or (asked.limit or 0) > room:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {wanted}, but the context "
                f"holds {room + len(prompt)}", "messages" if asked.chat else "prompt",
                code="context_length_exceeded",
            )  # fmt: skip
        if wanted < 1:
            raise RequestError(f"max_tokens={wanted} must be at least 1", "max_tokens")
        return min(wanted, room, self.limits.max_new_tokens)
