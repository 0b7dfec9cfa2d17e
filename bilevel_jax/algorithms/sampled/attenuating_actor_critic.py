"""First-order bilevel RL from samples: two actor-critics in a single loop, whose penalty and entropy attenuate."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.agents import ActorCritic
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import SampledEstimate
from bilevel_jax.algorithms.sampled.two_policies import TwoPolicies
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.bilevel.sampled_problem import discounts, require_tabular
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.schedules import Attenuation, Polynomial, as_schedule
from bilevel_jax.core.validation import as_float, as_size, require_instance, require_positive
from bilevel_jax.environments import Trajectory, Visits
from bilevel_jax.estimators import LeaveOneOut
from bilevel_jax.estimators.costs import Costs


class AttenuatingActorCritic(TwoPolicies):
    """See `attenuating_actor_critic`.

    The agent's state holds the states of two agents, stacked: first that of the lower level, then that of the penalized
    policy. The memory is the upper level's critic U[S, A]. It estimates df/dpi divided by the discounted visits; in
    each state, a constant that is the same for all actions may be added to it, because that changes no policy.
    """

    tabular: ClassVar[bool] = True

    agent: ActorCritic
    softness: Callable
    cost_step_size: Float[Array, ""]
    batch: int = eqx.field(static=True)

    def agent_problem(self):
        return self.problem

    def init_estimator(self, x):
        del x
        environment = require_tabular(self.problem, "attenuating_actor_critic")
        return jnp.zeros((environment.num_states, environment.num_actions), self.problem.discount.dtype)

    def improve_agent(self, key, state):
        costs = jnp.stack([jnp.zeros_like(state.memory.estimator), self.softness_at(state) * state.memory.estimator])
        # The same key on both sides, so that what they share cancels.
        improve = jax.vmap(self.agent.improve_against, (None, 0, None, None, 0))
        return improve(key, state.memory.agent, self.problem, state.x, costs)

    def estimate_from_samples(self, key, state):
        made = self.penalty_gradient(key, state)
        return SampledEstimate(
            value=made.value,
            gradient=made.gradient,
            memory=self._criticize(state, made.groups, made.costs),
            effective_sample_size=jnp.asarray(float(self.batch)),
        )

    def _criticize(self, state: Any, groups: Trajectory, costs: Costs) -> Float[Array, "S A"]:
        """Return U moved towards the estimate of a batch: for each pair, the costs still to pay divided by its
        discounted visits.
        """
        problem, critic, shape = self.problem, state.memory.estimator, groups.action.shape
        credit = LeaveOneOut().credit(None, problem, self._policy(state, 1), groups, costs) * costs.factors[None, None]
        credit = jnp.broadcast_to(problem.trajectories * credit, shape).astype(critic.dtype)
        weights = jnp.broadcast_to(discounts(problem, problem.horizon).astype(critic.dtype), shape)
        visits = Visits.of(require_tabular(problem, "attenuating_actor_critic"), merge_axes(groups))

        def total(values: Float[Array, "N I H"]) -> Float[Array, " pairs"]:
            return visits.pair_sums(values.reshape(visits.pair.shape))

        weight = total(weights)
        mean = total(credit) / jnp.where(weight > 0, weight, 1)
        rate = 1 - (1 - jnp.minimum(self.cost_step_size.astype(critic.dtype), 1)) ** weight
        return critic + (rate * (mean - critic.reshape(-1))).reshape(critic.shape)


def attenuating_actor_critic(
    problem: SampledProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: ActorCritic | None = None,
    batch: int = 64,
    softness: float | Callable | None = None,
    cost_step_size: Any = 0.1,
) -> AttenuatingActorCritic:
    """A regularized actor-critic for bilevel RL (Zeng, Bhatt, Ganesh and Koppel, AISTATS 2026, arXiv 2601.16399).

    Two policies learn at the same time. One learns the lower level's optimum. The other one, pi, minimizes the
    penalized objective f(x, pi) + (1 / w) (J*(x) - J(x, pi)), where J is the discounted, regularized reward from the
    start of the process. x descends along the difference of two first-order gradients,

      grad = E_pi[ dl/dx ] + (1 / w) (E_own - E_pi)[ sum_h discount^h dr_x(s_h, a_h) ],

    which tends to the hyper-gradient as w tends to 0, with no derivative of a policy and no inner loop.

    From the paper's abstract, which is the only part that we had: the penalty, one loop, first-order actor-critic steps
    on samples, and an entropy in the lower level whose weight decays, which removes the bias in the limit. Everything
    else is ours: the decay of the temperature and of w, the time scales, and
      - two `ActorCritic` agents on the same random numbers; the actor of the second one follows Q - w U;
      - U, a table for any loss: the costs still to pay after a pair (minus the mean of the batch's other groups),
        summed over the pair's visits and divided by the sum of discount^h at these visits, as df/dpi is divided by the
        discounted visits;
      - the gradient from one batch per policy, on the same random numbers: where the two policies agree, it has no
        noise.

    The temperature decreases to the problem's own, at which objectives are compared: `Attenuation()` unless the
    `UpperLevel` has a schedule. In the paper it decreases to 0, for a problem without regularization:
    `UpperLevel(optimizer, temperature=Attenuation(end=0.0))`. In x's gradient, J is cut at the problem's horizon.

    Args:
      problem: a `SampledProblem` on a table; its numbers are leaves.
      optimizer: the optimizer of x, an optax transformation or an `UpperLevel`. x has to move more slowly than the
        actors.
      agent: both actor-critics; None is `ActorCritic()`.
      batch: groups of trajectories per iteration and policy (static).
      softness: w, above 0: a number or a function of the iteration; None is `Polynomial(0.5, 10.0, 0.5)`.
        The noise of the gradient is proportional to 1 / sqrt(w), the bias to w.
      cost_step_size: the fraction by which one visit moves U towards its own estimate, in (0, 1].

    Raises:
      InputError: batch below 1, softness or cost_step_size not above 0, an argument of another type; in `init`, an
        environment that is not tabular.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.attenuating_actor_critic(problem, optax.sgd(0.1), batch=8)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    require_instance("agent", agent, ActorCritic | None)
    cost_step_size = as_float("cost_step_size", cost_step_size, float)
    require_positive("cost_step_size", cost_step_size, "0.1 is usual")
    upper = as_upper_level(optimizer)
    if upper.temperature is None:
        upper = dataclasses.replace(upper, temperature=Attenuation())
    softness = Polynomial(0.5, 10.0, 0.5) if softness is None else as_schedule("softness", softness)
    agent = ActorCritic() if agent is None else agent
    return AttenuatingActorCritic(
        problem, upper, agent=agent, softness=softness, batch=as_size("batch", batch), cost_step_size=cost_step_size
    )


register_algorithm("attenuating_actor_critic", attenuating_actor_critic)
