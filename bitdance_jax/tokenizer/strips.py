"""How the decoder goes through the rows of images: all at once, or in strips, for images whose activations are large.

In strips, only what goes from one convolution to the next is held whole, in the compute type, at most two of a width at a time; what a
convolution reads and makes, normalized and padded, is held for one strip. The rows may lie on several devices. The images are the same
up to rounding: norms take their statistics of all rows, and a strip sees one row of each neighbour.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


WHOLE_PIXELS = 2**18
"""Images of more pixels are decoded in strips."""

STRIP_BYTES = 2**26
"""The most that a strip takes in float32 before a convolution, and after it; one row of every band may take more."""

BANDS = 8
"""TPUs take a batch of so many images at full speed; a single one is first cut into columns, with several copies of all."""


@dataclass(frozen=True)
class Whole:
    """All rows at once."""

    def split(self, x: Float[Array, "B h W C"]) -> Float[Array, "N H W C"]:
        """Images, or a device's rows of them, to a batch of what the other methods call parts."""
        return x

    def join(self, parts: Float[Array, "N H W C"]) -> Float[Array, "B h W C"]:
        """The way back."""
        return parts

    def images_of(self, x: Float[Array, "B h W C"]) -> Float[Array, "N H W C"]:
        """For each part the whole image that it is of."""
        return x

    def moments(
        self, groups: Callable[[Array], Array], x: Float[Array, "N H W C"]
    ) -> tuple[Array, Array]:
        """Mean and variance of each group of channels over the image that a part is of, float32 [N, 1, 1, G, 1].

        Args:
          groups: pixels [N, h, W, C] to float32 [N, h, W, G, C / G].
          x: parts.
        """
        values = groups(x)
        mean = jnp.mean(values, axis=(1, 2, 4), keepdims=True)
        # E[x^2] - E[x]^2 would lose two digits against the release.
        return mean, jnp.mean(jnp.square(values - mean), axis=(1, 2, 4), keepdims=True)

    def map(
        self, function: Callable[[Array], Array], x: Float[Array, "N H W C"]
    ) -> Float[Array, "N H W C"]:
        """`function`, which changes each pixel by itself, of parts."""
        return function(x)

    def convolve(
        self,
        conv: nn.Conv,
        x: Float[Array, "N H W C"],
        before: Callable[[Array], Array] = lambda x: x,
        after: Callable[[Array], Array] = lambda y: y,
        add: Float[Array, "N H2 W2 D"] | None = None,
    ) -> Float[Array, "N H2 W2 D"]:
        """`add + after(conv(before(x)))`.

        Args:
          conv: 3x3, of stride 1, padded by one.
          x: parts.
          before, after: functions of any number of rows; `before` changes each pixel by itself, `after` may make several rows of one.
          add: nothing if left out.
        """
        y = after(conv(before(x)))
        return y if add is None else add + y


