"""Text while it is being made: printed, or handed to another thread."""

from __future__ import annotations

from collections.abc import Iterator
from queue import Queue
from typing import Any

from topwork.errors import ConfigError

HALF = "\ufffd"  # what bytes are decoded to that make no character, or none yet


class TextStreamer:
    """Prints the text of one row as its tokens come, never half a character.

    `skip_prompt` leaves the prompt out; `decode_kwargs` go to `tokenizer.decode`
    (`skip_special_tokens=True`). Override `on_finalized_text` to send the text elsewhere.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.decode_kwargs = decode_kwargs
        self._restart()

    def _restart(self) -> None:
        self._at_prompt = True
        self._ids: list[int] = []
        self._shown = 0  # of these, the first ones whose text is out

    def put(self, value: Any) -> None:
        """The prompt's ids [1, T] at first, then each new one [1]."""
        if value.ndim > 1:
            if value.shape[0] > 1:
                raise ConfigError(f"a text streamer takes one row, not {value.shape[0]}")
            value = value[0]
        elif value.ndim == 1 and len(value) > 1 and not self._at_prompt:
            raise ConfigError(f"a text streamer takes one row, not {len(value)}")
        at_prompt, self._at_prompt = self._at_prompt, False
        if at_prompt and self.skip_prompt:
            return
        self._ids += value.tolist()
        old, new = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        if len(new) > len(old) and not new.endswith(HALF):
            # The next text is decoded from here on: a first token may lose its blank.
            self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
            self.on_finalized_text(new[len(old) :])

    def end(self) -> None:
        """The rest of the text, and a line break."""
        old, new = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        self._restart()
        self.on_finalized_text(new[len(old) :], stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Takes each piece of text; `stream_end` with the last one."""
        print(text, flush=True, end="\n" if stream_end else "")

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, **self.decode_kwargs) if ids else ""


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for `generate` in another thread.

    `timeout` in seconds: how long the next text is waited for, then `queue.Empty` is raised.
    """

    def __init__(
        self,
        tokenizer: Any,
        skip_prompt: bool = False,
        timeout: float | None = None,
        **decode_kwargs: Any,
    ) -> None:
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: Queue[str | None] = Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Puts `text` into the queue, and None behind the last one."""
        if text:
            self.text_queue.put(text)
        if stream_end:
            self.text_queue.put(None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        text = self.text_queue.get(timeout=self.timeout)
        if text is None:
            raise StopIteration
        return text
