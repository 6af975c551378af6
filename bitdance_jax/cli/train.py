"""Trains a model: `python train.py configs/NAME.py [--run.steps 100 ...]`; `--help` after the file lists every override."""

import sys

from bitdance_jax.cli.config_file import load_config
from bitdance_jax.cli.flags import is_given, parse
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same_config
from bitdance_jax.distributed.mesh import check_batch, make_mesh
from bitdance_jax.errors import UserError
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.loop import train
from bitdance_jax.train.run_folder import check_config, only_run


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if sys.argv[1:] not in (["-h"], ["--help"]):
            raise UserError(
                "give a config file first: python train.py configs/NAME.py [--run.steps 100 ...]"
            )
        print(__doc__)
        return
    path, *flags = sys.argv[1:]
    default = load_config(path)
    config = parse(type(default), flags, default, prog=f"{sys.argv[0]} {path}")
    multihost.initialize(config.hosts)
    with multihost.stop_all_on_error():
        check_same_config(config)
        # What takes a moment to find comes before what takes minutes: indexing images, loading weights, compiling.
        mesh = make_mesh(config.mesh)
        check_batch(mesh, config.data.batch_size, config.run.accumulate)
        if not is_given("model.num-classes", flags):
            config = config.with_classes_of_data()
        with only_run(config):
            check_config(config)
        initial = initial_params(config)
        train(config.make_task(), config, mesh, initial)
