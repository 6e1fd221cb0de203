"""Which tokens of a rendered chat the model itself would have to write: exact, for any template.

Nothing is searched for in the text, and no `{% generation %}` tags are needed. The template is
rendered again with small changes, and the renders are compared:

* a turn starts where the render of the messages before it, with the generation prompt, ends;
* a message's own text ends where a mark at its end moves what follows;
* what the template writes after that, up to the first special token, closes the turn.

Where a template rewrites what came before (thinking dropped from earlier turns, tools moved to
the last question), the same marks are set in the message before the turn. What cannot be told
with certainty is refused with TemplateError.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from threading import Lock
from typing import Any

from topwork.errors import ConfigError, DataError
from topwork.text.marks import WAYS, Marked, mark_end, mark_start, trailing_blanks
from topwork.text.template import TemplateError, render
from topwork.text.tokenizer import SPECIAL, Tokenizer
from topwork.text.tools import as_tools

Message = Mapping[str, Any]
Edit = tuple[int, int, str]  # what stands in place of characters [start, stop)
MARKS = ("x1", "y2")  # no blanks, no markup, and nowhere the same character
_ENCODING = Lock()


@dataclass(frozen=True)
class Turn:
    """The tokens [start, stop) of assistant message number `message`.

    They run from the first token after the generation prompt through the end-of-turn token
    `terminator`; without one (`closed` is False) through the message's last token.
    """

    message: int
    start: int
    stop: int
    closed: bool
    terminator: int | None


@dataclass(frozen=True)
class Rendered:
    """A whole chat as the model reads it, and the turns that it has to write.

    `edited`: the tokens [start, stop) of each text that was put in another's place.
    """

    text: str
    input_ids: list[int]
    turns: tuple[Turn, ...]
    edited: tuple[tuple[int, int], ...] = ()

    def mask(self) -> list[int]:
        """1 for each token of an assistant turn, else 0."""
        mask = [0] * len(self.input_ids)
        for turn in self.turns:
            mask[turn.start : turn.stop] = [1] * (turn.stop - turn.start)
        return mask


def render_spans(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    chat_template: str | None = None,
    **template_variables: Any,
) -> Rendered:
    """The chat's text and ids, as `apply_chat_template` gives them, with its assistant turns.

    Raises TemplateError when the template refuses the chat, or when a turn's bounds are not
    certain; it says why, and in which message.
    """
    variables = {**template_variables, "tools": tools}
    return render_spans_batch(
        tokenizer, [messages], chat_template=chat_template, variables=[variables]
    )[0]


def render_spans_batch(
    tokenizer: Tokenizer,
    chats: Sequence[Sequence[Message]],
    *,
    chat_template: str | None = None,
    variables: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    refused: dict[int, DataError] | None = None,
    edit: Callable[[int, str], Sequence[Edit]] | None = None,
) -> list[Rendered]:
    """`render_spans` for many chats, tokenized together on all cores.

    `variables` (tools and whatever else the template reads) are one mapping for all chats, or one
    per chat. A row that is refused raises; with a dictionary in `refused`, its error is put there
    under the row's number and the row is left out of the result.

    `edit`: (chat, its rendered text) → what is to stand in the text in other words, in order.
    """
    source = chat_template or tokenizer.chat_template
    if source is None:
        raise ConfigError("this tokenizer has no chat template; pass chat_template")
    if variables is None or isinstance(variables, Mapping):
        variables = [variables or {}] * len(chats)
    if len(variables) != len(chats):
        raise ConfigError(f"{len(chats)} chats, but variables for {len(variables)}")
    special = {n: getattr(tokenizer, n) for n in SPECIAL if getattr(tokenizer, n) is not None}
    now = datetime.now().strftime  # one moment for all renders
    closers = _Closers.of(tokenizer)
    found: list[tuple[int, _Chat, list[_Place]]] = []
    for row, (messages, own) in enumerate(zip(chats, variables)):
        try:
            own = {**own, "tools": as_tools(own.get("tools"))}
            chat = _Chat(source, messages, {"strftime_now": now, **special, **own})
            places = chat.places()
            if edit is not None:
                places = chat.edit(edit(row, chat.text), places)
            found.append((row, chat, places))
        except DataError as error:
            _refuse(row, error, len(chats), refused)
    result = []
    encoded = _encode(tokenizer, [chat.text for _, chat, _ in found])
    for (row, chat, places), (ids, offsets) in zip(found, encoded):
        try:
            result.append(_rendered(tokenizer, chat, places, ids, offsets, closers))
        except TemplateError as error:
            _refuse(row, error, len(chats), refused)
    return result


def _refuse(row: int, error: DataError, rows: int, refused: dict[int, DataError] | None) -> None:
    if refused is not None:
        refused[row] = error
    elif rows == 1:
        raise error
    else:
        raise TemplateError(f"row {row}: {error}") from error


def _encode(
    tokenizer: Tokenizer, texts: list[str]
) -> Iterable[tuple[list[int], list[tuple[int, int]]]]:
    core = tokenizer.core
    with _ENCODING:
        # A post-processor adds nothing here; but byte-level ones trim blanks off the offsets.
        after = core.post_processor
        try:
            core.post_processor = None  # type: ignore[assignment]
            encoded = core.encode_batch(texts, add_special_tokens=False)
        finally:
            if after is not None:
                core.post_processor = after
    return ((one.ids, one.offsets) for one in encoded)


# -- characters ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A turn in the text: it starts at `start`, the message's own text ends at `said`, and up to
    `limit` the template's text still belongs to the turn. If not `certain`, more might."""

    message: int
    start: int
    said: int
    limit: int
    certain: bool


