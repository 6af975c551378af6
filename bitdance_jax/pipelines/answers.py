"""The compiled program that answers prompts in text."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, UInt32

from bitdance_jax.config import TextSamplerConfig, TextToImageConfig
from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.mesh import compiler_options
from bitdance_jax.models.text_to_image import Prefixes, TextToImage
from bitdance_jax.models.token_reader import TokenReader
from bitdance_jax.sampling.next_token import sample_text


LM_HEAD = ("text", "lm_head", "kernel")
"""Path of the output layer in the model's parameters. Sampling images does not need it."""


class AnswerProgram:
    """Samples texts on a mesh; compiled once for each padded length and setting of the sampler."""

    def __init__(self, config: TextToImageConfig, mesh: Mesh, dtype: jnp.dtype) -> None:
        self._model = TextToImage(config, dtype=dtype)
        self._mesh = mesh
        self._dtype = dtype
        self._run: Any = jax.jit(
            self._sample,
            static_argnames=("end", "config"),
            compiler_options=compiler_options(mesh),
        )

    def place(self, output_layer: Any) -> Array:
        """The kernel of the output layer [D, V] on the devices, in the compute type."""
        spec = sharding.parameter_spec(
            self._mesh, "/".join(("model", *LM_HEAD)), output_layer.shape
        )
        return jax.make_array_from_callback(
            output_layer.shape,
            NamedSharding(self._mesh, spec),
            lambda index: output_layer[index].astype(self._dtype),
        )

    def __call__(
        self,
        params: Any,
        output_layer: Array,
        prefixes: Prefixes,
        keys: UInt32[Array | np.ndarray, "B 2"],
        *,
        end: int,
        config: TextSamplerConfig,
    ) -> tuple[Array, Array]:
        """Tokens [B, T], and the length of each text; see `sample_text`."""
        text = {**params["text"], "lm_head": {"kernel": output_layer}}
        return self._run({**params, "text": text}, prefixes, keys, end=end, config=config)

    def _sample(
        self,
        params: Any,
        prefixes: Prefixes,
        keys: UInt32[Array, "B 2"],
        *,
        end: int,
        config: TextSamplerConfig,
    ) -> tuple[Array, Array]:
        with jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh):
            reader = TokenReader(self._model, params, prefixes, config.max_tokens)
            return sample_text(reader, jax.random.wrap_key_data(keys), end, config)
