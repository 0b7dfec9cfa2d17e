"""What comes out of an iteration that did not converge says so where no report goes with it: NaN, or a word.

The default solver is exchanged for one that makes three sweeps, on problems of their own, so that nothing compiled
before is used.
"""

import functools
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj
from bilevel_jax.agents import exact
from bilevel_jax.core.results import Result, where_converged
from bilevel_jax.experiments.present.pictures import picture
from bilevel_jax.hypergradient import check
from bilevel_jax.hypergradient.methods import perturbation

KEY = jax.random.key(0)
KERNEL = np.random.default_rng(0).dirichlet(np.ones(4), (4, 2))
REWARD = np.random.default_rng(1).normal(size=(4, 2))


def make(discount=0.9):
    """A problem that no other test has: its functions are new ones."""
    return bj.BilevelProblem(
        mdp=lambda x: bj.MDP(KERNEL, REWARD + x[:, None], jnp.asarray(discount)),
        regularizer=bj.ShannonEntropy(0.5),
        objective=lambda x, solution: jnp.sum(solution.policy[:, 0] ** 2) + jnp.sum(x**2) / 10,
    )


def capped(module, monkeypatch):
    few = bj.ValueIteration(max_iterations=3)

    def solve(mdp, regularizer, *, solver=None, initial_value=None):
        return bj.solve(mdp, regularizer, solver=few if solver is None else solver)

    monkeypatch.setattr(module, "solve", solve)


def test_values_are_marked_by_batch_element():
    result = jnp.array([Result.CONVERGED, Result.MAX_ITERATIONS, Result.PRECISION_LIMIT])
    got = where_converged(result, {"a": jnp.ones((3, 2)), "b": jnp.ones(3)})
    np.testing.assert_array_equal(np.isnan(got["a"]), [[False] * 2, [True] * 2, [True] * 2])
    np.testing.assert_array_equal(np.isnan(got["b"]), [False, True, True])


@pytest.mark.slow
def test_exact_agent(monkeypatch):
    problem, x = make(), jnp.zeros(4)
    policies = [_answer(bj.agents.ExactAgent(), problem, x)]
    capped(exact, monkeypatch)
    policies += [_answer(agent, problem, x) for agent in (bj.agents.ExactAgent(), bj.agents.ExactAgent(THREE))]
    assert [bool(np.isnan(policy).any()) for policy in policies] == [False, True, False]


THREE = bj.ValueIteration(max_iterations=3)  # asked for: what it leaves is the answer


def _answer(agent, problem, x):
    return agent.policy(agent.improve(KEY, agent.init(KEY, problem, x), problem, x), problem, x).probabilities


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["differences", "perturbation"])
def test_differences(monkeypatch, kind):
    method = {
        "differences": bj.FiniteDifferences,
        "perturbation": functools.partial(bj.SimultaneousPerturbation, KEY, samples=2),
    }[kind]
    capped(perturbation, monkeypatch)
    made = bj.hypergradient(make(), jnp.zeros(4), method=method())
    assert np.isnan(made.gradient).all()
    with pytest.raises(bj.ConvergenceError):
        bj.check(made)
    asked = bj.hypergradient(make(), jnp.zeros(4), method=method(solver=THREE))
    assert np.isfinite(asked.gradient).all()


@pytest.mark.slow
def test_hops(monkeypatch):
    def hop():
        hopping = bj.algorithms.basin_hopping(bj.algorithms.implicit(make(), optax.sgd(0.1)), descent=2)
        state, _ = hopping.step(KEY, hopping.init(KEY, jnp.zeros(4)))
        return state

    assert np.isfinite(hop().memory.objective)
    capped(sys.modules["bilevel_jax.algorithms.basin_hopping"], monkeypatch)
    state = hop()
    assert state.memory.objective == np.inf  # no end was kept
    np.testing.assert_array_equal(state.x, 0)


@pytest.mark.slow
def test_check_gradient_differences(monkeypatch):
    capped(check, monkeypatch)
    report = bj.check_gradient(make(), jnp.zeros(4), directions=1, verbose=False)
    assert not report.ok
    assert [row.part for row in report.totals if not row.agrees] == ["direction 1: differences of phi"]


@pytest.mark.slow
def test_check_gradient_leaves_out_sweeps_that_it_cannot_make():
    """230,000 sweeps would be needed; 20,000 of them disagreed with a gradient that is right."""
    report = bj.check_gradient(make(0.9999), jnp.zeros(4), directions=1, verbose=False)
    assert all(row.agrees for row in report.totals), str(report)
    assert [row.part for row in report.totals] == ["direction 1: differences of phi"]
    near = bj.check_gradient(make(0.9), jnp.zeros(4), directions=1, verbose=False)
    assert near.ok
    assert "sweeps, differentiated" in near.totals[1].part


@pytest.mark.parametrize(("result", "said"), [(Result.CONVERGED, False), (Result.MAX_ITERATIONS, True)])
def test_pictures_say_it(result, said):
    problem = bj.problems.make("garnet")
    policy = np.full((8, 3), 1 / 3)
    solution = SimpleNamespace(policy=policy, result=np.array(result))
    title = picture(problem, np.zeros((8, 3)), solution, "here")._suptitle.get_text()
    assert ("did not converge" in title) == said
