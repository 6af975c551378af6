import itertools

import golden_models
import jax
import jax.numpy as jnp
import jaxprs
import numpy as np
import pytest
from golden_models import assert_close, nhwc

from bitdance_jax.tokenizer import lfq


def brute_force_entropies(
    z: np.ndarray, num_codebooks: int, temperature: float
) -> tuple[float, float]:
    """The definition: a softmax over all 2^k codes of every group, in float64."""
    groups = z.astype(np.float64).reshape(-1, z.shape[-1] // num_codebooks)
    codes = np.array(list(itertools.product([-1.0, 1.0], repeat=groups.shape[1])))
    logits = 2 * groups @ codes.T / temperature
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    mean = p.mean(axis=0)
    return float(-(p * log_p).sum(axis=1).mean()), float(-(mean * np.log(mean + 1e-5)).sum())


entropy_terms = jax.jit(lfq.entropy_terms, static_argnums=(1, 2))


def test_golden_loss_and_gradient():
    golden = golden_models.read("tokenizer/quantizer_loss")

    @jax.jit
    def terms(z):
        per_sample, codebook = lfq.entropy_terms(z, num_codebooks=2)
        return per_sample - codebook + lfq.commitment(z), (per_sample, codebook, lfq.commitment(z))

    gradient, (per_sample, codebook, commitment) = jax.grad(terms, has_aux=True)(
        jnp.asarray(nhwc(golden["pre_quant"]))
    )
    np.testing.assert_allclose(per_sample, golden["per_sample_entropy"], rtol=1e-4)
    np.testing.assert_allclose(codebook, golden["codebook_entropy"], rtol=1e-4)
    np.testing.assert_allclose(per_sample - codebook, golden["entropy_aux"], rtol=1e-4)
    np.testing.assert_allclose(commitment, golden["commitment"], rtol=1e-4)
    assert_close(gradient, nhwc(golden["grad_pre_quant"]))


def test_golden_indices():
    io = golden_models.read("tokenizer/io")
    codes = jnp.asarray(nhwc(io["codes"]))
    indices = lfq.codes_to_indices(codes, num_codebooks=2)
    for group in range(2):
        np.testing.assert_array_equal(indices[..., group].reshape(-1), io[f"group_index_{group}"])
    np.testing.assert_array_equal(lfq.indices_to_codes(indices, bits=8), codes)


@pytest.mark.parametrize(("bits", "num_codebooks"), [(8, 1), (12, 3), (31, 1), (256, 32)])
def test_indices_round_trip(bits, num_codebooks):
    codes = lfq.quantize(jax.random.normal(jax.random.key(bits), (3, 5, bits)))
    indices = lfq.codes_to_indices(codes, num_codebooks)
    assert indices.shape == (3, 5, num_codebooks)
    assert indices.min() >= 0
    np.testing.assert_array_equal(lfq.indices_to_codes(indices, bits), codes)


def test_every_index_has_its_own_code():
    indices = jnp.arange(2**6)[:, None]
    codes = lfq.indices_to_codes(indices, bits=6)
    assert len(np.unique(codes, axis=0)) == 2**6
    np.testing.assert_array_equal(lfq.codes_to_indices(codes, 1), indices)


def test_groups_too_large_for_an_index():
    with pytest.raises(ValueError, match="32 bits has no int32 index"):
        lfq.codes_to_indices(jnp.ones((1, 32)), num_codebooks=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantize(dtype):
    z = jnp.array([-2.0, -0.0, 0.0, 1e-30, 3.0], dtype)
    codes = lfq.quantize(z)
    np.testing.assert_array_equal(codes, [-1, -1, -1, 1, 1])
    assert codes.dtype == dtype


def test_straight_through():
    z = jax.random.normal(jax.random.key(0), (2, 4, 3)).at[0].set(0.0)
    weights = jax.random.normal(jax.random.key(1), (4, 3))
    np.testing.assert_allclose(lfq.quantize_straight_through(z), lfq.quantize(z), atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(weights * lfq.quantize_straight_through(z)))(z)
    np.testing.assert_array_equal(gradient, jnp.broadcast_to(weights, z.shape))


def test_commitment_holds_the_code_constant():
    z = jnp.array([[0.25, -3.0], [2.0, -0.5]])
    value, gradient = jax.value_and_grad(lfq.commitment)(z)
    np.testing.assert_allclose(value, np.mean([0.75**2, 2**2, 1, 0.5**2]), rtol=1e-6)
    np.testing.assert_allclose(gradient, 2 * np.array([[-0.75, -2.0], [1.0, 0.5]]) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("bits", "num_codebooks", "temperature"), [(1, 1, 0.01), (5, 1, 0.01), (6, 2, 1.0), (4, 4, 0.1)]
)
def test_entropies_against_brute_force(bits, num_codebooks, temperature):
    # Near the temperature, so that bits are neither certain nor uniform.
    z = 0.3 * temperature * jax.random.normal(jax.random.key(bits), (2, 3, 4, bits))
    per_sample, codebook = entropy_terms(z, num_codebooks, temperature)
    np.testing.assert_allclose(
        (per_sample, codebook),
        brute_force_entropies(np.asarray(z), num_codebooks, temperature),
        rtol=1e-5,
    )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_entropies_of_confident_bits(scale):
    """Far from zero a softmax underflows; entropies and gradients stay finite and correct."""
    z = scale * jax.random.normal(jax.random.key(0), (20, 4))
    per_sample, codebook = entropy_terms(z, 2)
    expected = brute_force_entropies(np.asarray(z), 2, 0.01)
    np.testing.assert_allclose((per_sample, codebook), expected, rtol=1e-5, atol=1e-6)
    assert np.all(np.isfinite(jax.grad(lambda z: jnp.subtract(*entropy_terms(z, 2)))(z)))


@pytest.mark.parametrize(("bits", "group_bits"), [(256, 8), (16, 16)])
def test_many_bits_without_a_table_of_all_probabilities(bits, group_bits):
    """No array of size tokens x 2^k; N certain and different codes have the entropy log N."""
    num_codebooks = bits // group_bits
    positions = 64
    samples = positions * num_codebooks
    z = jnp.sign(jax.random.normal(jax.random.key(0), (1, 8, positions // 8, bits)))

    def loss(z):
        per_sample, codebook = lfq.entropy_terms(z, num_codebooks)
        return per_sample - codebook, (per_sample, codebook)

    gradient = jax.value_and_grad(loss, has_aux=True)
    assert jaxprs.largest_intermediate(jax.make_jaxpr(gradient)(z)) < samples * 2**group_bits
    (_, (per_sample, codebook)), slope = jax.jit(gradient)(z)
    share = np.unique(lfq.codes_to_indices(z, num_codebooks), return_counts=True)[1] / samples
    np.testing.assert_allclose(codebook, -np.sum(share * np.log(share + 1e-5)), rtol=1e-4)
    np.testing.assert_allclose(per_sample, 0, atol=1e-6)
    assert np.all(np.isfinite(slope))
