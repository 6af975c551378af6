"""Image files: reading, writing, number ranges and grids."""

import io
import os
import struct
import warnings
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from bitdance_jax.errors import FileError
from bitdance_jax.io import image_files


RED = (255, 0, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)


@pytest.mark.parametrize("module", [np, jnp])
def test_every_byte_round_trips_through_the_model_range(module):
    image = module.arange(256, dtype=module.uint8).reshape(1, 8, 32, 1)
    values = image_files.to_model(image)
    assert values.dtype == module.float32
    assert (values.min(), values.max()) == (-1, 1)
    back = image_files.to_uint8(values)
    assert isinstance(back, type(image)) and back.dtype == module.uint8
    np.testing.assert_array_equal(back, image)


def test_to_uint8_truncates_inside_a_program_too():
    values = jnp.linspace(-1.1, 1.1, 300).reshape(1, 10, 30, 1)
    total = jax.jit(lambda x: jnp.sum(image_files.to_uint8(x).astype(jnp.float32)))(values)
    assert total == image_files.to_uint8(np.asarray(values)).astype(np.float64).sum()


def test_to_uint8_truncates_and_clips():
    values = np.array(
        [-9.0, -1.0, -128 / 127.5, 0.0, 0.999 / 127.5, 1 / 127.5, 1.0, 9.0], np.float32
    ).reshape(1, -1, 1)
    np.testing.assert_array_equal(
        image_files.to_uint8(values).ravel(), [0, 0, 0, 128, 128, 129, 255, 255]
    )


def test_png_round_trip_leaves_nothing_else(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / "new" / "image.png"
    for _ in range(2):  # the second overwrites
        image_files.save_png(path, image)
    np.testing.assert_array_equal(image_files.load_image(path), image)
    assert [entry.name for entry in path.parent.iterdir()] == ["image.png"]


def test_a_failed_write_keeps_the_old_image(tmp_path, monkeypatch):
    image = np.zeros((2, 2, 3), np.uint8)
    path = tmp_path / "image.png"
    image_files.save_png(path, image)

    def full_disk(self, file, **_):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(FileError, match=r"image\.png: No space left on device"):
        image_files.save_png(path, image + 1)
    np.testing.assert_array_equal(image_files.load_image(path), image)
    assert len(list(tmp_path.iterdir())) == 1


def test_load_turns_upright_by_exif(tmp_path):
    stored = np.zeros((2, 3, 3), np.uint8)
    stored[0, 0] = RED
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise
    Image.fromarray(stored).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(
        image_files.load_image(tmp_path / "turned.png"), np.rot90(stored, -1)
    )


def test_load_composes_transparency_on_white(tmp_path):
    image = np.array([[[*RED, 255], [*RED, 0], [*BLUE, 0]]], np.uint8)
    Image.fromarray(image).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(
        image_files.load_image(tmp_path / "rgba.png"), [[RED, WHITE, WHITE]]
    )

    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([*RED, *BLUE])
    palette.save(tmp_path / "palette.png", transparency=1)
    np.testing.assert_array_equal(image_files.load_image(tmp_path / "palette.png"), [[RED, WHITE]])


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 1), (np.uint16, 256)])
def test_load_converts_grey_to_rgb(tmp_path, dtype, scale):
    grey = np.array([[0, 100, 255]])
    Image.fromarray((grey * scale).astype(dtype)).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(
        image_files.load_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, axis=-1)
    )


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_unreadable_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    if content is None:  # a truncated file
        Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        ).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"broken\.png"):
        image_files.load_image(path)
    with pytest.raises(FileError, match=r"absent\.png"):
        image_files.load_image(tmp_path / "absent.png")


def test_grid_positions():
    images = np.stack([np.full((4, 6, 3), value, np.uint8) for value in (10, 20, 30)])
    image = image_files.grid(images, columns=2)
    margin = image_files.MARGIN
    cell_height, cell_width = 4 + 2 * margin, 6 + 2 * margin
    assert image.shape == (2 * cell_height, 2 * cell_width, 3)
    for index, value in enumerate((10, 20, 30, 255)):
        top, left = index // 2 * cell_height, index % 2 * cell_width
        cell = image[top : top + cell_height, left : left + cell_width]
        assert (cell[margin:-margin, margin:-margin] == value).all()
        assert (cell[:margin] == 255).all() and (cell[:, :margin] == 255).all()


