"""A penalty method with two policies: first-order, from samples, with any agent that has a network."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.agents import Agent, GaussianActorCritic, SoftPQN
from bilevel_jax.agents.deep.gaussian import Uniform
from bilevel_jax.agents.processes import number_of_states
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledEstimate, has_nan
from bilevel_jax.algorithms.sampled.two_policies import TwoPolicies, mean_loss
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import Penalized, SampledProblem
from bilevel_jax.bilevel.penalized import costs_alone
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.schedules import as_schedule
from bilevel_jax.core.validation import as_size, is_known
from bilevel_jax.environments import Box, Categorical, Distribution, Policy, Trajectory
from bilevel_jax.environments.spaces import Space
from bilevel_jax.estimators import group_costs, sample_groups
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.networks import OneHot


class TwoPolicyPenalty(TwoPolicies):
    """See `two_policy_penalty`.

    The agent's state holds the states of two agents, stacked: first that of the lower level, then that of the penalized
    policy. `objective` is the loss under the first.
    """

    agent: Agent
    softness: Callable
    batch: int = eqx.field(static=True)

    @classmethod
    def requires(cls, problem):
        reason = super().requires(problem)
        if reason is not None:
            return reason
        if problem.trajectories != 1:
            return f"has a loss that compares {problem.trajectories} trajectories, so that no step has a cost"
        if is_known(problem.loss_discount, problem.discount) and problem.loss_discount != problem.discount:
            upper, lower = float(problem.loss_discount), float(problem.discount)
            return f"has costs discounted by {upper:.6g}, but an agent that discounts by {lower:.6g}"
        return None

    def start(self, x):
        """Return x as every algorithm does. Raises InputError also where costs are not those of single steps."""
        x = super().start(x)
        problem = self.problem
        if is_known(*jax.tree.leaves((x, problem))):
            key = jax.random.key(0)
            groups = sample_groups(key, problem, _Uniform(problem.action_space), 2)
            costs = group_costs(key, problem, x, groups)
            # NaN costs, of an x of NaN for instance, are what the first step reports.
            if not has_nan(jnp.where(groups.valid[:, 0], costs.each, 0)) and bool(self._history(x, groups, costs)):
                raise InputError(
                    f"loss: two_policy_penalty needs costs [H] whose entry h depends on step h alone, without random "
                    f"numbers, but those of {type(problem).__name__} are others in a trajectory than step by step; use "
                    f"sobirl"
                )
        return x

    def agent_problem(self):
        return self._penalized(jnp.zeros(()))

    def improve_agent(self, key, state):
        def improve(agent: Any, softness: Float[Array, ""]) -> Any:
            # The same key on both sides, so that what they share cancels.
            return self.agent.improve(key, agent, self._penalized(softness), state.x)

        softness = self.softness_at(state)
        return jax.vmap(improve)(state.memory.agent, jnp.stack([jnp.zeros_like(softness), softness]))

    def _penalized(self, softness: Float[Array, ""]) -> Penalized:
        return Penalized(self.problem, softness)

    def estimate_from_samples(self, key, state):
        made = self.penalty_gradient(key, state)
        wrong = self._history(state.x, made.groups, made.costs) | has_nan(self._policy(state, 1))
        wrong |= ~(self.softness_at(state) > 0) | (self.problem.loss_discount != self.problem.discount)
        value = mean_loss(group_costs(key, self.problem, state.x, made.own))  # any key: losses that draw are refused
        return SampledEstimate(
            value=jnp.where(wrong, jnp.nan, value),
            gradient=made.gradient,
            memory=None,
            effective_sample_size=jnp.asarray(float(self.batch)),
            reports={"objective_of_penalized": made.value, "reward_gap": made.gap},
        )

    def _history(self, x: Any, groups: Trajectory, costs: Costs) -> Any:
        """Whether costs in groups are others than those of the steps alone."""
        alone = jnp.where(groups.valid[:, 0], costs_alone(self.problem, x, merge_axes(groups)), 0)
        together = jnp.where(groups.valid[:, 0], costs.each, 0)
        size = jnp.max(jnp.abs(together))
        rounding = min(1e3 * float(jnp.finfo(size.dtype).eps), 0.05)
        return ~(jnp.max(jnp.abs(alone - together)) <= rounding * size)  # of a NaN alone, too


def two_policy_penalty(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    batch: int = 64,
    softness: float | Callable = 0.1,
) -> TwoPolicyPenalty:
    """The value penalty of Shen, Yang and Chen (ICML 2024, arXiv 2402.06886) with networks, for any actions.

    The cost of step h is c_h, entry h of `problem.loss`; l = sum_h discount^h c_h, and f(x, pi) = E_pi[l]. J(x, pi) is
    the discounted reward r_x less the regularizer. Two agents learn at the same time. The first one earns r_x, and
    learns pi*(x). The second one earns r_x - w c; its policy pi minimizes f(x, pi) + (J(x, pi*(x)) - J(x, pi)) / w. x
    descends along the derivative of that minimum, in which both policies are constants; E_own is the mean under the
    first agent's policy, E_pi that under the second's:

      grad = E_pi[ dl/dx ] + (1 / w) (E_own - E_pi)[ sum_h discount^h dr_x(s_h, a_h) ].

    It needs no derivative of a log-policy, no advantage and no further rollouts, so that it works for continuous
    actions as for numbered ones. It tends to the hyper-gradient as w tends to 0. Its bias is proportional to w, and its
    noise to 1 / w where the policies differ by chance. Both agents and both batches use the same random numbers, so
    that much of the noise cancels. J in the gradient is cut at the problem's horizon.

    The info's `objective` is the mean loss under the first agent's policy. Its reports have `objective_of_penalized`,
    the same under the second's, `reward_gap`, the discounted sum of r_x of the first less that of the second, without
    the regularizer, and `agent`, the numbers of the first.

    Args:
      problem: a `SampledProblem` whose loss is [H] of one trajectory, with an entry h that depends on step h alone, and
        `loss_discount` equal to `discount`; its numbers are leaves.
      optimizer: an optax transformation, or an `UpperLevel`.
      agent: both agents; one with a network. None is `GaussianActorCritic()` for continuous actions, else `SoftPQN()`
        (on a table with `OneHot` observations).
      batch: trajectories per iteration and policy (static).
      softness: w, above 0: a number or a function of the iteration, in units of the reward per unit of the loss.

    Raises:
      InputError: batch below 1, softness not above 0; in `init`, costs that are not those of single steps, or an agent
        that learns from reward(x) alone. What is not known until the run makes the objective NaN instead.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> agent = bj.agents.SoftPQN(bj.networks.OneHot(8), processes=4, steps=8)
      >>> algorithm = bj.algorithms.two_policy_penalty(problem, optax.sgd(0.1), agent=agent, batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    agent = _default_agent(problem) if agent is None else agent
    softness = as_schedule("softness", softness)
    return TwoPolicyPenalty(problem, optimizer, agent=agent, softness=softness, batch=as_size("batch", batch))


def _default_agent(problem: SampledProblem) -> Agent:
    if isinstance(problem.action_space, Box):
        return GaussianActorCritic()
    states = number_of_states(problem.environment)
    return SoftPQN() if states is None else SoftPQN(OneHot(states))


class _Uniform(Policy):
    """Any action, for a look at the costs."""

    space: Space

    def distribution(self, observation: Any) -> Distribution:
        del observation
        if isinstance(self.space, Box):
            low, high = self.space.low, self.space.high
            low = jnp.where(jnp.isfinite(low), low, jnp.where(jnp.isfinite(high), high - 1, -1))
            return Uniform(low, jnp.where(jnp.isfinite(high), high, low + 1))
        return Categorical(jnp.full(self.space.n, 1 / self.space.n))


register_algorithm("two_policy_penalty", two_policy_penalty)
