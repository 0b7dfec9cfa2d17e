"""Lower levels with a known answer for agents with networks: a table, and a linear-quadratic one on a box."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from bilevel_jax.environments import Box, Environment, TimeStep
from bilevel_jax.networks import Network

KEY = jax.random.key(0)
STATES = 8


class Table:
    """Garnet, at two upper variables whose optimal policies are as far apart as one of them and the uniform one."""

    def __init__(self, temperature=0.5):
        self.problem = bj.problems.make("garnet", horizon=20, temperature=temperature)
        self.x = self.problem.start(KEY)
        self.moved = self.x + jax.random.normal(jax.random.key(9), self.x.shape, self.x.dtype)

    def optimal(self, x):
        return bj.solve(self.problem.mdp(x), self.problem.regularizer(x)).policy

    def gap(self, agent, state, x):
        return float(bj.agents.policy_gap(agent.policy(state, self.problem, x), self.optimal(x)))


def kept_close(reference):
    """Garnet's process and rewards, with a divergence from a reference: (problem, x, pi*)."""
    table = Table()
    mdp, regularizer = table.problem.mdp(table.x), bj.KLDivergence(0.5, reference)
    problem = bj.SampledBilevelProblem(
        environment=bj.environments.TabularEnvironment(mdp),
        reward=as_is,
        regularizer=regularizer,
        loss=no_loss,
        discount=0.9,
        horizon=20,
    )
    return problem, mdp.reward, bj.solve(mdp, regularizer).policy


def as_is(x):
    return x


def no_loss(key, x, trajectories):
    return jnp.zeros(())


@eqx.filter_jit
def improve_often(agent, key, state, problem, x, times):
    def body(k, state):
        return agent.improve(jax.random.fold_in(key, k), state, problem, x)

    return jax.lax.fori_loop(jnp.zeros_like(times), times, body, state)


def improved(agent, key, state, problem, x, times):
    return improve_often(agent, key, state, problem, x, jnp.asarray(times, jnp.int32))


def require_same_over_seeds(agent, problem, x):
    """Seeds that run together give what each gives alone."""
    keys = jax.random.split(KEY, 2)

    def run(key):
        return agent.improve(key, agent.init(key, problem, x), problem, x)

    many = jax.jit(jax.vmap(run))(keys)
    for k, key in enumerate(keys):
        for one, other in zip(jax.tree.leaves(jax.jit(run)(key)), jax.tree.leaves(many), strict=True):
            if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(one, other[k], rtol=1e-6, atol=1e-9)


def traces_of(agent, problem, xs):
    """How often `improve` is traced in a run over the xs, from `init` on."""
    count = 0

    @jax.jit
    def improve(key, state, x):
        nonlocal count
        count += 1
        return agent.improve(key, state, problem, x)

    state = agent.init(KEY, problem, xs[0])
    counts = []
    for k, x in enumerate(xs):
        state = improve(jax.random.fold_in(KEY, k), state, x)
        counts.append(count)
    return counts, state


def require_nothing_weak(state):
    weak = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if leaf.weak_type]
    assert not weak


PUSH, DRIFT, NOISE, DISCOUNT, TEMPERATURE = 0.5, 0.9, 0.3, 0.9, 0.2


class LinearQuadratic(Environment):
    """s' = DRIFT s + PUSH a + NOISE w, with actions in [-bound, bound]."""

    bound: float = eqx.field(static=True)
    dtype: str | None = eqx.field(static=True, default=None)

    @property
    def action_space(self):
        return Box(-self.bound, self.bound, (1,), self.dtype)

    def reset(self, key):
        return jax.random.normal(key, (1,))

    def observe(self, state):
        return state

    def step(self, key, state, action):
        noise = jax.random.normal(key, (1,))
        following = DRIFT * state + PUSH * action.astype(state.dtype) + NOISE * noise
        goes_on = jnp.asarray(False)
        return following, TimeStep(following, jnp.zeros(()), goes_on, goes_on)


def cost(x):
    def reward(state, action):
        return -jnp.sum(state**2) - x * jnp.sum(action.astype(state.dtype) ** 2)

    return reward


def linear_quadratic(bound, dtype=None, regularizer=None):
    """The reward is -s^2 - x a^2."""
    return bj.SampledBilevelProblem(
        environment=LinearQuadratic(bound, dtype),
        reward=cost,
        regularizer=bj.ShannonEntropy(TEMPERATURE) if regularizer is None else regularizer,
        loss=no_loss,
        discount=DISCOUNT,
        horizon=20,
    )


def gain_and_deviation(x):
    """pi* where actions have no bounds is N(gain s, deviation^2).

    Q(s, a) = -s^2 - x a^2 - discount P (DRIFT s + PUSH a)^2 + const is a quadratic of a, and pi* is proportional to
    exp(Q / temperature). P of V = -P s^2 + const is that of the Riccati equation: the entropy is a constant.
    """
    p = 1.0
    for _ in range(1000):
        curvature = x + DISCOUNT * p * PUSH**2
        p = 1 + DISCOUNT * p * DRIFT**2 - (DISCOUNT * p * DRIFT * PUSH) ** 2 / curvature
    curvature = x + DISCOUNT * p * PUSH**2
    return -DISCOUNT * p * DRIFT * PUSH / curvature, np.sqrt(TEMPERATURE / (2 * curvature))


class Quadratic(Network):
    """All products of two of the inputs and 1, linearly: the values of a linear-quadratic process are of this form."""

    def init(self, key, observation, outputs):
        del key
        return jnp.zeros((outputs, self._features(observation).shape[0]))

    def apply(self, params, observation):
        return params @ self._features(observation)

    def _features(self, observation):
        parts = [jnp.ones(1), *(jnp.zeros(leaf.shape) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
                                for leaf in jax.tree.leaves(observation))]  # fmt: skip
        inputs = jnp.concatenate([part.astype(jnp.result_type(float)) for part in parts])
        first, second = np.triu_indices(inputs.shape[0])
        return inputs[first] * inputs[second]


LINEAR = bj.networks.MLP(depth=0, output_scale=0.0)


def means_and_deviations(agent, state, problem, x, draws=20_000):
    """Of the actions at five states from -1 to 1, over draws: (states, means, deviations)."""
    states = jnp.linspace(-1, 1, 5)[:, None]

    def sampled(state_of_process):
        one = agent.policy(state, problem, x).distribution(state_of_process)
        return jax.vmap(one.sample)(jax.random.split(jax.random.key(5), draws))[:, 0]

    actions = np.asarray(jax.jit(jax.vmap(sampled))(states))
    return np.asarray(states[:, 0]), actions.mean(1), actions.std(1)
