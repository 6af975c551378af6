"""The config of tokenizer training, without what it makes."""

from dataclasses import dataclass

from bitdance_jax.config import TokenizerConfig, TokenizerLossConfig
from bitdance_jax.config.plain import PathName, Positive, Size, require
from bitdance_jax.data.crop_sizes import CropSizes
from bitdance_jax.tokenizer import discriminator
from bitdance_jax.train.task import TrainingConfig
from bitdance_jax.train.tokenizer_weights import PERCEPTUAL_NETWORKS


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(TrainingConfig):
    """What a training run of a tokenizer is: the fields of `TokenizerTraining`.

    Attributes:
      model: its sizes.
      image_size: of the images, in pixels.
      crop_sizes: of the training crops, in pixels; each batch has one of them. (): `image_size`,
        which remains that of the held-out images.
      crop_weights: relative frequencies of the `crop_sizes`; (): all alike.
      loss: weights of the loss terms.
      inception: file with the weights of FID's Inception-v3; then the metrics of the held-out
        images contain rFID. None: they do not.
      train_encoder: False: the encoder is that of `init`, and only the decoder is trained, as in
        the second stage of a tokenizer with a GAN decoder. A plain decoder in `init` is widened.
    """

    model: TokenizerConfig
    image_size: Size
    crop_sizes: tuple[Size, ...] = ()
    crop_weights: tuple[Positive, ...] = ()
    loss: TokenizerLossConfig = TokenizerLossConfig()
    inception: PathName | None = None
    train_encoder: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        factor = self.model.downsampling
        for name, side in self._sides():
            require(
                side % factor == 0,
                f"{name} must be a multiple of the downsampling {factor}, got {side}",
                name,
            )
        require(
            len(self.crop_weights) in (0, len(self.crop_sizes)),
            f"crop_weights must be as many as crop_sizes, got {len(self.crop_weights)} and "
            f"{len(self.crop_sizes)}",
            "crop_weights",
        )
        require(
            self.model.image_channels == 3,
            f"training images are RGB; set model.image_channels 3, got {self.model.image_channels}",
            "model.image_channels",
        )
        require(
            self.train_encoder or self.init is not None,
            "train_encoder False needs the encoder of a trained tokenizer; set init",
            "init",
        )
        for term, smallest in _smallest_sides(self.loss).items():
            for name, side in self._sides():
                require(
                    side >= smallest,
                    f"loss.{term} needs images of at least {smallest} pixels, got {name} {side}; "
                    f"set loss.{term} 0 or a larger {name}",
                    name,
                )
        require(
            not self.loss.adversarial or self.run.accumulate == 1,
            "the discriminator's batch statistics are those of the complete batch; set "
            "run.accumulate 1 or loss.adversarial 0",
            "run.accumulate",
        )

    def crops(self) -> CropSizes:
        """The sizes of the training crops."""
        sizes = self.crop_sizes or (self.image_size,)
        return CropSizes(sizes, self.crop_weights or (1.0,) * len(sizes), self.run.seed)

    def _sides(self) -> list[tuple[str, int]]:
        """The fields with sides of images, and their values."""
        return [
            ("image_size", self.image_size),
            *(("crop_sizes", side) for side in self.crop_sizes),
        ]


def _smallest_sides(loss: TokenizerLossConfig) -> dict[str, int]:
    """Pixels that an image needs at least, by the field of the loss that needs them."""
    sides = {}
    if loss.perceptual:
        sides["perceptual"] = PERCEPTUAL_NETWORKS[loss.perceptual_network].smallest_side
    if loss.adversarial:
        sides["adversarial"] = discriminator.smallest_side(loss.discriminator.layers)
    return sides
