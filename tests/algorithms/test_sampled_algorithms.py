"""The algorithms that learn from samples: what each must allow, the published estimators in numpy, and descent."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import flat
from sampled_helpers import KEY, EndingGarnet, WholeGarnet, garnet, quick_jit, require_mean, setting

import bilevel_jax as bj
from bilevel_jax import replay
from bilevel_jax.agents import ActorCritic, Agent, ExactAgent, SoftPQN
from bilevel_jax.algorithms import (
    Reuse,
    attenuating_actor_critic,
    base,
    bc_hg,
    hpgd,
    naive,
    sobirl,
    two_policy_penalty,
    zero_order,
)
from bilevel_jax.algorithms.sampled.stoc_sobirl import stoc_sobirl
from bilevel_jax.core.functions import Table, tabulate
from bilevel_jax.environments import TabularPolicy, policy_table
from bilevel_jax.estimators import (
    Exact,
    LearnedCritic,
    LearnedModel,
    NestedRollouts,
    NoBaseline,
    OneStep,
    SharedRollouts,
    StateBaseline,
    sample_groups,
)

RATE = 0.3
OPTIMIZER = optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)
AGENT = ExactAgent()
PQN = SoftPQN(bj.networks.OneHot(5), processes=8, steps=10)
BATCH, HORIZON, PAIRS = 8, 20, 10


def with_response(response, **arguments):
    return lambda problem: sobirl(problem, OPTIMIZER, agent=AGENT, response=response, batch=BATCH, **arguments)


def other(make, **arguments):
    return lambda problem: make(problem, OPTIMIZER, agent=AGENT, batch=BATCH, **arguments)


@pytest.fixture(autouse=True, scope="module")
def _compile_quickly():
    """These tests compile much and run little."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# name -> (problem -> algorithm, steps of the simulator an iteration)
ALGORITHMS = {
    "sobirl, exact": (with_response(Exact()), BATCH * HORIZON),
    "sobirl, rollouts, state baseline": (
        with_response(NestedRollouts(6, visits=2), baseline=StateBaseline()),
        BATCH * HORIZON + BATCH * 2 * 2 * 6,
    ),
    "sobirl, shared rollouts, reuse": (
        with_response(SharedRollouts(6), reuse=Reuse(2)),
        BATCH * HORIZON + PAIRS * 6,
    ),
    "sobirl, one step, no baseline": (with_response(OneStep(), baseline=NoBaseline()), BATCH * HORIZON),
    "sobirl, learned model": (with_response(LearnedModel()), BATCH * HORIZON),
    "sobirl, learned critic": (with_response(LearnedCritic()), BATCH * HORIZON),
    "hpgd": (other(hpgd), BATCH * HORIZON),
    "bc_hg": (other(bc_hg), BATCH * HORIZON),
    "zero_order": (other(zero_order), 2 * BATCH * HORIZON),
    "naive": (other(naive), BATCH * HORIZON),
    # 125 iterations: batches of 8 125^(1/3) = 40 groups, rollouts of log(5) / log(2) = 2.3 steps.
    "stoc_sobirl": (
        lambda problem: stoc_sobirl(problem, 125, optimizer=OPTIMIZER, agent=AGENT),
        40 * HORIZON + PAIRS * 3,
    ),
    "attenuating_actor_critic": (
        lambda problem: attenuating_actor_critic(problem, OPTIMIZER, agent=ActorCritic(processes=8, steps=10), batch=8),
        2 * (8 * 10 + BATCH * HORIZON),
    ),
    "two_policy_penalty": (
        lambda problem: two_policy_penalty(problem, OPTIMIZER, agent=PQN, batch=8),
        2 * (8 * 10 + BATCH * HORIZON),
    ),
}


COSTLY = {"sobirl, shared rollouts, reuse", "sobirl, one step, no baseline", "sobirl, learned critic", "naive"}


def algorithm_of(name, problem=None):
    return ALGORITHMS[name][0](garnet() if problem is None else problem)


def run(algorithm, x, steps, key=KEY, rate=None):
    """The last state, and the infos."""
    state, infos = algorithm.init(key, x), []
    if rate is not None:
        state = with_rate(state, rate)
    for k in range(steps):
        state, info = algorithm.step(jax.random.fold_in(key, k), state)
        infos.append(info)
    return state, infos


