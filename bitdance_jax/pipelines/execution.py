"""Computes the images of a request, batch by batch."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from bitdance_jax.config import ClassConditionalConfig, TextToImageConfig
from bitdance_jax.distributed import multihost
from bitdance_jax.io.progress import Progress
from bitdance_jax.pipelines.partial_images import GREY, Partial, pixels_of_patches
from bitdance_jax.pipelines.programs import Programs
from bitdance_jax.pipelines.request import Request
from bitdance_jax.pipelines.tokenizer import Codes
from bitdance_jax.pipelines.weights import Params
from bitdance_jax.sampling.compiled import splits_images
from bitdance_jax.tokenizer.codes import code_dtype


REPORTS = 16
"""How often `Execution.arrays` returns to the host while a batch is sampled, to show progress."""


class Execution:
    """Runs requests to one model on its devices. Weights are those of `Pipeline.params`.

    Attributes:
      programs: compiled ones.
    """

    def __init__(
        self, config: ClassConditionalConfig | TextToImageConfig, mesh: Mesh, dtype: jnp.dtype
    ) -> None:
        self._tokenizer = config.tokenizer
        self.programs = Programs(config, mesh, dtype)

    def arrays(
        self, params: Params, request: Request, as_codes: bool, progress: bool
    ) -> np.ndarray:
        """All images, uint8 [N, H, W, 3], or all codes, [N, h, w, K]."""
        parts = list(self._finished(params, request, as_codes, progress))
        return np.concatenate(parts) if parts else self._nothing(request, as_codes)

    def steps(self, params: Params, request: Request, every: int) -> Iterator[Partial]:
        """The images of the first batch after each `every` patches."""
        _, keys = request.batch(0)
        for values, sampled in self._states(params, request, 0, every):
            codes = self._codes(request, 0, values, sampled)
            images = _fetch(self.programs.decode(params["tokenizer"], codes, keys))
            missing = request.missing(sampled)
            grey = pixels_of_patches(missing, request.xy, self._tokenizer.downsampling)[..., None]
            shown = request.pasted(np.where(grey, GREY, images), 0)
            yield Partial(sampled, request.num_patches, shown)

    def batches(self, params: Params, request: Request) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
        """The images of each batch; the devices compute the next one in the meantime."""
        images: Array | None = None
        for start in request.starts:
            finished, images = images, self._start_batch(params, request, start)
            if finished is not None:
                yield request.pasted(_fetch(finished), start - request.batch_size)
        if images is not None:
            last = _fetch(images)[: (request.keys.count - 1) % request.batch_size + 1]
            yield request.pasted(last, request.starts[-1])

    def _finished(
        self, params: Params, request: Request, as_codes: bool, progress: bool
    ) -> Iterator[np.ndarray]:
        """Images or codes of each batch, under a bar of patches."""
        total = request.num_patches * len(request.starts)
        every = max(1, request.num_patches // REPORTS)
        with Progress(total, "patch", "sampling", shown=progress) as bar:
            for start in request.starts:
                before = bar.n
                for values, sampled in self._states(params, request, start, every):
                    bar.advance(before + sampled - bar.n)
                    all_values = values
                result = self._codes(request, start, all_values, request.num_patches)
                if not as_codes:
                    _, keys = request.batch(start)
                    with bar.doing("decoding"):
                        result = self.programs.decode(params["tokenizer"], result, keys)
                        jax.block_until_ready(result)
                fetched = _fetch(result)[: request.keys.count - start]
                yield fetched if as_codes else request.pasted(fetched, start)

    def _states(
        self, params: Params, request: Request, start: int, every: int
    ) -> Iterator[tuple[Float[Array, "N B P K"], int]]:
        """The patches of a batch, and the number of those that are sampled."""
        inputs, keys = request.batch(start)
        options: Any = {
            "solver": request.solver,
            "scales": request.scales,
            "num_patches": request.num_patches,
            "every": every,
        }
        sampler = self.programs.sampler
        for state, sampled in sampler.states(params["model"], inputs, keys, **options):
            jax.block_until_ready(state.patch)
            yield state.values, sampled

    def _start_batch(self, params: Params, request: Request, start: int) -> UInt8[Array, "B H W 3"]:
        """Returns before the devices have computed it."""
        inputs, keys = request.batch(start)
        return self.programs.sample(
            params,
            inputs,
            keys,
            solver=request.solver,
            scales=request.scales,
            num_patches=request.num_patches,
            height=request.size[0] // self._tokenizer.downsampling,
        )

    def _codes(
        self, request: Request, start: int, values: Float[Array, "N B P K"], sampled: int
    ) -> Codes:
        rows = request.size[0] // self._tokenizer.downsampling
        kept = request.batch(start)[0].kept if sampled < request.num_patches else None
        return self.programs.to_codes(values, np.int32(sampled), kept, height=rows)

    def _nothing(self, request: Request, as_codes: bool) -> np.ndarray:
        """The result for no inputs."""
        height, width = request.size
        if not as_codes:
            return np.zeros((0, height, width, 3), np.uint8)
        down, bits = self._tokenizer.downsampling, self._tokenizer.bits
        return np.zeros(
            (0, height // down, width // down, bits), code_dtype(self._tokenizer.latents)
        )


def whole_parts(mesh: Mesh, images: int) -> int:
    """Of a batch with more images than devices, as many for each device of a data mesh."""
    parts = mesh.size
    if images < parts or not splits_images(mesh, parts):
        return images
    return -(-images // parts) * parts


def _fetch(array: Array) -> np.ndarray:
    """An array of this process's devices, or of all hosts', as numpy."""
    return np.asarray(array) if array.is_fully_addressable else multihost.gather(array)
