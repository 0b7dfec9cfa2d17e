"""Proximal policy optimization of the regularized return finds pi*, on a table and on a box."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deep_cases import (
    KEY,
    LINEAR,
    STATES,
    Quadratic,
    Table,
    gain_and_deviation,
    improved,
    kept_close,
    linear_quadratic,
    means_and_deviations,
    require_nothing_weak,
    require_same_over_seeds,
    traces_of,
)

import bilevel_jax as bj
from bilevel_jax.agents.deep.proximal import PPO
from bilevel_jax.core.schedules import LinearDecay
from bilevel_jax.environments import Processes, collect, policy_table, with_restarts

ONE_HOT = bj.networks.OneHot(STATES)
# 32 x 32 steps and 16 gradient steps per update, 15 updates per improve.
LEARNS = {"updates": 15, "learning_rate": LinearDecay(3e-2, 1e-3, 150)}
SMALL = {"processes": 4, "steps": 8, "updates": 2, "epochs": 2}
# The last batches of 1024 steps and Adam's steps of 1e-3 leave logits off by some 0.03. What was measured for 4 seeds
# and all forms below is at most 6e-4. An untrained policy has 0.17, that of the usual bonus 0.28.
CLOSE = 2e-3


@pytest.mark.slow
@pytest.mark.often(2)
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"value_clip": 0.1}, {"trace": 0.0}, {"clip": 0.05}])
def test_it_finds_the_optimal_policy(options):
    table = Table()
    agent = PPO(ONE_HOT, **LEARNS | options)
    state = agent.init(KEY, table.problem, table.x)
    assert table.gap(agent, state, table.x) > 0.1
    state = improved(agent, KEY, state, table.problem, table.x, 16)
    assert table.gap(agent, state, table.x) < CLOSE


@pytest.mark.slow
def test_it_follows_x():
    table = Table()
    agent = PPO(ONE_HOT, **LEARNS | {"learning_rate": 3e-3})
    state = improved(agent, KEY, agent.init(KEY, table.problem, table.x), table.problem, table.x, 24)
    assert table.gap(agent, state, table.x) < 2 * CLOSE
    assert table.gap(agent, state, table.moved) > 0.3
    state = improved(agent, jax.random.key(1), state, table.problem, table.moved, 24)
    assert table.gap(agent, state, table.moved) < 2 * CLOSE


@pytest.mark.slow
def test_the_usual_bonus_leads_elsewhere():
    table = Table()
    agent = PPO(ONE_HOT, entropy_weight=0.05, **LEARNS)
    state = improved(agent, KEY, agent.init(KEY, table.problem, table.x), table.problem, table.x, 16)
    assert table.gap(agent, state, table.x) > 100 * CLOSE
    more = PPO(ONE_HOT, entropy_weight=5.0, **LEARNS)
    other = improved(more, KEY, more.init(KEY, table.problem, table.x), table.problem, table.x, 4)
    assert float(more.report(other)["entropy"]) > 0.95 * np.log(3) > 2 * float(agent.report(state)["entropy"])


@pytest.mark.slow
def test_it_keeps_to_a_reference():
    reference = jnp.tile(jnp.array([0.2, 0.8, 0.0]), (STATES, 1)).at[0].set(jnp.array([0.1, 0.3, 0.6]))
    problem, x, optimal = kept_close(reference)
    agent = PPO(ONE_HOT, **LEARNS)
    state = agent.init(KEY, problem, x)
    before = bj.agents.policy_gap(agent.policy(state, problem, x), optimal)
    state = improved(agent, KEY, state, problem, x, 16)
    assert bj.agents.policy_gap(agent.policy(state, problem, x), optimal) < CLOSE < before / 10
    assert (policy_table(agent.policy(state, problem, x), STATES)[1:, 2] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("squash", [True, False])
def test_actions_of_a_box(squash):
    problem, x = linear_quadratic(8.0 if squash else np.inf), jnp.asarray(0.5)
    agent = PPO(LINEAR, Quadratic(), squash=squash, **LEARNS | {"learning_rate": LinearDecay(2e-2, 5e-4, 400)})
    gain, deviation = gain_and_deviation(0.5)
    state = agent.init(KEY, problem, x)
    states, means, deviations = means_and_deviations(agent, state, problem, x)
    before = abs(means - gain * states).max(), abs(deviations / deviation - 1).max()
    state = improved(agent, KEY, state, problem, x, 48)
    states, means, deviations = means_and_deviations(agent, state, problem, x)
    # What was measured for 3 seeds: means within 0.04, deviations within 9 percent, either sign.
    assert abs(means - gain * states).max() < 0.08 < before[0] / 5
    assert abs(deviations / deviation - 1).max() < 0.13 < before[1] / 2


def small(**options):
    return PPO(ONE_HOT, **SMALL | options)


@pytest.mark.slow
@pytest.mark.parametrize("weight", [None, 0.1])
def test_steps_that_are_not_valid_have_no_weight(weight):
    table = Table()
    agent = small(entropy_weight=weight, steps=9, minibatches=3)
    state = agent.init(KEY, table.problem, table.x)
    environment = with_restarts(table.problem.environment, 20)
    acting = agent.acting(state, table.problem, table.x)
    _, seen = collect(KEY, Processes(environment, state.processes), acting, agent.steps)
    # As from an environment that resets in a step of its own: every third step, after a truncated one.
    times = jnp.broadcast_to(jnp.arange(9)[None], seen.valid.shape)
    seen = seen._replace(valid=times % 3 != 2, truncated=times % 3 == 1)
    other = seen._replace(action=jnp.where(seen.valid, seen.action, 1 - seen.action % 2))
    plain = seen._replace(valid=jnp.ones_like(seen.valid))
    learn = functools.partial(agent.learn, KEY, state, table.problem, table.x)
    one, same, different = learn(seen), learn(other), learn(plain)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(same.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    assert not eqx.tree_equal(one.params, different.params)


@pytest.mark.slow
def test_seeds_run_together_as_alone():
    table = Table()
    require_same_over_seeds(small(), table.problem, table.x)


@pytest.mark.slow
@pytest.mark.parametrize("box", [True, False])
def test_it_compiles_once(box):
    table = Table()
    problem, x = (linear_quadratic(8.0), jnp.asarray(0.5)) if box else (table.problem, table.x)
    agent = PPO(LINEAR, **SMALL) if box else small(value_clip=0.1)
    counts, state = traces_of(agent, problem, [x, 2 * x, x])
    assert counts[1] == counts[2] <= 2
    require_nothing_weak(state)
    names = {"policy_loss", "value_loss", "entropy", "clipped", "kl", "gradient_norm", "episode_return"}
    assert set(agent.report(state)) >= names
    assert agent.environment_steps(problem) == 4 * 8 * 2


@pytest.mark.slow
def test_float32():
    with jax.enable_x64(False):
        table = Table()
        agent = small()
        state = agent.init(KEY, table.problem, table.x)
        state = eqx.filter_jit(agent.improve)(KEY, state, table.problem, table.x)
        reals = [leaf.dtype for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert set(reals) == {np.dtype(np.float32)}
        assert all(np.isfinite(float(number)) for number in state.numbers.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps: expected"),
        ({"minibatches": 3}, "does not divide by 3"),
        ({"trace": 1.1}, "trace must be from 0 to 1"),
        ({"clip": 0.0}, "clip must be above 0"),
        ({"value_clip": 0.0}, "value_clip must be above 0"),
        ({"value_weight": 0.0}, "value_weight must be above 0"),
        ({"entropy_weight": -1.0}, "entropy_weight must be at least 0"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(bj.InputError, match=message):
        PPO(ONE_HOT, **options)


def test_problems_are_checked():
    x = jnp.asarray(0.5)
    with pytest.raises(bj.InputError, match="finite bounds"):
        PPO(LINEAR).init(KEY, linear_quadratic(np.inf), x)
    with pytest.raises(bj.InputError, match="knows no bounds"):
        PPO(LINEAR, squash=False).init(KEY, linear_quadratic(8.0), x)
    kept = linear_quadratic(8.0, regularizer=bj.KLDivergence(0.5, jnp.ones(1)))
    with pytest.raises(bj.InputError, match="needs ShannonEntropy, got KLDivergence"):
        PPO(LINEAR).init(KEY, kept, x)
