"""Line charts of metrics: which there are, in which order, and what is in them."""

import pytest

from bitdance_jax.io import plot
from bitdance_jax.train import curves


@pytest.fixture
def plotted(monkeypatch):
    """The panels plotted last."""
    panels = []
    line_charts = plot.line_charts

    def record(title, given, **options):
        panels[:] = given
        return line_charts(title, given, **options)

    monkeypatch.setattr(plot, "line_charts", record)
    return panels


def test_the_loss_comes_first_with_that_of_held_out_images(plotted):
    metrics = {"grad_norm": "9.0", "learning_rate": "1e-3", "l1": "0.5", "loss": "2.0"}
    rows = [
        {"step": "1", "epoch": "0.5", **metrics},
        {"step": "20", "epoch": "1.0", **metrics, "eval_loss": "3.0", "eval_psnr": "20.0"},
    ]
    image = curves.plot_curves(rows)
    assert image.shape[1] == 2 * plot.WIDTH
    assert [panel.title for panel in plotted] == [
        curves.TITLES[name] for name in ("loss", "psnr", "l1", "grad_norm", "learning_rate")
    ]
    assert {panel.x_label for panel in plotted} == {"step"} and "dB" in plotted[1].title
    assert list(plotted[0].lines.values()) == [[(1.0, 2.0), (20.0, 2.0)], [(20.0, 3.0)]]
    assert list(plotted[4].lines) == [""]


def test_values_that_are_not_finite_are_skipped(plotted):
    curves.plot_curves(
        [
            {"step": "1", "loss": "2.0", "new": ""},
            {"step": "2", "loss": "nan"},
            {"step": "3", "loss": "1.0", "new": "inf"},
        ]
    )
    assert [list(panel.lines.values()) for panel in plotted] == [[[(1.0, 2.0), (3.0, 1.0)]]]


def test_an_empty_table():
    assert curves.plot_curves([]).shape == (plot.HEIGHT, plot.WIDTH, 3)
