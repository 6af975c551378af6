"""The training configs that come with the package, by name: `bitdance train NAME`.

Each module has a `get_config`, as a user's own config file; its parameters are flags.
"""

from typing import Any


SHIPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "emoji_tokenizer": ("emoji_tokenizer", {}),
    "emoji_4x": ("emoji_4x", {}),
    "fluent_tokenizer": ("fluent_tokenizer", {}),
    "imagenet": ("imagenet", {}),
    "imagenet_b_1x": ("imagenet", {"model": "b", "tokens_per_step": 1}),
    "imagenet_b_4x": ("imagenet", {"model": "b", "tokens_per_step": 4}),
    "imagenet_b_16x": ("imagenet", {"model": "b", "tokens_per_step": 16}),
    "imagenet_l_1x": ("imagenet", {"model": "l", "tokens_per_step": 1}),
    "imagenet_h_1x": ("imagenet", {"model": "h", "tokens_per_step": 1}),
    "tokenizer": ("tokenizer", {}),
    "tokenizer_d16c32": ("tokenizer", {"model": "d16c32"}),
    "tokenizer_d32c128": ("tokenizer", {"model": "d32c128"}),
    "tokenizer_d32c256": ("tokenizer", {"model": "d32c256"}),
}
"""The module in this folder, and the values of its parameters."""
