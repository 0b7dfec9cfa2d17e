"""Vector environments stepped in numpy: their trajectories against single environments, and what agents learn there."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.agents.deep.host import collect_on_host, improve_on_host
from bilevel_jax.environments import AutoReset, Box, Discrete, Environment, Processes, TimeStep, collect, rollout
from bilevel_jax.environments.host import HostEnvironment, HostSpaces

KEY = jax.random.key(5)
MODES = ("NextStep", "SameStep", "Disabled")
EVEN = np.full((5, 2), 0.5)


def gymnasium():
    return pytest.importorskip("gymnasium")


def sync(make, count, mode, **options):
    vector = gymnasium().vector
    return vector.SyncVectorEnv([make] * count, autoreset_mode=vector.AutoresetMode(mode), **options)


def cartpole(limit=15):
    return gymnasium().make("CartPole-v1", max_episode_steps=limit)


def uniform(observation):
    return jnp.full(2, 0.5)


def joined(*parts):
    """Trajectories after one another, in numpy."""
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, 1), *parts)


def require_as_single(t, seeds, make=cartpole):
    """The valid steps are those of single environments with these seeds and the same actions, to the bit."""
    for b, seed in enumerate(seeds):
        env = make()
        seen, _ = env.reset(seed=seed)
        for h in np.flatnonzero(t.valid[b]):
            np.testing.assert_array_equal(t.observation[b, h], seen)
            seen, reward, terminated, truncated, _ = env.step(t.action[b, h])
            np.testing.assert_array_equal(t.next_observation[b, h], seen)
            assert t.reward[b, h] == reward
            assert (t.terminated[b, h], t.truncated[b, h]) == (terminated, truncated and not terminated)
            if terminated or truncated:
                seen, _ = env.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("copy", [True, False])
def test_trajectories_are_those_of_single_environments(mode, copy):
    environment = HostEnvironment(sync(cartpole, 3, mode, copy=copy), seed=11)
    assert environment.autoreset == mode
    calls = [collect_on_host(jax.random.fold_in(KEY, k), environment, uniform, 40) for k in range(2)]
    t = joined(*calls)
    assert t.observation.dtype == np.float32
    assert t.action.dtype == np.int32
    assert t.reward.dtype == np.float64
    require_as_single(t, (11, 12, 13))
    ended = t.terminated | t.truncated
    assert t.terminated.any()
    assert t.truncated.any()
    # A process starts within 0.05 of the middle, and where a limit cuts it after 15 steps it is not there.
    assert (np.abs(t.next_observation[t.truncated]).max(-1) > 0.05).all()
    np.testing.assert_array_equal(t.probability, 0.5)
    if mode == "NextStep":  # after each end a step that resets, and no other
        np.testing.assert_array_equal(~t.valid[:, 1:], ended[:, :-1])
        assert (t.reward[~t.valid] == 0).all()
    else:
        assert t.valid.all()
    if mode == "SameStep":
        assert (np.abs(t.observation[:, 1:][ended[:, :-1]]).max(-1) < 0.05).all()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_other_processes_of_the_machine(mode):
    vector = gymnasium().vector
    make = functools.partial(gymnasium().make, "CartPole-v1", max_episode_steps=15)
    env = vector.AsyncVectorEnv([make] * 2, autoreset_mode=vector.AutoresetMode(mode), context="spawn")
    try:
        environment = HostEnvironment(env, seed=[3, 8])
        require_as_single(joined(*(collect_on_host(KEY, environment, uniform, 30) for _ in range(2))), (3, 8))
    finally:
        env.close()


def test_an_environment_that_is_a_vector_itself():
    """gymnasium's own vector CartPole, which cannot reset single processes."""
    env = gymnasium().make_vec("CartPole-v1", 4, vectorization_mode="vector_entry_point", max_episode_steps=15)
    t = joined(collect_on_host(KEY, HostEnvironment(env, seed=0), uniform, 50))
    ended = t.terminated | t.truncated
    assert t.terminated.any()
    assert t.truncated.any()
    np.testing.assert_array_equal(~t.valid[:, 1:], ended[:, :-1])
    np.testing.assert_array_equal(t.next_observation[:, :-1], t.observation[:, 1:])
    assert (np.abs(t.next_observation[~t.valid]) < 0.05).all()


