"""The minimal number of floating-point operations of the sampler, counting matrix products only."""

from typing import Any

import jax

from bitdance_jax.config import ClassConditionalConfig, FlowHeadConfig, SamplerConfig
from bitdance_jax.sampling.solvers import make_solver


def minimal_sampler_flops(
    config: ClassConditionalConfig, sampler: SamplerConfig, batch: int
) -> int:
    """Operations to sample the codes of `batch` images, counted by hand; a multiply-add is two.

    Every input token passes every layer once and attends to the tokens that it may see. For those
    before the first block, the last layer computes only keys and values. The head runs for every
    token at every evaluation, its time embedding once for each time, and the embedding of its
    condition once for each token.
    """
    rows = batch * (2 if sampler.guidance_scale != 1 else 1)
    bits = config.tokenizer.bits
    patch = config.tokens_per_step
    tokens = config.num_tokens
    evaluations = make_solver(sampler, config.head.time_shift).num_evaluations

    dim = config.transformer.dim
    hidden = config.transformer.hidden_dim
    layers = config.transformer.num_layers
    prefix = config.class_tokens + patch - 1
    visual = tokens - patch
    weights = layers * (4 * dim * dim + 3 * dim * hidden)
    plain = config.class_tokens - 1
    first_block = plain + patch
    seen = (
        plain * (plain + 1) // 2
        + patch * first_block
        + sum(patch * (first_block + start + patch) for start in range(0, visual, patch))
    )
    last = plain * (2 * dim * dim + 3 * dim * hidden) + plain * (plain + 1) // 2 * 2 * dim
    transformer = (
        (prefix + visual) * weights
        - last
        + visual * (bits * 3 * dim + 1.5 * dim * dim)
        + layers * 2 * dim * seen
    )

    assert isinstance(config.head, FlowHeadConfig)
    width = config.head.width
    blocks = config.head.num_blocks
    groups = config.head.num_groups
    block = 3 * 1.5 * width * width + (4 * width * width + 2 * width * patch if patch > 1 else 0)
    vectors = 6 if patch > 1 else 3
    evaluation = blocks * block + (groups * vectors + 2) * width * width + 2 * bits * width
    head = tokens * (evaluations * evaluation + dim * width)
    times = evaluations * (256 * width + width * width)
    return int(2 * (rows * (transformer + head) + times))


def sampler_weight_bytes(params: Any, patches: int, evaluations: int) -> int:
    """Bytes of weights that are read for a batch: the head's at every evaluation of every patch,
    the others once for each patch."""
    sizes = {
        name: sum(leaf.nbytes for leaf in jax.tree.leaves(part)) for name, part in params.items()
    }
    head = sizes.pop("head")
    return patches * (sum(sizes.values()) + evaluations * head)
