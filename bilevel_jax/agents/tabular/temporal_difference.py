"""The temporal-difference learner. Its subclasses differ in the value that they expect to follow a step."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Real

from bilevel_jax.agents.processes import (
    as_limit,
    as_unit,
    at_states,
    mixed,
    simulator,
    take,
)
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.agents.tabular.values import Learned, coverage, values_at
from bilevel_jax.core.functions import as_pytree
from bilevel_jax.core.schedules import ByVisits, as_schedule
from bilevel_jax.core.sizes import size
from bilevel_jax.core.validation import as_float
from bilevel_jax.environments import Categorical, Processes, start_processes
from bilevel_jax.mdp.regularizers import Regularizer


class LearnerState(eqx.Module):
    """The state of the agent.

    `learned` holds the values. `processes` are states of the simulator, [B], from which the next `improve` goes on.
    `error` is the root mean square of the temporal-difference errors of the last `improve`, infinite before the first.
    """

    learned: Learned
    processes: Any
    error: Float[Array, ""]


class TemporalDifference(Agent):
    """Q(s, a) <- Q(s, a) + alpha (r_x(s, a) + discount (1 - terminated) v(s') - Q(s, a)), where the subclass defines v.

    Every step of every process corrects one pair. Processes act by the current policy grad Omega*(Q), and uniformly
    with probability `epsilon`.

    Args:
      processes: B, the number of processes that run in parallel (static).
      steps: the number of steps of each process per `improve` (static).
      epsilon: the probability of an action drawn uniformly from those that a KL reference allows.
      step_size: alpha: a number, a function of the number of steps made (`Polynomial`, an optax schedule), or
        `ByVisits(function)`. The corrections of processes at the same pair are added, but never to more than their
        mean: an alpha of at most 1 is then stable for any number of processes. None is 1 / (1 + (1 - discount) n) for a
        pair visited n times (Wainwright 2019), the best of the step sizes that were measured.
      features: None learns a table; where observations are not the states of one, it takes the problem's own
        `features(observation)`. An array [S, F] or a function observation -> [F] learns
        Q(s, a) = features(s) . weights[:, a] along the semi-gradient, best with |features|_1 about 1.
      restart_every: the number of steps after which a process starts again; None is the problem's horizon, which
        keeps the processes in the states that the problem's trajectories visit.
      keep: the fraction of the counts of steps and visits with which each `improve` starts. Below 1 (0.9 to 0.98) the
        step sizes do not tend to 0. That suits an x that moves much; where x rests, it adds noise.
      initial_value: the value of the states that follow a table's pairs before these are visited; None is the mean of
        Omega*(r_x) / (1 - discount). If it is too low, the agent stays where it was first; if it is too high, it tries
        everything out. Weights of features start from zero.

    Raises:
      InputError: sizes below 1; epsilon or keep outside [0, 1]; step_size not above 0; and in `init`,
        features of a wrong shape or missing where the environment is not tabular.
    """

    step_size: Any
    epsilon: Float[Array, ""]
    features: Float[Array, "S F"] | Callable | None
    restart_every: Int32[Array, ""] | None
    keep: Float[Array, ""]
    initial_value: Float[Array, ""] | None
    processes: int = eqx.field(static=True, converter=size("processes"))
    steps: int = eqx.field(static=True, converter=size("steps"))

    def __init__(
        self,
        *,
        processes: int = 64,
        steps: int = 64,
        epsilon: Any = 0.2,
        step_size: Any = None,
        features: Any = None,
        restart_every: Any = None,
        keep: Any = 1.0,
        initial_value: Any = None,
    ):
        self.processes = processes
        self.steps = steps
        self.epsilon = as_unit("epsilon", epsilon, "0 acts by the policy alone, 1 uniformly")
        self.step_size = None if step_size is None else as_schedule("step_size", step_size)
        self.features = features
        if features is not None:
            self.features = as_pytree("features", features) if callable(features) else as_float("features", features)
        self.restart_every = as_limit("restart_every", restart_every)
        self.keep = as_unit("keep", keep, "1 keeps all counts, 0 starts step sizes anew in each improve")

        self.initial_value = None if initial_value is None else as_float("initial_value", initial_value, float)

    @abc.abstractmethod
    def follows(
        self, regularizer: Regularizer, q: Float[Array, "B A"], numbers: Float[Array, " B"]
    ) -> Float[Array, " B"]:
        """v(s') of B states, from their rows of Q; `numbers` choose the actions that processes take there."""

    def require(self, regularizer: Regularizer) -> None:
        """Raise InputError if the agent cannot learn under this regularizer."""
        del regularizer

    def init(self, key, problem, x):
        self.require(problem.regularizer(x))
        processes = start_processes(key, simulator(problem, self.restart_every), self.processes)
        learned = values_at(problem, x, self.features, self.initial_value).init()
        return LearnerState(learned, processes.states, jnp.full((), jnp.inf, learned.parameters.dtype))

    def improve(self, key, state, problem, x):
        processes = Processes(simulator(problem, self.restart_every), state.processes)
        values = values_at(problem, x, self.features, self.initial_value)
        regularizer = problem.regularizer(x)
        keys = processes.keys(key)
        discount = jnp.asarray(problem.discount, state.learned.parameters.dtype)
        step_size = ByVisits(_Rescaled(discount)) if self.step_size is None else self.step_size

        # Not `collect`: the policy changes with every step.
        def step(carry, h):
            learned, states = carry
            here = Processes(processes.environment, states)
            observation = here.observe()
            q = values.read(learned.parameters, observation)
            local = at_states(regularizer, observation)
            action = here.act(keys, h, Categorical(mixed(local, local.policy(q), self.epsilon)))
            there, made = here.advance(keys, h, action)
            q_next = values.read(learned.parameters, made.observation)
            following = self.follows(at_states(regularizer, made.observation), q_next, here.numbers(keys, h + 1))
            target = take(values.rewards(observation), action) + jnp.where(made.terminated, 0, discount * following)
            errors = target - take(q, action)
            learned = values.correct(learned, observation, action, errors, step_size)
            return (learned, there.states), jnp.mean(errors**2)

        start = (state.learned.scale_counts(self.keep), state.processes)
        (learned, states), squares = lax.scan(step, start, jnp.arange(self.steps, dtype=jnp.uint32))
        return LearnerState(learned, states, jnp.sqrt(jnp.mean(squares)))

    def policy(self, state, problem, x):
        values = values_at(problem, x, self.features, self.initial_value)
        return values.policy(state.learned.parameters, problem.regularizer(x))

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps

    def report(self, state):
        """Return `temporal_difference_error`, the root mean square over the last `improve`, and `coverage`, the
        fraction of pairs (or of weights of features) that were corrected at least once.
        """
        return {"temporal_difference_error": state.error, "coverage": coverage(state.learned.visits, state.error.dtype)}


class _Rescaled(eqx.Module):
    """1 / (1 + (1 - discount) count)."""

    discount: Float[Array, ""]

    def __call__(self, count: Real[Array, "*shape"]) -> Float[Array, "*shape"]:
        return 1 / (1 + (1 - self.discount) * count.astype(self.discount.dtype))
