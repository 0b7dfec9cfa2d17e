"""The physics of the classic tasks against gymnasium's own, and against energies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.environments.classic import CartPole, MountainCar, Pendulum

KEY = jax.random.key(0)
TASKS = {"CartPole-v1": CartPole, "MountainCar-v0": MountainCar, "Pendulum-v1": Pendulum}


@pytest.mark.parametrize("name", TASKS)
def test_steps_are_those_of_gymnasium(name):
    """From its states, for 300 random actions: observations, rewards and ends."""
    gymnasium = pytest.importorskip("gymnasium")
    theirs, ours = gymnasium.make(name).unwrapped, TASKS[name]()
    step = jax.jit(lambda key, state, action: ours.step(key, state, action))
    rng = np.random.default_rng(0)
    theirs.reset(seed=0)
    for _ in range(300):
        action = theirs.action_space.sample() if name == "Pendulum-v1" else int(rng.integers(ours.num_actions))
        state = jnp.asarray(theirs.state, float)
        observation, reward, terminated, truncated, _ = theirs.step(action)
        _, made = step(KEY, state, jnp.asarray(action))
        np.testing.assert_allclose(np.asarray(made.observation), observation, rtol=2e-5, atol=1e-6)  # theirs is float32
        np.testing.assert_allclose(np.asarray(made.reward), reward, rtol=1e-6)
        assert (bool(made.terminated), bool(made.truncated)) == (terminated, truncated)
        if terminated:
            theirs.reset()
    low, high = theirs.observation_space.low, theirs.observation_space.high
    starts = np.asarray(jax.vmap(lambda key: ours.observe(ours.reset(key)))(jax.random.split(KEY, 100)))
    assert ((starts >= low) & (starts <= high)).all()
    if name != "CartPole-v1":
        spread = np.stack([theirs.reset(seed=k)[0] for k in range(100)])
        np.testing.assert_allclose(starts.std(0), spread.std(0), atol=0.3 * spread.std(0).max())


def test_a_pendulum_without_torque_keeps_its_energy():
    """Kinetic and potential energy of a rod, over half a second of small steps."""
    environment = Pendulum(interval=1e-4)

    def energy(state):
        return state[1] ** 2 / 6 + 10 * jnp.cos(state[0]) / 2

    start = jnp.array([2.0, 0.5])
    end = jax.lax.fori_loop(0, 5000, lambda _, state: environment.step(KEY, state, jnp.zeros(1))[0], start)
    assert float(jnp.abs(end - start).max()) > 0.5
    np.testing.assert_allclose(energy(end), energy(start), atol=2e-3)


def test_a_pole_that_hangs_swings_back():
    environment = CartPole(gravity=-9.8, force=0.0, interval=1e-3)

    def step(state, _):
        moved, _ = environment.step(KEY, state, jnp.asarray(0))
        return moved, moved[2]

    leans = jax.lax.scan(step, jnp.array([0, 0, 0.1, 0.0]), None, length=2000)[1]
    assert 0.09 < float(-leans.min()) < 0.12
    assert 0.09 < float(leans[1000:].max()) < 0.12


@pytest.mark.parametrize("environment", [CartPole(), MountainCar(), Pendulum()])
@pytest.mark.parametrize("x64", [False, True])
def test_keeps_the_protocol(environment, x64):
    """Under jit and vmap, in both precisions, with physics that are traced."""
    with jax.enable_x64(x64):
        made = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(float)), environment)
        processes = bj.environments.start_processes(KEY, bj.environments.with_restarts(made, 50), 4)
        space = made.action_space
        policy = _Uniform(space) if isinstance(space, bj.environments.Box) else (lambda _: jnp.ones(space.n) / space.n)
        _, seen = jax.jit(lambda p: bj.environments.collect(KEY, p, policy, 60))(processes)
        assert seen.reward.dtype == jnp.result_type(float)
        assert bool(jnp.isfinite(seen.observation).all())
        assert bool((seen.terminated | seen.truncated).any())


class _Uniform(bj.environments.Policy):
    space: bj.environments.Box

    def distribution(self, observation):
        return _Flat(self.space)


class _Flat(bj.environments.Distribution):
    space: bj.environments.Box

    def sample(self, key):
        return jax.random.uniform(key, self.space.shape, self.space.dtype, self.space.low, self.space.high)

    def log_prob(self, action):
        return -jnp.sum(jnp.log(self.space.high - self.space.low))

    def entropy(self):
        return jnp.sum(jnp.log(self.space.high - self.space.low))


@pytest.mark.slow
def test_physics_can_be_swept():
    """Heavier gravity makes an idle pole fall sooner."""

    def steps(gravity):
        environment = CartPole(gravity=gravity)
        policy = lambda observation: jnp.array([0.5, 0.5])  # noqa: E731
        return bj.environments.evaluate(KEY, environment, policy, episodes=200, steps=200).mean

    light, heavy = jax.vmap(steps)(jnp.array([2.0, 30.0]))
    assert float(heavy) < float(light) - 3


def test_impossible_physics_are_refused():
    for name in ("cart_mass", "pole_mass", "half_length", "interval", "track", "angle"):
        with pytest.raises(bj.InputError, match=name):
            CartPole(**{name: 0.0})
