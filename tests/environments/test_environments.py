"""Simulators: laws of what they draw, independence of the cut of a batch, ends, wrappers, segments, gymnax.

Statistical tests compare with exact laws at a false alarm rate of 1e-6 each; keys are fixed, so that a test that
passes goes on passing.
"""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, STATES
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import bilevel_jax as bj
from bilevel_jax.environments import (
    AutoReset,
    Discrete,
    Environment,
    GymnaxEnvironment,
    TabularEnvironment,
    TimeLimit,
    TimeStep,
    Trajectory,
    random_segments,
    rollout_from,
    segments,
    trajectory_keys,
)
from bilevel_jax.environments.sampling import choose, pick, thresholds, two_numbers

FALSE_ALARM = 1e-6
rollout = eqx.filter_jit(bj.environments.rollout)  # for speed; sizes and functions are static
PROCESS = helpers.random_process(0)
POLICY = np.random.default_rng(1).dirichlet(np.ones(ACTIONS), STATES)
POLICY[2] = [0.0, 1.0, 0.0]  # impossible actions, first and last among them
POLICY[4] = [0.0, 0.3, 0.7]
ENDS = np.zeros((STATES, ACTIONS), bool)
ENDS[1, 1] = ENDS[5, 0] = ENDS[3, 2] = True
DISCOUNT = np.where(ENDS, 0.0, 0.9)
KEY = jax.random.key(7)


@functools.cache
def tabular(layout="dense", discount=None, seed=0):
    discount = DISCOUNT if discount is None else discount
    return TabularEnvironment(helpers.make_mdp(helpers.random_process(seed), discount, layout))


class Generic(Environment):
    """An environment that hides its own `run`, so that the base class's is used."""

    environment: Environment

    @property
    def action_space(self):
        return self.environment.action_space

    def reset(self, key):
        return self.environment.reset(key)

    def observe(self, state):
        return self.environment.observe(state)

    def step(self, key, state, action):
        return self.environment.step(key, state, action)


class Walk(Environment):
    """The state is (place, dict): right or left from a random place; ends at 3 steps from 0, where it pays."""

    edge: jax.Array

    def __init__(self, edge=3):
        self.edge = jnp.asarray(edge, jnp.int32)

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jax.random.randint(key, (), -1, 2, jnp.int32), {"noise": jax.random.uniform(key, (2,)), "key": key}

    def observe(self, state):
        return jnp.stack([state[0].astype(float), state[1]["noise"][0]])

    def step(self, key, state, action):
        place = state[0] + 2 * action.astype(jnp.int32) - 1
        following = place, {"noise": jax.random.uniform(key, (2,)), "key": key}
        ended = jnp.abs(place) >= self.edge
        return following, TimeStep(self.observe(following), ended.astype(float), ended, jnp.zeros_like(ended))


def walk_policy(observation):
    # Without exponentials, whose last digit depends on the place in a vector.
    right = 0.5 + 0.0625 * observation[0] + 0.125 * observation[1]
    return jnp.stack([1 - right, right])


