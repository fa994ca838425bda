"""Line charts as SVG text, drawn once, without any library in the page."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 260  # of the drawing's own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 12, 34
MOST_POINTS = 400

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve: a run's name, its number (which picks the colour), and its (x, y) points by rising x."""

    name: str
    number: int
    points: Points


def line_chart(title: str, lines: list[Line], *, marks: list[tuple[float, str]] = ()) -> str:
    """A <figure>; empty text when no line has a point. `marks` are (x, what happened there)."""
    lines = [Line(line.name, line.number, thin(line.points)) for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    x_low, x_high = (0.0, max(xs) or 1.0)
    y_ticks = ticks(min(ys), max(ys))
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in ticks(x_low, x_high):
        if x <= x_high:
            parts.append(
                f'<text class="tick" x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{short(x)}</text>'
            )
    for x, text in marks:
        if x_low <= x <= x_high:
            parts.append(
                f'<line class="mark" x1="{px(x):.1f}" x2="{px(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
                f"<title>{escape(text)}</title></line>"
            )
    for line in lines:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line.points)
        data = " ".join(f"{px(x):.1f},{x:.6g},{y:.6g}" for x, y in line.points)
        colour = f"c{line.number % 8}"
        name = escape(line.name, quote=True)
        parts.append(f'<polyline class="curve {colour}" points="{path}" data-name="{name}" data-points="{data}"/>')
        if len(line.points) <= 40:
            parts += [
                f'<circle class="dot {colour}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5"/>' for x, y in line.points
            ]
    last = [f"{line.name} {short(line.points[-1][1])}" for line in lines]
    legend = " ".join(
        f'<span class="c{line.number % 8}">{escape(text)}</span>' for line, text in zip(lines, last, strict=True)
    )
    label = escape(f"{title}: {', '.join(last)}", quote=True)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="last">{legend}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}"
        f'<text class="axis" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">samples</text></svg></figure>'
    )


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points: of each stretch the lowest and the highest stay, so that no spike is lost."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that cover [low, high]."""
    if low == high == 0:
        high = 1.0
    elif high <= low:
        low, high = low - abs(low) * 0.1, high + abs(low) * 0.1
    raw = (high - low) / about
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short(value: float) -> str:
    """`1.2M`, `48k`, `0.031`, `3e-05`."""
    size = abs(value)
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.4g}{unit}"
    return f"{value:.4g}"
