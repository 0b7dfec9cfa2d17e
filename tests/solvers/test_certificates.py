"""CONVERGED is never said of a wrong number: a search over MDPs of hard shapes, against an exact reference.

What is asserted stands in `certificate_checks`. `benchmarks.solvers.certificate_search` runs the same on 20,000 cases;
its figures are in docs/failures.md.
"""

import collections
import dataclasses
import itertools

import certificate_cases as cases
import certificate_checks as checks
import certificate_reference as reference
import certificate_runs as runs
import equinox as eqx
import mpmath
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import bilevel_jax as bj

EXAMPLES = 300
MOST_TOLD = 0.02
# Programs are compiled once per structure: few structures, each with gradients in every third.
STRUCTURES = tuple(cases.structure(cases.Random(np.random.default_rng([15, i]))) for i in range(24))


class Drawn:
    """A `Choose` by hypothesis, which shrinks towards the first option and the lower end."""

    def __init__(self, draw):
        self.draw = draw

    def pick(self, options):
        return self.draw(st.sampled_from(options))

    def number(self, low, high):
        return round(self.draw(st.floats(low, high)), 3)

    def whole(self, low, high):
        return self.draw(st.integers(low, high))


@st.composite
def batches(draw):
    """(cases of one structure, whether gradients are checked)."""
    index = draw(st.integers(0, len(STRUCTURES) - 1))
    of, choose = STRUCTURES[index], Drawn(draw)
    return [cases.case(choose, of) for _ in range(of.batch or 1)], index % 3 == 0


def sample(seed, structures, each, **changes):
    """Fixed cases, with `changes`: verdicts of `each` batches per structure."""
    verdicts = []
    for i, of in enumerate(structures):
        choose = cases.Random(np.random.default_rng([seed, i]))
        for _ in range(each):
            batch = [dataclasses.replace(cases.case(choose, of), **changes) for _ in range(of.batch or 1)]
            verdicts += checks.examine(batch, gradients=False)
    return verdicts


def test_a_few_hard_cases():
    few = (
        cases.Structure(6, 3, "float32", "dense", "auto", "unregularized"),
        cases.Structure(6, 3, "float64", "successor", "auto", "kl", masked=True),
        cases.Structure(3, 2, "float32", "stencil", "value iteration", "shannon", ending=True),
    )
    for verdict in sample(1, few, 4):
        assert not verdict.faults, verdict


@pytest.mark.parametrize("solver", ["anderson", "value iteration"])
def test_values_near_the_smallest_normal_number(solver):
    """What 64 sweeps lose below that number is more than these values: such an error was called CONVERGED."""
    of = cases.Structure(2, 2, "float64", "successor", solver, "kl")
    drawn = [cases.Case(of, "corridor", "tiny", seed, 1.25, temperature=-1.0) for seed in range(8)]
    for verdict in itertools.chain.from_iterable(checks.examine([case], gradients=False) for case in drawn):
        assert not verdict.faults, verdict
        assert verdict.code == "CONVERGED"


@pytest.mark.slow
def test_no_structure_is_wrong_near_the_smallest_normal_number():
    """Told more often than elsewhere: nothing else can be done where (Q - max Q) / temperature has no digits."""
    verdicts = sample(3, STRUCTURES, 4, reward="tiny")
    for verdict in verdicts:
        assert not verdict.faults, verdict
    assert sum(v.code == "CONVERGED" for v in verdicts) > len(verdicts) / 2


@pytest.mark.slow
@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
@given(batches())
def test_what_converged_is_right(batch):
    drawn, gradients = batch
    for verdict in checks.examine(drawn, gradients):
        assert not verdict.faults, verdict
        assert verdict.code != "reference unsure"


@pytest.mark.slow
def test_few_cases_end_without_converged():
    verdicts = sample(2, STRUCTURES, 10)
    told = collections.Counter(v.circumstance for v in verdicts if v.code != "CONVERGED")
    assert told.total() <= MOST_TOLD * len(verdicts), told


# The reference, and whether the checks find anything