def chi_square(counts, probabilities):
    """p-value of counts under probabilities; what is impossible must not have happened."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    assert (counts[probabilities == 0] == 0).all()
    counts, probabilities = counts[probabilities > 0], probabilities[probabilities > 0]
    expected = counts.sum() * probabilities / probabilities.sum()
    assert expected.min() >= 5, "too few draws for this test"
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) if len(counts) > 1 else 1.0


def assert_law(counts, probabilities):
    """Each row of counts [..., N] may come from its row of probabilities [..., N]."""
    for count, probability in zip(
        np.reshape(counts, (-1, np.shape(counts)[-1])),
        np.reshape(probabilities, (-1, np.shape(counts)[-1])),
        strict=True,
    ):
        assert chi_square(count, probability) > FALSE_ALARM


def count(*indices, sizes, where):
    table = np.zeros(sizes)
    np.add.at(table, tuple(np.asarray(index)[np.asarray(where)] for index in indices), 1)
    return table


def plain(tree):
    """Leaves as numpy arrays, keys as their words."""
    return [
        np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)
        for leaf in jax.tree.leaves(tree)
    ]


def assert_same(one, other):
    for a, b in zip(plain(one), plain(other), strict=True):
        np.testing.assert_array_equal(a, b)


def part_of(trajectories, start, stop):
    return jax.tree.map(lambda leaf: leaf[start:stop], trajectories)


# Laws


def make_environment(kind):
    if kind == "under jit":  # dense rows whose successors cannot be counted
        return jax.jit(lambda p: TabularEnvironment(bj.MDP(p, PROCESS.reward, DISCOUNT, PROCESS.initial)))(
            PROCESS.dense
        )
    if kind == "generic":
        return Generic(tabular("successor"))
    if kind == "auto reset":
        return AutoReset(tabular("successor"))
    return tabular(kind)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", ["dense", "successor", "under jit", "generic", "auto reset"])
def test_frequencies_are_those_of_the_mdp(kind):
    environment = make_environment(kind)
    t = rollout(KEY, environment, bj.Table(POLICY), batch=20_000, horizon=8)
    where = np.asarray(t.valid)
    if kind == "auto reset":
        assert where.all()
    assert_law(count(t.state[:, 0], sizes=STATES, where=where[:, 0]), PROCESS.initial)
    assert_law(count(t.state, t.action, sizes=(STATES, ACTIONS), where=where), POLICY)
    reached = POLICY > 0
    moves = count(t.state, t.action, t.next_observation, sizes=(STATES, ACTIONS, STATES), where=where)
    assert_law(moves[reached], PROCESS.dense[reached])
    # What follows from the state and the action alone holds exactly.
    state, action = np.asarray(t.state), np.asarray(t.action)
    np.testing.assert_array_equal(t.observation, state)
    np.testing.assert_allclose(t.reward, PROCESS.reward[state, action])
    np.testing.assert_allclose(t.probability, POLICY[state, action])
    np.testing.assert_array_equal(np.asarray(t.terminated)[where], ENDS[state, action][where])
    assert not np.asarray(t.truncated)[where].any()


@pytest.mark.parametrize("make", [tabular, lambda: Generic(tabular())])
def test_steps_follow_one_another_and_stop_counting_at_the_end(make):
    t = rollout(KEY, make(), bj.Table(POLICY), batch=500, horizon=12)
    valid, ends = np.asarray(t.valid), np.asarray(t.terminated)
    assert valid[:, 0].all()
    assert not valid.all()
    np.testing.assert_array_equal(valid[:, 1:], valid[:, :-1] & ~ends[:, :-1])
    np.testing.assert_array_equal(
        np.asarray(t.state)[:, 1:][valid[:, 1:]], np.asarray(t.next_observation)[:, :-1][valid[:, 1:]]
    )


@pytest.mark.parametrize("make", [tabular, lambda: Generic(tabular())])
def test_final_states_are_where_each_process_ended_or_is(make):
    keys = trajectory_keys(KEY, 400)
    run = eqx.filter_jit(rollout_from)
    t, final = run(keys, make(), bj.Table(POLICY), jnp.zeros(400, jnp.int32), horizon=9)
    last = np.asarray(t.valid).sum(1) - 1
    np.testing.assert_array_equal(final, np.asarray(t.next_observation)[np.arange(400), last])
    assert (last < 8).any()


def test_consecutive_draws_are_independent():
    """In a process whose states are drawn anew each step, pairs of consecutive and of simultaneous draws."""
    states, actions = 4, 3
    environment = TabularEnvironment(bj.MDP(np.full((states, actions, states), 1 / states), np.zeros((4, 3)), 0.9))
    t = rollout(KEY, environment, bj.Table(np.full((states, actions), 1 / 3)), batch=4000, horizon=20)
    code = np.asarray(t.next_observation) * actions + np.asarray(t.action)
    pairs = np.full(144, 1 / 144)
    for one, other in ((code[:, :-1], code[:, 1:]), (code[:, :-2], code[:, 2:]), (code[:-1], code[1:])):
        # Non-overlapping pairs, so that the counts are multinomial.
        one, other = (one[:, ::2], other[:, ::2]) if one.shape[0] == 4000 else (one[::2], other[::2])
        assert chi_square(np.bincount((one * 12 + other).ravel(), minlength=144), pairs) > FALSE_ALARM
    assert_law(np.bincount(code.ravel(), minlength=12), np.full(12, 1 / 12))


def contexts(share_transition=False):
    processes = [helpers.random_process(seed) for seed in (2, 3, 4)]
    dense = processes[0].dense if share_transition else np.stack([p.dense for p in processes])
    reward, initial = (np.stack([getattr(p, name) for p in processes]) for name in ("reward", "initial"))
    return bj.MDP(dense, reward, 0.9, initial), dense if dense.ndim == 4 else np.stack([dense] * 3)


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True])
def test_contexts_are_drawn_uniformly_and_never_change(share):
    mdp, dense = contexts(share)
    environment = TabularEnvironment(mdp)
    assert environment.num_states == 3 * STATES
    policy = 0.5 * np.random.default_rng(0).dirichlet(np.ones(ACTIONS), 3 * STATES) + 0.5 / ACTIONS
    t = rollout(KEY, environment, bj.Table(policy), batch=15_000, horizon=10)
    context, state = np.divmod(np.asarray(t.state), STATES)
    assert (context == context[:, :1]).all()
    assert (np.asarray(t.next_observation) // STATES == context).all()
    assert_law(count(context[:, 0], state[:, 0], sizes=(3, STATES), where=np.ones(15_000, bool)), mdp.initial)
    assert_law(np.bincount(context[:, 0]), np.full(3, 1 / 3))
    moves = count(
        context,
        state,
        t.action,
        t.next_observation % STATES,
        sizes=(3, STATES, ACTIONS, STATES),
        where=np.asarray(t.valid),
    )
    assert_law(moves, dense)
    np.testing.assert_allclose(t.reward, np.asarray(mdp.reward)[context, state, t.action])


def test_two_batch_axes_are_contexts_too():
    reward = np.arange(4.0).reshape(2, 2, 1, 1)
    mdp = bj.MDP(np.ones((1, 1, 1)), reward, np.asarray([[0.9, 0.0], [0.9, 0.0]]))
    t = rollout(KEY, TabularEnvironment(mdp), bj.Table(np.ones((4, 1))), batch=2000, horizon=2)
    np.testing.assert_array_equal(t.reward, t.state)
    np.testing.assert_array_equal(t.terminated, t.state % 2 == 1)
    assert_law(np.bincount(t.state[:, 0]), np.full(4, 1 / 4))


@pytest.mark.slow
def test_returns_are_those_of_the_policy():
    """Discounted returns from rho against (I - gamma P_pi)^-1, where nothing ends: one z-test."""
    environment = tabular(discount=0.7)
    t = rollout(KEY, environment, bj.Table(POLICY), batch=20_000, horizon=60)
    returns = np.asarray(t.reward) @ 0.7 ** np.arange(60)
    dense = np.einsum("sa,sat->st", POLICY, PROCESS.dense)
    value = np.linalg.solve(np.eye(STATES) - 0.7 * dense, (POLICY * PROCESS.reward).sum(1))
    z = (returns.mean() - PROCESS.initial @ value) / (returns.std() / np.sqrt(len(returns)))
    assert abs(z) < stats.norm.isf(FALSE_ALARM / 2)


# Draws


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


# Independence of the cut of a batch

CASES = {
    "tabular": (tabular, lambda: bj.Table(POLICY)),
    "generic": (lambda: AutoReset(TimeLimit(Walk(), 5)), lambda: walk_policy),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tabular", "generic"])
def test_bits_do_not_depend_on_the_cut(case):
    environment, policy = (make() for make in CASES[case])

    @functools.partial(jax.jit, static_argnames=("batch", "horizon"))
    def run(key, first=0, batch=4, horizon=9):
        return bj.environments.rollout(key, environment, policy, batch=batch, horizon=horizon, first=first)

    whole = run(KEY, batch=8)
    parts = [run(KEY, 0), run(KEY, 4)]
    assert_same(part_of(whole, 0, 4), parts[0])
    assert_same(part_of(whole, 4, 8), parts[1])
    other = jax.random.key(1)
    mapped = jax.vmap(run)(jnp.stack([KEY, KEY, other]), jnp.asarray([0, 4, 2]))
    assert_same(jax.tree.map(lambda leaf: leaf[:2].reshape(8, *leaf.shape[2:]), mapped), whole)
    assert_same(jax.tree.map(lambda leaf: leaf[2], mapped), run(other, 2))
    assert_same(part_of(whole, 6, 7), run(KEY, 6, batch=1))
    eager = bj.environments.rollout(KEY, environment, policy, batch=4, horizon=5, first=4)
    assert_same(jax.tree.map(lambda leaf: leaf[:, :5], parts[1]), eager)


@pytest.mark.slow
@pytest.mark.parametrize("make", [tabular, lambda: Generic(tabular())])
def test_old_style_keys_are_keys(make):
    run = functools.partial(rollout, environment=make(), policy=bj.Table(POLICY), batch=3, horizon=4)
    assert_same(run(jax.random.PRNGKey(5)), run(jax.random.key(5)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [tabular, lambda: Generic(tabular())])
def test_first_actions_and_common_numbers(make):
    environment, policy = make(), bj.Table(POLICY)
    keys, starts = trajectory_keys(KEY, 64), jnp.arange(64, dtype=jnp.int32) % STATES
    run = eqx.filter_jit(functools.partial(rollout_from, keys, environment, policy, starts, horizon=9))
    free, final = run()
    given_actions, _ = run(actions=jnp.full(64, 1))  # int64: any integer type will do
    np.testing.assert_array_equal(given_actions.action[:, 0], 1)
    np.testing.assert_array_equal(free.state[:, 0], starts)
    # The same first action gives the same trajectory, and the same numbers draw all that follows.
    repeated, again = run(actions=free.action[:, 0])
    assert_same((repeated, again), (free, final))
    same = np.asarray(free.action[:, 0]) == 1
    assert 0 < same.sum() < 64
    valid = np.asarray(free.valid)
    for one, other in zip(plain(given_actions), plain(free), strict=True):
        np.testing.assert_array_equal(one[same][valid[same]], other[same][valid[same]])
    # Trajectories that meet after the first step stay together.
    met = (np.asarray(given_actions.state)[:, 1] == np.asarray(free.state)[:, 1]) & ~same
    met &= np.asarray(given_actions.valid & free.valid)[:, 1]
    assert met.any()
    np.testing.assert_array_equal(np.asarray(given_actions.action)[met, 1], np.asarray(free.action)[met, 1])


def test_a_run_can_be_taken_up_where_it_ended():
    run = eqx.filter_jit(
        functools.partial(rollout_from, environment=AutoReset(tabular()), policy=bj.Table(POLICY), horizon=7)
    )
    t, final = run(trajectory_keys(KEY, 5), states=jnp.zeros(5, jnp.int32))
    more, _ = run(trajectory_keys(KEY, 5, 5), states=final)
    np.testing.assert_array_equal(more.state[:, 0], final)
    going_on = ~np.asarray(t.terminated)[:, -1]
    np.testing.assert_array_equal(final[going_on], t.next_observation[going_on, -1])


@pytest.mark.slow
def test_fast_and_generic_runs_agree_in_law():
    """Counts of (state at step 5, action at step 5, whether the process lives) in two samples: chi-square."""
    tables = []
    for environment in (tabular(), Generic(tabular())):
        t = rollout(KEY, environment, bj.Table(POLICY), batch=20_000, horizon=6)
        code = np.where(t.valid[:, 5], t.state[:, 5] * ACTIONS + t.action[:, 5], STATES * ACTIONS)
        tables.append(np.bincount(code, minlength=STATES * ACTIONS + 1))
    both = np.stack(tables)
    both = both[:, both.sum(0) > 10]
    assert stats.chi2_contingency(both).pvalue > FALSE_ALARM


@pytest.mark.slow
@pytest.mark.parametrize("make", [tabular, lambda: Generic(tabular()), lambda: AutoReset(TimeLimit(tabular(), 3))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_types(make, dtype):
    environment = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float64 else leaf, make())
    t = rollout(KEY, environment, bj.Table(jnp.asarray(POLICY, dtype)), batch=3, horizon=4)
    assert t.reward.dtype == t.probability.dtype == dtype
    assert t.action.dtype == t.observation.dtype == t.next_observation.dtype == jnp.int32
    assert t.terminated.dtype == t.truncated.dtype == t.valid.dtype == bool
    assert all(leaf.shape == (3, 4) for leaf in jax.tree.leaves(t))


@pytest.mark.parametrize("kind", ["tabular", "generic", "limit"])
def test_numbers_do_not_recompile(kind):
    traces = 0

    @jax.jit
    def run(key, reward, probability, policy, steps, first):
        nonlocal traces
        traces += 1
        environment = TabularEnvironment(
            bj.MDP(bj.SuccessorTransition(PROCESS.successor, probability), reward, DISCOUNT)
        )
        environment = {
            "tabular": lambda: environment,
            "generic": lambda: Generic(environment),
            "limit": lambda: TimeLimit(environment, steps),
        }[kind]()
        return rollout(key, environment, bj.Table(policy), batch=4, horizon=5, first=first)

    one = run(KEY, PROCESS.reward, PROCESS.probability, POLICY, 3, 0)
    other = run(jax.random.key(1), 2 * PROCESS.reward, PROCESS.probability[::-1], POLICY[::-1], 4, 8)
    assert traces == 1
    assert not np.array_equal(one.reward, other.reward)


def test_an_environment_is_an_argument_of_jit():
    traces = 0

    @jax.jit
    def run(environment):
        nonlocal traces
        traces += 1
        return rollout(KEY, environment, bj.Table(POLICY), batch=2, horizon=3).reward

    run(tabular("successor"))
    run(tabular("successor", seed=5))
    assert traces == 1


@pytest.mark.slow
def test_probabilities_are_differentiable_and_rewards_too():
    def objective(policy, reward):
        environment = TabularEnvironment(helpers.make_mdp(PROCESS).replace(reward=reward))
        t = rollout(KEY, environment, bj.Table(policy), batch=6, horizon=5)
        return jnp.sum(jnp.log(t.probability)), jnp.sum(t.reward)

    t = rollout(KEY, tabular(discount=0.8), bj.Table(POLICY), batch=6, horizon=5)
    visits = count(t.state, t.action, sizes=(STATES, ACTIONS), where=t.valid)
    by_policy = jax.grad(lambda policy: objective(policy, jnp.asarray(PROCESS.reward))[0])(jnp.asarray(POLICY))
    by_reward = jax.grad(lambda reward: objective(jnp.asarray(POLICY), reward)[1])(jnp.asarray(PROCESS.reward))
    np.testing.assert_allclose(by_policy, visits / np.where(POLICY > 0, POLICY, 1))
    np.testing.assert_allclose(by_reward, visits)


# Wrappers


def ended(t):
    return np.asarray(t.terminated | t.truncated)


@pytest.mark.slow
def test_auto_reset_reports_the_end_and_goes_on_from_a_fresh_state():
    t = rollout(KEY, AutoReset(Walk()), walk_policy, batch=200, horizon=40)
    place, noise = np.asarray(t.state[0]), np.asarray(t.state[1]["noise"])
    assert np.asarray(t.valid).all()
    over = ended(t)
    assert over.any()
    reported = np.asarray(t.next_observation)
    assert (np.abs(reported[over][:, 0]) == 3).all()  # of the end, not of the start after it
    assert (np.abs(reported[~over][:, 0]) < 3).all()
    assert (np.abs(place[:, 1:][over[:, :-1]]) <= 1).all()
    np.testing.assert_array_equal(reported[:, :-1, 0][~over[:, :-1]], place[:, 1:][~over[:, :-1]])
    assert_law(np.bincount(place[:, 1:][over[:, :-1]] + 1), np.full(3, 1 / 3))
    # The whole state is exchanged, its arrays and its key: each fits the place drawn from that key.
    keys = t.state[1]["key"][:, 1:][over[:, :-1]]
    np.testing.assert_array_equal(jax.vmap(lambda key: Walk().reset(key)[0])(keys), place[:, 1:][over[:, :-1]])
    np.testing.assert_array_equal(jax.vmap(lambda key: Walk().reset(key)[1]["noise"])(keys), noise[:, 1:][over[:, :-1]])
    assert not np.asarray(t.truncated).any()


def test_without_reset_the_state_stays_where_it_ended():
    t = rollout(KEY, Walk(), walk_policy, batch=50, horizon=60)
    place, valid = np.asarray(t.state[0]), np.asarray(t.valid)
    assert (np.abs(place[valid]) < 3).all()
    assert (np.abs(place[~valid]) == 3).all()
    np.testing.assert_array_equal((np.asarray(t.reward) * valid).sum(1), (ended(t) & valid).any(1))


@pytest.mark.parametrize("steps", [1, 4])
def test_time_limit(steps):
    t = rollout(KEY, TimeLimit(Walk(), steps), walk_policy, batch=100, horizon=8)
    valid, truncated, terminated = (np.asarray(x) for x in (t.valid, t.truncated, t.terminated))
    assert (valid.sum(1) <= steps).all()
    assert not valid[:, steps:].any()
    last = valid[:, steps - 1]
    assert (truncated | terminated)[:, steps - 1][last].all()
    assert not (truncated & terminated)[valid].any()
    assert not truncated[:, : steps - 1][valid[:, : steps - 1]].any()
    if steps == 4:
        assert terminated[:, 3][last].any(), "some end by themselves in the last step: not truncated"
    np.testing.assert_array_equal(np.asarray(t.state[1])[valid], np.nonzero(valid)[1])


@pytest.mark.slow
def test_time_limits_may_be_traced_and_mapped():
    def lengths(steps):
        t = rollout(KEY, TimeLimit(Walk(100), steps), walk_policy, batch=3, horizon=9)
        return jnp.sum(t.valid, 1)

    np.testing.assert_array_equal(jax.jit(jax.vmap(lengths))(jnp.asarray([1, 4, 20])), [[1] * 3, [4] * 3, [9] * 3])


@pytest.mark.slow
def test_auto_reset_of_a_time_limit_starts_the_clock_again():
    t = rollout(KEY, AutoReset(TimeLimit(Walk(100), 3)), walk_policy, batch=7, horizon=10)
    np.testing.assert_array_equal(t.truncated, np.broadcast_to(np.arange(10) % 3 == 2, (7, 10)))
    np.testing.assert_array_equal(t.state[1], np.broadcast_to(np.arange(10) % 3, (7, 10)))
    assert np.asarray(t.valid).all()
    mixed = rollout(KEY, AutoReset(TimeLimit(Walk(), 6)), walk_policy, batch=100, horizon=30)
    assert np.asarray(mixed.terminated).any()
    assert np.asarray(mixed.truncated).any()
    np.testing.assert_array_equal(np.asarray(mixed.state[1])[:, 1:] == 0, ended(mixed)[:, :-1])


def test_wrappers_pass_on_what_they_wrap():
    environment = AutoReset(TimeLimit(tabular(), 3))
    assert environment.num_actions == ACTIONS
    assert environment.resets
    assert not TimeLimit(tabular(), 3).resets


def test_the_other_order_is_refused():
    with pytest.raises(bj.InputError, match=r"AutoReset\(TimeLimit"):
        TimeLimit(AutoReset(tabular()), 3)


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3", None])
def test_time_limit_refuses(steps):
    with pytest.raises(bj.InputError, match="steps"):
        TimeLimit(tabular(), steps)


# Segments


def test_segments_are_slices():
    t = rollout(KEY, TimeLimit(Walk(), 6), walk_policy, batch=4, horizon=9)
    cut = segments(t, jnp.asarray([0, 3, 5, 2]), 4)
    for whole, part in zip(plain(t), plain(cut), strict=True):
        assert part.shape == (4, 4, *whole.shape[2:])
        for b, start in enumerate([0, 3, 5, 2]):
            np.testing.assert_array_equal(part[b], whole[b, start : start + 4])
    assert_same(segments(t, jnp.asarray([-5, 100, 6, 5]), 4), segments(t, jnp.asarray([0, 5, 5, 5]), 4))
    assert_same(segments(t, jnp.zeros(4, int), 9), t)


def test_random_segments_start_anywhere_alike():
    time = jnp.broadcast_to(jnp.arange(7), (6000, 7))
    cut = random_segments(KEY, Trajectory(*[time] * 9), 3)
    np.testing.assert_array_equal(np.diff(cut.action), 1)
    assert_law(np.bincount(cut.action[:, 0], minlength=5), np.full(5, 1 / 5))
    assert_same(random_segments(KEY, Trajectory(*[time] * 9), 7), Trajectory(*[time] * 9))


def trajectories_that_end(lengths, horizon):
    """Trajectories whose first lengths[B] steps are valid; `action` counts steps."""
    time = jnp.broadcast_to(jnp.arange(horizon), (len(lengths), horizon))
    return Trajectory(*[time] * 8, time < np.asarray(lengths)[:, None])


def test_random_segments_hold_valid_steps_alone():
    """Uniform over starts 0 to N - length: a chi-square test at 1e-6, which a start that is a twentieth rarer than it
    should be fails with probability 0.999."""
    lengths = np.repeat([5, 6, 9, 12], 20_000)
    cut = random_segments(KEY, trajectories_that_end(lengths, 12), 5)
    assert np.asarray(cut.valid).all()
    start = np.asarray(cut.action)[:, 0]
    for length in (5, 6, 9, 12):
        starts = length - 5 + 1
        law = np.full(starts, 1 / starts)
        counts = np.bincount(start[lengths == length], minlength=starts)
        assert counts.size == starts
        if starts > 1:
            assert_law(counts, law)
            skewed = law * (1 + 0.1 * np.where(np.arange(starts) < starts / 2, 1, -1))
            assert chi_square(np.round(20_000 * skewed / skewed.sum()), law) < FALSE_ALARM  # the test's power


def test_random_segments_of_short_episodes_are_the_episodes():
    lengths = np.array([1, 2, 3, 4])
    cut = random_segments(KEY, trajectories_that_end(lengths, 12), 4)
    np.testing.assert_array_equal(cut.action, np.broadcast_to(np.arange(4), (4, 4)))
    np.testing.assert_array_equal(np.asarray(cut.valid).sum(1), lengths)


@pytest.mark.slow
def test_random_segments_of_a_process_that_ends_are_never_empty():
    """Mean length 12 in 100 steps: seven in eight segments of 10 had no valid step."""
    ends = np.full((1, 1), 1 / 12)
    simulator = TabularEnvironment(bj.MDP(np.ones((1, 1, 1)), np.zeros((1, 1)), 0.9), ends=ends)
    t = rollout(KEY, simulator, bj.Table([[1.0]]), batch=4000, horizon=100)
    lengths = np.asarray(t.valid).sum(1)
    assert abs(lengths.mean() - 12) < 1.2
    cut = random_segments(KEY, t, 10)
    np.testing.assert_array_equal(np.asarray(cut.valid).sum(1), np.minimum(lengths, 10))
    jitted = jax.jit(random_segments, static_argnums=2)(KEY, t, 10)
    assert_same(cut, jitted)


@pytest.mark.parametrize("length", [0, -1, 8, 2.0, True, None])
@pytest.mark.parametrize(
    "cut", [lambda t, n: segments(t, jnp.zeros(2, int), n), lambda t, n: random_segments(KEY, t, n)]
)
def test_segments_refuse(cut, length):
    with pytest.raises(bj.InputError, match="length"):
        cut(Trajectory(*[jnp.zeros((2, 7), int)] * 9), length)


# Errors


@pytest.mark.parametrize("argument", ["batch", "horizon"])
@pytest.mark.parametrize("value", [0, -3, 2.0, "4", None, True])
def test_sizes_are_checked(argument, value):
    with pytest.raises(bj.InputError, match=argument):
        rollout(KEY, tabular(), bj.Table(POLICY), **{"batch": 2, "horizon": 2, argument: value})


def test_sizes_are_static():
    with pytest.raises(bj.InputError, match=r"horizon.*static"):
        jax.jit(lambda h: rollout(KEY, tabular(), bj.Table(POLICY), batch=2, horizon=h))(3)


def test_several_discounts_are_ends_by_chance():
    """A discount below the largest ends the process with the probability that is missing; others draw as before."""
    discount = DISCOUNT.copy()
    discount[0, 0] = 0.6
    chances = 1 - discount / 0.9
    simulator = TabularEnvironment(helpers.make_mdp(PROCESS, discount))
    policy = 0.5 * POLICY + 0.5 / ACTIONS
    t = rollout(KEY, simulator, bj.Table(policy), batch=4000, horizon=10)
    ended = count(t.state, t.action, t.terminated.astype(int), sizes=(STATES, ACTIONS, 2), where=t.valid)
    assert_law(ended, np.stack([1 - chances, chances], -1))
    after = np.asarray(t.valid & ~t.terminated)
    moves = count(t.state, t.action, t.next_observation, sizes=(STATES, ACTIONS, STATES), where=after)
    seen = moves.sum(-1) > 0
    assert_law(moves[seen], PROCESS.dense[seen])


def test_several_discounts_of_contexts_are_refused():
    mdp, _ = contexts()
    with pytest.raises(bj.InputError, match=r"discount.*3"):
        TabularEnvironment(mdp.replace(discount=np.asarray([0.5, 0.6, 0.7])))


def test_an_mdp_of_discount_0_ends_at_once():
    t = rollout(KEY, tabular(discount=0.0), bj.Table(POLICY), batch=5, horizon=3)
    assert np.asarray(t.terminated).all()
    np.testing.assert_array_equal(t.valid, np.broadcast_to([True, False, False], (5, 3)))


def test_other_transitions_are_refused():
    class Odd(bj.DenseTransition):
        pass

    class Other(eqx.Module):
        probability: jax.Array

    mdp = helpers.make_mdp(PROCESS)
    TabularEnvironment(eqx.tree_at(lambda m: m.transition, mdp, Odd(PROCESS.dense)))
    with pytest.raises(bj.InputError, match=r"transition: Other"):
        TabularEnvironment(eqx.tree_at(lambda m: m.transition, mdp, Other(jnp.asarray(PROCESS.dense))))


@pytest.mark.parametrize("make", [tabular, lambda: Generic(tabular())])
def test_policies_of_other_sizes_are_refused(make):
    with pytest.raises(bj.InputError, match="policy"):
        rollout(KEY, make(), lambda s: jnp.ones(ACTIONS + 1), batch=2, horizon=2)


def test_tables_of_other_sizes_are_refused():
    with pytest.raises(bj.InputError, match="policy"):
        rollout(KEY, tabular(), bj.Table(POLICY[:-1]), batch=2, horizon=2)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"actions": jnp.zeros(3, int)}, "actions"),
        ({"actions": jnp.zeros(4)}, "actions"),
        ({"actions": jnp.asarray([0, 1, ACTIONS, 0])}, "actions"),
        ({"actions": jnp.asarray([0, 1, -1, 0])}, "actions"),
        ({"states": jnp.zeros(3, jnp.int32)}, "states"),
        ({"states": jnp.int32(0)}, "states"),
        ({"keys": KEY}, "keys"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_rollout_from_refuses(changes, match):
    arguments = {"keys": trajectory_keys(KEY, 4), "states": jnp.zeros(4, jnp.int32), "horizon": 2, **changes}
    with pytest.raises(bj.InputError, match=match):
        rollout_from(environment=tabular(), policy=bj.Table(POLICY), **arguments)


# Simulators in gymnax's manner


class Parameters(NamedTuple):
    goal: float = 3.0
    max_steps_in_episode: int = 5


class Place(NamedTuple):
    x: jax.Array
    time: int = 0


class Line:
    """Five values. Goes right (1) or stays (0); done at the goal or when time is up; `step` resets by itself."""

    num_actions = 2
    default_params = Parameters()

    def reset_env(self, key, params):
        state = Place(jnp.zeros(()), 0)
        return self.see(state), state

    def see(self, state):
        return jnp.stack([state.x, jnp.asarray(state.time, state.x.dtype)])

    def natural(self, state, params):
        return state.x >= params.goal

    def step_env(self, key, state, action, params):
        following = Place(state.x + action.astype(state.x.dtype), state.time + 1)
        done = self.natural(following, params) | (following.time >= params.max_steps_in_episode)
        return self.see(following), following, action, done, {}

    reset = reset_env

    def step(self, key, state, action, params):
        observation, following, reward, done, info = self.step_env(key, state, action, params)
        fresh, start = self.reset_env(key, params)
        following = jax.tree.map(lambda a, b: jnp.where(done, a, b), start, following)
        return jnp.where(done, fresh, observation), following, reward, done, info


class LineThatTells(Line):
    """Five values of step_env, and a method of its own for the limit, as of gymnax 1."""

    def step_env(self, key, state, action, params):
        observation, following, reward, _, info = super().step_env(key, state, action, params)
        return observation, following, reward, self.natural(following, params), info

    def is_truncated(self, state, params):
        return state.time >= params.max_steps_in_episode


class LineOfSix(Line):
    def step_env(self, key, state, action, params):
        observation, following, reward, _, info = super().step_env(key, state, action, params)
        late = following.time >= params.max_steps_in_episode
        return observation, following, reward, self.natural(following, params), late, info


class Wrapper:
    """Doubles observations; passes on all else, as gymnax's wrappers do. Its step resets by itself."""

    def __init__(self, inner, final):
        self.inner, self.final = inner, final

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def reset(self, key, params):
        observation, state = self.inner.reset(key, params)
        return 2 * observation, state

    def step(self, key, state, action, params):
        observation, following, reward, done, info = self.inner.step(key, state, action, params)
        if self.final:
            info = {"final_observation": 2 * self.inner.step_env(key, state, action, params)[0]}
            return 2 * observation, following, reward, done, jnp.zeros_like(done), info
        return 2 * observation, following, reward, done, info


