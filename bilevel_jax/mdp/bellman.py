"""The regularized Bellman operator and what follows from a value function, for one MDP; batches: see `over_batch`."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from bilevel_jax.core import rounding
from bilevel_jax.core.arrays import Flag, PerPair, PerState, Scalar
from bilevel_jax.core.derivatives import derivative_of, without_derivative
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import with_rank
from bilevel_jax.core.reductions import argmax_last, is_any, is_first, largest, levels_of_sum, sum_last
from bilevel_jax.core.validation import is_known
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import KLDivergence, Regularizer, ShannonEntropy
from bilevel_jax.mdp.transitions import PolicyOperator, StateOperator


def action_values(mdp: MDP, value: PerState) -> PerPair:
    """Return Q = r + discount * P V: [S] -> [S, A].

    Q is -inf, and has no derivative, at actions that are not available.
    """
    q = mdp.reward + mdp.discount * mdp.transition.expect(value)
    return q if mdp.available is None else jnp.where(mdp.available, q, -jnp.inf)


def backup(mdp: MDP, regularizer: Regularizer, value: PerState) -> PerState:
    """(T V)[s] = Omega*(Q[s, :]): [S] -> [S], a contraction with modulus `mdp.modulus`."""
    return regularizer.conjugate(action_values(mdp, value))


def greedy(mdp: MDP, regularizer: Regularizer, value: PerState) -> tuple[PerPair, PerPair]:
    """Return (Q[S, A], grad Omega*(Q)[S, A]) at V[S].

    It is for derivative rules; users get their policy from `read_policy`.
    """
    q = action_values(mdp, value)
    return q, regularizer.policy(q)


def read_policy(regularizer: Regularizer, q: PerPair) -> PerPair:
    """Return the policy [S, A] at Q[S, A], as a result that users may differentiate.

    Where the regularizer is not smooth, the policy is piecewise constant. Its derivative would be 0 almost everywhere,
    which would be mistaken for an answer: differentiating it raises InputError in reverse mode and gives NaN in forward
    mode.
    """
    policy = regularizer.policy(q)
    return _rest_of_the_others(policy) if regularizer.smooth else without_derivative(policy, q)


def _rest_of_the_others(policy: PerPair) -> PerPair:
    """Return `policy`[S, A], where the probability of each state's likeliest action is 1 minus those of the others.

    The derivative of the policy in Q is pi (c - <pi, c>) for a cotangent c. Where pi is nearly deterministic and b is
    the likeliest action, c[b] - <pi, c> would be the rounding of c[b], as large as the true number. Written in this
    way, the other actions get c minus c[b] as their cotangent: c[b] drops out, and the derivative is a sum over the
    other actions, to full precision.
    """
    likeliest = is_first(argmax_last(policy), policy)
    moved = sum_last(derivative_of(policy, ~likeliest))
    return jnp.where(likeliest, stop_gradient(policy) - moved[..., None], policy)


def discounted_operator(mdp: MDP, policy: PerPair) -> StateOperator:
    """M[s, s'] = sum_a discount pi[s, a] P[s, a, s'], the derivative of T at a V with this policy."""
    return PolicyOperator(mdp.transition, mdp.discount * policy)


def check_compatible(mdp: MDP, regularizer: Regularizer) -> None:
    """Raise InputError where a regularizer does not fit the MDP.

    Its arrays may have other numbers of states or actions, or other batch axes. A reference policy whose values are
    known may give probability 0 to all actions that a state makes available.
    """
    expected = (mdp.num_states, mdp.num_actions)
    reference = getattr(regularizer, "reference", None)
    if reference is not None and reference.shape[-2:] not in (expected, expected[1:]):
        raise InputError(
            f"reference: expected shape [S, A] = {list(expected)} or [A] = [{expected[1]}], got {list(reference.shape)}"
        )
    leaves = jax.tree_util.tree_leaves_with_path(regularizer)
    for (path, leaf), ndim in zip(leaves, jax.tree.leaves(regularizer.event_ndim()), strict=True):
        batch = leaf.shape[: leaf.ndim - ndim]
        if batch != mdp.batch_shape[len(mdp.batch_shape) - len(batch) :]:
            raise InputError(
                f"{jax.tree_util.keystr(path).lstrip('.')}: shape {list(leaf.shape)} has batch axes {list(batch)}, "
                f"the MDP has {list(mdp.batch_shape)}; give the same ones, or none"
            )
    if reference is not None and mdp.available is not None and is_known(reference, mdp.available):
        left = np.any((np.asarray(reference) > 0) & np.asarray(mdp.available), -1)
        if not left.all():
            state = [int(i) for i in np.argwhere(~left)[0]]
            raise InputError(
                f"reference: no probability on the actions available in state {state} ({(~left).sum()} of "
                f"{left.size} states have none); give some to at least one of them"
            )


class Sizes(NamedTuple):
    """The sizes of the numbers that enter a Bellman sweep at V, weighted by the policy at V, [S] but for `empty`.

    `q` is sum_a pi |Q| + |T V|. `spread` is the size of the regularizer's part, times the levels of the sum over the
    actions. `lost` is what a backup loses below the smallest normal number. `collected` is what the policy
    collects per step, sum_a pi r - Omega(pi). `expectation` is sum_a pi |discount E V|, which is at most `expected()`.
    `empty`, a bool, says that each reward which is collected is exactly 0, not subnormal, and that the regularizer's
    part is exactly 0 if it is computed as 0: the temperature is 0, or large enough for a relative error, and no action
    has a weight that only a device takes for 0.
    """

    q: PerState
    spread: PerState
    lost: PerState
    collected: PerState
    expectation: PerState
    empty: Flag
    expected: Callable[[], PerState]

    def allowed(self, sums: rounding.Sums, expected: PerState, times: Scalar) -> PerState:
        """Return by how much each state's equation V = T V may be off, [S]: `times` its rounding (`of_equation`).

        `expected`[S] is the size of the numbers that its expectation sums.
        """
        return rounding.of_equation(sums, expected, self.q, self.spread, self.lost, times)


def sizes_of(mdp: MDP, regularizer: Regularizer, value: PerState, q: PerPair, backup: PerState) -> Sizes:
    """The sizes at V[S], given Q[S, A] and T V [S]. `expected()`, sum_a pi discount E|V| [S], costs a product."""
    policy = regularizer.policy(q)
    temperature = jnp.asarray(regularizer.temperature, q.dtype)
    is_kept = (temperature == 0) & ~is_any(temperature) | (temperature >= rounding.full_precision(q.dtype))
    flushed = _flushed(mdp, regularizer, q, policy)

    def taken(numbers):
        return sum_last(jnp.where(policy > 0, policy * numbers, 0))

    return Sizes(
        q=taken(jnp.abs(q)) + jnp.abs(backup),
        spread=levels_of_sum(mdp.num_actions) * regularizer.spread(q, backup),
        lost=temperature * (regularizer.lost(q) + jnp.where(flushed, rounding.underflow(mdp.num_actions, q.dtype), 0)),
        collected=taken(mdp.reward) - regularizer.penalty_at(q),
        expectation=taken(jnp.abs(q - mdp.reward)),
        empty=~jnp.any((policy > 0) & is_any(mdp.reward)) & is_kept & ~jnp.any(flushed),
        expected=lambda: taken(mdp.discount * mdp.transition.expect(jnp.abs(value))),
    )


def _flushed(mdp: MDP, regularizer: Regularizer, q: PerPair, policy: PerPair) -> Bool[Array, " S"]:
    """Return where an action that an entropy gives some probability has a weight below the smallest normal number,
    which a device takes for 0, and is worth that number for ever or more, [S]. So may be what is missing from the
    sum of a reference because an action is not available.
    """
    if not isinstance(regularizer, ShannonEntropy | KLDivergence):
        return jnp.zeros(q.shape[:-1], bool)
    temperature = jnp.asarray(regularizer.temperature, q.dtype)
    forever = temperature * mdp.num_actions / (1 - mdp.modulus).astype(q.dtype)
    least = math.log(float(jnp.finfo(q.dtype).tiny)) - jnp.log(forever)
    below = q - regularizer.highest(q)[..., None]
    possible = (q != -jnp.inf) & (below > least * temperature)
    missing = jnp.zeros(q.shape, bool)
    if isinstance(regularizer, KLDivergence):
        allowed = with_rank(is_any(regularizer.reference), q.ndim)
        possible, missing = possible & allowed, (q == -jnp.inf) & allowed
    return jnp.any(possible & (policy < jnp.finfo(policy.dtype).tiny) | missing, -1)


def rounding_of(mdp: MDP, sizes: Sizes, value: PerState, most: Scalar) -> Scalar:
    """Return the largest rounding of a sweep at V[S] with these sizes. `most` is the largest expected discount."""
    return largest_rounding(mdp, sizes, most, *largest(jnp.abs(value), sizes.q, sizes.spread))


def largest_rounding(mdp: MDP, sizes: Sizes, most: Scalar, size: Scalar, q: Scalar, spread: Scalar) -> Scalar:
    """`rounding_of`, given the largest |V|, `sizes.q` and `sizes.spread`."""
    noise = rounding.of_sweep(mdp.transition.sums(size), most * size, q, spread) + jnp.max(sizes.lost)
    # Where there is nothing at all, nothing is rounded.
    return jnp.where(sizes.empty & (size == 0) & (spread == 0), 0, noise)


def sup_norm(x: Float[Array, "..."]) -> Scalar:
    """max |x|, a scalar."""
    return jnp.max(jnp.abs(x))
