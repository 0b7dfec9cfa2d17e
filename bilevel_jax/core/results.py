"""Result codes that work inside jit and vmap, and `check`, which turns them into errors."""

import enum
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from bilevel_jax.core.errors import ConvergenceError, InputError


class Result(enum.IntEnum):
    """How an iteration ended. It is stored as an int32 array, one entry per batch element; inside jit, compare with 0.

    CONVERGED: it did what it was asked to, within the bound that the report gives, e.g. `stats.error_bound`. Without a
    tolerance it went to the limit of the float type, which may be few digits: compare the bound with the value.
    MAX_ITERATIONS: the steps ended before that. What was reached is returned, and the bound holds for it. Take more
    steps, another solver, or a start nearby.
    NOT_FINITE: do not use the numbers. Look for NaN or infinity in x, reward, transition or temperature.
    PRECISION_LIMIT: rounding does not allow the tolerance, or any bound that says something. The bound that is returned
    holds, but may be infinite. Take float64, a larger tolerance or a smaller discount.

    docs/failures.md lists hard cases, with what they return.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> solution = bj.solve(mdp, bj.ShannonEntropy(0.1))
      >>> bj.Result(int(solution.result)).name
      'CONVERGED'
    """

    CONVERGED = 0
    MAX_ITERATIONS = 1
    NOT_FINITE = 2
    PRECISION_LIMIT = 3


MESSAGES = {
    Result.CONVERGED: "converged",
    Result.MAX_ITERATIONS: (
        "the maximum number of iterations was reached before the tolerance; raise max_iterations (of "
        "Unrolled: its sweeps), loosen the tolerance or choose a faster solver"
    ),
    Result.NOT_FINITE: (
        "a value was not finite; look for NaN or infinity in the reward, the transition, the "
        "discount, the temperature or the upper variable, and for a temperature or a discount out of range"
    ),
    Result.PRECISION_LIMIT: (
        "rounding stopped the iteration before the tolerance, or allows no bound that says anything; loosen the "
        "tolerance, choose a smaller discount or use float64 "
        "(jax.config.update('jax_enable_x64', True))"
    ),
}


# What to do where no solve failed, but f itself has no finite value or slope.
OBJECTIVE_NOT_FINITE = (
    "a value was not finite; look for a logarithm, root, norm or quotient at the border of its domain in the "
    "objective, for NaN or infinity in the upper variable, and at the other results of this report"
)


class Outcome(NamedTuple):
    """The report of one iteration: `what` it computed, its result codes, and its error bounds (None without any).

    `not_finite` says what to do where the result is NOT_FINITE.
    """

    what: str
    result: Int[Array, "*batch"]
    error_bound: Float[Array, "*batch"] | None
    not_finite: str = MESSAGES[Result.NOT_FINITE]

    def failures(self) -> tuple[str, ...]:
        """Say what failed, why, what to do, and how often: a sentence per code that is not CONVERGED."""
        codes = np.atleast_1d(np.asarray(self.result))
        messages = MESSAGES | {Result.NOT_FINITE: self.not_finite}

        def sentence(code: int) -> str:
            failed, known = codes == code, ""
            if self.error_bound is not None:
                bounds = np.broadcast_to(np.asarray(self.error_bound), codes.shape)
                known = f", largest error bound {float(np.max(bounds[failed])):.3g}"
            return f"{self.what}: {messages[Result(code)]} ({failed.sum()} of {codes.size} failed{known})"

        return tuple(sentence(code) for code in np.unique(codes).tolist() if code != Result.CONVERGED)


def finite_outcome(
    value: Float[Array, "*batch"], gradient: Any, error_bound: Float[Array, "*batch"] | None = None
) -> Outcome:
    """Report whether an objective (batch axes first) and its gradient are finite.

    No iteration checks these by itself.
    """
    return Outcome("objective or its gradient", _finite(value, gradient), error_bound, OBJECTIVE_NOT_FINITE)


@jax.jit
def _finite(value: Float[Array, "*batch"], gradient: Any) -> Int[Array, "*batch"]:
    return jnp.where(are_finite(value, gradient), Result.CONVERGED, Result.NOT_FINITE).astype(jnp.int32)


def are_finite(value: Float[Array, "*batch"], gradient: Any) -> Bool[Array, "*batch"]:
    """Return whether a value and all leaves of its gradient (the same batch axes first) are finite."""
    finite = jnp.isfinite(value)
    for leaf in jax.tree.leaves(gradient):
        finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(finite.ndim, leaf.ndim)))
    return finite


def where_converged(result: Int[Array, "*batch"], values: Any) -> Any:
    """Return the values, or NaN where the iteration that computed them did not converge.

    Use it for results that are returned without a report.

    Args:
      result: result codes, with any batch axes.
      values: a pytree of floating-point arrays, the batch axes first.
    """
    converged = result == Result.CONVERGED

    def marked(leaf: Float[Array, "..."]) -> Float[Array, "..."]:
        return jnp.where(converged.reshape(converged.shape + (1,) * (leaf.ndim - converged.ndim)), leaf, jnp.nan)

    return jax.tree.map(marked, values)


@runtime_checkable
class Reports(Protocol):
    """An object that knows the outcomes of the iterations that computed it."""

    def outcomes(self) -> tuple[Outcome, ...]: ...


R = TypeVar("R", bound=Reports)


def check(report: R) -> R:
    """Return `report` unchanged if every iteration behind it converged; raise otherwise.

    It reads result codes, and whether objective and gradient are finite. It does not read the size of an error bound:
    compare `stats.error_bound` with the value, and `error` of a `Hypergradient` with the norm of the gradient.

    Args:
      report: a `Solution`, a `Hypergradient` or an algorithm's `Info`, with concrete values (call it
        outside jit and vmap). Batched reports are checked element by element.

    Raises:
      ConvergenceError: names all that failed, why, how many batch elements and the largest error bound.
      InputError: no report, or one of traced values.

    Example:
      >>> mdp = bj.MDP(jnp.full((2, 2, 2), 0.5), jnp.eye(2), 0.9)
      >>> bj.check(bj.solve(mdp, bj.ShannonEntropy(0.1))).value.shape
      (2,)
      >>> mdp = bj.problems.make("garnet").mdp(jnp.zeros((8, 3)))
      >>> one_sweep = bj.solve(mdp, bj.ShannonEntropy(0.5), solver=bj.ValueIteration(max_iterations=1))
      >>> try:
      ...     bj.check(one_sweep)
      ... except bj.ConvergenceError:
      ...     print("not solved")
      not solved
    """
    if not callable(getattr(report, "outcomes", None)):
        raise InputError(
            f"check(report): expected what `solve`, `hypergradient` or an algorithm's step returns, got {report!r:.100}"
        )
    outcomes = report.outcomes()
    for outcome in outcomes:
        if isinstance(outcome.result, Tracer):
            raise InputError(
                "check(report): the report holds traced values; call check outside jit and vmap, or "
                "read report.result inside"
            )
    failures = [sentence for outcome in outcomes for sentence in outcome.failures()]
    if failures:
        raise ConvergenceError("\n".join(failures))
    return report