def test_grid_captions_and_enlarging():
    images = np.full((4, 8, 8, 3), 50, np.uint8)
    plain = image_files.grid(images, columns=2, enlarge=3)
    labelled = image_files.grid(images, columns=2, captions=["cats", "Zebras"], enlarge=3)
    left = labelled.shape[1] - plain.shape[1]
    assert plain.shape == (2 * (24 + 2 * image_files.MARGIN), 2 * (24 + 2 * image_files.MARGIN), 3)
    np.testing.assert_array_equal(labelled[:, left:], plain)
    top, bottom = np.split(labelled[:, :left], 2)
    assert top.min() < 128 and bottom.min() < 128  # both rows have a caption
    with pytest.raises(ValueError, match="captions"):
        image_files.grid(images, columns=2, captions=["cats"])


def test_check_writable_leaves_no_files(tmp_path):
    image_files.check_writable(tmp_path / "new" / "folder" / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_check_writable_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "grid.png"):
        with pytest.raises(FileError, match=str(path)):
            image_files.check_writable(path)


def encoded(image, form, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return io.BytesIO(file.getvalue())


def exif(kind, count, value, tag=0x0112):
    """An EXIF block with one field."""
    return b"II*\0" + struct.pack("<IHHHI", 8, 1, tag, kind, count) + value + bytes(4)


ASCII = 2
SHORT = 3
RATIONAL = 5


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "block",
    [
        b"not a TIFF",
        b"",
        exif(ASCII, 4, b"six\0"),
        exif(RATIONAL, 1, struct.pack("<I", 9999)),
        exif(SHORT, 2**31, bytes(4)),
        exif(SHORT, 1, bytes([77, 0, 0, 0])),
        exif(ASCII, 4, b"abc\0", tag=0x8769),
    ],
)
def test_damaged_metadata_are_ignored(form, block):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    options = {"lossless": True} if form == "WEBP" else {}
    plain = image_files.decode_image(encoded(image, form, **options), "plain")
    odd = image_files.decode_image(
        encoded(image, form, exif=(b"" if form == "PNG" else b"Exif\0\0") + block, **options),
        "odd",
    )
    np.testing.assert_array_equal(odd, plain)


@pytest.mark.parametrize(
    "segment", [b"\xff\xe0\0\x08JFIF\0\x01", b"\xff\xed\0\x18Photoshop 3.0\x008BIM\x04\x04\xff\xff"]
)
def test_a_jpeg_with_a_damaged_segment(segment):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    data = encoded(image, "JPEG").getvalue()
    odd = image_files.decode_image(io.BytesIO(data[:2] + segment + data[2:]), "odd")
    np.testing.assert_array_equal(odd, image_files.decode_image(io.BytesIO(data), "plain"))


def test_a_tiff_with_a_good_or_damaged_orientation():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for kind, value, turns in ((SHORT, 6, -1), (ASCII, "six", 0)):
        fields = ImageFileDirectory_v2()
        fields.tagtype[0x0112] = kind
        fields[0x0112] = value
        np.testing.assert_array_equal(
            image_files.decode_image(encoded(image, "TIFF", tiffinfo=fields), "t"),
            np.rot90(image, turns),
        )


@pytest.mark.parametrize("form", ["BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_supported_formats(form):
    image = np.full((4, 6, 3), 255, np.uint8)
    np.testing.assert_array_equal(image_files.decode_image(encoded(image, form), "x.png"), image)


@pytest.mark.parametrize("form", ["EPS", "PPM", "ICO", "PCX"])
def test_other_formats(form):
    with pytest.raises(image_files.DamagedImage, match=r"x\.png"):
        image_files.decode_image(encoded(np.full((16, 16, 3), 255, np.uint8), form), "x.png")


def test_a_png_with_a_long_text_or_colour_profile():
    image = np.zeros((2, 2, 3), np.uint8)
    text = PngInfo()
    text.add_text("prompt", "x" * 2_000_000, zip=True)
    for options in ({"pnginfo": text}, {"icc_profile": bytes(2_000_000)}):
        np.testing.assert_array_equal(
            image_files.decode_image(encoded(image, "PNG", **options), "x"), image
        )


def test_an_image_that_would_fill_the_memory():
    """Its file is small, because all pixels are equal. The header is enough."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    for side in (10_000, 40_000):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
        data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10)))
        with pytest.raises(image_files.DamagedImage, match="pixels"), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image_files.decode_image(io.BytesIO(data), "bomb")


def test_pipes_devices_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "device.png").symlink_to("/dev/zero")
    for name in ("pipe", "device", "folder"):
        with pytest.raises(image_files.DamagedImage, match=rf"{name}\.png"):
            image_files.load_image(tmp_path / f"{name}.png")
