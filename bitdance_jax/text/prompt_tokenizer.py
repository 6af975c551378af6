"""Prompts to token ids, with the tokenizer files of a text-to-image model (paper 4.3)."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
from etils import epath
from tokenizers.decoders import ByteLevel

from bitdance_jax.config import ImageTokens
from bitdance_jax.errors import ConfigError, FileError
from bitdance_jax.io import paths, readers
from bitdance_jax.text.tokenizer_file import Encode, open_tokenizer


FOLDER = "text_tokenizer"
"""The folder of these files in a model folder."""

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
"""The tokenizer files of a release. Only the first two are read here."""

DEFAULT_QUESTION = "Describe this image."
"""About an image that is shown without a word."""

MAX_PROMPT_BYTES = 2**16
"""Size limit of a prompt. The models read a thousand tokens."""

TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


@dataclass(frozen=True)
class AddedToken:
    """A token in tokenizer_config.json."""

    content: str


@dataclass(frozen=True)
class NumberedToken(AddedToken):
    """A token in tokenizer.json."""

    id: TokenId


@dataclass(frozen=True)
class TokenizerConfigFile:
    """The part of tokenizer_config.json that is read."""

    added_tokens_decoder: dict[TokenId, AddedToken] = field(default_factory=dict)


class LongPrompt(ConfigError):
    """A prompt with too many tokens or bytes."""


class PromptTokenizer:
    """The byte-level BPE of a text-to-image model, and the template of its prompts.

    The template's special tokens are inserted by their ids. Added tokens that a user writes in a
    prompt are encoded as plain text. (The released code recognises them in the prompt too, so that
    a prompt could end the template or open an image.)

    Attributes:
      tokens_per_step: P, one more than the number of `<|query_N|>` tokens.
      image_tokens: ids of the added tokens that open an image.
    """

    def __init__(self, folder: str | os.PathLike[str], tokens_per_step: int | None = None) -> None:
        """Reads the tokenizer files in a folder, local or gs://.

        Args:
          folder: the folder.
          tokens_per_step: P of the model, if known; the file must have P - 1 queries then.

        Raises:
          FileError: the files are missing or damaged, or special tokens are missing or unordered.
        """
        self._path = epath.Path(folder) / "tokenizer.json"
        self._encode_text, self._added, self._words = _read(self._path)
        self._line_end = self._encode_text("\n")
        self._assistant = self._encode_text("assistant\n")
        self.tokens_per_step = tokens_per_step or 1 + len(list(self._numbered("query")))
        self._check_special_tokens()
        self._start = self._added["<|im_start|>"]
        self._end = self._added["<|im_end|>"]
        resolutions = self._consecutive("res")
        queries = self._consecutive("query")
        self.image_tokens = ImageTokens(
            self._added["<|vision_start|>"],
            resolutions[0],
            len(resolutions),
            queries[0] if queries else 0,
        )

    def encode(self, prompt: str, max_tokens: int, *, truncate: bool = False) -> list[int]:
        """Ids of `<|im_start|>user\\n{prompt}<|im_end|>\\n<|im_start|>assistant\\n`.

        Args:
          prompt: the text.
          max_tokens: of the result.
          truncate: cut a longer prompt behind its last token that fits.

        Raises:
          LongPrompt: the prompt is longer, without `truncate`.
          ConfigError: the prompt is empty or not Unicode.
          UserError: the tokenizer takes too much time or memory for it.
        """
        if not prompt.strip():
            raise _bad_prompt("a prompt is empty; describe the image")
        name = f"the prompt {_shorten(prompt)}"
        if truncate:
            prompt = prompt[: MAX_PROMPT_BYTES // 4]  # UTF-8 has four bytes a character at most.
        try:
            size = len(prompt.encode())
        except UnicodeEncodeError as error:
            raise _bad_prompt(f"{name} has bytes that are not UTF-8 text") from error
        if size > MAX_PROMPT_BYTES:
            raise LongPrompt(
                f"{name} has {size:,} bytes, and the limit is {MAX_PROMPT_BYTES:,}; shorten it",
                "prompt",
            )
        ids = [self._start, *self._encode_text(f"user\n{prompt}")]
        behind = self.after_caption()
        if truncate:
            ids = ids[: max_tokens - len(behind)]
        if (count := len(ids) + len(behind)) > max_tokens:
            raise LongPrompt(
                f"{name} has {count} tokens with its template, and at most {max_tokens} fit;"
                " shorten it",
                "prompt",
            )
        return [*ids, *behind]

    def encode_answer(self, text: str, max_tokens: int) -> list[int]:
        """Ids of a text alone, without a template.

        Raises:
          LongPrompt: it has more than `max_tokens`.
          ConfigError: it is not Unicode.
        """
        if not text:
            return []
        start = self.caption_start
        behind = len(self.after_caption())
        return self.encode(text, start + max_tokens + behind)[start:-behind]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without added tokens and those that are no tokens of the file."""
        words = [self._words[token] for token in tokens if token in self._words]
        return str(ByteLevel().decode(words)).strip()

    def unconditional(self) -> list[int]:
        """Ids of `<|im_start|>assistant\\n`, the unconditional prompt of guidance."""
        return [self._start, *self._assistant]

    def after_caption(self) -> list[int]:
        """Ids of `<|im_end|>\\n<|im_start|>assistant\\n`, the template after a prompt."""
        return [self._end, *self._line_end, *self.unconditional()]

    def between_turns(self) -> list[int]:
        """Ids of the line end between the `<|im_end|>` of an answer and the next prompt."""
        return [*self._line_end]

    def end_of_image(self) -> list[int]:
        """Ids of `<|vision_end|><|im_end|>`, which follow a generated image in training.

        Raises:
          FileError: the tokenizer has no `<|vision_end|>`.
        """
        if "<|vision_end|>" not in self._added:
            raise self._bad_file("lacks <|vision_end|>, which training and images in prompts need")
        return [self._added["<|vision_end|>"], self._end]

    @property
    def caption_start(self) -> int:
        """Number of tokens before the caption in what `encode` returns."""
        return 1 + len(self._encode_text("user\n"))

    def _check_special_tokens(self) -> None:
        num_queries = self.tokens_per_step - 1
        if num_queries > len(self._added):
            raise self._bad_file(f"has no {num_queries:,} tokens <|query_N|>")
        needed = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|res_1|>"]
        needed += [f"<|query_{n}|>" for n in range(1, num_queries + 1)]
        if missing := [token for token in needed if token not in self._added]:
            raise self._bad_file(
                f"lacks special tokens that text-to-image needs: {', '.join(missing)}"
            )

    def _consecutive(self, name: str) -> list[int]:
        """Ids of all `<|name_N|>`; a FileError if they are not consecutive."""
        ids = list(self._numbered(name))
        if ids and ids != list(range(ids[0], ids[0] + len(ids))):
            raise self._bad_file(f"has tokens <|{name}_N|> whose ids are not consecutive")
        return ids

    def _numbered(self, name: str) -> Iterator[int]:
        """Ids of `<|name_1|>`, `<|name_2|>` and so on."""
        number = 1
        while (token := self._added.get(f"<|{name}_{number}|>")) is not None:
            yield token
            number += 1

    def _bad_file(self, problem: str) -> FileError:
        return FileError(f"{self._path} {problem}; use the model's own files", self._path)


