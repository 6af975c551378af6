"""Decoding large images in strips of rows, with bounded memory.

It computes what `decoder.Decoder` computes, from the same parameters, up to rounding. Only the
activations between two convolutions are stored in full, in the compute type, at most two of a width
at a time. What a convolution reads (normalized and padded) and returns exists for one strip. The
rows may be sharded over devices. Norms take their statistics over all rows, and a strip reads one
row of each neighbour.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from bitdance_jax.nn import linear
from bitdance_jax.tokenizer.autoencoder import Autoencoder, check_codes
from bitdance_jax.tokenizer.layers import (
    code_statistics,
    depth_to_space,
    normalize,
    of_channels,
    split_groups,
)


LARGEST_PLAIN = 2**18
"""Images of more pixels are decoded in strips."""

STRIP_BYTES = 2**26
"""Largest strip before and after a convolution, in float32, but at least one row of every band."""

BANDS = 8
"""TPUs take a batch of this many images at full speed. A single image would be split into columns
first, with several copies of all of it."""

PixelFunction = Callable[[Array], Array]
"""A function of any number of rows that changes each pixel by itself."""

Params = dict[str, Any]


@dataclass(frozen=True)
class Strips:
    """How images are split: each image, or a device's rows of it, is a batch of bands.

    A strip has a few rows of every band. Below, B is the number of bands of all images.

    Attributes:
      bands: of an image; a divisor of the rows of the codes on a device.
      axes: mesh axes, inside `jax.shard_map`, that the rows are sharded over; empty if each device
        has complete images.
      bytes: see STRIP_BYTES.
    """

    bands: int = 1
    axes: tuple[str, ...] = ()
    bytes: int = STRIP_BYTES


def choose(shape: tuple[int, ...], downsampling: int, axes: tuple[str, ...] = ()) -> Strips | None:
    """Strips for codes [B, h, w, K] on a device, or None for small images.

    Args:
      shape: of the codes.
      downsampling: of the tokenizer.
      axes: see `Strips`.
    """
    batch, height, width, _ = shape
    if not axes and height * width * downsampling**2 <= LARGEST_PLAIN:
        return None
    return Strips(math.gcd(height, max(1, BANDS // batch)), axes)


def decode(
    model: Autoencoder,
    params: Params,
    codes: Float[Array, "B h w K"],
    noise: Float[Array, "B h w K"] | None = None,
    *,
    axes: tuple[str, ...] = (),
) -> Float[Array, "B H W C"]:
    """`Autoencoder.decode`, in strips where the images are large.

    Args:
      model, params: the tokenizer and its parameters; those of the encoder may be missing.
      codes, noise: see `Autoencoder.decode`.
      axes: see `Strips`.
    """
    strips = choose(codes.shape, model.config.downsampling, axes)
    if strips is not None:
        return decode_in_strips(model, params, codes, noise, strips)
    images: Any = model.apply({"params": params}, codes, noise, method="decode")
    return images


def decode_in_strips(
    model: Autoencoder,
    params: Params,
    codes: Float[Array, "B h w K"],
    noise: Float[Array, "B h w K"] | None,
    strips: Strips,
) -> Float[Array, "B H W C"]:
    """`Autoencoder.decode`, split as given; see `decode`."""
    check_codes(model.config, codes, noise)
    decoder = _StripDecoder(strips, model.dtype)
    x = codes if noise is None else jnp.concatenate([codes, noise], axis=-1)
    return decoder(model.config, params["decoder"], x, codes)


@dataclass(frozen=True)
class _StripDecoder:
    """`decoder.Decoder` as functions of its parameters that work strip by strip."""

    strips: Strips
    dtype: DTypeLike

    def __call__(self, config: Any, params: Params, x: Array, codes: Array) -> Array:
        bands = self.strips.bands
        if self.strips.axes:
            codes = jax.lax.all_gather(codes, self.strips.axes, axis=1, tiled=True)
        codes = jnp.repeat(codes, bands, axis=0)
        x = x.reshape(-1, x.shape[1] // bands, *x.shape[2:])
        x = self.convolve(params["conv_in"], x)
        for block in range(config.num_res_blocks):
            x = self.residual_block(params[f"mid_{block}"], x)
        for level in reversed(range(len(config.ch_mult))):
            x = self.adaptive_group_norm(params[f"adaptive_{level}"], x, codes)
            for block in range(config.num_res_blocks):
                x = self.residual_block(params[f"up_{level}_block_{block}"], x)
            if level > 0:
                x = self.convolve(params[f"up_{level}_upsample"], x, after=depth_to_space)
        before = self.norm_and_swish(params["norm_out"], x)
        x = self.convolve(params["conv_out"], x, before=before)
        return x.reshape(-1, x.shape[1] * bands, *x.shape[2:])

    def residual_block(self, params: Params, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        y = self.convolve(params["conv1"], x, before=self.norm_and_swish(params["norm1"], x))
        if "nin_shortcut" in params:
            shortcut = linear.Conv(y.shape[-1], (1, 1), use_bias=False, dtype=self.dtype)
            projected: Any = shortcut.apply({"params": params["nin_shortcut"]}, x)
            x = projected
        before = self.norm_and_swish(params["norm2"], y)
        return self.convolve(params["conv2"], y, before=before, add=x)

    def adaptive_group_norm(
        self, params: Params, x: Float[Array, "B H W C"], codes: Float[Array, "B h w K"]
    ) -> Float[Array, "B H W C"]:
        spread, mean = code_statistics(codes)
        dense = linear.Dense(x.shape[-1], dtype=self.dtype)
        scale: Any = dense.apply({"params": params["gamma"]}, spread)
        shift: Any = dense.apply({"params": params["beta"]}, mean)
        norm = self.group_norm({}, x)

        def write(start: Array | int, height: int, x: Array) -> Array:
            return _put_rows(x, norm(_rows(x, start, height)) * scale + shift, start)

        return self._each_strip(write, x.shape[1], x.size // x.shape[1], x)

    def norm_and_swish(self, params: Params, x: Float[Array, "B H W C"]) -> PixelFunction:
        norm = self.group_norm(params, x)
        return lambda part: nn.silu(norm(part))

    def group_norm(self, params: Params, x: Float[Array, "B H W C"]) -> PixelFunction:
        """The function that normalizes rows by the statistics of the image that they are of."""
        mean = self._mean(split_groups, x)
        variance = self._mean(lambda part: jnp.square(split_groups(part) - mean), x)
        statistics = (of_channels(mean, x.shape[-1]), of_channels(variance, x.shape[-1]))
        affine = (params.get("scale"), params.get("bias"))
        return lambda part: normalize(part, *statistics, *affine).astype(self.dtype)

    def _mean(
        self, function: Callable[[Array], Array], x: Float[Array, "B H W C"]
    ) -> Float32[Array, "B 1 1 G 1"]:
        """Of a function with values [B, H, W, G, F], over images and groups, for each band."""

        def add(start: Array | int, height: int, sums: Array | float) -> Array:
            return sums + jnp.sum(function(_rows(x, start, height)), axis=(1, 2, 4), keepdims=True)

        rows = x.shape[1]
        sums = self._each_strip(add, rows, x.size // rows, add(0, 0, 0.0))
        mean = jnp.mean(self._by_image(sums), axis=1) / (x[0].size // sums[0].size)
        if self.strips.axes:
            mean = jax.lax.pmean(mean, self.strips.axes)
        return jnp.repeat(mean, self.strips.bands, axis=0)

    def convolve(
        self,
        params: Params,
        x: Float[Array, "B H W C"],
        *,
        before: PixelFunction = lambda x: x,
        after: Callable[[Array], Array] = lambda y: y,
        add: Array | None = None,
    ) -> Array:
        """`add + after(conv3x3(before(x)))`.

        Args:
          params: kernel, and bias if any.
          x: bands.
          before: applied to the input of the convolution.
          after: a function of any number of rows; it may return several rows for each.
          add: bands, or None.
        """
        features = params["kernel"].shape[-1]
        conv = linear.Conv(
            features,
            (3, 3),
            padding=((0, 0), (1, 1)),
            use_bias="bias" in params,
            dtype=self.dtype,
        )
        rows = x.shape[1]
        top, bottom = self._neighbours(before(x[:, :1]), before(x[:, -1:]))

        def strip(start: Array | int, height: int) -> Array:
            above = before(_rows(x, start - 1, 1))
            here = before(_rows(x, start, height))
            below = before(_rows(x, start + height, 1))
            above = jnp.where(start == 0, top, above)
            below = jnp.where(start + height == rows, bottom, below)
            padded = jnp.concatenate([above, here, below], axis=1)
            y: Any = conv.apply({"params": params}, padded)
            return after(y)

        def write(start: Array | int, height: int, out: Array) -> Array:
            y = strip(start, height)
            if add is not None:  # `out` starts as `add`, of which no other row is read
                y = _rows(out, start, height) + y
            return _put_rows(out, y, start * (y.shape[1] // height))

        row = jax.eval_shape(lambda: strip(0, 1))
        shape = (len(x), rows * row.shape[1], *row.shape[2:])
        out = _empty(shape, row.dtype, x) if add is None else add
        return self._each_strip(write, rows, max(x.size // rows, row.size), out)

    def _each_strip(
        self,
        function: Callable[[Array | int, int, Array], Array],
        rows: int,
        row_size: int,
        carry: Array,
    ) -> Array:
        """`carry = function(start, height, carry)` for one strip after the other."""
        height = max(1, min(rows, self.strips.bytes // (4 * row_size)))
        count, rest = divmod(rows, height)
        carry = jax.lax.fori_loop(
            0, count, lambda i, carry: function(i * height, height, carry), carry
        )
        return function(rows - rest, rest, carry) if rest else carry

    def _neighbours(self, first: Array, last: Array) -> tuple[Array, Array]:
        """The rows before and after each band; zeros outside of the image."""
        first = self._by_image(first)
        last = self._by_image(last)
        before = jnp.zeros_like(last[:, :1])
        after = jnp.zeros_like(first[:, :1])
        axes = self.strips.axes
        if axes:  # a device that receives nothing gets zeros
            pairs = [(i, i + 1) for i in range(jax.lax.axis_size(axes) - 1)]
            before = jax.lax.ppermute(last[:, -1:], axes, pairs)
            after = jax.lax.ppermute(first[:, :1], axes, [pair[::-1] for pair in pairs])
        above = jnp.concatenate([before, last[:, :-1]], axis=1)
        below = jnp.concatenate([first[:, 1:], after], axis=1)
        return above.reshape(-1, *above.shape[2:]), below.reshape(-1, *below.shape[2:])

    def _by_image(self, x: Array) -> Array:
        return x.reshape(-1, self.strips.bands, *x.shape[1:])


def _rows(x: Array, start: Array | int, height: int) -> Array:
    """Rows from `start` on; outside of `x`, the nearest ones."""
    return jax.lax.dynamic_slice_in_dim(x, start, height, axis=1)


def _put_rows(x: Array, rows: Array, start: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=1)


def _empty(shape: tuple[int, ...], dtype: DTypeLike, x: Array) -> Array:
    """Memory to write to; `x` is any array."""

    def filled(x: Array) -> Array:
        return jnp.full(shape, x[0, 0, 0, 0], dtype)

    # On CPUs `empty` is zeros, a constant that XLA would share and then copy.
    return jax.lax.platform_dependent(x, cpu=filled, default=lambda _: jax.lax.empty(shape, dtype))
