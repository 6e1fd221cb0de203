"""Answers of several turns: the policy calls tools, reads what they return, and goes on.

Tools are Python functions, or the methods of an environment that each answer has to itself. What
they return stands in the text and is not trained.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from topwork.errors import ConfigError, TrainingError, nearest
from topwork.objectives.rewards import from_file
from topwork.objectives.rollouts import Answer, Prompt, Writer, seeds
from topwork.text import Tokenizer
from topwork.text.calls import Call, read_calls
from topwork.text.template import TemplateError
from topwork.text.tools import get_json_schema

OWN = ("reset", "get_reward")  # an environment's methods that are no tools
Factory = Callable[[], Any]


@dataclass
class Episode:
    """One answer as it grows. `prompt` is as the model reads it, `ids` what came after."""

    row: Prompt
    prompt: list[int]
    given: list[dict[str, Any]]
    functions: Mapping[str, Callable[..., Any]]
    environment: Any = None
    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    messages: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    calls: int = 0
    failures: int = 0
    ended: bool = False
    done: bool = False

    def add(self, ids: Sequence[int], logprobs: Sequence[float] | None) -> None:
        """More ids: the policy's with their log-probabilities, others without."""
        self.ids += ids
        self.own += [logprobs is not None] * len(ids)
        self.logprobs += [float("nan")] * len(ids) if logprobs is None else logprobs

    def answer(self) -> Answer:
        return Answer(
            self.ids, self.ended, self.logprobs, self.own, np.asarray(self.prompt, np.int32),
            self.messages, self.environment, self.calls, self.failures,
        )  # fmt: skip


