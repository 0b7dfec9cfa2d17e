"""Run the library on cases, and compare what it claims with the reference.

`examine` returns one `Verdict` per case: the codes, and `Fault`s, each of a kind:
  bound            CONVERGED, and |value - V*| exceeds `error_bound`
  bound, told      the same with another code that comes with a finite bound (MAX_ITERATIONS, PRECISION_LIMIT)
  vacuous          CONVERGED, and `error_bound` exceeds the tolerance asked for and what the problem implies: the most
                   that the optimal policy collects in a step, divided by 1 - discount
  tolerance        CONVERGED, and `error_bound` exceeds the tolerance asked for
  part             CONVERGED without a tolerance, and a part of the problem that nothing connects with the others is
                   wrong by more than `UNITS` of rounding of its own numbers
  suboptimality    CONVERGED, and the policy returned loses more than `suboptimality`
  q, policy        q is not r + discount P value, or the policy no distribution over what is available
  gradient         all CONVERGED, and a gradient of `hypergradient` is farther from the reference than `error`
  grad             CONVERGED, and `jax.grad` of `solve` is finite and farther from the reference than that
  not finite       CONVERGED with numbers that are not finite
  raises           an exception
A bound below the smallest normal number of the dtype counts as that number: processors flush what is below to 0.
"""

import functools
import time
from typing import NamedTuple

import certificate_reference
import mpmath
import numpy as np
from certificate_cases import SLOTS, SWEEPING, Case, Numbers, build
from certificate_reference import DIGITS, MANY, WORKING, Exact, Reference
from certificate_runs import Known, differentiate, solve

import bilevel_jax as bj

UNITS = 600  # 65 roundings of a sweep (rounding.AT_WORKING_PRECISION and its own), each of up to 9 units
# Roundings of q = r + discount P value: some for the sum, the product and the terms.
Q_UNITS = 16
# Underflow: smallest normal numbers, for each term of an expectation, slots of probability 0 as well.
FLOOR = 8
# Actions within so many units of rounding of the best: the gradient is that of either.
TIED = 1000
# A tolerance that a solver must reach, in units of rounding of what is implied; but for one case in so many.
REACHABLE, UNREACHABLE_EVERY = 100, 50


class Fault(NamedTuple):
    kind: str
    detail: str


class Verdict(NamedTuple):
    """`code` of `solve`; `notes` are counted: unsure references, skipped gradients, vacuous errors of gradients.

    `quality`: the error of a CONVERGED value without a tolerance, in units of rounding of its part; NaN otherwise.
    `seconds` are those of the library, compilation included, and of the whole batch.
    """

    case: Case
    code: str
    faults: tuple[Fault, ...] = ()
    notes: tuple[str, ...] = ()
    quality: float = float("nan")
    seconds: float = 0.0

    @property
    def circumstance(self) -> str:
        """Why it ended without CONVERGED, as far as the description tells."""
        case = self.case
        solver = case.structure.solver
        if self.code == "PRECISION_LIMIT" and case.structure.tolerance:
            below = case.seed % UNREACHABLE_EVERY == 0
            return f"PRECISION_LIMIT: a tolerance {'below' if below else 'above'} {REACHABLE} units of rounding"
        if self.code == "MAX_ITERATIONS" and case.discount > SWEEPING.get(solver, np.inf):
            return "MAX_ITERATIONS: a solver that only sweeps, near discount 1"
        return f"{self.code}: {solver}, {case.structure.dtype}, {case.structure.kind}, reward {case.reward}"


def exact(case: Case, numbers: Numbers, arithmetic) -> Exact:
    widen = arithmetic.widen
    available = numbers.available
    return Exact(
        case.structure.kind,
        numbers.entries(arithmetic),
        widen(numbers.reward),
        widen(numbers.discounts),
        widen([numbers.temperature])[0],
        widen(numbers.reference),
        np.ones(numbers.reward.shape, bool) if available is None else available,
        arithmetic,
    )


