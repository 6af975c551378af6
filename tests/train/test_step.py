import dataclasses

import jax
import pytest
import tiny_models
from jaxprs import operations

from bitdance_jax.config import RunConfig
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.nn.stack import STACKED
from bitdance_jax.plan.programs import training_step
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining


CONFIG = ClassConditionalTraining(
    run=RunConfig(workdir="", steps=1, compute_dtype="bfloat16", remat="dots"),
    model=tiny_models.MODEL,
    tokenizer="",
    data=DataConfig(source="tokens", path="tokens", batch_size=7),
)


@pytest.mark.parametrize(("setting", "narrow"), [("float32", False), ("compute", True)])
def test_the_type_of_gradient_sums(setting, narrow):
    """That of each product that gives a kernel's gradient, and of each sum that gives a bias's: in
    it devices add theirs."""
    run = dataclasses.replace(CONFIG.run, gradient_dtype=setting)
    program = training_step(dataclasses.replace(CONFIG, run=run), make_mesh())
    found: dict[tuple, set] = {}
    for equation, _ in operations(jax.make_jaxpr(program.function)(*program.arguments)):
        if equation.primitive.name in ("dot_general", "reduce_sum"):
            out = equation.outvars[0].aval
            # JAX's own gradient of a kernel is a product with its axes in another order.
            found.setdefault((equation.primitive.name, *sorted(out.shape)), set()).add(
                out.dtype.name
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(program.arguments[0].params):
        names = [part.key for part in path]
        shape = sorted(leaf.shape[sum(name in STACKED for name in names) :])
        in_float32 = "final_linear" in names or any("norm" in name for name in names)
        if names[-1] in ("kernel", "bias") and not in_float32:
            operation = {"kernel": "dot_general", "bias": "reduce_sum"}[names[-1]]
            assert ("bfloat16" in found[operation, *shape]) == narrow, names
