"""Plain text to token ids by a tokenizer file that anybody may have written.

A regular expression may take for ever, and a normalizer may double a text forty times. So a file that asks for no more than the known byte
pair encodings do is used at once; any other one works in a process of its own, which has a budget of time and memory.
"""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import tokenizers

from bitdance_jax.errors import UserError, short


Encode = Callable[[str], list[int]]

SECONDS = 10
MEMORY = 4 * 2**30

QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2 and Qwen3 cut a text into words. The cost is linear in a text without long runs of spaces, and 0.1 s for 64 KB of them."""

WORKER = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except (ImportError, ValueError, OSError):
    pass
import tokenizers
content, text = json.load(sys.stdin)
json.dump(tokenizers.Tokenizer.from_str(content).encode(text, add_special_tokens=False).ids, sys.stdout)
"""


def open_tokenizer(content: dict[str, Any], where: str) -> Encode:
    """The function from a text to its ids.

    Args:
      content: of a tokenizer.json; its added tokens and its template are left out.
      where: what it is, for messages.

    Raises:
      UserError: the library cannot read it. When it is used: a text takes too much time or memory.
    """
    used: dict[str, Any] = {
        name: content.get(name) for name in ("normalizer", "pre_tokenizer", "model")
    }
    unused = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    text = json.dumps({"version": "1.0", "added_tokens": [], **unused, **used})
    if not is_known(content):
        return lambda prompt: _encode_apart(text, prompt, where)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exceptions.
        raise UserError(
            f"{where} cannot be read ({_first_line(str(error))}); fetch it again"
        ) from error
    return lambda prompt: list(tokenizer.encode(prompt, add_special_tokens=False).ids)


def is_known(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json asks for nothing but Unicode's normal forms, the known words and byte pair encoding."""
    normalizer, words, model = (
        content.get(name) for name in ("normalizer", "pre_tokenizer", "model")
    )
    parts = [words]
    if (
        isinstance(words, dict)
        and words.get("type") == "Sequence"
        and isinstance(words.get("pretokenizers"), list)
    ):
        parts = words["pretokenizers"]
    return (
        (normalizer is None or _is_normal_form(normalizer))
        and len(parts) <= 2
        and all(_is_known_words(part) for part in parts)
        and isinstance(model, dict)
        and model.get("type") == "BPE"
        and all(
            not model[name] for name in model.keys() - {"type", "vocab", "merges", "ignore_merges"}
        )
    )


def _is_normal_form(normalizer: Any) -> bool:
    return (
        isinstance(normalizer, dict)
        and re.fullmatch("NFK?[CD]", str(normalizer.get("type"))[:10]) is not None
    )


def _is_known_words(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") == "ByteLevel" or (
        part.get("type") == "Split" and part.get("pattern") == {"Regex": QWEN2}
    )


def _encode_apart(content: str, text: str, where: str) -> list[int]:
    command = [sys.executable, "-P", "-c", WORKER]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([content, text]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{where} takes more than {SECONDS} s for the text {short(text)}; take the model's own files"
        ) from error
    if done.returncode:
        reason = _first_line(done.stderr.strip().rpartition("\n")[2])
        raise UserError(
            f"{where} cannot be used ({reason or 'the process died'}); take the model's own files"
        )
    ids: list[int] = json.loads(done.stdout)
    return ids


def _first_line(message: str) -> str:
    return message.partition("\n")[0][:200]
