"""Agents that learn from samples: they find pi*, follow x, and are functions of their arguments."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import make_mdp, make_regularizer, random_process

import bilevel_jax as bj
from bilevel_jax.agents import (
    Agent,
    ByVisits,
    ExactAgent,
    Polynomial,
    SampledPolicyIteration,
    SoftQLearning,
    SoftSARSA,
    policy_gap,
)
from bilevel_jax.environments import (
    AutoReset,
    Discrete,
    Environment,
    TabularEnvironment,
    TabularPolicy,
    TimeLimit,
    TimeStep,
    policy_table,
)

KEY = jax.random.key(0)
STATES, ACTIONS = 6, 3
ONE_HOT = np.eye(STATES)
SMALL = {"processes": 8, "steps": 5, "restart_every": 12}
AGENTS = {
    "q": SoftQLearning,
    "sarsa": SoftSARSA,
    "expected_sarsa": functools.partial(SoftSARSA, expected=True),
    "linear_q": functools.partial(SoftQLearning, features=ONE_HOT),
    "linear_sarsa": functools.partial(SoftSARSA, features=ONE_HOT),
    "policy_iteration": SampledPolicyIteration,
}


def as_is(x):
    return x


def no_loss(key, x, trajectories):
    return jnp.zeros(())


class Lower:
    """A random lower level: the sampled problem, whose x is the reward, and its exact solution."""

    def __init__(self, seed=0, kind="shannon", discount=0.8, dtype=np.float64, environment=None):
        process = random_process(seed)
        mdp = make_mdp(process, discount, "successor")
        self.mdp = jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == float else leaf, mdp)
        reference = process.reference.astype(dtype)
        self.regularizer = make_regularizer(kind, dtype(0.5), reference)
        self.x = self.mdp.reward
        self.problem = sampled(
            TabularEnvironment(self.mdp) if environment is None else environment(self.mdp),
            as_is,
            self.regularizer,
            jnp.asarray(discount, dtype),
        )

    def optimal(self, x=None):
        x = self.x if x is None else x
        return bj.check(bj.solve(self.mdp.replace(reward=x), self.regularizer)).policy


def sampled(environment, reward, regularizer, discount, horizon=20):
    if isinstance(regularizer, bj.TsallisEntropy):  # estimators refuse it, agents need not
        problem = sampled(environment, reward, bj.ShannonEntropy(1.0), discount, horizon)
        return eqx.tree_at(lambda p: p._regularizer, problem, regularizer)
    return bj.SampledBilevelProblem(environment, reward, regularizer, no_loss, discount=discount, horizon=horizon)


@jax.jit
def start(agent, key, problem, x):
    return agent.init(key, problem, x)


@jax.jit
def improve(agent, key, state, problem, x):
    return agent.improve(key, state, problem, x)


def table(agent, state, problem, x):
    return policy_table(agent.policy(state, problem, x), STATES)


@jax.jit
def improve_often(agent, key, state, problem, x, times):
    def body(k, state):
        return agent.improve(jax.random.fold_in(key, k), state, problem, x)

    return jax.lax.fori_loop(0, times, body, state)


def gap_after(agent, lower, times, key=KEY, x=None, state=None):
    x = lower.x if x is None else x
    state = start(agent, key, lower.problem, x) if state is None else state
    state = improve_often(agent, key, state, lower.problem, x, times)
    return float(policy_gap(agent.policy(state, lower.problem, x), lower.optimal(x)))


def together(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
@functools.partial(jax.vmap, in_axes=(None, None, 0, 0, 0, None))
def gaps_after(agent, key, problem, x, optimal, times):
    state = improve_often(agent, key, start(agent, key, problem, x), problem, x, times)
    return policy_gap(table(agent, state, problem, x), optimal)


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", AGENTS)
def test_converges_to_the_optimal_policy(name):
    # Three processes of 18 pairs; 12 and 192 times 512 steps of the simulator.
    agent, lowers = AGENTS[name](processes=32, steps=16, epsilon=0.02), [Lower(seed) for seed in range(3)]
    problem, x, optimal = together(*((lower.problem, lower.x, lower.optimal()) for lower in lowers))
    steps = agent.environment_steps(lowers[0].problem)
    early, late = (gaps_after(agent, KEY, problem, x, optimal, times * 512 // steps) for times in (12, 192))
    assert (late < 1e-3).all()
    assert early.mean() > 3 * late.mean()


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "tsallis"])
@pytest.mark.parametrize("name", ["q", "expected_sarsa", "policy_iteration"])
def test_other_regularizers(name, kind):
    lower = Lower(1, kind)
    assert gap_after(AGENTS[name](processes=32, steps=16, epsilon=0.02), lower, 150) < 2e-3


@pytest.mark.slow
def test_sarsa_under_kl():
    assert gap_after(SoftSARSA(processes=32, steps=16), Lower(1, "kl"), 200) < 2e-3


@pytest.mark.slow
def test_an_action_that_the_reference_forbids_is_never_taken():
    lower = Lower(0, "kl")
    reference = lower.regularizer.reference.at[:, 1].set(0)
    regularizer = bj.KLDivergence(0.5, reference / reference.sum(-1, keepdims=True))
    problem = sampled(lower.problem.environment, as_is, regularizer, 0.8)
    for agent in (SoftSARSA(epsilon=0.5, **SMALL), SoftQLearning(epsilon=0.5, **SMALL)):
        state = improve(agent, KEY, start(agent, KEY, problem, lower.x), problem, lower.x)
        assert (state.learned.visits[:, 1] == 0).all()
        assert (state.learned.visits[:, 0] > 0).any()
        assert np.isfinite(state.learned.parameters).all()
        assert (agent.policy(state, problem, lower.x).probabilities[:, 1] == 0).all()


@pytest.mark.slow
def test_sarsa_without_exploration_is_q_learning():
    # Q - temperature log pi is Omega*(Q) for every action.
    lower, states = Lower(), []
    for agent in (SoftQLearning(epsilon=0.0), SoftSARSA(epsilon=0.0), SoftSARSA(epsilon=0.0, expected=True)):
        states.append(improve(agent, KEY, start(agent, KEY, lower.problem, lower.x), lower.problem, lower.x))
    for state in states[1:]:
        np.testing.assert_array_equal(state.learned.visits, states[0].learned.visits)
        np.testing.assert_allclose(state.learned.parameters, states[0].learned.parameters, rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("expected", [False, True])
def test_sarsa_learns_the_values_of_the_exploring_policy(expected):
    epsilon, lower = 0.5, Lower()
    agent = SoftSARSA(processes=64, steps=512, epsilon=epsilon, expected=expected)
    state = start(agent, KEY, lower.problem, lower.x)
    for k in range(6):
        state = improve(agent, jax.random.fold_in(KEY, k), state, lower.problem, lower.x)
    q = np.zeros((STATES, ACTIONS))
    for _ in range(400):
        mixture = (1 - epsilon) * np.asarray(lower.regularizer.policy(jnp.asarray(q))) + epsilon / ACTIONS
        value = (mixture * (q - 0.5 * np.log(mixture))).sum(-1)
        q = np.asarray(lower.x + 0.8 * lower.mdp.transition.expect(jnp.asarray(value)))
    np.testing.assert_allclose(lower.x + state.learned.parameters, q, atol=0.1)
    optimal = bj.solve(lower.mdp, lower.regularizer).q
    assert np.abs(q - optimal).min() > 0.15  # the test above tells the two apart


def test_one_step_by_hand():
    # One process, one step: a pair's Q moves by alpha times its temporal difference, all others stay.
    lower = Lower()
    agent = SoftQLearning(processes=1, steps=1, step_size=0.25, initial_value=2.0)
    before = start(agent, KEY, lower.problem, lower.x)
    after = improve(agent, KEY, before, lower.problem, lower.x)
    ((s, a),) = np.argwhere(np.asarray(after.learned.visits))
    assert s == int(before.processes[0][0])
    following = int(after.processes[0][0])
    q = np.asarray(lower.x) + 0.8 * 2
    target = lower.x[s, a] + 0.8 * lower.regularizer.conjugate(jnp.asarray(q[following]))
    q[s, a] += 0.25 * (float(target) - q[s, a])
    np.testing.assert_allclose(lower.x + after.learned.parameters, q, rtol=1e-12)


@pytest.mark.slow
def test_one_hot_features_are_a_table():
    # At reward 0 both start from Q = 0, and take the same steps, batches that meet at a pair included.
    lower = Lower()
    x = jnp.zeros_like(lower.x)
    options = {"processes": 32, "steps": 20, "step_size": ByVisits(Polynomial(power=0.7))}
    tabular = SoftQLearning(initial_value=0.0, **options)
    linear = SoftQLearning(features=ONE_HOT, **options)
    function = SoftQLearning(features=lambda s: jax.nn.one_hot(s, STATES), **options)
    states = [improve(a, KEY, start(a, KEY, lower.problem, x), lower.problem, x) for a in (tabular, linear, function)]
    for state in states[1:]:
        np.testing.assert_array_equal(state.learned.visits, states[0].learned.visits)
        np.testing.assert_allclose(state.learned.parameters, states[0].learned.parameters, rtol=1e-9)


@pytest.mark.slow
def test_features_that_can_represent_q_find_it():
    # Four features, the values of which lie in their span: every row of Q is a mixture of four.
    rng = np.random.default_rng(0)
    features = rng.dirichlet(np.ones(4), STATES)
    lower = Lower()
    # Successors and rewards that depend on the state through the features only: a linear MDP.
    transition = np.einsum("sf,fat->sat", features, rng.dirichlet(np.ones(STATES), (4, ACTIONS)))
    mdp = bj.MDP(transition, features @ rng.normal(size=(4, ACTIONS)), 0.7)
    problem = sampled(TabularEnvironment(mdp), as_is, lower.regularizer, 0.7)
    agent = SoftQLearning(features=features, processes=32, steps=64)
    state = improve_often(agent, KEY, start(agent, KEY, problem, mdp.reward), problem, mdp.reward, 200)
    policy = table(agent, state, problem, mdp.reward)
    assert policy_gap(policy, bj.solve(mdp, lower.regularizer).policy) < 1e-3


def chain(mdp):
    """The MDP with an end: action 0 in state 0, in which the process starts often."""
    discount = jnp.full(mdp.reward.shape, mdp.discount).at[0, 0].set(0).at[3].set(0)
    return mdp.replace(discount=discount)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "linear_sarsa", "policy_iteration"])
def test_nothing_follows_an_end(name):
    lower = Lower(0)
    lower.mdp = chain(lower.mdp)
    lower.problem = sampled(TabularEnvironment(lower.mdp), as_is, lower.regularizer, 0.8)
    assert gap_after(AGENTS[name](processes=32, steps=64, epsilon=0.02), lower, 100) < 1e-3


@pytest.mark.slow
def test_four_rooms():
    # 208 states, discount 0.99, ends at the goals: pi* is far from uniform, and much nearer after learning.
    problem = bj.problems.make("four_rooms")
    x = problem.start(KEY)
    optimal = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
    agent = SampledPolicyIteration()
    state = start(agent, KEY, problem, x)
    gaps = [float(policy_gap(agent.policy(state, problem, x), optimal))]
    for times in (8, 24):
        state = improve_often(agent, jax.random.fold_in(KEY, times), state, problem, x, times)
        gaps.append(float(policy_gap(agent.policy(state, problem, x), optimal)))
    assert gaps[0] > 0.4
    assert gaps[1] < 0.25
    assert gaps[2] < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "linear_sarsa", "policy_iteration"])
def test_a_warm_start_is_nearer(name):
    agent, warm, cold = AGENTS[name](processes=32, steps=16, epsilon=0.02), [], []
    for seed in range(3):
        lower = Lower(seed)
        key = jax.random.fold_in(KEY, seed)
        state = improve_often(agent, key, start(agent, key, lower.problem, lower.x), lower.problem, lower.x, 50)
        moved = lower.x + 0.02 * jax.random.normal(key, lower.x.shape)
        warm.append(gap_after(agent, lower, 1, jax.random.fold_in(key, 1), moved, state))
        cold.append(gap_after(agent, lower, 1, jax.random.fold_in(key, 1), moved))
    assert np.mean(warm) < np.mean(cold) / 3


@pytest.mark.slow
def test_processes_go_on_and_are_restarted():
    lower = Lower()
    agent = SoftQLearning(processes=8, steps=5, restart_every=12)
    state = start(agent, KEY, lower.problem, lower.x)
    np.testing.assert_array_equal(state.processes[1], np.arange(8) * 12 // 8)
    after = improve(agent, KEY, state, lower.problem, lower.x)
    np.testing.assert_array_equal(after.processes[1], (np.arange(8) * 12 // 8 + 5) % 12)
    again = improve(agent, KEY, after, lower.problem, lower.x)
    np.testing.assert_array_equal(again.processes[1], (np.arange(8) * 12 // 8 + 10) % 12)
    assert again.learned.visits.sum() == 80
    assert again.learned.steps == 10
    assert agent.environment_steps(lower.problem) == 40
    assert SampledPolicyIteration(improvements=3, **SMALL).environment_steps(lower.problem) == 120


@pytest.mark.slow
def test_keep_ages_the_counts():
    lower = Lower()
    agent = SoftQLearning(keep=0.5, **SMALL)
    state = improve(agent, KEY, start(agent, KEY, lower.problem, lower.x), lower.problem, lower.x)
    after = improve(agent, KEY, state, lower.problem, lower.x)
    assert after.learned.visits.sum() == (state.learned.visits // 2).sum() + 40
    assert after.learned.steps == 2 + 5


@pytest.mark.slow
def test_many_processes_at_a_pair_are_stable():
    # One state, one action: all 256 processes correct the same number.
    mdp = bj.MDP(np.ones((1, 1, 1)), np.ones((1, 1)), 0.5)
    problem = sampled(TabularEnvironment(mdp), as_is, bj.ShannonEntropy(1.0), 0.5)
    for options in ({"step_size": 1.0}, {}, {"features": 3 * np.ones((1, 1))}):
        agent = SoftQLearning(processes=256, steps=60, **options)
        state = improve(agent, KEY, start(agent, KEY, problem, mdp.reward), problem, mdp.reward)
        q = state.learned.parameters * 3 if "features" in options else 1 + state.learned.parameters
        np.testing.assert_allclose(q, 2, rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step_size",
    [
        0.2,
        Polynomial(0.5, 100.0, 0.6),
        optax.exponential_decay(0.5, 200, 0.9),
        ByVisits(optax.linear_schedule(1.0, 0.01, 300)),
    ],
    ids=["number", "polynomial", "optax", "optax by visits"],
)
def test_step_sizes(step_size):
    lower = Lower()
    agent = SoftQLearning(processes=16, steps=32, step_size=step_size)
    assert gap_after(agent, lower, 100) < 0.02
    if isinstance(step_size, Polynomial):
        linear = SoftQLearning(processes=16, steps=32, step_size=step_size, features=ONE_HOT)
        assert gap_after(linear, lower, 100) < 0.02


def test_polynomial():
    schedule = Polynomial(0.5, 10.0, 2.0)
    np.testing.assert_allclose(jax.vmap(schedule)(jnp.array([0, 10, 90])), [0.5, 0.125, 0.005])


class Walk(Environment):
    """States are points of an interval, seen as [position, 1]."""

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jax.random.uniform(key, minval=-1, maxval=1)

    def observe(self, state):
        return jnp.stack([state, jnp.ones_like(state)])

    def step(self, key, state, action):
        del key
        following = jnp.clip(state + jnp.where(action == 0, -0.25, 0.25), -1, 1)
        no = jnp.zeros((), bool)
        return following, TimeStep(self.observe(following), jnp.zeros(()), no, no)


WALK = {"environment": lambda mdp: Walk()}


def bins(observation):
    return jax.nn.one_hot(jnp.round(4 * observation[0]).astype(jnp.int32) + 4, 9)


@pytest.mark.slow
def test_other_simulators_with_features():
    # Reward for being on the right: the policy goes there.
    regularizer = bj.ShannonEntropy(0.1)
    problem = sampled(Walk(), lambda x: lambda observation, action: x * observation[0], regularizer, 0.8)
    x = jnp.asarray(1.0)
    for agent in (SoftQLearning(features=as_is, keep=0.0), SoftSARSA(features=bins, keep=0.0)):
        state = improve_often(agent, KEY, start(agent, KEY, problem, x), problem, x, 10)
        policy = jax.jit(lambda s, agent=agent: agent.policy(s, problem, x))(state)
        assert policy.distribution(jnp.array([0.3, 1.0])).probabilities[1] > 0.9
        left = improve_often(agent, KEY, state, problem, -x, 50)
        assert agent.policy(left, problem, -x).distribution(jnp.array([0.3, 1.0])).probabilities[0] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "policy_iteration"])
def test_wrapped_tables_are_tables(name):
    lower = Lower(environment=lambda mdp: AutoReset(TimeLimit(TabularEnvironment(mdp), 7)))
    agent = AGENTS[name](**SMALL)
    state = improve(agent, KEY, start(agent, KEY, lower.problem, lower.x), lower.problem, lower.x)
    assert isinstance(agent.policy(state, lower.problem, lower.x), TabularPolicy)


@pytest.mark.parametrize("name", AGENTS)
class TestEveryAgent:
    @pytest.mark.few(1)
    def test_keeps_the_protocol(self, name):
        agent, lower = AGENTS[name](**SMALL), Lower()
        assert isinstance(agent, Agent)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(agent))
        state = start(agent, KEY, lower.problem, lower.x)
        after = improve(agent, KEY, state, lower.problem, lower.x)
        before, then = (jax.tree.map(lambda a: (a.shape, a.dtype, a.weak_type), tree) for tree in (state, after))
        assert before == then
        rows = table(agent, after, lower.problem, lower.x)
        np.testing.assert_allclose(rows.sum(-1), 1)

    @pytest.mark.few(2)
    def test_same_key_same_bits(self, name):
        agent, lower = AGENTS[name](**SMALL), Lower()
        runs = [improve(agent, k, start(agent, k, lower.problem, lower.x), lower.problem, lower.x) for k in (KEY, KEY)]
        jax.tree.map(np.testing.assert_array_equal, *runs)
        other = improve(agent, jax.random.key(1), runs[0], lower.problem, lower.x)
        third = improve(agent, jax.random.key(2), runs[0], lower.problem, lower.x)
        assert not np.array_equal(jax.tree.leaves(other)[0], jax.tree.leaves(third)[0])

    @pytest.mark.slow
    def test_new_numbers_do_not_recompile(self, name):
        lower = Lower()
        sizes = []
        for number in (0.1, 0.2, 0.3):
            agent = AGENTS[name](**(SMALL | {"epsilon": number, "restart_every": int(100 * number)}))
            state = start(agent, KEY, lower.problem, lower.x)
            improve(agent, KEY, improve(agent, KEY, state, lower.problem, lower.x), lower.problem, number * lower.x)
            sizes.append(improve._cache_size())
        assert sizes[1:] == sizes[:-1]

    @pytest.mark.parametrize("argument", ["processes", "steps"])
    @pytest.mark.parametrize("bad", [0, -1, 2.5, True])
    def test_sizes(self, name, argument, bad):
        with pytest.raises(bj.InputError, match=f"{argument}: expected an integer of at least 1, got {bad}"):
            AGENTS[name](**{argument: bad})

    @pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan])
    def test_epsilon(self, name, bad):
        with pytest.raises(bj.InputError, match=f"epsilon must be from 0 to 1, got {bad}; 0 acts by"):
            AGENTS[name](epsilon=bad)

    def test_restart_every(self, name):
        with pytest.raises(bj.InputError, match="restart_every must be at least 1, got 0; None is the problem's"):
            AGENTS[name](restart_every=0)
        with pytest.raises(bj.InputError, match=r"restart_every: expected a whole number of steps, got 1\.5"):
            AGENTS[name](restart_every=1.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "linear_sarsa", "policy_iteration"])
def test_vmap_over_keys_and_numbers_is_singles(name):
    lower, keys = Lower(), jax.random.split(KEY, 3)
    epsilons = jnp.array([0.1, 0.2, 0.3])

    def run(key, epsilon):
        agent = eqx.tree_at(lambda a: a.epsilon, AGENTS[name](**SMALL), epsilon)
        return agent.improve(key, start(agent, key, lower.problem, lower.x), lower.problem, lower.x)

    many = jax.jit(jax.vmap(run))(keys, epsilons)
    single = jax.jit(run)
    for k in range(3):
        one = single(keys[k], epsilons[k])
        jax.tree.map(lambda m, o, k=k: np.testing.assert_allclose(m[k], o, rtol=1e-10, atol=1e-12), many, one)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["q", "linear_sarsa", "policy_iteration"])
def test_float32(name):
    agent, lower = AGENTS[name](**SMALL), Lower(dtype=np.float32)
    state = improve(agent, KEY, start(agent, KEY, lower.problem, lower.x), lower.problem, lower.x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {np.dtype(t) for t in (np.float32, np.int32)}
    assert table(agent, state, lower.problem, lower.x).dtype == np.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftQLearning(keep=2.0), r"keep must be from 0 to 1, got 2; 1 keeps all"),
        (lambda: SoftQLearning(step_size=0.0), r"step_size must be above 0, got 0; step sizes are"),
        (lambda: SoftQLearning(step_size="fast"), "step_size: expected an array of numbers, got str"),
        (lambda: ByVisits(0.1), "schedule: expected a function, got float; wrap it"),
        (lambda: Polynomial(power=-1.0), "power must be at least 0, got -1; 0 is a constant"),
        (lambda: Polynomial(scale=0.0), "scale must be above 0, got 0"),
        (lambda: SampledPolicyIteration(sweeps=0), "sweeps: expected an integer of at least 1, got 0"),
        (lambda: SampledPolicyIteration(improvements=0), "improvements: expected an integer of at least 1, got 0"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(bj.InputError, match=message):
        make()


@pytest.mark.parametrize(
    ("agent", "options", "message"),
    [
        (
            SoftQLearning(features=np.ones((5, 2))),
            {},
            r"features: expected shape \[S, F\] with S = 6 states, got \[5, 2\]",
        ),
        (SoftQLearning(features=np.ones(6)), {}, r"features: expected shape \[S, F\] with S = 6 states, got \[6\]"),
        (SoftQLearning(features=lambda s: s), {}, r"features: expected a function that returns \[F\]"),
        (
            SoftQLearning(features=np.ones((5, 2))),
            WALK,
            "features: an array .* needs a Tab",
        ),
        (
            SoftQLearning(),
            WALK,
            r"features: observations of Walk are not .* returns \[F\]",
        ),
        (
            SampledPolicyIteration(),
            WALK,
            "environment: SampledPolicyIteration needs a Tab",
        ),
        (
            SoftSARSA(),
            {"kind": "tsallis"},
            r"regularizer: SoftSARSA\(\) needs .* TsallisEntropy; use SoftSARSA\(expected",
        ),
    ],
)
def test_bad_problems(agent, options, message):
    lower = Lower(**options)
    with pytest.raises(bj.InputError, match=message):
        agent.init(KEY, lower.problem, lower.x)


def test_regularizers_that_do_not_fit():
    lower = Lower(kind="kl")
    agent = SoftQLearning(features=lambda o: o)
    problem = sampled(Walk(), lambda x: lambda o, a: jnp.zeros(()), lower.regularizer, 0.8)
    state = agent.init(KEY, problem, lower.x)
    with pytest.raises(bj.InputError, match="regularizer: it has a row for each state, but observations"):
        agent.improve(KEY, state, problem, lower.x)
    several = eqx.tree_at(lambda r: r.temperature, bj.ShannonEntropy(1.0), jnp.ones(2))
    problem = sampled(lower.problem.environment, as_is, several, 0.8)
    with pytest.raises(bj.InputError, match=r"regularizer: an agent learns one policy, but .* shape \[2\]"):
        SoftQLearning().init(KEY, problem, lower.x)


@pytest.mark.slow
def test_the_exact_agent_needs_a_model():
    lower = Lower()
    with pytest.raises(bj.InputError, match="problem: ExactAgent needs the model"):
        ExactAgent().init(KEY, lower.problem, lower.x)
    problem = bj.problems.make("four_rooms", temperature=0.05)
    x = problem.start(KEY)
    agent = ExactAgent()
    state = agent.improve(KEY, agent.init(KEY, problem, x), problem, x)
    assert policy_gap(agent.policy(state, problem, x), bj.solve(problem.mdp(x), problem.regularizer(x)).policy) < 1e-20
    assert agent.environment_steps(problem) == 0
