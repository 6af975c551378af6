"""A few of the embedded images, of 16 pixels and in 9 classes, in place of all of them."""

import functools
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from bitdance_jax.data import emoji
from bitdance_jax.data.transforms import centre_crop


STRIDE = 6
HELD_OUT_STRIDE = 5
SIDE = 16
TRAINED, HELD_OUT = 418, 104


def replace_emoji(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Every sixth image; every fifth of these is held out, and the classes are the groups of
    Unicode, as many as those of `tiny_models.MODEL`."""
    archive = folder / "few_emoji.zip"
    archive.write_bytes(_archive())
    monkeypatch.setattr(emoji, "ARCHIVE", archive)


@functools.cache
def _archive() -> bytes:
    everything = emoji.EmojiArchive()
    buffer = io.BytesIO()
    lines = []
    with zipfile.ZipFile(buffer, "w") as archive:
        for number, index in enumerate(range(0, len(everything.records), STRIDE)):
            record = everything.records[index]
            is_held_out = number % HELD_OUT_STRIDE == HELD_OUT_STRIDE - 1
            file = io.BytesIO()
            Image.fromarray(centre_crop(everything.image(index), SIDE)).save(file, "PNG")
            archive.writestr(f"{number}.png", file.getvalue())
            lines.append(
                record
                | {
                    "file_name": f"{number}.png",
                    "subgroup": record["group"],
                    "split": "held_out" if is_held_out else "train",
                }
            )
        archive.writestr("metadata.jsonl", "\n".join(map(json.dumps, lines)))
    return buffer.getvalue()
