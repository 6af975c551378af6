"""Charts: points are at their values, and ticks at round numbers."""

import numpy as np
import pytest

from bitdance_jax.io import plot


# Of the charts in the first row.
AXES_TOP = plot.TITLE + plot.TOP
AXES_BOTTOM = plot.TITLE + plot.HEIGHT - plot.BOTTOM


def first_line(image):
    """Rows and columns of the pixels of a chart's first line."""
    return np.nonzero((image == (31, 119, 180)).all(-1)[AXES_TOP : AXES_BOTTOM + 1])


def test_positions_of_points():
    """A falling line of three points, and a single point in the middle of its chart."""
    panels = [
        plot.Panel("x", {"a": [(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]}),
        plot.Panel("y", {"b": [(5.0, 2.0)]}),
    ]
    image = plot.line_charts("title", panels, columns=2, same_y=True)
    rows, columns = first_line(image[:, : plot.WIDTH])
    assert np.corrcoef(rows, columns)[0, 1] > 0.99
    rows, columns = first_line(image[:, plot.WIDTH :])
    assert abs(columns.mean() - (plot.LEFT + plot.WIDTH - plot.RIGHT) / 2) < 2
    assert abs(rows.mean() - (AXES_BOTTOM - AXES_TOP) / 2) < 2


def test_charts_in_rows_with_ranges_of_their_own():
    panels = [plot.Panel("x", {"": [(1.0, top), (2.0, 0.0)]}) for top in (1.0, 1000.0, 3.0)]
    image = plot.line_charts("title", panels, columns=2)
    assert image.shape == (plot.TITLE + 2 * plot.HEIGHT, 2 * plot.WIDTH, 3)
    (first, _), (second, _) = (
        first_line(part) for part in (image[:, : plot.WIDTH], image[:, plot.WIDTH :])
    )
    assert first.min() == second.min() and first.max() == second.max()
    assert (image[plot.TITLE + plot.HEIGHT :, plot.WIDTH :] == 255).all()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 60, [0, 10, 20, 30, 40, 50, 60]),
        (0.1, 0.9, [0.2, 0.4, 0.6, 0.8]),
        (-3, 4, [-2, 0, 2, 4]),
        (5e-7, 9e-7, [5e-7, 6e-7, 7e-7, 8e-7, 9e-7]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert plot.ticks(float(low), float(high)) == pytest.approx(expected)