def with_rate(state, rate):
    rate = jnp.asarray(rate, float)
    return eqx.tree_at(lambda s: s.optimizer_state.hyperparams["learning_rate"], state, rate)


# What every algorithm must allow.


@pytest.mark.often(8)
@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_protocol(name):
    """One compilation whatever the numbers; infos; same key, same bits; NaN is reported."""
    algorithm, x = algorithm_of(name), 0.1 * jax.random.normal(KEY, (5, 2))
    before = base.initial_state._cache_size(), base._step._cache_size()
    last, infos = run(algorithm, x, 3)
    warmer = algorithm_of(name, garnet(seed=1, temperature=0.8, price=0.2, discount=0.5))
    run(warmer, 2 * x, 1, jax.random.key(1), 0.1)
    assert base.initial_state._cache_size() <= before[0] + 1
    assert base._step._cache_size() <= before[1] + 1
    for info in infos:
        bj.check(info)
        assert int(info.transitions) == ALGORITHMS[name][1]
        np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(flat(info.gradient)), rtol=1e-12)
        assert (
            info.objective.shape
            == info.reports["effective_sample_size"].shape
            == info.reports["hyper-gradient estimate"].result.shape
            == ()
        )
    moved = run(algorithm, x, 1)[0].x
    np.testing.assert_allclose(moved, x - RATE * infos[0].gradient, rtol=1e-12)
    policy = policy_table(algorithm.policy(last), 5)
    np.testing.assert_allclose(np.sum(policy, 1), 1, rtol=1e-12)
    again, _ = run(algorithm, x, 3)
    jax.tree.map(np.testing.assert_array_equal, again, last)
    assert not np.array_equal(run(algorithm, x, 3, jax.random.key(1))[0].x, last.x)
    for bad in (jnp.full((5, 2), jnp.nan), x.at[3, 0].set(jnp.nan)):
        _, (info,) = run(algorithm, bad, 1)
        with pytest.raises(bj.ConvergenceError, match="hyper-gradient estimate"):
            bj.check(info)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sobirl, shared rollouts, reuse", "zero_order"])
