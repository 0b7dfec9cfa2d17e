"""The exact solution of the numbers that a library got: Newton's method in long double, or with residuals in 40 digits.

Independent of the library: plain numpy, an elimination of its own. The problem is, with the probabilities P, rewards r
and discounts d of the problem's dtype taken as they are (rows need not sum to 1 in the last digits):
  V[s] = Omega*(Q[s, :]) over the available actions,   Q = r + d P V.
The reference policy of KLDivergence is meant to sum to 1: each row is divided by its exact sum over all actions,
available or not. Omega* is convex and monotone, so Newton's iterates rise to V* from the second on, whatever the start.
"""

from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath
import numpy as np

DIGITS = 40
MOST_STEPS = 500
# Roundings in one entry of T V - V, sums included: their signs are not all the same.
ROUNDINGS = 8
LONG_DOUBLE = np.longdouble


class Arithmetic(NamedTuple):
    """`widen` takes what float64 or long double holds, `narrow` gives long double."""

    eps: float
    widen: Callable[[Any], np.ndarray]
    narrow: Callable[[np.ndarray], np.ndarray]
    exp: Callable
    log: Callable
    expm1: Callable
    log1p: Callable


def _to_mpf(array):
    """Exactly: the mantissa of a long double is the sum of two doubles."""
    mantissa, exponent = np.frexp(np.asarray(array).astype(LONG_DOUBLE))
    high = mantissa.astype(np.float64)
    rest = (mantissa - high).astype(np.float64)
    return np.frompyfunc(lambda h, r, e: mpmath.ldexp(mpmath.mpf(h) + mpmath.mpf(r), int(e)), 3, 1)(
        high.astype(object), rest.astype(object), exponent
    )


def _from_mpf(array):
    def narrow(x):
        mantissa, exponent = mpmath.frexp(x)
        high = float(mantissa)
        exponent = max(-(2**20), min(int(exponent), 2**20))  # exp of what is far below the best is 0 in long double
        return np.ldexp(LONG_DOUBLE(high) + LONG_DOUBLE(float(mantissa - high)), exponent)

    return np.frompyfunc(narrow, 1, 1)(array).astype(LONG_DOUBLE)


def _to_long_double(array):
    return np.asarray(array).astype(LONG_DOUBLE)


MANY = Arithmetic(
    10.0**-DIGITS,
    _to_mpf,
    _from_mpf,
    *(np.frompyfunc(f, 1, 1) for f in (mpmath.exp, mpmath.log, mpmath.expm1, mpmath.log1p)),
)
LONG = Arithmetic(
    float(np.finfo(LONG_DOUBLE).eps), _to_long_double, _to_long_double, np.exp, np.log, np.expm1, np.log1p
)
# Where long double is no wider than double, e.g. on ARM.
WORKING = LONG if np.finfo(LONG_DOUBLE).nmant >= 63 else MANY


