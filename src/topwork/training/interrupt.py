"""Ctrl-C and SIGTERM ask a run to save and stop at the next safe point; a second Ctrl-C ends it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """A context in which the two signals are noted instead of ending the process."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def end(self, message: str) -> None:
        """Leave as the signal would have it: KeyboardInterrupt, or SystemExit(143)."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(143)
