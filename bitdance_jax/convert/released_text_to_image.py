"""Configs of released text-to-image models, from their tensors, configs and tokenizer files."""

from collections.abc import Mapping
from typing import Any

from bitdance_jax.config import (
    FlowHeadConfig,
    Qwen3Config,
    SamplerConfig,
    TextToImageConfig,
    TokenizerConfig,
)
from bitdance_jax.convert.keys import flow_head_config
from bitdance_jax.convert.released_configs import (
    Shapes,
    count,
    head_times,
    head_times_record,
    recorded,
    shape_of,
)
from bitdance_jax.errors import FileError, short
from bitdance_jax.text.prompt_tokenizer import PromptTokenizer


HEAD_DIM = 128
"""Size of the attention heads in the diffusion head of every released text-to-image model."""

SAMPLER = SamplerConfig(head_steps=50, guidance_scale=7.5, guidance_schedule="constant")
"""The sampler of the released models."""

Record = Mapping[str, Any]


def tokens_per_step(vision_head: Record) -> int | None:
    """P, if the head's config has it. Otherwise the prompt tokenizer determines it."""
    return recorded(vision_head, "parallel_num", 0) or None


def text_to_image_config(
    shapes: Shapes,
    *,
    text: Record,
    vision_head: Record,
    tokenizer: TokenizerConfig,
    prompts: PromptTokenizer,
) -> TextToImageConfig:
    """The config of a text-to-image model.

    Args:
      shapes: of the state dict without the tokenizer.
      text: the language model's config.json, for what shapes do not determine.
      vision_head: the head's config.
      tokenizer: config of its tokenizer.
      prompts: the prompt tokenizer.

    Raises:
      FileError: a tensor that determines the sizes is missing, the sizes are impossible, or the
        language model is not a Qwen3.
    """
    return TextToImageConfig(
        tokenizer=tokenizer,
        text=qwen3_config(shapes, text),
        head=_head(shapes, vision_head),
        image_tokens=prompts.image_tokens,
        tokens_per_step=prompts.tokens_per_step,
    )


def text_record(config: Qwen3Config) -> dict[str, Any]:
    """The language model's config.json in the release, whose output layer is not tied."""
    return {
        "attention_bias": False,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "model_type": "qwen3",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_base,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def vision_head_record(config: TextToImageConfig) -> dict[str, Any]:
    """The head's vision_head_config.json in the release."""
    head = flow_head_config(config.head)
    return {
        "ch_target": config.tokenizer.bits,
        "ch_cond": config.text.dim,
        "ch_latent": head.width,
        "depth_latent": head.num_blocks,
        "depth_adanln": head.num_groups,
        **head_times_record(head),
        "parallel_num": config.tokens_per_step,
        "use_swiglu": head.use_swiglu,
    }


def is_tied(record: Record) -> bool:
    """Whether the output layer of a language model is its embedding, as in the small ones."""
    return record.get("tie_word_embeddings") is True


def qwen3_config(shapes: Shapes, record: Record) -> Qwen3Config:
    """The config of a language model, alone or in a text-to-image model.

    Args:
      shapes: of its state dict.
      record: its config.json, for what shapes do not determine.

    Raises:
      FileError: see `text_to_image_config`.
    """
    # Later versions of Transformers write the rotary parameters into an object.
    rope = record.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    expected = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "rope_scaling": None,
        "use_sliding_window": False,
        "quantization_config": None,
    }
    odd = [
        f"{name} {record[name] if isinstance(record[name], str) else short(record[name])}"
        for name, value in expected.items()
        if record.get(name, value) != value
    ]
    if rope.get("rope_type", "default") != "default":
        odd.append(f"rope_type {short(rope['rope_type'])}")
    layers = record.get("layer_types")
    if isinstance(layers, list) and (others := set(map(str, layers)) - {"full_attention"}):
        odd.append(f"layer_types {short(sorted(others))}")
    if odd:
        raise FileError(
            f"the language model is not a plain Qwen3: its config.json has {', '.join(odd)}"
        )
    vocab_size, dim = shape_of(shapes, "model.embed_tokens.weight", 2)
    first = "model.layers.0."
    head_dim = shape_of(shapes, first + "self_attn.q_norm.weight", 1)[0]
    heads, kv_heads = (
        shape_of(shapes, f"{first}self_attn.{name}_proj.weight", 2)[0] // head_dim for name in "qk"
    )
    return Qwen3Config(
        num_layers=count(shapes, r"model\.layers\.(\d+)\..*"),
        dim=dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        hidden_dim=shape_of(shapes, first + "mlp.gate_proj.weight", 2)[0],
        vocab_size=vocab_size,
        rope_base=float(recorded(record, "rope_theta", recorded(rope, "rope_theta", 1e6))),
        norm_eps=float(recorded(record, "rms_norm_eps", 1e-6)),
    )


def _head(shapes: Shapes, record: Record) -> FlowHeadConfig:
    net = "vision_head.net."
    width = shape_of(shapes, net + "input_proj.weight", 2)[0]
    return FlowHeadConfig(
        width=width,
        num_blocks=count(shapes, r"vision_head\.net\.res_blocks\.(\d+)\..*"),
        num_groups=count(shapes, r"vision_head\.net\.ada_ln_blocks\.(\d+)\..*"),
        head_dim=HEAD_DIM,
        use_swiglu=shape_of(shapes, net + "res_blocks.0.w1.weight", 2)[0] == 2 * int(1.5 * width),
        squash_output=True,
        **head_times(record),
    )
