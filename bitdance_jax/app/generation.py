"""Images of a request, of the web page or the HTTP API, while they are sampled."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from bitdance_jax.app.page_inputs import MAX_IMAGES
from bitdance_jax.errors import ConfigError, UserError
from bitdance_jax.pipelines.partial_images import Partial
from bitdance_jax.pipelines.pipeline import Pipeline


PREVIEWS = 16
"""About how often the page shows unfinished images."""


class Request(NamedTuple):
    """What is sampled; the page's input fields, in their order.

    Attributes:
      subject: the prompt, or the numbers of the classes.
      size: WIDTHxHEIGHT; fixed for a class-conditional model.
      images: of the prompt, or of each class.
      seed, steps, guidance: as in `SamplerConfig`.
      negative_prompt: of a text-to-image model; "": none.
      sampler: name of another solver than the model's (`SamplerConfig.named`); None: the model's.
    """

    subject: str | Sequence[int]
    size: str
    images: int
    seed: int
    steps: int
    guidance: float
    negative_prompt: str = ""
    sampler: str | None = None


def generate(model: Pipeline, request: Request, previews: int = PREVIEWS) -> Iterator[Partial]:
    """The images of a request while they are sampled, about `previews` times.

    Raises:
      ConfigError: a field is empty, or the model cannot generate this.
    """
    for name, value in request._asdict().items():
        if value is None and name != "sampler":  # Gradio's value of an emptied field
            raise ConfigError(f"{name} is empty; fill it in", name)
    inputs = 1 if model.kind == "text_to_image" else len(request.subject)
    total = inputs * request.images
    if total > MAX_IMAGES:
        raise ConfigError(f"{total} images are too many at a time; at most {MAX_IMAGES}", "images")
    if not inputs:
        raise ConfigError("choose at least one class", "subject")
    every = max(1, model.num_patches(request.size) // previews)
    return model.sample_steps(request.subject, every=every, **options(model, request))


def options(model: Pipeline, request: Request) -> dict[str, Any]:
    """Arguments of `Pipeline.sample_steps` and `metadata`."""
    sampler = dataclasses.replace(
        model.sampler.named(request.sampler),
        head_steps=request.steps,
        guidance_scale=float(request.guidance),
    )
    return {
        "seed": request.seed,
        "images_per_input": request.images,
        "size": request.size,
        "sampler": sampler,
        "negative_prompt": request.negative_prompt or None,
    }


def failure(error: Exception) -> str:
    """One line about a request that failed; an error that is not the user's is logged, too."""
    if isinstance(error, UserError):
        return str(error)
    # For example a full device; a smaller request may succeed.
    logging.error("a request failed", exc_info=error)
    return type(error).__name__ + ": " + str(error).partition("\n")[0]
