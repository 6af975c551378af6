"""Line charts, drawn with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont


WIDTH, HEIGHT = 480, 360  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 40, 48  # its margins
HEAD = 40  # pixels above all panels, for the title
KEY = 20  # pixels of a line's name below its panel
TICKS = 6
MARKED = 40
"""Lines of more points than this are drawn without a mark at each."""

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
GREY = "#d0d0d0"

Range = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
      x_label: what the horizontal axis shows.
      lines: name of each line, and its points (x, y); one without a name is not in the key.
      title: what the vertical axis shows, with its unit; it stands above the chart.
      x_ticks: where the horizontal axis is marked; None: at round numbers.
    """

    x_label: str
    lines: dict[str, list[tuple[float, float]]]
    title: str = ""
    x_ticks: tuple[float, ...] | None = None

    @property
    def points(self) -> list[tuple[float, float]]:
        return [point for line in self.lines.values() for point in line]


def line_charts(
    title: str, panels: Sequence[Panel], *, columns: int, same_y: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
    """Panels in rows below a title.

    Args:
      title: above all.
      panels: each with a point at least.
      columns: panels in a row.
      same_y: all share the range of y.
    """
    names = max(sum(map(bool, panel.lines)) for panel in panels)
    height = HEIGHT + KEY * names
    sheet = Image.new(
        "RGB",
        (WIDTH * min(columns, len(panels)), HEAD + height * -(-len(panels) // columns)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    pen.text(
        (LEFT, HEAD / 2), title, fill="black", font=ImageFont.load_default(size=16), anchor="lm"
    )
    y_range = _range([y for panel in panels for _, y in panel.points]) if same_y else None
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        _draw_panel(
            pen,
            panel,
            WIDTH * column,
            HEAD + height * row,
            y_range or _range([y for _, y in panel.points]),
        )
    return np.asarray(sheet)


def ticks(low: float, high: float) -> list[float]:
    """At most TICKS round numbers between two others: multiples of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    first, last = (
        round(end / step, 6) for end in (low, high)
    )  # a tick may lie on an end, but for rounding
    return [number * step for number in range(math.ceil(first), math.floor(last) + 1)]


def _draw_panel(
    pen: ImageDraw.ImageDraw, panel: Panel, left: int, top: int, y_range: Range
) -> None:
    font = ImageFont.load_default(size=13)
    (x_low, x_high), (y_low, y_high) = _range([x for x, _ in panel.points]), y_range
    west, east, north, south = left + LEFT, left + WIDTH - RIGHT, top + TOP, top + HEIGHT - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return west + (x - x_low) / (x_high - x_low) * (east - west), south - (y - y_low) / (
            y_high - y_low
        ) * (south - north)

    for y in ticks(y_low, y_high):
        pen.line([place(x_low, y), place(x_high, y)], fill=GREY)
        pen.text((west - 6, place(x_low, y)[1]), f"{y:.6g}", fill="black", font=font, anchor="rm")
    for x in ticks(x_low, x_high) if panel.x_ticks is None else panel.x_ticks:
        pen.line([place(x, y_low), place(x, y_high)], fill=GREY)
        pen.text((place(x, y_low)[0], south + 6), f"{x:g}", fill="black", font=font, anchor="mt")
    pen.line([(west, north), (west, south), (east, south)], fill="black")
    pen.text((west, north - 8), panel.title, fill="black", font=font, anchor="lb")
    pen.text(((west + east) / 2, south + 28), panel.x_label, fill="black", font=font, anchor="mt")
    for number, (name, line) in enumerate(panel.lines.items()):
        colour, key = COLOURS[number % len(COLOURS)], south + BOTTOM + KEY * number + KEY // 2
        pixels = [place(x, y) for x, y in sorted(line)]
        pen.line(pixels, fill=colour, width=2)
        for x, y in pixels if len(pixels) <= MARKED else []:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        if name:
            pen.line([(west, key), (west + 24, key)], fill=colour, width=2)
            pen.text((west + 32, key), name, fill="black", font=font, anchor="lm")


def _range(values: list[float]) -> Range:
    """Lowest and highest, with a twentieth of their distance added at both ends."""
    low, high = min(values), max(values)
    margin = (high - low) / 20 or max(abs(low) / 20, 1e-6)
    return low - margin, high + margin