def tiny_problem(seed):
    """At most 3 states and 2 actions, in float64, of every shape in turn."""
    shape = cases.GRAPHS[seed % len(cases.GRAPHS)]
    choose = cases.Random(np.random.default_rng(seed))
    of = cases.Structure(
        3, 2, "float64", "successor", "auto", "unregularized", masked=bool(seed % 2), ending=seed % 3 == 0
    )
    case = cases.Case(of, shape, choose.pick(cases.REWARDS), seed, choose.number(0, 12), ends=choose.pick(cases.ENDS))
    return case, cases.build(case)


@pytest.mark.parametrize("seed", range(30))
def test_the_reference_is_the_best_policy_in_exact_rationals(seed):
    case, numbers = tiny_problem(seed)
    widen = reference.Rational.widen
    available = np.ones((3, 2), bool) if numbers.available is None else numbers.available
    arrays = numbers.entries(reference.Rational), widen(numbers.reward), widen(numbers.discounts)
    with mpmath.workdps(reference.DIGITS):
        best = reference.best_by_enumeration(*arrays, available)
        best = np.array([mpmath.mpf(value.numerator) / value.denominator for value in best])
        for arithmetic in (reference.WORKING, reference.MANY):
            found = reference.solve(checks.exact(case, numbers, arithmetic))
            assert found is not None
            value, slack = (
                array if arithmetic is reference.MANY else reference.MANY.widen(array)
                for array in (found.value, found.uncertainty)
            )
            assert (np.abs(value - best) <= slack).all()


@pytest.mark.parametrize("kind", ["shannon", "kl", "tsallis"])
def test_the_reference_is_a_fixed_point_from_any_start(kind):
    of = cases.Structure(6, 3, "float64", "dense", "auto", kind)
    numbers = cases.build(cases.Case(of, "garnet", "plain", 3, discount=1.0))
    exact = checks.exact(cases.Case(of, "garnet", "plain", 3), numbers, reference.WORKING)
    found = [reference.solve(exact, start) for start in (np.zeros(6), np.full(6, 1e6), np.linspace(-1e3, 1e3, 6))]
    for other in found:
        np.testing.assert_allclose(other.value.astype(float), found[0].value.astype(float), rtol=1e-15)
    value = found[0].value
    for _ in range(600):
        value = exact.conjugate(exact.q(value))[0]
    np.testing.assert_allclose(value.astype(float), found[0].value.astype(float), rtol=1e-15)
    evaluated, _ = reference.value_of(exact, found[0].policy)
    np.testing.assert_allclose(evaluated.astype(float), found[0].value.astype(float), rtol=1e-14)


@pytest.mark.parametrize("wrong", ["value", "bound", "policy", "q", "tolerance"])
def test_the_checks_find_what_is_wrong(wrong):
    of = cases.Structure(6, 3, "float64", "dense", "auto", "shannon", tolerance=wrong == "tolerance")
    case = cases.Case(of, "garnet", "plain", 3, digits=6.0)
    known = checks.know(case, cases.build(case))
    solution = runs.solve(of, [known])[0]
    assert not checks.judge(known, solution).faults
    big = np.float64(1e9)
    changed, kinds = {
        "value": ((lambda s: s.value, solution.value + 1e-3), {"bound", "part", "q"}),
        "bound": ((lambda s: s.stats.error_bound, big), {"vacuous"}),
        "policy": ((lambda s: s.policy, np.roll(solution.policy, 1, 1)), {"suboptimality"}),
        "q": ((lambda s: s.q, solution.q * (1 + 1e-12)), {"q"}),
        "tolerance": ((lambda s: s.stats.error_bound, 1.01 * np.float64(known.tolerance or 0)), {"tolerance"}),
    }[wrong]
    verdict = checks.judge(known, eqx.tree_at(*changed[:1], solution, changed[1]))
    assert {fault.kind for fault in verdict.faults} == kinds
    untold = eqx.tree_at(lambda s: s.result, solution, np.int32(bj.Result.MAX_ITERATIONS))
    assert not checks.judge(known, untold).faults
