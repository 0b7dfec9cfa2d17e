"""What a lower-level agent is: something that improves its policy from a simulator, warm-started."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.estimators.problem import SampledProblem
from bilevel_jax.functions import ActionFunction, tabulate


class Agent(eqx.Module):
    """The protocol. The state is carried across upper iterations: what was learned at the last x is kept."""

    @abc.abstractmethod
    def init(self, key: jax.Array, problem: SampledProblem, x: Any) -> Any:
        """The state of an agent that has learned nothing yet."""

    @abc.abstractmethod
    def improve(self, key: jax.Array, state: Any, problem: SampledProblem, x: Any) -> Any:
        """Learn at x for a fixed amount of work."""

    @abc.abstractmethod
    def policy(self, state: Any, problem: SampledProblem, x: Any) -> ActionFunction:
        """The policy: a function of the observation that gives probabilities [A]."""

    @abc.abstractmethod
    def environment_steps(self, problem: SampledProblem) -> int:
        """Steps of the simulator that one `improve` takes."""


def policy_gap(policy: ActionFunction, optimal: jax.Array) -> jax.Array:
    """|pi - pi*|^2, summed over the actions and averaged over the states, [].

    Args:
      policy: a `Table` [S, A], or another function of the index of the state.
      optimal: pi* [..., S, A], e.g. `solution.policy`; contexts first, as a `TabularEnvironment` flattens them.
    """
    target = optimal.reshape(-1, optimal.shape[-1])
    values = tabulate(policy, target.shape[0]).values
    return jnp.mean(jnp.sum((values - target.astype(values.dtype)) ** 2, -1))
