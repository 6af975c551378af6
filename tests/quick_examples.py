"""Makes what users see as examples quick: few steps of the head."""

import dataclasses

import pytest

import bitdance_jax


def few_steps(monkeypatch: pytest.MonkeyPatch, head_steps: int = 2) -> None:
    """Makes this the number of steps of loaded models, where an example does not give its own."""
    load = bitdance_jax.load

    def load_quick(*arguments, **options):
        model = load(*arguments, **options)
        model.sampler = dataclasses.replace(model.sampler, head_steps=head_steps)
        return model

    monkeypatch.setattr(bitdance_jax, "load", load_quick)
