"""Images without their metadata, for the pixels of files whose metadata Pillow cannot read."""

JPEG, PNG = b"\xff\xd8", b"\x89PNG\r\n\x1a\n"

_FILL, _START_OF_SCAN = 0xFF, 0xDA
_APPLICATION, _ADOBE, _COMMENT = range(0xE0, 0xF0), 0xEE, 0xFE
_CRITICAL = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def without_metadata(data: bytes) -> bytes | None:
    """What decides the pixels of a JPEG or a PNG, as a file; None if that is all of it, or if it is neither.

    A JPEG's Adobe segment says how its colours are stored, and stays.
    """
    if data.startswith(JPEG):
        bare = _bare_jpeg(data)
    elif data.startswith(PNG):
        bare = _bare_png(data)
    else:
        return None
    return None if len(bare) == len(data) else bare


def _bare_jpeg(data: bytes) -> bytes:
    kept, place = [JPEG], len(JPEG)
    while (
        data[place : place + 1] == b"\xff"
        and place + 4 <= len(data)
        and data[place + 1] != _START_OF_SCAN
    ):
        marker = data[place + 1]
        if marker == _FILL:
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        if marker == _ADOBE or not (marker in _APPLICATION or marker == _COMMENT):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def _bare_png(data: bytes) -> bytes:
    kept, place = [PNG], len(PNG)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] in _CRITICAL:
            kept.append(data[place:end])
        place = end
    return b"".join(kept)
