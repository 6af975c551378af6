"""A prompt tokenizer made from captions, for models that do not start from a language model."""

from collections.abc import Iterable

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from bitdance_jax.errors import ConfigError


TEMPLATE = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")


def train_tokenizer(
    captions: Iterable[str], *, vocab_size: int, num_resolutions: int, tokens_per_step: int
) -> str:
    """The content of tokenizer.json: a byte-level BPE and the added tokens behind it.

    The template of prompts counts as text too, so that its words become tokens.

    Args:
      captions: that the merges are learnt from; equal captions give equal files.
      vocab_size: of the byte-level BPE, without the added tokens; at least 256. What few captions
        leave of it are tokens that no text has.
      num_resolutions: `<|res_N|>` tokens, the longest side of an image in tokens.
      tokens_per_step: P; there are P - 1 `<|query_N|>` tokens.

    Raises:
      ConfigError: `vocab_size` is below 256, the number of bytes.
    """
    alphabet = ByteLevel.alphabet()
    if vocab_size < len(alphabet):
        raise ConfigError(
            f"vocab_size must be at least {len(alphabet)}, the number of bytes, got {vocab_size}",
            "vocab_size",
        )
    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False
    )
    texts = [f"user\n{caption}" for caption in captions]
    tokenizer.train_from_iterator([*texts, "assistant\n"], trainer)
    added = [f"<|unused_{n}|>" for n in range(tokenizer.get_vocab_size(), vocab_size)]
    added += TEMPLATE
    added += [f"<|res_{n}|>" for n in range(1, num_resolutions + 1)]
    added += [f"<|query_{n}|>" for n in range(1, tokens_per_step)]
    tokenizer.add_special_tokens(added)
    return tokenizer.to_str()
