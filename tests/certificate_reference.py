"""The exact solution of the numbers that a library got: Newton's method in long double, or in 60 digits.

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

DIGITS = 60
MOST_STEPS = 500
# Roundings in one entry of T V - V, sums included: their signs are not all the same.
ROUNDINGS = 8


class Arithmetic(NamedTuple):
    eps: float
    widen: Callable[[Any], np.ndarray]
    exp: Callable
    log: Callable
    expm1: Callable
    log1p: Callable


def _to_mpf(array):
    return np.frompyfunc(lambda x: mpmath.mpf(float(x)), 1, 1)(np.asarray(array, np.float64))


def _elementwise(function):
    return np.frompyfunc(function, 1, 1)


MANY = Arithmetic(10.0**-DIGITS, _to_mpf, *map(_elementwise, (mpmath.exp, mpmath.log, mpmath.expm1, mpmath.log1p)))
LONG = Arithmetic(
    float(np.finfo(np.longdouble).eps),
    lambda array: np.asarray(array).astype(np.longdouble),
    np.exp,
    np.log,
    np.expm1,
    np.log1p,
)
# Where long double is no wider than double, e.g. on ARM.
WORKING = LONG if np.finfo(np.longdouble).nmant >= 63 else MANY


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
        usable = self.available & (self.reference > 0) if self.kind == "kl" else self.available
        top = np.where(usable, q, q.min()).max(-1)
        below = np.where(usable, q - top[:, None], 0 * q)
        if self.kind == "unregularized":
            first = np.argmax(usable & (below == 0), -1)
            return top, a.widen(np.arange(q.shape[1]) == first[:, None])
        if self.kind == "tsallis":
            return self._sparsemax(top, below)
        scaled = below / self.temperature
        weight = np.where(usable, a.exp(scaled), 0 * q)
        if self.kind == "shannon":
            total = weight.sum(-1)
            return top + self.temperature * a.log(total), weight / total[:, None]
        mass = self.reference.sum(-1)
        weight = self.reference * weight
        total = weight.sum(-1)
        # log(1 + sum) keeps its digits where all terms are close to 1, log(sum) where one action prevails.
        short = (self.reference * np.where(usable, a.expm1(scaled), 0 * q - 1)).sum(-1) / mass
        near = short > -0.5
        log = np.where(near, a.log1p(np.where(near, short, 0 * short)), a.log(total / mass))
        return top + self.temperature * log, weight / total[:, None]

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

    def collected(self, policy):
        """sum_a pi r - Omega(pi), what the policy earns in a step, [S]."""
        return (policy * self.reward).sum(-1) - self.penalty(policy)

    def rounding(self, policy, value):
        """About what an entry of T V - V is rounded by, in units of eps, [S]: sizes of what it is made of."""
        earned = np.abs(policy * self.reward).sum(-1) + np.abs(self.penalty(policy))
        return earned + self.operator(policy) @ np.abs(value) + np.abs(value)

    def value_of(self, policy):
        """V^pi, regularized, [S]; rows of the policy are divided by their sums."""
        policy = policy / policy.sum(-1)[:, None]
        system = identity_less(self.operator(policy), self.arithmetic)
        return solve_linear(system, self.collected(policy)[:, None])[:, 0]


class Reference(NamedTuple):
    """V*[S], Q*[S, A] and the policy; `uncertainty` [S] is what |V - V*| may be; None where Newton did not end."""

    value: np.ndarray
    q: np.ndarray
    policy: np.ndarray
    uncertainty: np.ndarray
    exact: Exact


def identity_less(matrix, arithmetic: Arithmetic):
    return arithmetic.widen(np.eye(len(matrix))) - matrix


def solve_linear(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """matrix^-1 right, [n, n] and [n, m], by elimination with the largest pivot of a column, in any arithmetic."""
    rows, size = np.concatenate([matrix, right], 1), len(matrix)
    for i in range(size):
        best = i + int(np.argmax(np.abs(rows[i:, i])))
        if best != i:
            rows[[i, best]] = rows[[best, i]]
        rows[i + 1 :, i:] -= (rows[i + 1 :, i] / rows[i, i])[:, None] * rows[i, i:]
    solution = rows[:, size:]
    for i in reversed(range(size)):
        solution[i] = (solution[i] - rows[i, i + 1 : size] @ solution[i + 1 :]) / rows[i, i]
    return solution


def solve(exact: Exact, start: np.ndarray | None = None) -> Reference | None:
    """Newton's method until its step is below what rounding makes of it; None after `MOST_STEPS`."""
    arithmetic = exact.arithmetic
    value = arithmetic.widen(np.zeros(len(exact.reward)) if start is None else start)
    for _ in range(MOST_STEPS):
        backup, policy = exact.conjugate(exact.q(value))
        level = ROUNDINGS * arithmetic.eps * exact.rounding(policy, value)
        system = identity_less(exact.operator(policy), arithmetic)
        step, natural = solve_linear(system, np.stack([backup - value, level], 1)).T
        value = value + step
        if (np.abs(step) <= 2 * natural).all():
            q = exact.q(value)
            return Reference(value, q, exact.conjugate(q)[1], 4 * natural, exact)
    return None


def refined(reference: Reference, make: Callable[[Arithmetic], Exact]) -> Reference | None:
    """The same in many digits. Compare its numbers under `mpmath.workdps(DIGITS)`, too."""
    if reference.exact.arithmetic is MANY:
        return reference
    with mpmath.workdps(DIGITS):
        return solve(make(MANY), reference.value)


def best_by_enumeration(transition, reward, discount, available) -> list[Fraction]:
    """V* [S] of the ordinary MDP by trying every deterministic policy in exact rationals. For a few states."""
    states, actions = reward.shape
    fraction = np.frompyfunc(lambda x: Fraction(float(x)), 1, 1)
    transition, reward, discount = (fraction(x.astype(np.float64)) for x in (transition, reward, discount))
    policies = [()]
    for s in range(states):
        policies = [(*p, a) for p in policies for a in range(actions) if available[s, a]]
    best = None
    every = np.arange(states)
    for policy in policies:
        chosen = np.array(policy)
        moves = discount[every, chosen][:, None] * transition[every, chosen]
        system = fraction(np.eye(states)) - moves
        value = solve_linear(system, reward[every, chosen][:, None])[:, 0]
        best = value if best is None else np.where(value > best, value, best)
    return list(best)
