"""The part that the algorithms which learn from samples share: an agent, and an estimate under its policy."""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, Real

from bilevel_jax.agents import Agent, ExactAgent, GaussianActorCritic, SoftPQN, SoftQLearning
from bilevel_jax.algorithms.base import Algorithm, Estimate, Report, State, regularizer_of
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level, at_iteration
from bilevel_jax.bilevel import Problem, SampledProblem
from bilevel_jax.core.errors import RequirementError
from bilevel_jax.core.results import Result
from bilevel_jax.environments import Box, Policy, TabularEnvironment
from bilevel_jax.mdp import KLDivergence, ShannonEntropy


class Learned(eqx.Module):
    """`agent` is the state of the lower level.

    `estimator` is what the hyper-gradient's estimator carries, e.g. a critic.
    """

    agent: Any
    estimator: Any


class SampledEstimate(eqx.Module):
    """The result of `estimate_from_samples`: value, gradient, memory and effective sample size; and further numbers by
    name for the info.
    """

    value: Float[Array, ""]
    gradient: Any
    memory: Any
    effective_sample_size: Float[Array, ""]
    reports: dict[str, Float[Array, ""]] = eqx.field(default_factory=dict)


class SampledAlgorithm(Algorithm):
    """An algorithm with an agent; a subclass says how it estimates the hyper-gradient. Its memory is `Learned`.

    An iteration improves the agent at x, warm-started, estimates the hyper-gradient under its policy and makes one step
    of the optimizer. Its info reports `effective_sample_size`, which is the number of groups of trajectories unless
    they are weighted, and `agent`, the numbers of `Agent.report` by name. `tabular` says whether it needs a
    `TabularEnvironment`.
    """

    problem: SampledProblem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    agent: Agent
    tabular: ClassVar[bool] = False

    @classmethod
    def requires(cls, problem: Any) -> str | None:
        if not isinstance(problem, SampledProblem):
            return "has no simulator: environment, reward(x) and loss(key, x, trajectories)"
        regularizer = regularizer_of(problem)
        if regularizer is not None and not isinstance(regularizer, ShannonEntropy | KLDivergence):
            return f"has the regularizer {type(regularizer).__name__}, whose policy has no logarithm everywhere"
        if cls.tabular and not isinstance(problem.environment, TabularEnvironment):
            return f"has the simulator {type(problem.environment).__name__}, not a tabular one"
        return None

    def policy(self, state: State) -> Policy:
        """The agent's policy at the end of the last iteration."""
        return self.agent.policy(state.memory.agent, at_iteration(self, state.iteration).problem, state.x)

    def init_agent(self, key: PRNGKeyArray, x: Any) -> Any:
        """The lower level's state at the start."""
        return self.agent.init(key, self.problem, x)

    def improve_agent(self, key: PRNGKeyArray, state: State) -> Any:
        """Return the lower level's state after the agent has improved in this iteration."""
        return self.agent.improve(key, state.memory.agent, self.problem, state.x)

    def report_agent(self, agent: Any) -> dict[str, Real[Array, ""]]:
        """Return numbers on how the agent learns, from the state that `improve_agent` returned."""
        return self.agent.report(agent)

    def at_the_end(self, state: State) -> dict[str, Float[Array, ""]]:
        """Return numbers by name that describe a finished run; by default there are none."""
        del state
        return {}

    def init_estimator(self, x: Any) -> Any:
        """The estimator's memory at the start."""
        del x

    @abc.abstractmethod
    def estimate_from_samples(self, key: PRNGKeyArray, state: State) -> SampledEstimate:
        """Return the hyper-gradient at state.x, where the agent has improved already."""

    @property
    @abc.abstractmethod
    def environment_steps(self) -> int:
        """Return the number of simulator steps of one iteration.

        The work of an agent that solves exactly is not counted.
        """

    def init_memory(self, key, x):
        return Learned(self.init_agent(key, x), self.init_estimator(x))

    def estimate(self, key, state):
        for_agent, for_estimate = jax.random.split(key)
        agent = self.improve_agent(for_agent, state)
        improved = State(state.x, Learned(agent, state.memory.estimator), state.optimizer_state, state.iteration)
        made = self.estimate_from_samples(for_estimate, improved)
        # An agent that has diverged still acts, and what it earns is finite.
        value = jnp.where(has_nan(self.policy(improved)), jnp.nan, made.value)
        norm = optax.tree.norm(made.gradient)
        # An estimate may miss that x is not finite: not every state is visited.
        finite = jnp.isfinite(norm) & jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(state.x))
        result = jnp.where(finite, Result.CONVERGED, Result.NOT_FINITE).astype(jnp.int32)
        return Estimate(
            objective=value,
            gradient=made.gradient,
            memory=Learned(agent, made.memory),
            transitions=jnp.asarray(float(self.environment_steps)),
            reports={
                "hyper-gradient estimate": Report(result),
                "effective_sample_size": made.effective_sample_size.astype(value.dtype),
                "agent": self.report_agent(agent),
                **made.reports,
            },
        )


def has_nan(tree: Any) -> Bool[Array, ""]:
    """Whether a floating-point number in a pytree is NaN."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating)]
    return jnp.any(jnp.stack([jnp.any(jnp.isnan(leaf)) for leaf in leaves])) if leaves else jnp.asarray(False)


def as_agent(problem: Any, agent: Agent | None) -> Agent:
    """The agent, or `default_agent(problem)` for None.

    Raises:
      RequirementError: an exact agent for a problem without a model.
    """
    if isinstance(agent, ExactAgent) and not isinstance(problem, Problem):
        reason = "has no model for an ExactAgent; SoftQLearning and SoftPQN learn from samples"
        raise RequirementError(type(problem).__name__, reason)
    return default_agent(problem) if agent is None else agent


def default_agent(problem: Any) -> Agent:
    """The agent of an algorithm to which none was given.

    `ExactAgent()`, an oracle, where the problem has a model. Elsewhere `SoftQLearning()` on a table or on a problem's
    features, `GaussianActorCritic()` for continuous actions, and `SoftPQN()` for the rest.

    Example:
      >>> task = bj.problems.Task(bj.environments.classic.CartPole())
      >>> type(bj.algorithms.default_agent(task)).__name__
      'SoftPQN'
    """
    if isinstance(problem, Problem):
        return ExactAgent()
    if learns_linearly(problem):
        return SoftQLearning()
    return GaussianActorCritic() if isinstance(problem.environment.action_space, Box) else SoftPQN()


def learns_linearly(problem: SampledProblem) -> bool:
    """Whether an agent without a network can learn: on a table, or on the problem's features."""
    return isinstance(problem.environment, TabularEnvironment) or getattr(problem, "features", None) is not None


def batch_steps(problem: SampledProblem, batch: int) -> int:
    """Return the number of simulator steps in a batch of groups."""
    return batch * problem.trajectories * problem.horizon
