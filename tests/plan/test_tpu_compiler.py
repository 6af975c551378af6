"""The real TPU compiler, where it is installed, without a TPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None, reason="needs libtpu, the TPU compiler"
    ),
]

SCRIPT = """
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

from bitdance_jax.config import MeshConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.plan.analysis import DoesNotFit, make_plan
from bitdance_jax.plan.devices import find_devices
from bitdance_jax.plan.programs import Program


mesh = make_mesh(MeshConfig(data=2, fsdp=4), find_devices("v5e:2x4"))


def array(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*axes)))


def loss(w, x):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jnp.mean(jnp.square(jax.lax.scan(layer, x, w)[0]).astype(jnp.float32))


step = jax.jit(lambda w, x: w - jax.grad(loss)(w, x), donate_argnums=0)
arguments = array((6, 512, 512), None, "fsdp"), array((2048, 512), ("data", "fsdp"))
flops = traced_flops(jax.grad(loss), *arguments)
plan = make_plan(Program("step", step, arguments, mesh, 2048, flops))
large = jax.jit(lambda x: (jnp.exp(x), jnp.sin(x)))
try:
    make_plan(Program("large", large, (array((2**17, 2**15)),), mesh, 1, 1))
    refusal = ""
except DoesNotFit as error:
    refusal = str(error)
collectives = [
    [part.kind, list(part.axes(mesh)), row.trips * part.bytes]
    for row in plan.rows
    for part in row.collectives
]
torus = make_mesh(MeshConfig(data=8, fsdp=4, tensor=2), find_devices("v5p:4x4x4"))
others = {"torus": dict(torus.shape), "collectives": collectives, "refusal": refusal}
print(json.dumps({**plan.to_dict(), **others}))
"""


def results(script: str) -> Any:
    """What a script prints last, as JSON, run as for users: the TPU's compiler knows few flags."""
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"XLA_FLAGS": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def plan():
    return results(SCRIPT)


def test_the_slice_and_its_chips(plan):
    assert (plan["devices"], plan["chip"]["name"], plan["mesh"]) == (
        8,
        "v5e",
        {"data": 2, "fsdp": 4, "tensor": 1},
    )


def test_a_mesh_that_splits_the_axes_of_a_torus(plan):
    assert plan["torus"] == {"data": 8, "fsdp": 4, "tensor": 2}


def test_operations_in_fusions_and_loops_are_those_of_the_jaxpr(plan):
    assert plan["flops_per_device"] * 8 == plan["model_flops"] > 0


def test_memory_of_a_donated_state(plan):
    memory, weights = plan["memory"], 6 * 512 * 512 * 2 // 4
    assert memory["arguments"] == weights + 2048 * 512 * 2 // 8
    assert memory["aliased"] == weights == memory["outputs"]


def test_collectives(plan):
    """Both passes gather the weights over "fsdp"; gradients are summed over all devices."""
    layers = 6 * 512 * 512 * 2
    gathered = [(axes, size) for kind, axes, size in plan["collectives"] if kind == "all-gather"]
    assert all(axes == ["fsdp"] for axes, _ in gathered)
    assert sum(size for _, size in gathered) == 2 * layers
    summed = {
        tuple(axes)
        for kind, axes, size in plan["collectives"]
        if kind in ("all-reduce", "reduce-scatter") and size >= layers // 4
    }
    assert {axis for axes in summed for axis in axes} == {"data", "fsdp"}


def test_times(plan):
    estimate = plan["estimate"]
    bounds = estimate["bounds"]
    assert 0 < bounds["overlapped"] <= bounds["serial"]
    assert bounds["compiler"] > estimate["communication"] > 0
    assert 0 < plan["model_flop_utilisation"]["compiler"] < 1


def test_a_program_that_the_compiler_refuses_for_its_memory(plan):
    assert plan["refusal"].startswith("it needs ")
    assert "15.75G HBM" in plan["refusal"]


KERNELS = """
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from bitdance_jax.nn import attention, tpu_attention
from bitdance_jax.nn.packed_attention import PackedMask
from bitdance_jax.plan import cost, hlo
from bitdance_jax.plan.devices import find_devices


def operations(device, function, *shapes):
    '''Of every kernel in the function and its gradients.'''
    sharding = SingleDeviceSharding(device)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]

    def step(q, k, v, gradient):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(gradient)

    module = hlo.parse(jax.jit(step).lower(*inputs).compile().as_text())
    rows = cost.costs(module, devices=1)
    calls = [row for row in rows if 'custom_call_target="tpu_custom_call"' in
             row.instruction.attributes]
    names = [re.search(r"(tpu_attention|splash_mha)_\\w+", row.op_name)[0] for row in calls]
    return {name: row.trips * row.flops for name, row in zip(names, calls, strict=True)}


def by_classes(q, k, v):
    angle = jnp.zeros((319, 32))
    return tpu_attention.attend((q, k, v), (angle, angle), 63, 1, num_heads=2)


def by_documents(q, k, v):
    documents = jnp.zeros((2, 300), jnp.int32)
    mask = PackedMask(documents, documents + 300)
    return attention.attend(q, k, v, mask, "pallas")


image = (2, 319, 128)
results = {}
for topology in ("v5e:2x2", "v6e:2x2"):
    device = find_devices(topology)[0]
    results[topology] = operations(device, by_classes, *[image] * 4) | operations(
        device, by_documents, (2, 4, 300, 128), *[(2, 2, 300, 128)] * 2, (2, 4, 300, 128)
    )
print(json.dumps(results))
"""


def test_fused_attention_and_its_operations():
    """Both kernels compile, with gradients, and the plan knows what they compute."""
    # Chunks of 128, 128 and 63 queries see 128, 256 and 319 keys, all on 128 features.
    pairs = 2 * 2 * 128 * (128 * 128 + 128 * 256 + 63 * 319)
    # Documents are padded to 384.
    documents = 2 * 4 * 384**2 * 128
    expected = {
        "tpu_attention_forward": 2 * 2 * pairs,
        "tpu_attention_backward": 5 * 2 * pairs,
        "splash_mha_fwd_segmented_residuals": 2 * documents,
        "splash_mha_dq_segmented_no_residuals": 3 * documents,
        "splash_mha_dkv_segmented_no_residuals": 4 * documents,
    }
    for operations in results(KERNELS).values():
        assert operations == expected
