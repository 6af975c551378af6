"""Trains a model: `python train.py configs/NAME.py [--run.steps 100 ...]`; `--help` after the file lists every override."""

import difflib
import importlib.util
import sys
from pathlib import Path

import tyro
from flax.traverse_util import flatten_dict

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


def override(config: Training, flags: list[str], prog: str) -> Training:
    """The config with the command line's flags (`--optimizer.learning-rate 1e-3`) applied."""
    changed, unknown = tyro.cli(type(config), default=config, args=flags, prog=prog, return_unknown_args=True)
    if unknown:
        known = ["--" + name.replace("_", "-") for name in flatten_dict(to_dict(config), sep=".")]
        nearest = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise UserError(f"unknown flag {unknown[0]}{hint} (--help lists them all)")
    return changed


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        help_wanted = sys.argv[1:] in (["-h"], ["--help"])
        print(__doc__, file=sys.stdout if help_wanted else sys.stderr)
        return 0 if help_wanted else 2
    path, *flags = sys.argv[1:]
    quiet_orbax()
    try:
        config = override(load_config(path), flags, f"train.py {path}")
        train(make_task(config), config.run, config.optimizer, to_dict(config))
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return stop.exit_code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
