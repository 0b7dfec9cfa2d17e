"""The trajectory estimator of the hyper-gradient (Yang, Gao and Yuan 2025, SoBiRL)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from bilevel_jax.bilevel.problem import as_upper_variable
from bilevel_jax.bilevel.sampled_problem import SampledProblem, temperature_of
from bilevel_jax.core.batching import merge_axes
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.validation import as_integer, require_computable
from bilevel_jax.environments import Trajectory, as_policy, require_every_action, rollout
from bilevel_jax.estimators.baselines import Baseline, LeaveOneOut
from bilevel_jax.estimators.costs import Costs, step_costs
from bilevel_jax.estimators.guards import bounded, compare
from bilevel_jax.estimators.responses import Response


class Estimate(NamedTuple):
    """The result of an estimate.

    `value` is the mean loss, an estimate of phi(x). `gradient` estimates the hyper-gradient and is a pytree like x.

    `groups` are the trajectories [N, I, H] behind both, and `costs` what each group paid.

    With `max_ratio`, `direct_norm` and `implicit_norm` are the 2-norms of the two parts of the gradient before it was
    bounded, that of dl/dx and that of the policy's answer, and `cosine` is that of the angle between them. They are
    None otherwise.
    """

    value: Float[Array, ""]
    gradient: Any
    groups: Trajectory
    costs: Costs
    direct_norm: Float[Array, ""] | None = None
    implicit_norm: Float[Array, ""] | None = None
    cosine: Float[Array, ""] | None = None


def sample_groups(key: PRNGKeyArray, problem: SampledProblem, policy: Any, batch: int, first: Any = 0) -> Trajectory:
    """Draw N = batch groups of I trajectories, [N, I, H], under a policy. `first` is the number of the first group.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> bj.estimators.sample_groups(jax.random.key(1), problem, policy, batch=8).action.shape
      (8, 1, 20)
    """
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
    """Return `times` N groups that recombine the trajectories of N groups [N, I, H].

    Copy k of group n, for k from 0 to times - 1, has trajectory i of group n + i k (modulo N) as its trajectory i. Copy
    0 is group n itself.

    Use it for losses that compare trajectories: a mean over all copies uses each trajectory `times` times, without any
    further step of the simulator. If times (I - 1) <= N, two groups that share their first trajectory share no other
    one.

    Raises:
      InputError: times is not in 1 to N.

    Example:
      >>> problem = bj.problems.make("tabular_rlhf", states=4, starts=2)  # its loss compares two segments
      >>> policy = jnp.full((4, 3), 1 / 3)
      >>> groups = bj.estimators.sample_groups(jax.random.key(1), problem, policy, batch=8)
      >>> bj.estimators.regroup(groups, 3).action.shape  # [3 N, I, H]
      (24, 2, 3)
    """
    count, size = groups.action.shape[:2]
    if isinstance(times, bool) or not isinstance(times, int) or not 1 <= times <= count:
        raise InputError(f"times: expected an integer from 1 to the {count} groups, got {times!r}")
    row = jnp.arange(count)[:, None]
    member = jnp.arange(size)[None]
    which = [(row + member * shift) % count for shift in range(times)]
    return jax.tree.map(lambda leaf: leaf[jnp.concatenate(which), member], groups)


def estimate(
    key: PRNGKeyArray,
    problem: SampledProblem,
    x: Any,
    policy: Any,
    *,
    batch: int,
    response: Response,
    response_state: Any = None,
    baseline: Baseline | None = None,
    baseline_state: Any = None,
    max_ratio: Real[ArrayLike, ""] | None = None,
) -> Estimate:
    """Draw N = batch groups under `policy` and estimate the hyper-gradient from them.

      grad phi = E[dl/dx] + E[ sum_i sum_h l (dQ* - dV*)[s_h, a_h] ] / temperature

    Args:
      policy: the lower level's answer at x, a `Policy` or an argument of `environments.as_policy`. The estimate treats
        it as the optimal policy.
      response: the estimator of dQ* - dV*.
      response_state: the state that `response.init` or `update` returned.
      baseline: subtracted from l; None is `LeaveOneOut()`.
      baseline_state: the state that `baseline.init` or `update` returned, from earlier batches.
      max_ratio: the bound on the 2-norm of the second term over that of the first; a leaf. The second term is then made
        smaller, in its direction, and both are described in the result, which takes two backward passes. Infinity only
        describes them. None does neither.

    Raises:
      InputError: the regularizer is no entropy, the loss is neither a scalar nor [H], the response needs another kind
        of baseline, max_ratio is below 0.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> response = bj.estimators.Exact()
      >>> made = bj.estimators.estimate(jax.random.key(1), problem, x, policy, batch=8, response=response)
      >>> made.gradient.shape
      (8, 3)
    """
    for_groups, for_rest = jax.random.split(key)
    groups = sample_groups(for_groups, problem, policy, batch)
    return estimate_from(
        for_rest,
        problem,
        x,
        policy,
        groups,
        response,
        response_state,
        baseline,
        baseline_state,
        max_ratio=max_ratio,
    )


def estimate_from(
    key: PRNGKeyArray,
    problem: SampledProblem,
    x: Any,
    policy: Any,
    groups: Trajectory,
    response: Response,
    response_state: Any = None,
    baseline: Baseline | None = None,
    baseline_state: Any = None,
    weights: Float[Array, " N"] | None = None,
    max_ratio: Real[ArrayLike, ""] | None = None,
) -> Estimate:
    """Estimate the hyper-gradient as `estimate` does, but from groups [N, I, H] that were already drawn.

    With importance weights [N], the groups may have been drawn under any policy.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> groups = bj.estimators.sample_groups(jax.random.key(1), problem, policy, batch=8)
      >>> response = bj.estimators.Exact()
      >>> bj.estimators.estimate_from(jax.random.key(2), problem, x, policy, groups, response).gradient.shape
      (8, 3)
    """
    require_computable("problem", problem, any_floats=True)
    x, policy = as_upper_variable(x), as_policy(policy)
    baseline = LeaveOneOut() if baseline is None else baseline
    _require_fitting(response, baseline)
    _, for_response = jax.random.split(key)
    count, horizon = groups.valid.shape[0], groups.valid.shape[-1]
    weights = jnp.ones(count) if weights is None else weights
    temperature = temperature_of(problem, x)

    def parts(x):
        costs = group_costs(key, problem, x, groups)
        weighted = weights.astype(costs.each.dtype)[:, None] * costs.factors[None]
        value = jnp.sum(weighted * costs.each) / count
        constant = stop_gradient(costs)
        credit = baseline.credit(baseline_state, problem, policy, groups, constant)
        credit = jnp.where(groups.valid, credit * weighted[:, None, :], 0) / count
        flat = merge_axes(groups)
        answer = response.surrogate(
            for_response, response_state, problem, x, policy, flat, stop_gradient(credit.reshape(-1, horizon))
        )
        return (value, answer / temperature), constant

    if max_ratio is not None:
        (value, answer), pull, costs = jax.vjp(parts, x, has_aux=True)
        (direct,) = pull((jnp.ones_like(value), jnp.zeros_like(answer)))
        (implicit,) = pull((jnp.zeros_like(value), jnp.ones_like(answer)))
        return Estimate(value, bounded(direct, implicit, max_ratio), groups, costs, *compare(direct, implicit))

    def surrogate(x):
        (value, answer), constant = parts(x)
        return value + answer, (value, constant)

    gradient, (value, costs) = jax.grad(surrogate, has_aux=True)(x)
    return Estimate(value=value, gradient=gradient, groups=groups, costs=costs)


def _require_fitting(response: Response, baseline: Baseline) -> None:
    """Raise InputError for a response that needs a credit of pairs with a baseline that gives another."""
    if response.credit_of_pairs and not baseline.of_pairs:
        raise InputError(
            f"baseline: {type(response).__name__} needs a credit that is a function of the state and the action, but "
            f"that of {type(baseline).__name__} depends on the states that followed, which would be a large bias; use "
            f"CriticAdvantage(), or the response NestedRollouts"
        )


def group_costs(key: PRNGKeyArray, problem: SampledProblem, x: Any, groups: Trajectory) -> Costs:
    """Return what each of N groups pays, [N, H]. With the same key it is what `estimate_from` uses.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> x = problem.start(jax.random.key(0))
      >>> policy = bj.solve(problem.mdp(x), problem.regularizer(x)).policy
      >>> groups = bj.estimators.sample_groups(jax.random.key(1), problem, policy, batch=8)
      >>> bj.estimators.group_costs(jax.random.key(2), problem, x, groups).each.shape
      (8, 20)
    """
    for_loss, _ = jax.random.split(key)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(for_loss, jnp.arange(groups.action.shape[0]))
    return step_costs(problem, jax.vmap(problem.loss, (0, None, 0))(keys, x, groups))
