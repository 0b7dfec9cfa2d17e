"""The part that penalty methods with two policies share: two agents, and the gradient from what both earn."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.algorithms.base import State
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm, batch_steps
from bilevel_jax.algorithms.sampled.returns import reward_returns
from bilevel_jax.algorithms.upper import at_iteration
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.environments import Policy, Trajectory
from bilevel_jax.estimators import group_costs, sample_groups
from bilevel_jax.estimators.costs import Costs


class PenaltyGradient(NamedTuple):
    """The gradient of E_pi[l] + gap / softness in x, a pytree like x, at two policies that are constants.

    `own` and `groups` are the batches [N, I, H] under the first and the second policy, `value` the mean loss of
    `groups`, `costs` what each of them paid, and `gap` the discounted sum of r_x of `own` less that of `groups`, [].
    """

    gradient: Any
    value: Float[Array, ""]
    gap: Float[Array, ""]
    own: Trajectory
    groups: Trajectory
    costs: Costs


class TwoPolicies(SampledAlgorithm):
    """An algorithm with two agents, whose states are stacked: first the lower level, then the penalized policy.

    `softness` gives w at each iteration, in units of the reward per unit of the loss; `batch` is the number of groups
    per iteration and policy (static).
    """

    agent: eqx.AbstractVar[Any]
    softness: eqx.AbstractVar[Callable]
    batch: eqx.AbstractVar[int]

    @abc.abstractmethod
    def agent_problem(self) -> SampledProblem:
        """The problem that an agent is started on."""

    def init_agent(self, key, x):
        alone = self.agent.init(key, self.agent_problem(), x)
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), alone)

    def softness_at(self, state: State) -> Float[Array, ""]:
        """Return w at an iteration."""
        return jnp.asarray(self.softness(state.iteration), self.problem.discount.dtype)

    def report_agent(self, agent):
        return self.agent.report(_of(agent, 0))

    def policy(self, state):
        return self._policy(state, 0)

    def _policy(self, state: State, which: int) -> Policy:
        """That of the lower level, 0, or the penalized one, 1."""
        return self.agent.policy(_of(state.memory.agent, which), at_iteration(self, state.iteration).problem, state.x)

    def penalty_gradient(self, key: PRNGKeyArray, state: State) -> PenaltyGradient:
        """Estimate the gradient from a batch per policy, on the same random numbers: where the policies agree, what
        they earn cancels.
        """
        problem, softness = self.problem, self.softness_at(state)
        for_groups, for_loss = jax.random.split(key)
        own, groups = (sample_groups(for_groups, problem, self._policy(state, i), self.batch) for i in (0, 1))

        def earned(x: Any, groups: Trajectory) -> Float[Array, ""]:
            return jnp.mean(reward_returns(problem, x, merge_axes(groups))[:, 0])

        def penalized(x: Any) -> tuple[Float[Array, ""], Any]:
            costs = group_costs(for_loss, problem, x, groups)
            value = mean_loss(costs)
            gap = earned(x, own) - earned(x, groups)
            return value + gap / softness.astype(gap.dtype), stop_gradient((value, gap, costs))

        gradient, (value, gap, costs) = jax.grad(penalized, has_aux=True)(state.x)
        return PenaltyGradient(gradient, value, gap, own, groups, costs)

    @property
    def environment_steps(self):
        return 2 * (self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch))


def mean_loss(costs: Costs) -> Float[Array, ""]:
    """The mean over groups of their discounted costs, []."""
    return jnp.sum(costs.factors[None] * costs.each) / costs.each.shape[0]


def _of(agents: Any, which: int) -> Any:
    """The state of one of the two agents."""
    return jax.tree.map(lambda leaf: leaf[which], agents)