def steps_of(environment, actions):
    """Time steps of one process, by hand."""
    state, step, made = environment.reset(KEY), jax.jit(lambda *arguments: environment.step(*arguments)), []
    for action in actions:
        state, one = step(KEY, state, jnp.int32(action))
        made.append(one)
    return jax.tree.map(lambda *leaves: np.stack(leaves), *made)


@pytest.mark.parametrize("kind", [Line, LineThatTells, LineOfSix])
def test_adapted_environments(kind):
    environment = GymnaxEnvironment(kind())
    assert environment.num_actions == 2
    early = steps_of(environment, [1, 0, 1, 1])
    np.testing.assert_array_equal(early.observation, [[1, 1], [1, 2], [2, 3], [3, 4]])
    np.testing.assert_array_equal(early.reward, [1, 0, 1, 1])
    assert early.reward.dtype == np.float64
    np.testing.assert_array_equal(early.terminated, [False, False, False, True])
    assert not early.truncated.any()
    late = steps_of(environment, [1, 0, 0, 0, 0])
    np.testing.assert_array_equal(late.truncated, [False] * 4 + [True])
    assert not late.terminated.any()
    both = steps_of(environment, [1, 0, 0, 1, 1])
    # Ends by itself in the last permitted step, which one `done` alone does not tell.
    assert both.terminated[-1] == (kind is not Line)
    if kind is not LineOfSix:
        assert both.truncated[-1] == (kind is Line)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Line, LineOfSix])