def read_files(folder: str | os.PathLike[str]) -> dict[str, bytes]:
    """The tokenizer files in a folder, for `model_folder.save`.

    Raises:
      FileError: one of them is not a file, is too large, or is a symbolic link out of the folder
        that does not lead to the Hugging Face cache of the folder.
    """
    path = epath.Path(folder)
    found = [path / name for name in FILES if (path / name).exists()]
    if not paths.is_remote(path):
        for file in found:
            _check_inside(Path(file))
    return {
        f"{FOLDER}/{file.name}": readers.read_bytes(file, readers.MAX_LIST_BYTES) for file in found
    }


def _check_inside(file: Path) -> None:
    """Refuses links to other files of this machine, which would be copied into the model folder."""
    target = Path(os.path.realpath(file))
    folder = Path(os.path.realpath(file.parent))
    caches = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (folder, *caches)):
        raise FileError(
            f"{file} is a link to {target}, outside of its folder; copy the file itself there", file
        )


def _read(path: epath.Path) -> tuple[Encode, dict[str, int], dict[int, str]]:
    """The tokenizer of plain text, the ids of the added tokens, and the others by their ids."""
    try:
        content = readers.read_json(path, limit=readers.MAX_LIST_BYTES)
    except readers.MissingFile as error:
        raise readers.MissingFile(
            f"{path} is missing: a text-to-image model needs its tokenizer files", path
        ) from error
    tokens: list[NumberedToken] = readers.validate(
        content.get("added_tokens"), list[NumberedToken], where=f"added_tokens of {path}"
    )
    added = {token.content: token.id for token in tokens}
    config = path.parent / "tokenizer_config.json"
    if config.exists():
        decoder = readers.read_json(config, TokenizerConfigFile).added_tokens_decoder
        for number, token in decoder.items():
            if added.setdefault(token.content, number) != number:
                raise FileError(
                    f"{path} and tokenizer_config.json beside it give {token.content} different"
                    " ids; use the model's own files",
                    path,
                )
    encode = open_tokenizer(content, str(path))
    return encode, added, {number: word for word, number in _vocabulary(content).items()}


def _vocabulary(content: dict[str, Any]) -> dict[str, int]:
    """The tokens of a byte-level BPE; empty if it is another kind of tokenizer."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return vocabulary if isinstance(vocabulary, dict) else {}


def _bad_prompt(line: str) -> ConfigError:
    return ConfigError(line, "prompt")


def _shorten(prompt: str) -> str:
    return repr(prompt) if len(prompt) <= 40 else repr(prompt[:40]) + "..."
