"""Divergence check: the losses of a run must be finite and near the previous ones."""

import math
from collections import deque
from collections.abc import Mapping

import numpy as np


WINDOW = 100
"""Number of previous losses that a loss is compared with."""
CHECKED = ("loss", "discriminator_loss", "grad_norm")
"""The metrics that must be finite: losses, and the norm of the gradient of the first."""

MIN_LOSSES = 20
"""No loss is compared before there are so many, also after a resume: the window is not saved."""


class DivergenceCheck:
    """Checks the losses and the gradient norm of every step, in order.

    A loss is a spike if it exceeds `spike` times the median of the last WINDOW losses. If the
    losses scatter more than their median, as differences of terms may, it is a spike if it exceeds
    the median by `spike` - 1 times the scatter, which is from the 10th to the 90th percentile.
    """

    def __init__(self, spike: float | None) -> None:
        """`spike`: None accepts every finite loss."""
        self._spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def problem(self, metrics: Mapping[str, float]) -> str | None:
        """What is wrong with the next step, or None.

        Args:
          metrics: of the step, `loss` among them. Those in CHECKED must be finite; others that are
            not finite are named with them.
        """
        wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
        for name in CHECKED:
            if name in wrong:
                parts = [other for other in wrong if other not in CHECKED]
                detail = f" (as are {', '.join(parts)})" if parts else ""
                return f"{name} is {metrics[name]}{detail}"
        loss = metrics["loss"]
        if self._spike is not None and len(self._losses) >= MIN_LOSSES:
            low, median, high = np.percentile(self._losses, (10, 50, 90))
            if loss - median > (self._spike - 1) * max(abs(median), high - low):
                return (
                    f"loss is {loss:.4g}, far above the usual {median:.4g} "
                    f"(run.spike is {self._spike:g}),"
                )
        self._losses.append(loss)
        return None