class _Chat:
    """One chat under one template, rendered as often as the questions need."""

    def __init__(self, source: str, messages: Sequence[Message], variables: dict[str, Any]) -> None:
        self.source, self.variables = source, variables
        self.messages = list(messages)
        for i, message in enumerate(self.messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise TemplateError(f"message {i} is not an object with a role: {message!r:.80}")
        self.text = self.draw(self.messages)
        self.edited: list[tuple[int, int]] = []

    def draw(self, messages: Sequence[Message], prompt: bool = False) -> str:
        return render(self.source, messages, add_generation_prompt=prompt, **self.variables)

    def edit(self, edits: Sequence[Edit], places: list[_Place]) -> list[_Place]:
        """`places` once the text is edited."""
        move = partial(moved, edits)
        self.text, self.edited = apply(edits, self.text)
        return [
            replace(p, start=move(p.start), said=move(p.said), limit=move(p.limit)) for p in places
        ]

    def places(self) -> list[_Place]:
        own = [i for i, m in enumerate(self.messages) if m.get("role") == "assistant"]
        ends = self._ends_together(own)
        places: list[_Place] = []
        for n, i in enumerate(own):
            said = ends[n] if ends else len(self.text) - len(self._after(self.messages, i))
            start = self._start(i)
            last = places[-1].said if places else 0
            if not last <= start <= said:
                raise TemplateError(
                    f"message {i}: the template moves it: it starts at character {start}, "
                    f"ends at {said}, and the turn before ends at {last}"
                )
            places.append(_Place(i, start, said, *self._limit(i, said)))
        return places

    def _ends_together(self, own: list[int]) -> list[int] | None:
        """Where each of the messages `own` ends, from two renders for all of them; None when they
        do not answer that."""
        first, second = (self._marked(self.messages, own, mark) for mark in MARKS)
        if not (first.exact and second.exact):
            return None
        try:
            a, b = self.draw(first.messages), self.draw(second.messages)
        except TemplateError:
            return None
        size = len(MARKS[0])
        ends, pieces, at = [], [], 0
        while (gap := _agree(a, b, at)) < min(len(a), len(b)):
            if (a[gap : gap + size], b[gap : gap + size]) != MARKS:
                return None
            pieces.append(a[at:gap])
            ends.append(gap - size * len(ends))
            at = gap + size
        pieces.append(a[at:])
        whole = len(a) == len(b) and len(ends) == len(own) and "".join(pieces) == self.text
        return ends if whole else None

    def _marked(self, messages: Sequence[Message], own: list[int], mark: str) -> Marked:
        changed, exact = list(messages), True
        for i in own:
            changed[i], sure = mark_end(messages[i], mark)
            exact = exact and sure
        return Marked(changed, exact)

    def _after(self, messages: Sequence[Message], i: int, prompt: bool = False) -> str:
        """What stands behind the own text of message `i` in the render of `messages`."""
        base, written = self.draw(messages, prompt), False
        for way in WAYS:
            (one, exact), (two, _) = (mark_end(messages[i], m, way) for m in MARKS)
            a, b = (self.draw([*messages[:i], m, *messages[i + 1 :]], prompt) for m in (one, two))
            if a == b:
                continue  # the template does not write what was marked
            written = True
            head, tail = _agree(a, b), _agree_at_end(a, b)
            if head + len(MARKS[0]) + tail != len(a) or len(a) != len(b):
                continue
            if not exact:
                return base[len(base) - min(tail, _agree_at_end(a, base)) :]
            if base == a[:head] + a[head + len(MARKS[0]) :]:
                return base[head:]
        if not written:
            raise TemplateError(f"message {i}: the template does not write its content")
        raise TemplateError(f"message {i}: the template writes more than one text from its content")

    def _limit(self, i: int, said: int) -> tuple[int, bool]:
        """Up to where what follows message `i` still belongs to it, and whether that is all."""
        if i + 1 == len(self.messages):
            return len(self.text), True
        until = self.messages[: i + 1]
        alone = self.draw(until)
        if self.text.startswith(alone) and len(alone) >= said:
            return len(alone), True
        # A template may close the last message in another way; before a prompt none is the last.
        here = self.text[said:].lstrip()
        blanks = len(self.text) - said - len(here)  # some templates keep an answer's only there
        try:
            header, closing = self._header(i), self._after(until, i, prompt=True)
            tail = closing[: len(closing) - len(header)].lstrip()
            if closing.endswith(header) and here.startswith(tail):
                return said + blanks + len(tail), True
        except TemplateError:
            pass
        return said + blanks + _agree(self._after(until, i).lstrip(), here), False

    def _header(self, i: int) -> str:
        """The generation prompt alone, seen behind the last question before message `i`."""
        asked = [k for k in range(1, i + 1) if self.messages[k - 1]["role"] != "assistant"]
        before = self.messages[: asked[-1]] if asked else [{"role": "user", "content": MARKS[0]}]
        plain, prompt = self.draw(before), self.draw(before, prompt=True)
        return prompt[_agree(plain, prompt) :]

    def _start(self, i: int) -> int:
        """Where the model takes over: behind the generation prompt of message `i`."""
        before = self.messages[:i]
        try:
            prompt = self.draw(before, prompt=True)
        except TemplateError:
            return self._start_by_header(i)
        if self.text.startswith(prompt):
            return len(prompt)
        # The template writes the messages before differently now: compare from the end of the
        # last one that it still shows.
        for j in range(i - 1, -1, -1):
            try:
                given, here = self._after(before, j, prompt=True), self._after(self.messages, j)
            except TemplateError:
                continue
            origin = len(self.text) - len(here)
            if here.startswith(given):
                return origin + len(given)
            # The prompt writes more than history keeps, such as an empty thought.
            for begin in self._begins(i):
                if begin >= origin and given.startswith(self.text[origin:begin]):
                    return begin
            break
        raise TemplateError(
            f"message {i}: its turn does not begin with what the generation prompt writes, "
            "so where the model takes over is not certain"
        )

    def _start_by_header(self, i: int) -> int:
        """For a chat whose beginning alone the template refuses: the prompt from another one."""
        try:
            header = self._header(0)
        except TemplateError:
            header = ""
        for begin in self._begins(i):
            if header and self.text[:begin].endswith(header):
                return begin
        raise TemplateError(
            f"message {i}: the template cannot write the messages before it alone, "
            "so where the model takes over is not certain"
        )

    def _begins(self, i: int) -> Iterator[int]:
        """Where the own text of message `i` may begin."""
        before, after = self.messages[:i], self.messages[i + 1 :]
        for whole in (False, True):
            a, b = (
                self.draw([*before, mark_start(self.messages[i], m, whole), *after]) for m in MARKS
            )
            head = _agree(a, b)
            if a != b and self.text.startswith(a[:head]):
                yield head


def apply(edits: Sequence[Edit], text: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` after `edits`, and where what stands in place of something is in it."""
    pieces, at, places = [], 0, []
    for start, stop, new in edits:
        pieces += [text[at:start], new]
        at = stop
        if start < stop:
            begin = moved(edits, start)
            places.append((begin, begin + len(new)))
    return "".join([*pieces, text[at:]]), places


def moved(edits: Sequence[Edit], at: int) -> int:
    """Where character `at`, between `edits`, is after them."""
    return at + sum(len(new) - (stop - start) for start, stop, new in edits if stop <= at)


def _agree(a: str, b: str, at: int = 0) -> int:
    """The first position from `at` on where `a` and `b` differ."""
    size, step = min(len(a), len(b)), 64
    while at < size:
        high = min(at + step, size)
        if a[at:high] == b[at:high]:
            at, step = high, step * 2
            continue
        while high - at > 1:
            middle = (at + high) // 2
            if a[at:middle] == b[at:middle]:
                at = middle
            else:
                high = middle
        return at
    return size


def _agree_at_end(a: str, b: str) -> int:
    """How many characters at the ends of `a` and `b` are the same."""
    return _agree(a[::-1], b[::-1])


# -- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Closers:
    """The ids that may end a turn: special ones; where there are none, other added ones."""

    special: frozenset[int]
    added: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Closers:
        eos = tokenizer.eos_token_id
        special = {*tokenizer.all_special_ids, *([] if eos is None else [eos])}
        return cls(frozenset(special), frozenset(tokenizer.core.get_added_tokens_decoder()))


def _rendered(
    tokenizer: Tokenizer,
    chat: _Chat,
    places: list[_Place],
    ids: list[int],
    offsets: list[tuple[int, int]],
    closers: _Closers,
) -> Rendered:
    begins, ends = [b for b, _ in offsets], [e for _, e in offsets]
    turns = []
    for place in places:
        start = bisect_right(ends, place.start)
        if start < len(ids) and begins[start] < place.start:
            swallowed = chat.text[place.start : ends[start]]
            if ids[start] not in closers.added or not swallowed.isspace():
                piece = chat.text[begins[start] : ends[start]]
                raise TemplateError(
                    f"message {place.message}: the token {piece!r} lies across the turn's start, "
                    "so training would show other tokens than the generation prompt does"
                )
            start += 1  # a header token that takes the blanks behind it along
        tail = [
            k
            for k in range(bisect_right(ends, place.said), bisect_left(begins, place.limit))
            if begins[k] + len(chat.text[begins[k] : ends[k]].rstrip()) <= place.limit
        ]
        stop = _terminator(tokenizer, chat, place.message, [(k, ids[k]) for k in tail], closers)
        if stop is not None:
            turns.append(Turn(place.message, start, stop + 1, True, ids[stop]))
            continue
        if not place.certain:
            raise TemplateError(f"message {place.message}: what ends its turn is not certain")
        message, said = chat.messages[place.message], place.said
        if message.get("tool_calls"):  # what closes the calls is said, too
            said += len(chat.text[said : place.limit].rstrip())
        elif chat.text.startswith(blanks := trailing_blanks(message), said):
            said += len(blanks)
        stop = max(start, bisect_left(begins, said))
        turns.append(Turn(place.message, start, stop, False, None))
    edited = ((bisect_right(ends, a), bisect_left(begins, b)) for a, b in chat.edited)
    return Rendered(chat.text, ids, tuple(turns), tuple(edited))


def _terminator(
    tokenizer: Tokenizer, chat: _Chat, i: int, tail: list[tuple[int, int]], closers: _Closers
) -> int | None:
    """The index of the token in `tail` that ends the turn of message `i`, if one does."""
    special = [(k, token) for k, token in tail if token in closers.special]
    if not chat.messages[i].get("tool_calls"):
        special = special or [(k, token) for k, token in tail if token in closers.added]
        return special[0][0] if special else None
    if len(special) < 2:
        return special[0][0] if special else None
    # Some templates close the calls with special tokens of their own, before the turn's end.
    plain = [*chat.messages[:i], {"role": "assistant", "content": MARKS[0]}]
    try:
        ((after, _),) = _encode(tokenizer, [chat._after(plain, i)])
        usual = next((token for token in after if token in closers.special), None)
    except TemplateError:
        usual = None
    for wanted in (usual, tokenizer.eos_token_id):
        for k, token in special:
            if token == wanted:
                return k
    names = [tokenizer.convert_ids_to_tokens(token) for _, token in special]
    raise TemplateError(f"message {i}: which of {names} ends its turn is not certain")
