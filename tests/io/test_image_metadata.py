"""Files without their metadata have the same pixels."""

import io

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bitdance_jax.io.image_metadata import without_metadata


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGBA"))


@pytest.mark.parametrize(
    ("form", "mode"),
    [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P")],
)
def test_pixels_do_not_change(form, mode):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    ).convert(mode)
    exif = Image.Exif()
    exif[0x010F] = "maker"
    text = PngInfo()
    text.add_text("prompt", "a cat")
    transparent = {"transparency": 3} if mode == "P" else {}
    options = transparent | ({"pnginfo": text} if form == "PNG" else {"comment": b"a cat"})
    data = encoded(image, form, exif=exif, icc_profile=bytes(200), **options)
    bare = without_metadata(data)
    assert len(bare) < len(data) and b"a cat" not in bare and b"maker" not in bare
    np.testing.assert_array_equal(pixels(bare), pixels(data))
    assert without_metadata(bare) is None


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"\xff\xd8", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"]
)
def test_no_metadata(data):
    assert without_metadata(data) is None


def test_arbitrary_bytes():
    rng = np.random.default_rng(0)
    for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"):
        for _ in range(200):
            without_metadata(start + rng.choice([0, 255, 0xE1, 3], 40).astype(np.uint8).tobytes())
