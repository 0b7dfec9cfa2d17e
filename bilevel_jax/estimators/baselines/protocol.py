"""What a baseline is, and what several share."""

import abc
from typing import Any, ClassVar

import equinox as eqx
from jaxtyping import Array, Float

from bilevel_jax.bilevel.sampled_problem import SampledProblem, require_tabular
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import Policy, TabularEnvironment, Trajectory
from bilevel_jax.estimators.costs import Costs


class Baseline(eqx.Module):
    """The protocol of a baseline, which is charged to each action so that the estimate has less variance.

    `of_pairs` says whether the credit is a function of the state and the action alone, of mean 0 over the actions of
    the policy, as some responses need it. What a trajectory paid is not.
    """

    of_pairs: ClassVar[bool] = False

    @property
    def learns_first(self) -> bool:
        """Whether it learns from a batch before it is used on it; see `LearnedAdvantage`."""
        return False

    def init(self, problem: SampledProblem) -> Any:
        """The state before anything was learned; None for baselines that learn nothing."""
        del problem

    def update(self, state: Any, problem: SampledProblem, groups: Trajectory, costs: Costs) -> Any:
        """Learn from a batch, for later ones."""
        del problem, groups, costs
        return state

    @abc.abstractmethod
    def credit(
        self, state: Any, problem: SampledProblem, policy: Policy, groups: Trajectory, costs: Costs
    ) -> Float[Array, " N #I H"]:
        """Return the credits, in the units of `costs.returns()`, from groups [N, I, H] and their costs, [N, H].

        Credits [N, 1, H] are those of all trajectories of a group.
        """


class Subtraction(Baseline):
    """Costs from a step on, minus `values`, which do not change the mean."""

    @abc.abstractmethod
    def values(self, state: Any, problem: SampledProblem, groups: Trajectory, costs: Costs) -> Float[Array, " N #I H"]:
        """They may depend on a step's own past and on other groups, never on its own future.

        Values [N, 1, H] are those of all trajectories of a group.
        """

    def credit(self, state, problem, policy, groups, costs) -> Float[Array, " N #I H"]:
        del policy
        return costs.returns()[:, None] - self.values(state, problem, groups, costs)


def require_single(name: str, problem: SampledProblem) -> TabularEnvironment:
    """The environment, if it is tabular and losses look at one trajectory. Raises InputError."""
    require_one_trajectory(name, problem)
    return require_tabular(problem, name)


def require_one_trajectory(name: str, problem: SampledProblem) -> None:
    """Raise InputError unless losses look at one trajectory."""
    if problem.trajectories != 1:
        raise InputError(
            f"trajectories: {name} is for losses of one trajectory, the problem has {problem.trajectories}; use "
            f"LeaveOneOut()"
        )
