"""Encodes plain text with a tokenizer.json that may be hostile.

Its regular expression could run forever, and its normalizer could double a text forty times. A file
that uses only the known parts of byte pair encodings is used at once; any other runs in a process
with limited time and memory.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import tokenizers

from bitdance_jax.errors import FileError, UserError, short


Encode = Callable[[str], list[int]]

SECONDS = 10
"""Time limit of the process."""

MEMORY = 4 * 2**30
"""Memory limit of the process in bytes."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The regular expression by which Qwen2 and Qwen3 split a text into words.

Its time is linear in a text without long runs of spaces; 64 KB of them take 0.1 s.
"""

BPE_FIELDS = {"type", "vocab", "merges", "ignore_merges"}
"""Fields of a BPE model that may have a value; others must be empty."""

WORKER = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
except (ImportError, ValueError, OSError):
    pass
import tokenizers
content, text = json.load(sys.stdin)
tokenizer = tokenizers.Tokenizer.from_str(content)
json.dump(tokenizer.encode(text, add_special_tokens=False).ids, sys.stdout)
"""


def open_tokenizer(content: dict[str, Any], where: str) -> Encode:
    """The function from a text to its token ids; it can be pickled.

    Args:
      content: of a tokenizer.json; its added tokens and its template are ignored.
      where: name of the file in error messages.

    Raises:
      FileError: the tokenizers library cannot read it. The returned function raises it if a text
        takes too much time or memory.
    """
    text = json.dumps(
        {
            "version": "1.0",
            "added_tokens": [],
            "truncation": None,
            "padding": None,
            "post_processor": None,
            "decoder": None,
            "normalizer": content.get("normalizer"),
            "pre_tokenizer": content.get("pre_tokenizer"),
            "model": content.get("model"),
        }
    )
    if not is_known(content):
        return functools.partial(_encode_in_process, text, where)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # The library raises bare Exceptions.
        reason = _first_line(str(error))
        raise FileError(f"{where} cannot be read ({reason}); fetch it again", where) from error
    return functools.partial(_encode, tokenizer)


def _encode(tokenizer: tokenizers.Tokenizer, prompt: str) -> list[int]:
    return list(tokenizer.encode(prompt, add_special_tokens=False).ids)


def is_known(content: dict[str, Any]) -> bool:
    """Whether a tokenizer.json uses only Unicode normal forms, Qwen2's words and plain BPE."""
    normalizer = content.get("normalizer")
    words = content.get("pre_tokenizer")
    model = content.get("model")
    steps = [words]
    if isinstance(words, dict) and words.get("type") == "Sequence":
        steps = words.get("pretokenizers")  # type: ignore[assignment]
    return (
        (normalizer is None or _is_normal_form(normalizer))
        and isinstance(steps, list)
        and len(steps) <= 2
        and all(_is_known_words(step) for step in steps)
        and isinstance(model, dict)
        and model.get("type") == "BPE"
        and not any(model[name] for name in model.keys() - BPE_FIELDS)
    )


def _is_normal_form(normalizer: Any) -> bool:
    if not isinstance(normalizer, dict):
        return False
    return re.fullmatch("NFK?[CD]", str(normalizer.get("type"))[:10]) is not None


def _is_known_words(step: Any) -> bool:
    if not isinstance(step, dict):
        return False
    is_qwen2 = step.get("type") == "Split" and step.get("pattern") == {"Regex": QWEN2}
    return is_qwen2 or step.get("type") == "ByteLevel"


def _encode_in_process(content: str, where: str, text: str) -> list[int]:
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", WORKER],
            input=json.dumps([content, text]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{where} takes more than {SECONDS} s for the text {short(text)};"
            " use the model's own files"
        ) from error
    if done.returncode:
        reason = _first_line(done.stderr.strip().rpartition("\n")[2]) or "the process died"
        raise FileError(f"{where} cannot be used ({reason}); use the model's own files", where)
    ids: list[int] = json.loads(done.stdout)
    return ids


def _first_line(message: str) -> str:
    return message.partition("\n")[0][:200]
