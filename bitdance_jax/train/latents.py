"""Training on tokens instead of images: they are made once and stored in the run's folder."""

from pathlib import Path

from bitdance_jax.data.records import ImageSource
from bitdance_jax.data.token_writer import describe, prepare, tokenize
from bitdance_jax.data.tokens import MANIFEST, Manifest, TokensSource, Versions
from bitdance_jax.distributed import multihost
from bitdance_jax.errors import UserError
from bitdance_jax.io.atomic import remove_temporary_files
from bitdance_jax.io.locks import writer_lock
from bitdance_jax.pipelines.tokenizer import Tokenizer


def cached_latents(
    folder: Path, source: ImageSource, tokenizer: Tokenizer, *, image_size: int, flips: bool
) -> TokensSource:
    """Tokens of the centre crop of every image, and with `flips` of its mirror image.

    They are read from `folder`, or made and stored there. Tokens of another tokenizer, size or
    source are replaced. Several processes share the folder and the work.

    Raises:
      UserError: the folder cannot be written to, or another job is writing to it.
    """
    manifest = describe(
        source,
        tokenizer.config,
        tokenizer.params,
        image_size=image_size,
        versions=Versions(flips=flips),
    )

    def begin() -> None:
        remove_temporary_files(folder, recursive=False)
        if (folder / MANIFEST).exists() and not _same(folder, manifest):
            for path in (folder / MANIFEST, *folder.glob("tokens-*.array_record")):
                path.unlink()
        prepare(folder, manifest)

    with multihost.entered_on_process_0(writer_lock(folder, is_folder=True)):
        multihost.on_process_0(begin)
        tokenize(source, tokenizer.params, folder=folder, manifest=manifest)
        multihost.all_true(True)  # Waits for the others' shards.
    return TokensSource(folder)


def _same(folder: Path, manifest: Manifest) -> bool:
    try:
        return Manifest.read(folder) == manifest
    except UserError:
        return False
