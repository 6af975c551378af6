"""Tolerances for float32 results, derived from the rounding errors of perturbed runs.

The exact value is computed in float64. With random weights, the rounding errors of two
implementations can be of any size, and one does not bound the other. So the error of a result is
compared with those of many runs whose inputs differ in the last bit. A normally distributed error
exceeds BOUND times their root mean square once in 10,000 cases.
"""

from collections.abc import Callable, Sequence
from typing import Any

import golden_models
import jax
import jax.numpy as jnp
import numpy as np
from compiling import optimized
from golden_models import largest_error, perturb
from jax.extend.core import Literal
from jax.typing import ArrayLike

from bitdance_jax.sampling.next_patch import PatchModel


BOUND = 5

RUNS = 16
"""Number of perturbed runs."""

INNER = (
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "eval_jaxpr",
    "checkpoint",
    "remat2",
    "custom_jvp_call",
    "custom_vjp_call",
)
"""Primitives that run an inner program."""


def bound(exact: ArrayLike, others: Sequence[ArrayLike]) -> float:
    """The largest error that rounding explains, relative to the largest value.

    Args:
      exact: the value.
      others: results of perturbed runs.
    """
    errors = [largest_error(other, exact) for other in others]
    return BOUND * float(np.sqrt(np.mean(np.square(errors))))


def assert_rounded(
    actual: ArrayLike, exact: ArrayLike, others: Sequence[ArrayLike], name: str = ""
) -> None:
    error = largest_error(actual, exact)
    allowed = bound(exact, others)
    assert error <= allowed, (
        f"{name}: {error:.1e} of the largest value from float64, more than {allowed:.1e}"
    )


def assert_bits(
    values: np.ndarray, expected: np.ndarray, exact: np.ndarray, others: Sequence[np.ndarray]
) -> None:
    """Compares the signs of values [N, B, P, K], except where rounding determines them.

    Patches of an image after such a bit are sampled from another prefix, and are not compared.
    """
    for image in range(values.shape[1]):
        for patch in range(len(values)):
            index = patch, image
            value = exact[index]
            allowed = bound(value, [other[index] for other in others]) * np.max(np.abs(value))
            wrong = np.sign(values[index]) != np.sign(expected[index])
            assert not np.any(wrong & (np.abs(value) > allowed)), f"patch {patch} of image {image}"
            if wrong.any():
                break


def other_runs(
    function: Callable[[Any], Any], arrays: Any, device: jax.Device | None = None
) -> list[Any]:
    """Results of the function for RUNS perturbations of its arrays.

    Args:
      function: of the arrays.
      arrays: a pytree.
      device: for the function; None: the default device.
    """
    with optimized(False), jax.default_device(device):
        run = jax.jit(function)
        return [jax.device_get(run(perturb(arrays, seed))) for seed in range(RUNS)]


def runs_of_recordings(function: Callable[[Any], Any], arrays: Any, others: list[Any]) -> list[Any]:
    """`other_runs` on a CPU, where the recordings were made; `others` if they ran on one."""
    if jax.default_backend() == "cpu":
        return others
    return other_runs(function, arrays, jax.local_devices(backend="cpu")[0])


class Replayed:
    """A model of R rows that reads given bits [N, R, P, K] instead of the sampled ones.

    Its cache is the model's own, with the states of all patches [N, R, P, C].
    """

    def __init__(self, model: PatchModel, bits: jax.Array) -> None:
        self._model = model
        self._bits = bits
        self.num_patches = model.num_patches
        self.patch_shape = model.patch_shape
        self.head = model.head

    def read_prefix(self) -> tuple[Any, jax.Array]:
        cache = self._model.read_prefix()
        states, _ = jax.eval_shape(self._model.read, jnp.zeros(self.patch_shape), 0, cache)
        return cache, jnp.zeros((self.num_patches, *states.shape), states.dtype)

    def read(
        self, _: jax.Array, patch: jax.Array, cache: tuple[Any, jax.Array]
    ) -> tuple[jax.Array, Any]:
        states, own = self._model.read(self._bits[jnp.maximum(patch - 1, 0)], patch, cache[0])
        seen = jax.lax.dynamic_update_index_in_dim(cache[1], states, patch, 0)
        return states, (own, seen)


def recorded_time_features(t: jax.Array) -> jax.Array:
    """`dit.timestep_features` with the angles of the recordings, float32 even in float64 programs.

    Angles reach 1000 rad. Their last bit changes features by 3e-5, more than later rounding does.
    """
    angles = _float32(_float32(1000.0 * t)[..., None] * golden_models.time_frequencies())
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _float32(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=23)


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with float64 instead of float32 in all operations. It returns numpy arrays.

    It runs on the CPU: not every GPU library multiplies float64.
    """

    def evaluate(*arguments: Any) -> Any:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*arguments)
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(arguments)]
        cpu = jax.local_devices(backend="cpu")[0]
        with jax.enable_x64(True), jax.default_device(cpu), optimized(False):
            run = jax.jit(lambda leaves: _run(closed.jaxpr, closed.consts, leaves))
            out = jax.device_get(run([_wide(leaf) for leaf in leaves]))
        return jax.tree.unflatten(jax.tree.structure(shape), out)

    return evaluate


def _wide(value: Any) -> Any:
    return jnp.asarray(value, jnp.float64) if jnp.result_type(value) == jnp.float32 else value


def _run(jaxpr: Any, consts: Any, arguments: Any) -> list[Any]:
    values = dict(
        zip([*jaxpr.constvars, *jaxpr.invars], [*map(_wide, consts), *arguments], strict=True)
    )

    def read(variable: Any) -> Any:
        return _wide(variable.val) if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        results = _operation(equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _operation(equation: Any, inputs: list[Any]) -> list[Any]:
    name = equation.primitive.name
    params = equation.params
    if name in INNER:
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        return _run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
    if name == "scan":
        return _scan(equation, inputs)
    if name == "scatter-add":  # its parameters include a program
        names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
        return [jax.lax.scatter_add(*inputs, **{key: params[key] for key in names})]
    wider = {key: jnp.dtype(jnp.float64) for key, value in params.items() if _is_float32(value)}
    results = equation.primitive.bind(*inputs, **params | wider)
    return list(results) if equation.primitive.multiple_results else [results]


def _is_float32(value: Any) -> bool:
    return isinstance(value, np.dtype | type) and value in (jnp.float32, np.dtype("float32"))


def _scan(equation: Any, inputs: list[Any]) -> list[Any]:
    """Runs a scan. Its inputs are constants, carry and slices, and its results carry and slices.

    Slices have one more axis outside of the body. This gives their number in all versions of JAX.
    """
    params = equation.params
    body = params["jaxpr"]
    carried = len(equation.outvars) - _sliced(equation.outvars, body.out_avals)
    last = len(inputs) - _sliced(equation.invars, body.in_avals)
    first = last - carried

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out = _run(body.jaxpr, body.consts, [*inputs[:first], *carry, *x])
        return out[:carried], out[carried:]

    carry, ys = jax.lax.scan(
        step, inputs[first:last], inputs[last:], params["length"], params["reverse"]
    )
    return [*carry, *ys]


def _sliced(variables: Any, inner: Any) -> int:
    return sum(outer.aval.ndim > aval.ndim for outer, aval in zip(variables, inner, strict=True))