def test_vmap_over_keys_and_learning_rates(name):
    algorithm, x = algorithm_of(name), 0.1 * jax.random.normal(KEY, (5, 2))
    rates, keys = jnp.array([0.0, 0.1, 0.3]), jax.random.split(KEY, 3)

    def train(key, rate):
        def step(state, k):
            return algorithm.step(jax.random.fold_in(key, k), state)

        return jax.lax.scan(step, with_rate(algorithm.init(key, x), rate), jnp.arange(2))

    last, infos = jax.jit(jax.vmap(train))(keys, rates)
    np.testing.assert_array_equal(last.x[0], x)
    for i in range(3):
        alone, alone_infos = run(algorithm, x, 2, keys[i], rates[i])
        np.testing.assert_allclose(last.x[i], alone.x, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(infos.objective[i], [info.objective for info in alone_infos], rtol=1e-9)


class TableAgent(Agent):
    """Solves the process of the simulator, of which it was told the transition, without the problem's help."""

    transition: Any

    def init(self, key, problem, x):
        del key
        return self.improve(None, None, problem, x)

    def improve(self, key, state, problem, x):
        del key, state
        reward = tabulate(problem.reward(x), self.transition.shape[-2]).values
        mdp = bj.MDP(self.transition, reward, problem.discount)
        return TabularPolicy(bj.solve(mdp, problem.regularizer(x)).policy)

    def policy(self, state, problem, x):
        del problem, x
        return state

    def environment_steps(self, problem):
        del problem
        return 0


@pytest.mark.slow
def test_x_may_be_a_dict():
    """The same numbers as with an array: a bonus split into two parts, one of which also costs."""
    like = garnet()

    def loss(key, x, trajectories):
        return like.loss(key, x["bonus"], trajectories)

    problem = bj.SampledBilevelProblem(
        like.environment,
        lambda x: like.base + x["bonus"] + x["more"][:, None],
        bj.ShannonEntropy(like.temperature),
        loss,
        discount=like.discount,
        loss_discount=like.discount,
        horizon=like.horizon,
    )
    agent = TableAgent(like.transition)
    response = NestedRollouts(4, visits=1)
    algorithm = sobirl(problem, OPTIMIZER, agent=agent, batch=4, response=response)
    x = {"bonus": 0.1 * jax.random.normal(KEY, (5, 2)), "more": jnp.zeros(5)}
    state, (info, _) = run(algorithm, x, 2)
    bj.check(info)
    assert jax.tree.structure(state.x) == jax.tree.structure(info.gradient) == jax.tree.structure(x)
    assert float(jnp.linalg.norm(info.gradient["more"])) > 0
    array = sobirl(like, OPTIMIZER, agent=AGENT, batch=4, response=response)
    _, (expected,) = run(array, x["bonus"], 1)
    np.testing.assert_allclose(info.gradient["bonus"], expected.gradient, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sobirl, shared rollouts, reuse", "sobirl, learned critic", "hpgd", "zero_order"])
def test_float32(name):
    def narrow(tree):
        return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)

    algorithm = algorithm_of(name, narrow(garnet()))
    algorithm = eqx.tree_at(lambda a: a.problem, algorithm, narrow(garnet()))
    start = jax.eval_shape(algorithm.init, KEY, jax.ShapeDtypeStruct((5, 2), jnp.float32))
    state, info = jax.eval_shape(algorithm.step, KEY, start)
    kinds = {path[-1]: leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path((state.x, state.memory, info))}
    floats = {str(path): dtype for path, dtype in kinds.items() if jnp.issubdtype(dtype, jnp.floating)}
    assert set(floats.values()) == {np.dtype("float32")}, floats
    assert jax.tree.map(lambda a: a.dtype, start.memory) == jax.tree.map(lambda a: a.dtype, state.memory)


# Estimators as they were published.


def estimate_on_a_batch(algorithm, x, memory=None):
    """What `estimate` returns, and the groups [N, H] that it drew."""

    def make(x, memory):
        state = algorithm.init(KEY, x)
        state = eqx.tree_at(lambda s: s.memory.agent, state, algorithm.improve_agent(KEY, state))
        if memory is not None:
            state = eqx.tree_at(lambda s: s.memory.estimator, state, memory)
        policy = algorithm.policy(state)
        groups = sample_groups(jax.random.split(KEY)[0], algorithm.problem, policy, algorithm.batch)
        return algorithm.estimate_from_samples(KEY, state), groups, policy_table(policy, 5)

    return jax.tree.map(np.asarray, quick_jit(make)(x, memory))


class Visit(dict):
    """Lists by state or by pair, and their means."""

    def add(self, at, value):
        self.setdefault(at, []).append(value)

    def means(self):
        return {at: np.mean(values, 0) for at, values in self.items()}


def every_visit(groups, costs, discount, size):
    """Means over all visits of a batch: cost-to-go and sums of dr, by pair and by state, |x|-wide, step by step."""
    q, v, dq, dv = Visit(), Visit(), Visit(), Visit()
    for b in range(len(costs)):
        upper, lower = 0.0, np.zeros(size)
        for h in reversed(range(costs.shape[1])):
            if not groups.valid[b, 0, h]:
                continue
            s, a = int(groups.observation[b, 0, h]), int(groups.action[b, 0, h])
            upper = costs[b, h] + discount * upper
            lower = np.eye(size)[s * 2 + a] + discount * lower
            q.add((s, a), upper)
            v.add(s, upper)
            dq.add((s, a), lower)
            dv.add(s, lower)
    return q.means(), v.means(), dq.means(), dv.means()


def batch_of(problem, x, groups):
    """costs [N, H] and d cost / dx [N, H, |x|] of the steps, 0 on those that are not valid."""
    s, a, valid = groups.observation[:, 0], groups.action[:, 0], groups.valid[:, 0]
    table = np.asarray(problem.cost + problem.price / 2 * x**2)
    slope = np.asarray(problem.price * x).reshape(-1)
    return np.where(valid, table[s, a], 0), np.where(valid[..., None], np.eye(10)[s * 2 + a] * slope, 0)


def summed(problem, groups, direct, term):
    """mean over trajectories of sum_h discount^h (direct + term(s, a) / temperature)."""
    total = np.zeros(10)
    for b, h in np.argwhere(groups.valid[:, 0]):
        s, a = int(groups.observation[b, 0, h]), int(groups.action[b, 0, h])
        total += float(problem.discount) ** h * (direct[b, h] + term(s, a) / float(problem.temperature))
    return total / len(direct)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, EndingGarnet], ids=["garnet", "ending"])
