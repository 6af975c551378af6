"""The curves of a run: which charts there are, in which order, and what is in them."""

import pytest

from bitdance_jax.io import plot
from bitdance_jax.train import curves


@pytest.fixture
def drawn(monkeypatch):
    """The panels of the last drawing."""
    panels, draw = [], plot.line_charts

    def record(title, given, **options):
        panels[:] = given
        return draw(title, given, **options)

    monkeypatch.setattr(plot, "draw", record)
    return panels


def test_the_loss_comes_first_with_that_of_held_out_images(drawn):
    figures = {"grad_norm": "9.0", "learning_rate": "1e-3", "l1": "0.5", "loss": "2.0"}
    rows = [
        {"step": "1", "epoch": "0.5", **figures},
        {"step": "20", "epoch": "1.0", **figures, "eval_loss": "3.0", "eval_psnr": "20.0"},
    ]
    image = curves.draw_curves(rows)
    assert image.shape[1] == 2 * plot.WIDTH
    assert [panel.title for panel in drawn] == [
        curves.TITLES[name] for name in ("loss", "psnr", "l1", "grad_norm", "learning_rate")
    ]
    assert {panel.x_label for panel in drawn} == {"step"} and "dB" in drawn[1].title
    assert list(drawn[0].lines.values()) == [[(1.0, 2.0), (20.0, 2.0)], [(20.0, 3.0)]]
    assert list(drawn[4].lines) == [""]


def test_what_is_no_number_is_left_out(drawn):
    curves.draw_curves(
        [
            {"step": "1", "loss": "2.0", "new": ""},
            {"step": "2", "loss": "nan"},
            {"step": "3", "loss": "1.0", "new": "inf"},
        ]
    )
    assert [list(panel.lines.values()) for panel in drawn] == [[[(1.0, 2.0), (3.0, 1.0)]]]


def test_an_empty_table():
    assert curves.draw_curves([]).shape == (plot.HEIGHT, plot.WIDTH, 3)
