"""Stoc-SoBiRL: a single loop over samples, both levels learning at once."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from bilevel_jax.agents import Agent, SoftQLearning
from bilevel_jax.algorithms.sampled import require_batch
from bilevel_jax.algorithms.sobirl import SoBiRL, sobirl
from bilevel_jax.algorithms.upper import UpperLevel
from bilevel_jax.environments import TabularEnvironment
from bilevel_jax.errors import InputError
from bilevel_jax.estimators import Baseline, NestedRollouts, Response, SampledProblem, SharedRollouts
from bilevel_jax.validation import as_float, as_size, require_positive


class StocSchedule(NamedTuple):
    """What K iterations take: `step_size` of x and `agent_step_size`; `batch` of groups, `agent_batch` of
    parallel processes and `length` of the rollouts that estimate dQ* - dV*."""

    step_size: Any
    batch: int
    length: int
    agent_step_size: Any
    agent_batch: int


def stoc_schedule(
    iterations: int, discount: float, *, step_size: Any = 0.5, batch: float = 8.0, agent_batch: float = 4.0
) -> StocSchedule:
    """Sizes for K = `iterations` that balance the errors of the single loop at E|grad phi|^2 = O(K^(-2/3)).

    The paper proves O~(eps^-1.5) iterations, i.e. eps ~ K^(-2/3), for eps the squared norm. With a step size
    beta on x, descent gives 1 / (K beta), the noise of a batch of N groups beta / N, rollouts of T steps
    a squared bias of discount^(2 T), and an agent with steps alpha from M samples a squared error
    alpha / M (its drift, (beta / alpha)^2 |g|^2, is absorbed while beta is below alpha). All are
    K^(-2/3) for

      beta, alpha ~ K^(-1/3),   N, M ~ K^(1/3),   discount^T = K^(-1/3),

    which takes K^(4/3) log K = O~(eps^-2) samples where the paper proves O~(eps^-3.5).

    Args:
      iterations: K.
      discount: of the lower level, a number.
      step_size, batch, agent_batch: constants in front of beta, N and M.

    Raises:
      InputError: iterations below 1, a constant not above 0, a discount outside [0, 1).
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
        step_size / root, math.ceil(batch * root), length, min(1.0, 2 / root), math.ceil(agent_batch * root)
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
) -> SoBiRL:
    """Stoc-SoBiRL (Yang, Gao and Yuan, AISTATS 2025): x and the agent take one small step each an iteration.

    `sobirl` with sizes from `stoc_schedule`: the agent is soft Q-learning on a few processes that never
    stop, the batch is small, dQ* - dV* comes from rollouts that are truncated.

    Args:
      problem: a `SampledProblem`, its discount known (outside jit) unless a schedule is given.
      iterations: K, for which the defaults are made.
      schedule: None is `stoc_schedule(iterations, problem.discount)`.
      optimizer: None is gradient descent with the schedule's step size.
      agent: None is `SoftQLearning` with the schedule's sizes.
      response: None is `SharedRollouts(schedule.length)` on a table, else
        `NestedRollouts(schedule.length, visits=1)`. `LearnedModel()` needs far fewer samples.
      baseline: None is `LeaveOneOut()`.
    """
    if schedule is None:
        schedule = stoc_schedule(iterations, float(problem.discount))
    if agent is None:
        agent = SoftQLearning(
            processes=schedule.agent_batch, steps=schedule.length, step_size=jnp.asarray(schedule.agent_step_size)
        )
    if response is None:
        tabular = isinstance(problem.environment, TabularEnvironment)
        response = SharedRollouts(schedule.length) if tabular else NestedRollouts(schedule.length, visits=1)
    return sobirl(
        problem,
        optax.sgd(schedule.step_size) if optimizer is None else optimizer,
        agent=agent,
        response=response,
        batch=require_batch(schedule.batch),
        baseline=baseline,
    )
