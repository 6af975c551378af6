"""Meshes, the rule table and batches over devices.

Eight devices need a process of their own; two hosts are in tests/train.
"""

import functools
import re
import tempfile
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jax.typing import DTypeLike

from bitdance_jax.config import (
    ClassConditionalConfig,
    MeshConfig,
    TextToImageConfig,
    TokenizerConfig,
)
from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.constraints import constrain, map_rows, split_rows
from bitdance_jax.distributed.mesh import (
    AXES,
    batch_sharding,
    check_batch,
    local_rows,
    make_mesh,
    num_parts,
    put_batch,
)
from bitdance_jax.errors import ConfigError
from bitdance_jax.models import class_conditional, text_to_image
from bitdance_jax.nn import linear
from bitdance_jax.nn.layers import FusedDense
from bitdance_jax.tokenizer import autoencoder


def abstract(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), AXES)


FULL_SIZE = {
    "b_1x": lambda: class_conditional.abstract_params(ClassConditionalConfig.imagenet("b_1x")),
    "b_4x": lambda: class_conditional.abstract_params(
        ClassConditionalConfig.imagenet("b_4x"), scan=False
    ),
    "l_1x": lambda: class_conditional.abstract_params(ClassConditionalConfig.imagenet("l_1x")),
    "h_16x": lambda: class_conditional.abstract_params(ClassConditionalConfig.imagenet("h_16x")),
    "t2i": lambda: text_to_image.abstract_params(TextToImageConfig.released("14b_64x")),
    "d16c32": lambda: autoencoder.abstract_params(TokenizerConfig.d16c32()),
    "d32c128": lambda: autoencoder.abstract_params(TokenizerConfig.d32c128()),
    "uniwetok": lambda: autoencoder.abstract_params(TokenizerConfig.uniwetok()),
}


@functools.cache
def full_size(name: str) -> dict:
    return FULL_SIZE[name]()


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize(
    "sizes", [(2, 8, 1), (1, 1, 4), (4, 4, 4), (1, 64, 1), (256, 1, 1)], ids=str
)
def test_no_large_parameter_is_replicated(name, sizes):
    """A device stores its share of the parameters, and small arrays."""
    mesh = abstract(*sizes)
    total, kept = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(full_size(name)):
        with warnings.catch_warnings(action="error"):  # every parameter has a rule
            spec = sharding.parameter_spec(mesh, "/".join(part.key for part in path), leaf.shape)
        assert len(spec) == leaf.ndim or spec == PartitionSpec()
        shard = leaf.size
        for axes in spec:
            shard //= num_parts(mesh, axes)
        total, kept = total + leaf.size, kept + shard
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    assert kept == total if parts == 1 else kept < 1.1 * total / parts + 3e5


def test_a_small_parameter_without_a_rule_is_replicated_with_a_warning():
    with pytest.warns(UserWarning, match=r"head/adapter/kernel \[8, 8\]"):
        spec = sharding.parameter_spec(abstract(1, 2, 1), "head/adapter/kernel", (8, 8))
    assert spec == PartitionSpec()


def test_a_large_parameter_without_a_rule_is_an_error():
    with pytest.raises(ConfigError, match=r"head/adapter/kernel .* sharding_rules"):
        sharding.parameter_spec(abstract(1, 2, 1), "head/adapter/kernel", (1025, 1024))


@pytest.mark.parametrize("name", ["head/adapter/kernel", "head/out/kernel"])
def test_rules_of_an_objective_come_before_the_table(name):
    mesh, shape = abstract(1, 2, 1), (3, 8, 8)
    rules = ((r"(adapter|out)/kernel", PartitionSpec(None, "fsdp")),)
    expected = PartitionSpec(None, None, "fsdp")
    assert sharding.parameter_spec(mesh, name, shape, rules=rules) == expected
    with sharding.extra_rules(rules):
        assert sharding.parameter_spec(mesh, name, shape) == expected
    with pytest.raises(ConfigError, match=name):
        sharding.parameter_spec(mesh, name, (8,), rules=rules)


def test_a_large_parameter_that_does_not_divide_is_an_error():
    name = "transformer/layers/mlp/w2/kernel"
    assert sharding.parameter_spec(abstract(1, 7, 1), name, (2, 8, 8)) == PartitionSpec(
        None, "tensor", None
    )
    with pytest.raises(ConfigError, match=rf"^{name} .* mesh\.fsdp a divisor of 768$"):
        sharding.parameter_spec(abstract(1, 7, 1), name, (24, 2048, 768))


def test_optimizer_state_is_sharded_like_its_parameters():
    import optax

    params = {"transformer": {"layers": {"mlp": {"w2": {"kernel": jnp.zeros((2, 8, 4))}}}}}
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
    places = sharding.shardings(make_mesh(), state)
    specs = {place.spec for place in jax.tree.leaves(places[0].mu) + jax.tree.leaves(places[0].nu)}
    assert specs == {PartitionSpec(None, "tensor", "fsdp")}
    assert places[0].count.spec == PartitionSpec()


