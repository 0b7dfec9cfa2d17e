"""Learned action values, in a table or as weights of features: how they are read and corrected."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Integer, Real

from bilevel_jax.agents.processes import at_states, number_of_states
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.bilevel.sampled_problem import require_reward_alone
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import ActionFunction, Linear, tabulate
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.schedules import ByVisits, evaluate
from bilevel_jax.environments import Categorical, Policy, TabularPolicy
from bilevel_jax.mdp.regularizers import Regularizer


class Learned(eqx.Module):
    """Learned values: `parameters` [S, A] or [F, A], the `visits` of each, which are int32 in a table and weights of
    features have in their own dtype, and the number of `steps`.
    """

    parameters: Float[Array, "rows A"]
    visits: Real[Array, "rows A"]
    steps: Int32[Array, ""]

    def scale_counts(self, factor: Float[Array, ""]) -> "Learned":
        """Return the same parameters with their counts multiplied by a factor in [0, 1]."""

        def scale(count: Real[Array, "*shape"]) -> Real[Array, "*shape"]:
            scaled = count.astype(self.parameters.dtype) * jnp.asarray(factor, self.parameters.dtype)
            return scaled.astype(count.dtype)

        return Learned(self.parameters, scale(self.visits), scale(self.steps))


def coverage(visits: Real[Array, "..."], dtype: Any) -> Float[Array, ""]:
    """Return the fraction of the entries of `visits` that are above 0."""
    return jnp.mean((visits > 0).astype(dtype))


class Values(eqx.Module):
    """The protocol of values: how parameters are read as Q at x, and how they are corrected."""

    @abc.abstractmethod
    def init(self) -> Learned:
        """Return the values before anything was learned."""

    @abc.abstractmethod
    def rewards(self, observation: Any) -> Float[Array, "B A"]:
        """r_x of all actions."""

    @abc.abstractmethod
    def read(self, parameters: Float[Array, "rows A"], observation: Any) -> Float[Array, "B A"]:
        """Q at B observations."""

    @abc.abstractmethod
    def correct(
        self,
        learned: Learned,
        observation: Any,
        action: Integer[Array, " B"],
        errors: Float[Array, " B"],
        step_size: Callable,
    ) -> Learned:
        """Move Q at B pairs along their errors."""

    @abc.abstractmethod
    def policy(self, parameters: Float[Array, "rows A"], regularizer: Regularizer) -> Policy:
        """grad Omega*(Q)."""


class TableValues(Values):
    """Q = r_x + a learned table of the value of what follows.

    The reward is known at every x, so that only the value of what follows has to be learned again when x changes. At
    one x this is the ordinary update. The table starts from `guess`.
    """

    reward: Float[Array, "S A"]
    guess: Float[Array, ""]

    def init(self):
        ahead = jnp.broadcast_to(self.guess, self.reward.shape)
        return Learned(ahead, jnp.zeros(self.reward.shape, jnp.int32), jnp.zeros((), jnp.int32))

    def rewards(self, observation) -> Float[Array, "B A"]:
        return gather(self.reward, observation)

    def read(self, parameters, observation) -> Float[Array, "B A"]:
        return self.rewards(observation) + gather(parameters, observation)

    def correct(self, learned, observation, action, errors, step_size):
        pairs = (observation, action)
        before = learned.visits[pairs]
        visits = learned.visits.at[pairs].add(1)
        together = (visits[pairs] - before).astype(errors.dtype)  # processes at this pair
        count = before if isinstance(step_size, ByVisits) else learned.steps
        alpha = jnp.broadcast_to(evaluate(step_size, count, errors.dtype), errors.shape)
        # Each process at a pair adds alpha times its error, but all of them together add at most the mean of their
        # errors: the update is then stable for any number of processes.
        parameters = learned.parameters.at[pairs].add(jnp.minimum(alpha, 1 / together) * errors)
        return Learned(parameters, visits, learned.steps + 1)

    def policy(self, parameters, regularizer):
        states = jnp.arange(self.reward.shape[0], dtype=jnp.int32)
        return TabularPolicy(at_states(regularizer, states).policy(self.reward + parameters))


class LinearValues(Values):
    """Q(s, a) = features(s) . weights[:, a], corrected along the semi-gradient."""

    reward: ActionFunction
    features: "Features"
    num_actions: int = eqx.field(static=True)

    def init(self):
        zeros = jnp.zeros((self.features.size, self.num_actions), self.features.dtype)
        return Learned(zeros, zeros, jnp.zeros((), jnp.int32))

    def rewards(self, observation) -> Float[Array, "B A"]:
        return jax.vmap(self.reward.all)(observation).astype(self.features.dtype)

    def read(self, parameters, observation) -> Float[Array, "B A"]:
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

    source: Float[Array, "S F"] | Callable
    size: int = eqx.field(static=True)
    dtype: Any = eqx.field(static=True)

    def __call__(self, observation: Any) -> Float[Array, " F"]:
        if isinstance(self.source, jax.Array):
            return gather(self.source, observation).astype(self.dtype)
        return jnp.asarray(self.source(observation), self.dtype)


class GreedyPolicy(Policy):
    """grad Omega*(Q(observation)), [A]."""

    q: ActionFunction
    regularizer: Regularizer

    def distribution(self, observation):
        here = at_states(self.regularizer, jnp.asarray(observation))
        return Categorical(here.policy(self.q.all(observation)))


def values_at(problem: SampledProblem, x: Any, features: Any, initial_value: Any) -> Values:
    """The values of the problem at x: a table that starts from an initial value, or linear if there are features.

    Raises:
      InputError: no features where observations are not states of a table; features of a wrong shape.
    """
    require_reward_alone(problem, "an agent with a table or features")
    states = number_of_states(problem.environment)
    if features is None and states is not None:
        return _table_values(problem, x, states, initial_value)
    if features is None:
        features = getattr(problem, "features", None)
        if features is None:
            raise InputError(
                f"features: observations of {type(problem.environment).__name__} are not the states of a table; give "
                f"a function of the observation that returns [F], or the problem a method features(observation)"
            )
    example, num_actions = problem.observation_space, problem.environment.num_actions
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
    dtype = jax.eval_shape(reward.all, example).dtype
    return LinearValues(reward, Features(features, size, dtype), num_actions)


def _table_values(problem: SampledProblem, x: Any, states: int, initial_value: Any) -> TableValues:
    reward = tabulate(problem.reward(x), states).values
    discount = jnp.asarray(problem.discount, reward.dtype)
    if initial_value is None:
        regularizer = at_states(problem.regularizer(x), jnp.arange(states, dtype=jnp.int32))
        initial_value = jnp.mean(regularizer.conjugate(reward)) / (1 - discount)
    return TableValues(reward, discount * jnp.asarray(initial_value, reward.dtype))
