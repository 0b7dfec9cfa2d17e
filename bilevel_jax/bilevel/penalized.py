"""A problem whose agent pays a share of the upper level's costs, for penalty methods with two policies."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Real

from bilevel_jax.bilevel.sampled_problem import SampledProblem
from bilevel_jax.bilevel.wrapper import WrappedSimulator
from bilevel_jax.core.errors import InputError
from bilevel_jax.environments import Trajectory


class Penalized(WrappedSimulator):
    """A `SampledProblem` whose agent earns r_x - softness * c in each step, c the cost that the upper level pays there.

    Its optimal policy minimizes f(x, pi) + (J*(x) - J(x, pi)) / softness over pi, J the discounted, regularized reward,
    if costs are discounted as the agent discounts. The costs c are the entries of `loss`, [H]. Entry h must depend on
    step h alone, and `loss_discount` must equal `discount`. Agents with networks learn it; those with tables refuse it.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> penalized = bj.bilevel.Penalized(problem, jnp.asarray(0.1))
      >>> penalized.earns_reward_alone
      False
    """

    softness: Real[Array, ""]

    def __init__(self, problem: SampledProblem, softness: Real[Array, ""]):
        self.problem, self.softness = problem, softness

    def earned(self, x: Any, trajectories: Trajectory) -> Float[Array, "B H"]:
        gained, costs = self.problem.earned(x, trajectories), costs_alone(self.problem, x, trajectories)
        return gained - self.softness.astype(gained.dtype) * costs.astype(gained.dtype)

    @property
    def earns_reward_alone(self) -> bool:
        return False


def costs_alone(problem: SampledProblem, x: Any, trajectories: Trajectory) -> Float[Array, "B H"]:
    """The costs of the steps of trajectories [B, H], each from a loss of that step alone.

    Raises:
      InputError: the loss is of several trajectories or no sum over steps, or cannot be asked for one step alone.
    """
    name = type(problem).__name__
    if problem.trajectories != 1:
        raise InputError(
            f"problem: the loss of {name} compares {problem.trajectories} trajectories, so that no step has a cost"
        )

    def cost(step: Trajectory) -> Float[Array, ""]:
        alone = jax.tree.map(lambda leaf: leaf[None, None], step)
        made = jnp.asarray(problem.loss(jax.random.key(0), x, alone))
        if made.shape != (1,):
            raise InputError(
                f"loss: expected [H] costs, [1] for one step alone, but that of {name} has shape {list(made.shape)}; "
                f"costs of single steps are needed here"
            )
        return made[0] if jnp.issubdtype(made.dtype, jnp.inexact) else made[0].astype(float)

    try:
        return jax.vmap(jax.vmap(cost))(trajectories._replace(state=None))
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, InputError):
            raise
        text = " ".join(str(error).split())
        raise InputError(
            f"loss: that of {name} cannot be asked for one step alone, as a trajectory [1, 1] ({text:.200}); write it "
            f"so that entry h depends on step h alone, sizes are those of the trajectory, and states are read from "
            f"`observation`, as agents record no `state`"
        ) from error
