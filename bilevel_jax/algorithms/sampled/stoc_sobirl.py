"""Stoc-SoBiRL: a single loop over samples in which both levels learn at the same time."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike, Real

from bilevel_jax.agents import Agent, SoftQLearning
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.sampled.base import default_agent, learns_linearly
from bilevel_jax.algorithms.sampled.sobirl import SoBiRL, default_baseline, default_response, sobirl
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.bilevel import SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_float, as_size, require_positive
from bilevel_jax.environments import TabularEnvironment
from bilevel_jax.estimators import Baseline, NestedRollouts, Response, SharedRollouts


class StocSchedule(NamedTuple):
    """The sizes for K iterations: `step_size` of x and `agent_step_size`; `batch`, the number of groups; `agent_batch`,
    the number of parallel processes; and `length`, that of the rollouts that estimate dQ* - dV*.
    """

    step_size: Any
    batch: int
    length: int
    agent_step_size: Any
    agent_batch: int


def stoc_schedule(
    iterations: int, discount: float, *, step_size: Any = 0.5, batch: float = 8.0, agent_batch: float = 4.0
) -> StocSchedule:
    """Return sizes for K = `iterations` that balance the errors of the single loop at E|grad phi|^2 = O(K^(-2/3)).

    The paper proves O~(eps^-1.5) iterations for a squared gradient norm eps, i.e. eps ~ K^(-2/3). With a step size beta
    of x, four errors add up: 1 / (K beta) from the descent, beta / N from the noise of a batch of N groups, a squared
    bias of discount^(2 T) from rollouts of T steps, and a squared error of alpha / M from an agent with step size alpha
    and M samples. (The drift of the agent, (beta / alpha)^2 |g|^2, is absorbed while beta is below alpha.) All of them
    are K^(-2/3) for

      beta, alpha ~ K^(-1/3),   N, M ~ K^(1/3),   discount^T = K^(-1/3),

    which takes K^(4/3) log K = O~(eps^-2) samples where the paper proves O~(eps^-3.5).

    Args:
      iterations: K.
      discount: the lower level's discount, a number.
      step_size, batch, agent_batch: constants in front of beta, N and M.

    Raises:
      InputError: iterations below 1, a constant not above 0, a discount outside [0, 1).

    Example:
      >>> bj.algorithms.stoc_schedule(1000, 0.9).batch
      80
    """
    iterations = as_size("iterations", iterations)
    if not 0 <= discount < 1:
        raise InputError(f"discount must be at least 0 and below 1, got {discount:g}")
    for name, value in (("batch", batch), ("agent_batch", agent_batch)):
        if not value > 0:
            raise InputError(f"{name} must be above 0, got {value!r}; the default is 4 to 8")
    step_size = as_float("step_size", step_size, float)
    require_positive("step_size", step_size, "it is the factor in front of iterations^(-1/3)")
    root = iterations ** (1 / 3)
    length = 1 if discount == 0 else max(1, math.ceil(math.log(root) / -math.log(discount)))
    return StocSchedule(
        step_size=step_size / root,
        batch=math.ceil(batch * root),
        length=length,
        agent_step_size=min(1.0, 2 / root),
        agent_batch=math.ceil(agent_batch * root),
    )


def stoc_sobirl(
    problem: SampledProblem,
    iterations: int,
    *,
    schedule: StocSchedule | None = None,
    optimizer: optax.GradientTransformation | UpperLevel | None = None,
    agent: Agent | None = None,
    response: Response | None = None,
    baseline: Baseline | None = None,
    max_ratio: Real[ArrayLike, ""] | None = None,
) -> SoBiRL:
    """Stoc-SoBiRL (Yang, Gao and Yuan, AISTATS 2025): x and the agent make one small step each per iteration.

    It is `sobirl` with sizes from `stoc_schedule`: the agent is soft Q-learning on a few processes that never stop, the
    batch is small, and dQ* - dV* comes from truncated rollouts.

    Args:
      problem: a `SampledProblem`, its discount known (outside jit) unless a schedule is given.
      iterations: K, for which the defaults are made.
      schedule: None is `stoc_schedule(iterations, problem.discount)`.
      optimizer: None is gradient descent with the schedule's step size.
      agent: None is `SoftQLearning` with the schedule's sizes on a table or on features, and
        `default_agent(problem)` elsewhere.
      response: None is `SharedRollouts(schedule.length)` on a table, else
        `NestedRollouts(schedule.length, visits=1)`. `LearnedModel()` needs far fewer samples.
      baseline: None is `LeaveOneOut()`.
      max_ratio: see `sobirl`.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.stoc_sobirl(problem, 10)
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    if schedule is None:
        schedule = stoc_schedule(iterations, float(problem.discount))
    if agent is None and learns_linearly(problem):
        agent = SoftQLearning(
            processes=schedule.agent_batch, steps=schedule.length, step_size=jnp.asarray(schedule.agent_step_size)
        )
    if response is None:
        tabular = isinstance(problem.environment, TabularEnvironment)
        response = SharedRollouts(schedule.length) if tabular else NestedRollouts(schedule.length, visits=1)
    return sobirl(
        problem,
        optax.sgd(schedule.step_size) if optimizer is None else optimizer,
        agent=default_agent(problem) if agent is None else agent,
        response=response,
        batch=as_size("batch", schedule.batch),
        baseline=baseline,
        max_ratio=max_ratio,
    )


def stoc_sobirl_within(
    problem: SampledProblem,
    upper: UpperLevel | optax.GradientTransformation,
    *,
    iterations: int | None = None,
    agent: Agent | None = None,
    response: Response | None = None,
    baseline: Baseline | None = None,
    max_ratio: Real[ArrayLike, ""] | None = None,
    transitions: int | None = None,
) -> SoBiRL:
    """Stoc-SoBiRL (Yang, Gao and Yuan 2025): agent and x learn at once, sizes by the schedule.

    Args:
      iterations: the number for which the schedule is made; None is as many as fit the budget, 1000 without one.
      agent: see `stoc_sobirl`.
      response: None is `default_response(problem)`: on a table a learned model, which needs far fewer samples than the
        published rollouts.
      baseline: None is `default_baseline(problem, response)`.
      max_ratio: see `sobirl`.
      transitions: the budget.
    """
    response = default_response(problem) if response is None else response
    baseline = default_baseline(problem, response) if baseline is None else baseline

    def made(count: int) -> SoBiRL:
        return stoc_sobirl(
            problem, count, optimizer=upper, agent=agent, response=response, baseline=baseline, max_ratio=max_ratio
        )

    if iterations is not None or transitions is None:
        return made(1000 if iterations is None else iterations)
    low, high = 1, transitions
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle * made(middle).environment_steps <= transitions else (low, middle - 1)
    return made(low)


register_algorithm("stoc_sobirl", stoc_sobirl_within)
