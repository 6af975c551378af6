"""Trains a model: `python train.py configs/NAME.py [--run.steps 100 ...]`; `--help` after the file lists every override."""

import importlib.util
import sys
from pathlib import Path

from bitdance_jax.command_line import parse, run
from bitdance_jax.config import ClassConditionalTraining, TokenizerTraining, Training, to_dict
from bitdance_jax.errors import UserError
from bitdance_jax.train.checkpoint import quiet_orbax
from bitdance_jax.train.loop import Interrupted, train
from bitdance_jax.train.tasks import make_task


def load_config(path: str) -> Training:
    """What the file's `get_config()` returns; whatever is wrong with the file is a UserError."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path}; the ones that come with the project are in configs/")
    spec = importlib.util.spec_from_file_location("training_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, TokenizerTraining | ClassConditionalTraining):
        raise UserError(f"{path}: get_config() must return a TokenizerTraining or ClassConditionalTraining, got {type(config).__name__}")
    return config


def launch() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if sys.argv[1:] not in (["-h"], ["--help"]):
            raise UserError("give a config file first: python train.py configs/NAME.py [--run.steps 100 ...]")
        print(__doc__)
        return
    path, *flags = sys.argv[1:]
    quiet_orbax()
    default = load_config(path)
    config = parse(type(default), flags, default, prog=f"train.py {path}")
    train(make_task(config), config.run, config.optimizer, to_dict(config), config.profile)


def main() -> int:
    try:
        return run(launch)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main())