def test_hpgd_as_published(kind):
    problem = garnet() if kind is None else garnet(kind)
    x = 0.5 * jax.random.normal(KEY, (5, 2))
    made, groups, _ = estimate_on_a_batch(hpgd(problem, OPTIMIZER, agent=AGENT, batch=6), x)
    costs, direct = batch_of(problem, x, groups)
    q, v, dq, dv = every_visit(groups, costs, float(problem.discount), 10)
    expected = summed(problem, groups, direct, lambda s, a: (q[s, a] - v[s]) * (dq[s, a] - dv[s]))
    np.testing.assert_allclose(made.gradient.reshape(-1), expected, rtol=1e-9, atol=1e-12)
    factors = float(problem.discount) ** np.arange(HORIZON)
    np.testing.assert_allclose(made.value, np.mean(costs @ factors), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, EndingGarnet], ids=["garnet", "ending"])
def test_bc_hg_as_published(kind):
    """From a critic that knows something already."""
    problem = garnet() if kind is None else garnet(kind)
    x, rate, gamma = 0.5 * jax.random.normal(KEY, (5, 2)), 0.4, float(problem.discount)
    start = np.random.default_rng(0).normal(size=(5, 2))
    algorithm = bc_hg(problem, OPTIMIZER, agent=AGENT, batch=6, critic_step_size=rate)
    made, groups, policy = estimate_on_a_batch(algorithm, x, jnp.asarray(start))
    costs, direct = batch_of(problem, x, groups)
    targets, critic = Visit(), start.copy()
    for b, h in np.argwhere(groups.valid[:, 0]):
        s, a = groups.observation[b, 0], groups.action[b, 0]
        goes_on = h + 1 < HORIZON and groups.valid[b, 0, h + 1]
        targets.add((s[h], a[h]), costs[b, h] + (gamma * start[s[h + 1], a[h + 1]] if goes_on else 0))
    for at, values in targets.items():
        critic[at] += (1 - (1 - rate) ** len(values)) * (np.mean(values) - start[at])
    np.testing.assert_allclose(made.memory, critic, rtol=1e-10)
    advantage = critic - np.sum(policy * critic, 1, keepdims=True)
    _, _, dq, _ = every_visit(groups, costs, gamma, 10)
    expected = summed(problem, groups, direct, lambda s, a: advantage[s, a] * dq[s, a])
    np.testing.assert_allclose(made.gradient.reshape(-1), expected, rtol=1e-9, atol=1e-12)


class WholeEndingGarnet(EndingGarnet):
    """Pays for the whole at once, also where the process ended before its last step."""

    def loss(self, key, x, trajectories):
        paid = super().loss(key, x, trajectories)
        return paid @ self.discount ** jnp.arange(self.horizon, dtype=paid.dtype)


