"""Contrastive preference learning: a policy alone is fitted to labels, and no reward (Hejna et al. 2024)."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.agents import ExactAgent
from bilevel_jax.agents.deep.actors import CategoricalActor, require_log_policy
from bilevel_jax.agents.deep.learning import Optimizer
from bilevel_jax.algorithms.labels.base import LabelAlgorithm, LabelEstimate
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.sources import Labels
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, require_probability
from bilevel_jax.networks import MLP, Network
from bilevel_jax.preferences import Preferences, decision_scores
from bilevel_jax.preferences.bradley_terry import log_likelihood, segment_return
from bilevel_jax.preferences.problem import PreferenceProblem


class ContrastiveState(eqx.Module):
    """The policy's parameters with the logarithm of the rationality, and the state of their optimizer."""

    params: Any
    optimizer_state: Any


class Contrastive(LabelAlgorithm):
    """See `contrastive`."""

    network: Network = eqx.field(kw_only=True)
    optimizer: Optimizer = eqx.field(kw_only=True)
    bias: Float[Array, ""] = eqx.field(kw_only=True)

    def init_own(self, key, x):
        environment = self.problem.environment
        params = self.network.init(key, environment.observation_space, environment.num_actions)
        params = {"policy": params, "log_rationality": jnp.zeros((), x["log_rationality"].dtype)}
        return ContrastiveState(params, self.optimizer.init(params))

    def init_agent(self, key, x):
        del key, x

    def improve_agent(self, key, state):
        del key, state

    def report_agent(self, agent):
        del agent
        return {}

    def first_policy(self, agent, own, x):
        del agent, x
        return self._policy(own.params["policy"])

    def policy(self, state):
        return self._policy(state.memory.estimator.own.params["policy"])

    def _policy(self, params: Any) -> CategoricalActor:
        return CategoricalActor(self.network, params, self.problem.regularizer(None))

    def fit(self, key, state, own, data):
        def loss(params):
            scores = decision_scores(self._policy(params["policy"]), data.segments)
            return self._loss(data, jnp.exp(params["log_rationality"]).astype(scores.dtype) * scores)

        value, gradient = jax.value_and_grad(loss)(own.params)
        params, optimizer_state, _ = self.optimizer.update(gradient, own.optimizer_state, own.params, state.iteration)
        nothing = optax.tree.zeros_like(state.x)
        return LabelEstimate(value, nothing, ContrastiveState(params, optimizer_state))

    def _loss(self, data: Preferences, scores: Float[Array, "N H"]) -> Float[Array, ""]:
        """The loss in which the worse segment counts `bias` times: what is not in the data does not get likely."""
        total = segment_return(scores, data.segments.valid)
        one, two = total[data.pairs[:, 0]], total[data.pairs[:, 1]]
        bias, label = self.bias.astype(one.dtype), data.label.astype(one.dtype)
        first = label * log_likelihood(one, bias * two, 1.0)
        second = (1 - label) * log_likelihood(bias * one, two, 0.0)
        return -jnp.mean(jnp.where(data.weight > 0, first + second, 0))

    @property
    def environment_steps(self):
        return self._fresh_steps if self.labels.fresh_segments else 0


def contrastive(
    problem: PreferenceProblem,
    optimizer: optax.GradientTransformation | UpperLevel | None = None,
    *,
    network: Network | None = None,
    labels: Labels | None = None,
    batch: int = 32,
    bias: Any = 0.5,
    learning_rate: float | Schedule = 1e-3,
) -> Contrastive:
    """Contrastive preference learning (Hejna et al. 2024): a policy is fitted to labels of decisions, without a reward.

    Labels are explained by rationality times the sum of log pi over a segment, and the rationality is fitted with the
    policy. x stays where it is. Nothing that was learned carries over to other dynamics but the policy itself.

    Args:
      optimizer: of no effect, as x does not move; None is `optax.sgd(0)`.
      network: of the policy; None is `MLP(output_scale=0.0)`.
      labels: None is `FreshLabels()`.
      batch: pairs of a minibatch (static).
      bias: in (0, 1], how much the worse segment counts; below 1 it keeps actions unlikely that are not in the data.
      learning_rate: of the policy, a number or a function of the iteration.

    Raises:
      InputError: sizes below 1, a bias outside (0, 1], a regularizer without a log-policy.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> model = bj.networks.RewardNetwork.of(environment, bj.networks.MLP(width=16), "next_state")
      >>> problem = bj.preferences.PreferenceProblem(
      ...     environment, model, regularizer=bj.ShannonEntropy(0.05), discount=0.97, length=5, horizon=20
      ... )
      >>> labels = bj.algorithms.FreshLabels(count=4, first=8, capacity=20)
      >>> algorithm = bj.algorithms.contrastive(problem, labels=labels, batch=4)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> float(info.gradient_norm)
      0.0
    """
    bias = as_float("bias", bias, float)
    require_probability("bias", bias, "1 counts both segments alike")
    require_log_policy(problem.regularizer(None), "contrastive")
    return Contrastive(
        problem,
        optax.sgd(0.0) if optimizer is None else optimizer,
        ExactAgent(),
        labels=FreshLabels() if labels is None else labels,
        batch=size("batch")(batch),
        warm_up=0,
        network=MLP(output_scale=0.0) if network is None else network,
        optimizer=Optimizer(learning_rate, 10.0, "adam"),
        bias=bias,
    )


register_algorithm("contrastive", contrastive)
