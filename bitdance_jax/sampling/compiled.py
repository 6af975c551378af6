"""The sampler's two compiled programs, for labels and for prompts, on one device or a mesh."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt32

from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.distributed.mesh import compiler_options
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.next_patch import PatchModel, SamplerState, Scales
from bitdance_jax.sampling.solvers import Solver


class CompiledSampler:
    """Programs that are compiled once for each shape and solver; all else are arrays.

    Attributes:
      begin: (params, inputs, scales) -> the state before the first patch.
      advance: (params, state, inputs, keys, scales, stop, solver=) -> the state at `stop` patches, in
        the old one's memory. `keys` are the data of `pipeline.image_keys`; for the others see
        `next_patch.advance`.
    """

    def __init__(
        self, read: Callable[[Any, Any, Scales], PatchModel], mesh: Mesh | None = None
    ) -> None:
        """
        Args:
          read: (params, inputs, scales) -> the model after the inputs, labels or prompts; with
            unconditional rows where there are scales.
          mesh: the devices; the weights and inputs may lie on them in any way.
        """
        self._read, self._mesh = read, mesh
        self.begin = self._jit(self._begin)
        self.advance = self._jit(self._advance, static_argnames="solver", donate_argnames="state")

    def states(
        self,
        params: Any,
        inputs: Any,
        keys: UInt32[np.ndarray, "B 2"],
        *,
        solver: Solver,
        scales: Float[np.ndarray, "N E"] | None,
        num_patches: int,
        every: int,
    ) -> Iterator[tuple[SamplerState, int]]:
        """The batch when 1, 1 + every, ... and all of its patches are sampled, and how many those are.

        Each state takes the last one's memory.
        """
        state = self.begin(params, inputs, scales)
        for stop in [*range(1, num_patches, every), num_patches]:
            state = self.advance(params, state, inputs, keys, scales, np.int32(stop), solver=solver)
            yield state, stop

    def _jit(self, function: Callable[..., Any], **options: Any) -> Any:
        mesh = self._mesh
        if mesh is None:
            return jax.jit(function, **options)

        def on_mesh(*arguments: Any, **static: Any) -> Any:
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*arguments, **static)

        return jax.jit(
            functools.wraps(function)(on_mesh), compiler_options=compiler_options(mesh), **options
        )

    def _begin(self, params: Any, inputs: Any, scales: Scales) -> SamplerState:
        return _constrained(next_patch.begin(self._read(params, inputs, scales), scales))

    def _advance(
        self,
        params: Any,
        state: SamplerState,
        inputs: Any,
        keys: UInt32[Array, "B 2"],
        scales: Scales,
        stop: Int[Array, ""],
        *,
        solver: Solver,
    ) -> SamplerState:
        model = self._read(params, inputs, scales)
        noise = next_patch.noise_of_images(model, jax.random.wrap_key_data(keys), solver)
        options: Any = {"noise": noise, "solver": solver, "scales": scales}
        return _constrained(next_patch.advance(model, state, stop, **options))


def _constrained(state: SamplerState) -> SamplerState:
    """The same sharding after every call, lest the next one compile anew."""
    cache = jax.tree.map(lambda x: constrain(x, "batch", "heads", None, None), state.cache)
    values = constrain(state.values, None, "batch", None, None)
    rows = constrain(state.rows, "batch", None, None)
    return SamplerState(values, rows, cache, constrain(jnp.asarray(state.patch)))
