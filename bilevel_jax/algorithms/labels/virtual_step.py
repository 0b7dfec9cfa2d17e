"""The gradient of the labels' loss through one virtual step of the agent (Liu et al. 2022, Meta-Reward-Net)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float

from bilevel_jax.agents import Agent, SoftPQN
from bilevel_jax.agents.processes import simulator, take
from bilevel_jax.algorithms.labels.base import LabelAlgorithm, LabelEstimate, weighted_loss
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.sources import Labels
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, as_size, require_positive
from bilevel_jax.environments import Processes, collect
from bilevel_jax.preferences import decision_scores
from bilevel_jax.preferences.problem import PreferenceProblem


class VirtualStep(LabelAlgorithm):
    """See `virtual_step`."""

    problem: PreferenceProblem
    agent: SoftPQN
    step_size: Float[Array, ""] = eqx.field(kw_only=True)

    def fit(self, key, state, own, data):
        agent, regularizer = state.memory.agent, self.problem.regularizer(state.x)
        environment = simulator(self.problem, self.agent.restart_every)
        processes = Processes(environment, agent.processes)
        seen = collect(key, processes, self.agent.acting(agent, self.problem, state.x), self.agent.steps)[1]

        def values(params, observations):
            return jax.vmap(self.agent.network.apply, (None, 0))(params, observations)

        ahead = regularizer.conjugate(values(agent.params, merge_axes(seen.next_observation)))
        ahead = jnp.where(merge_axes(seen.terminated), 0, ahead)

        def after(x):
            """The parameters of Q after a step on its one-step error under the reward at x."""
            rewards = merge_axes(self.problem.earned(x, seen)).astype(ahead.dtype)
            target = rewards + jnp.asarray(self.problem.discount, ahead.dtype) * ahead

            def error(params):
                q = take(values(params, merge_axes(seen.observation)), merge_axes(seen.action))
                return jnp.mean((q - target) ** 2) / 2

            gradient = jax.grad(error)(agent.params)
            rate = self.step_size
            return jax.tree.map(lambda leaf, g: leaf - rate.astype(leaf.dtype) * g, agent.params, gradient)

        def loss(x):
            moved = eqx.tree_at(lambda agent: agent.params, stop_gradient(agent), after(x))
            scores = decision_scores(self.agent.policy(moved, self.problem, stop_gradient(x)), data.segments)
            return weighted_loss(data, scores, self.problem.rationality(x).astype(scores.dtype))

        value, gradient = jax.value_and_grad(loss)(state.x)
        return LabelEstimate(value, gradient, own)

    @property
    def own_steps(self):
        return self.agent.processes * self.agent.steps


def virtual_step(
    problem: PreferenceProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    labels: Labels | None = None,
    batch: int = 16,
    warm_up: int = 100,
    step_size: Any = 0.1,
) -> VirtualStep:
    """A reward fitted through one virtual step of the agent, as in Meta-Reward-Net (Liu et al. 2022).

    The agent makes a step of gradient descent on its one-step error under the reward at x, and labels of decisions are
    explained by its policy after that step. The gradient passes through the step and no further: what the reward
    changes later in the agent's learning is not in it. Meta-Reward-Net takes the step with an actor-critic; here the
    agent is a `SoftPQN`, whose policy is that of its Q network.

    Args:
      agent: a `SoftPQN`; None is `SoftPQN()`.
      labels: None is `FreshLabels()`.
      batch: pairs of a minibatch (static).
      warm_up: how often the agent is improved before the first iteration (static).
      step_size: of the virtual step.

    Raises:
      InputError: another agent, sizes below 1, a step size not above 0.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> model = bj.networks.RewardNetwork.of(environment, bj.networks.MLP(width=16), "next_state")
      >>> problem = bj.preferences.PreferenceProblem(
      ...     environment, model, regularizer=bj.ShannonEntropy(0.05), discount=0.97, length=5, horizon=20
      ... )
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> labels = bj.algorithms.FreshLabels(count=4, first=8, capacity=20)
      >>> algorithm = bj.algorithms.virtual_step(
      ...     problem, optax.adam(1e-3), agent=agent, labels=labels, batch=4, warm_up=1
      ... )
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> bool(info.gradient_norm > 0)
      True
    """
    agent = SoftPQN() if agent is None else agent
    if not isinstance(agent, SoftPQN):
        raise InputError(f"agent: the virtual step is one of a SoftPQN, got {type(agent).__name__}")
    step_size = as_float("step_size", step_size, float)
    require_positive("step_size", step_size, "0.1 is large beside the agent's own learning rate")
    return VirtualStep(
        problem,
        optimizer,
        agent,
        labels=FreshLabels() if labels is None else labels,
        batch=size("batch")(batch),
        warm_up=as_size("warm_up", warm_up, least=0),
        step_size=step_size,
    )


register_algorithm("virtual_step", virtual_step)