def test_seeds_repeat_a_run_and_others_do_not():
    def run(seed):
        return joined(collect_on_host(KEY, HostEnvironment(sync(cartpole, 2, "SameStep"), seed=seed), uniform, 20))

    np.testing.assert_array_equal(run(1).observation, run(1).observation)
    assert not np.array_equal(run(1).observation, run(2).observation)
    environment = HostEnvironment(sync(cartpole, 2, "SameStep"), seed=2)
    collect_on_host(KEY, environment, uniform, 7)
    environment.reset(1)
    np.testing.assert_array_equal(
        joined(collect_on_host(KEY, environment, uniform, 20)).observation, run(1).observation
    )


# without gymnasium


class Space:
    """As gymnasium's, by its attributes."""

    def __init__(self, **attributes):
        vars(self).update(attributes)


FRAME = Space(shape=(2, 2), dtype=np.dtype(np.uint8))
PLACE = Space(shape=(), n=4, dtype=np.dtype(np.int64))


class Clocks:
    """Two processes of three steps, whose observations are frames, numbers, both, or numbers in a pair."""

    num_envs = 2
    single_action_space = Discrete(2)
    spaces = {  # noqa: RUF012
        "frame": FRAME,
        "number": PLACE,
        "both": Space(spaces={"frame": FRAME, "number": PLACE}),
        "pair": Space(spaces=(PLACE,)),
    }

    def __init__(self, kind="number", mode="SameStep", ends="each"):
        self.kind, self.ends, self.metadata = kind, ends, {"autoreset_mode": mode}
        self.single_observation_space = self.spaces[kind]

    def see(self, time):
        frame = np.broadcast_to(200 + time[..., None, None], (*time.shape, 2, 2)).astype(np.uint8)
        return {"frame": frame, "number": time, "both": {"number": time, "frame": frame}, "pair": (time,)}[self.kind]

    def reset(self, *, seed=None, options=None):
        self.time = np.zeros(2, np.int64)
        return self.see(self.time), {}

    def step(self, actions):
        assert actions.dtype == np.int32
        self.time, ended, infos = self.time + 1, self.time == 2, {}
        if ended.any():
            ends = np.full(2, None, object)
            for b in np.flatnonzero(ended):
                ends[b] = jax.tree.map(lambda leaf, b=b: leaf[b], self.see(self.time))
            infos = {"each": {"final_obs": ends}, "all": {"final_obs": self.see(self.time)}, "none": {}}[self.ends]
        self.time = np.where(ended, 0, self.time)
        return self.see(self.time), np.ones(2), ended & [True, False], ended, infos


@pytest.mark.parametrize("ends", ["each", "all"])
@pytest.mark.parametrize("kind", Clocks.spaces)
def test_observations_keep_their_kinds_and_ends_are_put_in(kind, ends):
    environment = HostEnvironment(Clocks(kind, ends=ends), seed=0)
    t = collect_on_host(KEY, environment, uniform, 4)
    leaf = {"frame": lambda o: o, "number": lambda o: o, "both": lambda o: o["frame"], "pair": lambda o: o[0]}[kind]
    first = np.asarray(leaf(t.next_observation))
    dtype, start = (np.uint8, 200) if kind in ("frame", "both") else (np.int32, 0)
    assert first.dtype == dtype
    np.testing.assert_array_equal(first.reshape(2, 4, -1)[..., 0] - start, [[1, 2, 3, 1]] * 2)
    np.testing.assert_array_equal(np.asarray(leaf(t.observation)).reshape(2, 4, -1)[..., 0] - start, [[0, 1, 2, 0]] * 2)
    # The first process both terminates and is cut, the second is only cut.
    np.testing.assert_array_equal(t.terminated[:, 2], [True, False])
    np.testing.assert_array_equal(t.truncated[:, 2], [False, True])
    if kind == "both":
        np.testing.assert_array_equal(t.next_observation["number"], [[1, 2, 3, 1]] * 2)


