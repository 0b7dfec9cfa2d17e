"""Action values that are learned: a table, or weights of features. How each is read and corrected."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.agents.processes import at_states, number_of_states
from bilevel_jax.agents.schedules import ByVisits, evaluate
from bilevel_jax.errors import InputError
from bilevel_jax.estimators import SampledProblem
from bilevel_jax.functions import ActionFunction, Linear, Table, tabulate
from bilevel_jax.indexing import gather
from bilevel_jax.regularizers import Regularizer


class Learned(eqx.Module):
    """What was learned. `parameters` [S, A] or [F, A]; `visits` of each, the same shape; `steps` made, []."""

    parameters: jax.Array
    visits: jax.Array
    steps: jax.Array

    def aged(self, keep: jax.Array) -> "Learned":
        """With the fraction `keep` of the counts."""

        def age(count: jax.Array) -> jax.Array:
            kept = count.astype(self.parameters.dtype) * jnp.asarray(keep, self.parameters.dtype)
            return kept.astype(count.dtype)

        return Learned(self.parameters, age(self.visits), age(self.steps))


class Values(eqx.Module):
    """The protocol: how parameters are read as Q at x, and corrected."""

    @abc.abstractmethod
    def init(self) -> Learned:
        """Nothing learned yet."""

    @abc.abstractmethod
    def rewards(self, observation: Any) -> jax.Array:
        """r_x of all actions, [B, A]."""

    @abc.abstractmethod
    def read(self, parameters: jax.Array, observation: Any) -> jax.Array:
        """Q[B, A]."""

    @abc.abstractmethod
    def correct(
        self, learned: Learned, observation: Any, action: jax.Array, errors: jax.Array, step_size: Callable
    ) -> Learned:
        """Move Q at B pairs along their errors [B]."""

    @abc.abstractmethod
    def policy(self, parameters: jax.Array, regularizer: Regularizer) -> ActionFunction:
        """grad Omega*(Q) as a function of the observation."""


class TableValues(Values):
    """Q = r_x + a learned table of what follows.

    The reward is known at every x, so that only what follows has to be learned anew when x changes.
    At one x this is the ordinary update. It starts from `guess`, [].
    """

    reward: jax.Array  # [S, A]
    guess: jax.Array

    def init(self):
        ahead = jnp.broadcast_to(self.guess, self.reward.shape)
        return Learned(ahead, jnp.zeros(self.reward.shape, jnp.int32), jnp.zeros((), jnp.int32))

    def rewards(self, observation):
        return gather(self.reward, observation)

    def read(self, parameters, observation):
        return self.rewards(observation) + gather(parameters, observation)

    def correct(self, learned, observation, action, errors, step_size):
        pairs = (observation, action)
        before = learned.visits[pairs]
        visits = learned.visits.at[pairs].add(1)
        together = (visits[pairs] - before).astype(errors.dtype)  # processes at this pair
        count = before if isinstance(step_size, ByVisits) else learned.steps
        alpha = jnp.broadcast_to(evaluate(step_size, count, errors.dtype), errors.shape)
        # Their sum, but never more than their mean, which no number of processes makes unstable.
        parameters = learned.parameters.at[pairs].add(jnp.minimum(alpha, 1 / together) * errors)
        return Learned(parameters, visits, learned.steps + 1)

    def policy(self, parameters, regularizer):
        states = jnp.arange(self.reward.shape[0], dtype=jnp.int32)
        return Table(at_states(regularizer, states).policy(self.reward + parameters))


class LinearValues(Values):
    """Q(s, a) = features(s) . weights[:, a], corrected along the semi-gradient."""

    reward: ActionFunction
    features: "Features"
    num_actions: int = eqx.field(static=True)

    def init(self):
        zeros = jnp.zeros((self.features.size, self.num_actions), self.features.dtype)
        return Learned(zeros, zeros, jnp.zeros((), jnp.int32))

    def rewards(self, observation):
        return jax.vmap(self.reward)(observation).astype(self.features.dtype)

    def read(self, parameters, observation):
        return jax.vmap(self.features)(observation) @ parameters

    def correct(self, learned, observation, action, errors, step_size):
        features = jax.vmap(self.features)(observation)
        acted = jax.nn.one_hot(action, self.num_actions, dtype=errors.dtype)
        size = jnp.abs(features)
        # Diagonal dominance: with steps of at most 1 / together the correction contracts (Gershgorin).
        together = (size * jnp.sum(size, -1, keepdims=True)).T @ acted
        count = learned.visits if isinstance(step_size, ByVisits) else learned.steps
        alpha = jnp.minimum(evaluate(step_size, count, errors.dtype), 1 / jnp.where(together > 0, together, 1))
        parameters = learned.parameters + alpha * (features.T @ (acted * errors[:, None]))
        return Learned(parameters, learned.visits + together, learned.steps + 1)

    def policy(self, parameters, regularizer):
        return GreedyPolicy(Linear(self.features, parameters), regularizer)


class Features(eqx.Module):
    """observation -> [F], from a table [S, F] or a function, in one dtype."""

    source: Any
    size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __call__(self, observation: Any) -> jax.Array:
        if isinstance(self.source, jax.Array):
            return gather(self.source, observation).astype(self.dtype)
        return jnp.asarray(self.source(observation), self.dtype)


class GreedyPolicy(eqx.Module):
    """observation -> grad Omega*(Q(observation)), [A]."""

    q: ActionFunction
    regularizer: Regularizer

    def __call__(self, observation: Any) -> jax.Array:
        return at_states(self.regularizer, jnp.asarray(observation)).policy(self.q(observation))


def values_at(problem: SampledProblem, x: Any, features: Any, initial_value: Any) -> Values:
    """The values of the problem at x: a table that starts from an initial value, or linear if there are features.

    Raises:
      InputError: no features where observations are not states of a table; features of a wrong shape.
    """
    states = number_of_states(problem.environment)
    if features is None:
        if states is None:
            raise InputError(
                f"features: observations of {type(problem.environment).__name__} are not the states of a table; give "
                f"a function of the observation that returns [F]"
            )
        return _table_values(problem, x, states, initial_value)
    example = jax.eval_shape(lambda key: problem.environment.observe(problem.environment.reset(key)), jax.random.key(0))
    reward = problem.reward(x)
    if isinstance(features, jax.Array):
        if states is None:
            raise InputError(
                f"features: an array [S, F] needs a TabularEnvironment, got {type(problem.environment).__name__}; give "
                f"a function of the observation"
            )
        if features.ndim != 2 or features.shape[0] != states:
            raise InputError(
                f"features: expected shape [S, F] with S = {states} states, got {list(features.shape)}; one row a state"
            )
        size = features.shape[1]
    else:
        made = jax.eval_shape(features, example)
        if not (hasattr(made, "shape") and len(made.shape) == 1):
            raise InputError(
                f"features: expected a function that returns [F], got one that returns {made}; flatten what it returns"
            )
        size = made.shape[0]
    dtype = jax.eval_shape(reward, example).dtype
    return LinearValues(reward, Features(features, size, dtype), problem.environment.num_actions)


def _table_values(problem: SampledProblem, x: Any, states: int, initial_value: Any) -> TableValues:
    reward = tabulate(problem.reward(x), states).values
    discount = jnp.asarray(problem.discount, reward.dtype)
    if initial_value is None:
        regularizer = at_states(problem.regularizer(x), jnp.arange(states, dtype=jnp.int32))
        initial_value = jnp.mean(regularizer.conjugate(reward)) / (1 - discount)
    return TableValues(reward, discount * jnp.asarray(initial_value, reward.dtype))
