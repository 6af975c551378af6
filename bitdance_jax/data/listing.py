"""Which files of a folder are images, in training and in evaluation."""

import os
from collections import Counter
from collections.abc import Mapping

from bitdance_jax.io.image_files import SUFFIXES


def is_image(name: str) -> bool:
    """Whether a file of that name is an image: by its ending, and not hidden."""
    base = name.rsplit("/", 1)[-1]
    return base.lower().endswith(SUFFIXES) and not base.startswith(".")


def list_images(
    folder: str | os.PathLike[str], others: list[str] | None = None
) -> tuple[list[str], Counter[str]]:
    """The sorted paths of images below a folder at any depth, and the numbers of other files by
    ending. The paths of the latter are appended to `others`.

    Hidden files and folders are skipped. Symbolic links are followed; a folder that is found a
    second time, for example by a link to a parent, is not listed again. Files are not accessed,
    which would cost a call each on some network disks.

    Raises:
      OSError: a folder cannot be read.
    """
    found: list[str] = []
    skipped: Counter[str] = Counter()
    pending = [os.fspath(folder)]
    seen: set[tuple[int, int]] = set()
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
                skipped[ending(entry.name)] += 1
                if others is not None:
                    others.append(entry.path)
    return sorted(found), skipped


def ending(name: str) -> str:
    """The ending of a file's name with its dot, in lower case; or "no ending"."""
    return os.path.splitext(name.rsplit("/", 1)[-1])[1].lower() or "no ending"


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """A line about the numbers of files that are no images; empty if there are none."""
    if not skipped:
        return ""
    most = Counter(skipped).most_common(5)
    named = ", ".join(f"{suffix} {count:,}" for suffix, count in most)
    others = ", ..." if len(skipped) > len(most) else ""
    return f"other files skipped: {sum(skipped.values()):,} ({named}{others})"
