"""Answers of the policy: who writes them, and prompts as the model reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from topwork.data import illustrated
from topwork.data.prepare import Sample
from topwork.data.prompts import written
from topwork.data.rows import Row, read_rows
from topwork.errors import ConfigError, DataError
from topwork.generation.engine import Engine, room_of
from topwork.generation.request import ACTIVE
from topwork.media.placed import Placed, Placer
from topwork.objectives.rewards import Completion
from topwork.objectives.sighted import reading
from topwork.text import Tokenizer

ENGINE_ROWS = 64


@dataclass(frozen=True)
class Prompt:
    """One row to be answered: `ids` as the model reads them, the generation prompt included, in
    which `images` stand."""

    row: int
    ids: np.ndarray
    given: Any
    columns: Mapping[str, Any]
    images: tuple[Placed, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    def sample(self) -> Sample:
        """It as a row without a trained token."""
        return Sample(self.row, self.ids, np.zeros(len(self), np.bool_), images=self.images)


@dataclass(frozen=True)
class Answer:
    """What the policy said: its `ids` with the end token, whether it came to an end, and the
    log-probability with which each token was drawn (NaN: not known).

    Of several turns: `own`, which ids are the policy's and not a tool's; its own `prompt`; the
    `messages` after that; the environment; how many calls there were and how many failed.
    """

    ids: list[int]
    ended: bool
    logprobs: list[float] = field(default_factory=list)
    own: list[bool] | None = None
    prompt: np.ndarray | None = None
    messages: list[dict[str, Any]] | None = None
    environment: Any = None
    calls: int = 0
    failures: int = 0

    @property
    def sampled(self) -> list[float]:
        return self.logprobs or [float("nan")] * len(self.ids)

    @property
    def written(self) -> int:
        """How many ids are the policy's."""
        return len(self.ids) if self.own is None else sum(self.own)


Schemas = Callable[[Mapping[str, Any], int], list[dict[str, Any]]]


class Writer(Protocol):
    """Goes on with texts under the weights that it follows."""

    def follow(self, model: Any, step: int) -> None:
        """Take up the weights of `model` as they are after `step` steps."""
        ...

    def write(
        self, model: Any, texts: Sequence[Sequence[int]], limits: Sequence[int], seeds: list[int]
    ) -> list[Answer]:
        """What follows each of `texts`, up to so many tokens, drawn from so seeded a generator."""
        ...


@dataclass(frozen=True)
class EngineWriter:
    """The engine in this process, with the model itself: nothing is copied."""

    options: Mapping[str, Any]

    def follow(self, model: Any, step: int) -> None:
        """The model itself is what writes."""

    def write(
        self, model: Any, texts: Sequence[Sequence[int]], limits: Sequence[int], seeds: list[int]
    ) -> list[Answer]:
        """Beginnings that several texts share are read once; texts leave as they end."""
        rows = min(ENGINE_ROWS, len(texts))
        lead, passes = room_of(model, self.options.get("adapter", ACTIVE))
        longest = (max(len(t) + n for t, n in zip(texts, limits)) + lead) * passes
        engine = Engine(model, max_rows=rows, cache_tokens=(rows + 1) * (longest + 32))
        asked = [
            engine.submit(list(text), **{**self.options, "max_new_tokens": limit, "seed": seed})
            for text, limit, seed in zip(texts, limits, seeds)
        ]
        for event in engine.run():
            if event.request.error is not None:
                raise event.request.error
        return [Answer(r.new_ids, r.finish_reason == "stop", r.logprobs) for r in asked]


