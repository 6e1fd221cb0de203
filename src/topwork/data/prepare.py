"""From rows to token ids with a mark on each token that is trained; every lost row is counted."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from topwork.data.formats import (
    Chat,
    Completion,
    Example,
    Format,
    Text,
    Tokens,
    as_prompt,
    recognise,
    without_template,
)
from topwork.data.rows import Row
from topwork.errors import DataError
from topwork.media.image_text import listed
from topwork.media.images import image_facts
from topwork.media.placed import Placed, Placer
from topwork.text import Tokenizer
from topwork.text.spans import Rendered, apply, moved, render_spans_batch

K = TypeVar("K")
SHOWN = 5  # bad rows named in an error before "and N more"


@dataclass(frozen=True)
class Sample:
    """One row as tokens: `ids` and `trained` [T]; `row` is its number in the given data, `task`
    that of its task. Its `images` are read when it is collated."""

    row: int
    ids: np.ndarray
    trained: np.ndarray
    images: tuple[Placed, ...] = field(default=(), kw_only=True)
    task: int | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Tokens that are predicted and trained (the first has nothing before it)."""
        return int(self.trained[1:].sum())

    def facts(self) -> Iterable[bytes]:
        """All that trains, for a digest."""
        seen = (image_facts(image.source) for image in self.images)
        task = () if self.task is None else (str(self.task).encode(),)
        return self.ids.tobytes(), self.trained.tobytes(), *task, *seen


def opening(sample: Sample | tuple[Sample, ...]) -> Sample:
    """What stands before the first trained token of `sample` (of a pack: of its first row), with
    its images, as a row without a trained token."""
    first = sample[0] if isinstance(sample, tuple) else sample
    size = int(first.trained.argmax()) if first.trained.any() else 0
    images = tuple(image for image in first.images if image.stop <= size)
    return Sample(first.row, first.ids[:size], np.zeros(size, np.bool_), images=images)


@dataclass(frozen=True)
class Marking:
    """Which tokens of a row are trained.

    `assistant_only`, `completion_only`: where a row has roles or a prompt, its answers alone.
    `max_length`: tokens kept of a row, from its start; None keeps all.
    """

    assistant_only: bool = True
    completion_only: bool = True
    max_length: int | None = None
    text_field: str = "text"
    end_token: int | None = None


class Counted(Protocol):
    """What `Prepared` asks of a sample: its tokens, how many are trained, and all that trains."""

    def __len__(self) -> int: ...

    @property
    def supervised(self) -> int: ...

    def facts(self) -> Iterable[bytes]: ...


S = TypeVar("S", bound=Counted)


@dataclass
class Prepared(Generic[S]):
    """The samples of a data set and what became of each row."""

    samples: list[S]
    format: str
    rows: int
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unterminated: int = 0
    """Samples (or answers) whose end-of-turn token is not trained: cut off, or the template writes
    none."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def tokens(self) -> int:
        """As they are computed: a prompt that answers share counts once."""
        return sum(len(s) for s in self.samples)

    @property
    def supervised(self) -> int:
        return sum(s.supervised for s in self.samples)

    @property
    def fingerprint(self) -> str:
        """A digest of every token, mark and value: two equal ones train alike."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for fact in sample.facts():
                digest.update(fact)
        return digest.hexdigest()


@dataclass(frozen=True)
class Tokenized:
    """Ids, a mark for each, and whether the last trained part ends in a trained end token."""

    ids: Sequence[int]
    trained: Sequence[bool]
    closed: bool
    images: tuple[Placed, ...] = ()


def prepare(
    rows: Sequence[Row], tokenizer: Tokenizer, marking: Marking, format: Format | None = None,
    placer: Placer | None = None,
) -> Prepared[Sample]:  # fmt: skip
    """All `rows` as samples. `placer` writes the images of rows that have some.

    Rows without a trained token are dropped and counted. DataError when rows cannot be read,
    naming the first of them, or when no supervised token is left, saying why.
    """
    found = format or recognise(rows, marking.text_field)
    prepared: Prepared[Sample] = Prepared([], found.name, len(rows))
    bad: dict[int, DataError] = {}
    examples: dict[int, Example] = {}
    tasks: dict[int, int | None] = {}
    for number, row in enumerate(rows):
        try:
            tasks[number] = task_of(row)
            examples[number] = fitted(found.read(row), tokenizer, placer)
        except DataError as error:
            bad[number] = error
    tokenized = tokenize(examples, tokenizer, marking, bad, placer)
    refuse(bad, len(rows))
    for number in sorted(tokenized):
        _add(prepared, number, tokenized[number], marking.max_length, tasks[number])
    if not prepared.supervised:
        raise DataError(
            f"no supervised token is left of {len(rows)} rows in the {found.name} format: "
            + (", ".join(f"{n} {why}" for why, n in prepared.dropped.items()) or "all were empty")
        )
    return prepared


