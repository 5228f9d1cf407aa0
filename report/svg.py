"""Curves as inline SVG, coloured by the style sheet of the page around them."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 30  # margins round the plot, pixels
WIDTH, HEIGHT, HEAD = 940, 290, 56  # of a row of panels in a figure, and of the titles above it
COLOURS = ("#3557d6", "#c2562d", "#0f8a6a", "#8b46b5", "#a07a00", "#5f6888")
STYLE = """
  svg { font: 13px system-ui, sans-serif; fill: #22222a; }
  .tick { font-size: 11.5px; fill: #6d6d78; } .rule { stroke: #e6e4df; }
  polyline { fill: none; stroke-width: 2; } .bar { stroke-width: 1.6; }
""" + "".join(
    f"  .c{i} polyline, .c{i} .bar {{ stroke: {colour}; }} .c{i} circle, tspan.c{i} {{ fill: {colour}; }}\n"
    for i, colour in enumerate(COLOURS)
)

Panel = tuple[str, Sequence["Curve"], str]  # title, curves, what the x axis is


@dataclass(frozen=True)
class Curve:
    """Points (x, y) in order of x; those that are not finite are left out, which leaves a gap."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    kind: str = "line"  # line; faint: a thin line behind others; points: dots joined by a line
    errors: Sequence[float] | None = None  # half the height of each point's bar


def chart(curves: Sequence[Curve], *, width: int, height: int, x_label: str = "", baseline: float | None = None) -> str:
    """A chart of curves over common axes; "" if there is no finite point. `baseline` is a dashed level across."""
    points = [(x, y) for curve in curves for x, y, _ in finite(curve)]
    if not points:
        return ""
    lows = [y - e for curve in curves for _, y, e in finite(curve)] + ([baseline] if baseline is not None else [])
    highs = [y + e for curve in curves for _, y, e in finite(curve)] + ([baseline] if baseline is not None else [])
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    margin = 0.06 * (max(highs) - min(lows)) or 0.05 * abs(highs[0]) or 1.0
    y_low, y_high = min(lows) - margin, max(highs) + margin
    whole = all(float(x).is_integer() for x, _ in points)  # batches, versions
    x_ticks = ticks(x_low, x_high, 8 if width > 500 else 4, whole)
    y_ticks = ticks(y_low, y_high, 5 if height > 200 else 3)

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / ((x_high - x_low) or 1) * (width - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return height - BOTTOM - (y - y_low) / ((y_high - y_low) or 1) * (height - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img">']
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        x = x_at(tick)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - BOTTOM + 17}" text-anchor="middle">{tick:g}</text>')
    if x_label:
        parts.append(f'<text class="tick" x="{width - RIGHT}" y="{height - 2}" text-anchor="end">{x_label}</text>')
    if baseline is not None:
        y = y_at(baseline)
        parts.append(f'<line class="baseline" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for index, curve in enumerate(curves):
        placed = [(x_at(x), y_at(y), x, y, y_at(y - e) - y_at(y)) for x, y, e in finite(curve)]
        parts.append(f'<g class="series c{index % 6} {curve.kind}">')
        if len(placed) > 1:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, *_ in placed)
            parts.append(f'<polyline points="{path}"/>')
        for x, y, value_x, value_y, bar in placed if curve.kind == "points" or len(placed) == 1 else []:
            if bar:
                parts.append(f'<line class="bar" x1="{x:.1f}" x2="{x:.1f}" y1="{y - bar:.1f}" y2="{y + bar:.1f}"/>')
            title = f"{html.escape(curve.name)}: {number(value_y)} at {value_x:g}"
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{title}</title></circle>')
        parts.append("</g>")
    parts.append("</svg>")
    return "".join(parts)


def figure(rows: Sequence[Sequence[Panel]]) -> str:
    """A file of its own: panels with title and legend, row by row. A legend like its left neighbour's stands once."""
    height = len(rows) * (HEIGHT + HEAD + 20)
    placed = ""
    for place, row in enumerate(rows):
        legends = [_legend(curves) for _, curves, _ in row]
        for column, panel in enumerate(row):
            x, y = 20 + column * WIDTH // len(row), place * (HEIGHT + HEAD + 20)
            if not column or legends[column] != legends[column - 1]:
                placed += f'<text x="{x + LEFT}" y="{y + 46}">{legends[column]}</text>'
            placed += _placed(panel, x, y, WIDTH // len(row) - 20)
    size = f'viewBox="0 0 {WIDTH + 40} {height}" width="{WIDTH + 40}" height="{height}"'
    paper = f'<rect width="{WIDTH + 40}" height="{height}" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{paper}{placed}</svg>\n'


def _legend(curves: Sequence[Curve]) -> str:
    return "".join(
        f'<tspan class="c{index % 6}" dx="{14 if index else 0}">{html.escape(curve.name)}</tspan>'
        for index, curve in enumerate(curves)
    )


def _placed(panel: Panel, x: int, y: int, width: int) -> str:
    title, curves, x_label = panel
    drawing = chart(curves, width=width, height=HEIGHT, x_label=x_label)
    drawing = drawing.replace("<svg ", f'<svg x="{x}" y="{y + HEAD}" width="{width}" height="{HEIGHT}" ', 1)
    heading = f'<text x="{x + LEFT}" y="{y + 24}" font-weight="600">{html.escape(title)}</text>'
    return heading + drawing


def finite(curve: Curve) -> list[tuple[float, float, float]]:
    """(x, y, half height of the bar, 0 where there is none) of the finite points."""
    errors = curve.errors or [0.0] * len(curve.xs)
    rows = zip(curve.xs, curve.ys, errors, strict=True)
    return [(x, y, e if math.isfinite(e) else 0.0) for x, y, e in rows if math.isfinite(x) and math.isfinite(y)]


def ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """About `count` round numbers that lie between low and high; `whole` ones for batches."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= raw * 0.999)
    if whole:
        step = max(1.0, round(step))
    first = math.ceil(low / step - 1e-9)
    found = [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]
    return found or [low, high]


def number(value: float) -> str:
    """A number as a person reads it: four significant digits, tiny and huge ones with an exponent."""
    if not math.isfinite(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
    return f"{value:z.4g}".replace("-", "−")
