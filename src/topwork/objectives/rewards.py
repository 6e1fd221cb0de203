"""Rewards of completions: Python functions (plain or async) and reward models."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from topwork.errors import ConfigError, TrainingError, nearest
from topwork.models import AutoModelForSequenceClassification
from topwork.text import AutoTokenizer

RewardFunc = Callable[..., Any] | nn.Module
NAN = float("nan")


@dataclass(frozen=True)
class Completion:
    """One answer to a prompt: its text (or messages), its ids, the row it answers, whether it came
    to an end, and its environment."""

    prompt: Any
    answer: Any
    text: str
    ids: list[int]
    row: Mapping[str, Any]
    ended: bool = True
    environment: Any = None


@dataclass(frozen=True)
class Jury:
    """Who judges the answers: functions and reward models (each with its tokenizer), how much each
    counts, and what an answer loses that does not end (None: nothing)."""

    funcs: Sequence[RewardFunc]
    tokenizers: Sequence[Any] = ()
    given_weights: Sequence[float] | None = None
    missing_eos: float | None = None

    @property
    def names(self) -> list[str]:
        found = [name_of(func) for func in self.funcs]
        return found if self.missing_eos is None else [*found, "missing_eos"]

    @property
    def weights(self) -> Tensor:
        found = list(self.given_weights or [1.0] * len(self.funcs))
        return torch.tensor(found if self.missing_eos is None else [*found, 1.0])

    def judge(self, completions: Sequence[Completion], state: Any) -> Tensor:
        """Each judge's reward of each completion [N, F], NaN where it has none."""
        found = judge(self.funcs, completions, state, self.tokenizers)
        if self.missing_eos is None:
            return found
        lost = [0.0 if c.ended else -self.missing_eos for c in completions]
        return torch.cat([found, torch.tensor(lost)[:, None]], 1)

    def summed(self, rewards: Tensor) -> Tensor:
        """[..., F] → [...]: the weighted sum of what was judged."""
        return (rewards * self.weights).nansum(-1)


def convene(
    given: Any, tokenizers: Any, args: Any, more: Sequence[Callable[..., Any]] = ()
) -> Jury:
    """The jury of these functions, reward models, or names of either, and of `more` functions.

    ConfigError when there is none, or weights or a tokenizer do not fit.
    """
    several = isinstance(given, (list, tuple))
    listed: list[Any] = list(given) if several else [given]
    if not listed and not more:
        raise ConfigError("the trainer needs reward_funcs (on the command line: --reward)")
    funcs, found = _reward_models(listed, tokenizers)
    weights = args.reward_weights
    if weights is not None and len(weights) != len(funcs):
        raise ConfigError(f"{len(weights)} reward_weights for {len(funcs)} rewards")
    if weights is not None and more:
        weights = [*weights, *[1.0] * len(more)]
    return Jury([*funcs, *more], [*found, *[None] * len(more)], weights, args.missing_eos_penalty)


def _reward_models(
    given: Sequence[RewardFunc | str], tokenizers: Any
) -> tuple[list[RewardFunc], list[Any]]:
    """Names of reward models loaded; each model with its tokenizer."""
    listed = tokenizers if isinstance(tokenizers, (list, tuple)) else [tokenizers] * len(given)
    funcs: list[RewardFunc] = []
    found: list[Any] = []
    for func, tokenizer in zip(given, listed, strict=True):
        if isinstance(func, str) and ".py:" in func:
            func = from_file(func)
        elif isinstance(func, str):
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(func)
            func = AutoModelForSequenceClassification.from_pretrained(func, num_labels=1)
        if isinstance(func, nn.Module) and tokenizer is None:
            raise ConfigError("a reward model needs its tokenizer: reward_processing_classes=…")
        funcs.append(func)
        found.append(tokenizer)
    return funcs, found


def from_file(name: str) -> Callable[..., Any]:
    """The function (or class) that "path.py:name" names; the file is run, as one's own code is."""
    path, _, function = name.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{name!r}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{name!r}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{name!r}: no function {function!r}{nearest(function, dir(module))}")
    return getattr(module, function)