@dataclass
class Stage:
    """What the answers of a run may use: `tools` everywhere, and an environment for each answer,
    made by the factory that its row names (None: the only one) and used again for later ones.

    `rounds`: how often an answer may call tools; None: until it is too long.
    """

    tokenizer: Tokenizer
    tools: Sequence[Callable[..., Any]] = ()
    factories: Mapping[str | None, Factory] = field(default_factory=dict)
    rounds: int | None = None
    pool: dict[str | None, list[Any]] = field(default_factory=dict)

    # -- environments ----------------------------------------------------------------------------

    def factory_of(self, row: Mapping[str, Any], number: int) -> str | None:
        """The name of the row's environment. ConfigError when there is none of it."""
        name = None if None in self.factories else row.get("environment")
        if name not in self.factories:
            raise ConfigError(
                f"row {number}: environment={name!r}{nearest(str(name), map(str, self.factories))}"
                f"; environment_factory has {sorted(map(str, self.factories))}"
            )
        return name

    def environment(self, name: str | None, place: int) -> Any:
        """The `place`-th environment of this name: one at hand, or a new one."""
        made = self.pool.setdefault(name, [])
        while len(made) <= place:
            made.append(self.factories[name]())
        return made[place]

    def functions(self, environment: Any = None) -> dict[str, Callable[..., Any]]:
        """The tools by name, with the environment's methods."""
        found = [*self.tools, *methods(environment)]
        return {function.__name__: function for function in found}

    def schemas(self, row: Mapping[str, Any], number: int) -> list[dict[str, Any]]:
        """What the template tells the model of the row's tools."""
        environment = None
        if self.factories:
            environment = self.environment(self.factory_of(row, number), 0)
        return [get_json_schema(f) for f in self.functions(environment).values()]

    def rewards(self) -> list[Callable[..., Any]]:
        """A reward function for each kind of environment that has `get_reward`."""
        kinds = {type(self.environment(name, 0)) for name in self.factories}
        return [own_reward(kind) for kind in sorted(kinds, key=lambda k: k.__name__)
                if callable(getattr(kind, "get_reward", None))]  # fmt: skip

    # -- episodes --------------------------------------------------------------------------------

    def play(
        self, writer: Writer, model: Any, prompts: Sequence[Prompt], count: int, limit: int,
        generator: torch.Generator | None = None,
    ) -> list[list[Answer]]:  # fmt: skip
        """`count` answers of up to `limit` tokens to each prompt, tools' tokens included."""
        used: dict[str | None, int] = {}
        episodes = [self._begin(p, used) for p in prompts for _ in range(count)]
        while going := [e for e in episodes if not e.done]:
            texts = [[*e.prompt, *e.ids] for e in going]
            room = [limit - len(e.ids) for e in going]
            found = writer.write(model, texts, room, seeds(len(texts), generator))
            for episode, said in zip(going, found):
                self._take(episode, said, limit)
        answers = [e.answer() for e in episodes]
        return [answers[at : at + count] for at in range(0, len(answers), count)]

    def _begin(self, prompt: Prompt, used: dict[str | None, int]) -> Episode:
        given, ids, environment = list(prompt.given), prompt.ids.tolist(), None
        if self.factories:
            name = self.factory_of(prompt.columns, prompt.row)
            environment = self.environment(name, used.get(name, 0))
            used[name] = used.get(name, 0) + 1
            seen = _reset(environment, prompt)
            if seen is not None:
                given = _observed(given, seen)
                ids = self.tokenizer.apply_chat_template(
                    given, add_generation_prompt=True,
                    tools=self.schemas(prompt.columns, prompt.row) or None,
                )  # fmt: skip
        return Episode(prompt, ids, given, self.functions(environment), environment)

    def _take(self, episode: Episode, said: Answer, limit: int) -> None:
        """Add what the policy said, and what its calls return if there is room for it."""
        episode.add(said.ids, said.sampled)
        text = self.tokenizer.decode(said.ids)
        end = self.tokenizer.eos_token or ""
        content, calls = read_calls(text.removesuffix(end) if end else text)
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if not said.ended or not calls:
            episode.messages.append(message)
            episode.ended, episode.done = said.ended, True
            return
        message["tool_calls"] = [call.message() for call in calls]
        episode.messages.append(message)
        if self.rounds is not None and episode.rounds >= self.rounds:
            episode.ended = episode.done = True
            return
        results = [self._result(episode, call) for call in calls]
        ids = self._turn(episode, results)
        episode.messages += results
        episode.rounds += 1
        if len(episode.ids) + len(ids) >= limit:
            episode.done = True
            return
        episode.add(ids, None)

    def _result(self, episode: Episode, call: Call) -> dict[str, Any]:
        """The tool's message; what goes wrong is told to the policy, which may try again."""
        episode.calls += 1
        try:
            content = _called(episode.functions, call)
        except Exception as error:
            episode.failures += 1
            content = json.dumps({"error": f"{type(error).__name__}: {error}"})
        return {"role": "tool", "name": call.name, "content": content}

    def _turn(self, episode: Episode, results: list[dict[str, Any]]) -> list[int]:
        """The ids between the policy's end token and its next turn."""
        before = [*episode.given, *episode.messages]
        tools = [get_json_schema(f) for f in episode.functions.values()]
        return between(self.tokenizer, before, results, tools)


def between(
    tokenizer: Tokenizer, before: list[dict[str, Any]], results: list[dict[str, Any]], tools: Any
) -> list[int]:
    """The ids with which the template goes on, after the end token of the assistant's message that
    `before` ends with, up to the header of its next one. ConfigError when it rewrites `before`."""
    part = tokenizer.apply_chat_template(before, tokenize=False, tools=tools)
    whole = tokenizer.apply_chat_template(
        [*before, *results], tokenize=False, add_generation_prompt=True, tools=tools
    )
    end = tokenizer.eos_token
    cut = part.rindex(end) + len(end) if end and end in part else len(part)
    if not whole.startswith(part[:cut]):
        raise ConfigError(
            "the chat template writes earlier turns otherwise once a tool has answered, so an "
            "answer cannot go on; pass chat_template with one that does not"
        )
    return tokenizer(whole[cut:], add_special_tokens=False)["input_ids"]


