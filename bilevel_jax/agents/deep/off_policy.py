"""The part that the soft actor-critics share: a replay of steps, two critics and their targets, a temperature."""

import abc
import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int32, Integer, PRNGKeyArray

from bilevel_jax import replay
from bilevel_jax.agents.deep.actors import CategoricalActor, GaussianActor, UniformFirst
from bilevel_jax.agents.deep.learning import Episodes, Optimizer
from bilevel_jax.agents.processes import as_limit, simulator
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.schedules import Schedule
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float, as_size, is_known, require_positive
from bilevel_jax.environments import Environment, Processes, Trajectory, collect, start_processes
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.networks import MLP, Network

NUMBERS = ("critic_loss", "actor_loss", "q", "entropy", "temperature", "gradient_norm")


class Step(NamedTuple):
    """What the replay keeps of a step.

    `reward` is the environment's own; that of x is computed when it is needed. Steps that are not `valid` have no
    weight.
    """

    observation: Any
    action: Integer[Array, "*steps"] | Float[Array, "..."]
    reward: Float[Array, "*steps"]
    next_observation: Any
    terminated: Bool[Array, "*steps"]
    valid: Bool[Array, "*steps"]

    @classmethod
    def of(cls, seen: Trajectory) -> "Step":
        """The steps of a trajectory of `collect` [B, H], as [B H]."""
        reward = seen.reward.astype(jnp.result_type(float))
        return merge_axes(
            cls(seen.observation, seen.action, reward, seen.next_observation, seen.terminated, seen.valid)
        )

    @classmethod
    def shapes(cls, environment: Environment) -> "Step":
        """The shapes and dtypes of one."""
        space, observation = environment.action_space, environment.observation_space
        action = jax.ShapeDtypeStruct(space.shape, space.dtype)
        reward, truth = (jax.ShapeDtypeStruct((), kind) for kind in (jnp.result_type(float), jnp.result_type(bool)))
        fields: tuple[Any, ...] = (observation, action, reward, observation, truth, truth)
        return cls(*fields)


def rewards_now(problem: SampledProblem, x: Any, steps: Step) -> Float[Array, " N"]:
    """What the lower level earns in steps from the replay at the x of now, [N], whatever x they were made at."""
    one = jax.tree.map(lambda leaf: leaf[None], steps)
    seen = Trajectory(
        state=None,
        observation=one.observation,
        action=one.action,
        probability=jnp.ones_like(one.reward),
        reward=one.reward,
        next_observation=one.next_observation,
        terminated=one.terminated,
        truncated=jnp.zeros_like(one.terminated),
        valid=one.valid,
    )
    return problem.earned(x, seen)[0]


class Learned(eqx.Module):
    """What the agent has learned: parameters of the actor, of two critics [2] and of their targets [2]; the logarithm
    of the temperature, None where it is the problem's; and the states of the optimizers of the three.
    """

    actor: Any
    critics: Any
    targets: Any
    log_temperature: Float[Array, ""] | None
    actor_optimizer: Any
    critic_optimizer: Any
    temperature_optimizer: Any


class SoftActorCriticState(eqx.Module):
    """The state of the agent.

    `ring` is the replay, `processes` the states of the simulator, [B], from which the next `improve` goes on.
    `gradient_steps` counts the steps of the optimizers. `numbers` are means over those of the last update that made
    any, NaN before.
    """

    learned: Learned
    ring: replay.Ring
    processes: Any
    episodes: Episodes
    gradient_steps: Int32[Array, ""]
    numbers: dict[str, Float[Array, ""]]


