"""`bitdance describe`: a text-to-image model answers a question about an image.

    bitdance describe cat.png --checkpoint MODEL --question "What is it?"

The answer is printed.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from bitdance_jax.cli.compilation_cache import keep_compiled
from bitdance_jax.cli.flags import parse
from bitdance_jax.config import TextSamplerConfig
from bitdance_jax.config.plain import Config, PathName, Seed
from bitdance_jax.pipelines.text_to_image import TextToImage
from bitdance_jax.pipelines.weights import WeightType
from bitdance_jax.text.prompt_tokenizer import DEFAULT_QUESTION


@dataclass(frozen=True)
class Arguments(Config):
    """Answers a question about an image in text.

    Attributes:
      image: the file.
      checkpoint: folder of a text-to-image model, of a training run, or a Hugging Face id.
      question: what is asked.
      seed: of the answer.
      sampler: length, temperature, top-k and top-p.
      dtype: of weights and activations; default: float32, on accelerators bfloat16.
      weights: the type of the weights in memory; default: `dtype`.
    """

    image: Annotated[PathName, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    checkpoint: PathName
    question: str = DEFAULT_QUESTION
    seed: Seed = 0
    sampler: TextSamplerConfig = TextSamplerConfig()
    dtype: Literal["float32", "bfloat16"] | None = None
    weights: WeightType | None = None


def main() -> int:
    arguments = parse(Arguments)
    keep_compiled()
    model = TextToImage.load(
        arguments.checkpoint,
        dtype=arguments.dtype,
        weights=arguments.weights,
        lazy=True,
    )
    answer = model.describe(
        arguments.image, arguments.question, arguments.seed, sampler=arguments.sampler
    )
    print(answer)
    return 0
