"""The next-patch sampler that all models share: read the prefix, then scan over patches, each drawn by the head and read back.

A model gives three functions of arrays (`Model`); everything here is one traced program: compiled once for each shape.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from bitdance_jax.config import SamplerConfig
from bitdance_jax.flow_head import solver
from bitdance_jax.tokenizer import lfq


Cache = Any


class Model(NamedTuple):
    """What the sampler needs of a model. R rows: the images, or [conditional; unconditional] with guidance.

    Attributes:
      read: bits of patch i [R, P, K], i, cache -> states of patch i + 1 [R, P, C], cache.
      embed_time: times [E] -> vectors [E, D].
      embed_condition: states [R, P, C] -> vectors [R, P, D].
      modulation: time vectors [D], or [E, 1, 1, D] of E evaluations, condition vectors [R, P, D] -> arrays [R, P, D], or [E, R, P, D].
      predict: noisy bits [R, P, K], one evaluation's modulation -> predicted bits [R, P, K].
      time_shift: the head's.
    """

    read: Callable[[Float[Array, "R P K"], Int[Array, ""], Cache], tuple[Float[Array, "R P C"], Cache]]
    embed_time: Callable[[Float[Array, "E"]], Float[Array, "E D"]]
    embed_condition: Callable[[Float[Array, "R P C"]], Float[Array, "R P D"]]
    modulation: Callable[[Float[Array, "*E D"], Float[Array, "R P D"]], Any]
    predict: Callable[[Float[Array, "R P K"], Any], Float[Array, "R P K"]]
    time_shift: float


NoiseSource = Callable[[Int[Array, ""] | int, bool], Float[Array, "S R P K"]]
"""(patch, separate) -> standard normal noise of one patch, `solver.num_noises` draws; `separate`: for the unconditional rows too."""


def noise_from_keys(keys: Array, num_noises: int, tokens: int, bits: int) -> NoiseSource:
    """Noise that depends on an image's own key [B] and the patch alone: an image is the same in any batch.

    The unconditional rows' own noise, where a step asks for it, comes from a key folded once more.
    """

    def draw(keys: Array, patch: Int[Array, ""] | int) -> Float[Array, "S B P K"]:
        one = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, patch), (num_noises, tokens, bits)), out_axes=1)
        return one(keys)

    def source(patch: Int[Array, ""] | int, separate: bool) -> Float[Array, "S R P K"]:
        own = draw(keys, patch)
        if not separate:
            return own
        unconditional = jax.vmap(lambda key: jax.random.fold_in(key, jnp.uint32(2**32 - 1)))(keys)
        return jnp.concatenate([own, draw(unconditional, patch)], axis=1)

    return source


Draw = Callable[[Float[Array, "R P C"], Float[Array, "S B P K"], Any], Float[Array, "B P K"]]
"""(states of a patch, its noise, its guidance scale or None) -> its values."""


def sample_patches(
    model: Model,
    states: Float[Array, "R P C"],
    cache: Cache,
    num_steps: int,
    noise: NoiseSource,
    config: SamplerConfig,
) -> Float[Array, "N B P K"]:
    """Pre-sign values of every patch of the B images, in order; their signs are the bits.

    Args:
      model: see `Model`.
      states: of the first patch, after the prefix was read; 2 B rows [conditional; unconditional] if the guidance scale is not 1.
      cache: what `model.read` left of the prefix.
      num_steps: N, patches of an image.
      noise: see `NoiseSource`.
      config: solver and guidance.

    With the linear schedule the first patch has scale 1. The release then samples both streams apart, each row with its own noise: the
    unconditional stream reads its own first patch. From the second patch on both read the guided one.
    """
    draw = drawing(model, config)
    first = draw_first(draw, states, num_steps, noise, config)
    _, rest = jax.lax.scan(following(model, draw, num_steps, noise, config), (first, cache), jnp.arange(1, num_steps))
    return jnp.concatenate([first[None, : num_images(len(first), config)], rest])


class Drawing(NamedTuple):
    """A batch of images that are partly drawn.

    Attributes:
      rows: values of the last patch, as the rows read it.
      cache: of what was read before it.
      codes: in {-1, 1}; 0 where nothing is drawn yet.
      drawn: patches that are.
    """

    rows: Float[Array, "R P K"]
    cache: Cache
    codes: Int8[Array, "N B P K"]
    drawn: Int[Array, ""]


def begin(model: Model, states: Float[Array, "R P C"], cache: Cache, num_steps: int, noise: NoiseSource, config: SamplerConfig) -> Drawing:
    """The bits of `sample_patches` as far as the first patch; `advance` goes on, and both together draw the same."""
    rows = draw_first(drawing(model, config), states, num_steps, noise, config)
    first = rows[: num_images(len(rows), config)]
    codes = jnp.zeros((num_steps, *first.shape), jnp.int8).at[0].set(lfq.quantize(first).astype(jnp.int8))
    return Drawing(rows, cache, codes, jnp.int32(1))


def advance(model: Model, drawn: Drawing, noise: NoiseSource, config: SamplerConfig, stop: Int[Array, ""] | int) -> Drawing:
    """Draws on until `stop` patches are drawn, however many those are: one program."""
    step = following(model, drawing(model, config), len(drawn.codes), noise, config)

    def draw(patch: Int[Array, ""], drawn: Drawing) -> Drawing:
        (rows, cache), values = step((drawn.rows, drawn.cache), patch)
        codes = drawn.codes.at[patch].set(lfq.quantize(values).astype(jnp.int8))
        return Drawing(rows, cache, codes, patch + 1)

    return jax.lax.fori_loop(drawn.drawn, jnp.asarray(stop, jnp.int32), draw, drawn)


def drawing(model: Model, config: SamplerConfig) -> Draw:
    """The head's solver, its times embedded once for all patches."""
    steps = solver.solver_steps(config, model.time_shift)
    times = model.embed_time(steps.t)

    def draw(states: Float[Array, "R P C"], patch_noise: Float[Array, "S B P K"], scale: Any) -> Float[Array, "B P K"]:
        condition = model.embed_condition(states)
        if modulated_at_once(states.shape[0] * states.shape[1], *times.shape):
            return solver.solve(model.predict, patch_noise, steps, model.modulation(times[:, None, None], condition), scale)
        return solver.solve(lambda x, time: model.predict(x, model.modulation(time, condition)), patch_noise, steps, times, scale)

    return draw


