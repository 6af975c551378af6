"""The discriminator of a tokenizer's training: its state, its step, and the tokenizer's term."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from bitdance_jax.config import TokenizerLossConfig
from bitdance_jax.distributed.sharding import Rules
from bitdance_jax.tokenizer import adversarial
from bitdance_jax.tokenizer.adversarial import LogitMeans
from bitdance_jax.tokenizer.discriminator import PatchDiscriminator
from bitdance_jax.train.task import Metrics, Params


SHARDING_RULES: Rules = (
    (r"batch_stats/.*", PartitionSpec()),
    (r"logit_means|opt_state", PartitionSpec()),  # scalars
)


class Adversary:
    """A discriminator against a tokenizer.

    Its state is a dict: `params`, `batch_stats` (BatchNorm's running statistics), `opt_state`, and
    `logit_means` (for LeCAM). It computes in float32.
    """

    def __init__(self, config: TokenizerLossConfig, image_size: int) -> None:
        sizes = config.discriminator
        self._config = sizes
        self._image_size = image_size
        self._model = PatchDiscriminator(sizes.filters, sizes.layers)
        self._optimizer = optax.adam(sizes.learning_rate, b1=sizes.b1, b2=sizes.b2)

    def init(self, key: jax.Array) -> Params:
        """The state before the first step."""
        image = jnp.zeros((1, self._image_size, self._image_size, 3))
        variables = self._model.init(key, image)
        return {
            "params": variables["params"],
            "batch_stats": variables["batch_stats"],
            "opt_state": self._optimizer.init(variables["params"]),
            "logit_means": LogitMeans.zeros(),
        }

    def generator_term(self, state: Params) -> Callable[[jax.Array], jax.Array]:
        """The tokenizer's adversarial loss as a function of reconstructions."""
        fixed = jax.lax.stop_gradient(state["params"])

        def term(fake: jax.Array) -> jax.Array:
            logits, _ = self._logits(fixed, state["batch_stats"], fake)
            return adversarial.generator_term(logits)

        return term

    def update(
        self, state: Params, *, real: jax.Array, fake: jax.Array, step: jax.Array
    ) -> tuple[Params, Metrics]:
        """One step of the discriminator; before `start` it does not change.

        Args:
          state: as of `init`.
          real: images in [-1, 1].
          fake: their reconstructions.
          step: number of steps done.
        """

        def loss(params: Params) -> tuple[jax.Array, tuple[Params, LogitMeans, Metrics]]:
            # Statistics of real images and of reconstructions are taken apart.
            real_logits, statistics = self._logits(params, state["batch_stats"], real)
            fake_logits, statistics = self._logits(params, statistics, fake)
            means = state["logit_means"].update(real_logits, fake_logits)
            hinge = adversarial.hinge(real_logits, fake_logits)
            lecam = adversarial.lecam(real_logits, fake_logits, means)
            total = hinge + self._config.lecam * lecam
            metrics = {
                "discriminator_loss": total,
                "logits_real": jnp.mean(real_logits),
                "logits_fake": jnp.mean(fake_logits),
            }
            return total, (statistics, means, metrics)

        params = state["params"]
        (_, (statistics, means, metrics)), gradients = jax.value_and_grad(loss, has_aux=True)(
            params
        )
        updates, opt_state = self._optimizer.update(gradients, state["opt_state"], params)
        updated = {
            "params": optax.apply_updates(params, updates),
            "batch_stats": statistics,
            "opt_state": opt_state,
            "logit_means": means,
        }
        started = step >= self._config.start
        return jax.tree.map(lambda new, old: jnp.where(started, new, old), updated, state), metrics

    def _logits(
        self, params: Params, statistics: Params, images: jax.Array
    ) -> tuple[jax.Array, Params]:
        """Logits, and the running statistics after these images."""
        logits, updated = self._model.apply(
            {"params": params, "batch_stats": statistics},
            images.astype(jnp.float32),
            mutable=["batch_stats"],
        )
        return logits, updated["batch_stats"]
