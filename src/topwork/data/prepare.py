"""From rows to token ids with a mark on each token that is trained; every lost row is counted."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    recognise,
    without_template,
)
from topwork.data.rows import Row
from topwork.errors import DataError
from topwork.text import Tokenizer
from topwork.text.spans import Rendered, render_spans_batch
from topwork.text.template import TemplateError

K = TypeVar("K")
SHOWN = 5  # bad rows named in an error before "and N more"


@dataclass(frozen=True)
class Sample:
    """One row as tokens: `ids` and `trained` [T]; `row` is its number in the given data."""

    row: int
    ids: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def supervised(self) -> int:
        """Tokens that are predicted and trained (the first has nothing before it)."""
        return int(self.trained[1:].sum())

    def facts(self) -> Iterable[bytes]:
        """All that trains, for a digest."""
        return self.ids.tobytes(), self.trained.tobytes()


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


def prepare(
    rows: Sequence[Row], tokenizer: Tokenizer, marking: Marking, format: Format | None = None
) -> Prepared[Sample]:
    """All `rows` as samples.

    Rows without a trained token are dropped and counted. DataError when rows cannot be read,
    naming the first of them, or when no supervised token is left, saying why.
    """
    found = format or recognise(rows, marking.text_field)
    prepared: Prepared[Sample] = Prepared([], found.name, len(rows))
    bad: dict[int, DataError] = {}
    examples: dict[int, Example] = {}
    for number, row in enumerate(rows):
        try:
            example = found.read(row)
            if isinstance(example, Chat) and tokenizer.chat_template is None:
                example = without_template(example)
            examples[number] = example
        except DataError as error:
            bad[number] = error
    tokenized = tokenize(examples, tokenizer, marking, bad)
    refuse(bad, len(rows))
    for number in sorted(tokenized):
        _add(prepared, number, tokenized[number], marking.max_length)
    if not prepared.supervised:
        raise DataError(
            f"no supervised token is left of {len(rows)} rows in the {found.name} format: "
            + (", ".join(f"{n} {why}" for why, n in prepared.dropped.items()) or "all were empty")
        )
    return prepared


def refuse(bad: Mapping[int, DataError], rows: int) -> None:
    """DataError naming the first of the `bad` rows, if there are any."""
    if bad:
        first = "; ".join(f"row {n}: {bad[n]}" for n in sorted(bad)[:SHOWN])
        more = f"; and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise DataError(f"{len(bad)} of {rows} rows cannot be used: {first}{more}")


def _add(prepared: Prepared[Sample], number: int, row: Tokenized, limit: int | None) -> None:
    cut = limit is not None and len(row.ids) > limit
    sample = Sample(
        number, np.asarray(row.ids[:limit], np.int32), np.asarray(row.trained[:limit], np.bool_)
    )
    if not sample.supervised:
        beyond = f"whose trained part lies beyond max_length={limit}"
        prepared.dropped[beyond if cut else "without a trained token"] += 1
        return
    prepared.cut += cut
    prepared.unterminated += cut or not row.closed
    prepared.samples.append(sample)


def tokenize(
    examples: Mapping[K, Example], tokenizer: Tokenizer, marking: Marking, bad: dict[K, DataError]
) -> dict[K, Tokenized]:
    """Every example as tokens, many at a time; what cannot be is noted in `bad`."""
    done = _chats({n: e for n, e in examples.items() if isinstance(e, Chat)}, tokenizer, marking,
                  bad)  # fmt: skip
    for number, example in examples.items():
        if isinstance(example, Tokens):
            try:
                done[number] = _given(example, len(tokenizer))
            except DataError as error:
                bad[number] = error
    texts = {
        n: ("", e.text) if isinstance(e, Text) else (e.prompt, e.completion)
        for n, e in examples.items()
        if isinstance(e, (Text, Completion))
    }
    return done | _texts(texts, tokenizer, marking)


def _chats(
    chats: Mapping[K, Chat], tokenizer: Tokenizer, marking: Marking, bad: dict[K, DataError]
) -> dict[K, Tokenized]:
    if not chats:
        return {}
    numbers = list(chats)
    refused: dict[int, TemplateError] = {}
    rendered = render_spans_batch(
        tokenizer,
        [c.messages for c in chats.values()],
        variables=[{**c.variables, "tools": c.tools} for c in chats.values()],
        refused=refused,
    )
    bad.update({numbers[i]: error for i, error in refused.items()})
    kept = [n for i, n in enumerate(numbers) if i not in refused]
    return {n: _marked(chats[n], one, marking) for n, one in zip(kept, rendered)}


def _marked(chat: Chat, rendered: Rendered, marking: Marking) -> Tokenized:
    turns = [
        t for t in rendered.turns if t.message >= chat.trained_from or not marking.completion_only
    ]
    closed = bool(turns) and turns[-1].closed
    if not marking.assistant_only:
        return Tokenized(rendered.input_ids, [True] * len(rendered.input_ids), closed)
    marks = [False] * len(rendered.input_ids)
    for turn in turns:
        marks[turn.start : turn.stop] = [True] * (turn.stop - turn.start)
    return Tokenized(rendered.input_ids, marks, closed)


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


def _texts(
    texts: Mapping[K, tuple[str, str]], tokenizer: Tokenizer, marking: Marking
) -> dict[K, Tokenized]:
    """Prompt and completion as one text, ended by the end token.

    A token across their border belongs to the completion.
    """
    if not texts:
        return {}
    encoded = tokenizer([a + b for a, b in texts.values()], return_offsets_mapping=True)
    done = {}
    for (number, (prompt, _)), ids, offsets in zip(
        texts.items(), encoded["input_ids"], encoded["offset_mapping"]
    ):
        border = len(prompt) if marking.completion_only else 0
        marks = [stop > border for _, stop in offsets] if border else [True] * len(ids)
        ended = marking.end_token is not None and ids[-1:] == [marking.end_token]
        if ended:
            marks[-1] = True
        elif marking.end_token is not None:
            ids, marks = [*ids, marking.end_token], [*marks, True]
        done[number] = Tokenized(ids, marks, marking.end_token is not None)
    return done


def describe_losses(prepared: Any) -> list[str]:
    """What was cut or dropped, in words; nothing when nothing was."""
    lines = [f"{n} rows dropped, {why}" for why, n in prepared.dropped.items()]
    if prepared.cut:
        lines.append(f"{prepared.cut} rows cut at max_length")
    return lines


def marked_text(sample: Sample, tokenizer: Any) -> Iterable[tuple[str, bool]]:
    """The sample's text in runs, each with whether it is trained."""
    at, ids, trained = 0, sample.ids.tolist(), sample.trained.tolist()
    while at < len(ids):
        stop = at
        while stop < len(ids) and trained[stop] == trained[at]:
            stop += 1
        yield tokenizer.decode(ids[at:stop], skip_special_tokens=False), trained[at]
        at = stop
