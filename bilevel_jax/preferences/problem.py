"""The bilevel problem of a reward that is learned from labels: the upper level has the labels, an agent the reward."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.bilevel.sampled_problem import require_entropy
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import Zero
from bilevel_jax.core.validation import as_float, as_size, require_fraction
from bilevel_jax.environments import Environment, Trajectory, random_segments, require_every_action
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer, ShannonEntropy
from bilevel_jax.preferences.bradley_terry import log_likelihood, segment_return
from bilevel_jax.preferences.likelihood import outcome_scores
from bilevel_jax.preferences.segments import Segments, relabelled
from bilevel_jax.preferences.teachers import ScriptedTeacher, Teacher


class PreferenceProblem(SampledProblem):
    """A reward model, an agent that is optimal for it, and a teacher who compares segments.

    The upper variable x is a dict: "reward", the parameters of the model, and "log_rationality", the logarithm of how
    rational the labels are in units of the model.

    The loss, for algorithms that know only `SampledProblem`, is the one of Yang, Gao and Yuan (AISTATS 2025): the
    Bradley-Terry loss of a label on two fresh segments under the returns of the learned reward. The algorithms on
    labels, e.g. `drlhf`, have losses and labels of their own.

    Args:
      environment: emits the true reward, by which a synthetic teacher judges and by which agents are evaluated.
      model: `init(key, observation) -> parameters` and `model(parameters) -> ActionFunction`: a
        `networks.RewardNetwork`, or an `Ensemble` of several, whose mean the agent earns.
      teacher: who labels in the loss, by the true reward.
      regularizer: of the agent, a `ShannonEntropy` or `KLDivergence`; its temperature is in units of the model.
      discount: of the agent.
      length: steps of a segment (static).
      horizon: steps of an episode, when agents are evaluated (static).
      centred: whether the agent earns the reward less its mean over the steps that it learns from (static). A constant
        changes no policy of a process that never ends, see `environments.Continuing`; without it, an agent first has to
        learn the sum of a constant whenever the model moves.

    Raises:
      InputError: a length beyond the horizon, a discount outside [0, 1), an environment in which states lack actions, a
        regularizer of another kind.

    Example:
      >>> environment = bj.environments.Continuing(bj.environments.classic.CartPole())
      >>> network = bj.networks.MLP(width=16)
      >>> model = bj.networks.RewardNetwork.of(environment, network, "next_state")
      >>> problem = bj.preferences.PreferenceProblem(
      ...     environment, model, regularizer=bj.ShannonEntropy(0.05), discount=0.97, length=10, horizon=100
      ... )
      >>> sorted(problem.start(jax.random.key(0)))
      ['log_rationality', 'reward']
    """

    environment: Environment
    model: Any
    teacher: Teacher | ScriptedTeacher
    _regularizer: Regularizer
    discount: Float[Array, ""]
    loss_discount: Float[Array, ""]
    length: int = eqx.field(static=True)
    horizon: int = eqx.field(static=True)
    centred: bool = eqx.field(static=True)
    true_reward: bool = eqx.field(static=True)
    first: Any

    def __init__(
        self,
        environment: Environment,
        model: Any,
        *,
        teacher: Teacher | ScriptedTeacher | None = None,
        regularizer: ShannonEntropy | KLDivergence,
        discount: Any,
        length: int,
        horizon: int,
        centred: bool = False,
    ):
        require_every_action(environment, "PreferenceProblem")
        self.environment, self.model = environment, model
        self.teacher = Teacher() if teacher is None else teacher
        self._regularizer = require_entropy(regularizer)
        self.discount = as_float("discount", discount, float)
        require_fraction("discount", self.discount, "for long horizons use e.g. 0.999")
        self.loss_discount = jnp.ones_like(self.discount)
        self.horizon = as_size("horizon", horizon)
        self.length = as_size("length", length)
        if self.length > self.horizon:
            raise InputError(f"length: expected 1 to the horizon {self.horizon}, got {self.length}")
        self.centred, self.true_reward, self.first = bool(centred), False, None

    @property
    def trajectories(self) -> int:
        """The number of trajectories per loss: those of the two segments of a pair."""
        return 2

    def with_true_reward(self) -> "PreferenceProblem":
        """Return the same problem, in which the agent earns what the environment emits; x has no effect."""
        return self.changed(true_reward=True)

    def starting_at(self, x: dict[str, Any]) -> "PreferenceProblem":
        """Return the same problem with the start x, e.g. a reward that was learned before."""
        return self.changed(first=x)

    def start(self, key: PRNGKeyArray) -> dict[str, Any]:
        """Parameters drawn at random, and rationality 1; or what `starting_at` gave."""
        if self.first is not None:
            return self.first
        parameters = self.model.init(key, self.environment.observation_space)
        dtype = jnp.result_type(*jax.tree.leaves(parameters))
        return {"reward": parameters, "log_rationality": jnp.zeros((), dtype)}

    def reward(self, x):
        if self.true_reward:
            return Zero(getattr(self.environment.action_space, "n", None))  # a Box has none
        return self.model(x["reward"])

    def environment_reward_weight(self):
        return jnp.ones_like(self.discount) if self.true_reward else None

    def earned(self, x, trajectories):
        rewards = super().earned(x, trajectories)
        if not self.centred:
            return rewards
        valid = trajectories.valid.astype(rewards.dtype)
        return rewards - jnp.sum(valid * rewards) / jnp.maximum(jnp.sum(valid), 1)

    def changed(self, **fields: Any) -> "PreferenceProblem":
        """Return the same problem with other values of some fields."""
        made = object.__new__(type(self))
        for field in dataclasses.fields(self):
            object.__setattr__(made, field.name, fields.get(field.name, getattr(self, field.name)))
        return made

    def regularizer(self, x):
        del x
        return self._regularizer

    def rationality(self, x: dict[str, Any]) -> Float[Array, ""]:
        """exp(log_rationality)."""
        return jnp.exp(x["log_rationality"])

    def member_scores(self, x: dict[str, Any], segments: Segments) -> Float[Array, "M N H"]:
        """Return the reward of each step under each member of an ensemble; a single model is one member."""
        one = getattr(self.model, "model", None)
        if one is None:
            return outcome_scores(self.model(x["reward"]), segments)[None]
        return jax.vmap(lambda parameters: outcome_scores(one(parameters), segments))(x["reward"])

    def loss(self, key, x, trajectories: Trajectory) -> Float[Array, ""]:
        for_cut, for_label = jax.random.split(key)
        cut = random_segments(for_cut, trajectories._replace(state=None, distribution=None), self.length)
        learned = relabelled(self.reward(x), cut).reward
        returns = segment_return(learned, cut.valid)
        made = self.teacher.judge(for_label, cut.reward[0], cut.reward[1], cut.valid[0], cut.valid[1])
        likelihood = log_likelihood(returns[0], returns[1], made.label.astype(returns.dtype))
        return -jnp.where(made.judged, likelihood, 0)
