"""Names of many files in one text: numbered ones, alternatives and wildcards."""

import glob
import os
import re

from etils import epath

from bitdance_jax.errors import FileError
from bitdance_jax.io import paths


MAX_FILES = 1_000_000


def names_files(pattern: str, suffix: str) -> bool:
    """Whether a pattern names files that end in `suffix`, or a local folder that has some."""
    if not paths.is_remote(pattern) and os.path.isdir(pattern):
        return bool(glob.glob(os.path.join(glob.escape(pattern), f"*{suffix}")))
    return pattern.lower().endswith(suffix)


def expand(pattern: str, suffix: str) -> list[str]:
    """The paths that a pattern names, in order.

    Args:
      pattern: a path, local or under gs://. `{000..099}` stands for each of these numbers, `{a,b}`
        for each of these texts; `*`, `?` and `[...]` match the names of files, sorted. A folder
        stands for all files in it that end in `suffix`.
      suffix: such as ".tar".

    Raises:
      FileError: it names nothing, or too much.
    """
    found: list[str] = []
    for name in _without_braces(pattern):
        if not paths.is_remote(name) and os.path.isdir(name):
            name = os.path.join(glob.escape(name), f"*{suffix}")
        if not re.search(r"[*?\[]", name):
            found.append(name)
        elif paths.is_remote(name):
            root, _, rest = name.partition("://")[2].partition("/")
            found += sorted(map(os.fspath, epath.Path(f"gs://{root}").glob(rest)))
        else:
            found += sorted(glob.glob(name, recursive=True))
    if not found:
        raise FileError(f"no file matches {pattern}", pattern)
    return found


def _without_braces(pattern: str) -> list[str]:
    pending = [pattern]  # The next one is the last.
    done: list[str] = []
    while pending:
        if len(pending) + len(done) > MAX_FILES:
            raise FileError(f"{pattern} stands for more than {MAX_FILES:,} files", pattern)
        current = pending.pop()
        match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", current)
        if match is None:
            done.append(current)
            continue
        first, last, texts = match.groups()
        if texts is None:
            if int(last) - int(first) >= MAX_FILES:
                raise FileError(f"{pattern} stands for more than {MAX_FILES:,} files", pattern)
            choices = [f"{n:0{len(first)}}" for n in range(int(first), int(last) + 1)]
        else:
            choices = texts.split(",")
        before, after = current[: match.start()], current[match.end() :]
        pending += [f"{before}{choice}{after}" for choice in reversed(choices)]
    return list(dict.fromkeys(done))
