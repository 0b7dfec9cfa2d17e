"""Doors in Four Rooms and environment design, against transitions made cell by cell in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import central_difference, densify, random_like
from scipy.special import expit, logsumexp, softmax

import bilevel_jax as bj
from bilevel_jax.problems.environment_design import ROWS
from bilevel_jax.problems.grid import dynamics, parse_map

KEY = jax.random.key(0)
MOVES = [(-1, 0), (0, 1), (1, 0), (0, -1)]
SMALL = ("s.d.g", ".x.x.", "t.d..")


def kernel(rows, slip, blocked):
    """P[s, a, s'], blocked[s] the probability that whoever moves to cell s stays where it was."""
    cells = [(i, j) for i, row in enumerate(rows) for j, letter in enumerate(row) if letter != "x"]
    made = np.zeros((len(cells), 4, len(cells)))
    for s, (i, j) in enumerate(cells):
        for chosen in range(4):
            for move, (down, right) in enumerate(MOVES):
                to = (i + down, j + right)
                to = cells.index(to) if to in cells else s
                chance = 1 - slip if move == chosen else slip / 3
                made[s, chosen, to] += chance * (1 - blocked[to])
                made[s, chosen, s] += chance * blocked[to]
    return made


def where(rows, letter):
    return np.array([found == letter for row in rows for found in row if found != "x"])


@functools.cache
def design(**options):
    return bj.problems.make("environment_design", **options)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dense", "successor", "stencil"])
def test_doors(layout):
    options = {"rows": SMALL, "penalties": "doors", "closed": 0.3, "slip": 0.2, "temperature": 0.05}
    problem = bj.problems.make("four_rooms", transition=layout, **options)
    want = kernel(SMALL, 0.2, 0.3 * where(SMALL, "d"))
    v, x = np.random.default_rng(0).normal(size=len(want)), random_like(1, problem.start(KEY))
    np.testing.assert_allclose(problem.transition.expect(jnp.asarray(v)), want @ v, rtol=1e-12, atol=1e-13)
    assert x.shape == (3,)
    penalty = np.zeros(len(want))
    penalty[where(SMALL, "d")] = -0.2 * softmax(x)[:-1]
    np.testing.assert_allclose(problem.incentive(x), penalty, rtol=1e-12)
    for array, letter in ((problem.at_goal[0], "g"), (problem.at_target, "t"), (problem.initial, "s")):
        np.testing.assert_array_equal(array, where(SMALL, letter))
    assert problem.environment.successor.shape[-1] == 5  # the simulator's moves, and staying at a closed door


@pytest.mark.slow
def test_gradient_with_doors():
    problem = bj.problems.make("four_rooms", rows=SMALL, penalties="doors", closed=0.3, temperature=0.05)
    x, d = (random_like(seed, problem.start(KEY)) for seed in (1, 2))
    f = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    gradient = bj.check(bj.hypergradient(problem, x, with_error=False)).gradient
    assert abs(gradient @ d) > 1e-4
    np.testing.assert_allclose(gradient @ d, central_difference(f, x, d)[0], rtol=1e-7)


WRONG = {
    "no door": ({"rows": ("sgt",), "penalties": "doors"}, "rows: no door; mark at least one cell 'd'"),
    "no goal": ({"rows": ("st",)}, "rows: no goal"),
    "no target": ({"rows": ("sg",)}, "rows: expected one target 't', got 0"),
    "two starts": ({"rows": ("ssgt",)}, "rows: expected one origin 's', got 2"),
    "always closed": ({"closed": 1.0}, "closed must be at least 0 and below 1, got 1"),
    "penalties": ({"penalties": "walls"}, "penalties: expected 'cells' or 'doors'"),
    "ragged": ({"rows": ("sg", "t")}, r"rows: they have lengths \[1, 2\]"),
    "walls": ({"rows": ("xx",)}, "rows: the map has walls only"),
    "nothing": ({"rows": ()}, "rows: the map is empty"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_maps(case):
    options, message = WRONG[case]
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make("four_rooms", **options)


@pytest.mark.slow
def test_places_instead_of_letters():
    problem = bj.problems.make("four_rooms", rows=("...", "..."), origin=(0, 0), target=(0, 2), goals=((1, 2), (1, 0)))
    np.testing.assert_array_equal(np.argwhere(problem.at_goal), [[0, 5], [1, 3]])


def test_entry_is_differentiable():
    """Its slope in every layout, as far as it goes through a closing door."""
    grid = parse_map(("...", "..."))
    v, at = np.random.default_rng(0).normal(size=6), jnp.asarray(np.arange(6) == 4)
    want = kernel(("...", "..."), 0.1, 1.0 * np.asarray(at)) @ v - kernel(("...", "..."), 0.1, np.zeros(6)) @ v
    for kind in ("dense", "successor", "stencil"):
        slope = jax.jvp(lambda e, k=kind: dynamics(grid, 0.1, k, jnp.where(at, e, 1)).expect(v), (0.5,), (1.0,))[1]
        np.testing.assert_allclose(slope, -want, rtol=1e-11, atol=1e-13)


# Environment design.


def designer_numpy(x, discount=0.95, temperature=0.01):
    """The objective by value iteration and one linear solve, all in numpy."""
    share, goal = expit(x), where(ROWS, "g")
    blocked = np.zeros(len(goal))
    blocked[where(ROWS, "o")] = share[:-1]
    goes_on = discount * ~goal[:, None] * kernel(ROWS, 0.3 * share[-1], blocked).transpose(1, 0, 2)  # [A, S, S]
    value = np.zeros(len(goal))
    for _ in range(1500):
        q = (goal + goes_on @ value).T
        value = temperature * logsumexp(q / temperature, -1)
    chain = np.einsum("sa,asj->sj", softmax(q / temperature, -1), goes_on)
    worth = np.linalg.solve(np.eye(len(goal)) - chain, 1.0 * where(ROWS, "t") + 0.5 * goal)[where(ROWS, "s")]
    return 0.1 * share[:-1].sum() + 0.05 * (1 - share[-1]) - worth[0]


@pytest.mark.slow
def test_environment_design():
    problem = design()
    x = 1.0 + random_like(3, problem.start(KEY))
    blocked = np.asarray(problem.obstacles(x))
    assert (blocked > 0).sum() == len(x) - 1 == 3
    lists = problem.mdp(x).transition
    got = densify(np.asarray(lists.successor), np.asarray(lists.probability))
    np.testing.assert_allclose(got, kernel(ROWS, 0.3 * expit(x[-1]), blocked), atol=1e-14)
    result = bj.check(bj.hypergradient(problem, x, with_error=False))
    np.testing.assert_allclose(result.value, designer_numpy(x), rtol=1e-9)


@pytest.mark.slow
def test_obstacles_lead_the_agent():
    """Descent ends below every design on a grid; it closes the short way just enough, and nothing else."""
    problem = design()
    with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
        algorithm = bj.algorithms.m_sobirl(problem, optax.adam(0.05), solver=bj.PolicyIteration(), adjoint=bj.Direct())
        state = algorithm.init(KEY, problem.start(KEY))
        state, info = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.step(KEY, s), s, length=600))(state)
    bj.check(info)
    short, *others = expit(np.asarray(state.x[:-1]))
    assert 0.7 < short < 0.95
    assert max(others) < 0.01
    designs = np.stack(np.meshgrid([-6, 0, 1, 2, 3], [-6, 1], [-6, 1], [-6, 0]), -1).reshape(-1, 4).astype(float)
    values = jax.jit(
        lambda many: jax.lax.map(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))), many)
    )(designs)
    assert info.objective[-1] < np.min(values)
    np.testing.assert_allclose(values[0], designer_numpy(designs[0]), rtol=1e-9)


BAD_DESIGN = {
    "no obstacle": ({"rows": ("sgt",)}, "rows: no place for an obstacle; mark at least one cell 'o'"),
    "no start": ({"rows": ("got",)}, "rows: expected one start 's', got 0"),
    "no goal": ({"rows": ("sot",)}, "rows: no goal"),
    "price": ({"obstacle_price": -1.0}, "obstacle_price must be at least 0"),
    "slip": ({"max_slip": 1.0}, "max_slip must be at least 0 and below 1"),
    "visits": ({"visits": float("nan")}, "visits is nan"),
}


@pytest.mark.parametrize("case", BAD_DESIGN)
def test_bad_designs(case):
    options, message = BAD_DESIGN[case]
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make("environment_design", **options)
