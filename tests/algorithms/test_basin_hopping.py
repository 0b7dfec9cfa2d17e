"""Basin hopping: descents from many starts, the best end kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.algorithms import Cooling, UpperLevel, basin_hopping, hpgd, implicit

# Two states, two actions: phi as a function of one number, with two wells of which the nearer is the worse.
TRANSITION = jnp.array([[[0.9, 0.1], [0.1, 0.9]], [[0.8, 0.2], [0.3, 0.7]]])


def mdp(x):
    return bj.MDP(TRANSITION.astype(x.dtype), jnp.stack([x, jnp.zeros_like(x)], -1) * jnp.ones((2, 1), x.dtype), 0.5)


def objective(x, solution):
    return 0.05 * (x[0] ** 2 - 4) ** 2 + solution.policy[0, 0]


PROBLEM = bj.BilevelProblem(mdp, bj.ShannonEntropy(0.5), objective)
START = jnp.array([1.5])


@functools.cache
def hopping(descent=60, fresh=0.5):
    return basin_hopping(implicit(PROBLEM, optax.adam(0.1)), descent=descent, spread=4.0, fresh=fresh)


def run(algorithm, seed, steps, x=START):
    state = algorithm.init(jax.random.key(seed), x)
    objectives = []
    for key in jax.random.split(jax.random.key(seed), steps):
        state, info = algorithm.step(key, state)
        objectives.append(float(info.objective))
    return state, info, objectives


def phi(x):
    return PROBLEM.objective(x, bj.solve(PROBLEM.mdp(x), PROBLEM.regularizer(x)))


@pytest.mark.slow
def test_the_first_descent_is_the_algorithms_own():
    algorithm = hopping()
    state, info, _ = run(algorithm, 0, 1)
    plain = algorithm.algorithm.init(None, START)
    counted = 0
    for _ in range(algorithm.descent):
        plain, own = algorithm.algorithm.step(None, plain)
        counted += int(own.reports["lower level"].stats.iterations)
    np.testing.assert_allclose(state.x, plain.x, rtol=1e-12)
    np.testing.assert_allclose(state.memory.objective, phi(plain.x), rtol=1e-12)
    assert int(info.reports["lower level"].stats.iterations) == counted
    np.testing.assert_allclose(info.gradient_norm, own.gradient_norm, rtol=1e-9)
    bj.check(info)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [0.0, 0.5, 1.0])
def test_it_leaves_the_worse_well_and_never_gets_worse(fresh):
    grid = jnp.linspace(-4, 4, 801)[:, None]
    least = float(jnp.min(jax.vmap(phi)(grid)))
    algorithm = hopping(fresh=fresh)
    state, _, objectives = run(algorithm, 1, 10)
    assert objectives[0] > least + 0.5  # plain descent ends in the well where it starts
    assert np.all(np.diff(objectives) <= 0)
    assert least - 1e-3 < objectives[-1] < least + 1e-3
    assert float(state.x[0]) < 0
    np.testing.assert_allclose(state.memory.objective, phi(state.x), rtol=1e-12)


@pytest.mark.slow
def test_schedules_start_anew_with_each_descent():
    seen = []
    cooling = optax.exponential_decay(4.0, 60, 0.25, end_value=1.0)
    upper = UpperLevel(optax.adam(0.1), temperature=cooling)
    warm = basin_hopping(implicit(PROBLEM, upper), descent=60, spread=1e-9, fresh=1.0)
    state = warm.init(None, START)
    for key in jax.random.split(jax.random.key(0), 2):
        state, info = warm.step(key, state)
        seen.append(float(info.gradient_norm))
    # The same start, the same descent, to the perturbation.
    np.testing.assert_allclose(seen[0], seen[1], rtol=1e-5)


@pytest.mark.slow
def test_a_cooling_starts_anew_and_lower():
    # Without rewards V = factor log 2 here, which is the gradient of f; the descent is shorter than the cooling.
    problem = bj.BilevelProblem(lambda x: mdp(0 * x), bj.ShannonEntropy(0.5), lambda x, s: x[0] * s.value[0])
    upper = UpperLevel(optax.sgd(0.0), temperature=Cooling(16.0, 8))
    warm = basin_hopping(implicit(problem, upper), descent=5, spread=1e-9, fresh=1.0)
    state, factors = warm.init(None, START), []
    for key in jax.random.split(jax.random.key(0), 6):
        state, info = warm.step(key, state)
        factors.append(float(info.gradient_norm) / np.log(2))
    np.testing.assert_allclose(factors[0], 16.0 ** (1 - 4 / 8), rtol=1e-10)
    others = np.sort(factors[1:])
    assert 1 <= others[0] < others[-1] < 4
    assert np.diff(others).min() > 1e-6


@pytest.mark.parametrize(
    ("start", "steps", "message"), [(0.0, 5, "start must be above 0"), (2.0, 0, "iterations must be")]
)
def test_coolings_are_checked(start, steps, message):
    with pytest.raises(bj.InputError, match=message):
        Cooling(start, steps)


@pytest.mark.slow
def test_vmapped_over_seeds_and_other_numbers_do_not_compile_again():
    algorithm = hopping()
    keys = jax.random.split(jax.random.key(3), 3)
    states = jax.vmap(lambda key: algorithm.init(key, START))(keys)
    stepped, _ = jax.vmap(algorithm.step)(keys, states)
    stepped, infos = jax.vmap(algorithm.step)(keys, stepped)
    single = algorithm.step(keys[1], algorithm.step(keys[1], algorithm.init(keys[1], START))[0])
    np.testing.assert_allclose(stepped.x[1], single[0].x, rtol=1e-9)
    assert infos.objective.shape == (3,)
    step = basin_hopping.__globals__["_step"]
    before = step._cache_size()
    other = basin_hopping(algorithm.algorithm, descent=60, spread=1.0, fresh=0.1)
    moved, _ = other.step(keys[1], single[0])
    assert step._cache_size() == before
    assert moved.memory.objective <= single[0].memory.objective


@pytest.mark.slow
def test_a_diverged_descent_is_not_kept():
    # log of a negative number: every start left of 0 gives NaN.
    problem = bj.BilevelProblem(mdp, bj.ShannonEntropy(0.5), lambda x, s: jnp.log(x[0]) ** 2 + s.policy[0, 0])
    algorithm = basin_hopping(implicit(problem, optax.sgd(0.01)), descent=5, spread=10.0, fresh=1.0)
    state, _, objectives = run(algorithm, 0, 8)
    assert np.isfinite(objectives).all()
    assert np.isfinite(state.x).all()


def test_bad_input():
    inner = implicit(PROBLEM, optax.adam(0.1))
    garnet = bj.problems.make("garnet")
    sampled = hpgd(garnet, optax.adam(0.1), agent=bj.agents.ExactAgent())
    for arguments, message in (
        ({"algorithm": sampled}, r"algorithm: HPGD does not know the model"),
        ({"algorithm": 3}, r"algorithm: int does not know the model"),
        ({"algorithm": basin_hopping(inner)}, r"algorithm: BasinHopping is descents already"),
        ({"descent": 0}, r"descent: expected an integer of at least 1, got 0"),
        ({"spread": 0.0}, r"spread must be above 0, got 0"),
        ({"fresh": 1.5}, r"fresh must be from 0 to 1, got 1.5"),
    ):
        with pytest.raises(bj.InputError, match=message):
            basin_hopping(**({"algorithm": inner} | arguments))
