"""The models of tests/golden as configs and parameters, and comparisons with recorded arrays."""

import functools
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.typing import ArrayLike

from bitdance_jax.config import (
    ClassConditionalConfig,
    FlowHeadConfig,
    ImageTokens,
    Qwen3Config,
    TextToImageConfig,
    TokenizerConfig,
    TransformerConfig,
)
from bitdance_jax.convert import keys
from bitdance_jax.heads import dit


GOLDEN = Path(__file__).parent / "golden"
TEXT_TO_IMAGE = ("t2i_4x", "t2i_16x")
CLASS_CONDITIONAL = ("imagenet_1x", "imagenet_4x", "imagenet_16x", "imagenet_4x_token_raster")


class Tokenizer(NamedTuple):
    config: TokenizerConfig
    params: dict[str, Any]


class ClassConditionalModel(NamedTuple):
    """A toy class-conditional model without its tokenizer.

    Attributes:
      config: of the model.
      params: unrolled.
      table: the key table, for further tensors with the release's keys.
    """

    config: ClassConditionalConfig
    params: dict[str, Any]
    table: keys.Table


class TextToImageModel(NamedTuple):
    """A toy text-to-image model without its tokenizer.

    Attributes:
      config: of the model.
      params: unrolled.
      prompt: the recorded prompt (`prompt.json`).
    """

    config: TextToImageConfig
    params: dict[str, Any]
    prompt: dict[str, Any]


def read(name: str) -> dict[str, np.ndarray]:
    """The tensors of tests/golden/{name}.safetensors or .safetensors.xz; bfloat16 as float32."""
    path = GOLDEN / f"{name}.safetensors"
    packed = path.with_name(path.name + ".xz")
    if packed.exists():
        with tempfile.NamedTemporaryFile() as file:  # safetensors reads bfloat16 only from files
            file.write(_decompress(packed))
            file.flush()
            tensors = safetensors.numpy.load_file(file.name)
    else:
        tensors = safetensors.numpy.load_file(path)
    return {
        key: value.astype(np.float32) if value.dtype.name == "bfloat16" else value
        for key, value in tensors.items()
    }


@functools.cache
def tokenizer(name: str) -> Tokenizer:
    """The toy tokenizer in "tokenizer" or "tokenizer_gan" (without its encoder)."""
    return Tokenizer(
        _tokenizer_config(_recorded_config(name)),
        keys.convert(read(f"{name}/weights"), keys.CNN_TOKENIZER),
    )


@functools.cache
def class_conditional(name: str) -> ClassConditionalModel:
    """One of the models in CLASS_CONDITIONAL."""
    recorded = _recorded_config(name)
    config = ClassConditionalConfig(
        tokenizer=_tokenizer_config(recorded),
        transformer=TransformerConfig(
            num_layers=recorded["n_layer"], dim=recorded["dim"], num_heads=recorded["n_head"]
        ),
        head=FlowHeadConfig(
            width=recorded["diff_dim"],
            num_blocks=recorded["diff_layers"],
            num_groups=recorded["diff_adanln_layers"],
            time_mean=recorded["P_mean"],
            time_std=recorded["P_std"],
        ),
        num_classes=recorded["num_classes"],
        image_size=recorded["resolution"],
        tokens_per_step=recorded.get("parallel_num", 1),
        class_tokens=recorded["cls_token_num"],
        order="token" if recorded.get("parallel_mode") == "standard" else "patch",
        bit_flip_rate=recorded["perturb_rate"],
        label_drop_rate=recorded["class_dropout_prob"],
        head_repeats=recorded["diff_batch_mul"],
    )
    table = keys.class_conditional(config)
    weights = read(
        "imagenet_4x/weights" if name == "imagenet_4x_token_raster" else f"{name}/weights"
    )
    return ClassConditionalModel(config, keys.convert(weights, table), table)


