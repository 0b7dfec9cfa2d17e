"""The regularized Bellman operator and what is read off a value function. For one MDP; see `over_batch`."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax import rounding
from bilevel_jax.derivatives import without_derivative
from bilevel_jax.errors import InputError
from bilevel_jax.mdp import MDP
from bilevel_jax.reductions import is_any, largest, sum_last
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.transitions import PolicyOperator, StateOperator
from bilevel_jax.validation import is_known


def action_values(mdp: MDP, value: jax.Array) -> jax.Array:
    """Q = r + discount * P V: [S] -> [S, A]; -inf, and without derivative, at actions that are not available."""
    q = mdp.reward + mdp.discount * mdp.transition.expect(value)
    return q if mdp.available is None else jnp.where(mdp.available, q, -jnp.inf)


def backup(mdp: MDP, regularizer: Regularizer, value: jax.Array) -> jax.Array:
    """(T V)[s] = Omega*(Q[s, :]): [S] -> [S], a contraction with modulus `mdp.modulus`."""
    return regularizer.conjugate(action_values(mdp, value))


def greedy(mdp: MDP, regularizer: Regularizer, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(Q[S, A], grad Omega*(Q)[S, A]) at V[S]. For derivative rules; what users read is `read_policy`."""
    q = action_values(mdp, value)
    return q, regularizer.policy(q)


def read_policy(regularizer: Regularizer, q: jax.Array) -> jax.Array:
    """The policy [S, A] at Q[S, A] as a result that users may differentiate.

    Where the regularizer is not smooth, differentiating it raises InputError in reverse mode and gives
    NaN in forward mode, instead of the derivative 0 of what is piecewise constant.
    """
    policy = regularizer.policy(q)
    return policy if regularizer.smooth else without_derivative(policy, q)


def discounted_operator(mdp: MDP, policy: jax.Array) -> StateOperator:
    """M[s, s'] = sum_a discount pi[s, a] P[s, a, s'], the derivative of T at a V with this policy."""
    return PolicyOperator(mdp.transition, mdp.discount * policy)


def check_compatible(mdp: MDP, regularizer: Regularizer) -> None:
    """Raise InputError where a regularizer does not fit the MDP.

    Its arrays may disagree in states, actions or batch axes; a reference that is known may have no
    probability on what a state makes available.
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
    """How large the numbers are that a sweep at V is made of, weighted by the policy at V; [S] but for two.

    `q` sum_a pi |Q| + |T V|; `spread` |T V - max Q|; `lost`, a scalar: what a backup loses below the smallest normal
    number; `collected` sum_a pi r - Omega(pi), what is collected in a step; `expectation`: sum_a pi |discount E V|,
    at most what `expected()` is; `empty`, a bool: each reward that is collected is exactly 0, not subnormal.
    """

    q: jax.Array
    spread: jax.Array
    lost: jax.Array
    collected: jax.Array
    expectation: jax.Array
    empty: jax.Array
    expected: Callable[[], jax.Array]

    def rounding(self, terms: int, expected: jax.Array) -> jax.Array:
        """The rounding of each state's sweep, [S]; `expected`[S] are the numbers of its expectation."""
        return rounding.of_sweep(terms, expected, self.q, self.spread) + self.lost


def sizes_of(mdp: MDP, regularizer: Regularizer, value: jax.Array, q: jax.Array, backup: jax.Array) -> Sizes:
    """The sizes at V[S], given Q[S, A] and T V [S]. `expected()`, sum_a pi discount E|V| [S], costs a product."""
    policy = regularizer.policy(q)

    def taken(numbers):
        return sum_last(jnp.where(policy > 0, policy * numbers, 0))

    return Sizes(
        taken(jnp.abs(q)) + jnp.abs(backup),
        jnp.abs(backup - regularizer.highest(q)),
        rounding.of_scaling(regularizer.temperature, q.dtype),
        taken(mdp.reward) - regularizer.penalty_at(q),
        taken(jnp.abs(q - mdp.reward)),
        ~jnp.any((policy > 0) & is_any(mdp.reward)),
        lambda: taken(mdp.discount * mdp.transition.expect(jnp.abs(value))),
    )


def rounding_of(mdp: MDP, sizes: Sizes, value: jax.Array, most: jax.Array) -> jax.Array:
    """The largest rounding of the sweep at V[S] that has these sizes; `most` is the largest expected discount."""
    return largest_rounding(mdp, sizes, most, *largest(jnp.abs(value), sizes.q, sizes.spread))


def largest_rounding(
    mdp: MDP, sizes: Sizes, most: jax.Array, size: jax.Array, q: jax.Array, spread: jax.Array
) -> jax.Array:
    """`rounding_of`, given the largest |V|, `sizes.q` and `sizes.spread`."""
    noise = rounding.of_sweep(mdp.transition.terms, most * size, q, spread) + sizes.lost
    # Where there is nothing at all, nothing is rounded.
    return jnp.where(sizes.empty & (size == 0) & (spread == 0), 0, noise)


def sup_norm(x: jax.Array) -> jax.Array:
    """max |x|, a scalar."""
    return jnp.max(jnp.abs(x))
