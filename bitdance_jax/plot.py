"""Line charts, drawn with Pillow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont


WIDTH, HEIGHT = 480, 360  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 72, 24, 48, 48  # its margins
Y_TICKS = 5
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#7f7f7f")
GREY = "#d0d0d0"


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
      x_label: what the horizontal axis shows.
      lines: name of each line, and its points (x, y).
    """

    x_label: str
    lines: dict[str, list[tuple[float, float]]]


def draw(title: str, panels: Sequence[Panel]) -> UInt8[np.ndarray, "H W 3"]:
    """Panels side by side below a title. All share the range of y; x has a tick at every point."""
    font = ImageFont.load_default(size=13)
    entries = max(len(panel.lines) for panel in panels)
    sheet = Image.new("RGB", (WIDTH * len(panels), HEIGHT + TOP + 20 * entries), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((LEFT, TOP / 2), title, fill="black", font=ImageFont.load_default(size=16), anchor="lm")
    y_range = _range([y for panel in panels for line in panel.lines.values() for _, y in line])
    for number, panel in enumerate(panels):
        _draw_panel(pen, font, panel, WIDTH * number, y_range)
    return np.asarray(sheet)


def _draw_panel(
    pen: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, panel: Panel, left: int, y_range: tuple[float, float]
) -> None:
    points = [point for line in panel.lines.values() for point in line]
    (x_low, x_high), (y_low, y_high) = _range([x for x, _ in points]), y_range
    west, east, north, south = left + LEFT, left + WIDTH - RIGHT, TOP, HEIGHT - BOTTOM + TOP

    def place(x: float, y: float) -> tuple[float, float]:
        return west + (x - x_low) / (x_high - x_low) * (east - west), south - (y - y_low) / (y_high - y_low) * (south - north)

    for y in np.linspace(y_low, y_high, Y_TICKS).tolist():
        pen.line([place(x_low, y), place(x_high, y)], fill=GREY)
        pen.text((west - 6, place(x_low, y)[1]), f"{y:.4g}", fill="black", font=font, anchor="rm")
    for x in sorted({x for x, _ in points}):
        pen.line([place(x, y_low), place(x, y_high)], fill=GREY)
        pen.text((place(x, y_low)[0], south + 6), f"{x:g}", fill="black", font=font, anchor="mt")
    pen.text(((west + east) / 2, south + 28), panel.x_label, fill="black", font=font, anchor="mt")

    for number, (name, line) in enumerate(panel.lines.items()):
        colour, key = COLOURS[number % len(COLOURS)], south + BOTTOM + 20 * number + 10
        pixels = [place(x, y) for x, y in sorted(line)]
        pen.line(pixels, fill=colour, width=2)
        for x, y in pixels:
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        pen.line([(west, key), (west + 24, key)], fill=colour, width=2)
        pen.text((west + 32, key), name, fill="black", font=font, anchor="lm")


def _range(values: list[float]) -> tuple[float, float]:
    """Lowest and highest, with a twentieth of their distance added at both ends."""
    low, high = min(values), max(values)
    margin = (high - low) / 20 or max(abs(low) / 20, 1e-6)
    return low - margin, high + margin
