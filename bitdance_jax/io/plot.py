"""Line charts, plotted with Pillow."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont


# Sizes in pixels: of a panel, of its margins, of the title above all panels, and of a line of the
# legend below a panel.
WIDTH = 480
HEIGHT = 360
LEFT = 72
RIGHT = 24
TOP = 40
BOTTOM = 48
TITLE = 40
LEGEND_LINE = 20

MAX_TICKS = 6

MAX_MARKERS = 40
"""Lines with more points than this have no markers."""

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
GREY = "#d0d0d0"

Range = tuple[float, float]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
      x_label: label of the horizontal axis.
      lines: the points (x, y) of each line, by its name; an empty name is not in the legend.
      title: label of the vertical axis with its unit, above the chart.
      x_ticks: ticks of the horizontal axis; None: round numbers.
    """

    x_label: str
    lines: dict[str, list[tuple[float, float]]]
    title: str = ""
    x_ticks: tuple[float, ...] | None = None

    @property
    def points(self) -> list[tuple[float, float]]:
        return [point for line in self.lines.values() for point in line]

    @property
    def x_range(self) -> Range:
        return _padded_range([x for x, _ in self.points])

    @property
    def y_range(self) -> Range:
        return _padded_range([y for _, y in self.points])


def line_charts(
    title: str, panels: Sequence[Panel], *, columns: int, same_y: bool = False
) -> UInt8[np.ndarray, "H W 3"]:
    """Panels in rows below a title.

    Args:
      title: of all panels.
      panels: each with at least one point.
      columns: panels in a row.
      same_y: whether all panels share one range of y.
    """
    legend_lines = max(sum(map(bool, panel.lines)) for panel in panels)
    panel_height = HEIGHT + LEGEND_LINE * legend_lines
    width = WIDTH * min(columns, len(panels))
    height = TITLE + panel_height * -(-len(panels) // columns)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=16)
    draw.text((LEFT, TITLE / 2), title, fill="black", font=font, anchor="lm")
    shared = _padded_range([y for panel in panels for _, y in panel.points]) if same_y else None
    for index, panel in enumerate(panels):
        row, column = divmod(index, columns)
        _Axes(draw, WIDTH * column, TITLE + panel_height * row, panel, shared).plot()
    return np.asarray(canvas)


def ticks(low: float, high: float) -> list[float]:
    """At most MAX_TICKS + 1 multiples of 1, 2 or 5 times a power of ten between low and high."""
    rough = (high - low) / MAX_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= rough)
    # Rounded, because a tick at an end of the range may be slightly outside of it.
    first = math.ceil(round(low / step, 6))
    last = math.floor(round(high / step, 6))
    return [number * step for number in range(first, last + 1)]


class _Axes:
    """Plots one panel, with `left` and `top` as its corner on the canvas."""

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        left: int,
        top: int,
        panel: Panel,
        y_range: Range | None,
    ) -> None:
        self._draw = draw
        self._panel = panel
        self._font = ImageFont.load_default(size=13)
        self._x_range = panel.x_range
        self._y_range = y_range or panel.y_range
        self._left = float(left + LEFT)
        self._right = float(left + WIDTH - RIGHT)
        self._top = float(top + TOP)
        self._bottom = float(top + HEIGHT - BOTTOM)

    def plot(self) -> None:
        self._plot_ticks()
        corners = [
            (self._left, self._top),
            (self._left, self._bottom),
            (self._right, self._bottom),
        ]
        self._draw.line(corners, fill="black")
        self._text((self._left, self._top - 8), self._panel.title, "lb")
        middle = (self._left + self._right) / 2
        self._text((middle, self._bottom + 28), self._panel.x_label, "mt")
        for number, (name, points) in enumerate(self._panel.lines.items()):
            colour = COLOURS[number % len(COLOURS)]
            self._plot_line(points, colour)
            if name:
                y = self._bottom + BOTTOM + LEGEND_LINE * number + LEGEND_LINE // 2
                self._draw.line([(self._left, y), (self._left + 24, y)], fill=colour, width=2)
                self._text((self._left + 32, y), name, "lm")

    def _plot_ticks(self) -> None:
        x_low, x_high = self._x_range
        y_low, y_high = self._y_range
        for y in ticks(y_low, y_high):
            start = self._pixel(x_low, y)
            self._draw.line([start, self._pixel(x_high, y)], fill=GREY)
            self._text((self._left - 6, start[1]), f"{y:.6g}", "rm")
        for x in ticks(x_low, x_high) if self._panel.x_ticks is None else self._panel.x_ticks:
            start = self._pixel(x, y_low)
            self._draw.line([start, self._pixel(x, y_high)], fill=GREY)
            self._text((start[0], self._bottom + 6), f"{x:g}", "mt")

    def _plot_line(self, points: list[tuple[float, float]], colour: str) -> None:
        pixels = [self._pixel(x, y) for x, y in sorted(points)]
        self._draw.line(pixels, fill=colour, width=2)
        for x, y in pixels if len(pixels) <= MAX_MARKERS else []:
            self._draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)

    def _pixel(self, x: float, y: float) -> tuple[float, float]:
        x_low, x_high = self._x_range
        y_low, y_high = self._y_range
        return (
            self._left + (x - x_low) / (x_high - x_low) * (self._right - self._left),
            self._bottom - (y - y_low) / (y_high - y_low) * (self._bottom - self._top),
        )

    def _text(self, position: tuple[float, float], text: str, anchor: str) -> None:
        self._draw.text(position, text, fill="black", font=self._font, anchor=anchor)


def _padded_range(values: list[float]) -> Range:
    """The range of the values, extended by a twentieth at both ends."""
    low = min(values)
    high = max(values)
    margin = (high - low) / 20 or max(abs(low) / 20, 1e-6)
    return low - margin, high + margin
