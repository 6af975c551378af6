"""Config files: Python files whose `get_config()` returns a TrainingConfig."""

import importlib.util

from bitdance_jax.errors import UserError
from bitdance_jax.io import paths, readers
from bitdance_jax.train.task import TrainingConfig


def load_config(path: str) -> TrainingConfig:
    """The config that the file's `get_config()` returns.

    Raises:
      UserError: the file is missing, raises an error, or returns something else.
    """
    path = paths.expand(path)
    try:
        readers.check_file(path)
    except readers.MissingFile as error:
        raise UserError(
            f"no config file {path}; the ones that come with the project are in configs/"
        ) from error
    spec = importlib.util.spec_from_file_location("training_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a script in place of a config
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TrainingConfig):
        raise UserError(
            f"{path}: get_config() must return a TrainingConfig, got {type(config).__name__}"
        )
    return config
