"""The agent that knows the model: the oracle of the published experiments."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel_jax.agents.protocol import Agent
from bilevel_jax.errors import InputError
from bilevel_jax.functions import Table
from bilevel_jax.hypergradient import Problem, lower_level
from bilevel_jax.results import where_converged
from bilevel_jax.solvers import Solver, solve


class ExactAgent(Agent):
    """Solves the lower level on the model, warm-started; takes no steps of the simulator.

    Args:
      solver: of the lower level; None is `Auto()`. One of your own may stop early, what it leaves is the answer; where
        `Auto()` does, which is to solve, the policy is NaN.

    Raises:
      InputError: the problem has no model, i.e. not the methods of `bilevel_jax.Problem`.
    """

    solver: Solver | None = None

    def init(self, key, problem, x):
        del key
        if not isinstance(problem, Problem):
            raise InputError(
                f"problem: ExactAgent needs the model, but {type(problem).__name__} has no mdp(x) and objective; "
                f"use an agent that learns from samples, e.g. SoftQLearning()"
            )
        reward = problem.mdp(x).reward
        uniform = jnp.full_like(reward, 1 / reward.shape[-1])
        return jnp.zeros_like(reward[..., 0]), _table(uniform)

    def improve(self, key, state, problem, x):
        del key
        model: Any = problem
        solution = solve(*lower_level(model, x), solver=self.solver, initial_value=state[0])
        policy = solution.policy if self.solver is not None else where_converged(solution.result, solution.policy)
        return solution.value, _table(policy)

    def policy(self, state, problem, x):
        del problem, x
        return state[1]

    def environment_steps(self, problem):
        del problem
        return 0


def _table(policy: jax.Array) -> Table:
    """[..., S, A] as the table of the flattened contexts."""
    return Table(policy.reshape(-1, policy.shape[-1]))
