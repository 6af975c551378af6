"""Keys, shapes and random weights of latent diffusion's AutoencoderKL, as MAR's files have them."""

import numpy as np

from bitdance_jax.config import TokenizerConfig


TINY = TokenizerConfig(
    bits=3,
    ch=32,
    ch_mult=(1, 2),
    num_res_blocks=1,
    num_codebooks=1,
    latents="continuous",
    latent_scale=0.5,
    coarsest_attention="both",
)


def released_shapes(config: TokenizerConfig) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of latent diffusion's AutoencoderKL with attention at the coarsest level."""
    shapes = {}

    def layer(name, *shape):
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    def residual(name, inputs, outputs):
        layer(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        layer(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.nin_shortcut", outputs, inputs, 1, 1)

    def attention(name, width):
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    def middle(side, width):
        residual(f"{side}.mid.block_1", width, width)
        attention(f"{side}.mid.attn_1", width)
        residual(f"{side}.mid.block_2", width, width)

    widths = [config.ch * m for m in config.ch_mult]
    levels, last, numbers = len(widths), widths[-1], config.bits
    layer("encoder.conv_in", widths[0], 3, 3, 3)
    inputs = widths[0]
    for i, width in enumerate(widths):
        for j in range(config.num_res_blocks):
            residual(f"encoder.down.{i}.block.{j}", inputs, width)
            inputs = width
            if i == levels - 1 and config.coarsest_attention != "none":
                attention(f"encoder.down.{i}.attn.{j}", width)
        if i < levels - 1:
            layer(f"encoder.down.{i}.downsample.conv", width, width, 3, 3)
    middle("encoder", last)
    layer("encoder.norm_out", last)
    layer("encoder.conv_out", 2 * numbers, last, 3, 3)
    layer("quant_conv", 2 * numbers, 2 * numbers, 1, 1)
    layer("post_quant_conv", numbers, numbers, 1, 1)
    layer("decoder.conv_in", last, numbers, 3, 3)
    middle("decoder", last)
    for i in reversed(range(levels)):
        for j in range(config.num_res_blocks + 1):
            residual(f"decoder.up.{i}.block.{j}", inputs, widths[i])
            inputs = widths[i]
            if i == levels - 1 and config.coarsest_attention == "both":
                attention(f"decoder.up.{i}.attn.{j}", inputs)
        if i > 0:
            layer(f"decoder.up.{i}.upsample.conv", inputs, inputs, 3, 3)
    layer("decoder.norm_out", inputs)
    layer("decoder.conv_out", 3, inputs, 3, 3)
    return shapes


def released_state(config: TokenizerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        key: np.float32(
            rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
            if len(shape) > 1
            else 0.2 * rng.standard_normal(shape) + ("norm" in key and "weight" in key)
        )
        for key, shape in released_shapes(config).items()
    }
