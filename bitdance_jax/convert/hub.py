"""Downloads released files from the Hugging Face hub into its cache.

An interrupted download is resumed. Where the hub cannot be reached, the copy in the cache is used.
"""

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import huggingface_hub
import huggingface_hub.errors

from bitdance_jax.convert import release_folder
from bitdance_jax.errors import FileError


FOLDER_FILES = (".safetensors", ".json", ".txt", ".jinja")
"""Suffixes of the files of a model in a folder: weights, configs, tokenizer files."""


SECONDS = 10.0
"""Time limit for listing the files of a repository."""


def download(name: str) -> Path:
    """Downloads "owner/repository", "owner/repository/file", or "owner/repository/folder" of a
    class-conditional model in the diffusers layout.

    Returns:
      the local copy: a file, or the folder of a model.

    Raises:
      FileError: not such a name, not found, or the repository has several models.
    """
    match = re.fullmatch(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:/(.+))?", name)
    if match is None or (name.endswith((".pt", ".safetensors")) and match[2] is None):
        raise FileError(
            f"no file or folder {name}, and it is not a Hugging Face id such as owner/repository"
        )
    repository, file = match.groups()
    with hub_errors(name):
        files, cached = list_files(repository)
    wanted = _choose(name, files, file)
    if cached is None:
        with hub_errors(name):
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=wanted))
    else:
        folder = cached
    if release_folder.is_class_conditional(set(_below(files, file))):
        return folder / (file or "")
    names = set(files)
    is_folder = release_folder.layout(names) or release_folder.is_language_model(names)
    return folder if file is None and is_folder else folder / wanted[0]


def _below(files: list[str], folder: str | None) -> list[str]:
    """The files below a folder of a repository, or all, by their paths in it."""
    prefix = "" if folder is None else f"{folder.rstrip('/')}/"
    return [file.removeprefix(prefix) for file in files if file.startswith(prefix)]


def list_files(repository: str) -> tuple[list[str], Path | None]:
    """The files of a repository; or those in the cache, and its folder, without a network."""
    try:
        # One request: without a network, `list_repo_files` retries for half a minute.
        info = huggingface_hub.model_info(repository, timeout=SECONDS)
        return [file.rfilename for file in info.siblings or []], None
    except Exception as error:
        try:
            cached = Path(
                huggingface_hub.snapshot_download(
                    repository, allow_patterns=[], local_files_only=True
                )
            )
        except Exception:  # It is not in the cache.
            raise error from None
        files = [
            file.relative_to(cached).as_posix()
            for file in sorted(cached.rglob("*"))
            if file.is_file()
        ]
        if not files:
            raise
        print(
            f"Hugging Face cannot be reached ({_reason(error)});"
            f" using the copy of {repository} in its cache",
            file=sys.stderr,
        )
        return files, cached


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def hub_errors(name: str) -> Iterator[None]:
    """Turns errors of the hub's client into a FileError of one line."""
    try:
        yield
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise FileError(
            f"there is no file or folder {name}, and no such repository on Hugging Face;"
            " a private or gated one needs `hf auth login` first"
        ) from error
    except Exception as error:  # The hub's client and its HTTP library raise many types.
        raise FileError(
            f"there is no file or folder {name}, and downloading it from Hugging Face failed:"
            f" {_reason(error)}"
        ) from error


def _choose(name: str, files: list[str], file: str | None) -> list[str]:
    """The files to download: all of a model in a folder, or the tensors and their config."""
    layout = release_folder.layout(set(files))
    if file is None and release_folder.is_language_model(set(files)):
        return [other for other in files if other.endswith(FOLDER_FILES) and "/" not in other]
    if file is None and layout:
        return text_to_image_files(files, layout)
    below = _below(files, file)
    if release_folder.is_class_conditional(set(below)):
        folders = {release_folder.TRANSFORMER.folder, release_folder.DIFFUSERS.ae.folder}
        return [
            str(PurePosixPath(file or "") / other)
            for other in below
            if other.endswith(FOLDER_FILES) and other.rpartition("/")[0] in folders
        ]
    file = file or _only_model(name, files)
    if file not in files:
        raise FileError(f"{name}: the repository has no file {file}")
    config = str(PurePosixPath(file).with_suffix("")) + "_config.json"
    return [file, config] if config in files else [file]


def text_to_image_files(files: list[str], layout: release_folder.Layout) -> list[str]:
    """Those of a text-to-image model among the files of a repository."""
    folders = {getattr(layout, part).folder for part in release_folder.PREFIXES}
    folders.add(layout.text_tokenizer)
    return [
        file for file in files if file.endswith(FOLDER_FILES) and file.rpartition("/")[0] in folders
    ]


def _only_model(name: str, files: list[str]) -> str:
    """The one file with tensors in a repository."""
    models = [file for file in files if file.endswith((".pt", ".safetensors"))]
    parents = {PurePosixPath(model).parent for model in models}
    folders = sorted(str(x.parent) for x in parents if x.name == release_folder.TRANSFORMER.folder)
    if folders:
        raise FileError(
            f"{name}: add one of its models, such as {name}/{folders[0]}: {', '.join(folders)}"
        )
    if not models:
        raise FileError(f"{name}: it has no .pt or .safetensors file")
    if len(models) > 1:
        raise FileError(
            f"{name}: add one of its files, such as {name}/{models[0]}: {', '.join(models)}"
        )
    return models[0]
