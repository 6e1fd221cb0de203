"""From the ids that Whisper made of a sound, window by window, to one text with its times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from topwork.text.languages import LANGUAGES
from topwork.text.whisper import WINDOW, WhisperTokenizer

Moment = tuple[float, float]  # seconds at which a token begins and ends
UNSPACED = {"chinese", "japanese", "thai", "lao", "myanmar", "cantonese"}
OPENING, CLOSING = "\"'“¡¿([{-", "\"'.。,，!！?？:：”)]}、"
SIGNS = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"


@dataclass(frozen=True)
class Said:
    """What was made of one window: ids, for words the second at which each ends, and `stride`,
    (length, left, right) in seconds, where windows overlap."""

    tokens: list[int]
    moments: list[float] | None = None
    stride: tuple[float, float, float] | None = None


@dataclass
class Part:
    """One part of the text under way."""

    language: str | None
    start: float | None = None
    end: float | None = None
    text: str = ""
    words: list[dict[str, Any]] = field(default_factory=list)


class Writer:
    """Reads windows in order and joins them: what two of them both heard is written once.

    `step`: seconds between two time tokens. `timed`: whether time tokens cut the text; `words`:
    whether each word gets its times.
    """

    def __init__(self, tokenizer: WhisperTokenizer, step: float, timed: bool, words: bool) -> None:
        self.tokenizer, self.step, self.timed, self.by_word = tokenizer, step, timed, words
        self.first = tokenizer.first_time
        self.special = set(tokenizer.all_special_ids)
        self.language: str | None = None
        self.parts: list[Part] = []
        self.part = Part(None)
        self.held: list[list[int]] = []  # what the windows said since the last part was closed
        self.held_moments: list[list[Moment]] = []
        self.offset = 0.0
        self.skipping = False

    def read(self, said: Said) -> None:
        """One window more."""
        ids = self.tokenizer.without_prompt(said.tokens)
        begin, last = self._edges(said, ids)
        now = past = before = 0.0
        tokens: list[int] = []
        moments: list[Moment] = []
        for i, token in enumerate(ids):
            if token in self.special:
                if self._hear_language(token, tokens):
                    tokens = []
            elif token >= self.first:
                time = (token - self.first) * self.step
                if time < now:  # one window's text may itself be of several
                    pair = ids[i - 1] >= self.first and ids[i - 2] >= self.first
                    if i >= 2 and not pair:
                        past += self.step * WINDOW
                    else:
                        now, past = before, past + before
                before, now = now, time
                if self._time(token, time + self.offset + past, begin, last, tokens, moments):
                    tokens, moments = [], []
            else:
                tokens.append(token)
                if said.moments is not None:
                    start = said.moments[i - 1] if i else 0.0
                    ends = round(start + self.offset, 2), round(said.moments[i] + self.offset, 2)
                    moments.append(ends)
        if said.stride is not None:
            self.offset += said.stride[0] - said.stride[2]
        if tokens:
            self.held.append(tokens)
            self.held_moments.append(moments)
        elif not any(self.held):
            self._begin()

    def _edges(self, said: Said, ids: list[int]) -> tuple[float, int | None]:
        """The first time token that is not of the overlap on the left, and the one from which on
        they are of the right."""
        if said.stride is None:
            return self.first, None
        length, left, right = said.stride
        self.offset -= left
        last = None
        if right:
            for token in reversed([t for t in ids if t >= self.first]):
                if last is not None and (token - self.first) * self.step < length - right:
                    break
                last = token
        return (left / self.step + self.first if left else self.first), last

    def _hear_language(self, token: int, tokens: list[int]) -> bool:
        """Whether a change of language ends the part, which `tokens` belong to."""
        name = LANGUAGES.get(str(self.tokenizer.core.id_to_token(token))[2:-2])
        if name is None:
            return False
        ends = self.language is not None and name != self.language and not self.timed
        if ends:
            self.held.append(tokens)
            self._close()
        self.part.language = self.language = name
        return ends

    def _time(
        self, token: int, time: float, begin: float, last: int | None, tokens: list[int],
        moments: list[Moment],
    ) -> bool:  # fmt: skip
        """Whether a time ends the part, which `tokens` belong to."""
        time = round(time, 2)
        if last is not None and token >= last:
            self.skipping = True  # of the overlap: the next window tells
        elif self.skipping or (self.held and token < begin):
            self.skipping = False
        elif self.part.start is None:
            self.part.start = time
        elif time != self.part.start:
            self.part.end = time
            self.held.append(tokens)
            self.held_moments.append(moments)
            self._close()
            return True
        return False

    def _close(self) -> None:
        tokens, moments = joined(self.held, self.held_moments if self.by_word else None)
        self.part.text = self.tokenizer.decode(tokens)
        if self.by_word:
            language = self.language or self.tokenizer.language or "english"
            self.part.words = [
                {"text": text, "timestamp": (moments[at[0]][0], moments[at[-1]][1]),
                 "language": self.language}
                for text, at in words_of(self.tokenizer, tokens, language)
            ]  # fmt: skip
        self.parts.append(self.part)
        self._begin()

    def _begin(self) -> None:
        self.part, self.held, self.held_moments = Part(self.language), [], []

    def finish(self, language: bool) -> dict[str, Any]:
        """{"text"}, with {"chunks": [{"text", "timestamp", "language"}]} where asked for."""
        if self.held:
            self._close()
        found: dict[str, Any] = {"text": "".join(part.text for part in self.parts)}
        chunks: list[dict[str, Any]] = []
        for part in self.parts:
            if self.by_word:
                chunks += part.words
            else:
                times = {"timestamp": (part.start, part.end)} if self.timed else {}
                chunks.append({"language": part.language, **times, "text": part.text})
        if not language:
            for chunk in chunks:
                chunk.pop("language")
        return {**found, "chunks": chunks} if self.timed or language else found


def joined(
    rows: Sequence[list[int]], moments: Sequence[list[Moment]] | None = None
) -> tuple[list[int], list[Moment]]:
    """Rows that overlap as one: each is laid on the last where most of their ids agree.

    Left of an overlap's middle the earlier row counts, right of it the later one.
    """
    left, times = rows[0], moments[0] if moments else []
    total: list[int] = []
    all_times: list[Moment] = []
    for n, right in enumerate(rows[1:], 1):
        best, where = 0.0, (len(left), len(left), 0, 0)
        for shift in range(1, len(left) + len(right)):
            a, b = max(0, len(left) - shift), min(len(left), len(left) + len(right) - shift)
            c, d = max(0, shift - len(left)), min(len(right), shift)
            matches = sum(
                x == y and (not moments or times[a + k] <= moments[n][c + k])
                for k, (x, y) in enumerate(zip(left[a:b], right[c:d]))
            )
            score = matches / shift + shift / 10000  # long overlaps before short ones
            if matches > 1 and score > best:
                best, where = score, (a, b, c, d)
        cut, go_on = (where[0] + where[1]) // 2, (where[2] + where[3]) // 2
        total += left[:cut]
        left = right[go_on:]
        if moments:
            all_times += times[:cut]
            times = moments[n][go_on:]
    return total + left, all_times + times


def words_of(
    tokenizer: WhisperTokenizer, tokens: list[int], language: str
) -> list[tuple[str, list[int]]]:
    """The words of `tokens`, each with the places of its tokens; signs go with their words."""
    words = _characters(tokenizer, tokens)
    if language not in UNSPACED:
        merged: list[tuple[str, list[int]]] = []
        end = tokenizer.number(str(tokenizer.eos_token))
        for text, at in words:
            begins = tokens[at[0]] >= end or text.startswith(" ") or text.strip() in SIGNS
            if begins or not merged:
                merged.append((text, at))
            else:
                merged[-1] = (merged[-1][0] + text, merged[-1][1] + at)
        words = merged
    return _with_signs(words)


def _characters(tokenizer: WhisperTokenizer, tokens: list[int]) -> list[tuple[str, list[int]]]:
    """The shortest runs of tokens that are whole characters."""
    whole, broken = tokenizer.decode(tokens, decode_with_timestamps=True), "\ufffd"
    found: list[tuple[str, list[int]]] = []
    run: list[int] = []
    at = 0
    for place in range(len(tokens)):
        run.append(place)
        text = tokenizer.decode([tokens[i] for i in run], decode_with_timestamps=True)
        where = at + text.find(broken)
        if broken not in text or where >= len(whole) or whole[where] == broken:
            found.append((text, run))
            at, run = at + len(text), []
    return found


def _with_signs(words: list[tuple[str, list[int]]]) -> list[tuple[str, list[int]]]:
    """Opening signs join the word behind them, closing ones the word before."""
    texts, places = [text for text, _ in words], [at for _, at in words]
    after = len(words) - 1
    for i in range(len(words) - 2, -1, -1):
        if texts[i].startswith(" ") and texts[i].strip() in OPENING:
            texts[after], places[after] = texts[i] + texts[after], places[i] + places[after]
            texts[i], places[i] = "", []
        else:
            after = i
    before = 0
    for i in range(1, len(words)):
        if not texts[before].endswith(" ") and texts[i] in CLOSING:
            texts[before], places[before] = texts[before] + texts[i], places[before] + places[i]
            texts[i], places[i] = "", []
        else:
            before = i
    return [(text, at) for text, at in zip(texts, places) if text]
