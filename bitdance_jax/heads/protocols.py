"""What training and sampling need of a prediction head, and what a head is given to sample."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int, Key


Velocity = Callable[[Float[Array, "R P K"], Int[Array, ""]], Float[Array, "R P K"]]
"""(x_t, number of the evaluation) -> the guided velocity at that evaluation's time."""


@runtime_checkable
class Solver(Protocol):
    """Integrates the flow of a patch; the implementations are in `sampling.solvers`."""

    @property
    def num_evaluations(self) -> int:
        """E: how often the head is evaluated for one patch."""

    @property
    def num_noises(self) -> int:
        """S: standard normal noises for one patch; the first one is the starting point."""

    def times(self) -> Float[Array, "E"]:
        """Time of every evaluation, float32 in [0, 1]: noise at 0, data at 1."""

    def solve(self, velocity: Velocity, noise: Float[Array, "S R P K"]) -> Float[Array, "R P K"]:
        """x at time 1. Calls `velocity` within one loop, so that the head is compiled once."""


@runtime_checkable
class Guide(Protocol):
    """Classifier-free guidance of one patch; the implementation is in `sampling.guidance`."""

    @property
    def scales(self) -> Float[Array, "E"]:
        """Guidance scale of every evaluation."""

    def __call__(
        self, output: Float[Array, "R P K"], scale: Float[Array, ""]
    ) -> Float[Array, "R P K"]:
        """The guided output, velocities or logits, of rows [conditional; unconditional]."""


@runtime_checkable
class PatchHead(Protocol):
    """What sampling needs of a head with its weights."""

    def prepare(self, solver: Solver) -> Any:
        """Whatever all patches share; computed once, before the first patch."""

    def sample(
        self,
        states: Float[Array, "R P C"],
        noise: Float[Array, "S R P K"],
        prepared: Any,
        *,
        solver: Solver,
        guide: Guide | None,
    ) -> Float[Array, "R P K"]:
        """Values of one patch, float32; their signs are its bits.

        Args:
          states: of the transformer at the patch.
          noise: standard normal, S = `solver.num_noises`.
          prepared: of `prepare`.
          solver: ignored by heads that need one evaluation; S and E are 1 then.
          guide: None without guidance.
        """


@runtime_checkable
class Head(PatchHead, Protocol):
    """A prediction head: a Flax module that trains and samples."""

    def training_noise(self, keys: Key[Array, "2"], repeats: int, num_patches: int) -> Any:
        """Random numbers for the loss of one image, an array or a tuple; needs no weights.

        Args:
          keys: two, for heads with two kinds of noise.
          repeats: M, noisy versions of each patch (`head_repeats`).
          num_patches: N.
        """

    def loss(
        self, states: Float[Array, "B N P C"], bits: Float[Array, "B N P K"], noise: Any
    ) -> Float[Array, "B N P"]:
        """The loss of each token, a mean over its bits.

        Args:
          states: of the transformer at every patch.
          bits: to predict, in {-1, 1}.
          noise: `training_noise` of every image.
        """

    def sampling_bytes(self, rows: int, num_evaluations: int) -> float:
        """Memory that sampling a patch of R rows takes, for estimates; 0 if it is small."""