def set_stage(
    tokenizer: Tokenizer, tools: Sequence[Callable[..., Any]], factory: Any, rounds: int | None
) -> Stage | None:
    """The stage of these tools and environments, each given or named as "file.py:name"; None when
    there are neither.

    ConfigError for an environment without `reset`, for two tools of one name, and for a template
    that does not show what tools return. DataError for a tool that cannot be described.
    """
    if not tools and factory is None:
        return None
    tools = [_named(tool) for tool in ([tools] if isinstance(tools, str) else tools)]
    factories: Mapping[str | None, Factory] = {}
    if factory is not None:
        several = factory if isinstance(factory, Mapping) else {None: factory}
        factories = {name: _named(one) for name, one in several.items()}
    stage = Stage(tokenizer, tools, factories, rounds)
    for environment in [stage.environment(name, 0) for name in factories] or [None]:
        if environment is not None and not callable(getattr(environment, "reset", None)):
            raise ConfigError(f"the environment {type(environment).__name__} has no reset()")
        named = [f.__name__ for f in (*tools, *methods(environment))]
        if twice := sorted({n for n in named if named.count(n) > 1}):
            raise ConfigError(f"two tools are called {', '.join(twice)}")
        _check_template(
            tokenizer, [get_json_schema(f) for f in stage.functions(environment).values()]
        )
    return stage


def _named(given: Any) -> Callable[..., Any]:
    return from_file(given) if isinstance(given, str) else given


def _check_template(tokenizer: Tokenizer, schemas: list[dict[str, Any]]) -> None:
    name = schemas[0]["function"]["name"] if schemas else "tool"
    before: list[dict[str, Any]] = [
        {"role": "user", "content": "…"},
        {"role": "assistant", "content": "", "tool_calls": [Call(name, {}).message()]},
    ]
    result = {"role": "tool", "name": name, "content": "what the tool says"}
    try:
        shown = tokenizer.decode(between(tokenizer, before, [result], schemas or None))
    except TemplateError as error:
        raise ConfigError(f"the chat template knows no tools: {error}") from error
    if result["content"] not in shown:
        raise ConfigError(
            "the chat template does not show what tools return; pass chat_template with one that "
            "has the role `tool`"
        )


def methods(environment: Any) -> list[Callable[..., Any]]:
    """An environment's tools: its public methods but for `reset` and `get_reward`."""
    if environment is None:
        return []
    found = inspect.getmembers(type(environment), inspect.isfunction)
    return [getattr(environment, n) for n, _ in found if n not in OWN and not n.startswith("_")]


def own_reward(kind: type) -> Callable[..., Any]:
    """What environments of this kind say of their answers; None of those of another."""

    async def reward(environments: Sequence[Any]) -> list[Any]:
        found = [e.get_reward() if type(e) is kind else None for e in environments]
        return [await value if inspect.isawaitable(value) else value for value in found]

    reward.__name__ = kind.__name__
    return reward


def _reset(environment: Any, prompt: Prompt) -> Any:
    name = type(environment).__name__
    try:
        seen = environment.reset(**prompt.columns)
    except Exception as error:
        raise TrainingError(
            f"{name}.reset failed on row {prompt.row}: {type(error).__name__}: {error}"
        ) from error
    if seen is not None and not isinstance(seen, (str, list)):
        raise TrainingError(
            f"{name}.reset returned a {type(seen).__name__} on row {prompt.row}; it returns None, "
            "a text for the end of the last message, or messages"
        )
    return seen


def _observed(given: list[dict[str, Any]], seen: str | list[Any]) -> list[dict[str, Any]]:
    """The prompt with what the environment shows at first."""
    if isinstance(seen, list):
        return [*given, *seen]
    return [*given[:-1], {**given[-1], "content": given[-1]["content"] + seen}]


def _called(functions: Mapping[str, Callable[..., Any]], call: Call) -> str:
    if call.error is not None:
        raise ValueError(call.error)
    if call.name not in functions:
        raise KeyError(f"there is no tool {call.name!r}{nearest(call.name, functions)}")
    value = functions[call.name](**call.arguments)
    if inspect.isawaitable(value):
        value = asyncio.run(_awaited(value))
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


async def _awaited(value: Any) -> Any:
    return await value
