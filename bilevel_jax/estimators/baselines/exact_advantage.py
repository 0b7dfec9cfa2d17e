"""The upper level's advantage of the model."""

from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bilevel_jax.bilevel.sampled_problem import require_tabular
from bilevel_jax.core.arrays import PerPair
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.reductions import einsum, matmul
from bilevel_jax.core.validation import as_float
from bilevel_jax.environments import TabularEnvironment, policy_table
from bilevel_jax.estimators.baselines.protocol import Baseline, require_single
from bilevel_jax.linear import default_linear_solver, linear_solve
from bilevel_jax.mdp.transitions import DenseOperator


class ExactAdvantage(Baseline):
    """U(s, a) - E_pi U(s, .), with U = costs + discount P pi U solved in the model: the reference for learned credits.

    The horizon is taken to be infinite.

    Args:
      costs: the mean cost that the upper level pays for each pair, [S, A].

    Raises:
      InputError: costs are not of the shape [S, A] of the environment; the environment is not tabular; the loss depends
        on more than one trajectory, or is not discounted.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20, price=0)
      >>> baseline = bj.estimators.ExactAdvantage(problem.cost)
      >>> response = bj.estimators.EligibilityTrace(1.0)
      >>> algorithm = bj.algorithms.sobirl(problem, optax.adam(0.1), response=response, baseline=baseline)
    """

    costs: PerPair

    of_pairs: ClassVar[bool] = True

    def __init__(self, costs: Real[ArrayLike, "S A"] | Any):
        self.costs = as_float("costs", costs)

    def init(self, problem):
        environment = require_single("ExactAdvantage", problem)
        expected = (environment.num_states, environment.num_actions)
        if self.costs.shape != expected:
            raise InputError(f"costs: expected shape [S, A] = {list(expected)}, got {list(self.costs.shape)}")

    def credit(self, state, problem, policy, groups, costs) -> Float[Array, "N I H"]:
        del state
        environment = require_tabular(problem, "ExactAdvantage")
        pi = policy_table(policy, environment.num_states).astype(self.costs.dtype)
        q = self.values(environment, pi, jnp.asarray(costs.discount, self.costs.dtype))
        advantage = q - jnp.sum(pi * q, -1, keepdims=True)
        pair = environment.pair(groups.observation, groups.action)
        return advantage.reshape(-1)[pair].astype(costs.each.dtype)

    def values(self, environment: TabularEnvironment, pi: PerPair, discount: Float[Array, ""]) -> PerPair:
        """U, [S, A], of a policy."""
        follows = discount * _kernel(environment, self.costs.dtype)
        operator = DenseOperator(einsum("sa,sat->st", pi, follows))
        solver = default_linear_solver(pi.shape[0])
        value, _ = linear_solve(solver, operator, discount, jnp.sum(pi * self.costs, -1), poison=True)
        return self.costs + matmul(follows, value)


def _kernel(environment: TabularEnvironment, dtype: Any) -> Float[Array, "S A T"]:
    """The probabilities with which a pair goes on to each state, as the simulator draws them."""
    sums = jnp.clip(environment.threshold, 0, 1).astype(dtype)
    chances = jnp.diff(sums, axis=-1, prepend=jnp.zeros_like(sums[:, :1]))
    ends = environment.ends if environment.ends.ndim > 1 else environment.ends[:, None]
    chances = jnp.where(ends, 0, chances)
    rows = jnp.broadcast_to(jnp.arange(environment.num_pairs)[:, None], chances.shape)
    kernel = jnp.zeros((environment.num_pairs, environment.num_states), dtype)
    return (
        kernel.at[rows, environment.successor]
        .add(chances)
        .reshape(environment.num_states, environment.num_actions, environment.num_states)
    )
