"""Curves as SVG: axes, one line for each name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 560, 260, 48
COLOURS = ("#2a6f97", "#c1121f", "#588157", "#bc6c25", "#6a4c93", "#495057")
Point = tuple[float, float]


def curves_svg(curves: Mapping[str, Sequence[Point]], title: str) -> str:
    """An SVG element with the points (step, value) of each curve joined; empty for no point."""
    points = [p for curve in curves.values() for p in curve]
    if not points:
        return ""
    right = max(x for x, _ in points) or 1.0
    low, high = min(y for _, y in points), max(y for _, y in points)
    high = high if high > low else low + (abs(low) or 1.0)

    def place(x: float, y: float) -> Point:
        across = MARGIN + x / right * (WIDTH - 2 * MARGIN)
        return across, HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN)

    parts = [_head(title)]
    for i in range(5):
        y = low + (high - low) * i / 4
        _, down = place(0, y)
        parts.append(
            f'<path d="M{MARGIN} {down:.1f}H{WIDTH - MARGIN}" stroke="#ddd"/>'
            f'<text x="{MARGIN - 6}" y="{down + 4:.1f}" text-anchor="end">{y:.3g}</text>'
        )
        across, _ = place(right * i / 4, low)
        parts.append(
            f'<text x="{across:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">'
            f"{right * i / 4:.0f}</text>"
        )
    for row, (name, curve) in enumerate((n, c) for n, c in curves.items() if c):
        parts.append(_line([place(*p) for p in curve], name, COLOURS[row % len(COLOURS)], row))
    parts.append("</svg>")
    return "\n".join(parts)


def _head(title: str) -> str:
    """How a chart begins."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="sans-serif" font-size="11">\n'
        f'<text x="{WIDTH / 2}" y="18" text-anchor="middle" font-size="13">{escape(title)}</text>'
    )


def _line(places: Sequence[Point], name: str, colour: str, row: int) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2"/>' for x, y in places[:60])
    return (
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        f'<g fill="{colour}">{dots if len(places) <= 60 else ""}'
        f'<text x="{WIDTH - MARGIN}" y="{MARGIN - 12 + 14 * row}" text-anchor="end">'
        f"{escape(name)}</text></g>"
    )


def bars_svg(counts: Sequence[int], edges: Sequence[float], title: str) -> str:
    """A histogram: `counts` between neighbouring `edges`."""
    top, step = max(max(counts), 1), (WIDTH - 2 * MARGIN) / len(counts)
    parts = [_head(title)]
    for i, count in enumerate(counts):
        tall = (HEIGHT - 2 * MARGIN) * count / top
        left = MARGIN + i * step
        parts.append(
            f'<rect x="{left:.1f}" y="{HEIGHT - MARGIN - tall:.1f}" width="{step - 1:.1f}" '
            f'height="{tall:.1f}" fill="{COLOURS[0]}"><title>{edges[i]:.0f} to '
            f"{edges[i + 1]:.0f}: {count:,}</title></rect>"
        )
    for at in (0, len(counts) // 2, len(counts)):
        parts.append(
            f'<text x="{MARGIN + at * step:.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">'
            f"{edges[at]:,.0f}</text>"
        )
    parts.append(f'<text x="{MARGIN - 6}" y="{MARGIN + 4}" text-anchor="end">{top:,}</text></svg>')
    return "\n".join(parts)
