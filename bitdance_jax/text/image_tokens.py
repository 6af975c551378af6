"""Adds the tokens that open an image to the tokenizer files of a language model (paper 4.3)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitdance_jax.errors import FileError
from bitdance_jax.io import readers
from bitdance_jax.text.prompt_tokenizer import FOLDER, NumberedToken, TokenizerConfigFile


RESOLUTIONS = 256
"""Number of tokens `<|res_N|>` of the released models: sides up to 4096 pixels."""

FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

Files = dict[str, bytes]


@dataclass(frozen=True)
class Vocabulary:
    """The part of a tokenizer.json's model that is read."""

    vocab: dict[str, int]


@dataclass(frozen=True)
class TokenizerFile:
    """The part of a tokenizer.json that is read."""

    model: Vocabulary
    added_tokens: list[NumberedToken]


def add_image_tokens(
    files: Mapping[str, bytes], tokens_per_step: int, num_resolutions: int = RESOLUTIONS
) -> Files:
    """Tokenizer files with `<|res_1|>` and so on, then `<|query_1|>` to `<|query_{P-1}|>`.

    Tokens that are there keep their ids; a missing one gets the first id after all others. So the
    files of a language model become those of a text-to-image model, and those of a text-to-image
    model those of one with a larger P.

    Args:
      files: by their path in a model folder, as `prompt_tokenizer.read_files` returns them.
      tokens_per_step: P.
      num_resolutions: number of `<|res_N|>` if there are none.

    Raises:
      FileError: the files are damaged, or other tokens follow those that would have to grow.
    """
    path = f"{FOLDER}/tokenizer.json"
    tokenizer = _decoded(files, path)
    ids = _ids(files, path)
    new: dict[str, int] = {}
    groups = {"query": tokens_per_step - 1}
    if "<|res_1|>" not in ids:
        groups = {"res": num_resolutions, **groups}
    for group, count in groups.items():
        names = [f"<|{group}_{number}|>" for number in range(1, count + 1)]
        missing = [name for name in names if name not in ids]
        first = 1 + max(ids.values(), default=-1)
        added = {name: first + i for i, name in enumerate(missing)}
        before = f"<|{group}_{count - len(missing)}|>"
        if missing and before in ids and ids[before] + 1 != first:
            raise FileError(
                f"{path} has tokens after {before}, so that {missing[0]} cannot follow it", path
            )
        ids |= added
        new |= added
    if not new:
        return dict(files)
    tokenizer["added_tokens"] += [_token(name, number) for name, number in new.items()]
    extended = {path: _encoded(tokenizer)}
    for name, change in (
        ("tokenizer_config.json", _extend_config),
        ("special_tokens_map.json", _extend_map),
        ("added_tokens.json", dict.update),
    ):
        other = f"{FOLDER}/{name}"
        if other in files:
            content = _decoded(files, other)
            change(content, new)
            extended[other] = _encoded(content)
    return {**files, **extended}


def _extend_config(config: dict[str, Any], new: Mapping[str, int]) -> None:
    """Adds tokens to the content of tokenizer_config.json."""
    if isinstance(decoder := config.get("added_tokens_decoder"), dict):
        decoder |= {str(number): _token(name) for name, number in new.items()}
    if isinstance(names := config.get("additional_special_tokens"), list):
        names += new


def _extend_map(special: dict[str, Any], new: Mapping[str, int]) -> None:
    """Adds tokens to the content of special_tokens_map.json, in the form of those in it."""
    tokens = special.setdefault("additional_special_tokens", [])
    if isinstance(tokens, list):
        plain = all(isinstance(token, str) for token in tokens)
        tokens += new if plain else [{"content": name, **FLAGS} for name in new]


def _token(name: str, number: int | None = None) -> dict[str, Any]:
    token = {"content": name, **FLAGS, "special": True}
    return token if number is None else {"id": number, **token}


def _ids(files: Mapping[str, bytes], path: str) -> dict[str, int]:
    """The id of every token of a tokenizer.json, and of the tokenizer_config.json beside it."""
    tokenizer: TokenizerFile = readers.decode_json(files[path], TokenizerFile, where=path)
    ids = tokenizer.model.vocab | {token.content: token.id for token in tokenizer.added_tokens}
    config = f"{FOLDER}/tokenizer_config.json"
    if config in files:
        decoded: TokenizerConfigFile = readers.decode_json(
            files[config], TokenizerConfigFile, where=config
        )
        ids |= {token.content: number for number, token in decoded.added_tokens_decoder.items()}
    return ids


def _decoded(files: Mapping[str, bytes], path: str) -> dict[str, Any]:
    if path not in files:
        raise FileError(f"{path} is missing: a text-to-image model needs its tokenizer files", path)
    content: dict[str, Any] = readers.decode_json(files[path], where=path)
    return content


def _encoded(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=2) + "\n").encode()
