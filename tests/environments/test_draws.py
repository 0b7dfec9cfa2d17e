"""Draws from a distribution, and the numbers behind them.

Statistical tests compare with exact laws at a false alarm rate of 1e-6 each; keys are fixed, so that a test that
passes goes on passing.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import KEY, assert_law
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel_jax.environments import (
    trajectory_keys,
)
from bilevel_jax.environments.sampling import choose, pick, thresholds, two_numbers


@functools.partial(pytest.mark.parametrize, "dtype")([np.float32, np.float64])
def test_impossible_is_never_drawn_whatever_the_rounding(dtype):
    weights = np.asarray([0, 0.1, 0, 0.2, 0.3, 0.4 - 1e-7, 0, 0], dtype)
    edges = np.asarray([0, 1 - 2.0**-24, 0.1, 0.3, 0.6], np.float32)
    numbers = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(1))])
    drawn = choose(jnp.asarray(numbers[numbers < 1]), jnp.asarray(weights))
    assert (weights[np.asarray(drawn)] > 0).all()
    assert choose(jnp.float32(1 - 2.0**-24), jnp.asarray(weights)) == 5


def test_long_vectors_with_gaps_keep_their_order():
    """Sums in parallel round each entry in its own way; thresholds must not see it."""
    rng = np.random.default_rng(0)
    weights = (rng.uniform(size=5001) * (rng.uniform(size=5001) < 0.3)).astype(np.float32)
    table = np.asarray(thresholds(jnp.asarray(weights / weights.sum())))
    assert (np.diff(table[np.isfinite(table)]) >= 0).all()
    gaps = (weights[1:] == 0) & np.isfinite(table[1:])
    np.testing.assert_array_equal(table[1:][gaps], table[:-1][gaps])


vectors = st.lists(st.one_of(st.just(0.0), st.floats(1e-30, 1), st.floats(0.1, 1)), min_size=1, max_size=24).filter(
    lambda weights: sum(weights) > 0
)


@settings(max_examples=60, deadline=None)
@given(vectors, st.sampled_from([np.float32, np.float64]), st.sampled_from([0.0, -1e-7, 1e-7]))
def test_pick_inverts_the_distribution_function(weights, dtype, slip):
    weights = np.asarray(weights + [0.0] * (24 - len(weights)), dtype)  # one shape, one compilation
    if weights.sum() == 0:  # in float32
        return
    p = weights / weights.sum() * dtype(1 + slip)
    table = np.asarray(_thresholds(p))
    grid = np.sort(np.concatenate([np.arange(4096) / 4096, [1 - 2.0**-24, *table[(table > 0) & (table < 1)]]]))
    drawn = np.asarray(_pick(np.pad(grid, (0, 4200 - len(grid))).astype(np.float32), table))[: len(grid)]
    assert (p[drawn] > 0).all()
    assert (np.diff(drawn) >= 0).all()
    frequencies = np.bincount(drawn[np.isin(grid, np.arange(4096) / 4096)], minlength=24) / 4096
    np.testing.assert_allclose(frequencies, p / p.sum(), atol=24 / 4096)
    # The lengths of the intervals are the probabilities, to float32's digits.
    lengths = np.diff(np.clip(np.concatenate([[0.0], table]), 0, 1))
    np.testing.assert_allclose(lengths, p / p.sum(), atol=3e-7)


_thresholds = jax.jit(thresholds)
_pick = jax.jit(jax.vmap(pick, (0, None)))


def test_numbers_are_the_words_of_folded_keys():
    keys = jax.random.split(KEY, 300).reshape(3, 100)
    for step in (0, 1, 12345, 2**32 - 1):
        folded = jax.vmap(jax.vmap(lambda key, step=step: jax.random.fold_in(key, step)))(keys)
        words = np.asarray(jax.random.key_data(folded)) >> 8
        for made, word in zip(two_numbers(keys, jnp.uint32(step)), (words[..., 0], words[..., 1]), strict=True):
            assert made.dtype == jnp.float32
            np.testing.assert_array_equal(np.asarray(made) * 2**24, word)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_numbers_of_other_kinds_of_keys(kind):
    keys = trajectory_keys(jax.random.key(0, impl=kind), 4000)
    numbers = np.stack([np.stack(two_numbers(keys, step)) for step in (1, 2)])
    cells = (numbers * 3).astype(int).reshape(4, -1)
    assert_law(np.bincount(np.ravel_multi_index(tuple(cells), (3,) * 4), minlength=81), np.full(81, 1 / 81))
