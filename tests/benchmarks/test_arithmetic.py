"""The operations of the released models' samplers, compared with the minimum."""

import functools
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from bitdance_jax.config import ClassConditionalConfig, SamplerConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.models.class_conditional import ClassConditional, abstract_params
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.pipelines.programs import read_labels
from bitdance_jax.sampling.compiled import CompiledSampler, Inputs
from bitdance_jax.sampling.next_patch import resolve


def load(name):
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


arithmetic = load("arithmetic")


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.mark.parametrize("name", ["b_16x", "b_4x", "b_1x"])
def test_operations_of_the_sampler(name):
    """At full size, without arrays. The excess is attention to the masked part of the cache."""
    config = ClassConditionalConfig.imagenet(name)
    batch = 2
    sampler = SamplerConfig(head_steps=10, guidance_scale=3.0)
    solver, scales = resolve(sampler, config.head.time_shift, config.num_steps)
    read = functools.partial(read_labels, ClassConditional(config))
    compiled = CompiledSampler(read, make_mesh(devices=jax.devices()[:1]))
    traced = traced_flops(
        functools.partial(compiled.traceable, solver=solver),
        abstract_params(config, scan=False),
        Inputs(shape(batch, dtype=jnp.int32)),
        shape(batch, 2, dtype=jnp.uint32),
        scales,
    )
    assert 1 <= traced / arithmetic.minimal_sampler_flops(config, sampler, batch) < 1.03


def test_the_minimum_is_proportional_to_rows_and_steps():
    config = ClassConditionalConfig.imagenet("b_16x")

    def minimum(batch=4, **sampler):
        return arithmetic.minimal_sampler_flops(
            config, SamplerConfig(head_steps=10, **sampler), batch
        )

    assert minimum(batch=8) / minimum() == pytest.approx(2, rel=1e-3)
    assert minimum(guidance_scale=2.0) == minimum(batch=8)
    assert minimum(solver="euler") < minimum()
    one_evaluation = minimum() - minimum(solver="euler")
    eleven_steps = arithmetic.minimal_sampler_flops(config, SamplerConfig(head_steps=11), 4)
    assert eleven_steps == pytest.approx(minimum() + one_evaluation, rel=1e-9)
