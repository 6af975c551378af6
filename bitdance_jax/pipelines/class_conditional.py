"""Class-conditional models ready to use: labels to images; weights of a folder or in memory."""

import difflib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Int

from bitdance_jax.config import (
    ClassConditionalConfig,
    ConfigError,
    MeshConfig,
    SamplerConfig,
    from_dict,
)
from bitdance_jax.config.plain import checked
from bitdance_jax.distributed.mesh import make_mesh
from bitdance_jax.errors import UserError, short
from bitdance_jax.io import model_lookup, readers
from bitdance_jax.io.manifest import require_kind
from bitdance_jax.io.model_lookup import EMBEDDED_CLASSES
from bitdance_jax.models.class_conditional import abstract_params
from bitdance_jax.pipelines import checks, weights
from bitdance_jax.pipelines.hub_models import local_folder
from bitdance_jax.pipelines.pipeline import Pipeline
from bitdance_jax.pipelines.request import LabelsOrPrompts, Size
from bitdance_jax.pipelines.tokenizer import Tokenizer
from bitdance_jax.pipelines.weighted import Conditions
from bitdance_jax.pipelines.weights import Params
from bitdance_jax.tokenizer import autoencoder
from bitdance_jax.transformer import order


class ClassConditionalPipeline(Pipeline):
    """Labels to images; see `Pipeline`.

    Attributes:
      class_names: name of each label; numbers where none were saved.
    """

    kind = "class_conditional"
    input_kind = "label"
    config: ClassConditionalConfig
    default_batch_size = 32

    def __init__(
        self,
        config: ClassConditionalConfig,
        params: Params | None,
        tokenizer: Tokenizer,
        class_names: Sequence[str] | None = None,
        sampler: SamplerConfig = SamplerConfig(),
        dtype: DTypeLike | None = None,
        *,
        mesh: MeshConfig | None = None,
        name: str = "",
    ) -> None:
        """
        Args:
          config: sizes.
          params: of `models.class_conditional.ClassConditional`, stacked; None: until `set_params`.
          tokenizer: its tokenizer.
          class_names: of all labels; None: their numbers.
          sampler: solver and guidance where a call does not give its own.
          dtype: compute type, in which weights are stored too; None: float32.
          mesh: the devices; None: one device of this process. `MeshConfig(data=-1)`: all of them,
            each with its own images.
          name: of the model, for the text in saved images.

        Raises:
          UserError: another number of class names, or a mesh that does not fit the devices.
        """
        self.config = config
        numbers = [str(i) for i in range(config.num_classes)]
        self.class_names = checked(tuple[str, ...], class_names or numbers, "class_names")
        if len(self.class_names) != config.num_classes:
            raise UserError(
                f"{config.num_classes} classes need as many class_names, "
                f"got {len(self.class_names)}"
            )
        self.default_size = (config.image_size, config.image_size)
        compute = checks.compute_type("float32" if dtype is None else dtype)
        super().__init__(
            params,
            tokenizer,
            sampler=sampler,
            dtype=compute,
            mesh=_mesh(mesh),
            weights=compute.name,
            name=name,
        )

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str] = EMBEDDED_CLASSES,
        *,
        dtype: DTypeLike | None = None,
        mesh: MeshConfig | None = None,
    ) -> "ClassConditionalPipeline":
        """The model of a folder, with its weights.

        Args:
          folder: a model folder, local or gs://, the folder of a training run, finished or not,
            "emoji_classes", the embedded model, or a Hugging Face id, as `bitdance_jax.load`.
          dtype, mesh: see `__init__`.

        Raises:
          UserError: no such folder, damaged, or of another kind of model.
        """
        folder = local_folder(folder)
        dtype = checks.compute_type("float32" if dtype is None else dtype)
        described = model_lookup.read_config(folder)
        require_kind(folder, described.kind, cls.kind)
        where = f"{folder}/config.json"
        config = from_dict(ClassConditionalConfig, described.config, f"{where}: config")
        sampler = from_dict(
            SamplerConfig, described.metadata.get("sampler", {}), f"{where}: metadata.sampler"
        )
        names = readers.validate(
            described.metadata.get("class_names"),
            list[str] | None,
            where=f"{where}: metadata.class_names",
        )
        abstract = {
            "model": abstract_params(config),
            "tokenizer": autoencoder.abstract_params(config.tokenizer),
        }
        params = weights.read(folder, abstract, dtype)
        tokenizer = Tokenizer(config.tokenizer, params["tokenizer"], dtype)
        options: Any = {"mesh": mesh, "name": checks.model_name(folder)}
        return cls(config, params["model"], tokenizer, names, sampler, dtype, **options)

    def label(self, label: int | str) -> int:
        """The number of a label given as a number or a name.

        Raises:
          UserError: the model does not have it.
        """
        if isinstance(label, str) and label in self.class_names:
            return self.class_names.index(label)
        try:
            number = int(label) if isinstance(label, str) else checked(int, label, "a label")
        except ConfigError:
            raise UserError(f"a label must be a number or a name, got {short(label)}") from None
        except ValueError:
            near = difflib.get_close_matches(str(label), self.class_names, n=1, cutoff=0.4)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"the model has: {', '.join(self.class_names[:20])}"
            )
            raise UserError(f"unknown label {short(label)}; {hint}") from None
        if not 0 <= number < self.config.num_classes:
            raise UserError(
                f"label {short(number)} is out of range; "
                f"the model has labels 0 to {self.config.num_classes - 1}"
            )
        return number

    def _checked_size(self, size: Size | None) -> tuple[int, int]:
        if size is not None and checks.parse_size(size) != self.default_size:
            side = self.config.image_size
            raise ConfigError(
                f"a class-conditional model samples images of its own size, {side}x{side}; "
                "omit size",
                "size",
            )
        return self.default_size

    def _checked_inputs(
        self, asked: Conditions, size: tuple[int, int], negative: tuple[str, ...] | None
    ) -> tuple[Int[np.ndarray, "inputs *conditions"], None, Callable[[int], str]]:
        numbers = self._labels(asked.inputs)
        rows = numbers if asked.weights is None else numbers.reshape(asked.weights.shape)
        return rows, None, lambda number: self.class_names[numbers[number]]

    def _labels(self, labels: LabelsOrPrompts) -> Int[np.ndarray, "inputs"]:
        if isinstance(labels, np.ndarray) and labels.ndim == 1 and labels.dtype.kind in "iu":
            for label in labels[(labels < 0) | (labels >= self.config.num_classes)][:1]:
                self.label(int(label))
            return labels.astype(np.int32)
        return np.array([self.label(label) for label in checks.items(labels, "labels")], np.int32)

    def _token_positions(self, size: tuple[int, int]) -> Int[np.ndarray, "T 2"]:
        config = self.config
        return order.token_positions(config.grid, config.grid, config.patch_side, config.order)


def _mesh(config: MeshConfig | None) -> jax.sharding.Mesh:
    """The devices as a mesh; None: one device of this process."""
    if config is None:
        return make_mesh(devices=jax.local_devices()[:1])
    return make_mesh(checked(MeshConfig, config, "mesh"))
