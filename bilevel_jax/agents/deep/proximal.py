"""Proximal policy optimization for the regularized objective, with numbered actions or those of a box."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from bilevel_jax.agents.deep.actors import CategoricalActor, GaussianActor, require_log_policy
from bilevel_jax.agents.deep.gaussian import require_box
from bilevel_jax.agents.deep.learning import (
    Episodes,
    Optimizer,
    minibatch_steps,
    require_divisible,
    returns_with_traces,
)
from bilevel_jax.agents.processes import as_limit, as_unit, at_states, simulator
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, plain, require_at_least, require_positive
from bilevel_jax.environments import Box, Distribution, Processes, Trajectory, collect, start_processes
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer
from bilevel_jax.networks import MLP, Network

NUMBERS = ("policy_loss", "value_loss", "entropy", "clipped", "kl", "gradient_norm")


class PPOState(eqx.Module):
    """The state of the agent.

    `params` are those of the actor and of the critic, `processes` the states of the simulator, [B], from which the next
    `improve` goes on. `updates` counts the batches that were collected. `numbers` describe the last one.
    """

    params: tuple[Any, Any]
    optimizer_state: Any
    processes: Any
    episodes: Episodes
    updates: Int32[Array, ""]
    numbers: dict[str, Float[Array, ""]]


class PPO(Agent):
    """Proximal policy optimization (Schulman et al. 2017), of the regularized return unless it is told otherwise.

    Each update runs every process for `steps` steps under the policy mu and then goes `epochs` times through what they
    saw, to raise the mean of min(ratio A_t, clip(ratio, 1 - clip, 1 + clip) A_t), ratio = pi / mu at a_t, and to lessen
    that of (V(s_t) - G_t)^2 / 2. Advantages are generalized ones (Schulman et al. 2016) of the soft reward:

      G_t = r_t - Omega(mu(s_t)) + discount (1 - terminated_t) ((1 - trace) V(s_t+1) + trace G_t+1),
      A_t = G_t - V(s_t) + Omega(mu(s_t)) - temperature log mu(a_t | s_t)     (KL: log mu / reference).

    That is the return of the rewards r - temperature log mu, where the logarithms that come later are replaced by their
    expectations, which is less noisy. A policy at which the mean of ratio A_t cannot be raised is pi*: the regularizer
    needs no term of its own in the loss. Actions of a box have a `TanhGaussian`, and densities are those of the
    actions.

    Args:
      network: of the actor; None is an `MLP()` whose last layer begins near zero. Its outputs are one per action, or
        two per entry of an action of a box.
      critic: of V, with parameters of its own; None is the network that is given, else `MLP()`.
      processes: B, the number of processes that run in parallel (static).
      steps: the number of steps of each process per update (static).
      updates: the number of updates per `improve` (static).
      epochs, minibatches: passes through a batch, and steps of the optimizer in each (static).
      trace: lambda of the advantages, in [0, 1].
      clip: how far the ratio may go from 1 before its advantage no longer counts, above 0.
      value_clip: None, or how far V may go from its value before the update, before the error of what is beyond no
        longer counts.
      value_weight: of the critic's loss.
      normalize: whether advantages are shifted and scaled to the mean 0 and the deviation 1 in each update (static).
      entropy_weight: None is the form above. A number is that of the usual bonus: advantages are those of the rewards
        alone, and the policy's entropy (for KL minus its divergence) times this weight is added to what is raised. It
        is measured against normalized advantages. The policy is then not pi*.
      squash: whether a box has bounds (static); False is for a box without any, on which the policy is a `Gaussian`.
      learning_rate: a number, or a function of the number of updates made, e.g. `LinearDecay`.
      max_gradient_norm: the 2-norm to which gradients are clipped.
      restart_every: the number of steps after which a process starts again; None is the problem's horizon.

    Raises:
      InputError: sizes below 1, a trace outside [0, 1], a clip or weight out of its range, minibatches that do not
        divide a batch; in `init`, a regularizer that is neither `ShannonEntropy` nor `KLDivergence`, for a box the
        latter, and bounds that do not fit `squash`.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> agent = bj.agents.PPO(bj.networks.OneHot(8), processes=4, steps=8)
      >>> state = agent.init(jax.random.key(1), problem, x)
      >>> state = agent.improve(jax.random.key(2), state, problem, x)
      >>> bj.environments.policy_table(agent.policy(state, problem, x), 8).shape
      (8, 3)
    """

    network: Network
    critic: Network
    trace: Float[Array, ""]
    clip: Float[Array, ""]
    value_clip: Float[Array, ""] | None
    value_weight: Float[Array, ""]
    entropy_weight: Float[Array, ""] | None
    optimizer: Optimizer
    restart_every: Int32[Array, ""] | None
    processes: int = eqx.field(static=True, converter=size("processes"))
    steps: int = eqx.field(static=True, converter=size("steps"))
    updates: int = eqx.field(static=True, converter=size("updates"))
    epochs: int = eqx.field(static=True, converter=size("epochs"))
    minibatches: int = eqx.field(static=True, converter=size("minibatches"))
    normalize: bool = eqx.field(static=True, converter=plain("normalize"))
    squash: bool = eqx.field(static=True, converter=plain("squash"))

    def __init__(
        self,
        network: Network | None = None,
        critic: Network | None = None,
        *,
        processes: int = 32,
        steps: int = 32,
        updates: int = 1,
        epochs: int = 4,
        minibatches: int = 4,
        trace: Any = 0.95,
        clip: Any = 0.2,
        value_clip: float | None = None,
        value_weight: Any = 0.5,
        normalize: bool = True,
        entropy_weight: float | None = None,
        squash: bool = True,
        learning_rate: float | Schedule = 3e-4,
        max_gradient_norm: Any = 0.5,
        restart_every: Any = None,
    ):
        self.network = MLP(output_scale=0.01) if network is None else network
        self.critic = critic if critic is not None else MLP() if network is None else network
        self.processes, self.steps, self.updates = processes, steps, updates
        self.epochs, self.minibatches = epochs, minibatches
        require_divisible(self.processes, self.steps, self.minibatches)
        self.trace = as_unit("trace", trace, "0 looks one step ahead, 1 to the end of the batch")
        self.clip = as_float("clip", clip, float)
        require_positive("clip", self.clip, "0.2 is usual")
        self.value_clip = None if value_clip is None else as_float("value_clip", value_clip, float)
        if self.value_clip is not None:
            require_positive("value_clip", self.value_clip, "None clips nothing")
        self.value_weight = as_float("value_weight", value_weight, float)
        require_positive("value_weight", self.value_weight, "0.5 is usual")
        self.entropy_weight = None if entropy_weight is None else as_float("entropy_weight", entropy_weight, float)
        if self.entropy_weight is not None:
            require_at_least("entropy_weight", self.entropy_weight, 0, "None takes the problem's regularizer")
        self.normalize, self.squash = normalize, squash
        self.optimizer = Optimizer(learning_rate, max_gradient_norm, "adam")
        self.restart_every = as_limit("restart_every", restart_every)

    def init(self, key, problem, x):
        for_actor, for_critic, for_processes = jax.random.split(key, 3)
        environment, space = simulator(problem, self.restart_every), problem.action_space
        require_log_policy(problem.regularizer(x), "PPO()", kl=not isinstance(space, Box))
        if isinstance(space, Box):
            outputs = 2 * math.prod(require_box(space, "PPO()", squash=self.squash).shape)
        else:
            outputs = environment.num_actions
        observation = environment.observation_space
        params = self.network.init(for_actor, observation, outputs), self.critic.init(for_critic, observation, 1)
        return PPOState(
            params=params,
            optimizer_state=self.optimizer.init(params),
            processes=start_processes(for_processes, environment, self.processes).states,
            episodes=Episodes.start(self.processes),
            updates=jnp.zeros((), jnp.int32),
            numbers=dict.fromkeys(NUMBERS, jnp.full((), jnp.nan, jnp.result_type(float))),
        )

    def improve(self, key, state, problem, x):
        def update(state: PPOState, key: PRNGKeyArray) -> tuple[PPOState, None]:
            for_steps, for_learning = jax.random.split(key)
            processes = Processes(simulator(problem, self.restart_every), state.processes)
            processes, seen = collect(for_steps, processes, self.acting(state, problem, x), self.steps)
            learned = self.learn(for_learning, state, problem, x, seen)
            return dataclasses.replace(learned, processes=processes.states), None

        return lax.scan(update, state, jax.random.split(key, self.updates))[0]

    def acting(self, state: PPOState, problem: SampledProblem, x: Any) -> CategoricalActor | GaussianActor:
        """Return the policy that acts while the agent learns."""
        return self._actor(state.params[0], problem, x)

    def learn(self, key: PRNGKeyArray, state: PPOState, problem: SampledProblem, x: Any, seen: Trajectory) -> PPOState:
        """Return the state after an update by given steps [B, H] under `acting`; `processes` stay as they are.

        Steps that are not `valid` have no weight.
        """
        data = merge_axes(self._targets(state, problem, x, seen))

        def step(carry: Any, batch: _Batch) -> tuple[Any, dict[str, Float[Array, ""]]]:
            params, optimizer_state = carry
            loss = jax.value_and_grad(self._loss, has_aux=True)
            (_, numbers), gradient = loss(params, batch, problem, x)
            params, optimizer_state, norm = self.optimizer.update(gradient, optimizer_state, params, state.updates)
            return (params, optimizer_state), numbers | {"gradient_norm": norm}

        (params, optimizer_state), numbers = minibatch_steps(
            key,
            (state.params, state.optimizer_state),
            data,
            step,
            epochs=self.epochs,
            minibatches=self.minibatches,
        )
        return PPOState(
            params=params,
            optimizer_state=optimizer_state,
            processes=state.processes,
            episodes=state.episodes.after(seen),
            updates=state.updates + 1,
            numbers={name: numbers[name].astype(old.dtype) for name, old in state.numbers.items()},
        )

    def _targets(self, state: PPOState, problem: SampledProblem, x: Any, seen: Trajectory) -> "_Batch":
        """What an update learns from, [B, H]."""
        shape = seen.reward.shape
        actor, critic = state.params
        observation, action = merge_axes(seen.observation), merge_axes(seen.action)
        values = self._values(critic, observation).reshape(shape)
        following = self._values(critic, merge_axes(seen.next_observation)).reshape(shape)
        distributions = jax.vmap(self._actor(actor, problem, x).distribution)(observation)
        logs = jax.vmap(lambda one, action: one.log_prob(action))(distributions, action)
        rewards = problem.earned(x, seen).astype(values.dtype)
        own = jnp.zeros_like(rewards)
        if self.entropy_weight is None:
            regularizer = at_states(problem.regularizer(x), observation)
            penalty = _penalty(regularizer, distributions).astype(values.dtype)
            charged = jnp.asarray(regularizer.temperature, values.dtype) * (
                logs - _log_reference(regularizer, action, logs)
            ).astype(values.dtype)
            rewards = rewards - penalty.reshape(shape)
            own = (penalty - charged).reshape(shape)
        discount, trace = (jnp.asarray(part, values.dtype) for part in (problem.discount, self.trace))
        # V in place of Q is TD(lambda). The next step's own value is beyond the last one's reach, where the trace is 0.
        ahead = jnp.roll(values, -1, 1)
        goals = returns_with_traces(rewards, seen, following, ahead, discount, jnp.broadcast_to(trace, shape))
        advantage = goals - values + own
        valid = seen.valid.astype(values.dtype)
        share = jnp.maximum(jnp.sum(valid), 1)
        if self.normalize:
            mean = jnp.sum(jnp.where(seen.valid, advantage, 0)) / share
            deviation = jnp.sqrt(jnp.sum(jnp.where(seen.valid, (advantage - mean) ** 2, 0)) / share)
            advantage = (advantage - mean) / (deviation + 1e-8)
        weight = valid * (valid.size / share)
        advantage, goals = (jnp.where(seen.valid, part, 0) for part in (advantage, goals))
        return _Batch(seen.observation, seen.action, logs.reshape(shape), advantage, goals, values, weight, seen.valid)

    def _loss(
        self, params: tuple[Any, Any], batch: "_Batch", problem: SampledProblem, x: Any
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        distributions = jax.vmap(self._actor(params[0], problem, x).distribution)(batch.observation)
        logs = jax.vmap(lambda one, action: one.log_prob(action))(distributions, batch.action)
        change = (logs - batch.logs).astype(batch.advantage.dtype)
        ratio = jnp.exp(change)
        clip = self.clip.astype(ratio.dtype)
        held = jnp.clip(ratio, 1 - clip, 1 + clip)

        def mean(values: Float[Array, " N"]) -> Float[Array, ""]:
            return jnp.mean(jnp.where(batch.valid, batch.weight * values, 0))

        policy_loss = -mean(jnp.minimum(ratio * batch.advantage, held * batch.advantage))
        values = self._values(params[1], batch.observation)
        squares = (values - batch.goals) ** 2
        if self.value_clip is not None:
            reach = self.value_clip.astype(values.dtype)
            kept = batch.values + jnp.clip(values - batch.values, -reach, reach)
            squares = jnp.maximum(squares, (kept - batch.goals) ** 2)
        value_loss = mean(squares) / 2
        loss = policy_loss + self.value_weight.astype(values.dtype) * value_loss
        if self.entropy_weight is not None:
            regularizer = at_states(problem.regularizer(x), batch.observation)
            bonus = _penalty(_at_one(regularizer), distributions).astype(values.dtype)
            loss = loss + self.entropy_weight.astype(values.dtype) * mean(bonus)
        entropies = jax.vmap(lambda one: one.entropy())(distributions)
        return loss, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": mean(entropies),
            "clipped": mean((ratio != held).astype(ratio.dtype)),
            "kl": mean(ratio - 1 - change),
        }

    def _actor(self, params: Any, problem: SampledProblem, x: Any) -> CategoricalActor | GaussianActor:
        space = problem.action_space
        if isinstance(space, Box):
            return GaussianActor(self.network, params, space, self.squash)
        return CategoricalActor(self.network, params, problem.regularizer(x))

    def _values(self, params: Any, observations: Any) -> Float[Array, " N"]:
        return jax.vmap(self.critic.apply, (None, 0))(params, observations)[:, 0]

    def policy(self, state, problem, x):
        return self.acting(state, problem, x)

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps * self.updates

    def report(self, state):
        """Return `policy_loss`, `value_loss`, `entropy` of the policy, `clipped` (the part of steps whose ratio was
        clipped), `kl` (of the policy from the one that acted) and `gradient_norm`, means over the last update;
        `episode_return` and `episode_length`, in the environment's own rewards.
        """
        return {**state.numbers, **state.episodes.report()}


class _Batch(eqx.Module):
    """What an update learns from, steps [B, H] or [N]."""

    observation: Any
    action: Any
    logs: Float[Array, "*steps"]
    advantage: Float[Array, "*steps"]
    goals: Float[Array, "*steps"]
    values: Float[Array, "*steps"]
    weight: Float[Array, "*steps"]
    valid: Bool[Array, "*steps"]


def _penalty(regularizer: Regularizer, distributions: Distribution) -> Float[Array, " N"]:
    """Omega of distributions [N]."""
    probabilities = getattr(distributions, "probabilities", None)
    if probabilities is not None:
        return regularizer.penalty(probabilities)
    entropies = jax.vmap(lambda one: one.entropy())(distributions)
    return -jnp.asarray(regularizer.temperature, entropies.dtype) * entropies


def _log_reference(regularizer: Regularizer, action: Any, logs: Float[Array, " N"]) -> Float[Array, " N"]:
    """The logarithm of a divergence's reference at actions [N]; 0 for the entropy."""
    if not isinstance(regularizer, KLDivergence):
        return jnp.zeros_like(logs)
    reference = jnp.broadcast_to(regularizer.reference, (logs.shape[0], regularizer.reference.shape[-1]))
    return jnp.log(jnp.take_along_axis(reference, action[:, None], 1)[:, 0]).astype(logs.dtype)


def _at_one(regularizer: Regularizer) -> Regularizer:
    """The regularizer at temperature 1."""
    return eqx.tree_at(lambda r: r.temperature, regularizer, jnp.ones_like(regularizer.temperature))