def test_adapted_environments_run(kind):
    environment = GymnaxEnvironment(kind())

    def policy(observation):
        return jnp.stack([0.5 - 0 * observation[0], 0.5])

    t = rollout(KEY, environment, policy, batch=40, horizon=8)
    valid = np.asarray(t.valid)
    assert (valid.sum(1) <= 5).all()
    assert np.asarray(t.terminated)[valid].any()
    assert np.asarray(t.truncated)[valid].any()
    np.testing.assert_array_equal(t.observation, t.state[1])
    going_on = rollout(KEY, AutoReset(environment), policy, batch=40, horizon=20)
    assert np.asarray(going_on.valid).all()
    over = ended(going_on)
    np.testing.assert_array_equal(np.asarray(going_on.observation)[:, 1:, 1] == 0, over[:, :-1])
    assert (np.asarray(going_on.next_observation)[over][:, 1] > 0).all()


def test_parameters_are_leaves():
    environment, traces = Line(), 0

    @jax.jit
    def lengths(adapted):
        nonlocal traces
        traces += 1
        return jnp.sum(rollout(KEY, adapted, lambda o: jnp.asarray([0.0, 1.0]), batch=2, horizon=9).valid, 1)

    np.testing.assert_array_equal(lengths(GymnaxEnvironment(environment)), 3)
    np.testing.assert_array_equal(lengths(GymnaxEnvironment(environment, Parameters(2.0, 9))), 2)
    assert traces == 1
    many = Parameters(jnp.asarray([1.0, 4.0, 100.0]), jnp.asarray([9, 9, 6]))
    mapped = jax.vmap(lambda parameters: lengths(GymnaxEnvironment(environment, parameters)))(many)
    np.testing.assert_array_equal(mapped, [[1, 1], [4, 4], [6, 6]])