def test_one_device_changes_nothing():
    mesh = make_mesh()
    batch = {"image": np.arange(12, dtype=np.uint8).reshape(3, 4), "label": np.arange(3)}
    np.testing.assert_array_equal(local_rows(mesh, 3), [0, 1, 2])
    jax.tree.map(np.testing.assert_array_equal, put_batch(mesh, batch, 3), batch)
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "hidden") is x


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (MeshConfig(data=3), "a mesh of data 3 x fsdp 1 x tensor 1 does not divide 8 devices"),
        (MeshConfig(fsdp=3), "a mesh of data -1 x fsdp 3 x tensor 1 does not divide 8 devices"),
        (
            MeshConfig(data=2, fsdp=2),
            "a mesh of data 2 x fsdp 2 x tensor 1 does not divide 8 devices",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_the_devices(config, complaint):
    with pytest.raises(ConfigError, match=rf"{complaint}; .*mesh\.fsdp"):
        make_mesh(config, jax.devices() * 8)


def test_a_batch_that_does_not_divide():
    check_batch(abstract(2, 4, 3), 16, accumulate=2)
    with pytest.raises(ConfigError, match=r"^a batch of 24 .* data\.batch_size a multiple of 16$"):
        check_batch(abstract(2, 4, 3), 24, accumulate=2)


@pytest.mark.slow
def test_eight_devices():
    processes.python([__file__], Path(__file__).parent, devices=8)


def on_eight_devices() -> None:
    mesh = make_mesh(MeshConfig(data=-1, fsdp=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    rows = np.arange(16).reshape(8, 2)
    batch = put_batch(mesh, rows, 8)
    assert {tuple(shard.data[:, 0].tolist()) for shard in batch.addressable_shards} == {
        (0, 2),
        (4, 6),
        (8, 10),
        (12, 14),
    }

    params = {
        "mlp": {
            "w1": {
                "kernel": np.arange(2 * 4 * 2 * 6.0).reshape(2, 4, 2, 6),
                "bias": np.zeros((2, 2, 6)),
            }
        }
    }
    placed = sharding.put(mesh, params)["mlp"]["w1"]
    np.testing.assert_array_equal(placed["kernel"], params["mlp"]["w1"]["kernel"])
    assert placed["kernel"].addressable_shards[0].data.shape == (2, 2, 2, 3)
    assert placed["bias"].addressable_shards[0].data.shape == (2, 2, 6)

    @jax.jit
    def in_parts(x):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            seen = []
            y = map_rows(lambda part: seen.append(part.shape) or 2 * part, x, 1)
            assert seen == [(4, 2)]  # One row of each of the four parts of a batch.
            return y, split_rows(x, 2), constrain(x, "batch", "hidden")

    doubled, parts, sharded = in_parts(batch)
    np.testing.assert_array_equal(doubled, 2 * rows)
    np.testing.assert_array_equal(parts, [rows[::2], rows[1::2]])
    assert sharded.addressable_shards[0].data.shape == (2, 1)
    assert doubled.sharding.is_equivalent_to(batch.sharding, 2)


class Layers(nn.Module):
    """One of each kind of layer with weights, computed in bfloat16."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linear.Conv(8, (3, 3), dtype=jnp.bfloat16, name="conv1")(x)
        x, _ = FusedDense(2, 16, use_bias=True, dtype=jnp.bfloat16, name="w1")(x)
        return linear.Dense(8, dtype=jnp.bfloat16, name="fc2")(x)


def exchanges(mesh: Mesh, sums: DTypeLike | None) -> set[tuple[str, str]]:
    """(operation, type) of the communication in the layers' gradients.

    Taken right after partitioning: later the CPU compiler, which cannot add bfloat16, makes every
    sum float32.
    """
    x = jax.ShapeDtypeStruct((16, 4, 4, 8), jnp.float32, sharding=batch_sharding(mesh))
    shapes = jax.eval_shape(Layers().init, jax.random.key(0), x)["params"]
    places = sharding.shardings(mesh, shapes)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )

    def gradients(params, x):
        def loss(params):
            return jnp.sum(jnp.square(Layers().apply({"params": params}, x).astype(jnp.float32)))

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), linear.gradient_sums(sums):
            return jax.lax.with_sharding_constraint(jax.grad(loss)(params), places)

    with tempfile.TemporaryDirectory() as folder:
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        jax.jit(gradients).lower(params, x).compile(compiler_options=options)
        (dump,) = Path(folder).glob("*after_spmd-partitioning*")
        found = re.findall(
            r" (bf16|f32)\[\S+ (all-reduce|reduce-scatter|all-gather)\(", dump.read_text()
        )
    return {(operation, dtype) for dtype, operation in found}


def check_sums() -> None:
    """Weights are gathered in the compute type; gradients are summed in the requested type."""
    for config in (MeshConfig(8, 1, 1), MeshConfig(2, 4, 1)):
        mesh = make_mesh(config)
        travels = {("all-gather", "bf16")} if config.fsdp > 1 else set()
        assert exchanges(mesh, jnp.dtype(jnp.float32)) == travels | {("all-reduce", "f32")}
        assert exchanges(mesh, None) == travels | {("all-reduce", "bf16")}


if __name__ == "__main__":
    on_eight_devices()
    check_sums()