class OffPolicyActorCritic(Agent):
    """A soft actor-critic on a replay; a subclass says what actions, and so actors and critics, are.

    Each update runs every process for `steps` steps and then makes `gradient_steps` steps of the optimizers, each on
    `batch` steps drawn uniformly from the replay:

      critics:  lessen the mean of (Q_i(s, a) - y)^2 / 2,   y = r_x(s, a) + discount (1 - terminated) v(s'),
                v(s') the regularized value of the actor's policy under min(Q_1, Q_2) of the targets;
      actor:    lessen the mean of Omega(pi(s)) - <pi(s), min(Q_1, Q_2)>.

    The replay keeps steps and not their rewards at x: r_x is computed anew for each batch, so that all of it tells of
    the x of now.

    Args:
      network: of the actor; None is an `MLP()` whose last layer begins near zero.
      critic: of both critics, which have parameters of their own; None is the network that is given, else `MLP()`.
      processes: B, the number of processes that run in parallel (static).
      steps: the number of steps of each process per update (static).
      updates: the number of updates per `improve` (static).
      gradient_steps: the number of steps of the optimizers per update (static).
      batch: the number of steps drawn for each of them (static).
      capacity: of the replay, in steps (static). Observations are kept in their own dtype, twice for each step.
      learning_starts: the number of steps in the replay from which on the agent learns (static). Before, actions are
        drawn uniformly, and no step of an optimizer is made or paid for.
      target_update: below 1, the part tau of the critics that their targets take over at each step of the optimizers
        (a Polyak average); a whole number k from 1 on copies the critics every k steps of them.
      learning_rate: a number, or a function of the number of steps that the optimizers made, e.g. `LinearDecay`.
      actor_learning_rate: that of the actor; None is the same.
      max_gradient_norm: the 2-norm to which gradients are clipped.
      restart_every: the number of steps after which a process starts again; None is the problem's horizon.

    Raises:
      InputError: sizes below 1; a capacity below the steps of an update or below learning_starts; a target_update that
        is not above 0, or above 1 and not whole; and in `init`, actions or a regularizer that the agent does not know.
    """

    network: Network
    critic: Network
    target_update: Float[Array, ""]
    target_entropy: Float[Array, ""] | None
    optimizer: Optimizer
    actor_optimizer: Optimizer
    restart_every: Int32[Array, ""] | None
    processes: int = eqx.field(static=True, converter=size("processes"))
    steps: int = eqx.field(static=True, converter=size("steps"))
    updates: int = eqx.field(static=True, converter=size("updates"))
    gradient_steps: int = eqx.field(static=True, converter=size("gradient_steps"))
    batch: int = eqx.field(static=True, converter=size("batch"))
    capacity: int = eqx.field(static=True, converter=size("capacity"))
    learning_starts: int = eqx.field(static=True)

    def __init__(
        self,
        network: Network | None = None,
        critic: Network | None = None,
        *,
        target_entropy: Float[Array, ""] | None,
        processes: int = 16,
        steps: int = 4,
        updates: int = 16,
        gradient_steps: int = 16,
        batch: int = 128,
        capacity: int = 100_000,
        learning_starts: int = 1000,
        target_update: Any = 0.005,
        learning_rate: float | Schedule = 3e-4,
        actor_learning_rate: float | Schedule | None = None,
        max_gradient_norm: Any = 10.0,
        restart_every: Any = None,
    ):
        self.network = MLP(output_scale=0.01) if network is None else network
        self.critic = critic if critic is not None else MLP() if network is None else network
        self.processes, self.steps, self.updates = processes, steps, updates
        self.gradient_steps, self.batch, self.capacity = gradient_steps, batch, capacity
        self.learning_starts = as_size("learning_starts", learning_starts, "1 learns from the first block on")
        least = max(self.processes * self.steps, self.learning_starts)
        if self.capacity < least:
            raise InputError(
                f"capacity: {self.capacity} steps do not hold those of an update and learning_starts; give at least "
                f"{least}"
            )
        self.target_update = _as_target_update(target_update)
        self.target_entropy = target_entropy
        own = learning_rate if actor_learning_rate is None else actor_learning_rate
        self.optimizer = Optimizer(learning_rate, max_gradient_norm, "adam")
        self.actor_optimizer = Optimizer(own, max_gradient_norm, "adam")
        self.restart_every = as_limit("restart_every", restart_every)

    @abc.abstractmethod
    def require(self, problem: SampledProblem, x: Any) -> None:
        """Raise InputError if the agent cannot learn in this problem."""

    @abc.abstractmethod
    def sizes(self, environment: Environment) -> tuple[int, Any, int]:
        """(outputs of the actor's network, the critics' inputs, their outputs)."""

    @abc.abstractmethod
    def actor(self, params: Any, problem: SampledProblem, x: Any) -> CategoricalActor | GaussianActor:
        """The policy of parameters."""

    @abc.abstractmethod
    def q_of(self, critics: Any, observation: Any, action: Any) -> Float[Array, "2 N"]:
        """Both critics at pairs."""

    @abc.abstractmethod
    def soft_value(
        self,
        key: PRNGKeyArray,
        actor: CategoricalActor | GaussianActor,
        critics: Any,
        regularizer: Regularizer,
        observation: Any,
    ) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
        """(regularized value of an actor under the lesser of the critics, entropy of the actor) at observations [N],
        with derivatives in the actor's parameters.
        """

    @abc.abstractmethod
    def wanted_entropy(self, environment: Environment) -> Float[Array, ""]:
        """The entropy to which a temperature is tuned, in nats."""

    def init(self, key, problem, x):
        self.require(problem, x)
        for_actor, for_critics, for_processes = jax.random.split(key, 3)
        environment = simulator(problem, self.restart_every)
        outputs, inputs, values = self.sizes(environment)
        actor = self.network.init(for_actor, environment.observation_space, outputs)
        critics = jax.vmap(lambda key: self.critic.init(key, inputs, values))(jax.random.split(for_critics))
        log_temperature = None
        if self.target_entropy is not None:
            log_temperature = jnp.log(jnp.asarray(problem.regularizer(x).temperature, self.target_entropy.dtype))
        learned = Learned(
            actor=actor,
            critics=critics,
            targets=critics,
            log_temperature=log_temperature,
            actor_optimizer=self.actor_optimizer.init(actor),
            critic_optimizer=self.optimizer.init(critics),
            temperature_optimizer=None if log_temperature is None else self.optimizer.init(log_temperature),
        )
        return SoftActorCriticState(
            learned=learned,
            ring=replay.init(Step.shapes(environment), self.capacity),
            processes=start_processes(for_processes, environment, self.processes).states,
            episodes=Episodes.start(self.processes),
            gradient_steps=jnp.zeros((), jnp.int32),
            numbers=dict.fromkeys(NUMBERS, jnp.full((), jnp.nan, jnp.result_type(float))),
        )

    def improve(self, key, state, problem, x):
        def update(state: SoftActorCriticState, key: PRNGKeyArray) -> tuple[SoftActorCriticState, None]:
            for_steps, for_learning = jax.random.split(key)
            processes = Processes(simulator(problem, self.restart_every), state.processes)
            processes, seen = collect(for_steps, processes, self.acting(state, problem, x), self.steps)
            learned = self.learn(for_learning, state, problem, x, seen)
            return dataclasses.replace(learned, processes=processes.states), None

        return lax.scan(update, state, jax.random.split(key, self.updates))[0]

    def acting(self, state: SoftActorCriticState, problem: SampledProblem, x: Any) -> UniformFirst:
        """Return the policy that acts while the agent learns."""
        return UniformFirst(self.actor(state.learned.actor, problem, x), state.ring.size < self.learning_starts)

    def learn(
        self, key: PRNGKeyArray, state: SoftActorCriticState, problem: SampledProblem, x: Any, seen: Trajectory
    ) -> SoftActorCriticState:
        """Return the state after an update by given steps [B, H] under `acting`; `processes` stay as they are.

        Steps that are not `valid` go into the replay without weight. Under jit, donate the state, or carry it through a
        loop: the replay is then written in place.
        """
        ring = replay.add(state.ring, Step.of(seen))

        def step(learned: Learned, now: Any) -> tuple[Learned, dict[str, Array]]:
            key, count = now
            for_batch, for_actions = jax.random.split(key)
            return self._step(for_actions, learned, replay.sample(for_batch, ring, self.batch), problem, x, count)

        def learn(_: Any, before: Any) -> Any:
            counts = state.gradient_steps + jnp.arange(self.gradient_steps, dtype=jnp.int32)
            learned, numbers = lax.scan(step, before[0], (jax.random.split(key, self.gradient_steps), counts))
            return learned, {name: jnp.mean(numbers[name]).astype(old.dtype) for name, old in before[1].items()}

        # Not `cond`, which under vmap would do the work of both sides: a loop that runs once, or not at all.
        once = (ring.size >= self.learning_starts).astype(jnp.int32)
        learned, numbers = lax.fori_loop(jnp.zeros_like(once), once, learn, (state.learned, state.numbers))
        return SoftActorCriticState(
            learned=learned,
            ring=ring,
            processes=state.processes,
            episodes=state.episodes.after(seen),
            gradient_steps=state.gradient_steps + once * self.gradient_steps,
            numbers=numbers,
        )

    def _step(
        self, key: PRNGKeyArray, learned: Learned, batch: Step, problem: SampledProblem, x: Any, count: Int32[Array, ""]
    ) -> tuple[Learned, dict[str, Float[Array, ""]]]:
        """One step of every optimizer."""
        for_values, for_actor = jax.random.split(key)
        regularizer = problem.regularizer(x)
        if learned.log_temperature is not None:
            own = jnp.exp(learned.log_temperature).astype(regularizer.temperature.dtype)
            regularizer = eqx.tree_at(lambda r: r.temperature, regularizer, own)
        now = self.actor(learned.actor, problem, x)
        following, _ = self.soft_value(for_values, now, learned.targets, regularizer, batch.next_observation)
        discount = jnp.asarray(problem.discount, following.dtype)
        rewards = rewards_now(problem, x, batch).astype(following.dtype)
        goals = rewards + jnp.where(batch.terminated, 0, discount * following)
        weight = batch.valid.astype(following.dtype)
        weight = weight / jnp.maximum(jnp.sum(weight), 1)

        def mean(values: Float[Array, " N"]) -> Float[Array, ""]:
            return jnp.sum(jnp.where(batch.valid, weight * values, 0))

        def critic_loss(critics: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
            q = self.q_of(critics, batch.observation, batch.action)
            return mean(jnp.sum((q - goals[None]) ** 2, 0)) / 2, mean(jnp.mean(q, 0))

        (error, q), gradient = jax.value_and_grad(critic_loss, has_aux=True)(learned.critics)
        critics, critic_optimizer, norm = self.optimizer.update(
            gradient, learned.critic_optimizer, learned.critics, count
        )

        def actor_loss(params: Any) -> tuple[Float[Array, ""], Float[Array, ""]]:
            actor = self.actor(params, problem, x)
            value, entropy = self.soft_value(for_actor, actor, critics, regularizer, batch.observation)
            return -mean(value), mean(entropy)

        (loss, entropy), gradient = jax.value_and_grad(actor_loss, has_aux=True)(learned.actor)
        actor, actor_optimizer, _ = self.actor_optimizer.update(gradient, learned.actor_optimizer, learned.actor, count)
        log_temperature, temperature_optimizer = learned.log_temperature, learned.temperature_optimizer
        if log_temperature is not None:
            wanted = self.wanted_entropy(problem.environment)
            surplus = entropy.astype(log_temperature.dtype) - wanted.astype(log_temperature.dtype)
            log_temperature, temperature_optimizer, _ = self.optimizer.update(
                surplus, temperature_optimizer, log_temperature, count
            )
        numbers = {
            "critic_loss": error,
            "actor_loss": loss,
            "q": q,
            "entropy": entropy,
            "temperature": regularizer.temperature,
            "gradient_norm": norm,
        }
        return Learned(
            actor=actor,
            critics=critics,
            targets=self._follow(learned.targets, critics, count),
            log_temperature=log_temperature,
            actor_optimizer=actor_optimizer,
            critic_optimizer=critic_optimizer,
            temperature_optimizer=temperature_optimizer,
        ), numbers

    def _follow(self, targets: Any, critics: Any, count: Int32[Array, ""]) -> Any:
        """The targets after an update of the critics."""
        averages = self.target_update < 1
        every = jnp.maximum(jnp.round(self.target_update), 1).astype(jnp.int32)
        part = jnp.where(averages, self.target_update, ((count + 1) % every == 0).astype(self.target_update.dtype))

        def follow(old: Array, new: Array) -> Array:
            return jnp.where(part >= 1, new, old + part.astype(old.dtype) * (new - old))

        return jax.tree.map(follow, targets, critics)

    def policy(self, state, problem, x):
        return self.actor(state.learned.actor, problem, x)

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps * self.updates

    def report(self, state):
        """Return `critic_loss`, `actor_loss`, `q` (the mean of the critics at the pairs that were drawn), `entropy` of
        the policy, `temperature` and `gradient_norm` of the critics, means over the last update; `episode_return` and
        `episode_length`, in the environment's own rewards.
        """
        return {**state.numbers, **state.episodes.report()}


def both(network: Network, params: Any, inputs: Any) -> Float[Array, "2 N outputs"]:
    """Both critics at inputs [N]."""
    return jax.vmap(jax.vmap(network.apply, (None, 0)), (0, None))(params, inputs)


def _as_target_update(value: Any) -> Float[Array, ""]:
    number = as_float("target_update", value, float)
    remedy = "0.005 averages, and 100 copies every 100 updates"
    require_positive("target_update", number, remedy)
    if is_known(number) and float(number) > 1 and float(number) != round(float(number)):
        raise InputError(f"target_update: expected a number below 1 or a whole one, got {float(number):g}; {remedy}")
    return number
