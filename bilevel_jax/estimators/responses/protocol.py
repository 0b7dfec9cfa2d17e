"""What a response is: an estimator of dQ* - dV* at visited pairs."""

import abc
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.environments import Policy, Trajectory


class Response(eqx.Module):
    """The protocol of a response. Only a response that learns has a state.

    `credit_of_pairs` says whether it needs a baseline that is `of_pairs`.
    """

    credit_of_pairs: ClassVar[bool] = False

    @property
    def learns_first(self) -> bool:
        """Whether it learns from a batch before it is used on it; see `LearnedModel`."""
        return False

    def init(self, problem: SampledProblem, x: Any) -> Any:
        """The state before anything was learned; None for estimators that learn nothing."""
        del problem, x

    def update(self, state: Any, problem: SampledProblem, x: Any, policy: Policy, groups: Trajectory) -> Any:
        """Learn from groups [N, I, H] drawn under `policy` at x.

        An estimator that is to be unbiased uses what it learned only for later batches: the product of two estimates is
        unbiased if they are independent.
        """
        del problem, x, policy, groups
        return state

    @abc.abstractmethod
    def surrogate(
        self,
        key: PRNGKeyArray,
        state: Any,
        problem: SampledProblem,
        x: Any,
        policy: Policy,
        trajectories: Trajectory,
        credit: Float[Array, "B H"],
    ) -> Float[Array, ""]:
        """A scalar whose gradient in x estimates sum_bh credit[b, h] (dQ* - dV*)[s_bh, a_bh].

        Args:
          trajectories: [B, H], drawn under `policy`. Constants for derivatives.
          credit: 0 on steps that are not valid.
        """

    def environment_steps(self, problem: SampledProblem, batch: int) -> int:
        """Return the number of simulator steps that `surrogate` takes for B = batch trajectories."""
        del problem, batch
        return 0
