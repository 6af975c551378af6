"""Measures how many training samples a second one core draws from captioned images.

    python benchmarks/captioned_samples.py --data.paths 'shards/{000..099}.tar'

The time is the processor's, so that other work on the machine does not count.
"""

import time
from collections import Counter
from dataclasses import dataclass

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, Count, Seed, Size
from bitdance_jax.data import captioned
from bitdance_jax.data.captioned_config import CaptionedDataConfig


@dataclass(frozen=True)
class Arguments(Config):
    """Benchmark of captioned images.

    Attributes:
      data: the images and how they are mixed.
      size_multiple: of heights and widths in pixels.
      samples: number of samples that are drawn.
      seed: of the samples.
    """

    data: CaptionedDataConfig
    size_multiple: Size = 64
    samples: Count = 500
    seed: Seed = 0


def main() -> None:
    arguments = parse(Arguments)
    start = time.perf_counter()
    sources, _ = arguments.data.open_marked()
    print(f"opened in {time.perf_counter() - start:.1f} s")
    for source in sources:
        print(captioned.summary(source))
    samples = arguments.data.samples(
        sources, seed=arguments.seed, size_multiple=arguments.size_multiple
    )
    samples.draw(0)
    start = time.process_time()
    drawn = Counter(samples.draw(n).size for n in range(arguments.samples))
    rate = arguments.samples / (time.process_time() - start)
    print(f"{rate:,.0f} samples/s on one core")
    for (height, width), count in drawn.most_common():
        print(f"{count:6,} of {width}x{height}")


if __name__ == "__main__":
    run(main)