@dataclass(frozen=True)
class Strips(Whole):
    """A strip at a time. Each image, or each device's rows of it, is a batch of bands: a strip has some rows of every band.

    Attributes:
      bands: of an image; a divisor of the codes' rows, or a device's.
      axes: of the mesh, inside `jax.shard_map`, over which the rows are cut; empty where each device has its images whole.
      bytes: see STRIP_BYTES.
    """

    bands: int = 1
    axes: tuple[str, ...] = ()
    bytes: int = STRIP_BYTES

    def split(self, x: Float[Array, "B h W C"]) -> Float[Array, "N H W C"]:
        return x.reshape(-1, x.shape[1] // self.bands, *x.shape[2:])

    def join(self, parts: Float[Array, "N H W C"]) -> Float[Array, "B h W C"]:
        return parts.reshape(-1, parts.shape[1] * self.bands, *parts.shape[2:])

    def images_of(self, x: Float[Array, "B h W C"]) -> Float[Array, "N H W C"]:
        images = jax.lax.all_gather(x, self.axes, axis=1, tiled=True) if self.axes else x
        return jnp.repeat(images, self.bands, axis=0)

    def moments(
        self, groups: Callable[[Array], Array], x: Float[Array, "N H W C"]
    ) -> tuple[Array, Array]:
        mean = self._mean(groups, x)
        return mean, self._mean(lambda part: jnp.square(groups(part) - mean), x)

    def _mean(self, function: Callable[[Array], Array], x: Array) -> Array:
        def add(start: Array | int, height: int, sums: Array | float) -> Array:
            return sums + jnp.sum(function(_rows(x, start, height)), axis=(1, 2, 4), keepdims=True)

        rows = x.shape[1]
        sums = self._each(add, rows, x.size // rows, add(0, 0, 0.0))
        of_device = jnp.mean(self._by_image(sums), axis=1) / (x[0].size // sums[0].size)
        of_image = jax.lax.pmean(of_device, self.axes) if self.axes else of_device
        return jnp.repeat(of_image, self.bands, axis=0)

    def map(
        self, function: Callable[[Array], Array], x: Float[Array, "N H W C"]
    ) -> Float[Array, "N H W C"]:
        def write(start: Array | int, height: int, x: Array) -> Array:
            return _put_rows(x, function(_rows(x, start, height)), start)

        return self._each(write, x.shape[1], x.size // x.shape[1], x)

    def convolve(
        self,
        conv: nn.Conv,
        x: Float[Array, "N H W C"],
        before: Callable[[Array], Array] = lambda x: x,
        after: Callable[[Array], Array] = lambda y: y,
        add: Float[Array, "N H2 W2 D"] | None = None,
    ) -> Float[Array, "N H2 W2 D"]:
        unbound, variables = (
            conv.unbind()
        )  # Flax's modules are not to be called inside of JAX's loops
        without_padding = unbound.clone(padding=((0, 0), (1, 1)))
        rows = x.shape[1]
        top, bottom = self._neighbours(before(x[:, :1]), before(x[:, -1:]))

        def strip(start: Array | int, height: int) -> Array:
            above, here, below = (
                before(_rows(x, *place))
                for place in ((start - 1, 1), (start, height), (start + height, 1))
            )
            above, below = (
                jnp.where(start == 0, top, above),
                jnp.where(start + height == rows, bottom, below),
            )
            y: Any = without_padding.apply(variables, jnp.concatenate([above, here, below], axis=1))
            return after(y)

        def write(start: Array | int, height: int, out: Array) -> Array:
            y = strip(start, height)
            y = (
                y if add is None else _rows(out, start, height) + y
            )  # in the place of `add`, of which no other row is read
            return _put_rows(out, y, start * (y.shape[1] // height))

        row = jax.eval_shape(lambda: strip(0, 1))
        out = (
            _empty((len(x), rows * row.shape[1], *row.shape[2:]), row.dtype, x)
            if add is None
            else add
        )
        return self._each(write, rows, max(x.size // rows, row.size), out)

    def _each(
        self,
        function: Callable[[Array | int, int, Array], Array],
        rows: int,
        row_size: int,
        carry: Array,
    ) -> Array:
        """`carry = function(start, height, carry)` of one strip after the other."""
        height = max(1, min(rows, self.bytes // (4 * row_size)))
        count, rest = divmod(rows, height)
        carry = jax.lax.fori_loop(
            0, count, lambda i, carry: function(i * height, height, carry), carry
        )
        return function(rows - rest, rest, carry) if rest else carry

    def _neighbours(self, first: Array, last: Array) -> tuple[Array, Array]:
        """The rows before the first and after the last one of each band; outside of the image, zeros."""
        first, last = self._by_image(first), self._by_image(last)
        before, after = jnp.zeros_like(last[:, :1]), jnp.zeros_like(first[:, :1])
        if self.axes:  # devices that nobody sends to get zeros
            pairs = [(i, i + 1) for i in range(jax.lax.axis_size(self.axes) - 1)]
            before = jax.lax.ppermute(last[:, -1:], self.axes, pairs)
            after = jax.lax.ppermute(
                first[:, :1], self.axes, [(receiver, sender) for sender, receiver in pairs]
            )
        above, below = (
            jnp.concatenate([before, last[:, :-1]], axis=1),
            jnp.concatenate([first[:, 1:], after], axis=1),
        )
        return above.reshape(-1, *above.shape[2:]), below.reshape(-1, *below.shape[2:])

    def _by_image(self, x: Array) -> Array:
        return x.reshape(-1, self.bands, *x.shape[1:])


def choose(shape: tuple[int, ...], downsampling: int, axes: tuple[str, ...] = ()) -> Whole:
    """For codes [B, h, w, K], a device's rows where `axes` of the mesh cut them."""
    batch, height, width, _ = shape
    if not axes and height * width * downsampling**2 <= WHOLE_PIXELS:
        return Whole()
    return Strips(math.gcd(height, max(1, BANDS // batch)), axes)


def _rows(x: Array, start: Array | int, height: int) -> Array:
    """Some rows; others, where `start` is outside."""
    return jax.lax.dynamic_slice_in_dim(x, start, height, axis=1)


def _put_rows(x: Array, rows: Array, start: Array | int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=1)


def _empty(shape: tuple[int, ...], dtype: DTypeLike, x: Array) -> Array:
    """Memory to write to; `x` is any array at hand."""

    def filled(x: Array) -> Array:
        return jnp.full(shape, x[0, 0, 0, 0], dtype)

    # On CPUs `empty` is zeros, of which XLA would keep one array for all, and copy that.
    return jax.lax.platform_dependent(x, cpu=filled, default=lambda _: jax.lax.empty(shape, dtype))
