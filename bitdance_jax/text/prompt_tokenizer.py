"""Prompts to token ids, with the tokenizer files that come with a text-to-image model (SPEC 5)."""

import json
import os
from collections.abc import Iterator

import tokenizers
from etils import epath

from bitdance_jax.config import ImageTokens
from bitdance_jax.errors import UserError


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
        self._tokenizer, self._added = _read(self._path)
        self.tokens_per_step = tokens_per_step or 1 + len(list(self._run("query")))
        needed = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|res_1|>"]
        needed += [f"<|query_{n}|>" for n in range(1, self.tokens_per_step)]
        if missing := [token for token in needed if token not in self._added]:
            raise UserError(f"{self._path} lacks special tokens that text-to-image needs: {', '.join(missing)}; take the model's own files")
        self._start, self._end, vision_start = (self._added[token] for token in needed[:3])
        resolutions, queries = list(self._run("res")), list(self._run("query"))
        for name, ids in (("res", resolutions), ("query", queries)):
            if ids and ids != list(range(ids[0], ids[0] + len(ids))):
                raise UserError(
                    f"{self._path} has the tokens <|{name}_N|> out of order: ids must be consecutive; take the model's own files"
                )
        self.image_tokens = ImageTokens(vision_start, resolutions[0], len(resolutions), queries[0] if queries else 0)

    def encode(self, prompt: str, max_tokens: int) -> list[int]:
        """Ids of `<|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n`.

        Raises:
          UserError: the prompt is empty, not Unicode, or has with its template more than `max_tokens`.
        """
        if not prompt.strip():
            raise UserError("a prompt is empty; write what the image shall show")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the prompt {_short(prompt)} has bytes that are no UTF-8 text") from error
        ids = [self._start, *self._text(f"user\n{prompt}"), self._end, *self._text("\n"), *self.unconditional()]
        if len(ids) > max_tokens:
            raise UserError(
                f"the prompt {_short(prompt)} has {len(ids)} tokens with its template, and at most {max_tokens} fit; shorten it"
            )
        return ids

    def unconditional(self) -> list[int]:
        """Ids of `<|im_start|>assistant\\n`, the prompt of the rows without one."""
        return [self._start, *self._text("assistant\n")]

    def _text(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _run(self, name: str) -> Iterator[int]:
        """Ids of `<|name_1|>`, `<|name_2|>` and so on, as many as there are."""
        number = 1
        while (token := self._added.get(f"<|{name}_{number}|>")) is not None:
            yield token
            number += 1


def read_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The tokenizer files that a folder has, for `model_folder.save`."""
    return {f"{FOLDER}/{name}": (epath.Path(folder) / name).read_bytes() for name in FILES if (epath.Path(folder) / name).exists()}


def _read(path: epath.Path) -> tuple[tokenizers.Tokenizer, dict[str, int]]:
    """The tokenizer of plain text, and the ids of the tokens that were added to it."""
    config = path.parent / "tokenizer_config.json"
    try:
        content = json.loads(path.read_text())
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
        further = json.loads(config.read_text()).get("added_tokens_decoder", {}) if config.exists() else {}
        further = {token["content"]: int(number) for number, token in further.items()}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: a text-to-image model needs its tokenizer files") from error
    except Exception as error:  # The tokenizers library raises bare Exceptions.
        raise UserError(f"the tokenizer files in {path.parent} cannot be read ({error}); fetch them again") from error
    for token, number in further.items():
        if added.setdefault(token, number) != number:
            raise UserError(f"{path} and tokenizer_config.json beside it give {token} different ids; take the model's own files")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, added


def _short(prompt: str) -> str:
    return repr(prompt) if len(prompt) <= 40 else repr(prompt[:40]) + "..."
