"""Samples for an evaluation suite in one .npz: image i of a seed has the label i % num_classes."""

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int64

from bitdance_jax.config import Config, SamplerConfig, to_dict
from bitdance_jax.config.plain import Count, Seed, checked
from bitdance_jax.distributed import multihost
from bitdance_jax.io.progress import Progress
from bitdance_jax.pipelines.class_conditional import ClassConditionalPipeline
from bitdance_jax.pipelines.npz_writer import NpzWriter


@dataclass(frozen=True)
class Request(Config):
    """Everything that decides the images of a file.

    Attributes:
      checkpoint: `model_lookup.fingerprint` of the model folder.
      dtype: of weights and activations.
      num_images: N; image i has label i % num_classes.
      seed: of the images.
      sampler: solver and guidance.
    """

    checkpoint: str
    dtype: Literal["float32", "bfloat16"]
    num_images: Count
    seed: Seed
    sampler: SamplerConfig


def sample_to_npz(
    path: str | os.PathLike[str],
    model: ClassConditionalPipeline,
    request: Request,
    *,
    per_device: int = 32,
    overwrite: bool = False,
    progress: bool = True,
) -> int:
    """Samples a request's images into an .npz, and resumes where an earlier call was stopped.

    On several hosts process 0 writes the file; the others need no access to it.

    Args:
      path: a local .npz. If it exists with the same request, nothing is sampled.
      model: the one that `request.checkpoint` and `request.dtype` name, on any mesh of all devices.
      request: what to sample.
      per_device: images at a time on each device.
      overwrite: replace a finished file, and an unfinished one that is damaged or of another
        request.
      progress: show a bar.

    Returns:
      How many images this call sampled.

    Raises:
      UserError: the file is of another request or damaged, another process is writing it, or it
        cannot be written (the finished images remain).
    """
    size = model.config.image_size
    batch_size = checked(Count, per_device, "batch_size") * model.mesh.size
    writer = NpzWriter(path, to_dict(request), (request.num_images, size, size, 3))
    with contextlib.closing(writer):
        first = multihost.on_process_0(lambda: writer.open(overwrite))
        missing = request.num_images - first
        labels = balanced_labels(first, missing, model.config.num_classes)
        batches = model.batches(
            labels,
            request.seed,
            sampler=request.sampler,
            batch_size=batch_size,
            first_index=first,
        )
        if missing:
            with Progress(
                request.num_images, "image", "sampling", initial=first, shown=progress
            ) as bar:
                for images in batches:
                    multihost.on_process_0(functools.partial(writer.append, images))
                    bar.advance(len(images))
        labels = balanced_labels(0, request.num_images, model.config.num_classes)
        multihost.on_process_0(lambda: writer.finish(labels))
    return missing


def balanced_labels(first: int, count: int, num_classes: int) -> Int64[np.ndarray, "B"]:
    """Labels of the images `first` and up: image i has the label i % num_classes."""
    return np.arange(first, first + count) % num_classes
