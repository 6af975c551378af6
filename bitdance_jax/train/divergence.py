"""Whether a run still learns: its losses must stay finite and near what they were."""

import math
from collections import deque

import numpy as np


WINDOW = 100  # Steps whose losses say what is usual.
FEWEST = 20  # Steps before there is a usual loss: also after a resume, as the window is not saved.


class DivergenceCheck:
    """Looks at every step's loss and gradient norm, in order.

    A loss is a spike when it exceeds `spike` times the median of the last hundred; where the losses scatter by more than their median, as
    one that is a difference of terms may, their scatter (from the 10th to the 90th percentile) is what it may exceed the median by,
    `spike` - 1 times.
    """

    def __init__(self, spike: float | None) -> None:
        """`spike`: None passes every finite loss."""
        self._spike = spike
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def complaint(self, loss: float, gradient_norm: float) -> str | None:
        """What is wrong with the next step, or None."""
        for name, value in (("loss", loss), ("grad_norm", gradient_norm)):
            if not math.isfinite(value):
                return f"{name} is {value}"
        if self._spike is not None and len(self._losses) >= FEWEST:
            low, median, high = np.percentile(self._losses, (10, 50, 90))
            if loss - median > (self._spike - 1) * max(abs(median), high - low):
                return f"loss is {loss:.4g}, far above the usual {median:.4g} (run.spike is {self._spike:g}),"
        self._losses.append(loss)
        return None