@pytest.mark.slow
def test_bc_hg_learns_from_a_loss_paid_after_the_end():
    """Processes that end early: the last step that was made has to pay for all of it."""
    problem = garnet(WholeEndingGarnet)
    algorithm = bc_hg(problem, OPTIMIZER, agent=AGENT, batch=6, critic_step_size=1.0)
    made, groups, _ = estimate_on_a_batch(algorithm, jnp.zeros((5, 2)))
    length = groups.valid[:, 0].sum(1)
    assert np.all(length < HORIZON)
    costs, _ = batch_of(problem, jnp.zeros((5, 2)), groups)
    whole = costs @ float(problem.discount) ** np.arange(HORIZON)
    targets = Visit()
    for b, h in np.argwhere(groups.valid[:, 0]):
        targets.add((groups.observation[b, 0, h], groups.action[b, 0, h]), whole[b] if h == length[b] - 1 else 0.0)
    expected = np.zeros((5, 2))
    for at, mean in targets.means().items():
        expected[at] = mean
    np.testing.assert_allclose(made.memory, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_zero_order_is_its_formula():
    problem, x, radius = garnet(), 0.5 * jax.random.normal(KEY, (5, 2)), 0.2
    algorithm = zero_order(problem, OPTIMIZER, agent=AGENT, batch=6, radius=radius)

    def make(x):
        state = algorithm.init(KEY, x)
        state = eqx.tree_at(lambda s: s.memory.agent, state, algorithm.improve_agent(KEY, state))
        return algorithm.estimate_from_samples(KEY, state), state.memory.agent[2]

    made, direction = quick_jit(make)(x)
    values = []
    for sign in (1, -1):
        at = x + sign * radius * direction
        policy = Table(bj.solve(problem.mdp(at), problem.regularizer(at)).policy)
        groups = quick_jit(sample_groups, static_argnums=3)(jax.random.split(KEY)[0], problem, policy, 6)
        costs, _ = batch_of(problem, at, jax.tree.map(np.asarray, groups))
        values.append(np.mean(costs @ float(problem.discount) ** np.arange(HORIZON)))
    np.testing.assert_allclose(made.gradient, (values[0] - values[1]) / (2 * radius) * direction, rtol=1e-8)
    np.testing.assert_allclose(made.value, np.mean(values), rtol=1e-10)
    assert abs(float(jnp.linalg.norm(direction)) - np.sqrt(10)) < 2


@pytest.mark.slow
def test_naive_is_the_direct_part():
    """E[dl/dx] under the policy taken for a constant: 1000 batches, p as in `sampled_helpers`."""
    at = setting()
    algorithm = naive(at.problem, OPTIMIZER, agent=AGENT, batch=8)
    solution = bj.solve(at.problem.mdp(at.x), at.problem.regularizer(at.x))
    expected = jax.grad(lambda x: at.problem.objective(x, solution))(at.x)

    def many(keys):
        state = algorithm.init(KEY, at.x)
        state = eqx.tree_at(lambda s: s.memory.agent, state, algorithm.improve_agent(KEY, state))
        return jax.lax.map(
            lambda key: algorithm.estimate_from_samples(key, state).gradient.reshape(-1), keys, batch_size=100
        )

    require_mean(quick_jit(many)(jax.random.split(KEY, 1000)), expected, 0.03, "naive")


# Descent.


def value_at(problem, x):
    return float(bj.hypergradient(problem, x, with_error=False).value)


@pytest.mark.slow
def test_descent():
    """From x = 0, with fixed seeds: the share of what exact gradient descent gains that each algorithm gains."""
    problem, x = garnet(), jnp.zeros((5, 2))

    def descend(x, _):
        return x - bj.hypergradient(problem, x, with_error=False).gradient, None

    best = quick_jit(lambda x: jax.lax.scan(descend, x, length=3000)[0])(x)
    start, end = value_at(problem, x), value_at(problem, best)
    assert float(optax.tree.norm(bj.hypergradient(problem, best, with_error=False).gradient)) < 1e-3
    share = {}
    for name in ALGORITHMS:
        last, _ = run(algorithm_of(name), x, 150, rate=0.06 if name == "zero_order" else 0.6)
        share[name] = (start - value_at(problem, last.x)) / (start - end)
    print(f"from {start:.3f} to {end:.3f}: {share}")
    for name, gained in share.items():
        if name == "naive":
            assert gained < 0.1  # all it sees is what bonuses cost: at 0 there are none
        else:
            assert gained > 0.5, name
    for name in ("sobirl, exact", "sobirl, learned model", "stoc_sobirl"):
        assert share[name] > 0.95, name


# Reuse.


@pytest.mark.slow
def test_reuse():
    """Where x stands still all weights are 1 and means go over the last three batches; those are kept in order."""
    problem, x = garnet(), 0.1 * jax.random.normal(KEY, (5, 2))
    plain = sobirl(problem, OPTIMIZER, agent=AGENT, response=SharedRollouts(6), batch=BATCH)
    again = algorithm_of("sobirl, shared rollouts, reuse", problem)
    _, alone = run(plain, x, 4, rate=0.0)
    state, infos = run(again, x, 4, rate=0.0)
    paid = np.array([float(info.objective) for info in alone])
    expected = [paid[max(0, k - 2) : k + 1].mean() for k in range(4)]
    np.testing.assert_allclose([float(info.objective) for info in infos], expected, rtol=1e-10)
    np.testing.assert_allclose([float(i.reports["effective_sample_size"]) for i in infos], [8, 16, 24, 24], rtol=1e-10)
    np.testing.assert_allclose([float(i.reports["effective_sample_size"]) for i in alone], 8)
    kept, there = replay.latest(state.memory.estimator[2])
    assert int(there.sum()) == 2
    for number, k in enumerate((3, 2)):
        key = jax.random.split(jax.random.split(jax.random.fold_in(KEY, k))[1])[0]
        groups = quick_jit(sample_groups, static_argnums=3)(key, problem, again.policy(state), BATCH)
        np.testing.assert_array_equal(kept.action[number], groups.action)
        np.testing.assert_allclose(kept.probability[number], groups.probability, rtol=1e-10)
    _, moving = run(again, x, 4, rate=1.0)
    sizes = np.array([float(info.reports["effective_sample_size"]) for info in moving])
    assert sizes[0] == 8
    assert np.all((sizes[1:] > 4) & (sizes[1:] < [15.9, 23.9, 23.9]))


@pytest.mark.slow
def test_reuse_by_hand():
    """The effective sample size and the objective after a step that moved x, from the weights in numpy."""
    problem, x = garnet(), 0.1 * jax.random.normal(KEY, (5, 2))
    algorithm = algorithm_of("sobirl, shared rollouts, reuse", problem)
    state, _ = run(algorithm, x, 1, rate=1.0)
    after, info = algorithm.step(jax.random.fold_in(KEY, 1), state)
    kept, _ = replay.latest(after.memory.estimator[2])
    new, old = (jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i]), kept) for i in (0, 1))
    policy = np.asarray(policy_table(algorithm.policy(after), 5))
    weights = np.prod(policy[old.observation[:, 0], old.action[:, 0]] / old.probability[:, 0], 1)
    weights = np.concatenate([np.ones(BATCH), np.minimum(weights, 10)])
    np.testing.assert_allclose(
        info.reports["effective_sample_size"], weights.sum() ** 2 / (weights**2).sum(), rtol=1e-9
    )
    factors = float(problem.discount) ** np.arange(HORIZON)
    paid = np.concatenate([batch_of(problem, state.x, groups)[0] @ factors for groups in (new, old)])
    np.testing.assert_allclose(info.objective, np.mean(weights * paid), rtol=1e-9)


