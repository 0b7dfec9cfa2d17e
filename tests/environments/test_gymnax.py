"""Simulators in gymnax's manner."""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from environment_helpers import KEY, ended, rollout

import bilevel_jax as bj
from bilevel_jax.environments import (
    AutoReset,
    GymnaxEnvironment,
    TimeLimit,
    trajectory_keys,
)


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
