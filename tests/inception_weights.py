"""Random weights of FID's Inception-v3, as for the recorded features in tests/golden/evaluation."""

import functools
import json
import math

import numpy as np
from golden_models import GOLDEN


@functools.cache
def state_dict() -> dict[str, np.ndarray]:
    """All tensors of the published state dict except the counters `num_batches_tracked`."""
    rng = np.random.default_rng(0)
    shapes = json.loads((GOLDEN / "evaluation" / "keys.json").read_text())
    return {
        key: _sample(rng, key, shapes[key])
        for key in sorted(shapes)
        if not key.endswith("num_batches_tracked")
    }


def _sample(rng: np.random.Generator, key: str, shape: list[int]) -> np.ndarray:
    a = rng.standard_normal(shape)
    if key.endswith("running_var"):
        a = 1 + 0.5 * abs(a)
    elif key.endswith("bn.weight"):
        a = 1 + 0.1 * a
    else:
        a *= math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return a.astype(np.float32)