@dataclass(frozen=True)
class SeeingWriter(EngineWriter):
    """`generate` for a model that reads the images of its prompts, as many texts at once as the
    engine takes; what is seen is read once for all answers to it. No answer has the token that an
    image's features stand for."""

    placer: Placer

    def answers(
        self, model: Any, prompts: Sequence[Prompt], count: int, limit: int, seeds: list[int]
    ) -> list[list[Answer]]:
        """`count` answers to each prompt. TrainingError for an image that cannot be read."""
        size = max(1, ENGINE_ROWS // count)
        parts = [slice(at, at + size) for at in range(0, len(prompts), size)]
        found = [self._to(model, prompts[p], seeds[p.start], count, limit) for p in parts]
        flat = [answer for part in found for answer in part]
        return [flat[at : at + count] for at in range(0, len(flat), count)]

    def _to(
        self, model: Any, prompts: Sequence[Prompt], seed: int, count: int, limit: int
    ) -> list[Answer]:
        """The answers to several prompts, which end at one place."""
        device = next(model.parameters()).device
        with reading():
            images = self.placer.tensors([prompt.sample() for prompt in prompts])
        images.pop("token_type_ids", None)  # of prompts alone they say nothing
        end, longest = self.options["eos_token_id"], max(map(len, prompts))
        ids = torch.full((len(prompts), longest), end)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.from_numpy(prompt.ids)
            mask[row, longest - len(prompt) :] = 1
        out = model.generate(
            ids.to(device),
            mask.to(device),
            **{name: tensor.to(device) for name, tensor in images.items()},
            **{**self.options, "max_new_tokens": limit, "num_return_sequences": count},
            suppress_tokens=[i for i in (self.placer.inside(),) if i < model.spec.decoder.vocab],
            seed=seed,
        )
        rows = out[:, longest:].tolist()
        stops = [row.index(end) + 1 if end in row else None for row in rows]
        return [Answer(row[:stop], stop is not None) for row, stop in zip(rows, stops)]


def seeds(count: int, generator: torch.Generator | None = None) -> list[int]:
    """Fresh seeds, by default from torch's own generator, so that a resumed run draws the same."""
    return torch.randint(2**62, (count,), generator=generator).tolist()


def roll_out(
    writer: Writer, model: Any, prompts: Sequence[Prompt], count: int, limit: int,
    generator: torch.Generator | None = None,
) -> list[list[Answer]]:  # fmt: skip
    """`count` answers to each prompt."""
    if isinstance(writer, SeeingWriter):
        return writer.answers(model, prompts, count, limit, seeds(len(prompts), generator))
    texts = [prompt.ids.tolist() for prompt in prompts for _ in range(count)]
    found = writer.write(model, texts, [limit] * len(texts), seeds(len(texts), generator))
    return [found[at : at + count] for at in range(0, len(found), count)]


def read_prompts(
    source: Any, tokenizer: Tokenizer, limit: int | None, schemas: Schemas | None = None,
    placer: Placer | None = None,
) -> tuple[list[Prompt], int]:  # fmt: skip
    """The rows of `source` with their prompts as tokens, and how many were too long.

    A row has `prompt`, a text or messages; further columns go to the reward functions. `schemas`:
    the tools of a row, which the template describes, beside those of its column `tools`. `placer`
    writes the images of rows that have some.
    """
    rows = read_rows(source)
    prompts = [_prompt(number, row, tokenizer, schemas, placer) for number, row in enumerate(rows)]
    kept = [p for p in prompts if limit is None or len(p) <= limit]
    if not kept:
        raise DataError(f"every one of the {len(rows)} prompts is longer than {limit} tokens")
    return kept, len(prompts) - len(kept)


def _prompt(
    number: int, row: Row, tokenizer: Tokenizer, schemas: Schemas | None, placer: Placer | None
) -> Prompt:
    given = row.get("prompt")
    if placer is None and illustrated.any_in(row, given):
        raise DataError(
            f"row {number} has images (in its column `images` or in its messages), which nothing "
            "reads here: they need a model of images in texts with its AutoProcessor as "
            "processing_class, and GRPOTrainer, RLOOTrainer or a trainer on given answers "
            "(DPOTrainer, SFTTrainer); else leave them out"
        )
    tools = list(row.get("tools") or ())
    if schemas is not None:
        tools += schemas(row, number)
    images: tuple[Placed, ...] = ()
    if isinstance(given, str) and schemas is not None:
        raise DataError(f"row {number}: with tools `prompt` is messages, not a text")
    if placer is not None and isinstance(given, Sequence):
        try:
            ids, images = written(row, tokenizer, placer, tools)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
    elif isinstance(given, str):
        ids = tokenizer(given)["input_ids"]
    elif isinstance(given, Sequence):
        ids = tokenizer.apply_chat_template(
            list(given), add_generation_prompt=True, tools=tools or None
        )
    else:
        raise DataError(
            f"row {number} has no `prompt` (a text or messages); its columns are {sorted(row)}"
        )
    if not len(ids):
        raise DataError(f"row {number}: the prompt is empty")
    return Prompt(number, np.asarray(ids, np.int32), given, row, images=images)


def completion(prompt: Prompt, answer: Answer, tokenizer: Tokenizer) -> Completion:
    """The answer as reward functions see it: a text, or messages where the prompt is messages."""
    text = tokenizer.decode(answer.ids, skip_special_tokens=True)
    said: Any = text
    if not isinstance(prompt.given, str):
        said = answer.messages or [{"role": "assistant", "content": text}]
    return Completion(
        prompt.given, said, text, answer.ids, prompt.columns, answer.ended, answer.environment
    )


def sampling_options(args: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `args` says of drawing tokens, as options of `generate`."""
    if not args.temperature > 0:
        raise ConfigError(f"temperature={args.temperature} must be positive: rollouts are drawn")
    return {
        "do_sample": True,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "max_new_tokens": args.max_completion_length,
        "eos_token_id": tokenizer.eos_token_id,
    }
