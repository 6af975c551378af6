"""Divergence check: the losses of a run must be finite and near the previous ones."""

import math
from collections import deque

import numpy as np


WINDOW = 100
"""Number of previous losses that a loss is compared with."""
MIN_LOSSES = 20
"""No loss is compared before there are so many, also after a resume: the window is not saved."""


class DivergenceCheck:
    """Checks the loss and the gradient norm of every step, in order.

    A loss is a spike if it exceeds `spike` times the median of the last WINDOW losses. If the
    losses scatter more than their median, as differences of terms may, it is a spike if it exceeds
    the median by `spike` - 1 times the scatter, which is from the 10th to the 90th percentile.
    """

    def __init__(self, spike: float | None) -> None:
        """`spike`: None accepts every finite loss."""
        self._spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def problem(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with the next step, or None."""
        for name, value in (("loss", loss), ("grad_norm", gradient_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self._spike is not None and len(self._losses) >= MIN_LOSSES:
            low, median, high = np.percentile(self._losses, (10, 50, 90))
            if loss - median > (self._spike - 1) * max(abs(median), high - low):
                return (
                    f"loss is {loss:.4g}, far above the usual {median:.4g} "
                    f"(run.spike is {self._spike:g}),"
                )
        self._losses.append(loss)
        return None
