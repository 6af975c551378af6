"""Prints the costs of small sharded programs on 8 CPU devices as JSON."""

import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bitdance_jax.perf.flops import traced_flops
from bitdance_jax.plan import cost, hlo


MESH = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def array(shape: tuple[int, ...], *axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*axes)))


def nested_scans(w: Any, x: Any) -> Any:
    """3 x 5 products."""

    def inner(x: Any, _: Any) -> Any:
        return jnp.tanh(x @ w), None

    def outer(x: Any, _: Any) -> Any:
        return jax.lax.scan(inner, x, None, length=5)[0] + 1, None

    return jax.lax.scan(outer, x, None, length=3)[0]


def loss(w: Any, x: Any) -> Any:
    return jnp.sum(jnp.square(nested_scans(w, x)))


def stacked_layers(w: Any, x: Any) -> Any:
    """Each layer's weights, sharded over "fsdp", are gathered in its iteration of the loop."""

    def layer(x: Any, w: Any) -> Any:
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(MESH, P()))), None

    return jax.lax.scan(layer, x, w)[0]


def convolution(kernel: Any, x: Any) -> Any:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def resharded(x: Any) -> Any:
    return jax.lax.with_sharding_constraint(x * 2, NamedSharding(MESH, P(None, "fsdp"))) + 1


PROGRAMS = {
    "product": (jnp.matmul, array((64, 32), ("data", "fsdp")), array((32, 16))),
    "nested_scans": (nested_scans, array((16, 16)), array((64, 16), ("data", "fsdp"))),
    "gradient": (jax.grad(loss), array((16, 16)), array((64, 16), ("data", "fsdp"))),
    "stacked_layers": (
        stacked_layers,
        array((6, 16, 16), None, "fsdp"),
        array((64, 16), ("data", "fsdp")),
    ),
    "convolution": (convolution, array((3, 3, 4, 8)), array((16, 10, 10, 4), ("data", "fsdp"))),
    "summed": (lambda x: jnp.sum(x, axis=0), array((64, 100), ("data", "fsdp"))),
    "resharded": (resharded, array((64, 128), "fsdp")),
}


def measure(function: Any, *arguments: Any) -> dict[str, Any]:
    compiled = jax.jit(function).lower(*arguments).compile()
    rows = cost.costs(hlo.parse(compiled.as_text() or ""), MESH.size)
    collectives = [(row.trips, part) for row in rows for part in row.collectives]
    return {
        "traced": traced_flops(function, *arguments),
        "counted": sum(row.trips * row.flops for row in rows) * MESH.size,
        "bytes": sum(row.trips * row.bytes for row in rows),
        "collectives": [
            [part.kind, trips, part.bytes, list(part.axes(MESH))] for trips, part in collectives
        ],
    }


if __name__ == "__main__":
    print(json.dumps({name: measure(*program) for name, program in PROGRAMS.items()}))
