"""Successor lists so long that their slots are summed in a loop: the same products and derivatives as unrolled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.core.reductions import LOOPED

STATES, ACTIONS, SLOTS = 2100, 4, 3


@pytest.fixture(scope="module", params=[np.float32, np.float64])
def kernel(request):
    assert STATES * ACTIONS > LOOPED
    rng = np.random.default_rng(0)
    weight = rng.random((SLOTS, STATES, ACTIONS)) + 0.1
    successor = rng.integers(STATES, size=weight.shape)
    return bj.SuccessorTransition(successor, (weight / weight.sum(0)).astype(request.param))


def test_products_and_derivatives_match_numpy(kernel):
    rng = np.random.default_rng(1)
    successor, probability = np.asarray(kernel.successor), np.asarray(kernel.probability, float)
    values, masses = rng.standard_normal(STATES), rng.standard_normal((STATES, ACTIONS))
    right = (probability * values[successor]).sum(0)
    tolerance = 20 * float(jnp.finfo(kernel.dtype).eps)
    given, cotangent = jnp.asarray(values, kernel.dtype), jnp.asarray(masses, kernel.dtype)

    @jax.jit
    def both(kernel, values, cotangent):
        out, pull = jax.vjp(
            lambda p, v: bj.SuccessorTransition(kernel.successor, p).expect(v), kernel.probability, values
        )
        return out, pull(cotangent)

    out, (in_probability, in_values) = both(kernel, given, cotangent)
    np.testing.assert_allclose(out, right, atol=10 * tolerance)
    np.testing.assert_allclose(in_probability, values[successor] * masses, atol=10 * tolerance)
    pushed = np.bincount(successor.reshape(-1), (probability * masses).reshape(-1), STATES)
    np.testing.assert_allclose(in_values, pushed, atol=50 * tolerance)

    batch = jnp.stack([given, -2 * given])
    mapped = jax.jit(jax.vmap(lambda v: kernel.expect(v)))(batch)
    np.testing.assert_allclose(mapped, np.stack([right, -2 * right]), atol=20 * tolerance)


def test_folded_transposed_products_match_numpy(kernel):
    rng = np.random.default_rng(2)
    successor, probability = np.asarray(kernel.successor), np.asarray(kernel.probability, float)
    weights, masses = rng.random((STATES, ACTIONS)), rng.standard_normal(STATES)
    flow = (probability * weights * masses[:, None]).reshape(-1)
    right = np.bincount(successor.reshape(-1), flow, STATES)
    listed = kernel.with_predecessors()

    @jax.jit
    def transposed(kernel, weights, masses):
        return kernel.under(weights).apply_transpose(masses)

    out = transposed(listed, jnp.asarray(weights, kernel.dtype), jnp.asarray(masses, kernel.dtype))
    np.testing.assert_allclose(out, right, atol=1000 * float(jnp.finfo(kernel.dtype).eps))
