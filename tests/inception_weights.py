"""The FID Inception-v3's state dict with the seeded weights that the recorded features in tests/golden/evaluation were made with."""

import functools
import json
import math

import numpy as np
from golden_models import GOLDEN


@functools.cache
def state_dict() -> dict[str, np.ndarray]:
    """Every tensor of the published state dict but the counters `num_batches_tracked`."""
    rng = np.random.default_rng(0)
    shapes = json.loads((GOLDEN / "evaluation" / "keys.json").read_text())
    return {
        key: _draw(rng, key, shapes[key])
        for key in sorted(shapes)
        if not key.endswith("num_batches_tracked")
    }


def _draw(rng: np.random.Generator, key: str, shape: list[int]) -> np.ndarray:
    a = rng.standard_normal(shape)
    if key.endswith("running_var"):
        a = 1 + 0.5 * abs(a)
    elif key.endswith("bn.weight"):
        a = 1 + 0.1 * a
    else:
        a *= math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return a.astype(np.float32)
