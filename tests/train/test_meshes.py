"""The same run on other meshes: eight emulated devices need a process of their own."""

from pathlib import Path

import jax
import numpy as np
import processes
import pytest

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    MeshConfig,
    OptimizerConfig,
    RunConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed import sharding
from bitdance_jax.distributed.mesh import make_mesh, put_batch
from bitdance_jax.train.class_conditional_training import ClassConditionalTraining
from bitdance_jax.train.state import (
    abstract_state,
    init_state,
    learning_rate_schedule,
    make_optimizer,
)
from bitdance_jax.train.step import make_train_step


STEPS, BATCH = 20, 16
MESHES = (MeshConfig(1, 1, 1), MeshConfig(8, 1, 1), MeshConfig(1, 8, 1), MeshConfig(2, 2, 2))
CONFIG = ClassConditionalTraining(
    run=RunConfig(workdir="", steps=STEPS, remat="dots"),
    model=ClassConditionalConfig(
        tokenizer=TokenizerConfig(bits=8, ch=32, ch_mult=(1, 1), num_res_blocks=1, num_codebooks=1),
        transformer=TransformerConfig(num_layers=2, dim=32, num_heads=2),
        head=FlowHeadConfig(width=32, num_blocks=1, num_groups=1, head_dim=16),
        num_classes=3,
        image_size=16,
        tokens_per_step=4,
        class_tokens=2,
    ),
    tokenizer="",
    data=DataConfig(batch_size=BATCH),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=5),
)


def losses(mesh_config: MeshConfig, accumulate: int = 1) -> list[float]:
    mesh = make_mesh(
        mesh_config, jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.tensor]
    )
    objective = CONFIG.make_objective()
    schedule = learning_rate_schedule(CONFIG.optimizer, STEPS)
    optimizer = make_optimizer(CONFIG.optimizer, schedule, objective)
    step = make_train_step(
        objective, optimizer, schedule, mesh=mesh, ema_decay=0.99, accumulate=accumulate
    )
    places = sharding.shardings(mesh, abstract_state(objective, optimizer, mesh))
    state = jax.jit(lambda key: init_state(objective, optimizer, key), out_shardings=places)(
        jax.random.key(0)
    )
    shapes = objective.abstract_frozen()
    frozen = sharding.put(
        mesh,
        jax.tree.map(
            lambda x: np.random.default_rng(x.size).normal(0, 0.1, x.shape).astype(x.dtype), shapes
        ),
    )
    rng = np.random.default_rng(0)
    results = []
    for _ in range(STEPS):
        batch = {
            "image": rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8),
            "label": rng.integers(0, 3, BATCH).astype(np.int32),
        }
        state, metrics = step(state, frozen, put_batch(mesh, batch, BATCH), jax.random.key(1))
        results.append(float(metrics["loss"]))
    assert jax.tree.map(lambda x: x.sharding, state) == places
    return results


def on_eight_devices() -> None:
    expected = losses(MESHES[0])
    assert expected[-1] < expected[0]
    for mesh in MESHES[1:]:
        np.testing.assert_allclose(losses(mesh), expected, rtol=1e-5, err_msg=str(mesh))
    np.testing.assert_allclose(losses(MeshConfig(2, 2, 1), accumulate=2), expected, rtol=1e-5)


@pytest.mark.slow
def test_the_loss_does_not_depend_on_the_mesh():
    # Five programs of a few seconds: most of the time would go into compiling them well.
    processes.python([__file__], Path(__file__).parent, devices=8)


if __name__ == "__main__":
    on_eight_devices()
