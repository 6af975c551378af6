"""Pallas' kernels for TPUs, interpreted on the CPU."""

import functools
from typing import Any

import pytest
from jax.experimental import pallas


def interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interprets the kernels that are called from now on."""
    call = pallas.pallas_call

    def interpreted(kernel: Any, *arguments: Any, **keywords: Any) -> Any:
        return call(kernel, *arguments, **keywords | {"interpret": True})

    monkeypatch.setattr(pallas, "pallas_call", functools.wraps(call)(interpreted))
