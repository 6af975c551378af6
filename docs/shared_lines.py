"""A Griffe extension for the API pages: `a, b: text` in a docstring describes both names."""

import re
from typing import Any

import griffe


SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.+)$", re.MULTILINE)


class SharedLines(griffe.Extension):
    """Writes a line that describes several parameters or attributes once for each of them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SHARED.sub(_split, obj.docstring.value)


def _split(line: re.Match[str]) -> str:
    indent, names, text = line.groups()
    first, *others = names.split(", ")
    # The text may continue on the next line, so it stays with the last name.
    return "\n".join(f"{indent}{name}: see `{others[-1]}`." for name in [first, *others[:-1]]) + (
        f"\n{indent}{others[-1]}: {text}"
    )
