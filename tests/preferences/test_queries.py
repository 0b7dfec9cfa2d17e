"""Which pairs are asked about, and when: against plain loops and counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import bilevel_jax as bj
from bilevel_jax import preferences as pf


@pytest.mark.parametrize(("segments", "count"), [(2, 1), (6, 15), (6, 4), (3000, 20), (400, 4000)])
def test_uniform_pairs_are_different_pairs_of_different_segments(segments, count):
    pairs = np.asarray(jax.jit(lambda key: pf.uniform_pairs(key, segments, count))(jax.random.key(0)))
    assert pairs.shape == (count, 2)
    assert pairs.min() >= 0
    assert pairs.max() < segments
    assert (pairs[:, 0] != pairs[:, 1]).all()
    assert len({frozenset(pair) for pair in pairs.tolist()}) == count


@pytest.mark.parametrize("by_list", [True, False])
def test_uniform_pairs_are_uniform(by_list):
    """Chi-square over all ordered pairs at a level of 1e-5; 90,000 draws would show a pair drawn twice as often."""
    if by_list:
        draw, segments = (lambda key: pf.uniform_pairs(key, 5, 3)), 5
    else:
        # The way for very many segments, with few of them.
        draw, segments = (lambda key: jnp.stack(pf.queries._by_rejection(key, 5, 3), -1)), 5
    pairs = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(1), 30_000))).reshape(-1, 2)
    _, counts = np.unique(pairs @ [segments, 1], return_counts=True)
    assert len(counts) == segments * (segments - 1) // (1 if by_list else 2)
    assert stats.chisquare(counts).pvalue > 1e-5


def test_near_on_policy_pairs_are_of_the_newest_segments():
    iteration = jnp.asarray([3, 1, 3, 2, 2, 2, 0, 3])
    draw = jax.vmap(lambda key: pf.near_on_policy_pairs(key, iteration, 4, newest=4))
    pairs = np.asarray(draw(jax.random.split(jax.random.key(0), 300)))
    assert set(pairs.reshape(-1).tolist()) == {0, 2, 7, 3, 4, 5}
    for drawn in pairs:
        assert len(set(drawn.reshape(-1).tolist()) & {3, 4, 5}) <= 1  # one of the three fits, and the key says which


def test_disagreement_is_the_spread_of_the_probabilities():
    gain = np.random.default_rng(0).normal(size=(5, 9))
    np.testing.assert_allclose(pf.disagreement(gain), np.std(1 / (1 + np.exp(-gain)), axis=0), rtol=1e-13)


def test_select_takes_the_highest_and_the_key_breaks_ties():
    scores = jnp.asarray([0.5, jnp.nan, 2.0, 0.5, 0.5, -1.0, 0.5])
    chosen = np.asarray(jax.vmap(lambda key: pf.select(key, scores, 3))(jax.random.split(jax.random.key(0), 4000)))
    assert (chosen[:, 0] == 2).all()
    _, counts = np.unique(chosen[:, 1], return_counts=True)
    assert len(counts) == 4
    assert stats.chisquare(counts).pvalue > 1e-5  # 4,000 draws would show one that comes half as often again
    assert pf.select(jax.random.key(0), scores, 7).tolist()[-1] == 1
    key = jax.random.key(9)
    assert pf.select(key, scores, 3).tolist() == pf.select(key, scores, 3).tolist()
    by_disagreement = pf.select(key, pf.disagreement(jnp.array([[9.0, 1.0, 9.0], [9.0, -1.0, -9.0]])), 2)
    assert by_disagreement.tolist() == [2, 1]


# When.


@pytest.mark.parametrize("schedule", ["constant", "decaying", "at_once"])
def test_budgets_are_spent_exactly(schedule):
    for total, iterations, initial, scale in (
        (100, 7, 0, 1),
        (3, 9, 1, 4.5),
        (0, 3, 0, 1),
        (5000, 83, 500, 20),
        (7, 1, 7, 1),
    ):
        counts = pf.label_counts(total, iterations, schedule, initial=initial, scale=scale)
        assert len(counts) == iterations
        assert sum(counts) == total
        assert min(counts) >= 0
        rates = {
            "constant": np.ones(iterations),
            "decaying": np.array([1 / (1 + t / scale) for t in range(iterations)]),
            "at_once": np.eye(iterations)[0],
        }[schedule]
        want = rates / rates.sum() * (total - initial) + initial * np.eye(iterations)[0]
        assert np.abs(np.array(counts) - want).max() < 1 + 1e-9
        assert all(type(count) is int for count in counts)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda key: pf.uniform_pairs(key, 1, 1), "segments: expected an integer of at least 2"),
        (lambda key: pf.uniform_pairs(key, 4, 7), "count: there are 6 pairs of 4 segments, got 7"),
        (lambda key: pf.near_on_policy_pairs(key, [0, 1], 1, newest=3), "newest: there are 2 segments, got 3"),
        (lambda key: pf.select(key, [1.0, 2.0], 3), "count: there are 2 candidates, got 3"),
        (lambda key: pf.disagreement([1.0]), r"gain: expected \[members, candidates\]"),
        (lambda key: pf.label_counts(10, 4, "often"), "schedule: expected constant, decaying or at_once"),
        (lambda key: pf.label_counts(10, 4, initial=11), "initial: expected at most the total of 10"),
        (lambda key: pf.label_counts(10, 4, scale=0), "scale must be above 0"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(bj.InputError, match=message):
        call(jax.random.key(0))
