"""The next-patch sampler of all models (paper 3.3): one loop of reading and sampling a patch.

A model gives `PatchModel`, its head `heads.protocols.PatchHead`. Images of labels and prompts,
previews, plans and the tests against recorded samples all run `begin` and `advance`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from bitdance_jax.config import SamplerConfig
from bitdance_jax.heads.protocols import PatchHead
from bitdance_jax.sampling.guidance import PatchGuidance, guidance_scales
from bitdance_jax.sampling.solvers import Solver, make_solver


Cache = Any
Scales = Float[Array, "N E"] | Float[np.ndarray, "N E"] | None
Weights = Float[Array, "B conditions"] | Float[np.ndarray, "B conditions"] | None
"""Of several conditions of each image; None: each has one."""


@runtime_checkable
class PatchModel(Protocol):
    """What the sampler needs of a model with its weights and labels or prompts.

    It has R rows: the B images, or [conditional; unconditional] with guidance, R = 2 B. With
    several conditions of each image they are [first; ...; last; unconditional].
    """

    @property
    def num_patches(self) -> int:
        """N, patches of an image."""

    @property
    def patch_shape(self) -> tuple[int, int, int]:
        """(R, P, K): rows, tokens of a patch, bits of a token."""

    @property
    def head(self) -> PatchHead: ...

    def read_prefix(self) -> Cache:
        """Reads the tokens before the first block, whose outputs are the first patch's states."""

    def read(
        self, values: Float[Array, "R P K"], patch: Int[Array, ""] | int, cache: Cache
    ) -> tuple[Float[Array, "R P C"], Cache]:
        """States of a patch, and the cache.

        Args:
          values: of the head for the patch before it, of which the model makes what it reads: bits
            by their signs, or continuous latents. Ignored for patch 0, which follows the first
            block.
          patch: 0 ... N - 1.
          cache: of what was read before.
        """


class SamplerState(NamedTuple):
    """A batch of images of which some patches are sampled.

    Attributes:
      values: before the sign, which gives the bits, or continuous latents; 0 where nothing is
        sampled yet.
      rows: values of the last patch as every row reads them, the images first.
      cache: of what was read.
      patch: how many patches are sampled, the number of the next one.
    """

    values: Float[Array, "N B P K"]
    rows: Float[Array, "R P K"]
    cache: Cache
    patch: Int[Array, ""] | np.int32


class Kept(NamedTuple):
    """Patches of a batch that are given: the model reads them in place of sampled ones.

    Attributes:
      values: codes in {-1, 1}, or continuous latents, of any number type; ignored elsewhere.
      mask: which patches of each image are given.
    """

    values: Num[Array, "B N P K"] | Num[np.ndarray, "B N P K"]
    mask: Bool[Array, "B N"] | Bool[np.ndarray, "B N"]


NoiseSource = Callable[[Int[Array, ""], Bool[Array, ""] | None], Float[Array, "S R P K"]]
"""(patch, separate) -> standard normal noise of one patch, `Solver.num_noises` for each row.

With guidance, `separate` says whether unconditional rows have their own noise or their image's."""


def resolve(
    sampler: SamplerConfig, time_shift: float | None, num_patches: int, *, weighted: bool = False
) -> tuple[Solver, Float[np.ndarray, "N E"] | None]:
    """The solver, which programs are compiled for, and the guidance scales, their argument.

    Args:
      sampler: what the user asked for.
      time_shift: `HeadConfig.time_shift`.
      num_patches: N, patches of an image.
      weighted: images have several conditions, which a scale of 1 guides too.
    """
    solver = make_solver(sampler, time_shift)
    scales = guidance_scales(sampler, solver, num_patches)
    if weighted and scales is None:
        scales = np.ones((num_patches, solver.num_evaluations), np.float32)
    return solver, scales


def begin(model: PatchModel, scales: Scales, weights: Weights = None) -> SamplerState:
    """The state after the prefix, before the first patch; for the others see `advance`."""
    num_rows, tokens, bits = model.patch_shape
    images = num_rows // num_streams(scales, weights)
    values = jnp.zeros((model.num_patches, images, tokens, bits))
    rows = jnp.zeros((num_rows, tokens, bits))
    return SamplerState(values, rows, model.read_prefix(), np.int32(0))


def num_streams(scales: Scales, weights: Weights) -> int:
    """1 without guidance; else one for each condition, and the unconditional one."""
    if scales is None:
        return 1
    return 2 if weights is None else weights.shape[1] + 1


