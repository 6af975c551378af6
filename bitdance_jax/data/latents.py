"""Bits instead of pictures, so that the tokenizer need not run in every epoch: packed 8 to a byte, made once and kept in a file."""

import hashlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8
from tqdm import tqdm

from bitdance_jax.data.loader import BatchIterator, make_loader
from bitdance_jax.data.sources import ArraySource, PictureSource
from bitdance_jax.files import replacing
from bitdance_jax.sampling.pipeline import Tokenizer


BATCH = 64
PROBES = 8  # pictures that tell one source from another


def pack(codes: Int8[np.ndarray, "B h w K"]) -> UInt8[np.ndarray, "B h w bytes"]:
    """Codes in {-1, 1} as bits, the first the highest of its byte; a last byte that is not full ends in zeros."""
    return np.packbits(codes > 0, axis=-1)


def unpack(packed: UInt8[Array, "B h w bytes"], bits: int) -> Float[Array, "B h w K"]:
    """Inverse of `pack`, float32 in {-1, 1}."""
    places = jnp.unpackbits(packed, axis=-1)[..., :bits]
    return jnp.where(places > 0, 1.0, -1.0)


class EncodedBatches:
    """Batches of pictures with the tokenizer run on them: "codes" in place of "image". As resumable as the loader it reads."""

    def __init__(self, loader: BatchIterator, tokenizer: Tokenizer) -> None:
        self._loader, self._tokenizer = loader, tokenizer

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._loader)
        return {"codes": pack(self._tokenizer.encode(batch.pop("image"))), **batch}

    def get_state(self) -> dict[str, Any]:
        return self._loader.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._loader.set_state(state)


def cached_latents(path: Path, source: PictureSource, tokenizer: Tokenizer, image_size: int, flips: bool) -> ArraySource:
    """The bits of every picture's centre crop, and with `flips` of its mirror image as well, read from `path` or made and kept there.

    A file that another tokenizer, size or source made is made again.

    Returns:
      Records {"codes", "label"} and with `flips` "codes_flipped": uint8 [h, w, ceil(K / 8)].
    """
    key = _fingerprint(tokenizer, source, image_size, flips)
    arrays = _read(path, key)
    if arrays is None:
        arrays = _encode(source, tokenizer, image_size, flips)
        _write(path, {"fingerprint": np.array(key), **arrays})
    return ArraySource(arrays, source.class_names)


def _encode(source: PictureSource, tokenizer: Tokenizer, image_size: int, flips: bool) -> dict[str, np.ndarray]:
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("codes", "label", *(["codes_flipped"] if flips else []))}
    loader = make_loader(source, batch_size=BATCH, seed=0, image_size=image_size, shuffle=False, repeat=False)
    with tqdm(total=len(source), unit="image", desc="encoding", dynamic_ncols=True) as bar:
        for batch in loader:
            parts["label"].append(batch["label"])
            parts["codes"].append(pack(tokenizer.encode(batch["image"])))
            if flips:
                parts["codes_flipped"].append(pack(tokenizer.encode(batch["image"][:, :, ::-1])))
            bar.update(len(batch["label"]))
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def _fingerprint(tokenizer: Tokenizer, source: PictureSource, image_size: int, flips: bool) -> str:
    digest = hashlib.sha256(repr((tokenizer.config, source.class_names, len(source), image_size, flips)).encode())
    for leaf in jax.tree.leaves(tokenizer.params["encoder"]):
        digest.update(np.asarray(leaf).tobytes())
    for index in np.linspace(0, len(source) - 1, PROBES).astype(int).tolist():
        digest.update(source[index]["image"].tobytes())
    return digest.hexdigest()


def _read(path: Path, fingerprint: str) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (FileNotFoundError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return arrays if str(arrays.pop("fingerprint", "")) == fingerprint else None


def _write(path: Path, arrays: dict[str, Any]) -> None:
    with replacing(path, "the latents ") as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
