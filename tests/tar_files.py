"""Small tar files of WebDataset."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def image(colour, kind="PNG", size=(20, 30)):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(file, kind)
    return file.getvalue()


def write_tar(path, members, **options):
    """`members`: name and content; a dict becomes JSON, a string text, a number an image of that
    colour."""
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            if isinstance(content, int):
                content = image(content)
            elif isinstance(content, dict):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def samples(count, start=0, size=(20, 30)):
    """Samples of an image, its number in .txt, and a .json with other captions."""
    for n in range(start, start + count):
        yield f"{n:05d}.png", image(n, size=size)
        yield f"{n:05d}.txt", f"image {n}"
        split = "test" if n % 4 == 3 else "train"
        yield f"{n:05d}.json", {"alt": [f"alt {n}", f"other {n}"], "split": split}
