"""`bitdance train`: trains a tokenizer, a class-conditional or a text-to-image model.

    bitdance train CONFIG [--run.steps 100 ...]
    bitdance train CONFIG --trial
    bitdance train CONFIG --help

CONFIG is the name of a config of the package or a Python file with a `get_config`. Every value of
the config is a flag. With --trial, a small model trains for two minutes on the embedded images.
"""

import sys
from collections.abc import Sequence

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.config_file import load_config
from bitdance_jax.cli.flags import is_given, parse
from bitdance_jax.cli.processes import stop_all_on_error
from bitdance_jax.configs import SHIPPED
from bitdance_jax.distributed import multihost
from bitdance_jax.distributed.consistency import check_same_config
from bitdance_jax.distributed.mesh import check_batch, make_mesh
from bitdance_jax.errors import ConfigError
from bitdance_jax.train.hooks import Hook
from bitdance_jax.train.initial import initial_params
from bitdance_jax.train.loop import train
from bitdance_jax.train.run_folder import check_config, only_run


CONFIGS = f"the package has {', '.join(SHIPPED)}"


def main(hooks: Sequence[Hook] = ()) -> None:
    """Trains as the command line says, with further hooks of a script."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        if sys.argv[1:] not in (["-h"], ["--help"]):
            raise ConfigError(f"give a config first: {sys.argv[0]} CONFIG; {CONFIGS}")
        print(f"{__doc__}\n{CONFIGS}")
        return
    name, *flags = sys.argv[1:]
    default, flags = load_config(name, flags)
    if "--trial" in flags:
        flags.remove("--trial")
        default = default.trial()
    config = parse(type(default), flags, default, prog=f"{sys.argv[0]} {name}")
    multihost.initialize(config.hosts)
    with stop_all_on_error():
        check_same_config(config)
        keep_compiled(config.compilation_cache)
        # Quick checks come before indexing images, loading weights and compiling.
        mesh = make_mesh(config.mesh)
        check_batch(mesh, config.data.batch_size, config.run.accumulate)
        if not is_given("model.num_classes", flags):
            config = config.with_classes_of_data()
        with only_run(config):
            check_config(config)
        initial = initial_params(config)
        train(config.make_task(), config, mesh=mesh, initial=initial, hooks=hooks)