def test_points_of_a_box_are_passed_on():
    class Pushed:
        num_envs, metadata = 2, {"autoreset_mode": "SameStep"}
        single_observation_space = Space(shape=(1,), dtype=np.dtype(np.float64))
        single_action_space = Space(low=-np.ones(3), high=np.ones(3), shape=(3,), dtype=np.dtype(np.float32))
        got = []  # noqa: RUF012

        def reset(self, *, seed=None, options=None):
            return np.zeros((2, 1)), {}

        def step(self, actions):
            self.got.append(actions)
            return np.zeros((2, 1)), np.zeros(2), np.zeros(2, bool), np.zeros(2, bool), {}

    class Normal(bj.environments.Distribution):
        def sample(self, key):
            return jax.random.normal(key, (3,), jnp.float32)

        def log_prob(self, action):
            return jnp.sum(jax.scipy.stats.norm.logpdf(action))

        def entropy(self):
            return jnp.zeros(())

    class Push(bj.environments.Policy):
        def distribution(self, observation):
            return Normal()

    environment = HostEnvironment(Pushed(), seed=0)
    t = collect_on_host(KEY, environment, Push(), 2)
    assert isinstance(environment.action_space, Box)
    assert t.action.shape == (2, 2, 3)
    np.testing.assert_array_equal(t.action, np.stack(Pushed.got, 1))
    np.testing.assert_allclose(t.probability, np.exp(jax.scipy.stats.norm.logpdf(t.action).sum(-1)), rtol=1e-5)
    with pytest.raises(bj.InputError, match="policy: "):
        collect_on_host(KEY, environment, uniform, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"single_action_space": None}, "vector_env: Other has no single_action_space"),
        ({"metadata": {}}, "does not say how it resets"),
        ({"metadata": {"autoreset_mode": "Later"}}, "autoreset: expected 'NextStep', 'SameStep' or 'Disabled'"),
        ({"single_action_space": Space(nvec=[2, 2], shape=(2,))}, "single_action_space: "),
        ({"single_observation_space": Space(shape=None, dtype=str)}, "single_observation_space: its observations are"),
        ({"single_observation_space": FRAME}, r"expected observations of shape \[2, 2, 2\], got \[2\]"),
    ],
)
def test_what_is_no_vector_environment_is_named(change, message):
    class Other(Clocks):
        def __init__(self):
            super().__init__()
            vars(self).update(change)

    with pytest.raises(bj.InputError, match=message):
        HostEnvironment(Other(), seed=0)


def test_ends_that_are_not_told_are_refused():
    environment = HostEnvironment(Clocks(ends="none"), seed=0)
    with pytest.raises(bj.InputError, match="infos has no 'final_obs'"):
        collect_on_host(KEY, environment, uniform, 3)
    assert HostEnvironment(Clocks(mode=None), seed=0, autoreset="SameStep").autoreset == "SameStep"


# agents


class Ring(Environment):
    """Five places, right or left. Right from the last one ends at the first, where it also starts; nothing is drawn."""

    @property
    def action_space(self):
        return Discrete(2)

    def reset(self, key):
        return jnp.zeros((), jnp.int32)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        following = (state + 2 * action - 1) % 5
        ended = (state == 4) & (action == 1)
        return following, TimeStep(following, following.astype(float), ended, jnp.zeros((), bool))


class Replayed:
    """A simulator as a vector environment, in the same step."""

    metadata = {"autoreset_mode": "SameStep"}  # noqa: RUF012
    single_action_space, single_observation_space = Discrete(2), Discrete(5)

    def __init__(self, environment, count):
        self.environment, self.num_envs, self.count = environment, count, 0
        self.advance = eqx.filter_jit(
            lambda states, key, actions: Processes(environment, states).advance(key, 0, actions)
        )

    def reset(self, *, seed=None, options=None):
        self.states = jax.vmap(self.environment.reset)(jax.random.split(jax.random.key(seed), self.num_envs))
        return np.asarray(self.states), {}

    def step(self, actions):
        self.count += 1
        keys = jax.random.split(jax.random.key(self.count), self.num_envs)
        processes, made = self.advance(self.states, keys, jnp.asarray(actions))
        self.states = processes.states
        ended = np.asarray(made.terminated)
        infos = {"final_obs": np.asarray(made.observation)} if ended.any() else {}
        return np.array(self.states), np.asarray(made.reward), ended, np.asarray(made.truncated), infos


