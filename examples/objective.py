"""An objective of your own: a tokenizer whose bits also tell the class of an image.

    python examples/objective.py                                     # a few steps on the emoji
    bitdance train examples/objective.py --data.source folder --data.path images --num-classes 3

The objective adds a linear classifier to the tokenizer's losses. It has a parameter of its own, and
a sharding rule for it. The config makes the objective and the task; nothing else has to know them.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from bitdance_jax.config import OptimizerConfig, RunConfig, TokenizerConfig
from bitdance_jax.config.plain import Count, NotNegative, require
from bitdance_jax.data.config import DataConfig
from bitdance_jax.io import image_files
from bitdance_jax.tokenizer import lfq
from bitdance_jax.tokenizer.autoencoder import Autoencoder
from bitdance_jax.train import Batch, Metrics, Params, TokenizerTraining, train
from bitdance_jax.train.tokenizer_objective import TokenizerObjective
from bitdance_jax.train.tokenizer_training import TokenizerTask


@dataclass(frozen=True, kw_only=True)
class ClassifyingTraining(TokenizerTraining):
    """A tokenizer's training with a classifier on its bits.

    Attributes:
      num_classes: of the data.
      classification: weight of the classifier's cross-entropy.
    """

    num_classes: Count
    classification: NotNegative = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss.adversarial == 0, "there is no adversarial loss here", "loss.adversarial")

    def make_objective(self) -> "ClassifyingObjective":
        return ClassifyingObjective(self)

    def make_task(self) -> "ClassifyingTask":
        return ClassifyingTask(self)


class ClassifyingObjective(TokenizerObjective):
    """The tokenizer's losses and the cross-entropy of a linear classifier of its bits."""

    sharding_rules = ((r"classifier/kernel", P("fsdp", None)),)

    def __init__(self, config: ClassifyingTraining) -> None:
        super().__init__(config)
        self._training = config
        self._autoencoder = Autoencoder(config.model)

    def init(self, key: jax.Array) -> Params:
        config = self._training
        bits = config.model.bits * (config.image_size // config.model.downsampling) ** 2
        kernel = jnp.zeros((bits, config.num_classes))
        return super().init(key) | {"classifier": {"kernel": kernel}}

    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        loss, metrics = super().loss(params, frozen, batch, keys)
        classified = self._classify(params, frozen, batch)
        loss = loss + self._training.classification * classified["cross_entropy"]
        return loss, metrics | classified

    def evaluate(self, params: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Metrics:
        return super().evaluate(params, frozen, batch, keys) | self._classify(params, frozen, batch)

    def _classify(self, params: Params, frozen: Params, batch: Batch) -> Metrics:
        pixels = image_files.to_model(batch["image"])
        variables = {"params": frozen | params}
        z: Any = self._autoencoder.apply(variables, pixels, method="encode")
        codes = lfq.quantize_straight_through(z).reshape(len(z), -1)
        logits = codes @ params["classifier"]["kernel"]
        labels = batch["label"]
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return {
            "cross_entropy": cross_entropy.mean(),
            "accuracy": jnp.mean(logits.argmax(axis=-1) == labels),
        }


class ClassifyingTask(TokenizerTask):
    """Exports the tokenizer without the classifier."""

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        tokenizer = {name: part for name, part in ema_params.items() if name != "classifier"}
        super().export(tokenizer, folder, step=step, metrics=metrics)


def get_config() -> ClassifyingTraining:
    """At toy size, on the embedded emoji; `bitdance train` calls this."""
    return ClassifyingTraining(
        run=RunConfig(workdir="runs/classifying", steps=4, log_every=2),
        model=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=1),
        image_size=16,
        num_classes=97,
        data=DataConfig(batch_size=8),
        optimizer=OptimizerConfig(warmup_steps=2),
    )


def main() -> None:
    config = get_config()
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(config.run, workdir=f"{folder}/run")
        config = dataclasses.replace(config, run=run)
        train(config.make_task(), config)


if __name__ == "__main__":
    main()
