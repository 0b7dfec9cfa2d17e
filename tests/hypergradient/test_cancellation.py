"""`error` where large numbers cancel on the way to a small gradient. The references are float64, or closed forms."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

import bilevel_jax as bj

DTYPES = [np.float32, np.float64]


def rows_that_differ_by(delta, discount, dtype, seed):
    """Two actions of state 0 whose rows differ by delta; the reward of state 2 is x, and states 1 and 2 absorb."""
    rng = np.random.default_rng(seed)
    row = rng.dirichlet(np.ones(3))
    moved = row + delta * np.array([0.0, -1.0, 1.0])
    transition = np.zeros((3, 2, 3))
    transition[0], transition[1, :, 1], transition[2, :, 2] = [row, moved], 1, 1
    transition = transition.astype(np.float32).astype(np.float64)
    transition[0, :, 0] = 1 - transition[0, :, 1:].sum(-1)

    def process(x):
        reward = jnp.zeros((3, 2), dtype).at[2].set(x).at[1, 0].set(dtype(0.3))
        return bj.MDP(jnp.asarray(transition, dtype), reward, dtype(discount))

    return process


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("objective", ["policy", "difference of values"])
@pytest.mark.parametrize(("delta", "discount"), [(1e-4, 0.5), (1e-5, 0.7), (1e-3, 0.99)])
def test_successors_of_the_actions_that_are_nearly_the_same(delta, discount, objective):
    """df/dV is a small difference of large sums: each product is rounded, and no part of the gradient shows it."""
    for seed in range(3):
        made = {}
        for dtype in DTYPES:
            process = rows_that_differ_by(delta, discount, dtype, seed)

            def of(x, s):
                del x
                return s.policy[0, 0] if objective == "policy" else s.q[0, 1] - s.q[0, 0]

            problem = bj.BilevelProblem(process, bj.ShannonEntropy(dtype(3)), of)
            made[dtype] = bj.check(bj.hypergradient(problem, dtype(0.7)))
        want = float(made[np.float64].gradient)
        off = abs(float(made[np.float32].gradient) - want)
        assert off <= float(made[np.float32].error) < 0.3 * abs(want) * max(1, 1e-5 / delta / (1 - discount))


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("regularizer", ["none", "tsallis"])
@pytest.mark.parametrize(("left", "depth"), [(0.01, 1), (0.01, 2), (1e-3, 1)])
def test_a_value_that_is_left_of_large_numbers(left, depth, regularizer):
    """A corridor: hundreds at its end, and a reward that takes nearly all away. x is the discount at its start."""
    end = depth + 1
    for seed in range(3):
        large = 300 + 100 * np.random.default_rng(seed).random()

        def process(x, dtype, large=large):
            transition = np.zeros((end + 1, 1, end + 1), dtype)
            for s in range(end):
                transition[s, 0, s + 1] = 1
            transition[end, 0, end] = 1
            reward = np.zeros((end + 1, 1), np.float32)  # the same numbers in both types
            reward[end] = large / 2  # its value is twice that at discount 1/2
            reward[end - 1] = np.float32(left) - reward[end]
            reward = reward.astype(dtype)
            discount = jnp.full((end + 1, 1), dtype(0.5)).at[0].set(x).at[end - 1].set(dtype(0.5))
            return bj.MDP(transition, reward, discount)

        made = {}
        for dtype in DTYPES:
            kind = bj.Unregularized() if regularizer == "none" else bj.TsallisEntropy(dtype(0.5))
            problem = bj.BilevelProblem(lambda x, dtype=dtype: process(x, dtype), kind, lambda x, s: s.value[0])
            made[dtype] = bj.check(bj.hypergradient(problem, dtype(0.375)))
        off = abs(float(made[np.float32].gradient) - float(made[np.float64].gradient))
        assert off <= float(made[np.float32].error)


@pytest.mark.few(1)
@pytest.mark.parametrize("gap", [51.0, 63.0, 201.0, 211.0])
def test_the_exponent_of_a_rare_action(gap):
    """exp(-500) has the rounding of the number 500, which is no part of V."""
    process = bj.BilevelProblem(
        lambda x: bj.MDP(np.ones((1, 2, 1)), jnp.stack([0 * x, -x])[None], 0.0),
        bj.ShannonEntropy(0.37),
        lambda x, s: s.policy[0, 1],
    )
    with mpmath.workdps(60):
        weight = mpmath.exp(-mpmath.mpf(gap) / mpmath.mpf(0.37))
        want = -weight / (1 + weight) ** 2 / mpmath.mpf(0.37)
        made = bj.check(bj.hypergradient(process, gap))
        off = abs(mpmath.mpf(float(made.gradient)) - want)
        assert off <= float(made.error) < 1e-11 * abs(want)


@jax.jit
def of_the_start(x):
    """A walk with a small drift to a goal."""
    size, drift = 30, jnp.asarray([0.01, -0.01], x.dtype)
    up, down = 0.5 + drift, 0.5 - drift
    at = jnp.arange(size)
    transition = jnp.zeros((size, 2, size), x.dtype)
    transition = transition.at[at, :, jnp.minimum(at + 1, size - 1)].add(up)
    transition = transition.at[at, :, jnp.maximum(at - 1, 0)].add(down)
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(transition, jnp.zeros((size, 2), x.dtype).at[-1].set(x), jnp.asarray(0.95, x.dtype)),
        bj.ShannonEntropy(jnp.asarray(0.5, x.dtype)),
        lambda x, s: s.policy[0, 0],
    )
    made = bj.hypergradient(problem, x)
    return made.gradient, made.error


@pytest.mark.slow
def test_a_walk_with_a_small_drift():
    want, _ = of_the_start(np.float64(1))
    made, error = of_the_start(np.float32(1))
    assert abs(float(made) - float(want)) <= float(error)
