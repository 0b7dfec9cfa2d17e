"""One temporal-difference learner; agents differ in the value that they expect to follow."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax

from bilevel_jax.agents.processes import (
    Processes,
    as_limit,
    as_unit,
    at_states,
    choose_all,
    mixed,
    require_sizes,
    take,
)
from bilevel_jax.agents.protocol import Agent
from bilevel_jax.agents.schedules import ByVisits, as_schedule
from bilevel_jax.agents.values import Learned, values_at
from bilevel_jax.functions import as_pytree
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.validation import as_float, plain


class LearnerState(eqx.Module):
    """`learned`: values. `processes`: states of the simulator, [B], which the next `improve` goes on from."""

    learned: Learned
    processes: Any


class TemporalDifference(Agent):
    """Q(s, a) <- Q(s, a) + alpha (r_x(s, a) + discount (1 - terminated) v(s') - Q(s, a)), v of the subclass.

    Every step of every process corrects one pair. Processes act by the current policy grad Omega*(Q),
    with chance `epsilon` uniformly.

    Args:
      processes: B, how many run in parallel (static).
      steps: of each process in one `improve` (static).
      epsilon: chance of an action drawn uniformly from those that a KL reference allows.
      step_size: alpha: a number, a function of the steps made (`Polynomial`, an optax schedule), or
        `ByVisits(function)`. Processes at the same pair add their corrections up to their mean, so
        that an alpha of at most 1 is stable for any number of them. None is 1 / (1 + (1 - discount) n)
        for a pair visited n times (Wainwright 2019), the best of those measured.
      features: None learns a table. An array [S, F] or a function observation -> [F] learns
        Q(s, a) = features(s) . weights[:, a] along the semi-gradient, best with |features|_1 about 1.
      restart_every: steps after which a process starts anew; None is the problem's horizon, which keeps
        them where its trajectories go.
      keep: fraction of the counts of steps and visits that each `improve` starts with. Below 1 (0.9 to
        0.98) the step sizes do not die out: for an x that moves much, at the price of noise where it rests.
      initial_value: of the states that follow pairs of a table not visited yet; None is the mean of
        Omega*(r_x) / (1 - discount). Too low a value and the agent stays where it was first; too high
        a one and it tries everything out. Weights of features start from zero.

    Raises:
      InputError: sizes below 1; epsilon or keep outside [0, 1]; step_size not above 0; and in `init`,
        features of a wrong shape or missing where the environment is not tabular.
    """

    step_size: Any
    epsilon: jax.Array
    features: Any
    restart_every: jax.Array | None
    keep: jax.Array
    initial_value: jax.Array | None
    processes: int = eqx.field(static=True, converter=plain)
    steps: int = eqx.field(static=True, converter=plain)

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
        require_sizes(processes=processes, steps=steps)
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
    def follows(self, regularizer: Regularizer, q: jax.Array, numbers: jax.Array) -> jax.Array:
        """v(s') of B states, [B], from their rows Q[B, A]; `numbers` choose the actions that processes take there."""

    def require(self, regularizer: Regularizer) -> None:
        """Raise InputError if the agent cannot learn under this regularizer."""
        del regularizer

    def init(self, key, problem, x):
        self.require(problem.regularizer(x))
        processes = Processes(problem, self.processes, self.restart_every)
        return LearnerState(values_at(problem, x, self.features, self.initial_value).init(), processes.start(key))

    def improve(self, key, state, problem, x):
        processes = Processes(problem, self.processes, self.restart_every)
        values = values_at(problem, x, self.features, self.initial_value)
        regularizer = problem.regularizer(x)
        keys = processes.keys(key)
        discount = jnp.asarray(problem.discount, state.learned.parameters.dtype)
        step_size = ByVisits(_Rescaled(discount)) if self.step_size is None else self.step_size

        def step(carry, h):
            learned, states, numbers = carry
            observation = processes.observe(states)
            q = values.read(learned.parameters, observation)
            local = at_states(regularizer, observation)
            action = choose_all(numbers, mixed(local, local.policy(q), self.epsilon))
            states, made = processes.advance(keys, h, states, action)
            numbers = processes.numbers(keys, h + 1)
            q_next = values.read(learned.parameters, made.observation)
            following = self.follows(at_states(regularizer, made.observation), q_next, numbers)
            target = take(values.rewards(observation), action) + jnp.where(made.terminated, 0, discount * following)
            learned = values.correct(learned, observation, action, target - take(q, action), step_size)
            return (learned, states, numbers), None

        start = (state.learned.aged(self.keep), state.processes, processes.numbers(keys, jnp.uint32(0)))
        (learned, states, _), _ = lax.scan(step, start, jnp.arange(self.steps, dtype=jnp.uint32))
        return LearnerState(learned, states)

    def policy(self, state, problem, x):
        values = values_at(problem, x, self.features, self.initial_value)
        return values.policy(state.learned.parameters, problem.regularizer(x))

    def environment_steps(self, problem):
        del problem
        return self.processes * self.steps


class _Rescaled(eqx.Module):
    """1 / (1 + (1 - discount) count)."""

    discount: jax.Array

    def __call__(self, count: jax.Array) -> jax.Array:
        return 1 / (1 + (1 - self.discount) * count.astype(self.discount.dtype))
