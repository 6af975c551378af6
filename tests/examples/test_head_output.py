"""examples/head_output.py: what it counts, and the figure."""

import numpy as np
import pytest
import tiny_models
from example_files import load_example

from bitdance_jax import ClassConditionalPipeline, Tokenizer
from bitdance_jax.config import SamplerConfig
from bitdance_jax.config.sampler import SOLVERS


@pytest.fixture(scope="module")
def model():
    tokenizer = Tokenizer(tiny_models.TOKENIZER, tiny_models.tokenizer_params())
    return ClassConditionalPipeline(tiny_models.MODEL, tiny_models.model_params(), tokenizer)


def test_predictions_of_every_evaluation_are_counted(model):
    example = load_example("head_output")
    sampler = SamplerConfig(solver="euler", head_steps=3)
    histograms = example.record(model, [0, 1], sampler, seed=0, images_per_input=2)
    bits = 4 * model.config.num_tokens * model.config.tokenizer.bits
    np.testing.assert_array_equal(histograms.counts.sum(axis=1), [bits] * 3)
    np.testing.assert_allclose(histograms.times, [0, 1 / 3, 2 / 3], atol=1e-6)
    assert "recording" not in SOLVERS

    # The last step of Euler's method lands on the last prediction, whose sign is the bit.
    codes = model.sample(
        [0, 1], seed=0, images_per_input=2, sampler=sampler, output="codes", progress=False
    )
    positive = histograms.counts[-1, example.BINS // 2 :].sum()
    assert abs(positive - (codes > 0).sum()) <= 2  # a value within rounding of 0

    figure = example.figure(histograms, "toy")
    assert figure.ndim == 3 and (figure != 255).any()
