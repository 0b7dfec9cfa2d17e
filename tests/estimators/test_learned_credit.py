"""The learned upper advantage against the exact one, and groups made from groups."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.estimators import LearnedAdvantage, LeaveOneOut, group_costs, regroup, sample_groups
from bilevel_jax.mdp.bellman import action_values

KEY = jax.random.key(0)


@pytest.mark.slow
def test_learned_advantage_is_the_upper_level_s():
    problem = bj.problems.make("garnet", states=4, actions=2, branching=2, discount=0.6, horizon=40)
    x = problem.start(KEY)
    policy = bj.hypergradient(problem, x, with_error=False).solution.policy
    costs = bj.MDP(problem.transition, problem.cost + problem.price / 2 * x**2, problem.discount)
    q = action_values(costs, bj.policy_value(costs, policy))
    advantage = np.asarray(q - jnp.sum(policy * q, -1, keepdims=True))
    baseline = LearnedAdvantage()

    def error(batch):
        groups = sample_groups(KEY, problem, bj.Table(policy), batch)
        charges = group_costs(KEY, problem, x, groups)
        state = baseline.update(baseline.init(problem), problem, groups, charges)
        credit = baseline.credit(state, problem, bj.Table(policy), groups, charges)
        return np.abs(credit - advantage[groups.observation, groups.action]).max() / np.abs(advantage).max()

    # Certainty equivalence: the error falls as 1 / sqrt(steps); 160,000 steps visit each pair thousands of times.
    assert error(4000) < 0.05
    assert error(4000) < error(10) / 3


@pytest.mark.slow
def test_before_anything_was_seen_it_charges_what_was_paid():
    problem = bj.problems.make("garnet", horizon=5)
    x = problem.start(KEY)
    policy = bj.Table(jnp.full(problem.base.shape, 1 / 3))
    groups = sample_groups(KEY, problem, policy, 3)
    charges = group_costs(KEY, problem, x, groups)
    baseline = LearnedAdvantage(current=False)
    credit = baseline.credit(baseline.init(problem), problem, policy, groups, charges)
    np.testing.assert_allclose(credit[:, 0], charges.returns())


@pytest.mark.slow
def test_regroup():
    problem = bj.problems.make("tabular_rlhf")
    uniform = bj.Table(jnp.full(problem.hidden_reward.shape, 1 / 3))
    groups = sample_groups(KEY, problem, uniform, 4)
    more = regroup(groups, 3)
    assert more.action.shape == (12, *groups.action.shape[1:])
    for shift in range(3):
        for n in range(4):
            np.testing.assert_array_equal(more.action[4 * shift + n, 0], groups.action[n, 0])
            np.testing.assert_array_equal(more.action[4 * shift + n, 1], groups.action[(n + shift) % 4, 1])
    for times in (0, 5, 1.0):
        with pytest.raises(bj.InputError, match="times: expected an integer from 1 to the 4 groups"):
            regroup(groups, times)
    with pytest.raises(bj.InputError, match="trajectories: LearnedAdvantage is for losses of one trajectory"):
        LearnedAdvantage().init(problem)
    assert not LeaveOneOut().learns_first
