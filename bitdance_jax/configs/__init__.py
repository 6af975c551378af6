"""The training configs that come with the package, by name: `bitdance train NAME`.

Each module has a `get_config`, as a user's own config file; its parameters are flags.
"""

from typing import Any


SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "emoji_tokenizer": ("emoji_tokenizer", {}),
    "emoji_4x": ("emoji_4x", {}),
    "emoji_t2i": ("emoji_t2i", {}),
    "emoji_edit": ("emoji_edit", {}),
    "imagenet": ("imagenet", {}),
    "imagenet_b_1x": ("imagenet", {"model": "b", "tokens_per_step": 1}),
    "imagenet_b_4x": ("imagenet", {"model": "b", "tokens_per_step": 4}),
    "imagenet_b_16x": ("imagenet", {"model": "b", "tokens_per_step": 16}),
    "imagenet_l_1x": ("imagenet", {"model": "l", "tokens_per_step": 1}),
    "imagenet_h_1x": ("imagenet", {"model": "h", "tokens_per_step": 1}),
    "text_to_image": ("text_to_image", {}),
    "t2i_14b_16x": ("text_to_image", {"model": "14b", "tokens_per_step": 16}),
    "t2i_14b_64x": ("text_to_image", {"model": "14b", "tokens_per_step": 64}),
    "t2i_8b_16x": ("text_to_image", {"model": "8b", "tokens_per_step": 16}),
    "t2i_4b_16x": ("text_to_image", {"model": "4b", "tokens_per_step": 16}),
    "t2i_1.7b_16x": ("text_to_image", {"model": "1.7b", "tokens_per_step": 16}),
    "t2i_0.6b_16x": ("text_to_image", {"model": "0.6b", "tokens_per_step": 16}),
    "tokenizer": ("tokenizer", {}),
    "tokenizer_d16c32": ("tokenizer", {"model": "d16c32"}),
    "tokenizer_d32c128": ("tokenizer", {"model": "d32c128"}),
    "tokenizer_d32c256": ("tokenizer", {"model": "d32c256"}),
}
"""The module in this folder, and the values of its parameters."""