class Exact(NamedTuple):
    """One MDP in an arithmetic: P[S, A, S], r[S, A], d[S, A], the temperature, ref[S, A], bool[S, A]."""

    kind: str
    transition: np.ndarray
    reward: np.ndarray
    discount: np.ndarray
    temperature: Any
    reference: np.ndarray
    available: np.ndarray
    arithmetic: Arithmetic

    def q(self, value):
        states, actions = self.reward.shape
        return self.reward + self.discount * (self.transition.reshape(-1, states) @ value).reshape(states, actions)

    def operator(self, policy):
        """d P_pi, [S, S]."""
        return ((self.discount * policy)[:, :, None] * self.transition).sum(1)

    def conjugate(self, q):
        """Omega*(Q) [S] and its gradient [S, A]."""
        a = self.arithmetic
        usable, top = self._top(q)
        below = np.where(usable, q - top[:, None], 0 * q)
        if self.kind == "unregularized":
            first = np.argmax(usable & (below == 0), -1)
            return top, a.widen(np.arange(q.shape[1]) == first[:, None])
        if self.kind == "tsallis":
            return self._sparsemax(top, below)
        scaled = below / self.temperature
        weight = np.where(usable, a.exp(scaled), 0 * q)
        if self.kind == "shannon":
            # One of the best counts as 1, the others as what they add to it.
            others = np.where(np.arange(q.shape[1]) == np.argmax(usable & (below == 0), -1)[:, None], 0 * q, weight)
            return top + self.temperature * a.log1p(others.sum(-1)), weight / weight.sum(-1)[:, None]
        mass = self.reference.sum(-1)
        weight = self.reference * weight
        total = weight.sum(-1)
        # log(1 + sum) keeps its digits where all terms are close to 1, log(sum) where one action prevails.
        short = (self.reference * np.where(usable, a.expm1(scaled), 0 * q - 1)).sum(-1) / mass
        near = short > -0.5
        log = np.where(near, a.log1p(np.where(near, short, 0 * short)), a.log(total / mass))
        return top + self.temperature * log, weight / total[:, None]

    def _top(self, q):
        """Which actions count, and the largest Q of them."""
        usable = self.available & (self.reference > 0) if self.kind == "kl" else self.available
        return usable, np.where(usable, q, q.min()).max(-1)

    def _sparsemax(self, top, below):
        policy = 0 * below
        for s in range(len(policy)):
            actions = np.flatnonzero(self.available[s])
            z = below[s, actions] / self.temperature
            ranked = np.sort(z)[::-1]
            sizes = [k for k in range(1, len(z) + 1) if 1 + k * ranked[k - 1] > ranked[:k].sum()]
            threshold = (ranked[: sizes[-1]].sum() - 1) / sizes[-1]
            policy[s, actions] = np.where(z > threshold, z - threshold, 0 * z)
        gain = (policy * below).sum(-1)
        return top + gain + self.temperature / 2 * (1 - (policy * policy).sum(-1)), policy

    def penalty(self, policy):
        """Omega(pi) [S]."""
        if self.kind == "unregularized":
            return 0 * policy[:, 0]
        if self.kind == "tsallis":
            return self.temperature / 2 * ((policy * policy).sum(-1) - 1)
        taken = policy > 0
        ratio = np.where(taken, policy, 1 + 0 * policy)
        if self.kind == "kl":
            share = self.reference / self.reference.sum(-1)[:, None]
            ratio = ratio / np.where(taken, share, 1 + 0 * share)
        return self.temperature * (policy * self.arithmetic.log(ratio)).sum(-1)

    def onward(self, policy, value):
        """d P_pi V, [S]."""
        states = len(value)
        return (self.discount * policy * (self.transition.reshape(-1, states) @ value).reshape(policy.shape)).sum(-1)

    def back(self, policy, masses):
        """The transpose of `onward`."""
        return (self.discount * policy * masses[:, None]).ravel() @ self.transition.reshape(-1, len(masses))

    def rounding(self, policy, value):
        """About what an entry of T V - V is rounded by, in units of eps, [S]: sizes of what it is made of."""
        earned = np.abs(policy * self.reward).sum(-1) + np.abs(self.penalty(policy))
        logarithm = np.abs(self._top(self.q(value))[1] - value)
        return earned + logarithm + self.onward(policy, np.abs(value)) + np.abs(value)

    def narrowed(self) -> "Exact":
        """In long double."""
        narrow = self.arithmetic.narrow
        arrays = (narrow(array) for array in (self.transition, self.reward, self.discount))
        temperature = narrow(np.array([self.temperature]))[0]
        return Exact(self.kind, *arrays, temperature, narrow(self.reference), self.available, LONG)


class Reference(NamedTuple):
    """V*[S], Q*[S, A] and the policy; `uncertainty` [S] is what |V - V*| may be."""

    value: np.ndarray
    q: np.ndarray
    policy: np.ndarray
    uncertainty: np.ndarray
    exact: Exact

    @property
    def collected(self):
        """sum_a pi r - Omega(pi), what the policy earns in a step, [S]."""
        return self.value - self.exact.onward(self.policy, self.value)


