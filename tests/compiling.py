"""How well the programs of tests are compiled: most take longer to compile than to run."""

import contextlib
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def optimized(well: bool = True) -> Iterator[None]:
    """In this context programs are compiled with all optimizations, as users' are, or in a third of the time."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", not well)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
