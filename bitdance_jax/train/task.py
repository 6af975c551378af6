"""What the training loop needs: an objective (pure functions of arrays), a task (an objective with
data and weights), and the config of a run, which makes both."""

import abc
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from bitdance_jax.config import HostsConfig, MeshConfig, OptimizerConfig, RunConfig
from bitdance_jax.config.plain import Config, Count, PathName, require
from bitdance_jax.data.config import DataConfig
from bitdance_jax.distributed.sharding import Rules
from bitdance_jax.errors import ConfigError
from bitdance_jax.io import model_lookup
from bitdance_jax.io.model_lookup import RunRecord


Params = Any
"""Parameters: nested dicts of arrays."""
Batch = dict[str, Any]
"""Name -> array whose first axis is the batch's: numpy arrays from the loader, jax arrays inside an
objective."""
Metrics = dict[str, jax.Array]
"""Name -> float32 scalar."""


@runtime_checkable
class Batches(Iterator[Batch], Protocol):
    """An endless iterator over batches whose state can be saved and restored (a grain iterator)."""

    def get_state(self) -> dict[str, Any]:
        """The position of the next batch, as JSON-ready data: a nested dict.

        Processes may have entries of their own; `set_state` gets those of all of them in one.
        """

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at a position that `get_state` returned, in this process or an earlier one."""

    def close(self) -> None:
        """Ends threads and processes that load ahead."""


class Objective(abc.ABC):
    """What a training step computes: pure functions of arrays, traced inside jit, without data.

    Attributes:
      sharding_rules: rules for the objective's own parameters; they come before the table in
        `bitdance_jax.distributed.sharding`.
    """

    sharding_rules: Rules = ()

    @abc.abstractmethod
    def init(self, key: jax.Array) -> Params:
        """Initial parameters, float32."""

    @abc.abstractmethod
    def loss(
        self, params: Params, frozen: Params, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """The scalar loss, a mean over the batch's rows, and other scalar metrics.

        Args:
          params: the trained parameters.
          frozen: the weights that are not trained, as `abstract_frozen`.
          batch: as `abstract_batch`.
          keys: one per row; all randomness of a row comes from its own key.
        """

    def init_auxiliary(self, key: jax.Array) -> Params:
        """Initial state of what a step changes besides the parameters, such as a discriminator with
        its optimizer; {} if there is none."""
        return {}

    def auxiliary_loss(
        self,
        params: Params,
        auxiliary: Params,
        frozen: Params,
        batch: Batch,
        keys: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, tuple[Metrics, Any]]:
        """`loss` where it depends on the auxiliary state.

        Args:
          params, frozen, batch, keys: as of `loss`.
          auxiliary: as of `init_auxiliary`.
          step: number of steps done, int32 scalar.

        Returns:
          Loss, metrics, and what `update_auxiliary` needs of the forward pass.
        """
        loss, metrics = self.loss(params, frozen, batch, keys)
        return loss, (metrics, None)

    def update_auxiliary(
        self, auxiliary: Params, outputs: Any, batch: Batch, step: jax.Array
    ) -> tuple[Params, Metrics]:
        """The auxiliary state after a step, and its metrics. `outputs` is what `auxiliary_loss`
        returned for the parameters before the step; with micro-batches, stacked over them."""
        return auxiliary, {}

    @abc.abstractmethod
    def abstract_batch(self, batch_size: int) -> Batch:
        """Shapes and dtypes of a batch."""

    def prepare(self, batch: Batch) -> Batch:
        """The complete batch before it is split into micro-batches, with what a row's loss needs to
        know of the others, one value a row. `loss` and `evaluate` get its result."""
        return batch

    def evaluate(self, params: Params, frozen: Params, batch: Batch, keys: jax.Array) -> Metrics:
        """Metrics of a held-out batch; the arguments are those of `loss`.

        Scalars are averaged over the batches. Arrays [B, D] are features of the rows, of which
        `summarize` makes metrics.
        """
        loss, metrics = self.loss(params, frozen, batch, keys)
        return {"loss": loss, **metrics}

    def summarize(self, features: dict[str, np.ndarray]) -> dict[str, float]:
        """Metrics of all held-out rows together, such as a distance of distributions.

        Args:
          features: those of `evaluate`, [N, D] of all N rows. Not traced.
        """
        return {}

    def no_decay(self, path: tuple[str, ...]) -> bool:
        """Whether the parameter at `path` has no weight decay. Biases and scales never have any."""
        return False

    def abstract_frozen(self) -> Params:
        """Shapes and dtypes of the weights that are not trained."""
        return {}

    @property
    def mean_work(self) -> float:
        """Mean arithmetic of a step, relative to that of `abstract_batch`, which is the largest."""
        return 1.0

    def counted(self) -> "tuple[Objective, float]":
        """The computation whose operations are counted, without fused kernels and masked attention;
        and how many of its rows count as one row of a batch."""
        return self, 1.0


@runtime_checkable
class Task(Protocol):
    """An objective with its data and frozen weights, and what a run produces.

    Attributes:
      frozen: the weights that are not trained, as `objective.abstract_frozen()`.
      batch_size: rows of a batch, over all processes.
      steps_per_epoch: steps in one pass over the training data; None where there are no epochs.
      held_out_size: number of held-out rows.
      previews_on_mesh: all processes make the previews together, from parameters on the mesh; or
        process 0 alone, from parameters on one device.
    """

    frozen: Params
    batch_size: int
    steps_per_epoch: float | None
    held_out_size: int
    previews_on_mesh: bool

    @property
    def record(self) -> RunRecord:
        """What the run's model folder will contain besides weights and metrics."""

    @property
    def objective(self) -> Objective:
        """What a step computes."""

    def batches(self, rows: np.ndarray) -> Batches:
        """Training batches from the start; of each only the given rows (this process's)."""

    def held_out(self, rows: np.ndarray) -> Batches:
        """Held-out batches, likewise, in a fixed order that repeats after the last record."""

    def preview(self, ema_params: Params, step: int) -> dict[str, np.ndarray]:
        """Images for the run's folder: name -> uint8 [H, W, 3]. The parameters are on one device,
        or with `previews_on_mesh` on the mesh."""

    def export(
        self, ema_params: Params, folder: str, *, step: int, metrics: dict[str, float]
    ) -> None:
        """Writes the model folder.

        Args:
          ema_params: numpy arrays.
          folder: to be written, or replaced.
          step: number of steps trained.
          metrics: of the held-out records.
        """


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """A training run; a config file returns one. A subclass says what is trained.

    Attributes:
      run: length, precision, intervals and folders.
      data: the images.
      optimizer: AdamW and its schedule.
      mesh: device layout; a run may be resumed on another mesh.
      hosts: how the processes find each other.
      profile: first and last step of a trace for TensorBoard or Perfetto, written to the run's
        folder; None: no trace.
      init: model folder, folder of a run, or Hugging Face id, with the weights that a new run
        starts from; "emoji" and "emoji_classes" are the embedded models. None: random weights.
      compilation_cache: folder, local or gs://, for compiled programs, so that the next start does
        not compile them; None: for a single process one in the user's cache. All hosts must have
        access to it.
    """

    run: RunConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    profile: tuple[Count, Count] | None = None
    init: PathName | None = None
    compilation_cache: PathName | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        first, last = self.profile or (1, 1)
        require(
            first <= last and first <= self.run.steps,
            "profile must be two steps in order, from 1 to run.steps "
            f"({self.run.steps}), got {self.profile}",
            "profile",
        )
        batch, accumulate = self.data.batch_size, self.run.accumulate
        require(
            batch % accumulate == 0,
            f"data.batch_size must be a multiple of run.accumulate, got {batch} and {accumulate}",
            "data.batch_size",
        )

    def make_objective(self) -> Objective:
        """The objective alone: opens no data and reads no weights."""
        raise NotImplementedError(f"{type(self).__name__} has no objective")

    def make_task(self) -> Task:
        """The objective with its data and frozen weights.

        Raises:
          UserError: data or weights are missing, or do not fit the model.
        """
        raise NotImplementedError(f"{type(self).__name__} has no task")

    def trial(self) -> "TrainingConfig":
        """A run of two minutes on two CPU cores: a small model and the embedded images.

        Raises:
          ConfigError: this kind of run has none.
        """
        raise ConfigError(f"{type(self).__name__} has no trial", "trial")

    def trial_run(self, steps: int) -> "RunConfig":
        """The run of a trial, in another folder."""
        return dataclasses.replace(
            self.run,
            workdir=f"{self.run.workdir}_trial",
            checkpoints=None,
            steps=steps,
            accumulate=1,
            compute_dtype="float32",
            log_every=5,
            save_every=steps,
            preview_every=steps // 2,
        )

    def with_classes_of_data(self) -> "TrainingConfig":
        """The config with the number of classes of its data, if that is known without opening it.

        Raises:
          UserError: the data is missing or has another layout.
        """
        return self

    def read_initial(self, folder: str) -> tuple[Params, frozenset[str]]:
        """The weights of a model folder that a new run starts from (`init`).

        Returns:
          Parameters of the objective, and the paths ("a/b") of those that the run initializes
          randomly instead.

        Raises:
          UserError: there is no such model, or one of another kind.
        """
        return model_lookup.load(folder).params, frozenset()
