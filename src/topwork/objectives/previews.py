"""What `topwork preview` shows of rows: as its trainer will read them, without its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.data.prepare import marked_text, prepare
from topwork.data.rows import read_rows
from topwork.media.placed import Placer
from topwork.objectives import answers, prm, sft
from topwork.objectives.begin import describe_prompts
from topwork.objectives.episodes import set_stage
from topwork.objectives.rollouts import read_prompts
from topwork.objectives.selfdistill import describe_advised, read_advised
from topwork.objectives.sighted import load_writers
from topwork.text import Tokenizer

Runs = Sequence[tuple[str, bool]]
"""A text in pieces, each with whether it is trained."""
Shown = tuple[list[str], Iterator[tuple[str, Runs]]]
"""Lines about all rows, and each row's title and text."""


@dataclass(frozen=True)
class Sight:
    """With what rows are read: the tokenizer, what writes images where the run reads some, the
    run's `args`, and what else its trainer is `given` (tools, environments)."""

    tokenizer: Tokenizer
    args: Any
    placer: Placer | None = None
    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, args: Any, images: bool, given: Mapping[str, Any]) -> Sight:
        """From the checkpoint `name`; `images`: the run's trainer takes rows with images."""
        tokenizer, placer = load_writers(name, args, images)
        return cls(tokenizer, args, placer, given)


Preview = Callable[[Any, Sight], Shown]
"""Of rows in any form."""


def preview_rows(rows: Any, sight: Sight) -> Shown:
    """Rows of fine-tuning."""
    tokenizer = sight.tokenizer
    marking = sft.marking_of(sight.args, tokenizer)
    prepared = prepare(read_rows(rows), tokenizer, marking, placer=sight.placer)
    shown = (
        (
            f"row {s.row}: {len(s)} tokens, {s.supervised} trained",
            list(marked_text(s, tokenizer)),
        )
        for s in prepared.samples
    )
    return sft.report(prepared, tokenizer)[:-2], shown


def preview_answers(
    known: Any, whole: bool = False, single: bool = False, check: Any = None
) -> Preview:
    """Rows of judged answers in one of the `known` formats, on which the trainer's `check` has a
    look."""

    def preview(rows: Any, sight: Sight) -> Shown:
        tokenizer = sight.tokenizer
        data = answers.read_answers(
            rows, None, tokenizer, sight.args, known, whole, single, sight.placer
        )
        if check is not None:
            check(sight.args, data.train)
        lines = [
            line for line in answers.report(data, tokenizer, whole) if not line.startswith("  ")
        ]

        def each() -> Iterator[tuple[str, Runs]]:
            for s in data.train.samples:
                margin = f", margin {s.value:g}" if s.value is not None and not single else ""
                runs = list(marked_text(answers.prompt_of(s), tokenizer))
                for number, answer in enumerate(s.answers):
                    runs.append((f"\n{answers.title(s, number)}: ", False))
                    runs += marked_text(answer, tokenizer)
                yield f"row {s.row}: {len(s)} tokens computed of {s.apart}{margin}", runs

        return lines[:-1], each()

    return preview


def preview_steps(rows: Any, sight: Sight) -> Shown:
    """Rows of labelled steps."""
    tokenizer = sight.tokenizer
    prepared = prm.prepare_steps(rows, tokenizer, sight.args)

    def each() -> Iterator[tuple[str, Runs]]:
        for s in prepared.samples:
            runs, at = [], 0
            for end, label in zip(s.ends, s.labels):
                runs.append((tokenizer.decode(s.ids[at:end].tolist()), False))
                runs.append((f"[{'right' if label else 'wrong'}]", True))
                runs.append((tokenizer.decode(s.ids[end : end + 1].tolist()), False))
                at = end + 1
            yield f"row {s.row}: {len(s.ids)} tokens, {len(s.ends)} steps", runs

    return prm.report(prepared), each()


def preview_prompts(rows: Any, sight: Sight) -> Shown:
    """Prompts to be answered, with the tools that the run's answers may call."""
    args, tokenizer = sight.args, sight.tokenizer
    tools, environment = (sight.given.get(n) for n in ("tools", "environment_factory"))
    rounds = getattr(args, "max_tool_calling_iterations", None)
    stage = set_stage(tokenizer, tools or (), environment, rounds)
    schemas = None if stage is None else stage.schemas
    prompts, long = read_prompts(rows, tokenizer, args.max_prompt_length, schemas, sight.placer)

    def each() -> Iterator[tuple[str, Runs]]:
        for p in prompts:
            yield f"row {p.row}: {len(p)} tokens", list(marked_text(p.sample(), tokenizer))

    return describe_prompts(prompts, long, args, tokenizer)[:-2], each()


def preview_advised(rows: Any, sight: Sight) -> Shown:
    """Prompts to be answered, and what the teacher reads in their place."""
    args, tokenizer = sight.args, sight.tokenizer
    prompts, long = read_advised(rows, tokenizer, args)

    def each() -> Iterator[tuple[str, Runs]]:
        for p in prompts:
            own, teacher = (tokenizer.decode(ids.tolist()) for ids in (p.ids, p.teacher))
            yield f"row {p.row}: {len(p)} tokens", [(f"{own}\nteacher: {teacher}", False)]

    return describe_advised(prompts, long, args, tokenizer)[:-3], each()