@functools.cache
def text_to_image(name: str) -> TextToImageModel:
    """One of the models in TEXT_TO_IMAGE."""
    text, head = (
        json.loads((GOLDEN / name / "model" / file).read_text())
        for file in ("config.json", "vision_head_config.json")
    )
    added = json.loads((GOLDEN / name / "model" / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    config = TextToImageConfig(
        tokenizer=tokenizer("tokenizer").config,
        text=Qwen3Config(
            num_layers=text["num_hidden_layers"],
            dim=text["hidden_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text["head_dim"],
            hidden_dim=text["intermediate_size"],
            vocab_size=text["vocab_size"],
        ),
        head=FlowHeadConfig(
            width=head["ch_latent"],
            num_blocks=head["depth_latent"],
            num_groups=head["depth_adanln"],
            head_dim=128,
            squash_output=True,
            time_mean=head["P_mean"],
            time_std=head["P_std"],
        ),
        image_tokens=ImageTokens(
            vision_start=ids["<|vision_start|>"],
            first_resolution=ids["<|res_1|>"],
            num_resolutions=sum(token.startswith("<|res_") for token in ids),
            first_query=ids["<|query_1|>"],
        ),
        tokens_per_step=head["parallel_num"],
    )
    state: dict[str, np.ndarray] = {}
    for shard in (1, 2, 3):
        state |= read(f"{name}/model/model-0000{shard}-of-00003")
    for part in ("vision_head", "projector"):  # the same in both models
        state |= {f"{part}.{key}": array for key, array in read(f"t2i_4x/model/{part}").items()}
    prompt = json.loads((GOLDEN / name / "prompt.json").read_text())
    return TextToImageModel(config, keys.convert(state, keys.text_to_image(config)), prompt)


def release_folder(name: str, target: Path) -> Path:
    """Writes one of TEXT_TO_IMAGE as a released folder.

    In the repository, files that models share are stored once, and compressed.
    """
    target.mkdir()
    (target / "ae.safetensors").write_bytes(
        _decompress(GOLDEN / "tokenizer" / "weights.safetensors.xz")
    )
    for file in [*(GOLDEN / "t2i_4x" / "model").glob("*.xz"), *(GOLDEN / name / "model").iterdir()]:
        if file.suffix == ".xz":
            (target / file.stem).write_bytes(_decompress(file))
        else:
            (target / file.name).write_bytes(file.read_bytes())
    return target


def manifest() -> dict[str, dict[str, list[int]]]:
    """Every key and shape of the official full-size state dicts."""
    return json.loads((GOLDEN / "manifest.json").read_text())


@functools.cache
def time_frequencies() -> np.ndarray:
    """The time frequencies of the recordings, float32 [128].

    They are `dit.TIME_FREQUENCIES` or adjacent numbers, because `exp` differs between machines. The
    recorded features of five times determine which.
    """
    pieces = read("pieces/pieces")
    ours = dit.TIME_FREQUENCIES
    recorded = np.split(pieces["timestep_embedding.out"], 2, axis=-1)
    candidates = np.stack(
        [ours, np.nextafter(ours, np.float32(0)), np.nextafter(ours, np.float32(1))]
    )
    angles = (np.float32(1000) * pieces["timestep_embedding.t"])[:, None, None] * candidates
    errors = sum(
        np.abs(f(angles.astype(np.float64)) - part[:, None]).max(0)
        for f, part in zip((np.cos, np.sin), recorded, strict=True)
    )
    return np.take_along_axis(candidates, np.argmin(errors.round(6), axis=0)[None], axis=0)[0]


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x.transpose(0, 2, 3, 1))


def largest_error(actual: ArrayLike, desired: ArrayLike) -> float:
    """The largest difference, relative to the largest desired value."""
    actual = np.asarray(actual)
    desired = np.asarray(desired)
    assert actual.shape == desired.shape
    return float(np.max(np.abs(actual - desired)) / np.max(np.abs(desired)))


def assert_close(actual: ArrayLike, desired: ArrayLike, tolerance: float = 1e-4) -> None:
    error = largest_error(actual, desired)
    assert error <= tolerance, (
        f"differs by {error:.2e} of the largest value, more than {tolerance:.0e}"
    )


def perturb(arrays: dict[str, Any], seed: int) -> dict[str, Any]:
    """Changes every value to the next float32 above or below, at random."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: np.nextafter(a, rng.choice(np.array([-np.inf, np.inf], np.float32), a.shape)),
        arrays,
    )


def _decompress(path: Path) -> bytes:
    return lzma.decompress(path.read_bytes())


def _recorded_config(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "config.json").read_text())


def _tokenizer_config(recorded: dict[str, Any]) -> TokenizerConfig:
    sizes = recorded["ddconfig"]
    return TokenizerConfig(
        bits=sizes["z_channels"],
        ch=sizes["ch"],
        ch_mult=tuple(sizes["ch_mult"]),
        num_res_blocks=sizes["num_res_blocks"],
        image_channels=sizes["in_channels"],
        decoder="gan" if recorded.get("gan_decoder") else "plain",
        num_codebooks=recorded.get("num_codebooks", 1),
    )
