"""Which files of a folder are images: one rule for training and evaluation."""

import os
from collections import Counter
from collections.abc import Mapping

from bitdance_jax.io.image_files import SUFFIXES


def is_image(name: str) -> bool:
    """Whether a file of that name counts as an image: by its ending, and not hidden."""
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(SUFFIXES) and not base.startswith(".")


def list_images(folder: str | os.PathLike[str]) -> tuple[list[str], Counter[str]]:
    """Paths of the images below a folder at any depth, sorted, and how many other files there are by their ending.

    Hidden files and folders are passed over. Symbolic links are followed; a folder that is met a second time,
    as by a link to one above it, is not listed again. The files themselves are not looked at, which on some
    network disks would cost a call each.

    Raises:
      OSError: a folder cannot be read.
    """
    found: list[str] = []
    left_out: Counter[str] = Counter()
    pending, seen = [os.fspath(folder)], set()
    while pending:
        current = pending.pop()
        status = os.stat(current)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(current) as entries:
            visible = sorted(
                (entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name
            )
        for entry in visible:
            if is_image(entry.name):
                found.append(entry.path)
            elif entry.is_dir():
                pending.append(entry.path)
            else:
                left_out[ending(entry.name)] += 1
    return sorted(found), left_out


def ending(name: str) -> str:
    """What stands after the last dot of a file's name, with it, in lower case."""
    return os.path.splitext(name.rsplit("/", 1)[-1])[1].lower() or "no ending"


def left_out_text(left_out: Mapping[str, int]) -> str:
    """One line on the files that are no images by their endings; empty if there are none."""
    if not left_out:
        return ""
    most = Counter(left_out).most_common(5)
    named = ", ".join(f"{suffix} {count:,}" for suffix, count in most)
    others = ", ..." if len(left_out) > len(most) else ""
    return f"files left out by their ending: {sum(left_out.values()):,} ({named}{others})"
