"""Soft PQN against the exact solution, its targets against a loop, and its bookkeeping."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.agents import LinearDecay, SoftPQN, policy_gap
from bilevel_jax.agents.deep.learning import Episodes, Optimizer, minibatch_steps, returns_with_traces, values_ahead
from bilevel_jax.agents.processes import simulator
from bilevel_jax.environments import Processes, Trajectory, collect

KEY = jax.random.key(0)
TABLE = bj.networks.OneHot(8)


def small(**options):
    return SoftPQN(TABLE, **({"processes": 8, "steps": 16, "epochs": 2, "minibatches": 2} | options))


@pytest.fixture(scope="module")
def garnet():
    problem = bj.problems.make("garnet", horizon=40)
    return problem, problem.start(KEY)


def improved(agent, problem, x, times, state=None, key=KEY):
    state = agent.init(key, problem, x) if state is None else state
    improve = jax.jit(lambda key, state, x: agent.improve(key, state, problem, x))
    for k in jax.random.split(key, times):
        state = improve(k, state, x)
    return state


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize("trace", [0.0, 0.9])
@pytest.mark.parametrize(
    ("dtype", "regularizer"),
    [
        (jnp.float64, bj.ShannonEntropy(0.5)),
        (jnp.float32, bj.ShannonEntropy(0.5)),
        (jnp.float64, bj.KLDivergence(0.5, jnp.array([0.6, 0.3, 0.1]))),
        (jnp.float64, bj.TsallisEntropy(1.0)),
    ],
)
def test_agrees_with_the_exact_solution(trace, dtype, regularizer):
    """The untrained gap is 0.1 to 0.5; what is left is the noise of the last learning rate."""
    with jax.enable_x64(dtype == jnp.float64):
        garnet = bj.problems.make("garnet", horizon=40)
        problem = _With(garnet, jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), regularizer))
        x = garnet.start(KEY)
        exact = bj.solve(garnet.mdp(x), problem.regularizer(x))
        agent = SoftPQN(
            TABLE,
            processes=64,
            steps=32,
            updates=20,
            epsilon=0.3,
            trace=trace,
            learning_rate=LinearDecay(0.03, 1e-3, 250),
        )
        state = agent.init(KEY, problem, x)
        before = policy_gap(agent.policy(state, problem, x), exact.policy)
        state = improved(agent, problem, x, 15, state)
        after = policy_gap(agent.policy(state, problem, x), exact.policy)
        assert after.dtype == dtype
        assert float(before) > 0.05
        assert float(after) < 2e-3
        q = jax.vmap(lambda s: TABLE.apply(state.params, s))(jnp.arange(8))
        assert float(jnp.abs(q - exact.q).max()) < 0.03 * float(jnp.abs(exact.q).max())


class _With(bj.bilevel.wrapper.WrappedSimulator):
    own: bj.Regularizer

    def regularizer(self, x):
        return self.own


@pytest.mark.slow
def test_follows_x_from_where_it_was(garnet):
    problem, x = garnet
    agent = SoftPQN(TABLE, processes=64, steps=32, updates=20, epsilon=0.3, learning_rate=0.01)
    state = improved(agent, problem, x, 10)
    moved = x + 0.3 * jax.random.normal(jax.random.key(5), x.shape)
    exact = bj.solve(problem.mdp(moved), problem.regularizer(moved)).policy
    warm = improved(agent, problem, moved, 2, state)
    cold = improved(agent, problem, moved, 2)
    gaps = [float(policy_gap(agent.policy(s, problem, moved), exact)) for s in (state, warm, cold)]
    assert gaps[1] < 0.2 * gaps[0]
    assert gaps[1] < 0.5 * gaps[2]


def test_targets_against_a_loop():
    rng = np.random.default_rng(0)
    batch, horizon, discount = 5, 7, 0.9
    rewards, following, taken = (rng.normal(size=(batch, horizon)) for _ in range(3))
    trace = rng.uniform(size=(batch, horizon))
    terminated, truncated = rng.random((batch, horizon)) < 0.2, rng.random((batch, horizon)) < 0.2
    seen = Trajectory(
        None, None, None, None, None, None, jnp.asarray(terminated), jnp.asarray(truncated & ~terminated), None
    )
    got = returns_with_traces(
        jnp.asarray(rewards),
        seen,
        jnp.asarray(following),
        jnp.asarray(taken),
        jnp.asarray(discount),
        jnp.asarray(trace),
    )
    for b in range(batch):
        ahead = None
        for t in reversed(range(horizon)):
            beyond = following[b, t]
            if ahead is not None and not (terminated[b, t] or truncated[b, t]):
                beyond += trace[b, t] * (ahead - taken[b, t])
            ahead = rewards[b, t] + (0 if terminated[b, t] else discount * beyond)
            np.testing.assert_allclose(got[b, t], ahead, rtol=1e-12)


@pytest.mark.parametrize("horizon", [3, 40])
def test_values_of_acting_are_those_of_the_next_observations(horizon):
    """With horizon 3, a third of the steps is cut off: more than one chunk of them goes through the network."""
    environment = bj.environments.classic.CartPole()
    problem, x = bj.problems.Task(environment, temperature=0.1, horizon=horizon), jnp.zeros(())
    agent = SoftPQN(bj.networks.MLP(width=8), processes=8, steps=16, epsilon=0.2)

    def both(key):
        state = agent.init(key, problem, x)
        processes = Processes(simulator(problem, None), state.processes)
        seen = collect(key, processes, agent.acting(state, problem, x), 16, with_distributions=True)[1]

        def values(observations):
            return agent._values(state.params, observations)

        bare = seen._replace(distribution=None)
        learned = [agent.learn(key, state, problem, x, own, all_valid=True).params for own in (seen, bare)]
        return values_ahead(values, seen), values_ahead(values, bare), seen, learned

    ahead, again, seen, learned = jax.jit(jax.vmap(both))(jax.random.split(KEY, 3))
    used = ~np.asarray(seen.terminated)
    assert np.asarray(seen.truncated).any()
    assert used.all() == (horizon == 3)
    np.testing.assert_allclose(np.asarray(ahead)[used], np.asarray(again)[used], rtol=1e-10, atol=1e-12)
    for one, other in zip(*map(jax.tree.leaves, learned), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-7, atol=1e-10)


def test_returns_of_episodes_against_a_loop():
    rng = np.random.default_rng(1)
    rewards, ends = rng.normal(size=(3, 30)), rng.random((3, 30)) < 0.2
    seen = [
        Trajectory(None, None, None, None, jnp.asarray(r), None, jnp.asarray(e), jnp.zeros_like(e), jnp.ones_like(e))
        for r, e in zip(np.split(rewards, 3, 1), np.split(ends, 3, 1), strict=True)
    ]
    episodes, running, count, first = Episodes.start(3), np.zeros(3), 0, np.ones(3, bool)
    assert np.isnan(episodes.mean_return)
    for part, piece in enumerate(seen):
        episodes = episodes.after(piece)
        made = []
        for t in range(10 * part, 10 * part + 10):
            running += rewards[:, t]
            for b in range(3):
                if ends[b, t]:
                    made += [] if first[b] else [running[b]]
                    running[b], first[b] = 0, False
        count += len(made)
        np.testing.assert_allclose(episodes.mean_return, np.mean(made))
        assert int(episodes.count) == count


@pytest.mark.slow
def test_seeds_under_vmap_are_single_runs(garnet):
    problem, x = garnet
    agent = small(updates=3)
    keys = jax.random.split(KEY, 3)

    def run(key):
        state = agent.init(key, problem, x)
        return agent.improve(key, state, problem, x)

    many = jax.jit(jax.vmap(run))(keys)
    for k, key in enumerate(keys):
        one = jax.jit(run)(key)
        for got, want in zip(jax.tree.leaves(many), jax.tree.leaves(one), strict=True):
            if not jnp.issubdtype(want.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(got[k], want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_second_call_does_not_compile_again(garnet):
    problem, x = garnet
    traces = []

    @jax.jit
    def improve(agent, key, state, problem, x):
        traces.append(1)
        return agent.improve(key, state, problem, x)

    agent = small()
    state = agent.init(KEY, problem, x)
    for rate in (1e-3, 2e-3, 3e-3):
        state = improve(small(learning_rate=rate), KEY, state, problem, x)
    assert len(traces) == 1
    assert int(state.updates) == 3


def test_exploring_is_unbiased_for_what_it_learns(garnet):
    """Traces are cut by min(1, pi / mu): of an action that the policy never takes, nothing follows it but V."""
    problem, x = garnet
    agent = small(epsilon=1.0)
    state = agent.init(KEY, problem, x)
    distribution = agent.acting(state, problem, x).distribution(0)
    np.testing.assert_allclose(distribution.probabilities, 1 / 3)


@pytest.mark.parametrize("rule", ["adam", "radam"])
def test_the_optimizer_finds_a_minimum(rule):
    optimizer = Optimizer(LinearDecay(0.1, 1e-4, 400), 10.0, rule)
    params = {"a": jnp.array([3.0, -2.0]), "b": jnp.array(1.0, jnp.float32)}
    state = optimizer.init(params)

    def loss(params):
        return jnp.sum(params["a"] ** 2) + (params["b"].astype(jnp.float64) - 2) ** 2

    @jax.jit
    def step(k, params, state):
        return optimizer.update(jax.grad(loss)(params), state, params, k)[:2]

    for k in range(400):
        params, state = step(jnp.asarray(k), params, state)
    assert float(loss(params)) < 1e-5
    assert params["b"].dtype == jnp.float32


def test_gradients_are_clipped():
    optimizer = Optimizer(1.0, 0.5, "adam")
    params = jnp.zeros(2)
    state = optimizer.init(params)
    _, after, norm = optimizer.update(jnp.array([3.0, 4.0]), state, params, jnp.asarray(0))
    assert float(norm) == 5
    np.testing.assert_allclose(after.mu, 0.1 * np.array([0.3, 0.4]))


def test_minibatches_go_through_all_data_once_an_epoch():
    data = jnp.arange(12)

    def step(seen, batch):
        return seen.at[batch].add(1), jnp.asarray(batch.shape[0], float)

    seen, size = minibatch_steps(KEY, jnp.zeros(12, jnp.int32), data, step, epochs=3, minibatches=4)
    assert seen.tolist() == [3] * 12
    assert float(size) == 3


@pytest.mark.slow
def test_reports_numbers_of_the_last_update(garnet):
    problem, x = garnet
    agent = small(updates=4)
    state = agent.init(KEY, problem, x)
    assert all(np.isnan(number) for number in agent.report(state).values())
    made = agent.report(improved(agent, problem, x, 1, state))
    assert set(made) == {"loss", "q", "entropy", "gradient_norm", "episode_return", "episode_length"}
    assert all(np.isfinite(number) for number in made.values())
    assert float(made["episode_length"]) == 40  # the problem's horizon
    assert agent.environment_steps(problem) == 8 * 16 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"processes": 0}, "processes"),
        ({"minibatches": 3}, "minibatches: 8 processes of 16 steps are 128"),
        ({"trace": 1.5}, "trace"),
        ({"epsilon": -0.1}, "epsilon"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"max_gradient_norm": 0.0}, "max_gradient_norm"),
        ({"optimizer": "sgd"}, "adam or radam, got 'sgd'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(bj.InputError, match=message):
        small(**options)


@pytest.mark.slow
def test_rewards_of_the_environment_count_by_their_weight(garnet):
    """Agents with tables refuse them: they would learn another problem."""
    problem, x = garnet
    weighted = _Weighted(bj.problems.garnet.GarnetOptions(horizon=40))
    processes = bj.environments.start_processes(KEY, simulator(problem, None), 3)
    _, seen = bj.environments.collect(KEY, processes, jnp.full((8, 3), 1 / 3), 10)
    own = x[seen.observation, seen.action] + problem.base[seen.observation, seen.action]
    np.testing.assert_allclose(problem.earned(x, seen), own, rtol=1e-12)
    np.testing.assert_allclose(weighted.earned(x, seen), own + 2 * seen.reward, rtol=1e-12)
    for other in (bj.agents.SoftQLearning(), bj.agents.ActorCritic(), bj.agents.SampledPolicyIteration()):
        with pytest.raises(bj.InputError, match="learns from reward"):
            other.init(KEY, weighted, x)


class _Weighted(bj.problems.garnet.Garnet):
    def environment_reward_weight(self):
        return jnp.asarray(2.0)