def advance(
    model: PatchModel,
    state: SamplerState,
    stop: Int[Array, ""] | int,
    *,
    noise: NoiseSource,
    solver: Solver,
    scales: Scales,
    kept: Kept | None = None,
    weights: Weights = None,
) -> SamplerState:
    """Samples until `stop` patches are done.

    Args:
      model: see `PatchModel`.
      state: of `begin`, or of an earlier call.
      stop: may be traced: one program for any number of patches. If it is not, right after `begin`,
        the loop is a scan, whose arithmetic can be counted.
      noise: see `NoiseSource`.
      solver: see `sampling.solvers`.
      scales: of guidance, for every patch and evaluation; None without, then all rows are images.
      kept: patches that are not sampled; None: all are. The head does not run for a patch that all
        images keep.
      weights: of several conditions of each image, with scales.

    Where all scales of the first patch are 1, as in the linear schedule, the release samples the
    conditional and the unconditional stream apart, each with its own noise, and the unconditional
    stream continues from its own sample. Both share all other patches, and with weights all.
    """
    images = state.values.shape[1]
    prepared = model.head.prepare(solver)

    def step(patch: Int[Array, ""], state: SamplerState) -> SamplerState:
        states, cache = model.read(state.rows, patch, state.cache)
        guide = None if scales is None else _guidance(jnp.asarray(scales)[patch], patch, weights)

        def sampled() -> Float[Array, "R P K"]:
            if weights is None:
                fresh = noise(patch, None if guide is None else guide.separate)
            else:
                fresh = jnp.tile(noise(patch, None), (1, num_streams(scales, weights), 1, 1))
            return model.head.sample(states, fresh, prepared, solver=solver, guide=guide)

        rows = sampled() if kept is None else _keep(kept, patch, len(states), sampled)
        values = jax.lax.dynamic_update_index_in_dim(state.values, rows[:images], patch, 0)
        return SamplerState(values, rows, cache, patch + 1)

    return jax.lax.fori_loop(state.patch, stop, step, state)


def sample(
    model: PatchModel, *, noise: NoiseSource, solver: Solver, scales: Scales
) -> Float[Array, "N B P K"]:
    """Values before the sign of all patches of the images, in order; see `advance`."""
    state = begin(model, scales)
    return advance(
        model, state, model.num_patches, noise=noise, solver=solver, scales=scales
    ).values


def _keep(
    kept: Kept,
    patch: Int[Array, ""],
    num_rows: int,
    sampled: Callable[[], Float[Array, "R P K"]],
) -> Float[Array, "R P K"]:
    """The given values of a patch where it is kept, else sampled ones."""
    values = jax.lax.dynamic_index_in_dim(jnp.asarray(kept.values), patch, 1, keepdims=False)
    mask = jax.lax.dynamic_index_in_dim(jnp.asarray(kept.mask), patch, 1, keepdims=False)
    streams = num_rows // len(mask)  # An unconditional row reads its image's patch.
    given = jnp.tile(values.astype(jnp.float32), (streams, 1, 1))
    keep = jnp.tile(mask, streams)[:, None, None]
    return jax.lax.cond(jnp.all(mask), lambda: given, lambda: jnp.where(keep, given, sampled()))


def _guidance(scales: Float[Array, "E"], patch: Int[Array, ""], weights: Weights) -> PatchGuidance:
    separate = jnp.all(scales == 1) & (patch == 0)
    return PatchGuidance(scales, separate, None if weights is None else jnp.asarray(weights))


def noise_of_images(model: PatchModel, keys: Array, solver: Solver) -> NoiseSource:
    """`noise_from_keys` of the images' keys [B], as a model and a solver need it."""
    _, tokens, bits = model.patch_shape
    return noise_from_keys(keys, solver.num_noises, tokens, bits)


def noise_from_keys(keys: Array, num_noises: int, tokens: int, bits: int) -> NoiseSource:
    """Noise that depends only on an image's key [B] and the patch, not on the batch.

    The unconditional rows' own noise, where a patch asks for it, comes from a key folded once more.
    """

    def normal(key: Array, patch: Int[Array, ""] | int) -> Float[Array, "S P K"]:
        return jax.random.normal(jax.random.fold_in(key, patch), (num_noises, tokens, bits))

    def source(
        patch: Int[Array, ""] | int, separate: Bool[Array, ""] | bool | None
    ) -> Float[Array, "S R P K"]:
        rows = keys
        if separate is not None:
            folded = jax.vmap(lambda key: jax.random.fold_in(key, jnp.uint32(2**32 - 1)))(keys)
            rows = jnp.concatenate([keys, jnp.where(separate, folded, keys)])
        return jax.vmap(normal, in_axes=(0, None), out_axes=1)(rows, patch)

    return source
