"""From judged rows to tokens: a shared prompt once, its answers after it; lost rows are counted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from topwork.data.formats import Example, Format, recognise
from topwork.data.groups import Group, shifted
from topwork.data.preferences import Answered
from topwork.data.prepare import Marking, Prepared, Sample, Tokenized, fitted, refuse, tokenize
from topwork.data.rows import Row
from topwork.errors import DataError
from topwork.media.images import image_facts
from topwork.media.placed import Placed, Placer
from topwork.text import Tokenizer


@dataclass(frozen=True)
class Rated(Group):
    """A group with what its row says of the answers: the margin of a pair, the label of one.

    `reference`: log-probabilities of the answers under another model, where they are known.
    """

    value: float | None = None
    reference: tuple[float, ...] | None = None

    @property
    def supervised(self) -> int:
        first = 0 if len(self.prompt) else 1
        return sum(int(a.trained[first:].sum()) for a in self.answers)

    def facts(self) -> Iterable[bytes]:
        """All that trains, for a digest."""
        yield self.prompt.tobytes() + repr(self.value).encode()
        for answer in self.answers:
            yield answer.ids.tobytes() + b"|" + answer.trained.tobytes()
        yield from (image_facts(image.source) for image in self.images)


class PreparedAnswers(Prepared[Rated]):
    """The groups of a data set and what became of each row."""

    @property
    def answers(self) -> int:
        return sum(len(s.answers) for s in self.samples)

    @property
    def apart(self) -> int:
        """Tokens if every answer carried its prompt."""
        return sum(s.apart for s in self.samples)


def prepare_answers(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    marking: Marking,
    known: Sequence[Format],
    whole: bool = False,
    placer: Placer | None = None,
) -> PreparedAnswers:
    """All `rows`, in one of the `known` formats, as groups of a prompt and its answers.

    An answer ends with its last trained token, and is cut at `marking.max_length`; with `whole`
    (for what reads an answer's end) it keeps everything, and longer rows are dropped. `placer`
    writes the images of rows that have some. DataError names the rows that cannot be used, or says
    why none is left.
    """
    found = recognise(rows, known=known)
    bad: dict[int, DataError] = {}
    parts: dict[tuple[int, int], Example] = {}
    values: dict[int, float | None] = {}
    for number, row in enumerate(rows):
        try:
            answered: Answered = found.read(row)
            for k, example in enumerate(answered.examples()):
                parts[number, k] = fitted(example, tokenizer, placer)
            values[number] = answered.value
        except DataError as error:
            bad[number] = error
    refused: dict[tuple[int, int], DataError] = {}
    tokenized = tokenize(parts, tokenizer, marking, refused, placer)
    bad |= {number: error for (number, _), error in refused.items()}
    refuse(bad, len(rows))
    prepared = PreparedAnswers([], found.name, len(rows))
    own: dict[int, list[Tokenized]] = {number: [] for number in values}
    for number, k in parts:
        own[number].append(tokenized[number, k])
    for number, answers in own.items():
        value = values[number]
        _add(prepared, number, answers, value, marking.max_length, whole)
    if not prepared.samples:
        why = ", ".join(f"{n} {reason}" for reason, n in prepared.dropped.items())
        raise DataError(f"no row is left of {len(rows)} in the {found.name} format: {why}")
    return prepared


def _add(
    prepared: PreparedAnswers, number: int, answers: Sequence[Tokenized], value: float | None,
    limit: int | None, whole: bool,
) -> None:  # fmt: skip
    """Count the row's answers, and keep them unless they are lost."""
    longest = max(len(a.ids) for a in answers)
    if whole and limit is not None and longest > limit:
        prepared.dropped[f"longer than max_length={limit}"] += 1
        return
    if limit is not None and any(a.images and a.images[-1].stop > limit for a in answers):
        prepared.dropped[f"whose images do not fit in max_length={limit}"] += 1
        return
    ids = [np.asarray(a.ids, np.int32) for a in answers]
    marks = [np.asarray(a.trained, np.bool_) for a in answers]
    if not whole:
        if not all(m.any() for m in marks):
            prepared.dropped["without a trained token in an answer"] += 1
            return
        stops = [int(np.flatnonzero(m)[-1]) + 1 for m in marks]
        ids = [i[:stop][:limit] for i, stop in zip(ids, stops)]
        marks = [m[: len(i)] for m, i in zip(marks, ids)]
        cut = [len(i) < stop for i, stop in zip(ids, stops)]
        if not all(m[1:].any() for m in marks):
            beyond = f"with an answer that lies beyond max_length={limit}"
            prepared.dropped[beyond if any(cut) else "without a trained token in an answer"] += 1
            return
    else:
        cut = [False] * len(ids)
    images = [[p for p in a.images if p.stop <= len(i)] for a, i in zip(answers, ids)]
    sources = [[id(p.source) for p in own] for own in images]
    if len(ids) > 1 and np.array_equal(ids[0], ids[1]) and sources[0] == sources[1]:
        prepared.dropped["whose answers are the same tokens"] += 1
        return
    shared = _outside(_shared(ids, marks, whole), images)
    prepared.cut += any(cut)
    prepared.unterminated += sum(c or not a.closed for c, a in zip(cut, answers))
    prepared.samples.append(
        Rated(
            number,
            ids[0][:shared],
            tuple(
                Sample(number, i[shared:], m[shared:], images=_beyond(own, shared))
                for i, m, own in zip(ids, marks, images)
            ),
            value,
            prompt_images=tuple(p for p in images[0] if p.stop <= shared),
        )
    )


def _outside(shared: int, images: Sequence[Sequence[Placed]]) -> int:
    """At most `shared`: no image is cut there, and all before it are everyone's."""
    for k, image in enumerate(images[0]):
        same = all(
            k < len(own) and own[k].start == image.start and own[k].source is image.source
            for own in images
        )
        if image.start < shared and not (same and image.stop <= shared):
            return image.start
    firsts = [own[len(images[0])].start for own in images if len(own) > len(images[0])]
    return min([shared, *firsts])


def _beyond(images: Sequence[Placed], shared: int) -> tuple[Placed, ...]:
    """The images behind the first `shared` tokens, counted from there."""
    return tuple(shifted(p, -shared) for p in images if p.start >= shared)


def _shared(ids: Sequence[np.ndarray], marks: Sequence[np.ndarray], whole: bool) -> int:
    """Tokens that all answers begin with and that none of them trains."""
    size = min(len(i) - 1 for i in ids)
    if not whole:
        size = min(size, *(int(m.argmax()) for m in marks))
    heads = np.stack([i[:size] for i in ids])
    apart = np.flatnonzero((heads != heads[0]).any(0))
    return int(apart[0]) if len(apart) else size


def unpaired(prepared: PreparedAnswers) -> PreparedAnswers:
    """Each answer as a sample of its own: of a pair the first is good (1), the second bad (0)."""
    singles = [
        replace(s, answers=(answer,), value=s.value if len(s.answers) == 1 else 1.0 - k)
        for s in prepared.samples
        for k, answer in enumerate(s.answers)
    ]
    return PreparedAnswers(
        singles, prepared.format, prepared.rows, prepared.cut, prepared.dropped,
        prepared.unterminated,
    )  # fmt: skip