def task_of(row: Row) -> int | None:
    """The number of the row's task in its column `task_ids`, if it has one."""
    task = row.get("task_ids")
    if task is None:
        return None
    if isinstance(task, bool) or not isinstance(task, (int, np.integer)) or task < 0:
        raise DataError(f"task_ids={task!r} must be the number of a task")
    return int(task)


def fitted(example: Example, tokenizer: Tokenizer, placer: Placer | None) -> Example:
    """`example` as the tokenizer, or the processor, can write it."""
    if example.images and placer is None:
        raise DataError(
            f"it has {len(example.images)} images, which nothing reads here: they need a model of "
            "images in texts with its AutoProcessor as processing_class, and a trainer that reads "
            "them (SFTTrainer, DPOTrainer, KTOTrainer, CPOTrainer); else leave out the column "
            "`images`"
        )
    template = tokenizer.chat_template if placer is None else placer.template
    if not isinstance(example, Chat) or template is not None:
        return example
    if placer is not None and not placer.processor.style.chats:
        return as_prompt(example, placer.token)
    if example.images:
        raise DataError("the processor has no chat template to write messages with images: set one")
    return without_template(example)


def refuse(bad: Mapping[int, DataError], rows: int) -> None:
    """DataError naming the first of the `bad` rows, if there are any."""
    if bad:
        first = "; ".join(f"row {n}: {bad[n]}" for n in sorted(bad)[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{len(bad)} of {rows} rows cannot be used: {first}{more}")


def _add(
    prepared: Prepared[Sample], number: int, row: Tokenized, limit: int | None, task: int | None
) -> None:
    cut = limit is not None and len(row.ids) > limit
    if limit is not None and row.images and row.images[-1].stop > limit:
        prepared.dropped[f"whose images do not fit in max_length={limit}"] += 1
        return
    ids = np.asarray(row.ids[:limit], np.int32)
    marks = np.asarray(row.trained[:limit], np.bool_)
    sample = Sample(number, ids, marks, images=row.images, task=task)
    if not sample.supervised:
        beyond = f"whose trained part lies beyond max_length={limit}"
        prepared.dropped[beyond if cut else "without a trained token"] += 1
        return
    prepared.cut += cut
    prepared.unterminated += cut or not row.closed
    prepared.samples.append(sample)


def tokenize(
    examples: Mapping[K, Example], tokenizer: Tokenizer, marking: Marking, bad: dict[K, DataError],
    placer: Placer | None = None,
) -> dict[K, Tokenized]:  # fmt: skip
    """Every example as tokens, many at a time; what cannot be is noted in `bad`."""
    done = _chats({n: e for n, e in examples.items() if isinstance(e, Chat)}, tokenizer, marking,
                  bad, placer)  # fmt: skip
    for number, example in examples.items():
        if isinstance(example, Tokens):
            try:
                done[number] = _given(example, len(tokenizer))
            except DataError as error:
                bad[number] = error
    texts: dict[K, Parts] = {}
    for number, example in examples.items():
        if isinstance(example, (Text, Completion)):
            try:
                texts[number] = _parts(example, placer)
            except DataError as error:
                bad[number] = error
    return done | _texts(texts, tokenizer, marking)


def _chats(
    chats: Mapping[K, Chat], tokenizer: Tokenizer, marking: Marking, bad: dict[K, DataError],
    placer: Placer | None,
) -> dict[K, Tokenized]:  # fmt: skip
    if not chats:
        return {}
    numbers = list(chats)
    refused: dict[int, DataError] = {}
    sizes: dict[int, list[tuple[int, int]]] = {}
    messages: list[Sequence[Any]] = [c.messages for c in chats.values()]
    if placer is not None:
        messages = [[listed(message) for message in chat] for chat in messages]

    def edit(row: int, text: str) -> list[tuple[int, int, str]]:
        assert placer is not None
        sizes[row] = placer.sizes(chats[numbers[row]].images)
        return placer.edits(text, sizes[row], chat=True)

    rendered = render_spans_batch(
        tokenizer,
        messages,
        chat_template=None if placer is None else placer.template,
        variables=[{**c.variables, "tools": c.tools} for c in chats.values()],
        refused=refused,
        edit=None if placer is None else edit,
    )
    bad.update({numbers[i]: error for i, error in refused.items()})
    kept = [i for i in range(len(numbers)) if i not in refused]
    return {
        numbers[i]: _marked(chats[numbers[i]], one, marking, sizes.get(i, []))
        for i, one in zip(kept, rendered)
    }


def _marked(
    chat: Chat, rendered: Rendered, marking: Marking, sizes: Sequence[tuple[int, int]]
) -> Tokenized:
    turns = [
        t for t in rendered.turns if t.message >= chat.trained_from or not marking.completion_only
    ]
    closed = bool(turns) and turns[-1].closed
    marks = [not marking.assistant_only] * len(rendered.input_ids)
    for turn in turns:
        marks[turn.start : turn.stop] = [True] * (turn.stop - turn.start)
    images = _placed(chat.images, sizes, rendered.edited, marks)
    return Tokenized(rendered.input_ids, marks, closed, images)


def _placed(
    sources: Sequence[Any],
    sizes: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    marks: list[bool],
) -> tuple[Placed, ...]:
    """The images at their tokens, none of which is trained."""
    for start, stop in spans:
        marks[start:stop] = [False] * (stop - start)
    return tuple(Placed(image, size, *span) for image, size, span in zip(sources, sizes, spans))


def _given(example: Tokens, size: int) -> Tokenized:
    ids, labels = example.input_ids, example.labels
    if any(not 0 <= i < size for i in ids):
        raise DataError(f"input_ids lie outside the vocabulary of {size}")
    if labels is None:
        return Tokenized(ids, [True] * len(ids), True)
    if any(x not in (i, -100) for i, x in zip(ids, labels)):
        raise DataError("labels must be the input_ids themselves, or -100")
    marks = [label != -100 for label in labels]
    return Tokenized(ids, marks, bool(marks) and marks[-1])


@dataclass(frozen=True)
class Parts:
    """A prompt and what follows it, the images written out at characters `spans` of both together.

    `apart`: they are made tokens one by one.
    """

    prompt: str
    completion: str
    sources: tuple[Any, ...] = ()
    sizes: Sequence[tuple[int, int]] = ()
    spans: Sequence[tuple[int, int]] = ()
    apart: bool = False


def _parts(example: Text | Completion, placer: Placer | None) -> Parts:
    prompt, completion = "", ""
    if isinstance(example, Completion):
        prompt, completion = example.prompt, example.completion
    else:
        completion = example.text
    if placer is None:
        return Parts(prompt, completion)
    apart = not placer.processor.style.chats
    if apart and not prompt:
        raise DataError("this family reads a prompt and its answer: give prompt and completion")
    prompt = placer.prompt(prompt) if prompt else prompt
    sizes = placer.sizes(example.images)
    edits = placer.edits(prompt + completion, sizes)
    whole, spans = apply(edits, prompt + completion)
    border = moved(edits, len(prompt))
    return Parts(whole[:border], whole[border:], example.images, sizes, spans, apart)


def _texts(texts: Mapping[K, Parts], tokenizer: Tokenizer, marking: Marking) -> dict[K, Tokenized]:
    """Prompt and completion as one text, ended by the end token.

    A token across their border belongs to the completion.
    """
    if not texts:
        return {}
    encoded = _encoded(texts.values(), tokenizer)
    done = {}
    for (number, parts), (ids, offsets) in zip(texts.items(), encoded):
        border = len(parts.prompt) if marking.completion_only else 0
        marks = [stop > border for _, stop in offsets] if border else [True] * len(ids)
        begins, ends = [a for a, _ in offsets], [b for _, b in offsets]
        spans = [(bisect_right(ends, a), bisect_left(begins, b)) for a, b in parts.spans]
        ended = marking.end_token is not None and ids[-1:] == [marking.end_token]
        if ended:
            marks[-1] = True
        elif marking.end_token is not None:
            ids, marks = [*ids, marking.end_token], [*marks, True]
        images = _placed(parts.sources, parts.sizes, spans, marks)
        done[number] = Tokenized(ids, marks, marking.end_token is not None, images)
    return done


def _encoded(
    texts: Collection[Parts], tokenizer: Tokenizer
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The ids of each, and the characters [start, stop) of each id."""
    first = [p.prompt if p.apart else p.prompt + p.completion for p in texts]
    found = tokenizer(first, return_offsets_mapping=True)
    made = [(list(i), list(o)) for i, o in zip(found["input_ids"], found["offset_mapping"])]
    for (ids, offsets), parts in zip(made, texts):
        if parts.apart:
            rest = tokenizer(
                parts.completion, add_special_tokens=False, return_offsets_mapping=True
            )
            ids += rest["input_ids"]
            size = len(parts.prompt)
            offsets += [(a + size, b + size) for a, b in rest["offset_mapping"]]
    return made


def describe_losses(prepared: Any) -> list[str]:
    """What was cut or dropped, in words; nothing when nothing was."""
    lines = [f"{n} rows dropped, {why}" for why, n in prepared.dropped.items()]
    if prepared.cut:
        lines.append(f"{prepared.cut} rows cut at max_length")
    return lines


def marked_text(sample: Sample, tokenizer: Any) -> Iterable[tuple[str, bool]]:
    """The sample's text in runs, each with whether it is trained; images as short marks."""
    at, ids, trained = 0, sample.ids.tolist(), sample.trained.tolist()
    images = {image.start: image for image in sample.images}
    while at < len(ids):
        if at in images:
            yield str(images[at]), False
            at = max(at + 1, images[at].stop)
            continue
        stop = at
        while stop < len(ids) and trained[stop] == trained[at] and stop not in images:
            stop += 1
        yield tokenizer.decode(ids[at:stop], skip_special_tokens=False), trained[at]
        at = stop
