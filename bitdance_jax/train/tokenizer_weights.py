"""Weights that tokenizer training reads: perceptual networks, Inception, frozen encoders, initial
decoders."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from bitdance_jax.config import TokenizerLossConfig
from bitdance_jax.convert import perceptual
from bitdance_jax.errors import UserError
from bitdance_jax.fid import inception_weights
from bitdance_jax.io import model_lookup
from bitdance_jax.io.manifest import IN_WORDS
from bitdance_jax.io.model_lookup import UnfinishedRun
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.tokenizer import efficientnet
from bitdance_jax.tokenizer import perceptual as lpips
from bitdance_jax.train.task import Params


class PerceptualNetwork(NamedTuple):
    """A network that measures the distance of images.

    Attributes:
      distance: (params, images, images) -> distance of each pair.
      abstract_params: shapes of its parameters.
      load: reads them from a file; of None, from where it is usually found.
      smallest_side: of an image, in pixels.
    """

    distance: Callable[[Params, jax.Array, jax.Array], jax.Array]
    abstract_params: Callable[[], Params]
    load: Callable[[str | None], Params]
    smallest_side: int


PERCEPTUAL_NETWORKS = {
    "vgg16": PerceptualNetwork(
        lpips.lpips, lpips.abstract_params, perceptual.load_lpips, lpips.SMALLEST_SIDE
    ),
    "efficientnet": PerceptualNetwork(
        efficientnet.distance, efficientnet.abstract_params, perceptual.load_efficientnet, 1
    ),
}


def read_frozen(
    loss: TokenizerLossConfig, *, inception: str | None, encoder_of: str | None
) -> Params:
    """The weights that are not trained, as numpy arrays.

    Args:
      loss: says which perceptual network there is.
      inception: file with FID's Inception-v3; None: there is no rFID.
      encoder_of: folder of the tokenizer whose encoder is frozen; None: the encoder is trained.

    Raises:
      FileError: weights of the perceptual network or of Inception are missing, damaged, or those of
        another network.
      UserError: there is no tokenizer in the folder, or it is that of an unfinished run.
    """
    frozen: Params = {}
    if loss.perceptual:
        frozen["perceptual"] = PERCEPTUAL_NETWORKS[loss.perceptual_network].load(
            loss.perceptual_weights
        )
    if inception is not None:
        frozen["inception"] = inception_weights.load(inception)
    if encoder_of is not None:
        if isinstance(model_lookup.locate(encoder_of), UnfinishedRun):
            raise UserError(
                f"init {encoder_of} is a run that is not finished: its encoder still changes; "
                "resume it and let it finish first"
            )
        frozen["encoder"] = jax.tree.map(
            lambda x: np.asarray(x, np.float32), read_tokenizer(encoder_of)["encoder"]
        )
    return frozen


def read_tokenizer(folder: str) -> Params:
    """The weights of the tokenizer in a model folder, alone or within a model: float32 arrays.

    Raises:
      UserError: there is no such model.
    """
    kind = model_lookup.read_config(folder).kind
    if kind == "language_model":
        there = IN_WORDS[kind]
        raise UserError(f"init {folder} holds a {there}, and this run trains a tokenizer")
    return jax.tree.map(np.asarray, Tokenizer.load(folder).params)


def with_noise_inputs(decoder: Params, bits: int) -> Params:
    """A plain decoder as a GAN decoder that ignores its noise: new inputs have weight 0."""
    conv_in = decoder["conv_in"]
    kernel = np.asarray(conv_in["kernel"])
    zeros = np.zeros((*kernel.shape[:2], bits, kernel.shape[3]), kernel.dtype)
    widened = {**conv_in, "kernel": np.concatenate([kernel, zeros], axis=2)}
    return {**decoder, "conv_in": widened}
