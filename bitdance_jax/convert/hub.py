"""Released files from the Hugging Face hub. Downloads show their progress, go on where they stopped, and are kept in the hub's cache.

Where the hub cannot be reached, the cache's copy is used.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import huggingface_hub

from bitdance_jax.convert import release_folder
from bitdance_jax.errors import UserError


TEXT_TO_IMAGE_FILES = (".safetensors", ".json", ".txt", ".jinja")
"""Endings of the files that make a text-to-image model: weights, configs, the prompts' tokenizer."""


SECONDS = 10.0
"""That the hub may take to say what is in a repository."""


def download(name: str) -> Path:
    """The local copy of what "owner/repository" or "owner/repository/file" names: a file, or a folder with a text-to-image model.

    Raises:
      UserError: not such a name, nothing found there, or several files to choose from.
    """
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?", name)
    if match is None or (name.endswith((".pt", ".safetensors")) and match[2] is None):
        raise UserError(
            f"no file or folder {name}, and it is not a Hugging Face id such as owner/repository"
        )
    repository, file = match.groups()
    with _one_line(name):
        files, cached = _list(repository)
    wanted = _choose(name, files, file)
    if cached is None:
        with _one_line(name):
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    else:
        folder = cached
    return folder if file is None and release_folder.layout(set(files)) else folder / wanted[0]


def _list(repository: str) -> tuple[list[str], Path | None]:
    """The files of a repository; where the hub does not tell, those in the cache, and their folder."""
    try:
        # One request: `list_repo_files` tries for half a minute before it says that there is no network.
        there = huggingface_hub.model_info(repository, timeout=SECONDS)
        return [file.rfilename for file in there.siblings or []], None
    except Exception as error:
        try:
            cached = Path(
                huggingface_hub.snapshot_download(
                    repository, allow_patterns=[], local_files_only=True
                )
            )
        except Exception:  # nothing of it is there
            raise error from None
        files = [
            file.relative_to(cached).as_posix()
            for file in sorted(cached.rglob("*"))
            if file.is_file()
        ]
        if not files:
            raise
        print(
            f"Hugging Face cannot be reached ({_reason(error)}); the copy of {repository} in its cache is used",
            file=sys.stderr,
        )
        return files, cached


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def _one_line(name: str) -> Iterator[None]:
    try:
        yield
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        login = "a private or gated one needs `hf auth login` first"
        raise UserError(
            f"there is no file or folder {name}, and Hugging Face shows no such repository; {login}"
        ) from error
    except Exception as error:  # The hub's client, and the HTTP library under it, raise many types.
        raise UserError(
            f"there is no file or folder {name}, and it could not be downloaded from Hugging Face: {_reason(error)}"
        ) from error


def _choose(name: str, files: list[str], file: str | None) -> list[str]:
    """The files to fetch: all of a text-to-image model's, or the one with the tensors first."""
    if file is None:
        if layout := release_folder.layout(set(files)):
            folders = {
                layout.text_tokenizer,
                *(getattr(layout, part).folder for part in release_folder.PREFIXES),
            }
            return [
                other
                for other in files
                if other.endswith(TEXT_TO_IMAGE_FILES) and other.rpartition("/")[0] in folders
            ]
        models = [other for other in files if other.endswith((".pt", ".safetensors"))]
        if any(PurePosixPath(model).parent.name == "transformer" for model in models):
            raise UserError(f"{name}: {release_folder.CLASS_CONDITIONAL}")
        if len(models) != 1:
            choice = (
                f"add one of its files, such as {name}/{models[0]}: {', '.join(models)}"
                if models
                else "it has no .pt or .safetensors file"
            )
            raise UserError(f"{name}: {choice}")
        file = models[0]
    if file not in files:
        raise UserError(f"{name}: the repository has no file {file}")
    config = str(PurePosixPath(file).with_suffix("")) + "_config.json"
    return [file, config] if config in files else [file]
