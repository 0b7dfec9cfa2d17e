"""Anderson acceleration of value iteration, safeguarded."""

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from bilevel_jax.core.arrays import Count, Flag, PerState, Scalar
from bilevel_jax.core.reductions import matmul
from bilevel_jax.core.validation import plain, require_setting
from bilevel_jax.solvers.loop import Stepper

# One sweep in so many may be a trial that failed: value iteration would need at least the others.
WASTED_PARTS = 6


class History(NamedTuple):
    """The last differences of V and of T V - V, [m, S] each (newest at `count` modulo m), and the safeguard's state.

    `retreat`: T V of the last V that was accepted; `half_width` and `rate` of its bracket and of the last
    plain step; `wasted` and `sweeps` so far; `trial`: whether the V now swept was an extrapolation.
    """

    values: Float[Array, "m S"]
    gaps: Float[Array, "m S"]
    count: Count
    value: PerState
    gap: PerState
    retreat: PerState
    half_width: Scalar
    rate: Scalar
    wasted: Count
    sweeps: Count
    trial: Flag


class AndersonIteration(Stepper):
    """Anderson acceleration: V becomes the combination of past T V for which the combined T V - V is smallest.

    Anderson 1965; Walker and Ni 2011, "Anderson acceleration for fixed-point iterations"; for MDPs Geist and Scherrer
    2018. An extrapolation is kept only where it narrows the bracket of V* at least as much as the last plain sweep did.
    Otherwise the iteration goes on from T V, and one sweep is lost. No extrapolation is tried while more than a sixth
    of all sweeps are lost; that many are a fifth of the sweeps of value iteration.

    Args:
      tolerance: bound on |value - V*|_inf; None asks for working precision.
      max_iterations: the largest number of sweeps.
      history: how many past differences are kept (static), 1 to 16.

    Raises:
      InputError: tolerance below 0, max_iterations below 1, or history not between 1 and 16.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1), solver=bj.AndersonIteration())
      >>> bj.check(solution).value.shape
      (2,)
    """

    batched_on_cpu: ClassVar[bool] = True

    tolerance: Any = None
    max_iterations: Any = 100_000
    history: int = eqx.field(default=5, static=True, converter=plain("history"))

    def __check_init__(self):
        require_setting("history", self.history, 1, "3 to 8 is usual", whole=True)

    def start(self, mdp, value):
        del mdp
        basis = jnp.zeros((self.history, *value.shape), value.dtype)
        zero, wide = jnp.asarray(0, jnp.int32), jnp.asarray(jnp.inf, value.dtype)
        one = jnp.asarray(1, value.dtype)
        return History(
            values=basis,
            gaps=basis,
            count=zero,
            value=value,
            gap=value,
            retreat=value,
            half_width=wide,
            rate=one,
            wasted=zero,
            sweeps=zero,
            trial=jnp.asarray(False),
        )

    def step(self, mdp, swept, state):
        del mdp
        ratio = swept.half_width / state.half_width
        accepted = ~state.trial | (ratio <= state.rate)
        # A plain sweep tells what plain sweeps gain; the first has nothing to be compared with.
        seen = ~state.trial & jnp.isfinite(state.half_width)
        rate = jnp.where(seen, jnp.minimum(ratio, 1), state.rate)
        wasted = state.wasted + (~accepted).astype(jnp.int32)
        sweeps = state.sweeps + 1
        gap = swept.gap

        # The first sweep has no predecessor, and a trial that failed is no use to extrapolate from. One slot is
        # written whatever happens: choosing between histories would copy them.
        first = state.sweeps == 0
        fresh = accepted & ~first
        slot = state.count % self.history
        values, gaps = (
            past.at[slot].set(jnp.where(fresh, new - old, past[slot]))
            for past, new, old in ((state.values, swept.value, state.value), (state.gaps, gap, state.gap))
        )
        count = state.count + fresh.astype(jnp.int32)
        kept = accepted | first
        may = kept & (count > 0) & (WASTED_PARTS * (wasted + 1) <= sweeps + 1)
        extrapolated = swept.backup - _correction(values, gaps, gap)
        value = jnp.where(kept, jnp.where(may, extrapolated, swept.backup), state.retreat)
        new = History(
            values=values,
            gaps=gaps,
            count=count,
            value=jnp.where(kept, swept.value, state.value),
            gap=jnp.where(kept, gap, state.gap),
            retreat=jnp.where(kept, swept.backup, state.retreat),
            half_width=jnp.where(kept, swept.half_width, state.half_width),
            rate=rate,
            wasted=wasted,
            sweeps=sweeps,
            trial=may,
        )
        return value, new, jnp.asarray(0, jnp.int32)


def _correction(values: Float[Array, "m S"], gaps: Float[Array, "m S"], gap: PerState) -> PerState:
    """(dV + dgap)' c [S] for the c [m] that makes |gap - dgap' c|_2 least. Unused rows are zero."""
    centred = gaps - jnp.mean(gaps, -1, keepdims=True)  # a constant is not an error here: the bracket takes it out
    gram = matmul(centred, gaps.T)
    eps = jnp.finfo(gap.dtype).eps
    ridge = jnp.maximum(10 * eps * jnp.trace(gram), jnp.finfo(gap.dtype).tiny)
    weights = _solve_small(gram + ridge * jnp.eye(len(gram), dtype=gap.dtype), matmul(centred, gap))
    return matmul(weights, values + gaps)


def _solve_small(matrix: Float[Array, "m m"], rhs: Float[Array, " m"]) -> Float[Array, " m"]:
    """Solve a positive definite system [m, m] by Gauss-Jordan without pivoting.

    It uses no LAPACK, so that vmap is safe on a CPU.
    """
    rows = jnp.concatenate([matrix, rhs[:, None]], 1)

    def eliminate(i, rows):
        pivot = rows[i] / rows[i, i]
        return (rows - rows[:, i, None] * pivot[None]).at[i].set(pivot)

    return lax.fori_loop(0, len(rhs), eliminate, rows)[:, -1]
