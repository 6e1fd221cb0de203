"""What a run shows while it goes: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from topwork.training.plan import resident_memory, size


def console() -> Console:
    """Reports go to stderr, so that a program's own output stays clean."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


class Show:
    """The bar of one run; every method is silent when `quiet`."""

    def __init__(self, total: int, done: int, quiet: bool) -> None:
        self.console = console()
        self.quiet = quiet
        self.facts = ""
        self.bar: Progress | None = None
        self.total, self.done = total, done

    def __enter__(self) -> Self:
        if not self.quiet and self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                TextColumn("{task.fields[facts]}"), console=self.console,
            )  # fmt: skip
            self.task = self.bar.add_task("", total=self.total, completed=self.done, facts="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self.bar is not None:
            self.bar.stop()

    def step(self, done: int, loss: float, rate: float) -> None:
        if self.bar is not None:
            facts = f"loss {loss:.4f}  {rate:,.0f} tok/s  {size(resident_memory())}"
            self.bar.update(self.task, completed=done, facts=facts)

    def log(self, entry: dict[str, Any]) -> None:
        """One line of figures."""
        if self.quiet:
            return
        shown = {k: v for k, v in entry.items() if k not in ("step", "epoch")}
        figures = "  ".join(f"{k} {_short(v)}" for k, v in shown.items())
        self.console.print(f"step {entry['step']} (epoch {entry['epoch']:.2f})  {figures}")

    def lines(self, lines: Sequence[str]) -> None:
        if not self.quiet:
            for line in lines:
                self.console.print(line, markup=False)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
