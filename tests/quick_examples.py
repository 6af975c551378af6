"""Makes what users see as examples quick: a small text-to-image model, few steps of the head."""

import dataclasses
from pathlib import Path

import pytest

import bitdance_jax
from bitdance_jax.io.model_lookup import EMBEDDED
from bitdance_jax.pipelines import toy_text_to_image


def make_quick(monkeypatch: pytest.MonkeyPatch, folder: Path, head_steps: int = 2) -> None:
    """Replaces the embedded text-to-image model, for images of its size, by one in `folder`, and
    the number of steps of all loaded models, where an example does not give its own."""
    load = bitdance_jax.load
    toy_text_to_image.save(folder / EMBEDDED, toy_text_to_image.config())

    def load_quick(name=EMBEDDED, **options):
        model = load(folder / EMBEDDED if name == EMBEDDED else name, **options)
        if name == EMBEDDED:
            model.default_size = (128, 128)
        model.sampler = dataclasses.replace(model.sampler, head_steps=head_steps)
        return model

    monkeypatch.setattr(bitdance_jax, "load", load_quick)
