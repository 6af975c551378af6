"""The sampler's two compiled programs, for labels and for prompts, on any mesh of devices."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt32

from bitdance_jax.distributed.constraints import constrain
from bitdance_jax.distributed.mesh import BATCH, DATA, compiler_options
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.next_patch import Kept, PatchModel, SamplerState, Scales, Weights
from bitdance_jax.sampling.solvers import Solver


class Inputs(NamedTuple):
    """What a batch of images is conditioned on.

    Attributes:
      images: arrays [B, ...], one row an image: labels, or prompts; of several conditions of each
        image [B, conditions, ...].
      shared: arrays that all images share: token positions, the unconditional prompt.
      kept: patches of each image that are given.
      weights: of several conditions of each image; None: each has one.
    """

    images: Any
    shared: Any = None
    kept: Kept | None = None
    weights: Weights = None


ROWS = P(BATCH)
INPUTS: Any = Inputs._make([ROWS, P(), ROWS, ROWS])
STATE: Any = SamplerState._make([P(None, BATCH), ROWS, ROWS, P()])
"""How a data mesh splits the state; each device has its conditional, then unconditional rows."""


class CompiledSampler:
    """Two programs, compiled once for each shape and solver; all else are their arguments.

    Where a mesh has a "data" axis alone, and it divides the batch, every device runs the program of
    one device on its own images: they are the same, bit for bit, on any number of devices of one
    kind (but CPU devices that share cores: XLA then splits sums over other numbers of threads).
    On other meshes the layers are sharded too, and the compiler partitions the program.

    Attributes:
      begin: (params, inputs, scales) -> the state before the first patch.
      advance: (params, state, inputs, keys, scales, stop, solver=) -> the state at `stop` patches,
        in the memory of the old one. `keys` are the data of one random key for each image; for the
        others see `next_patch.advance`.
    """

    def __init__(
        self,
        read: Callable[[Any, Inputs, Scales], PatchModel],
        mesh: Mesh,
        *,
        nested: bool = False,
    ) -> None:
        """
        Args:
          read: (params, inputs, scales) -> the model after the inputs, with unconditional rows
            where there are scales.
          mesh: the devices. The weights are replicated on a data mesh, and sharded in any way on
            another; inputs and keys may be numpy arrays, the same on all hosts.
          nested: for use inside of a jitted function, which alone can have compiler options.
        """
        self._read = read
        self._mesh = mesh
        self._compiler_options = None if nested else compiler_options(mesh)
        self.begin = self._jit(self._begin, (P(), INPUTS, P()))
        specs = (P(), STATE, INPUTS, ROWS, P(), P())
        options: Any = {"static_argnames": "solver", "donate_argnums": 1}
        self.advance = self._jit(self._advance, specs, **options)

    def sample(
        self,
        params: Any,
        inputs: Inputs,
        keys: UInt32[Array | np.ndarray, "B 2"],
        *,
        solver: Solver,
        scales: Scales,
        num_patches: int,
    ) -> Float[Array, "N B P K"]:
        """Values before the sign of all patches. Returns before the devices have computed them."""
        state = self.begin(params, inputs, scales)
        stop = np.int32(num_patches)
        return self.advance(params, state, inputs, keys, scales, stop, solver=solver).values

    def traceable(
        self,
        params: Any,
        inputs: Inputs,
        keys: UInt32[Array, "B 2"],
        scales: Scales,
        *,
        solver: Solver,
    ) -> Float[Array, "N B P K"]:
        """`sample` on one device as a pure function with loops of static length, to count FLOPs."""
        model = self._read(params, inputs, scales)
        noise = next_patch.noise_of_images(model, jax.random.wrap_key_data(keys), solver)
        return next_patch.sample(model, noise=noise, solver=solver, scales=scales)

    def states(
        self,
        params: Any,
        inputs: Inputs,
        keys: UInt32[Array | np.ndarray, "B 2"],
        *,
        solver: Solver,
        scales: Scales,
        num_patches: int,
        every: int,
    ) -> Iterator[tuple[SamplerState, int]]:
        """The state after 1, 1 + every, ... and all patches, and the number of those patches.

        The next state takes the memory of the one before.
        """
        state = self.begin(params, inputs, scales)
        for stop in [*range(1, num_patches, every), num_patches]:
            state = self.advance(params, state, inputs, keys, scales, np.int32(stop), solver=solver)
            yield state, stop

    def _jit(self, function: Callable[..., SamplerState], specs: Any, **options: Any) -> Any:
        mesh = self._mesh

        @functools.wraps(function)
        def on_mesh(*arguments: Any, **static: Any) -> SamplerState:
            inputs = next(x for x in arguments if isinstance(x, Inputs))
            if splits_images(mesh, len(jax.tree.leaves(inputs.images)[0])):
                run = functools.partial(function, **static)
                return jax.shard_map(
                    run, mesh=mesh, in_specs=specs, out_specs=STATE, check_vma=False
                )(*arguments)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return _constrained(function(*arguments, **static))

        return jax.jit(on_mesh, compiler_options=self._compiler_options, **options)

    def _begin(self, params: Any, inputs: Inputs, scales: Scales) -> SamplerState:
        state = next_patch.begin(self._read(params, inputs, scales), scales, inputs.weights)
        return state._replace(patch=jnp.asarray(state.patch))

    def _advance(
        self,
        params: Any,
        state: SamplerState,
        inputs: Inputs,
        keys: UInt32[Array, "B 2"],
        scales: Scales,
        stop: Int[Array, ""],
        *,
        solver: Solver,
    ) -> SamplerState:
        model = self._read(params, inputs, scales)
        noise = next_patch.noise_of_images(model, jax.random.wrap_key_data(keys), solver)
        return next_patch.advance(
            model,
            state,
            stop,
            noise=noise,
            solver=solver,
            scales=scales,
            kept=inputs.kept,
            weights=inputs.weights,
        )


def splits_images(mesh: Mesh, batch: int) -> bool:
    """Whether every device runs the program of one device on its own images of a batch."""
    return mesh.size == mesh.shape[DATA] and batch % mesh.size == 0


def _constrained(state: SamplerState) -> SamplerState:
    """The same sharding after every call: otherwise the next call would compile again."""
    cache = jax.tree.map(lambda x: constrain(x, "batch", "heads", None, None), state.cache)
    values = constrain(state.values, None, "batch", None, None)
    rows = constrain(state.rows, "batch", None, None)
    return SamplerState(values, rows, cache, constrain(jnp.asarray(state.patch)))