def modulated_at_once(rows: int, evaluations: int, width: int) -> bool:
    """Whether a patch's modulation is made for all evaluations of the head at once.

    A fifth of the head's weights make it. While the rows are few, reading weights is what takes the time, and those are then read once a
    patch; but what they make is written and read for each row, so that the rows must be far fewer than the head is wide. The bound on
    what is kept is 14 vectors of that width for each of 2^14 rows: 2.2 GiB of a released text-to-image model.
    """
    return rows <= 256 and 16 * rows <= width and rows * evaluations <= 2**14


def draw_first(
    draw: Draw, states: Float[Array, "R P C"], num_steps: int, noise: NoiseSource, config: SamplerConfig
) -> Float[Array, "R P K"]:
    """Pre-sign values of the first patch as every row reads them, the images first. See `sample_patches`."""
    guided = config.guidance_scale != 1
    apart = guided and config.guidance_schedule == "linear"
    scale = jnp.asarray(solver.guidance_scales(config, num_steps)[0]) if guided and not apart else None
    values = draw(states, noise(0, apart), scale)
    return jnp.concatenate([values, values]) if guided and not apart else values


def following(
    model: Model, draw: Draw, num_steps: int, noise: NoiseSource, config: SamplerConfig
) -> Callable[[tuple[Array, Cache], Int[Array, ""]], tuple[tuple[Array, Cache], Array]]:
    """A loop's step: ((values of the patch before [R, P, K], cache), patch) -> (the same of this patch, its values [B, P, K])."""
    guided = config.guidance_scale != 1
    scales = jnp.asarray(solver.guidance_scales(config, num_steps))

    def step(carry: tuple[Array, Cache], patch: Int[Array, ""]) -> tuple[tuple[Array, Cache], Float[Array, "B P K"]]:
        rows, cache = carry
        states, cache = model.read(lfq.quantize(rows), patch - 1, cache)
        values = draw(states, noise(patch, False), scales[patch] if guided else None)
        return (jnp.concatenate([values, values]) if guided else values, cache), values

    return step


def num_images(rows: int, config: SamplerConfig) -> int:
    """B of R rows."""
    return rows // rows_of_image(config)


def rows_of_image(config: SamplerConfig) -> int:
    """With guidance a conditional and an unconditional one."""
    return 2 if config.guidance_scale != 1 else 1
