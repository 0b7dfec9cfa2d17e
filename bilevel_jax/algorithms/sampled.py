"""What the algorithms that learn from samples share: the loop of agent, estimate and upper-level update."""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from bilevel_jax.agents import Agent
from bilevel_jax.algorithms.protocol import jit_step
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level, at_iteration
from bilevel_jax.captures import jit
from bilevel_jax.estimators import SampledProblem
from bilevel_jax.functions import ActionFunction
from bilevel_jax.hypergradient import as_upper_variable
from bilevel_jax.results import Outcome, Result
from bilevel_jax.validation import as_size


class SampledState(eqx.Module):
    """What one iteration hands to the next.

    `x`: upper variable. `agent`: state of the lower level. `memory`: what the estimator of the
    hyper-gradient carries, e.g. a critic. `iteration`: how many were made.
    """

    x: Any
    agent: Any
    memory: Any
    optimizer_state: Any
    iteration: jax.Array


class SampledInfo(eqx.Module):
    """What one iteration reports, at the x it started from.

    `objective`: mean loss of the batch, an estimate of phi(x). `gradient`: the estimate of the
    hyper-gradient, and its 2-norm; `stationarity`, the same without a projection, see `UpperLevel`.
    `environment_steps` that the iteration took, lower level included.
    `effective_sample_size`: of the groups of trajectories, their number unless they are weighted.
    `result`: CONVERGED, or NOT_FINITE where the estimate or x is not.
    """

    objective: jax.Array
    gradient: Any
    gradient_norm: jax.Array
    stationarity: jax.Array
    environment_steps: jax.Array
    effective_sample_size: jax.Array
    result: jax.Array

    def outcomes(self) -> tuple[Outcome, ...]:
        return (Outcome("hyper-gradient estimate", self.result, None),)


class SampledEstimate(eqx.Module):
    """What an algorithm's `estimate` returns: value, gradient, memory and effective sample size."""

    value: jax.Array
    gradient: Any
    memory: Any
    effective_sample_size: jax.Array


class SampledAlgorithm(eqx.Module):
    """init and step of an algorithm; a subclass says how it estimates the hyper-gradient.

    An iteration improves the agent at x, warm-started, estimates the hyper-gradient under its policy
    and takes one step of the optimizer.
    """

    problem: SampledProblem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    agent: Agent

    def init(self, key: jax.Array, x: Any) -> SampledState:
        """The state at x, nothing learned yet. Raises InputError if x is not floating point."""
        return _init(self, key, as_upper_variable(x))

    def step(self, key: jax.Array, state: SampledState) -> tuple[SampledState, SampledInfo]:
        """One upper iteration. Give each one a key of its own, e.g. `fold_in(key, iteration)`."""
        return _step(self, key, state)

    def policy(self, state: SampledState) -> ActionFunction:
        """The agent's policy at the end of the last iteration."""
        return self.agent.policy(state.agent, at_iteration(self, state.iteration).problem, state.x)

    def init_agent(self, key: jax.Array, x: Any) -> Any:
        """The lower level's state at the start."""
        return self.agent.init(key, self.problem, x)

    def improve_agent(self, key: jax.Array, state: SampledState) -> Any:
        """The lower level's state after its share of an iteration."""
        return self.agent.improve(key, state.agent, self.problem, state.x)

    def init_memory(self, x: Any) -> Any:
        """The estimator's memory at the start."""
        del x

    @abc.abstractmethod
    def estimate(self, key: jax.Array, state: SampledState) -> SampledEstimate:
        """The hyper-gradient at state.x, with the agent improved already."""

    @property
    @abc.abstractmethod
    def environment_steps(self) -> int:
        """Steps of the simulator that one iteration takes."""


@jit
def _init(algorithm, key, x):
    x = jax.tree.map(lambda leaf: leaf.astype(leaf.dtype), algorithm.upper.project(x))
    start = jnp.asarray(0, jnp.int32)
    algorithm = at_iteration(algorithm, start)
    agent = algorithm.init_agent(key, x)
    return SampledState(x, agent, algorithm.init_memory(x), algorithm.upper.init(x), start)


@jit_step
def _step(algorithm, key, state):
    for_agent, for_estimate = jax.random.split(key)
    algorithm = at_iteration(algorithm, state.iteration)
    state = eqx.tree_at(
        lambda s: s.agent, state, algorithm.improve_agent(for_agent, state), is_leaf=lambda leaf: leaf is None
    )
    made = algorithm.estimate(for_estimate, state)
    x, optimizer_state, stationarity = algorithm.upper.update(made.gradient, state.optimizer_state, state.x, made.value)
    norm = optax.tree.norm(made.gradient)
    # An estimate may miss that x is not finite: not every state is visited.
    finite = jnp.isfinite(norm) & jnp.isfinite(made.value) & jnp.isfinite(optax.tree.norm(state.x))
    info = SampledInfo(
        made.value,
        made.gradient,
        norm,
        stationarity,
        jnp.asarray(algorithm.environment_steps, jnp.int32),
        made.effective_sample_size.astype(made.value.dtype),
        jnp.where(finite, Result.CONVERGED, Result.NOT_FINITE).astype(jnp.int32),
    )
    return SampledState(x, state.agent, made.memory, optimizer_state, state.iteration + 1), info


def require_batch(batch: int) -> int:
    """The batch, if it is a size. Raises InputError."""
    return as_size("batch", batch)


def batch_steps(problem: SampledProblem, batch: int) -> int:
    """Steps of the simulator in a batch of groups."""
    return batch * problem.trajectories * problem.horizon
