"""The weights of a model folder that a new run starts from."""

from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bitdance_jax.errors import ConfigError
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.train.run_folder import has_checkpoints
from bitdance_jax.train.task import Params, TrainingConfig


def initial_params(config: TrainingConfig) -> Params | None:
    """The weights of `config.init`, as float32 numpy arrays or StoredArrays, of which each process
    reads the part for its devices (`sharding.put`).

    None if `init` is None, or if the run resumes from a checkpoint of its own. Parameters that the
    run initializes randomly instead (`TrainingConfig.read_initial`) are missing.

    Raises:
      UserError: there is no such model, or one of another kind.
      ConfigError: other shapes; the message lists all of them.
    """
    if config.init is None or has_checkpoints(config):
        return None
    params, random = config.read_initial(local_folder(config.init))
    given = traverse_util.flatten_dict(params, sep="/")
    abstract: Any = jax.eval_shape(config.make_objective().init, jax.random.key(0))
    expected = {
        name: x.shape
        for name, x in traverse_util.flatten_dict(abstract, sep="/").items()
        if name not in random
    }
    problems = [
        f"{name} is {given[name].shape if name in given else 'missing'} there "
        f"and {expected.get(name, 'missing')} here"
        for name in sorted(given.keys() | expected.keys())
        if name not in given or given[name].shape != expected.get(name)
    ]
    if problems:
        raise ConfigError(
            f"the weights of init {config.init} do not fit this model: {', '.join(problems)}",
            "init",
        )
    return traverse_util.unflatten_dict(
        {name: x.astype(np.float32) for name, x in given.items()}, sep="/"
    )
