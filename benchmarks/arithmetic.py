"""The fewest floating-point operations that the sampler needs: products only, 2 for each multiply-add."""

from bitdance_jax.config import ClassConditionalConfig, FlowHeadConfig, SamplerConfig
from bitdance_jax.sampling.solvers import make_solver


def minimal_sampler_flops(
    config: ClassConditionalConfig, sampler: SamplerConfig, batch: int
) -> int:
    """Products that drawing `batch` images' codes cannot do without, counted by hand.

    Every input token goes through every layer once and attends to just what it may see, but of those before the first block the last layer
    needs keys and values alone; the head runs for every token at every evaluation,
    its time embedding once for each time, its condition's once for each token.
    """
    rows = batch * (2 if sampler.guidance_scale != 1 else 1)
    bits, patch, tokens = config.tokenizer.bits, config.tokens_per_step, config.num_tokens
    evaluations = make_solver(sampler, config.head.time_shift).num_evaluations

    dim, hidden, layers = (
        config.transformer.dim,
        config.transformer.hidden_dim,
        config.transformer.num_layers,
    )
    prefix, visual = config.class_tokens + patch - 1, tokens - patch
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
    width, blocks, groups = config.head.width, config.head.num_blocks, config.head.num_groups
    block = 3 * 1.5 * width * width + (4 * width * width + 2 * width * patch if patch > 1 else 0)
    vectors = 6 if patch > 1 else 3
    evaluation = blocks * block + (groups * vectors + 2) * width * width + 2 * bits * width
    head = tokens * (evaluations * evaluation + dim * width)
    times = evaluations * (256 * width + width * width)
    return int(2 * (rows * (transformer + head) + times))
