"""An MkDocs hook: links to files of the repository outside docs become their paths."""

import re
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^]]+\]\(\.\./([^)#]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    return LINK.sub(_path, markdown)


def _path(link: re.Match[str]) -> str:
    return f"`{link[1]}`" if (ROOT / link[1]).exists() else link[0]
