"""A single loop of two actor-critics, penalty and entropy attenuating: first-order bilevel RL from samples."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient

from bilevel_jax.agents import ActorCritic, Polynomial
from bilevel_jax.agents.schedules import as_schedule
from bilevel_jax.algorithms.sampled import SampledAlgorithm, SampledEstimate, batch_steps, require_batch
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level
from bilevel_jax.algorithms.visits import Visits, reward_returns
from bilevel_jax.environments import Trajectory
from bilevel_jax.estimators import LeaveOneOut, SampledProblem, paid, sample_groups
from bilevel_jax.estimators.costs import Costs
from bilevel_jax.estimators.problem import discounts, require_tabular
from bilevel_jax.validation import as_float, require_instance, require_positive


class Attenuation(eqx.Module):
    """Factor of the temperature: start / (1 + iteration / scale)^power, down to `end`. See `UpperLevel.temperature`."""

    decay: Polynomial
    end: jax.Array

    def __init__(self, start: Any = 4.0, scale: Any = 20.0, power: Any = 0.5, end: Any = 1.0):
        self.decay = Polynomial(start, scale, power)
        self.end = as_float("end", end, float)

    def __call__(self, iteration: jax.Array) -> jax.Array:
        return jnp.maximum(self.decay(iteration), self.end)


class AttenuatingActorCritic(SampledAlgorithm):
    """See `attenuating_actor_critic`.

    The agent's state is that of two, the lower level's own first and the penalized one second, stacked.
    The memory is the upper level's critic U[S, A]: df/dpi over the discounted visits, up to a number a state.
    """

    agent: ActorCritic
    softness: Callable
    cost_rate: jax.Array
    batch: int = eqx.field(static=True)

    def init_agent(self, key, x):
        alone = self.agent.init(key, self.problem, x)
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), alone)

    def init_memory(self, x):
        del x
        environment = require_tabular(self.problem, "attenuating_actor_critic")
        return jnp.zeros((environment.num_states, environment.num_actions), self.problem.discount.dtype)

    def improve_agent(self, key, state):
        costs = jnp.stack([jnp.zeros_like(state.memory), self.softness_at(state) * state.memory])
        # The same key on both sides, so that what they share cancels.
        improve = jax.vmap(self.agent.improve_against, (None, 0, None, None, 0))
        return improve(key, state.agent, self.problem, state.x, costs)

    def softness_at(self, state: Any) -> jax.Array:
        """w of an iteration, []."""
        return jnp.asarray(self.softness(state.iteration), state.memory.dtype)

    def policy(self, state):
        return self._policy(state, 0)

    def _policy(self, state: Any, which: int) -> Any:
        agent = jax.tree.map(lambda leaf: leaf[which], state.agent)
        return self.agent.policy(agent, self.problem, state.x)

    def estimate(self, key, state):
        problem = self.problem
        for_groups, for_loss = jax.random.split(key)
        own, groups = (sample_groups(for_groups, problem, self._policy(state, i), self.batch) for i in (0, 1))
        softness = self.softness_at(state)

        def earned(x, groups):
            return jnp.mean(reward_returns(problem, x, _each(groups))[:, 0])

        def surrogate(x):
            costs = paid(for_loss, problem, x, groups)
            value = jnp.sum(costs.factors[None] * costs.each) / self.batch
            gap = earned(x, own) - earned(x, groups)
            return value + gap / softness.astype(gap.dtype), (value, stop_gradient(costs))

        gradient, (value, costs) = jax.grad(surrogate, has_aux=True)(state.x)
        critic = self._criticize(state, groups, costs)
        return SampledEstimate(value, gradient, critic, jnp.asarray(float(self.batch)))

    def _criticize(self, state: Any, groups: Trajectory, costs: Costs) -> jax.Array:
        """U moved towards the batch: what was still to pay over the discounted visits, pair by pair."""
        problem, critic, shape = self.problem, state.memory, groups.action.shape
        credit = LeaveOneOut().credit(None, problem, self._policy(state, 1), groups, costs) * costs.factors[None, None]
        credit = jnp.broadcast_to(problem.trajectories * credit, shape).astype(critic.dtype)
        weights = jnp.broadcast_to(discounts(problem, problem.horizon).astype(critic.dtype), shape)
        visits = Visits.of(require_tabular(problem, "attenuating_actor_critic"), _each(groups))

        def total(values: jax.Array) -> jax.Array:
            kept = jnp.where(visits.valid, values.reshape(visits.pair.shape), 0)
            return jnp.zeros(critic.size, critic.dtype).at[visits.pair].add(kept)

        weight = total(weights)
        mean = total(credit) / jnp.where(weight > 0, weight, 1)
        rate = 1 - (1 - jnp.minimum(self.cost_rate.astype(critic.dtype), 1)) ** weight
        return critic + (rate * (mean - critic.reshape(-1))).reshape(critic.shape)

    @property
    def environment_steps(self):
        return 2 * (self.agent.environment_steps(self.problem) + batch_steps(self.problem, self.batch))


def attenuating_actor_critic(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: ActorCritic | None = None,
    batch: int = 64,
    softness: Any = None,
    cost_rate: Any = 0.1,
) -> AttenuatingActorCritic:
    """A regularized actor-critic for bilevel RL (Zeng, Bhatt, Ganesh and Koppel, AISTATS 2026, arXiv 2601.16399).

    Two policies learn at once: one the lower level's optimum, one the minimizer pi of the penalized
    f(x, pi) + (1 / w) (J*(x) - J(x, pi)), J the discounted, regularized reward from the start of the process.
    x descends along the difference of two first-order gradients,

      grad = E_pi[ dl/dx ] + (1 / w) (E_own - E_pi)[ sum_h discount^h dr_x(s_h, a_h) ],

    which tends to the hyper-gradient as w tends to 0, with no derivative of a policy and no inner loop.

    From the paper's abstract, all of it that we had: the penalty, one loop, first-order actor-critic
    steps on samples, and an entropy of decaying weight in the lower level, which removes the bias in the
    limit. Everything else is ours:
    the decay of the temperature and of w, the time scales, and
      - two `ActorCritic` agents on the same random numbers, the second one's actor following Q - w U;
      - U, a table: what is still to be paid after a pair (less the mean of the batch's other groups), summed
        over its visits and divided by their discount^h: df/dpi over the discounted visits, any loss;
      - the gradient from a batch of either policy, on the same random numbers: where the two agree, no noise.

    The temperature goes down to the problem's own, which is what objectives are compared at: `Attenuation()`
    unless the `UpperLevel` brings a schedule. In the paper it goes to 0, for a problem without regularization:
    `UpperLevel(optimizer, temperature=Attenuation(end=0.0))`. J is cut at the problem's horizon in x's gradient.

    Args:
      problem: a `SampledProblem` on a table; its numbers are leaves.
      optimizer: of x, an optax transformation or an `UpperLevel`. Slower than the actors.
      agent: both actor-critics; None is `ActorCritic()`.
      batch: groups of trajectories an iteration and policy (static).
      softness: w, above 0: a number or a function of the iteration; None is `Polynomial(0.5, 10.0, 0.5)`.
        The noise of the gradient grows as its inverse square root, the bias is proportional to it.
      cost_rate: share by which U moves towards what one visit says, in (0, 1].

    Raises:
      InputError: batch below 1, softness or cost_rate not above 0, an argument of another type; in `init`, an
        environment that is not tabular.
    """
    require_instance("agent", agent, ActorCritic | None)
    cost_rate = as_float("cost_rate", cost_rate, float)
    require_positive("cost_rate", cost_rate, "0.1 is usual")
    upper = as_upper_level(optimizer)
    if upper.temperature is None:
        upper = UpperLevel(upper.optimizer, projection=upper.projection, temperature=Attenuation())
    softness = Polynomial(0.5, 10.0, 0.5) if softness is None else as_schedule("softness", softness)
    agent = ActorCritic() if agent is None else agent
    return AttenuatingActorCritic(problem, upper, agent, softness, cost_rate, require_batch(batch))


def _each(groups: Trajectory) -> Trajectory:
    """Groups [N, I, H] as trajectories [N I, H]."""
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)