def solve_linear(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right, [n, n] and [n, m], by elimination without pivots, in any arithmetic.

    For I - d P_pi and its transpose, which are diagonally dominant: elimination is stable, and keeps the signs and the
    small entries of the inverse.
    """
    rows, size = np.concatenate([matrix, right], 1), len(matrix)
    for i in range(size - 1):
        rows[i + 1 :, i:] -= (rows[i + 1 :, i] / rows[i, i])[:, None] * rows[i, i:]
    solution = rows[:, size:]
    for i in reversed(range(size)):
        solution[i] = (solution[i] - rows[i, i + 1 : size] @ solution[i + 1 :]) / rows[i, i]
    return solution


def _refine(exact: Exact, x: np.ndarray, look: Callable, transposed: bool = False):
    """x[S] and its uncertainty, by x <- x + (I - d P_pi)^-1 residual until steps are below what rounding makes of them.

    The residual must be at its own rounding, too: near discount 1 a step that moves the policy may be far below what
    rounding makes of values. `look` gives the residual, in the arithmetic, pi, and the size of what the residual is
    rounded at. The steps are in long double. Two in a row: the last one may move to where another policy is the best.
    None after `MOST_STEPS`.
    """
    arithmetic, rough, settled = exact.arithmetic, exact.narrowed(), False
    for _ in range(MOST_STEPS):
        residual, policy, size = look(x)
        operator = rough.operator(arithmetic.narrow(policy))
        system = np.eye(len(x), dtype=operator.dtype) - (operator.T if transposed else operator)
        level = ROUNDINGS * arithmetic.eps * arithmetic.narrow(size)
        residual = arithmetic.narrow(residual)
        step, natural = solve_linear(system, np.stack([residual, level], 1)).T
        x = x + arithmetic.widen(step)
        small = (np.abs(step) <= 2 * natural).all() and (np.abs(residual) <= 4 * level).all()
        if small and settled:
            return x, arithmetic.widen(4 * natural)
        settled = small
    return None


def solve(exact: Exact, start: np.ndarray | None = None) -> Reference | None:
    """V* by Newton's method, from V[S] or from zeros; None where it did not end."""

    def look(value):
        backup, policy = exact.conjugate(exact.q(value))
        return backup - value, policy, exact.rounding(policy, value)

    found = _refine(exact, exact.arithmetic.widen(np.zeros(len(exact.reward)) if start is None else start), look)
    if found is None:
        return None
    q = exact.q(found[0])
    return Reference(found[0], q, exact.conjugate(q)[1], found[1], exact)


def refined(reference: Reference, make: Callable[[Arithmetic], Exact]) -> Reference | None:
    """The same in many digits. Compare its numbers under `mpmath.workdps(DIGITS)`, too."""
    if reference.exact.arithmetic is MANY:
        return reference
    with mpmath.workdps(DIGITS):
        return solve(make(MANY), reference.value)


def value_of(exact: Exact, policy: np.ndarray):
    """V^pi, regularized, [S], and its uncertainty [S]; rows of the policy are divided by their sums."""
    policy = policy / policy.sum(-1)[:, None]
    earned = (policy * exact.reward).sum(-1) - exact.penalty(policy)

    def look(value):
        residual = earned + exact.onward(policy, value) - value
        # The penalty is a sum of terms of the temperature's size, whatever it comes to.
        return residual, policy, exact.rounding(policy, value) + exact.temperature

    return _refine(exact, 0 * earned, look)


def adjoint(exact: Exact, policy: np.ndarray, cotangent: np.ndarray):
    """(I - d P_pi)'^-1 g, [S], and its uncertainty."""

    def look(w):
        residual = cotangent + exact.back(policy, w) - w
        return residual, policy, np.abs(cotangent) + exact.back(policy, np.abs(w)) + np.abs(w)

    return _refine(exact, 0 * cotangent, look, transposed=True)


class Rational:
    """The arithmetic of `best_by_enumeration`."""

    @staticmethod
    def widen(array):
        return np.frompyfunc(lambda x: Fraction(float(x)), 1, 1)(np.asarray(array, np.float64))


def best_by_enumeration(transition, reward, discount, available) -> np.ndarray:
    """V*[S] of the ordinary MDP by trying every deterministic policy in exact rationals. For a few states."""
    every = np.arange(len(reward))
    policies = [()]
    for actions in available:
        policies = [(*policy, action) for policy in policies for action in np.flatnonzero(actions)]
    best = None
    for policy in policies:
        chosen = np.array(policy)
        moves = discount[every, chosen][:, None] * transition[every, chosen]
        system = Rational.widen(np.eye(len(every))) - moves
        value = solve_linear(system, reward[every, chosen][:, None])[:, 0]
        best = value if best is None else np.where(value > best, value, best)
    return best
