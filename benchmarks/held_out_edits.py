"""Judges editing by instruction on images that the model has not seen, by the nearest real images.

    pip install "bitdance_jax[perceptual]"
    python benchmarks/held_out_edits.py --model runs/emoji_edit/model

Each held-out pair (`data.emoji_edits`) gives an image and an instruction, such as "make the skin
dark"; no training has seen the image that it asks for. In the features of EfficientNet-Lite0, the
nearest of all real images to the result should be that one: it should have what was asked for, and
everything else as before. Beside the results stand those of shuffled instructions, the real images
after the tokenizer, which bounds what a model can reach, and the unchanged images. Writes
`held_out_edits.json`, and `held_out_edits.png`: in each row an image, the results, and the real
image that was asked for.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from held_out_captions import Judge, evenly, read

from bitdance_jax.cli.command_line import run
from bitdance_jax.cli.flags import parse
from bitdance_jax.config.plain import Config, Count, PathName, Seed
from bitdance_jax.data.edits import Pair
from bitdance_jax.data.emoji import CaptionedEmojiSource
from bitdance_jax.data.emoji_edits import Look, difference, emoji_edits, looks, rest
from bitdance_jax.io import image_files
from bitdance_jax.io.atomic import replace_file
from bitdance_jax.pipelines.image_prompts import ImagePrompt
from bitdance_jax.pipelines.text_to_image import TextToImage


ROWS = 20
"""Pairs in the figure, spread evenly."""


@dataclass(frozen=True)
class Arguments(Config):
    """Judge of editing on held-out pairs of the embedded images.

    Attributes:
      model: a model folder or a Hugging Face id.
      images_per_pair: results of each pair.
      pairs: at most this many of the held-out ones, spread evenly.
      guidance_scale: default: the model's.
      seed: of the results, and of the phrases.
      batch_size: images that are sampled at a time.
      out: folder of the two files.
    """

    model: PathName
    images_per_pair: Count = 1
    pairs: Count = 1000
    guidance_scale: float | None = None
    seed: Seed = 0
    batch_size: Count = 32
    out: PathName = "."


@dataclass(frozen=True)
class Shares:
    """How many of some images have a nearest real image as it was asked for.

    Attributes:
      target: it is the image that was asked for.
      attribute: it has what the instruction names.
      rest: everything else is as before.
    """

    target: float
    attribute: float
    rest: float


def shares(pairs: Sequence[tuple[Look, Look]], found: Sequence[Look]) -> Shares:
    """Compares the images that were found with those that were asked for.

    Args:
      pairs: the image that is edited, and the one that was asked for.
      found: the nearest one to each result.
    """
    attributes = []
    rests = []
    for (source, target), look in zip(pairs, found, strict=True):
        name = difference(source, target)
        assert name is not None
        attributes.append(getattr(look, name) == getattr(target, name))
        rests.append(rest(look, name) == rest(target, name))
    target_shares = np.logical_and(attributes, rests)
    return Shares(*(float(np.mean(each)) for each in (target_shares, attributes, rests)))


def by_attribute(
    pairs: Sequence[tuple[Look, Look]], found: Sequence[Look]
) -> dict[str, dict[str, float]]:
    """`shares` of all pairs, and of those that differ in one attribute."""
    names = [difference(*pair) for pair in pairs]
    chosen = {"all": list(range(len(pairs)))}
    for name in sorted({str(name) for name in names}):
        chosen[name] = [index for index, one in enumerate(names) if one == name]
    return {
        name: asdict(shares([pairs[i] for i in rows], [found[i] for i in rows]))
        for name, rows in chosen.items()
    }


class Editor:
    """Samples the results of pairs."""

    def __init__(self, model: TextToImage, images: np.ndarray, arguments: Arguments) -> None:
        self._model = model
        self._images = images
        self._arguments = arguments
        scale = arguments.guidance_scale
        self._sampler = model.sampler
        if scale is not None:
            self._sampler = dataclasses.replace(model.sampler, guidance_scale=scale)

    def __call__(self, pairs: Sequence[Pair], instructions: Sequence[str]) -> np.ndarray:
        """`images_per_pair` results of each pair, in order."""
        numbers = sorted({pair.source for pair in pairs})
        shown = {number: self._model.show(self._images[number]) for number in numbers}
        return self._model.sample(
            [
                ImagePrompt(text, [shown[pair.source]])
                for pair, text in zip(pairs, instructions, strict=True)
            ],
            self._arguments.seed,
            images_per_input=self._arguments.images_per_pair,
            size=self._images.shape[1:3],
            sampler=self._sampler,
            batch_size=self._arguments.batch_size,
        )


def held_out_pairs(count: int, seed: int) -> tuple[list[Pair], list[str]]:
    """At most `count` pairs, spread evenly, and an instruction for each."""
    source = emoji_edits().split()[1]
    assert source is not None
    pairs = [source.pairs[row] for row in evenly(len(source), count)]
    rng = np.random.default_rng(seed)
    return pairs, [str(rng.choice(pair.instructions)) for pair in pairs]


def main() -> None:
    arguments = parse(Arguments)
    pairs, instructions = held_out_pairs(arguments.pairs, arguments.seed)
    images, captions = read([CaptionedEmojiSource()])
    parsed = dict(zip(captions, looks(captions), strict=True))
    judge = Judge(images, captions)
    each = arguments.images_per_pair
    asked = [(parsed[captions[pair.source]], parsed[captions[pair.target]]) for pair in pairs]
    repeated = [pair for pair in asked for _ in range(each)]

    def found(results: np.ndarray, title: str) -> list[Look]:
        return [parsed[text] for text in judge.nearest_captions(results, f"features of {title}")]

    model = TextToImage.load(arguments.model)
    edit = Editor(model, images, arguments)
    results = edit(pairs, instructions)
    order = np.random.default_rng(arguments.seed).permutation(len(pairs))
    shuffled = edit(pairs, [instructions[i] for i in order])
    sources, targets = (
        np.stack([images[getattr(pair, name)] for pair in pairs]) for name in ("source", "target")
    )
    decoded = [model.tokenizer.decode(model.tokenizer.encode(x)) for x in (targets, sources)]
    table = {
        "results": by_attribute(repeated, found(results, "results")),
        "results, instructions shuffled": by_attribute(
            repeated, found(shuffled, "results of shuffled instructions")
        ),
        "real images after the tokenizer": by_attribute(asked, found(decoded[0], "real images")),
        "unchanged images after the tokenizer": by_attribute(
            asked, found(decoded[1], "unchanged images")
        ),
    }
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"pairs": len(pairs), "images_per_pair": each, **table}
    with replace_file(out / "held_out_edits.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n")
    rows = evenly(len(pairs), ROWS)
    results = results.reshape(len(pairs), each, *results.shape[1:])
    cells = np.concatenate([sources[:, None], results, targets[:, None]], 1)[rows]
    titles = [instructions[row] for row in rows]
    image_files.save_png(
        out / "held_out_edits.png",
        image_files.grid(cells.reshape(-1, *cells.shape[2:]), 2 + each, titles),
    )
    print(f"{'nearest real image':37} {'pairs':7} target  attribute   rest")
    for name, values in table.items():
        for kind, value in values.items():
            print(
                f"{name:37} {kind:7} {value['target']:6.1%} {value['attribute']:10.1%} "
                f"{value['rest']:6.1%}"
            )


if __name__ == "__main__":
    sys.exit(run(main))