# Bad input.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: other(hpgd)(garnet()).init(KEY, jnp.zeros((5, 2), int)), "floating"),
        (lambda: sobirl(garnet(), OPTIMIZER, agent=AGENT, response=Exact(), batch=0), "batch: .*at least 1"),
        (lambda: hpgd(garnet(), OPTIMIZER, agent=AGENT, batch=2.0), "batch: .*at least 1"),
        (lambda: bc_hg(garnet(), OPTIMIZER, agent=AGENT, critic_step_size=0.0), "critic_step_size must be above 0"),
        (lambda: zero_order(garnet(), OPTIMIZER, agent=AGENT, radius=-1.0), "radius must be above 0"),
        (lambda: Reuse(0), "batches: .*at least 1"),
        (lambda: Reuse(1, 0.0), "clip must be above 0"),
    ],
)
def test_input_errors(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()


@pytest.mark.slow
def test_a_loss_paid_as_a_whole():
    """Every algorithm takes it."""
    problem = garnet(WholeGarnet)
    for name in ("hpgd", "bc_hg", "zero_order", "naive", "sobirl, one step, no baseline", "attenuating_actor_critic"):
        algorithm = algorithm_of(name, problem)
        start = jax.eval_shape(algorithm.init, KEY, jax.ShapeDtypeStruct((5, 2), float))
        assert jax.eval_shape(algorithm.step, KEY, start)[1].objective.shape == ()
