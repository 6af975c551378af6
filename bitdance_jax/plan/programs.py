"""The programs that a plan compiles: the ones that training and sampling run, with shapes in the place of arrays."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.distributed.mesh import batch_sharding, check_batch
from bitdance_jax.models.class_conditional import ClassConditional, abstract_params
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.class_conditional import draw_images, sample_labels, sampling_params
from bitdance_jax.pipelines.data_parallel import on_each_device
from bitdance_jax.sampling import next_patch
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
    """What `sample.py --npz` runs to draw `per_device` images on every device at a time, pixels included."""
    whole, rows = NamedSharding(mesh, PartitionSpec()), batch_sharding(mesh)
    weights = jax.eval_shape(lambda p: sampling_params(p, dtype), abstract_params(config))
    tokenizer = autoencoder.abstract_params(config.tokenizer)
    tokenizer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype)), tokenizer)
    solver, scales = next_patch.resolve(sampler, config.head.time_shift, config.num_steps)
    sample = functools.partial(
        sample_labels, ClassConditional(config, dtype=jnp.dtype(dtype)), solver=solver
    )

    def draw(params: Any, labels: Any, keys: Any, scales: Any, solver: Any = solver) -> Any:
        return draw_images(sample, config, jnp.dtype(dtype), params, labels, keys, scales)

    def rows_of(count: int) -> tuple[Any, Any]:
        return jax.ShapeDtypeStruct((count,), jnp.int32), jax.ShapeDtypeStruct(
            (count, 2), jnp.uint32
        )

    params, images = {"model": weights, "tokenizer": tokenizer}, per_device * mesh.size
    one_device = traced_flops(
        lambda p, labels, keys: draw(p, labels, jax.random.wrap_key_data(keys), scales),
        params,
        *rows_of(per_device),
    )
    arguments = (_placed(params, whole), *_placed(rows_of(images), rows), _placed(scales, whole))
    static = {"solver": solver}
    return Program(
        "sampling",
        on_each_device(mesh, draw),
        arguments,
        mesh,
        images,
        one_device * mesh.size,
        static=static,
    )


def _placed(tree: Any, place: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