def know(case: Case, numbers: Numbers) -> Known | None:
    """None where the reference did not end."""
    reference = certificate_reference.solve(exact(case, numbers, WORKING))
    if reference is None:
        with mpmath.workdps(DIGITS):
            reference = certificate_reference.solve(exact(case, numbers, MANY))
        if reference is None:
            return None
    eps, away = _eps(case), 1 - float(_largest_discount(numbers))
    implied = float(np.abs(reference.collected).max()) / away
    return Known(case, numbers, reference, implied, _start(case, reference), _tolerance(case, implied, eps, away))


def _eps(case):
    return float(np.finfo(case.structure.dtype).eps)


def _tiny(case):
    return float(np.finfo(case.structure.dtype).tiny)


def _largest_discount(numbers: Numbers):
    used = numbers.discounts.astype(np.float64)
    return (used if numbers.available is None else np.where(numbers.available, used, 0)).max()


def _start(case: Case, reference: Reference):
    if not case.structure.warm:
        return None
    value, rng = reference.value.astype(np.float64), np.random.default_rng(case.seed)
    noise = rng.normal(size=value.shape)
    match case.start:
        case "zeros":
            value = 0 * value
        case "near":
            value = value * (1 + 1e-3 * noise)
        case "wild":
            value = noise * 10.0 ** (case.scale + rng.integers(-2, 6))
    return np.clip(value, -1e30, 1e30).astype(case.structure.dtype)


def _tolerance(case: Case, implied, eps, away):
    """Some digits of what is implied: `REACHABLE` units of rounding or more, but for one case in fifty."""
    if not case.structure.tolerance:
        return None
    reachable = min(REACHABLE * eps / away, 1.0) if case.seed % UNREACHABLE_EVERY else 0.0
    return np.dtype(case.structure.dtype).type(max(implied, _tiny(case)) * max(10.0**-case.digits, reachable))


def examine(cases: list[Case], gradients: bool = True) -> list[Verdict]:
    """The verdicts of cases of one structure: as many as it has in a batch, or one."""
    with np.errstate(all="ignore"):
        return _examine(cases, gradients)


def _examine(cases, gradients):
    of = cases[0].structure
    first = build(cases[0])
    numbers = [first] + [build(c, first.transition if of.shared else None) for c in cases[1:]]
    known = [know(*both) for both in zip(cases, numbers, strict=True)]
    if any(k is None for k in known):
        return [Verdict(c, "reference unsure") for c in cases]
    if of.tolerance:  # a batch has one
        loosest = max(k.tolerance for k in known)
        known = [k._replace(tolerance=loosest) for k in known]
    began = time.perf_counter()
    try:
        solutions = solve(of, known)
        made = differentiate(of, known[0]) if gradients and not of.batch else None
    except Exception as error:  # whatever it raises is what is searched for
        fault = Fault("raises", f"{type(error).__name__}: {str(error)[:300]}")
        return [Verdict(c, "raised", (fault,)) for c in cases]
    seconds = round(time.perf_counter() - began, 3)
    verdicts = [judge(*pair, made) for pair in zip(known, solutions, strict=True)]
    return [verdict._replace(seconds=seconds) for verdict in verdicts]


def judge(known: Known, solution, made=None) -> Verdict:
    """What a solution claims, and the pair (hypergradient, gradient of `solve`) if there is one."""
    with mpmath.workdps(DIGITS):
        judged = _Judge(known, solution)
        judged.value()
        if made is not None:
            judged.gradient(*made)
    code = bj.Result(int(solution.result)).name
    return Verdict(known.case, code, tuple(judged.faults), tuple(judged.notes), judged.quality)