@pytest.mark.parametrize("final", [False, True])
def test_wrappers_of_gymnax_keep_their_own_step(final):
    environment = GymnaxEnvironment(Wrapper(Line(), final))
    t = steps_of(environment, [1, 1, 1, 1])
    expected = [[2, 2], [4, 4], [6, 6] if final else [0, 0], [2, 2]]
    np.testing.assert_array_equal(t.observation, expected)
    np.testing.assert_array_equal(t.terminated, [False, False, True, False])


def space(**fields):
    class Spaced(Line):
        def action_space(self, params):
            return SimpleNamespace(**fields)

    return Spaced()


def test_a_box_of_actions():
    box = GymnaxEnvironment(space(low=-2.0, high=np.ones(3), shape=(3,), dtype=jnp.float32)).action_space
    assert (box.shape, box.dtype, box.low.tolist()) == ((3,), np.float32, [-2, -2, -2])


def test_number_of_actions():
    assert GymnaxEnvironment(space(n=7)).num_actions == 7
    assert GymnaxEnvironment(space(n=np.int32(4))).num_actions == 4
    assert GymnaxEnvironment(space(n=jnp.int32(3))).num_actions == 3


class Short(Line):
    def step_env(self, key, state, action, params):
        return super().step_env(key, state, action, params)[:4]