def name_of(func: RewardFunc) -> str:
    """The name under which a reward is logged."""
    return getattr(func, "__name__", type(func).__name__)


def judge(
    funcs: Sequence[RewardFunc], completions: Sequence[Completion], state: Any, tokenizers: Any = ()
) -> Tensor:
    """Each function's reward of each completion [N, F], NaN where it returned None.

    A function is called as f(prompts=, completions=, completion_ids=, trainer_state=,
    environments=, **columns) and returns a list of numbers or None. TrainingError, with the
    function's name and the completion, when it raises, returns NaN, or not one number for each
    completion.
    """
    columns = {
        key: [c.row.get(key) for c in completions]
        for key in completions[0].row
        if key not in ("prompt", "completion")
    }
    found = []
    for index, func in enumerate(funcs):
        if isinstance(func, nn.Module):
            values = _scores(func, completions, tokenizers[index])
        else:
            values = _called(func, completions, state, columns)
        found.append(_checked(func, values, completions))
    return torch.tensor(found, dtype=torch.float32).t()


def _called(
    func: Callable[..., Any], completions: Sequence[Completion], state: Any, columns: dict[str, Any]
) -> Any:
    given = {
        "prompts": [c.prompt for c in completions],
        "completions": [c.answer for c in completions],
        "completion_ids": [c.ids for c in completions],
        "trainer_state": state,
        "environments": [c.environment for c in completions],
        **columns,
    }
    try:
        values = func(**_accepted(func, given))
        return asyncio.run(_awaited(values)) if inspect.isawaitable(values) else values
    except Exception as error:
        raise TrainingError(
            f"the reward function {name_of(func)} failed: {type(error).__name__}: {error}; it was "
            f"called with {len(completions)} completions, the first {completions[0].text[:200]!r}"
        ) from error


async def _awaited(value: Any) -> Any:
    return await value


def check_columns(funcs: Sequence[RewardFunc], columns: Sequence[str]) -> None:
    """ConfigError when a function wants an argument that neither the rows nor the run have."""
    known = {"prompts", "completions", "completion_ids", "trainer_state", "environments", *columns}
    for func in funcs:
        if isinstance(func, nn.Module):
            continue
        missing = [
            p.name for p in inspect.signature(func).parameters.values()
            if p.default is p.empty and p.name not in known
            and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        ]  # fmt: skip
        if missing:
            raise ConfigError(
                f"the reward function {name_of(func)} wants {missing}, but there are "
                f"{sorted(known)}"
            )


def _accepted(func: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """What `func` names, or everything when it takes **kwargs."""
    parameters = inspect.signature(func).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return given
    wanted = {p.name for p in parameters}
    return {name: value for name, value in given.items() if name in wanted}


def _checked(func: RewardFunc, values: Any, completions: Sequence[Completion]) -> list[float]:
    values = values.tolist() if isinstance(values, Tensor) else list(values)
    if len(values) != len(completions):
        raise TrainingError(
            f"the reward function {name_of(func)} returned {len(values)} rewards for "
            f"{len(completions)} completions"
        )
    for value, completion in zip(values, completions):
        if value is not None and not math.isfinite(value):
            raise TrainingError(
                f"the reward function {name_of(func)} returned {value} for the completion "
                f"{completion.text[:200]!r}"
            )
    return [NAN if value is None else float(value) for value in values]


@torch.no_grad()
def _scores(model: nn.Module, completions: Sequence[Completion], tokenizer: Any) -> list[float]:
    """What a sequence classifier with one label says of prompt and answer together."""
    any_model: Any = model
    scores = []
    for completion in completions:
        if isinstance(completion.prompt, str):
            ids = tokenizer(completion.prompt + completion.text)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template([*completion.prompt, *completion.answer])
        given = torch.tensor([ids], device=next(model.parameters()).device)
        scores.append(float(any_model(given).logits[0, 0]))
    return scores