class _Judge:
    def __init__(self, known: Known, solution):
        self.known, self.solution = known, solution
        self.reference = known.reference
        self.faults, self.notes, self.quality = [], [], float("nan")
        self.eps, self.tiny = _eps(known.case), _tiny(known.case)
        self.away = 1 - float(_largest_discount(known.numbers))
        self.converged = int(solution.result) == bj.Result.CONVERGED

    def fault(self, kind, detail):
        self.faults.append(Fault(kind, detail))

    def holds(self, measure, limit) -> bool:
        """measure(reference) <= limit, in more digits if need be. A measure is a size and what is unsure about it."""
        size, unsure = measure(self.reference)
        if (size + unsure <= limit).all():
            return True
        if (size - unsure > limit).any():
            return False
        better = certificate_reference.refined(
            self.reference, functools.partial(exact, self.known.case, self.known.numbers)
        )
        if better is None:
            self.notes.append("reference unsure")
            return True
        self.reference = better
        return bool((measure(better)[0] <= limit).all())

    def value(self):
        known, solution, stats = self.known, self.solution, self.solution.stats
        numbers, bound = known.numbers, float(stats.error_bound)
        usable = np.ones(numbers.reward.shape, bool) if numbers.available is None else numbers.available
        fine = np.isfinite(solution.value).all() and np.isfinite(solution.q[usable]).all()
        fine = fine and np.isfinite(solution.policy).all() and np.isfinite(bound)
        if not fine:
            if self.converged:
                self.fault("not finite", f"value {solution.value[:4]}, bound {bound}")
            return

        def off(reference):
            widen = reference.exact.arithmetic.widen
            return np.abs(widen(solution.value) - reference.value), reference.uncertainty

        if not self.holds(off, max(bound, self.tiny)):
            self.fault(
                "bound" if self.converged else "bound, told",
                f"error {float(off(self.reference)[0].max()):.3g} > bound {bound:.3g}; implied {known.implied:.3g}",
            )
        if not self.converged:
            return
        floor = FLOOR * (max(numbers.reward.shape[0], SLOTS) + 4) * self.tiny / self.away
        enough = max(known.implied * (1 + 1e-6) + floor, known.tolerance or 0)
        if bound > enough:
            self.fault("vacuous", f"bound {bound:.3g} > implied {known.implied:.3g}")
        if known.tolerance is not None and bound > known.tolerance:
            self.fault("tolerance", f"bound {bound:.3g} > tolerance {known.tolerance:.3g}")
        if known.tolerance is None:
            # (Q - max Q) / temperature has no digits below the smallest normal number.
            self.parts(off, floor * (1 + float(numbers.temperature)))
        self.loss(float(stats.suboptimality))
        self.read_off(usable)

    def parts(self, off, floor):
        reference = self.reference
        rounding = reference.exact.rounding(reference.policy, reference.value)
        discounts = self.known.numbers.discounts.astype(np.float64)
        discounts = np.where(reference.exact.available, discounts, 0).max(-1)
        part = self.known.numbers.parts()
        unit = np.zeros(len(part))
        for own in np.unique(part):
            mine = part == own
            unit[mine] = float(rounding[mine].max()) * self.eps / (1 - discounts[mine].max())
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.maximum(off(reference)[0].astype(np.float64) - floor, 0)
            self.quality = float(np.where(error > 0, error / unit, 0).max())
        if not self.holds(off, UNITS * unit + floor):
            worst = int(np.argmax(np.where(error > 0, error / unit, 0)))
            self.fault("part", f"state {worst}: error {error[worst]:.3g}, a unit of its part is {unit[worst]:.3g}")

    def loss(self, claimed):
        def lost(reference):
            exact = reference.exact
            value, unsure = certificate_reference.value_of(exact, exact.arithmetic.widen(self.solution.policy))
            return reference.value - value, reference.uncertainty + unsure

        if not np.isfinite(claimed):
            self.fault("suboptimality", f"claimed {claimed}")
        elif not self.holds(lost, max(claimed, self.tiny)):
            loss = float(lost(self.reference)[0].max())
            self.fault("suboptimality", f"the policy loses {loss:.3g} > {claimed:.3g}")

    def read_off(self, usable):
        exact, solution = self.reference.exact, self.solution
        widen = exact.arithmetic.widen
        value = widen(solution.value)
        size = np.abs(exact.reward) + np.abs(exact.q(np.abs(value)) - exact.reward)
        limit = (Q_UNITS * self.eps * size + FLOOR * self.tiny).astype(np.float64)
        error = np.abs(widen(np.where(usable, solution.q, 0)) - exact.q(value)).astype(np.float64)
        if (error > limit)[usable].any() or (solution.q[~usable] != -np.inf).any():
            self.fault("q", f"off by {np.where(usable, error, 0).max():.3g}")
        policy = solution.policy
        wrong = (policy < 0).any() or np.abs(policy.sum(-1) - 1).max() > 100 * self.eps
        if wrong or policy[~usable].any():
            self.fault("policy", f"sums {policy.sum(-1)[:4]}, smallest {policy.min()}")

    def gradient(self, made, grad):
        """`made` is the Hypergradient, `grad` of `solve`, in the same x."""
        codes = [int(o.result) for o in made.outcomes()]
        if any(codes):
            self.notes.append("gradient told")
            return
        flat = {name: np.ravel(leaf).astype(np.float64) for name, leaf in made.gradient.items()}
        if not all(np.isfinite(leaf).all() for leaf in flat.values()):
            self.fault("not finite", "gradient")
            return
        if self.tied():
            self.notes.append("gradient tied")
            return
        if self.known.case.reward == "tiny":  # rewards below the smallest normal number are 0 to a device: all are tied
            self.notes.append("gradient of tiny rewards")
            return
        error = float(made.error)

        def off(reference, of=flat):
            want, size = _gradient(self.known, reference)
            arithmetic = reference.exact.arithmetic
            away = sum(((arithmetic.widen(of[name]) - want[name]) ** 2).sum() for name in want)
            unsure = arithmetic.eps * size * 100 * (1 / self.away + self.logits(reference))
            return np.array([away**0.5]), unsure

        norm = float(_gradient(self.known, self.reference)[1]) / self.away
        if np.isnan(error) or not self.holds(off, error):
            distance = float(off(self.reference)[0][0])
            self.fault("gradient", f"off by {distance:.3g} > error {error:.3g}; implied {norm:.3g}")
        elif error > norm:
            self.notes.append("gradient's error vacuous")
        by_grad = {name: np.ravel(leaf).astype(np.float64) for name, leaf in grad.items()}
        if not all(np.isfinite(leaf).all() for leaf in by_grad.values()):
            self.notes.append("grad is NaN")
        elif not self.holds(functools.partial(off, of=by_grad), error):
            self.fault("grad", f"off by {float(off(self.reference, by_grad)[0][0]):.3g} > {error:.3g}")

    def logits(self, reference):
        if reference.exact.kind == "unregularized":
            return 0.0
        return float(np.abs(reference.value).max() / reference.exact.temperature)

    def tied(self) -> bool:
        """Whether rounding decides which action is best somewhere."""
        if self.known.case.structure.kind != "unregularized":
            return False
        reference = self.reference
        usable = reference.exact.available
        gap = np.where(usable, reference.value[:, None] - reference.q, 0)
        other = usable & (reference.policy == 0)
        level = TIED * self.eps * reference.exact.rounding(reference.policy, reference.value)
        if self.converged:
            level = np.maximum(level, min(4 * float(self.solution.stats.error_bound), level.max() / self.away))
        return bool((other & (gap <= level[:, None])).any())


def _gradient(known: Known, reference: Reference):
    """d objective / dx, and the size of what it is a sum of."""
    exact, numbers = reference.exact, known.numbers
    a, policy = exact.arithmetic, reference.policy
    w = certificate_reference.adjoint(exact, policy, a.widen(numbers.cotangent))[0]
    total = certificate_reference.adjoint(exact, policy, a.widen(np.abs(numbers.cotangent)))[0]
    factor = a.widen(np.ones_like(numbers.reward) if numbers.factor is None else numbers.factor)
    undiscounted = exact._replace(discount=factor)
    parts = {
        "scale": (policy * exact.reward).sum(-1),
        "discount": undiscounted.onward(policy, reference.value),
    }
    if exact.kind != "unregularized":
        parts["temperature"] = -exact.penalty(policy) / exact.temperature
    want = {name: np.array([w @ part]) for name, part in parts.items()} | {"shift": w * policy.sum(-1)}
    size = sum((total @ np.abs(part) for part in parts.values()), start=total.sum())
    return want, size
