"""PBRL on labels: the reward and a second policy descend on one function, a loss and a penalty (Shen et al. 2024)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.agents import Agent, SoftPQN
from bilevel_jax.agents.processes import at_states, simulator, take
from bilevel_jax.algorithms.labels.base import LabelAlgorithm, LabelEstimate, weighted_loss
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.sources import Labels
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, as_size, require_positive
from bilevel_jax.environments import Processes, Trajectory, collect
from bilevel_jax.preferences import decision_scores
from bilevel_jax.preferences.problem import PreferenceProblem


class PBRLOnLabels(LabelAlgorithm):
    """See `pbrl_labels`. What it carries, `own`, is the state of the penalized agent."""

    problem: PreferenceProblem
    agent: SoftPQN
    weight: Float[Array, ""] = eqx.field(kw_only=True)
    policy_updates: int = eqx.field(kw_only=True, static=True)

    def init_own(self, key, x):
        for_start, for_warm_up = jax.random.split(key)
        return self.warmed_up(for_warm_up, self.agent.init(for_start, self.problem, x), x)

    def fit(self, key, state, own, data):
        x = state.x

        def update(own, key):
            for_steps, for_twins = jax.random.split(key)
            own, seen, twin = self._seen(for_steps, for_twins, own, x)

            def both(x, params):
                penalty = self._bellman_error(x, params, seen, twin)
                scores = decision_scores(self.agent.policy(_at(own, params), self.problem, x), data.segments)
                loss = weighted_loss(data, scores, self.problem.rationality(x).astype(scores.dtype))
                return loss + self.weight.astype(loss.dtype) * penalty.astype(loss.dtype), (loss, penalty)

            (_, (loss, penalty)), (of_x, of_params) = jax.value_and_grad(both, (0, 1), has_aux=True)(x, own.params)
            params, optimizer_state, _ = self.agent.optimizer.update(
                of_params, own.optimizer_state, own.params, own.updates
            )
            moved = _at(own, params)
            moved = eqx.tree_at(lambda s: (s.optimizer_state, s.updates), moved, (optimizer_state, own.updates + 1))
            return moved, (loss, penalty, of_x)

        own, made = lax.scan(update, own, jax.random.split(key, self.policy_updates))
        loss, penalty, gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), made)
        return LabelEstimate(loss, gradient, own, {"bellman_error": penalty})

    def _seen(self, key: PRNGKeyArray, for_twins: PRNGKeyArray, own: Any, x: Any) -> tuple[Any, Trajectory, Trajectory]:
        """The penalized agent after its steps, these steps, and the same with other draws of where they lead."""
        environment = simulator(self.problem, self.agent.restart_every)
        processes = Processes(environment, own.processes)
        policy = self.agent.acting(own, self.problem, x)
        processes, seen = collect(key, processes, policy, self.agent.steps, with_states=True)
        keys = jax.random.split(for_twins, seen.terminated.shape)
        _, again = jax.vmap(jax.vmap(environment.step))(keys, seen.state, seen.action)
        twin = seen._replace(
            next_observation=again.observation, terminated=again.terminated, reward=again.reward, state=None
        )
        own = eqx.tree_at(lambda s: (s.processes, s.episodes), own, (processes.states, own.episodes.after(seen)))
        return own, seen._replace(state=None), twin

    def _bellman_error(self, x: Any, params: Any, seen: Trajectory, twin: Trajectory) -> Float[Array, ""]:
        """Half the mean square of E[Q(s, a) - r_x - discount V(s')]: a product of two draws has no bias."""
        regularizer = self.problem.regularizer(x)

        def values(observations):
            return jax.vmap(self.agent.network.apply, (None, 0))(params, observations)

        taken = take(values(merge_axes(seen.observation)), merge_axes(seen.action))

        def residual(steps):
            ahead = merge_axes(steps.next_observation)
            following = at_states(regularizer, ahead).conjugate(values(ahead))
            following = jnp.where(merge_axes(steps.terminated), 0, following)
            rewards = merge_axes(self.problem.earned(x, steps)).astype(taken.dtype)
            return taken - rewards - jnp.asarray(self.problem.discount, taken.dtype) * following

        return jnp.mean(residual(seen) * residual(twin)) / 2

    @property
    def own_steps(self):
        return 2 * self.agent.processes * self.agent.steps * self.policy_updates


def _at(own: Any, params: Any) -> Any:
    """The penalized agent with other parameters of Q; the rest is not differentiated."""
    return eqx.tree_at(lambda s: s.params, stop_gradient(own), params)


def pbrl_labels(
    problem: PreferenceProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    labels: Labels | None = None,
    batch: int = 16,
    warm_up: int = 100,
    weight: Any = 1e4,
    policy_updates: int = 4,
) -> PBRLOnLabels:
    """A reward fitted to labels of decisions by a penalty method (Shen, Yang and Chen 2024, arXiv 2402.06886).

    Beside the agent there is a second, penalized one with a Q of its own. Its policy pi_Q = grad Omega*(Q) explains the
    labels, and the penalty is its Bellman error under the reward r_x. Both x and Q descend on

      F(x, Q) = loss of the labels under pi_Q + (weight / 2) E[(Q(s, a) - r_x - discount E[V_Q(s')])^2],

    the expectation over the steps of the penalized agent. At the Q that minimizes F, the derivative of F in x tends to
    the hyper-gradient as the weight grows; the bias is O(1 / weight). No derivative of the answer is estimated. Every
    step is drawn twice, so that the square of an expectation has no bias; the simulator has to be a function of the
    state, as all environments here are.

    The info's `objective` is the loss under the penalized policy; `reports` has `bellman_error`, half the mean square
    above, which may be below 0 by chance.

    Args:
      agent: a `SoftPQN`, for both; None is `SoftPQN()`. Only the first one is evaluated.
      labels: None is `FreshLabels()`.
      batch: pairs of a minibatch (static).
      warm_up: how often both agents are improved before the first iteration (static).
      weight: of the penalty, in units of the loss per square of the reward. The loss changes with (rationality /
        temperature)^2 in Q, the penalty with (1 - discount)^2 at worst, so that weights of 100 still have a bias of one
        half. Where transitions are random, the noise of the gradient grows with the weight.
      policy_updates: steps of Q per iteration (static); the gradient in x is their mean.

    Raises:
      InputError: another agent, sizes below 1, a weight not above 0.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> model = bj.networks.RewardNetwork.of(environment, bj.networks.MLP(width=16), "next_state")
      >>> problem = bj.preferences.PreferenceProblem(
      ...     environment, model, regularizer=bj.ShannonEntropy(0.05), discount=0.97, length=5, horizon=20
      ... )
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> labels = bj.algorithms.FreshLabels(count=4, first=8, capacity=20)
      >>> algorithm = bj.algorithms.pbrl_labels(
      ...     problem, optax.adam(1e-3), agent=agent, labels=labels, batch=4, warm_up=1
      ... )
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> bool(info.gradient_norm > 0)
      True
    """
    agent = SoftPQN() if agent is None else agent
    if not isinstance(agent, SoftPQN):
        raise InputError(f"agent: the penalty is the Bellman error of a SoftPQN, got {type(agent).__name__}")
    weight = as_float("weight", weight, float)
    require_positive("weight", weight, "1e4 is usual, for rewards of about 1")
    return PBRLOnLabels(
        problem,
        optimizer,
        agent,
        labels=FreshLabels() if labels is None else labels,
        batch=size("batch")(batch),
        warm_up=as_size("warm_up", warm_up, least=0),
        weight=weight,
        policy_updates=size("policy_updates")(policy_updates),
    )


register_algorithm("pbrl_labels", pbrl_labels)
