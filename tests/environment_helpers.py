"""What the tests of simulators share: two small ones, a policy, and tests of laws."""

import functools

import equinox as eqx
import helpers
import jax
import jax.numpy as jnp
import numpy as np
from helpers import ACTIONS, STATES
from scipy import stats

import bilevel_jax as bj
from bilevel_jax.agents.deep.gaussian import Uniform
from bilevel_jax.environments import (
    AutoReset,
    Discrete,
    Environment,
    TabularEnvironment,
    TimeStep,
)

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


class Anything(bj.environments.Policy):
    """The uniform policy."""

    space: bj.environments.Discrete | bj.environments.Box

    def distribution(self, observation):
        if isinstance(self.space, bj.environments.Box):
            return Uniform(self.space.low, self.space.high)
        return bj.environments.Categorical(jnp.full(self.space.n, 1 / self.space.n))


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


def ended(t):
    return np.asarray(t.terminated | t.truncated)
