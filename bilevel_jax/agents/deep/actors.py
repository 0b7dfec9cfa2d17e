"""Policies whose numbers are a network's own outputs, and what they do before they have learned anything."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Real

from bilevel_jax.agents.deep.gaussian import Gaussian, Uniform, of_numbers
from bilevel_jax.agents.processes import at_states, mixed
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import Box, Categorical, Distribution, Policy
from bilevel_jax.environments.policies import finite
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer, ShannonEntropy
from bilevel_jax.networks import Network


class CategoricalActor(Policy):
    """softmax(y) of a network's outputs y, times the reference of a `KLDivergence`, normalized."""

    network: Network
    params: Any
    regularizer: Regularizer

    def distribution(self, observation):
        logits = self.network.apply(self.params, observation)
        local = at_states(self.regularizer, observation)
        if isinstance(local, KLDivergence):
            logits = logits + jnp.log(local.reference).astype(logits.dtype)
        return Categorical.from_logits(logits)


class GaussianActor(Policy):
    """The distribution on a box that a network's outputs stand for; see `gaussian.of_numbers`."""

    network: Network
    params: Any
    space: Box
    squash: bool = eqx.field(static=True)

    def distribution(self, observation):
        return of_numbers(self.network.apply(self.params, observation), self.space, squash=self.squash)


class Exploring(Policy):
    """A policy, replaced with probability epsilon by the uniform one over the actions that are allowed.

    `policy` has the field `regularizer`, which says what is allowed.
    """

    policy: Any
    epsilon: Float[Array, ""]

    def distribution(self, observation):
        own = finite(self.policy.distribution(observation))
        chances = mixed(at_states(self.policy.regularizer, observation), own.probabilities, self.epsilon)
        return dataclasses.replace(own, probabilities=chances, log_probabilities=None)


class UniformFirst(Policy):
    """A policy, or while `first` actions drawn uniformly from those that are allowed.

    Where the box has no bounds, they are drawn from the standard normal distribution.
    """

    policy: CategoricalActor | GaussianActor
    first: Bool[Array, ""]

    def distribution(self, observation):
        if isinstance(self.policy, CategoricalActor):
            return Exploring(self.policy, self.first.astype(float)).distribution(observation)
        space, learned = self.policy.space, self.policy.distribution(observation)
        nothing = jnp.zeros(space.shape, space.dtype)
        start = Uniform(space.low, space.high) if self.policy.squash else Gaussian(nothing, nothing)
        return OneOfTwo(start, learned, self.first)


class OneOfTwo(Distribution):
    """`one` where `takes_one`, else `other`; actions have the dtype of `one`."""

    one: Distribution
    other: Distribution
    takes_one: Bool[Array, ""]

    def sample(self, key: PRNGKeyArray) -> Float[Array, "..."]:
        one = self.one.sample(key)
        return jnp.where(self.takes_one, one, self.other.sample(key).astype(one.dtype))

    def log_prob(self, action: Real[Array, "..."]) -> Float[Array, ""]:
        other = self.other.log_prob(action)
        return jnp.where(self.takes_one, self.one.log_prob(action).astype(other.dtype), other)

    def entropy(self) -> Float[Array, ""]:
        other = self.other.entropy()
        return jnp.where(self.takes_one, self.one.entropy().astype(other.dtype), other)


def require_log_policy(regularizer: Regularizer, who: str, *, kl: bool = True) -> None:
    """Raise InputError unless the regularizer is the Shannon entropy or, where `kl`, a divergence from a reference."""
    if isinstance(regularizer, ShannonEntropy | KLDivergence if kl else ShannonEntropy):
        return
    wanted = "ShannonEntropy or KLDivergence" if kl else "ShannonEntropy"
    remedy = "SoftPQN() takes any regularizer" if kl else "leave the reference or the tuned temperature out"
    raise InputError(f"regularizer: {who} needs {wanted}, got {type(regularizer).__name__}; {remedy}")
