"""Rollouts: laws of what they draw, the same bits however a batch is cut, what is refused.

Statistical tests compare with exact laws at a false alarm rate of 1e-6 each; keys are fixed, so that a test that
passes goes on passing.
"""

import functools

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import (
    DISCOUNT,
    ENDS,
    FALSE_ALARM,
    KEY,
    POLICY,
    PROCESS,
    Generic,
    Walk,
    assert_law,
    assert_same,
    chi_square,
    count,
    make_environment,
    part_of,
    plain,
    rollout,
    tabular,
    walk_policy,
)
from helpers import ACTIONS, STATES
from scipy import stats

import bilevel_jax as bj
from bilevel_jax.environments import (
    AutoReset,
    TabularEnvironment,
    TimeLimit,
    rollout_from,
    trajectory_keys,
)


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


@pytest.mark.slow
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
