"""A loss curve as an SVG file: axes, the training curve and the evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, MARGIN = 720, 360, 48
COLOURS = {"loss": "#2a6f97", "eval_loss": "#c1121f"}
Point = tuple[float, float]


def plot_losses(history: Sequence[dict[str, Any]], path: Path, title: str = "loss") -> None:
    """Write the curves of `history` (a state's `log_history`) to `path`; nothing for no point."""
    curves = {
        name: [(float(e["step"]), float(e[name])) for e in history if name in e] for name in COLOURS
    }
    points = [p for curve in curves.values() for p in curve]
    if points:
        path.write_text(_svg(curves, points, title), encoding="utf-8")


def _svg(curves: dict[str, list[Point]], points: list[Point], title: str) -> str:
    right = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + 1.0

    def place(x: float, y: float) -> Point:
        across = MARGIN + x / right * (WIDTH - 2 * MARGIN)
        return across, HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="20" text-anchor="middle" font-size="14">{escape(title)}</text>',
    ]
    for i in range(5):
        y = low + (high - low) * i / 4
        _, down = place(0, y)
        parts.append(
            f'<path d="M{MARGIN} {down:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>'
            f'<text x="{MARGIN - 6}" y="{down + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        )
        across, _ = place(right * i / 4, low)
        parts.append(
            f'<text x="{across:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">'
            f"{right * i / 4:.0f}</text>"
        )
    for row, (name, curve) in enumerate((n, c) for n, c in curves.items() if c):
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*p) for p in curve))
        colour = COLOURS[name]
        parts.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            f'<text x="{WIDTH - MARGIN}" y="{MARGIN + 16 * row}" text-anchor="end" '
            f'fill="{colour}">{name}</text>'
        )
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 8}" text-anchor="middle">step</text></svg>')
    return "\n".join(parts) + "\n"
