"""Simulators of gymnasium's tables against gymnasium's own, by means of returns and of lengths of episodes.

z-tests at a false alarm rate of 1e-6 each, |z| < 4.9, with fixed seeds. A difference of 8 standard errors is found with
probability 0.999; in the lake that is 0.08 of a return from 0 to 1 and 3 of 20 steps.
`test_what_is_wrong_is_found` tries one.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.environments import AutoReset, TabularEnvironment, TimeLimit

LIMIT = 4.9
EPISODES, OURS, HORIZON = 1500, 20_000, 60
KEY = jax.random.key(3)
rollout = eqx.filter_jit(bj.environments.rollout)
NAMES = {
    "lake": ("FrozenLakeEnv", {"is_slippery": True}),
    "still lake": ("FrozenLakeEnv", {"is_slippery": False}),
    "large lake": ("FrozenLakeEnv", {"is_slippery": True, "map_name": "8x8"}),
    "cliff": ("CliffWalkingEnv", {}),
    "slippery cliff": ("CliffWalkingEnv", {"is_slippery": True}),
    "taxi": ("TaxiEnv", {}),
    "rainy taxi": ("TaxiEnv", {"is_rainy": True}),
}


@functools.cache
def environment(name):
    kind, options = NAMES[name]
    return getattr(pytest.importorskip("gymnasium.envs.toy_text"), kind)(**options)


@functools.cache
def process(name):
    return bj.interchange.from_gymnasium(environment(name), 0.99)


@functools.cache
def policy_of(name):
    """The optimal one three times out of four, else any action: it ends, and sees much."""
    mdp = process(name)
    best = np.argmax(bj.solve(mdp, bj.Unregularized()).q, -1)
    return 0.75 * np.eye(mdp.num_actions)[best] + 0.25 / mdp.num_actions


@functools.cache
def theirs(name):
    """Return and length of gymnasium's own episodes, cut at HORIZON, [EPISODES] each."""
    env, policy = environment(name), policy_of(name)
    rng = np.random.default_rng(0)
    sums = np.cumsum(policy, -1)
    total, length = np.zeros(EPISODES), np.zeros(EPISODES)
    for episode in range(EPISODES):
        state, _ = env.reset(seed=episode)
        for number in rng.uniform(size=HORIZON):
            state, reward, terminated, _, _ = env.step(int(np.searchsorted(sums[state], number)))
            total[episode] += reward
            length[episode] += 1
            if terminated:
                break
    return total, length


def ours(simulator, policy):
    t = rollout(KEY, simulator, bj.Table(policy), batch=OURS, horizon=HORIZON)
    return jnp.sum(jnp.where(t.valid, t.reward, 0), 1), t.valid.sum(1)


def z(one, other):
    one, other = np.asarray(one, float), np.asarray(other, float)
    error = np.sqrt(one.var() / one.size + other.var() / other.size)
    return (one.mean() - other.mean()) / error if error else np.sign(one.mean() - other.mean()) * np.inf


def agree(found, wanted):
    return all(np.array_equal(a[:1], b[:1]) or abs(z(a, b)) < LIMIT for a, b in zip(found, wanted, strict=True))


WAYS = {
    "table": lambda name: TabularEnvironment.from_gymnasium(environment(name)),
    "MDP": lambda name: TabularEnvironment(process(name)),
}


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_returns_and_lengths_are_gymnasiums(name, way):
    found = ours(WAYS[way](name), policy_of(name))
    for mine, other in zip(found, theirs(name), strict=True):
        assert abs(z(mine, other)) < LIMIT


@pytest.mark.slow
def test_lake_itself():
    found = ours(WAYS["MDP"]("lake"), policy_of("lake"))
    for mine, other in zip(found, theirs("lake"), strict=True):
        assert abs(z(mine, other)) < LIMIT


@pytest.mark.slow
def test_what_is_wrong_is_found():
    """The test's power: holes in the lake that are found half as often."""
    mdp, policy, wanted = process("lake"), policy_of("lake"), theirs("lake")
    largest = float(jnp.max(mdp.discount))
    ends = 1 - np.asarray(mdp.discount) / largest
    assert agree(ours(TabularEnvironment(mdp, ends=ends), policy), wanted)
    shallow = np.where(ends < 1, ends / 2, ends)
    assert not agree(ours(TabularEnvironment(mdp, ends=shallow), policy), wanted)