def problem_of(environment, weight=None, temperature=0.5):
    class Weighted(bj.SampledBilevelProblem):
        def environment_reward_weight(self):
            return weight

    return Weighted(
        environment, lambda x: x, bj.ShannonEntropy(temperature), lambda k, x, t: 0.0, discount=0.9, horizon=20
    )


X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))


@pytest.mark.slow
def test_it_learns_what_improve_learns():
    """The same steps, the same random numbers, and so the same parameters, up to rounding of other programs."""
    simulator = AutoReset(Ring())
    agent = bj.agents.SoftPQN(bj.networks.OneHot(5), processes=3, steps=8, updates=2, epsilon=0.1, learning_rate=0.05)
    host = HostEnvironment(Replayed(simulator, 3), seed=0)
    pure, other = problem_of(simulator, 0.3), problem_of(host.spaces, 0.3)
    one, two = agent.init(KEY, pure, X), agent.init(KEY, other, X)
    for k in range(3):
        key = jax.random.fold_in(KEY, k)
        one = eqx.filter_jit(agent.improve)(key, one, pure, X)
        two = improve_on_host(key, agent, two, host, other, X)
    np.testing.assert_array_equal(host.observation, one.processes)
    assert int(one.episodes.count) == int(two.episodes.count) > 0
    for mine, theirs in zip(*(jax.tree.leaves((s.params, s.numbers, s.episodes)) for s in (one, two)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_the_same_keys_collect_the_same_steps():
    simulator = AutoReset(Ring())
    processes = Processes(simulator, jnp.zeros(4, jnp.int32))
    _, mine = collect(KEY, processes, bj.Table(EVEN), 30)
    theirs = collect_on_host(KEY, HostEnvironment(Replayed(simulator, 4), seed=0), bj.Table(EVEN), 30)
    for one, other in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(one, other)


def table_environment():
    """Five places with random moves; a pair may end at a place that others pass through."""
    gym = gymnasium()
    rng = np.random.default_rng(3)
    chance, ends = rng.dirichlet(np.ones(5), (5, 2)), rng.uniform(size=(5, 2, 5)) < 0.3
    sums = np.cumsum(chance, -1)

    class Places(gym.Env):
        observation_space, action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(2)
        initial_state_distrib = np.full(5, 0.2)
        P = {  # noqa: RUF012
            s: {a: [(chance[s, a, t], t, 0.0, bool(ends[s, a, t])) for t in range(5)] for a in range(2)}
            for s in range(5)
        }

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.place = int(self.np_random.integers(5))
            return self.place, {}

        def step(self, action):
            before = self.place, int(action)
            self.place = int(np.searchsorted(sums[before][:-1], self.np_random.uniform()))
            return self.place, 0.0, bool(ends[before][self.place]), False, {}

    return Places()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_it_learns_the_exact_policy(mode):
    """With resets by "NextStep", what they look like would spoil Q at the places that pairs end at."""
    mdp = bj.interchange.from_gymnasium(table_environment(), 0.9)
    exact = bj.solve(mdp.replace(reward=X), bj.ShannonEntropy(0.5)).policy
    host = HostEnvironment(sync(table_environment, 8, mode), seed=0)
    problem = problem_of(host.spaces)
    agent = bj.agents.SoftPQN(
        bj.networks.OneHot(5),
        processes=8,
        steps=32,
        updates=200,
        epochs=1,
        minibatches=4,
        trace=0,
        epsilon=0.5,
        learning_rate=bj.agents.LinearDecay(0.05, 0.0005, 200),
    )
    state = improve_on_host(KEY, agent, agent.init(KEY, problem, X), host, problem, X)
    gap = float(bj.agents.policy_gap(agent.policy(state, problem, X), exact))
    even = float(bj.agents.policy_gap(jnp.asarray(EVEN), exact))
    assert gap < 0.01 * even, (gap, even)


@pytest.mark.slow
def test_steps_that_only_reset_have_no_weight():
    host = HostEnvironment(Replayed(AutoReset(Ring()), 3), seed=0)
    problem = problem_of(host.spaces)
    agent = bj.agents.SoftPQN(bj.networks.OneHot(5), processes=3, steps=8, learning_rate=0.05)
    state = agent.init(KEY, problem, X)
    seen = collect_on_host(KEY, host, agent.acting(state, problem, X), 8)
    learn = eqx.filter_jit(
        lambda seen, all_valid: agent.learn(KEY, state, problem, X, seen, all_valid=all_valid).params
    )
    np.testing.assert_allclose(*(jax.tree.leaves(learn(seen, flag))[0] for flag in (True, False)), rtol=1e-9)
    # Process 1 ends in step 2, so that step 3 may be a reset, whatever it says.
    seen = seen._replace(
        terminated=seen.terminated.at[1, 2].set(True), valid=seen.valid.at[1, 3].set(False), state=None
    )
    other = seen._replace(
        observation=seen.observation.at[1, 3].set(4 - seen.observation[1, 3]),
        next_observation=seen.next_observation.at[1, 3].set(4 - seen.next_observation[1, 3]),
        action=seen.action.at[1, 3].set(1 - seen.action[1, 3]),
    )
    for one, two in zip(jax.tree.leaves(learn(seen, False)), jax.tree.leaves(learn(other, False)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
    wrong = zip(jax.tree.leaves(learn(seen, True)), jax.tree.leaves(learn(other, True)), strict=True)
    assert any(not np.allclose(one, two) for one, two in wrong)


def test_what_cannot_run_in_jax_says_so():
    host = HostEnvironment(Replayed(AutoReset(Ring()), 3), seed=0)
    problem = problem_of(host.spaces)
    agent = bj.agents.SoftPQN(bj.networks.OneHot(5), processes=3, steps=8)
    state = agent.init(KEY, problem, X)
    with pytest.raises(bj.InputError, match="improve_on_host"):
        agent.improve(KEY, state, problem, X)
    with pytest.raises(bj.InputError, match="improve_on_host"):
        rollout(KEY, host.spaces, bj.Table(EVEN), batch=2, horizon=2)
    with pytest.raises(bj.InputError, match="improve_on_host"):
        host.spaces.step(KEY, None, 0)
    with pytest.raises(bj.InputError, match="agent: SoftSARSA has no method acting"):
        improve_on_host(KEY, bj.agents.SoftSARSA(), None, host, problem, X)
    two = bj.agents.SoftPQN(bj.networks.OneHot(5), processes=2, steps=8)
    with pytest.raises(bj.InputError, match="set processes=3"):
        improve_on_host(KEY, two, state, host, problem, X)
    for spaces in (
        HostSpaces(Discrete(3), jax.ShapeDtypeStruct((), jnp.int32)),
        HostSpaces(Discrete(2), jax.ShapeDtypeStruct((), jnp.float32)),
    ):
        with pytest.raises(bj.InputError, match="problem: its environment has other spaces"):
            improve_on_host(KEY, agent, state, host, problem_of(spaces), X)


@pytest.mark.slow
def test_frames_of_atari():
    """ale-py's own vectors: frames with the channels first, kept as uint8."""
    vectors = pytest.importorskip("ale_py.vector_env")
    with jax.enable_x64(False):
        host = HostEnvironment(vectors.AtariVectorEnv("breakout", num_envs=2), seed=0)
        problem = bj.problems.Task(host.spaces, horizon=100)
        network = bj.networks.NatureCNN(width=8, channels="first")
        agent = bj.agents.SoftActorCritic(
            network, processes=2, steps=4, updates=2, gradient_steps=1, batch=4, capacity=32, learning_starts=8
        )
        state = agent.init(KEY, problem, problem.start(KEY))
        state = improve_on_host(KEY, agent, state, host, problem, problem.start(KEY))
    frames = [leaf for leaf in jax.tree.leaves(state.ring) if leaf.ndim > 3]
    assert {leaf.dtype for leaf in frames} == {np.dtype(np.uint8)}
    assert {leaf.shape[-3:] for leaf in frames} == {(4, 84, 84)}
    assert np.isfinite(agent.report(state)["critic_loss"])
