"""Prompts to token ids, with the tokenizer files that come with a text-to-image model (SPEC 5)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
from etils import epath

from bitdance_jax.config import ImageTokens
from bitdance_jax.errors import UserError
from bitdance_jax.io import readers
from bitdance_jax.text.byte_pairs import Encode, open_tokenizer


FOLDER = "text_tokenizer"
"""Where a model folder keeps them."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""The tokenizer files of a release; the first holds all that is needed here, unless the second adds tokens."""


MAX_PROMPT_BYTES = 2**16
"""Of a prompt. The models read a thousand tokens."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


@dataclass(frozen=True)
class AddedToken:
    """Of tokenizer_config.json."""

    content: str


@dataclass(frozen=True)
class NumberedToken(AddedToken):
    """Of tokenizer.json."""

    id: TokenId


@dataclass(frozen=True)
class TokenizerConfigFile:
    """What is read of tokenizer_config.json."""

    added_tokens_decoder: dict[TokenId, AddedToken] = field(default_factory=dict)


class PromptTokenizer:
    """The byte-level BPE of a text-to-image model, and the template that its prompts stand in.

    What a user writes is text, also where it looks like one of the added tokens: those are put in by their ids. (The release looks for
    them in the prompt too, so that one could end the template or open an image.)

    Attributes:
      tokens_per_step: P, which the number of `<|query_N|>` tells.
      image_tokens: ids of the added tokens that open an image.
    """

    def __init__(self, folder: str | os.PathLike[str], tokens_per_step: int | None = None) -> None:
        """Reads the tokenizer files in a folder, local or gs://.

        Args:
          tokens_per_step: P, of a model that is known already; the file must have P - 1 queries then.

        Raises:
          UserError: no such files, damaged ones, or special tokens that are missing or out of order, all of them named.
        """
        self._path = epath.Path(folder) / "tokenizer.json"
        self._text, self._added = _read(self._path)
        self._line_end, self._assistant = self._text("\n"), self._text("assistant\n")
        self.tokens_per_step = tokens_per_step or 1 + len(list(self._run("query")))
        needed = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|res_1|>"]
        if self.tokens_per_step - 1 > len(self._added):
            raise UserError(
                f"{self._path} has no {self.tokens_per_step - 1:,} tokens <|query_N|>; take the model's own files"
            )
        needed += [f"<|query_{n}|>" for n in range(1, self.tokens_per_step)]
        if missing := [token for token in needed if token not in self._added]:
            raise UserError(
                f"{self._path} lacks special tokens that text-to-image needs: {', '.join(missing)}; take the model's own files"
            )
        self._start, self._end, vision_start = (self._added[token] for token in needed[:3])
        resolutions, queries = list(self._run("res")), list(self._run("query"))
        for name, ids in (("res", resolutions), ("query", queries)):
            if ids and ids != list(range(ids[0], ids[0] + len(ids))):
                raise UserError(
                    f"{self._path} has the tokens <|{name}_N|> out of order: ids must be consecutive; take the model's own files"
                )
        self.image_tokens = ImageTokens(
            vision_start, resolutions[0], len(resolutions), queries[0] if queries else 0
        )

    def encode(self, prompt: str, max_tokens: int) -> list[int]:
        """Ids of `<|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n`.

        Raises:
          UserError: the prompt is empty, not Unicode, or has with its template more than `max_tokens`; or the files ask for more time or
            memory than a prompt may take.
        """
        if not prompt.strip():
            raise UserError("a prompt is empty; write what the image shall show")
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError as error:
            raise UserError(
                f"the prompt {_short(prompt)} has bytes that are no UTF-8 text"
            ) from error
        if size > MAX_PROMPT_BYTES:
            raise UserError(
                f"the prompt {_short(prompt)} has {size:,} bytes, and at most {MAX_PROMPT_BYTES:,} are read; shorten it"
            )
        ids = [
            self._start,
            *self._text(f"user\n{prompt}"),
            self._end,
            *self._line_end,
            *self.unconditional(),
        ]
        if len(ids) > max_tokens:
            raise UserError(
                f"the prompt {_short(prompt)} has {len(ids)} tokens with its template, and at most {max_tokens} fit; shorten it"
            )
        return ids

    def unconditional(self) -> list[int]:
        """Ids of `<|im_start|>assistant\\n`, the prompt of the rows without one."""
        return [self._start, *self._assistant]

    def _run(self, name: str) -> Iterator[int]:
        """Ids of `<|name_1|>`, `<|name_2|>` and so on, as many as there are."""
        number = 1
        while (token := self._added.get(f"<|{name}_{number}|>")) is not None:
            yield token
            number += 1


def read_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The tokenizer files that a folder has, for `model_folder.save`.

    Raises:
      UserError: one of them is no file, or too large, or a symbolic link out of the folder that does not
        lead to the Hugging Face cache in which the folder is.
    """
    path = epath.Path(folder)
    found = [path / name for name in FILES if (path / name).exists()]
    if "://" not in str(path):
        for file in found:
            _check_own(Path(file))
    return {
        f"{FOLDER}/{file.name}": readers.read_bytes(file, readers.MAX_LIST_BYTES) for file in found
    }


def _check_own(file: Path) -> None:
    """A folder from elsewhere must not put a file of this machine into the model made of it."""
    real, own = Path(os.path.realpath(file)), [Path(os.path.realpath(file.parent))]
    own += [above.parent / "blobs" for above in own[0].parents if above.name == "snapshots"]
    if not any(real.is_relative_to(folder) for folder in own):
        raise UserError(f"{file} leads to {real}, outside of its folder; put the file itself there")


def _read(path: epath.Path) -> tuple[Encode, dict[str, int]]:
    """The tokenizer of plain text, and the ids of the tokens that were added to it."""
    config = path.parent / "tokenizer_config.json"
    try:
        content = readers.read_json(path, limit=readers.MAX_LIST_BYTES)
    except readers.MissingFile as error:
        raise UserError(
            f"{path} is missing: a text-to-image model needs its tokenizer files"
        ) from error
    tokens: list[NumberedToken] = readers.validate(
        content.get("added_tokens"), list[NumberedToken], where=f"added_tokens of {path}"
    )
    added = {token.content: token.id for token in tokens}
    further = (
        readers.read_json(config, TokenizerConfigFile).added_tokens_decoder
        if config.exists()
        else {}
    )
    for number, token in further.items():
        if added.setdefault(token.content, number) != number:
            raise UserError(
                f"{path} and tokenizer_config.json beside it give {token.content} different ids; take the model's own files"
            )
    return open_tokenizer(content, str(path)), added


def _short(prompt: str) -> str:
    return repr(prompt) if len(prompt) <= 40 else repr(prompt[:40]) + "..."
