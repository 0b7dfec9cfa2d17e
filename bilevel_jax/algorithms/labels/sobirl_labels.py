"""SoBiRL on labels: a reward that is fitted through the decisions of the agent which is optimal for it."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.labels.base import (
    LabelAlgorithm,
    LabelEstimate,
    as_trajectories,
    mean_square,
    weighted_loss,
)
from bilevel_jax.algorithms.labels.fresh import FreshLabels
from bilevel_jax.algorithms.labels.sources import Judging, Labels
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import as_agent
from bilevel_jax.algorithms.sampled.sobirl import default_response
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, as_size, require_at_least
from bilevel_jax.estimators import Response
from bilevel_jax.estimators.guards import bounded, compare
from bilevel_jax.preferences import Preferences, decision_scores, pair_losses
from bilevel_jax.preferences.problem import PreferenceProblem


class SoBiRLOnLabels(LabelAlgorithm):
    """See `sobirl_labels`."""

    response: Response = eqx.field(kw_only=True)
    coefficient: Float[Array, ""] = eqx.field(kw_only=True)
    max_ratio: Float[Array, ""] = eqx.field(kw_only=True)
    ridge: Float[Array, ""] = eqx.field(kw_only=True)
    judging: Judging = eqx.field(kw_only=True, static=True)

    def init_own(self, key, x):
        return self.response.init(self.problem, x)

    def fit(self, key, state, own, data):
        loss, direct, credit = self._by_decisions(state, data) if self._decides else self._by_outcomes(state, data)
        credit = jnp.where(data.segments.valid, credit, 0)
        answer = jax.grad(lambda x: self._answer(key, own, x, self.policy(state), data, credit))(state.x)
        implicit = jax.tree.map(lambda leaf: self.coefficient.astype(leaf.dtype) * leaf, answer)
        # Of decisions all of the gradient is in the agent's answer, apart from that in the rationality.
        gradient = optax.tree.add(direct, implicit) if self._decides else bounded(direct, implicit, self.max_ratio)
        norms: dict[str, Array] = dict(
            zip(("direct_norm", "implicit_norm", "cosine"), compare(direct, implicit), strict=True)
        )
        gradient = optax.tree.add(gradient, self._shrinking(state.x, data))
        return LabelEstimate(loss, gradient, own, norms)

    @property
    def _decides(self) -> bool:
        return self.judging == "decisions"

    def _by_decisions(self, state: Any, data: Preferences) -> tuple[Array, Any, Array]:
        """The loss, its gradient in x where the policy stays, and its derivative in log pi of each step, [N, H]."""
        scores = stop_gradient(decision_scores(self.policy(state), data.segments))

        def loss(x, scores):
            return weighted_loss(data, scores, self.problem.rationality(x).astype(scores.dtype))

        value, (direct, credit) = jax.value_and_grad(loss, (0, 1))(state.x, scores)
        return value, direct, credit

    def _by_outcomes(self, state: Any, data: Preferences) -> tuple[Array, Any, Array]:
        """Likewise; segments are taken to be drawn by the policy, so that their loss is the credit of their steps."""

        def losses(x):
            scores = jnp.mean(self.problem.member_scores(x, data.segments), 0)
            made = jnp.where(data.weight > 0, pair_losses(data, scores), 0)
            return jnp.mean(made), made

        (value, each), direct = jax.value_and_grad(losses, has_aux=True)(state.x)
        count = each.shape[0]
        # The mean of the other pairs, so that the credit of a pair is independent of its baseline.
        others = (jnp.sum(each) - each) / max(count - 1, 1)
        credit = (each - others) / count
        steps = jnp.broadcast_to(jnp.concatenate([credit, credit])[:, None], data.segments.valid.shape)
        return value, direct, steps

    def _answer(
        self, key: PRNGKeyArray, own: Any, x: Any, policy: Any, data: Preferences, credit: Float[Array, "N H"]
    ) -> Float[Array, ""]:
        """A scalar whose gradient in x is that of sum credit log pi*_x, by d log pi* = (dQ* - dV*) / temperature."""
        temperature = stop_gradient(self.problem.regularizer(x).temperature)
        trajectories = as_trajectories(data.segments)
        made = self.response.surrogate(key, own, self.problem, x, policy, trajectories, credit)
        return made / temperature.astype(made.dtype)

    def _shrinking(self, x: Any, data: Preferences) -> Any:
        def price(x):
            scores = self.problem.member_scores(x, data.segments)
            return self.ridge.astype(scores.dtype) * mean_square(scores, data)

        return jax.grad(price)(x)

    @property
    def own_steps(self):
        # The response's trajectories are segments.
        of_segments = self.problem.changed(horizon=self.problem.length)
        return self.response.environment_steps(of_segments, 2 * self.batch)


def sobirl_labels(
    problem: PreferenceProblem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    agent: Agent | None = None,
    response: Response | None = None,
    labels: Labels | None = None,
    judging: Judging = "decisions",
    coefficient: float = 1.0,
    max_ratio: float | None = None,
    batch: int = 16,
    warm_up: int = 100,
    ridge: float = 0.0,
) -> SoBiRLOnLabels:
    """SoBiRL on labels: a reward for which the optimal agent decides as the labels say (after Yang, Gao and Yuan 2025).

    With `judging="decisions"` the labels are explained by rationality times the sum of log pi*_x over a segment, where
    pi*_x is the agent's policy for the reward at x. The gradient is that of the agent's answer, and the pairs may be
    any fixed set. With "outcomes" it is the paper's objective: labels are explained by the sums of the reward, pairs
    are the agent's own, and the agent's answer decides which segments are seen. That needs `FreshLabels`.

    Args:
      agent: None is `default_agent(problem)`. It has to follow the reward as it moves: see `warm_up`.
      response: the estimator of the agent's answer; None is `default_response(problem)`. `NestedRollouts` start from
        the states of segments, which files do not keep. `OneStep` sees only rewards of the step itself: with a reward
        of the state alone it is zero.
      labels: None is `FreshLabels()`.
      judging: what the labels judge (static).
      coefficient: of the part of the gradient that is the agent's answer; 0 leaves it out. The paper's is 1.
      max_ratio: for outcomes, the bound on the norm of that part over that of the other; None does not bound.
      batch: pairs of a minibatch (static).
      warm_up: how often the agent is improved before the first iteration (static).
      ridge: weight of the mean square of the reward.

    Raises:
      InputError: sizes below 1, a coefficient or ratio below 0, outcomes of labels that are not the agent's own.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> model = bj.networks.RewardNetwork.of(environment, bj.networks.MLP(width=16), "next_state")
      >>> problem = bj.preferences.PreferenceProblem(
      ...     environment, model, regularizer=bj.ShannonEntropy(0.05), discount=0.97, length=5, horizon=20
      ... )
      >>> agent = bj.agents.SoftPQN(bj.networks.MLP(width=16), processes=4, steps=8)
      >>> labels = bj.algorithms.SyntheticLabels(8, 8, expert=agent, improvements=2)
      >>> response = bj.estimators.NestedRollouts(5, every_action=True)
      >>> algorithm = bj.algorithms.sobirl_labels(
      ...     problem, optax.adam(1e-3), agent=agent, labels=labels, response=response, batch=4, warm_up=1
      ... )
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> bool(info.gradient_norm > 0)
      True
    """
    labels = FreshLabels() if labels is None else labels
    if judging not in ("decisions", "outcomes"):
        raise InputError(f"judging: expected decisions or outcomes, got {judging!r}")
    if judging == "outcomes" and not labels.fresh_segments:
        raise InputError(
            f"labels: with judging='outcomes' the pairs have to be the agent's own, as FreshLabels are, got "
            f"{type(labels).__name__}; use drlhf for outcomes of other pairs"
        )
    numbers = {
        "coefficient": coefficient,
        "max_ratio": jnp.inf if max_ratio is None else max_ratio,
        "ridge": ridge,
    }
    made = {name: as_float(name, value, float) for name, value in numbers.items()}
    for name, number in made.items():
        require_at_least(name, number, 0, "0 leaves that part out")
    return SoBiRLOnLabels(
        problem,
        optimizer,
        as_agent(problem, agent),
        labels=labels,
        batch=size("batch")(batch),
        warm_up=as_size("warm_up", warm_up, least=0),
        response=default_response(problem) if response is None else response,
        judging=judging,
        **made,
    )


register_algorithm("sobirl_labels", sobirl_labels)
