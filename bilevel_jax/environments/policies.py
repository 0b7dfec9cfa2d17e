"""Policies: a distribution over actions for each observation."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int32, PRNGKeyArray, Real

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import ActionFunction, PerAction, Table
from bilevel_jax.core.indexing import gather
from bilevel_jax.core.validation import as_float
from bilevel_jax.environments.sampling import choose, uniform
from bilevel_jax.environments.spaces import Action, Box, Space


class Distribution(eqx.Module):
    """The protocol of a policy's distribution at one observation.

    It is a pytree; vmap its methods over many observations.

    A distribution over finitely many actions is a `Categorical`, whose `probabilities` are known.
    """

    @abc.abstractmethod
    def sample(self, key: PRNGKeyArray) -> Action:
        """Draw an action."""

    @abc.abstractmethod
    def log_prob(self, action: Real[ArrayLike, "..."]) -> Float[Array, ""]:
        """The logarithm of an action's probability, or of its density where actions are continuous, []."""

    @abc.abstractmethod
    def entropy(self) -> Float[Array, ""]:
        """In nats, []; the differential entropy where actions are continuous."""

    def probability(self, action: Real[ArrayLike, "..."]) -> Float[Array, ""]:
        """The probability of an action, or its density, []."""
        return jnp.exp(self.log_prob(action))

    def mode(self) -> Action:
        """The most probable action, or another one that stands for the distribution (see `Greedy`).

        Raises:
          InputError: the class does not say which.
        """
        raise InputError(f"policy: {type(self).__name__} has no mode(); write the method, or do without")


class Categorical(Distribution):
    """The actions 0 to A - 1 with `probabilities` [A], which sum to 1.

    Example:
      >>> coin = bj.environments.Categorical(jnp.array([0.5, 0.5]))
      >>> round(float(coin.entropy()), 3)
      0.693
    """

    probabilities: Float[Array, "*batch A"]
    log_probabilities: Float[Array, "*batch A"] | None = None

    @classmethod
    def from_logits(cls, logits: Float[Array, "*batch A"]) -> "Categorical":
        """Return softmax(logits [A]).

        A logit of -inf forbids an action. Logarithms of small probabilities keep their digits.
        """
        logs = jax.nn.log_softmax(logits)
        return cls(jnp.exp(logs), logs)

    def sample(self, key) -> Int32[Array, ""]:
        return choose(uniform(key), self.probabilities)

    def log_prob(self, action) -> Float[Array, "*batch"]:
        if self.log_probabilities is not None:
            return self.log_probabilities[action]
        return jnp.log(self.probability(action))

    def entropy(self) -> Float[Array, "*batch"]:
        possible = self.probabilities > 0
        logs = jnp.log(jnp.where(possible, self.probabilities, 1))
        return -jnp.sum(jnp.where(possible, self.probabilities * logs, 0), -1)

    def probability(self, action) -> Float[Array, "*batch"]:
        return self.probabilities[action]

    def mode(self) -> Int32[Array, ""]:
        return jnp.argmax(self.probabilities, -1).astype(jnp.int32)


class Policy(eqx.Module):
    """The protocol of a policy. Its arrays are leaves."""

    @abc.abstractmethod
    def distribution(self, observation: Any) -> Distribution:
        """Return the distribution over actions at one observation; vmap it over many."""


class TabularPolicy(Policy):
    """probabilities[S, A], looked up by the index of a state.

    Raises:
      InputError: they are not of the shape [S, A].

    Example:
      >>> policy = bj.environments.TabularPolicy([[0.5, 0.5], [1.0, 0.0]])
      >>> float(policy.distribution(1).probability(0))
      1.0
    """

    probabilities: Float[Array, "S A"]

    def __init__(self, probabilities: Real[ArrayLike, "S A"] | Any):
        self.probabilities = as_float("probabilities", probabilities)
        if self.probabilities.ndim != 2:
            raise InputError(f"probabilities: expected shape [S, A], got {list(self.probabilities.shape)}")

    def distribution(self, observation):
        return Categorical(gather(self.probabilities, observation))


class PolicyFunction(Policy):
    """The policy whose probabilities an `ActionFunction` returns.

    Example:
      >>> table = bj.Table([[0.5, 0.5], [1.0, 0.0]])
      >>> bj.environments.PolicyFunction(table).distribution(1).probabilities.tolist()
      [1.0, 0.0]
    """

    function: ActionFunction

    def distribution(self, observation):
        return Categorical(self.function.all(observation))


def as_policy(policy: Any) -> Policy:
    """A `Policy` from itself, from probabilities [S, A] (an array or a `Table`), or from a function observation -> [A].

    Raises:
      InputError: it is none of these.

    Example:
      >>> policy = bj.environments.as_policy(lambda observation: jnp.array([0.25, 0.75]))
      >>> float(policy.distribution(None).probability(1))
      0.75
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, Table):
        return TabularPolicy(policy.values)
    if isinstance(policy, ActionFunction):
        return PolicyFunction(policy)
    if callable(policy):
        return PolicyFunction(PerAction(policy))
    if getattr(policy, "ndim", None) == 2:
        return TabularPolicy(policy)
    raise InputError(
        f"policy: expected a Policy, probabilities [S, A] or a function of the observation that gives them [A], got "
        f"{type(policy).__name__}"
    )


def finite(distribution: Distribution) -> Categorical:
    """Return the distribution, if it has finitely many actions. Raises InputError otherwise."""
    if not isinstance(distribution, Categorical):
        raise InputError(
            f"policy: the probabilities of all actions are needed, but its distributions are "
            f"{type(distribution).__name__}; take one whose distributions are Categorical"
        )
    return distribution


def policy_table(policy: Any, num_states: int) -> Float[Array, "S A"]:
    """The probabilities [S, A] of a policy whose observations are the states 0 to S - 1; see `as_policy`.

    Raises:
      InputError: its actions are no finite set.

    Example:
      >>> bj.environments.policy_table(lambda state: jnp.array([0.5, 0.5]), 3).shape
      (3, 2)
    """
    policy = as_policy(policy)
    if isinstance(policy, TabularPolicy):
        return policy.probabilities
    return jax.vmap(lambda state: finite(policy.distribution(state)).probabilities)(jnp.arange(num_states))


def require_policy(distributions: Distribution, actions: Real[Array, "B ..."], space: Space) -> None:
    """Raise InputError where the distributions and actions [B, ...] of a policy are not of the environment's space."""
    if isinstance(space, Box):
        if isinstance(distributions, Categorical) or actions.shape[1:] != space.shape:
            got = "numbered actions" if isinstance(distributions, Categorical) else f"shape {list(actions.shape[1:])}"
            raise InputError(f"policy: expected actions of shape {list(space.shape)} (the space is a Box), got {got}")
    else:
        require_policy_shape(finite(distributions).probabilities.shape[1:], (space.n,))


def require_policy_shape(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raise InputError where a policy has other sizes than the environment: look-ups do not check them."""
    if shape != expected:
        raise InputError(f"policy: expected probabilities of shape {list(expected)}, got {list(shape)}")
