"""Makes what users see as examples quick: few steps of the head, few images to train on."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import bitdance_jax
from bitdance_jax.data import sources


def few_steps(monkeypatch: pytest.MonkeyPatch, head_steps: int = 2) -> None:
    """Makes this the number of steps of loaded models, where an example does not give its own."""
    load = bitdance_jax.load

    def load_quick(*arguments, **options):
        model = load(*arguments, **options)
        model.sampler = dataclasses.replace(model.sampler, head_steps=head_steps)
        return model

    monkeypatch.setattr(bitdance_jax, "load", load_quick)


def few_emoji(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Puts every fourth of the embedded images, of all classes, in place of them."""
    with np.load(sources.EMOJI) as file:
        few = {name: file[name][::4] for name in ("images", "labels")}
        np.savez(folder / "few_emoji.npz", **few, categories=file["categories"])
    monkeypatch.setattr(sources, "EMOJI", folder / "few_emoji.npz")
