"""The programs that a plan compiles: the ones that training and sampling run, with shapes in the place of arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.distributed.mesh import (
    batch_sharding,
    check_batch,
    compiler_options,
    make_mesh,
)
from bitdance_jax.models.class_conditional import abstract_params
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.programs import Programs
from bitdance_jax.pipelines.weights import sampling_params
from bitdance_jax.sampling import next_patch
from bitdance_jax.sampling.compiled import Inputs
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.train.performance import training_flops
from bitdance_jax.train.state import abstract_state, learning_rate_schedule, make_optimizer, on_mesh
from bitdance_jax.train.step import make_train_step
from bitdance_jax.train.task import TrainingConfig


@dataclass(frozen=True)
class Program:
    """A jitted function with the shapes and places of its arguments.

    Attributes:
      name: what a call does, for example "training step".
      function: what `jax.jit` gave.
      arguments: jax.ShapeDtypeStructs with shardings.
      mesh: the devices.
      images: images that a call trains on or draws.
      model_flops: operations of the products that a call needs on all devices together, nothing computed twice.
      turns: of the loop whose bound is an argument, if there is one.
      static: keyword arguments that are compiled in.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    images: int
    model_flops: int
    turns: int | None = None
    static: Mapping[str, Any] = field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        return self.function.lower(*self.arguments, **self.static).compile()


def training_step(config: TrainingConfig, mesh: Mesh) -> Program:
    """The step of `train.py`, for the config's batch.

    Raises:
      UserError: the mesh divides the batch or the parameters not.
    """
    run, batch_size = config.run, config.data.batch_size
    check_batch(mesh, batch_size, run.accumulate)
    objective = config.make_objective()
    if mesh.devices.flat[0].platform != "gpu":  # the kernel is chosen for this machine's devices
        objective = objective.without_fused_kernels()
    schedule = learning_rate_schedule(config.optimizer, run.steps)
    optimizer = make_optimizer(config.optimizer, schedule, objective)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        mesh,
        ema_decay=config.optimizer.ema_decay,
        accumulate=run.accumulate,
        gradient_dtype=run.gradient_dtype,
    )
    arguments = (
        abstract_state(objective, optimizer, mesh),
        on_mesh(mesh, objective.abstract_frozen(), objective.sharding_rules),
        _placed(objective.abstract_batch(batch_size), batch_sharding(mesh)),
        _placed(jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec())),
    )
    return Program(
        "training step", step, arguments, mesh, batch_size, training_flops(objective, batch_size)
    )


def sampling(
    config: ClassConditionalConfig, sampler: SamplerConfig, dtype: str, per_device: int, mesh: Mesh
) -> Program:
    """What `sample.py --npz` runs to sample `per_device` images on every device at a time, pixels included."""
    replicated = NamedSharding(mesh, PartitionSpec())
    images = per_device * mesh.size
    programs = Programs(config, mesh, jnp.dtype(dtype))
    tokenizer = autoencoder.abstract_params(config.tokenizer)
    params = {
        "model": jax.eval_shape(lambda p: sampling_params(p, dtype), abstract_params(config)),
        "tokenizer": jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tokenizer
        ),
    }
    solver, scales = next_patch.resolve(sampler, config.head.time_shift, config.num_steps)

    def sample(params: Any, labels: Any, keys: Any, scales: Any) -> Any:
        options: Any = {"num_patches": config.num_steps, "height": config.grid}
        return programs.sample(
            params, Inputs(labels), keys, solver=solver, scales=scales, **options
        )

    def count(params: Any, labels: Any, keys: Any) -> Any:
        values = programs.sampler.traceable(
            params["model"], Inputs(labels), keys, scales, solver=solver
        )
        codes = programs.to_codes(values, config.num_steps, height=config.grid)
        return one_device.decode(params["tokenizer"], codes, keys)

    one_device = Programs(config, make_mesh(devices=[mesh.devices.flat[0]]), jnp.dtype(dtype))
    rows = [((images,), jnp.int32), ((images, 2), jnp.uint32)]
    here = [((per_device, *shape[1:]), kind) for shape, kind in rows]
    flops = traced_flops(count, params, *(jax.ShapeDtypeStruct(*row) for row in here))
    arguments = (
        _placed(params, replicated),
        *(_placed(jax.ShapeDtypeStruct(*row), replicated) for row in rows),
        _placed(scales, replicated),
    )
    function = jax.jit(sample, compiler_options=compiler_options(mesh))
    turns = config.num_steps
    return Program("sampling", function, arguments, mesh, images, flops * mesh.size, turns)


def _placed(tree: Any, place: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