@pytest.mark.slow
def test_a_table_ends_where_it_says_and_pays_what_it_says():
    t = rollout(KEY, WAYS["table"]("lake"), bj.Table(policy_of("lake")), batch=500, horizon=100)
    ended = np.asarray(t.terminated & t.valid)
    letters = environment("lake").desc.astype(str).ravel()
    assert set(letters[np.asarray(t.next_observation)[ended]]) == {"H", "G"}
    assert not set(letters[np.asarray(t.observation)[np.asarray(t.valid)]]) & {"H", "G"}
    at_goal = letters[np.asarray(t.next_observation)] == "G"
    np.testing.assert_array_equal(np.asarray(t.reward)[ended], at_goal[ended])
    assert set(np.unique(np.asarray(t.reward)[np.asarray(t.valid)])) == {0.0, 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_steps_and_runs_draw_alike(way):
    """The base class's `run`, by `step`, has the same law: mean length and return."""
    simulator, policy = WAYS[way]("lake"), policy_of("lake")
    run = ours(TimeLimit(simulator, HORIZON), policy)
    for mine, other in zip(run, ours(simulator, policy), strict=True):
        assert abs(z(mine, other)) < LIMIT


@pytest.mark.slow
def test_an_end_state_is_the_same_process():
    mdp = process("lake")
    ended = bj.interchange.with_end_state(mdp)
    policy = np.vstack([policy_of("lake"), np.eye(4)[:1]])
    t = rollout(KEY, TabularEnvironment(ended), bj.Table(policy), batch=OURS, horizon=HORIZON)
    inside = np.asarray(t.state) < mdp.num_states
    total = np.where(inside, t.reward, 0).sum(1)
    for mine, other in zip((total, inside.sum(1)), theirs("lake"), strict=True):
        assert abs(z(mine, other)) < LIMIT
    assert np.isfinite(np.asarray(t.reward)).all()


@pytest.mark.slow
def test_discounted_returns_have_the_mean_v():
    mdp, policy = process("lake"), policy_of("lake")
    simulator = TabularEnvironment(mdp)
    t = rollout(KEY, simulator, bj.Table(policy), batch=OURS, horizon=400)
    total = jnp.sum(jnp.where(t.valid, t.reward, 0) * (0.99 ** jnp.arange(400, dtype=float))[None], 1)
    value = float(bj.policy_value(mdp, policy) @ mdp.initial)
    assert abs(np.mean(total) - value) < LIMIT * np.std(total) / OURS**0.5


# masks

MASKED = bj.MDP(
    np.full((2, 2, 2), 0.5), np.array([[1.0, 5.0], [2.0, 3.0]]), 0.9, available=np.array([[True, False], [True, True]])
)


@pytest.mark.slow
def test_policies_leave_out_what_is_not_available():
    simulator = TabularEnvironment(MASKED)
    np.testing.assert_array_equal(simulator.available, MASKED.available)
    t = rollout(KEY, simulator, bj.Table([[1.0, 0.0], [0.5, 0.5]]), batch=50, horizon=20)
    assert np.isfinite(np.asarray(t.reward)).all()
    assert not ((np.asarray(t.state) == 0) & (np.asarray(t.action) == 1)).any()
    with pytest.raises(bj.InputError, match=r"policy\[0, 1\] is 0\.5, but that action is not available"):
        bj.environments.rollout(KEY, simulator, bj.Table([[0.5, 0.5], [0.5, 0.5]]), batch=2, horizon=2)
    # Where the policy is not known before, the trajectory tells.
    t = rollout(KEY, simulator, bj.Table(jnp.full((2, 2), 0.5)), batch=50, horizon=20)
    taken = (np.asarray(t.state) == 0) & (np.asarray(t.action) == 1)
    np.testing.assert_array_equal(np.isnan(np.asarray(t.reward)), taken)
    assert taken.any()


@pytest.mark.parametrize("wrap", [lambda e: e, lambda e: AutoReset(TimeLimit(e, 5))], ids=["plain", "wrapped"])
def test_agents_refuse_what_lacks_actions(wrap):
    simulator = wrap(TabularEnvironment(MASKED))
    np.testing.assert_array_equal(simulator.available, MASKED.available)
    with pytest.raises(bj.InputError, match=r"environment: .* takes every action in every state"):
        bj.SampledBilevelProblem(
            simulator, lambda x: jnp.zeros((2, 2)), bj.ShannonEntropy(1.0), lambda k, x, t: 0.0, discount=0.9, horizon=5
        )


# ends


def one_state(**options):
    return TabularEnvironment(bj.MDP(np.ones((1, 2, 1)), np.zeros((1, 2)), 0.5), **options)


def test_ends_are_probabilities_of_the_pair():
    t = rollout(KEY, one_state(ends=[[0.0, 0.3]]), bj.Table([[0.5, 0.5]]), batch=OURS, horizon=1)
    action, ended = np.asarray(t.action)[:, 0], np.asarray(t.terminated)[:, 0]
    assert not ended[action == 0].any()
    count = (action == 1).sum()
    assert abs(ended[action == 1].mean() - 0.3) < LIMIT * (0.21 / count) ** 0.5


@pytest.mark.slow
def test_an_end_that_all_pairs_share_is_given():
    length = ours(one_state(ends=[[0.25, 0.25]]), np.array([[0.5, 0.5]]))[1]
    assert abs(np.mean(length) - 4) < LIMIT * 12**0.5 / OURS**0.5
    assert np.min(ours(one_state(), np.array([[0.5, 0.5]]))[1]) == HORIZON


@pytest.mark.parametrize(
    ("ends", "message"),
    [([[0.5, 1.5]], "ends must be from 0 to 1"), ([0.5, 0.5], r"ends: expected shape \[S, A\] = \[1, 2\]")],
)
def test_bad_ends_are_named(ends, message):
    with pytest.raises(bj.InputError, match=message):
        one_state(ends=ends)


def test_traced_discounts_are_one_besides_0_or_rewards_are_nan():
    mdp = bj.MDP(np.ones((1, 2, 1)), np.ones((1, 2)), np.array([[0.9, 0.0]]))

    @jax.jit
    def rewards(discount, ends=None):
        simulator = TabularEnvironment(mdp.replace(discount=discount), ends=ends)
        return bj.environments.rollout(KEY, simulator, bj.Table(jnp.full((1, 2), 0.5)), batch=3, horizon=2).reward

    assert np.isfinite(rewards(jnp.array([[0.8, 0.0]]))).all()
    assert np.isnan(rewards(jnp.array([[0.8, 0.4]]))).all()
    assert np.isfinite(rewards(jnp.array([[0.8, 0.4]]), jnp.array([[0.0, 0.5]]))).all()
