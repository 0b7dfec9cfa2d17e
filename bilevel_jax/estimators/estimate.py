"""The trajectory estimator of the hyper-gradient (Yang, Gao and Yuan 2025, SoBiRL)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient

from bilevel_jax.environments import Trajectory, require_every_action, rollout
from bilevel_jax.errors import InputError
from bilevel_jax.estimators.baselines import Baseline, LeaveOneOut
from bilevel_jax.estimators.costs import Costs, step_costs
from bilevel_jax.estimators.problem import SampledProblem, temperature_of
from bilevel_jax.estimators.responses import Response
from bilevel_jax.functions import ActionFunction
from bilevel_jax.hypergradient.problem import as_upper_variable
from bilevel_jax.validation import as_integer, require_computable


class Estimate(NamedTuple):
    """`value`: the mean loss, an estimate of phi(x). `gradient`: of the hyper-gradient, a pytree as x.

    `groups`: the trajectories [N, I, H] behind them, and what each group paid, `costs`.
    """

    value: jax.Array
    gradient: Any
    groups: Trajectory
    costs: Costs


def sample_groups(
    key: jax.Array, problem: SampledProblem, policy: ActionFunction, batch: int, first: Any = 0
) -> Trajectory:
    """N = batch groups of I trajectories, [N, I, H], under a policy. `first`: number of the first group."""
    require_every_action(problem.environment, "an estimate")
    size = problem.trajectories
    sampled = rollout(
        key,
        problem.environment,
        policy,
        batch=batch * size,
        horizon=problem.horizon,
        first=as_integer("first", first, "trajectories are numbered from 0 on", jnp.uint32) * size,
    )
    return jax.tree.map(lambda leaf: leaf.reshape(batch, size, *leaf.shape[1:]), sampled)


def regroup(groups: Trajectory, times: int) -> Trajectory:
    """times N groups from groups [N, I, H]: trajectory i of group n also joins those of groups n - i k, k < times.

    For losses that compare trajectories: means over all of them use each trajectory `times` times, at no
    step of the simulator. No two of the first trajectory's groups share another one if times (I - 1) <= N.

    Raises:
      InputError: times is not in 1 to N.
    """
    count, size = groups.action.shape[:2]
    if not isinstance(times, int) or not 1 <= times <= count:
        raise InputError(f"times: expected an integer from 1 to the {count} groups, got {times!r}")
    row = jnp.arange(count)[:, None]
    member = jnp.arange(size)[None]
    which = [(row + member * shift) % count for shift in range(times)]
    return jax.tree.map(lambda leaf: leaf[jnp.concatenate(which), member], groups)


def estimate(
    key: jax.Array,
    problem: SampledProblem,
    x: Any,
    policy: ActionFunction,
    *,
    batch: int,
    response: Response,
    response_state: Any = None,
    baseline: Baseline | None = None,
    baseline_state: Any = None,
) -> Estimate:
    """Draw N = batch groups under `policy` and estimate the hyper-gradient from them.

      grad phi = E[dl/dx] + E[ sum_i sum_h l (dQ* - dV*)[s_h, a_h] ] / temperature

    Args:
      policy: the lower level's answer at x; the estimate is of its hyper-gradient as if it were optimal.
      response: estimator of dQ* - dV*.
      response_state: what `response.init` or `update` returned.
      baseline: subtracted from l; None is `LeaveOneOut()`.
      baseline_state: what `baseline.init` or `update` returned, from earlier batches.

    Raises:
      InputError: the regularizer is no entropy, the loss is neither a scalar nor [H].
    """
    for_groups, for_rest = jax.random.split(key)
    groups = sample_groups(for_groups, problem, policy, batch)
    return estimate_from(for_rest, problem, x, policy, groups, response, response_state, baseline, baseline_state)


def estimate_from(
    key: jax.Array,
    problem: SampledProblem,
    x: Any,
    policy: ActionFunction,
    groups: Trajectory,
    response: Response,
    response_state: Any = None,
    baseline: Baseline | None = None,
    baseline_state: Any = None,
    weights: jax.Array | None = None,
) -> Estimate:
    """`estimate` from groups [N, I, H] that were drawn already; with importance weights [N] under any policy."""
    require_computable("problem", problem, any_floats=True)
    x = as_upper_variable(x)
    baseline = LeaveOneOut() if baseline is None else baseline
    _, for_response = jax.random.split(key)
    count, horizon = groups.action.shape[0], groups.action.shape[-1]
    weights = jnp.ones(count) if weights is None else weights
    temperature = temperature_of(problem, x)

    def surrogate(x):
        costs = paid(key, problem, x, groups)
        weighted = weights.astype(costs.each.dtype)[:, None] * costs.factors[None]
        value = jnp.sum(weighted * costs.each) / count
        constant = stop_gradient(costs)
        credit = baseline.credit(baseline_state, problem, policy, groups, constant)
        credit = jnp.where(groups.valid, credit * weighted[:, None, :], 0) / count
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), groups)
        answer = response.surrogate(
            for_response, response_state, problem, x, policy, flat, stop_gradient(credit.reshape(-1, horizon))
        )
        return value + answer / temperature, (value, constant)

    gradient, (value, costs) = jax.grad(surrogate, has_aux=True)(x)
    return Estimate(value, gradient, groups, costs)


def paid(key: jax.Array, problem: SampledProblem, x: Any, groups: Trajectory) -> Costs:
    """What each of N groups pays, [N, H]; the same as in `estimate_from` with this key."""
    for_loss, _ = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(for_loss, jnp.arange(groups.action.shape[0]))
    return step_costs(problem, jax.vmap(problem.loss, (0, None, 0))(keys, x, groups))
