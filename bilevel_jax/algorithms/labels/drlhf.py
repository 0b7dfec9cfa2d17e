"""Deep RL from human preferences: a reward whose returns explain the labels (Christiano et al. 2017)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.labels.base import LabelAlgorithm, LabelEstimate, mean_square, weighted_loss
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.sources import Labels
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import as_agent
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, as_size
from bilevel_jax.preferences.problem import PreferenceProblem


class DRLHF(LabelAlgorithm):
    """See `drlhf`."""

    ridge: Float[Array, ""] = eqx.field(kw_only=True)

    def fit(self, key, state, own, data):
        def loss(x):
            scores = self.problem.member_scores(x, data.segments)
            each = jax.vmap(lambda one: weighted_loss(data, one, 1.0))(scores)
            price = self.ridge.astype(scores.dtype) * mean_square(scores, data)
            return jnp.sum(each) + price, jnp.mean(each)

        # Each member is drawn and fitted on its own; the sum over them is one gradient for each.
        (_, value), gradient = jax.value_and_grad(loss, has_aux=True)(state.x)
        return LabelEstimate(value, gradient, own)


def drlhf(
    problem: PreferenceProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    labels: Labels | None = None,
    batch: int = 32,
    warm_up: int = 0,
    ridge: float = 1e-3,
) -> DRLHF:
    """A reward whose returns explain the labels, by the Bradley-Terry model (Christiano et al. 2017), and its agent.

    The agent's answer is in no gradient. With an ensemble as the model, every member is fitted, and `FreshLabels` with
    several candidates ask where the members disagree. With `SoftActorCritic` as the agent, whose replay earns the
    reward of the present x whenever it is sampled, this is the scheme of PEBBLE (Lee et al. 2021).

    Args:
      agent: None is `default_agent(problem)`.
      labels: None is `FreshLabels()`.
      batch: pairs of a minibatch (static).
      warm_up: how often the agent is improved before the first iteration (static).
      ridge: weight of the mean square of the reward.

    Raises:
      InputError: sizes below 1.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> model = bj.networks.RewardNetwork.of(environment, bj.networks.MLP(width=16), "next_state")
      >>> problem = bj.preferences.PreferenceProblem(
      ...     environment, model, regularizer=bj.ShannonEntropy(0.05), discount=0.97, length=5, horizon=20
      ... )
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> labels = bj.algorithms.FreshLabels(count=4, first=8, capacity=20)
      >>> algorithm = bj.algorithms.drlhf(problem, optax.adam(1e-3), agent=agent, labels=labels, batch=4)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> float(info.reports["labels"])
      8.0
    """
    return DRLHF(
        problem,
        optimizer,
        as_agent(problem, agent),
        labels=FreshLabels() if labels is None else labels,
        batch=size("batch")(batch),
        warm_up=as_size("warm_up", warm_up, least=0),
        ridge=as_float("ridge", ridge, float),
    )


register_algorithm("drlhf", drlhf)
