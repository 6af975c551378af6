"""Optimization of the programs in tests. Most take longer to compile than to run."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def optimized(enabled: bool = True) -> Iterator[None]:
    """Compiles programs with all optimizations, as for users.

    With `enabled=False`, compiling takes a third of the time.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not enabled)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