class NoHash(Line):
    __hash__ = None  # type: ignore[assignment]


class Uncounted(Line):
    num_actions = None


@pytest.mark.parametrize(
    ("environment", "match"),
    [
        (object(), "environment: object has no method reset"),
        (SimpleNamespace(reset=print), "has no method step"),
        ((Line(), Parameters()), r"gymnax.make gives \(environment, parameters\)"),
        (Line, "environment: got the class Line"),
        (NoHash(), "has no hash"),
        (space(low=0, high=1), "environment: its actions"),
        (space(n=0), "number of actions"),
        (Uncounted(), "number of actions"),
    ],
)
def test_what_cannot_be_adapted(environment, match):
    with pytest.raises(bj.InputError, match=match):
        GymnaxEnvironment(environment)


def test_steps_of_other_numbers_of_values_are_refused():
    environment = GymnaxEnvironment(Short())
    with pytest.raises(bj.InputError, match="step returned 4 values"):
        environment.step(KEY, environment.reset(KEY), jnp.int32(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["CartPole-v1"])
def test_gymnax_itself(name):
    gymnax = pytest.importorskip("gymnax")
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        simulator, parameters = gymnax.make(name)
        environment = GymnaxEnvironment(simulator, parameters)
        probabilities = jnp.full(environment.num_actions, 1 / environment.num_actions)
        key = jax.random.key(0)
        t = rollout(key, environment, lambda _: probabilities, batch=5, horizon=20)
        # The same by gymnax's own methods, for one trajectory.
        simulate = jax.jit(simulator.step_env)
        own = trajectory_keys(key, 1, 3)[0]
        observation, state = simulator.reset_env(jax.random.fold_in(own, 0), parameters)
        for h in range(int(t.valid[3].sum())):
            np.testing.assert_allclose(t.observation[3, h], observation, rtol=1e-5, atol=1e-6)
            step_key = jax.random.split(jax.random.fold_in(own, h + 1))[1]
            observation, state, reward, done, *_ = simulate(step_key, state, t.action[3, h], parameters)
            np.testing.assert_allclose(t.next_observation[3, h], observation, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(t.reward[3, h], reward)
            assert bool(t.terminated[3, h]) == bool(done)
        again = rollout(key, AutoReset(TimeLimit(environment, 7)), lambda _: probabilities, batch=5, horizon=20)
        assert np.asarray(again.valid).all()


@pytest.mark.filterwarnings("ignore")
def test_continuous_actions_of_gymnax():
    gymnax = pytest.importorskip("gymnax")
    environment = GymnaxEnvironment(*gymnax.make("Pendulum-v1"))
    assert environment.action_space.shape == (1,)
    np.testing.assert_allclose([environment.action_space.low, environment.action_space.high], [[-2], [2]])
    with pytest.raises(bj.InputError, match="actions of GymnaxEnvironment are a Box"):
        environment.num_actions  # noqa: B018
