"""The agent that knows the model: the oracle of the published experiments."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from bilevel_jax.agents.protocol import Agent
from bilevel_jax.bilevel import Problem, SampledProblem, lower_level
from bilevel_jax.bilevel.sampled_problem import require_reward_alone
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import where_converged
from bilevel_jax.environments import TabularPolicy
from bilevel_jax.solvers import Solver, solve


class ExactState(eqx.Module):
    """`value` V, from which the next solve starts; `policy`; `error_bound` of V, infinite before the first
    solve.
    """

    value: Float[Array, "*contexts S"]
    policy: TabularPolicy
    error_bound: Float[Array, ""]


class ExactAgent(Agent):
    """An agent that solves the lower level on the model, warm-started. It takes no steps of the simulator.

    Args:
      solver: the solver of the lower level; None is `Auto()`. A solver of your own may stop early, and the policy is
        then the one that it reached. Where `Auto()` stops early, which it should not, the policy is NaN.

    Raises:
      InputError: the problem has no model, i.e. not the methods of `bilevel_jax.Problem`.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.ExactAgent()
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    solver: Solver | None = None

    def init(self, key, problem, x):
        del key
        if not isinstance(problem, Problem):
            raise InputError(
                f"problem: ExactAgent needs the model, but {type(problem).__name__} has no mdp(x) and objective; "
                f"use an agent that learns from samples, e.g. SoftQLearning()"
            )
        if isinstance(problem, SampledProblem):
            require_reward_alone(problem, "ExactAgent")
        reward = problem.mdp(x).reward
        uniform = jnp.full_like(reward, 1 / reward.shape[-1])
        return ExactState(jnp.zeros_like(reward[..., 0]), _table(uniform), jnp.full((), jnp.inf, reward.dtype))

    def improve(self, key, state, problem, x):
        del key
        model: Any = problem
        solution = solve(*lower_level(model, x), solver=self.solver, initial_value=state.value)
        policy = solution.policy if self.solver is not None else where_converged(solution.result, solution.policy)
        return ExactState(solution.value, _table(policy), jnp.max(solution.stats.error_bound))

    def policy(self, state, problem, x):
        del problem, x
        return state.policy

    def environment_steps(self, problem):
        del problem
        return 0

    def report(self, state):
        """Return `value_error_bound`, the bound on |V - V*|, the largest over all states and contexts."""
        return {"value_error_bound": state.error_bound}


def _table(policy: Float[Array, "*contexts S A"]) -> TabularPolicy:
    """The policies of contexts as the policy of the flattened contexts."""
    return TabularPolicy(policy.reshape(-1, policy.shape[-1]))
