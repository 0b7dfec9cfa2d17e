"""The protocol of a lower-level agent, which improves its policy from a simulator, warm-started."""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, Real

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.environments import Policy, policy_table


class Agent(eqx.Module):
    """The protocol of an agent.

    Its state is carried across upper iterations, so that it keeps what it learned at the last x.
    """

    @abc.abstractmethod
    def init(self, key: PRNGKeyArray, problem: SampledProblem, x: Any) -> Any:
        """The state of an agent that has learned nothing yet."""

    @abc.abstractmethod
    def improve(self, key: PRNGKeyArray, state: Any, problem: SampledProblem, x: Any) -> Any:
        """Learn at x for a fixed amount of work."""

    @abc.abstractmethod
    def policy(self, state: Any, problem: SampledProblem, x: Any) -> Policy:
        """Return the policy that the agent has learned."""

    @abc.abstractmethod
    def environment_steps(self, problem: SampledProblem) -> int:
        """Return the number of simulator steps that one `improve` takes."""

    def report(self, state: Any) -> dict[str, Real[Array, ""]]:
        """Return numbers by name that describe the last `improve`. By default there are none."""
        del state
        return {}


def policy_gap(policy: Any, optimal: Float[Array, "*contexts S A"]) -> Float[Array, ""]:
    """Return |pi - pi*|^2, summed over the actions and averaged over the states.

    Args:
      policy: a `Policy` whose observations are the indices of states, or probabilities [S, A]; see
        `environments.as_policy`.
      optimal: pi*, e.g. `solution.policy`; contexts first, as a `TabularEnvironment` flattens them.

    Example:
      >>> float(bj.agents.policy_gap(jnp.array([[0.5, 0.5]]), jnp.array([[1.0, 0.0]])))
      0.5
    """
    target = optimal.reshape(-1, optimal.shape[-1])
    values = policy_table(policy, target.shape[0])
    return jnp.mean(jnp.sum((values - target.astype(values.dtype)) ** 2, -1))
