"""Removes metadata from JPEG and PNG files, to decode files whose metadata Pillow cannot read."""

JPEG = b"\xff\xd8"
PNG = b"\x89PNG\r\n\x1a\n"

_FILL = 0xFF
_START_OF_SCAN = 0xDA
_ADOBE = 0xEE
_METADATA = (*range(0xE0, 0xF0), 0xFE)
"""Markers of a JPEG's application segments and comments."""

_CRITICAL = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
"""Chunks of a PNG that determine its pixels."""


def without_metadata(data: bytes) -> bytes | None:
    """A JPEG or PNG file without its metadata; None if it has none, or is of another format.

    A JPEG's Adobe segment remains, because it says how the colours are stored.
    """
    if data.startswith(JPEG):
        stripped = _strip_jpeg(data)
    elif data.startswith(PNG):
        stripped = _strip_png(data)
    else:
        return None
    return None if len(stripped) == len(data) else stripped


def _strip_jpeg(data: bytes) -> bytes:
    parts = [JPEG]
    start = len(JPEG)
    while (
        data[start : start + 1] == b"\xff"
        and start + 4 <= len(data)
        and data[start + 1] != _START_OF_SCAN
    ):
        marker = data[start + 1]
        if marker == _FILL:
            start += 1
            continue
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        if marker == _ADOBE or marker not in _METADATA:
            parts.append(data[start:end])
        start = end
    return b"".join([*parts, data[start:]])


def _strip_png(data: bytes) -> bytes:
    parts = [PNG]
    start = len(PNG)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] in _CRITICAL:
            parts.append(data[start:end])
        start = end
    return b"".join(parts)
