"""The programs of training and sampling, with shapes instead of arrays."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
from bitdance_jax.nn.attention import choose_kernel
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
    """A jitted function with the shapes and shardings of its arguments.

    Attributes:
      name: what a call does, for example "training step".
      function: the result of `jax.jit`.
      arguments: jax.ShapeDtypeStructs with shardings.
      mesh: the devices.
      images: how many a call trains on or samples.
      model_flops: operations of a call on all devices together, without recomputation.
      trips: iterations of the loop whose number of iterations is an argument, if there is one.
      static: static keyword arguments.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    images: int
    model_flops: int
    trips: int | None = None
    static: Mapping[str, Any] = field(default_factory=dict)

    def compile(self) -> jax.stages.Compiled:
        return self.function.lower(*self.arguments, **self.static).compile()


def training_step(config: TrainingConfig, mesh: Mesh) -> Program:
    """One training step on a batch of the config's size.

    Raises:
      UserError: the mesh does not divide the batch or the parameters.
    """
    run = config.run
    # The kernel for the mesh's devices, which are not this machine's.
    kernel = choose_kernel(run.attention, run.compute_dtype, mesh.devices.flat[0])
    run = replace(run, attention=kernel)
    batch_size = config.data.batch_size
    check_batch(mesh, batch_size, run.accumulate)
    objective = replace(config, run=run).make_objective()
    schedule = learning_rate_schedule(config.optimizer, run.steps)
    optimizer = make_optimizer(config.optimizer, schedule, objective)
    step = make_train_step(
        objective,
        optimizer,
        schedule,
        mesh=mesh,
        ema_decay=config.optimizer.ema_decay,
        ema_warmup=config.optimizer.ema_warmup,
        accumulate=run.accumulate,
        gradient_dtype=run.gradient_dtype,
    )
    arguments = (
        abstract_state(objective, optimizer, mesh, ema=config.optimizer.ema_decay is not None),
        on_mesh(mesh, objective.abstract_frozen(), objective.sharding_rules),
        _with_sharding(objective.abstract_batch(batch_size), batch_sharding(mesh)),
        _with_sharding(
            jax.eval_shape(lambda: jax.random.key(0)), NamedSharding(mesh, PartitionSpec())
        ),
    )
    return Program(
        "training step", step, arguments, mesh, batch_size, training_flops(objective, batch_size)
    )


def sampling(
    config: ClassConditionalConfig, sampler: SamplerConfig, dtype: str, per_device: int, mesh: Mesh
) -> Program:
    """The sampler of an .npz file: `per_device` images on every device, decoded to pixels."""
    replicated = NamedSharding(mesh, PartitionSpec())
    images = per_device * mesh.size
    programs = Programs(config, mesh, jnp.dtype(dtype), nested=True)
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
        values = one_device.sampler.traceable(
            params["model"], Inputs(labels), keys, scales, solver=solver
        )
        codes = programs.to_codes(values, config.num_steps, height=config.grid)
        return one_device.decode(params["tokenizer"], codes, keys)

    # The arithmetic of XLA's products can be counted, that of a fused kernel not.
    device = make_mesh(devices=[mesh.devices.flat[0]])
    one_device = Programs(config, device, jnp.dtype(dtype), kernel="xla", nested=True)
    rows = [((images,), jnp.int32), ((images, 2), jnp.uint32)]
    here = [((per_device, *shape[1:]), kind) for shape, kind in rows]
    flops = traced_flops(count, params, *(jax.ShapeDtypeStruct(*row) for row in here))
    arguments = (
        _with_sharding(params, replicated),
        *(_with_sharding(jax.ShapeDtypeStruct(*row), replicated) for row in rows),
        _with_sharding(scales, replicated),
    )
    function = jax.jit(sample, compiler_options=compiler_options(mesh))
    return Program(
        "sampling", function, arguments, mesh, images, flops * mesh.size, trips=config.num_steps
    )


def _with_sharding(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
