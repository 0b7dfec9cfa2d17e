"""Finite horizons: backward induction, and the occupancy of a policy at each time."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, ArrayLike, Float, Int, Real

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.batching import over_batch
from bilevel_jax.core.captures import jit
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.memory import require_room
from bilevel_jax.core.results import Outcome, Result
from bilevel_jax.core.validation import as_float, as_size, is_known, require_finite, require_instance, require_policy
from bilevel_jax.mdp.bellman import action_values, check_compatible, read_policy, rounding_of, sizes_of, sup_norm
from bilevel_jax.mdp.process import MDP, broadcast_numbers
from bilevel_jax.mdp.regularizers import Regularizer


class FiniteHorizonSolution(eqx.Module):
    """An MDP solved over H steps; batch axes first, then time.

    `value` [H + 1, S] (`times` = H + 1) has the value after h steps at index h; its last row is the terminal value. `q`
    [H, S, A] and `policy` [H, S, A] follow from it: q[h] = r + discount P value[h + 1], value[h] = Omega*(q[h]) and
    policy[h] = grad Omega*(q[h]). `result` is a `Result` code. Since nothing is iterated, it is CONVERGED or
    NOT_FINITE, or PRECISION_LIMIT where the error bound is larger than everything that can be collected. `error_bound`
    bounds |value - its exact value|: it is the sum, over all times, of the largest rounding error of a step
    (rounding.py).
    """

    value: Float[Array, "*batch times S"]
    q: Float[Array, "*batch H S A"]
    policy: Float[Array, "*batch H S A"]
    result: Int[Array, "*batch"]
    error_bound: Float[Array, "*batch"]

    def outcomes(self) -> tuple[Outcome, ...]:
        return (Outcome("solve_finite_horizon", self.result, self.error_bound),)


def solve_finite_horizon(
    mdp: MDP,
    regularizer: Regularizer,
    horizon: int | None = None,
    *,
    time_varying: bool = False,
    discount: Real[ArrayLike, "..."] | Any = None,
    terminal_value: Real[ArrayLike, "*#batch S"] | Any | None = None,
) -> FiniteHorizonSolution:
    """Backward induction: value[H] = terminal_value, value[h] = Omega*(r + discount P value[h + 1]).

    Puterman 1994, section 4.5, with the maximum replaced by Omega*. Differentiable in every floating-point
    leaf of `mdp` and `regularizer`, in `discount` and in `terminal_value`, in any order and mode, by
    differentiating the recursion; reverse mode keeps q [H, S, A] and computes the rest again.

    Args:
      mdp: the process. Without `time_varying` it is the same at every step, and its batch axes are batches.
        With it, its last batch axis is time: reward [..., H, S, A], a transition of [..., H, S, A, S]
        ([..., H, K, S, A] by successors) or [S, A, S] for all times, discount [..., H] or [..., H, S, A] or a
        number, available [..., H, S, A] or [S, A].
      regularizer: each array with the batch axes of the MDP, time included, or the last of them (e.g. [H]
        temperatures for all problems of a batch), or none.
      horizon: H, an integer of at least 1 (static). With `time_varying` None, or the length of that axis.
      time_varying: see mdp.
      discount: instead of the MDP's, which must be below 1; here 1 is fine. A number, or as in an MDP.
      terminal_value: what being in a state after the last step is worth, [S] or with batch axes (without
        time); None is 0.

    Returns:
      `FiniteHorizonSolution`.

    Raises:
      InputError: shapes that disagree, no horizon, a discount outside [0, 1], or an argument of another type.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.check(bj.solve_finite_horizon(mdp, bj.Unregularized(), 3, discount=1.0))
      >>> solution.value[:, 0].tolist()  # with 3, 2, 1 and 0 steps to go
      [3.0, 2.0, 1.0, 0.0]
    """
    require_instance("regularizer", regularizer, Regularizer)
    mdp, horizon, batch = _problem(mdp, horizon, time_varying, discount)
    entries = math.prod(batch) * horizon * mdp.num_states * (2 * mdp.num_actions + 1)
    what = f"the values, q and policies of {horizon} steps"
    require_room("horizon", entries * mdp.reward.dtype.itemsize, what, "solve a shorter one, or use `solve`")
    check_compatible(mdp, regularizer)
    terminal = _terminal_value(terminal_value, mdp, batch)
    return _solve(mdp, regularizer, terminal, horizon=horizon, time_axes=int(time_varying))


def finite_horizon_occupancy(
    mdp: MDP,
    policy: Real[ArrayLike, "*batch H S A"] | Sequence[Any],
    *,
    time_varying: bool = False,
    discount: Real[ArrayLike, "..."] | Any = None,
) -> Float[Array, "*batch H S A"]:
    """Return the occupancy d[H, S, A] of a policy[H, S, A] at each time, from the initial distribution.

    d[h, s, a] = E[(product of the discounts before h) 1{s_h = s, a_h = a}]. <d, r>, plus what the terminal value
    adds, is therefore initial' value[0] of that policy. With `discount=1` these are probabilities, and each d[h]
    sums to 1. With the MDP's own discount, which is 0 where the process ends, a process no longer counts after
    its end.

    Differentiable in policy and every floating-point leaf of the MDP. Batch axes first, then time.

    Args:
      mdp: as in `solve_finite_horizon`; of a time-varying one, the initial distribution is that at time 0.
      policy: [..., H, S, A], with batch axes as the MDP's; probabilities on actions that are not available
        are an error where they are known, and NaN where not.
      time_varying, discount: as in `solve_finite_horizon`.

    Raises:
      InputError: as `solve_finite_horizon`, a policy of another shape, or one that is known and no distribution by far.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> occupancy = bj.finite_horizon_occupancy(mdp, jnp.full((3, 2, 2), 0.5), discount=1.0)
      >>> occupancy.sum(axis=(1, 2)).tolist()
      [1.0, 1.0, 1.0]
    """
    policy = as_float("policy", policy, getattr(getattr(mdp, "reward", None), "dtype", None))
    if policy.ndim < 3 or policy.shape[-3] == 0:
        raise InputError(f"policy: expected shape [H, S, A] (batch axes first), got {list(policy.shape)}")
    mdp, _, batch = _problem(mdp, policy.shape[-3], time_varying, discount)
    expected = (*batch, policy.shape[-3], mdp.num_states, mdp.num_actions)
    if policy.shape != expected:
        raise InputError(f"policy: expected shape {list(expected)}, got {list(policy.shape)}")
    require_policy("policy", policy)
    if mdp.available is not None and is_known(policy, mdp.available):
        shared = mdp.available.ndim == 2 or time_varying
        mask = mdp.available if shared else mdp.available[..., None, :, :]
        eqx.tree_at(lambda m: m.available, mdp, jnp.broadcast_to(mask, expected)).require_available(policy)
    return _occupancy(mdp, policy, time_axes=int(time_varying))


def _problem(mdp: MDP, horizon: Any, time_varying: bool, discount: Any) -> tuple[MDP, int, tuple[int, ...]]:
    """Return the MDP with its discount exchanged, H, and the batch axes without time."""
    require_instance("mdp", mdp, MDP)
    require_instance("time_varying", time_varying, bool)
    batch = mdp.batch_shape
    if time_varying:
        if not batch:
            raise InputError(
                f"mdp: time_varying=True needs time as the last batch axis, reward [H, S, A]; got reward "
                f"{list(mdp.reward.shape)}"
            )
        horizon = batch[-1] if horizon is None else horizon
        if horizon != batch[-1]:
            raise InputError(
                f"horizon: {horizon!r} disagrees with the MDP's time axis of {batch[-1]} (batch axes {list(batch)}); "
                f"leave it out"
            )
    horizon = as_size("horizon", horizon)
    if discount is not None:
        mdp = eqx.tree_at(lambda m: m.discount, mdp, _discount(discount, mdp))
    return mdp, horizon, batch[:-1] if time_varying else batch


def _discount(discount: Any, mdp: MDP) -> Float[Array, "..."]:
    array = as_float("discount", discount, mdp.reward.dtype)
    if is_known(array):
        require_finite("discount", array)
        if bool(jnp.any((array < 0) | (array > 1))):
            worst = jnp.max(array) if bool(jnp.any(array > 1)) else jnp.min(array)
            raise InputError(f"discount: must be in 0 to 1, got {float(worst):g}; 1 is fine over a finite horizon")
    return broadcast_numbers("discount", array, mdp.batch_shape, mdp.reward.shape[-2:])


def _terminal_value(value: Any, mdp: MDP, batch: tuple[int, ...]) -> Float[Array, "*batch S"]:
    array = jnp.zeros((mdp.num_states,)) if value is None else value
    array = as_float("terminal_value", array, mdp.reward.dtype)
    if array.shape not in ((mdp.num_states,), (*batch, mdp.num_states)):
        raise InputError(
            f"terminal_value: expected shape [S] = [{mdp.num_states}] (batch axes {list(batch)} first, or none), got "
            f"{list(array.shape)}"
        )
    require_finite("terminal_value", array)
    return jnp.broadcast_to(array, (*batch, mdp.num_states))


def _split(tree: Any, time_axes: int) -> tuple[Any, Any]:
    """Split the leaves into those with a time axis, for `lax.scan`, and the others."""
    moving = jax.tree.map(lambda leaf, event_ndim: bool(jnp.ndim(leaf) - event_ndim), tree, tree.event_ndim())
    return eqx.partition(tree, moving if time_axes else False)


@functools.partial(jit, static_argnames=("horizon", "time_axes"))
def _solve(mdp, regularizer, terminal, *, horizon, time_axes):
    solve = over_batch(_solve_one, inner_ndim=time_axes)
    return solve(mdp, regularizer, terminal, horizon=horizon, time_axes=time_axes)


def _solve_one(mdp, regularizer, terminal, *, horizon, time_axes):
    (mdp_at, mdp_rest), (regularizer_at, regularizer_rest) = _split(mdp, time_axes), _split(regularizer, time_axes)

    # Of what a step computes, reverse mode keeps q. Otherwise it would keep E[V | s, a] a successor too,
    # [H, K, S, A], and several arrays that are cheap to make from q.
    @functools.partial(jax.checkpoint, prevent_cse=False, policy=jax.checkpoint_policies.save_only_these_names("q"))
    def step(rest, carry, now):
        value, bounds = carry
        mdp, regularizer = eqx.combine(now, rest)
        q = checkpoint_name(action_values(mdp, value), "q")
        new = regularizer.conjugate(q)
        bounds = _bounds(*lax.stop_gradient((mdp, regularizer, value, q, new, bounds)))
        return (new, bounds), (new, q, read_policy(regularizer, q), bounds)

    rest = (mdp_rest, regularizer_rest)
    start = terminal, Bounds(jnp.zeros((), terminal.dtype), lax.stop_gradient(sup_norm(terminal)))
    _, (values, q, policy, bounds) = lax.scan(
        functools.partial(step, rest), start, (mdp_at, regularizer_at), length=horizon, reverse=True
    )
    value = jnp.concatenate([values, terminal[None]])
    actions = jnp.where(True if mdp.available is None else mdp.available, q, 0)
    finite = jnp.all(jnp.isfinite(value)) & jnp.all(jnp.isfinite(actions))
    says_something = jnp.isfinite(bounds.error) & (bounds.error <= rounding.SAYS_SOMETHING * bounds.implied)
    told = jnp.where(jnp.all(says_something), Result.CONVERGED, Result.PRECISION_LIMIT)
    result = jnp.where(finite, told, Result.NOT_FINITE).astype(jnp.int32)
    return FiniteHorizonSolution(value=value, q=q, policy=policy, result=result, error_bound=jnp.max(bounds.error))


class Bounds(NamedTuple):
    """Bounds at one time: `error` on the error of the computed value, and `implied` on the value itself, by what is
    collected in each step.
    """

    error: Scalar
    implied: Scalar


def _bounds(mdp, regularizer, value, q, backup, after: Bounds) -> Bounds:
    """Return the bounds one step earlier.

    `value`[S] is the value one step later, with its bounds `after`; `q`[S, A] and `backup`[S] are Q and T V at it.
    """
    sums = mdp.transition.sums(value)
    sizes = sizes_of(mdp, regularizer, value, q, backup)
    discount = jnp.max(mdp.discount * mdp.transition.expect(jnp.ones_like(value)))  # rows as they are
    most = discount * (1 + rounding.of_row_sums(sums, value.dtype))
    noise = rounding_of(mdp, sizes, value, most)
    collected = sup_norm(sizes.collected) + 4 * rounding.underflow(sums.terms, value.dtype)
    return Bounds(noise + most * after.error, collected + discount * after.implied)


@functools.partial(jit, static_argnames="time_axes")
def _occupancy(mdp, policy, *, time_axes):
    return over_batch(_occupancy_one, inner_ndim=time_axes)(mdp, policy, time_axes=time_axes)


def _occupancy_one(mdp, policy, *, time_axes):
    now, rest = _split(mdp, time_axes)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(rest, states, at):
        now, policy = at
        mdp = eqx.combine(now, rest)
        if mdp.available is not None:  # a policy that is not known may be wrong
            policy = jnp.where(mdp.available | (policy == 0), policy, jnp.nan)
        pairs = states[:, None] * policy
        return mdp.transition.push(mdp.discount * pairs), pairs

    initial = mdp.initial[0] if time_axes else mdp.initial
    return lax.scan(functools.partial(step, rest), initial, (now, policy))[1]
