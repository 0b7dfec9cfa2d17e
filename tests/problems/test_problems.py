"""Registered problems: one protocol for all, and the published facts of each, derived anew in numpy."""

import dataclasses
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SIMULATORS, WITH_MODEL, central_difference, flat, random_like
from scipy.special import logsumexp, softmax

import bilevel_jax as bj
from bilevel_jax.experiments.present.pictures import picture
from bilevel_jax.problems.grid import dynamics, parse_map

KEY = jax.random.key(0)
# Small enough to be quick, where the defaults are not.
OPTIONS = {"synthetic": {"dimension": 7}}


@functools.cache
def make(name, **options):
    return bj.problems.make(name, **(OPTIONS.get(name, {}) | options))


@functools.cache
def hypergradient(name):
    problem = make(name)
    return bj.check(bj.hypergradient(problem, problem.start(KEY), with_error=False))


def test_names_are_those_of_the_files():
    folder = Path(bj.problems.__file__).parent
    files = [path.stem for path in sorted(folder.glob("*.py")) if re.search(r"^register\(", path.read_text(), re.M)]
    assert len(files) >= 8
    assert list(bj.problems.names()) == files


@pytest.mark.parametrize("name", bj.problems.names())
def test_is_described(name):
    spec = bj.problems.spec(name)
    assert spec.name == name
    assert len(spec.summary) > 20
    for field in dataclasses.fields(spec.options):
        assert field.default is not dataclasses.MISSING, field.name
        described = rf"^(\w+, )*{field.name}(, \w+)*: "
        assert re.search(described, inspect.getdoc(spec.options), re.MULTILINE), field.name


def test_which_have_a_model():
    assert [name for name in bj.problems.names() if not isinstance(make(name), bj.Problem)] == list(SIMULATORS)


@pytest.mark.parametrize("name", WITH_MODEL)
class TestEveryProblem:
    @pytest.mark.slow
    def test_keeps_the_protocol(self, name):
        problem = make(name)
        assert isinstance(problem, bj.Problem)
        x = problem.start(KEY)
        assert x.dtype == float
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x, problem.start(KEY))
        assert not np.array_equal(x, problem.start(jax.random.key(1)))
        mdp, regularizer = problem.mdp(x), problem.regularizer(x)
        mdp.validate()
        regularizer.validate()
        solution = hypergradient(name).solution
        assert problem.objective(x, solution).shape == ()
        figure = picture(problem, x, solution, name)
        figure.draw_without_rendering()
        assert len([axes for axes in figure.axes if axes.has_data()]) >= len(problem.panels(x, solution))

    @pytest.mark.slow
    @pytest.mark.few(4)
    def test_is_a_pytree(self, name):
        problem = make(name)
        x = problem.start(KEY)
        leaves, structure = jax.tree.flatten(problem)
        assert all(isinstance(leaf, jax.Array) for leaf in leaves)
        copy = jax.jit(lambda p: p)(jax.tree.unflatten(structure, leaves))
        np.testing.assert_array_equal(copy.mdp(x).reward, problem.mdp(x).reward)

    @pytest.mark.slow
    def test_hypergradient_against_differences(self, name):
        problem = make(name)
        x, d = problem.start(KEY), random_like(1, problem.start(KEY))
        result = hypergradient(name)
        f = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
        np.testing.assert_allclose(result.value, f(x), rtol=1e-12)
        np.testing.assert_allclose(np.vdot(flat(result.gradient), flat(d)), central_difference(f, x, d)[0], rtol=1e-7)

    def test_takes_its_options(self, name):
        warm = make(name, temperature=0.7, discount=0.3)
        x = warm.start(KEY)
        assert float(np.max(warm.regularizer(x).temperature)) == 0.7
        np.testing.assert_allclose(np.max(warm.mdp(x).modulus), 0.3)


# The synthetic problem.


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_synthetic_is_as_published(seed):
    states, actions, dimension = 8, 4, 6
    problem = make("synthetic", states=states, actions=actions, dimension=dimension, seed=seed)
    x = problem.start(KEY)
    kernel = np.asarray(problem.transition)
    assert kernel.shape == (states, actions, states)
    np.testing.assert_allclose(kernel.sum(-1), 1, rtol=1e-14)
    count = (kernel > 0).sum(-1)
    assert count.min() >= 1
    assert count.max() <= states - 1
    assert len(np.unique(count)) > 3
    coefficient = np.asarray(problem.coefficient)
    assert (coefficient >= 0).all()
    assert (coefficient <= 1).all()
    assert x.shape == (dimension,)
    np.testing.assert_allclose(problem.mdp(x).reward, coefficient * (x @ np.asarray(problem.matrix) @ x), rtol=1e-13)
    solution = bj.solve(problem.mdp(x), problem.regularizer(x))
    want = 0.5 * (np.asarray(x) ** 2).sum() + 0.5 * (np.asarray(solution.policy) ** 2).sum()
    np.testing.assert_allclose(problem.objective(x, solution), want, rtol=1e-13)
    # x enters through a quadratic form and its norm: -x is as good as x.
    there, back = (bj.hypergradient(problem, y, with_error=False) for y in (x, -x))
    np.testing.assert_allclose(there.value, back.value, rtol=1e-13)
    np.testing.assert_allclose(there.gradient, -back.gradient, rtol=1e-11, atol=1e-12)


def test_synthetic_seeds_differ():
    assert not np.array_equal(make("synthetic", seed=0).transition, make("synthetic", seed=1).transition)
    np.testing.assert_array_equal(make("synthetic").transition, make("synthetic", seed=0).transition)


# Four Rooms, from its published description.

MAP = [
    "xxxxxxxxxxxxx",
    "x     x     x",
    "x     x     x",
    "x           x",
    "x     x     x",
    "x     x     x",
    "xx xxxx     x",
    "x     xxx xxx",
    "x     x     x",
    "x     x     x",
    "x           x",
    "x     x     x",
    "xxxxxxxxxxxxx",
]
CELLS = [(i, j) for i in range(13) for j in range(13) if MAP[i][j] != "x"]
INDEX = {cell: s for s, cell in enumerate(CELLS)}
START, TARGET, GOALS = INDEX[4, 1], INDEX[8, 4], (INDEX[1, 9], INDEX[11, 11])
DISCOUNT, SLIP = 0.99, 4 * 0.33 / 3


def four_rooms_kernel():
    """P[s, a, s'] with a = up, right, down, left, cell by cell."""
    kernel = np.zeros((len(CELLS), 4, len(CELLS)))
    steps = [(-1, 0), (0, 1), (1, 0), (0, -1)]
    for (i, j), s in INDEX.items():
        for chosen in range(4):
            for made, (down, right) in enumerate(steps):
                reached = INDEX.get((i + down, j + right), s)  # a wall: stays
                kernel[s, chosen, reached] += 1 - SLIP if made == chosen else SLIP / 3
    return kernel


def four_rooms_objective(w, temperature, beta):
    """The designer's value by value iteration and one linear solve for each goal, all in numpy."""
    kernel, penalty = four_rooms_kernel(), -0.2 * softmax(w)[:-1]
    total = 0.0
    for goal in GOALS:
        goes_on = DISCOUNT * (np.arange(len(CELLS)) != goal)
        reward = np.where(np.arange(len(CELLS)) == goal, 1.0, penalty)
        value = np.zeros(len(CELLS))
        for _ in range(4000):
            q = reward[:, None] + goes_on[:, None] * (kernel @ value)
            value = temperature * logsumexp(q / temperature, -1)
        policy = softmax(q / temperature, -1)
        designer = np.zeros(len(CELLS))
        designer[TARGET] += 1
        designer[goal] -= beta * np.abs(penalty).sum()
        system = np.eye(len(CELLS)) - goes_on[:, None] * np.einsum("sa,saj->sj", policy, kernel)
        total += np.linalg.solve(system, designer)[START] / len(GOALS)
    return total, value


def test_four_rooms_map():
    assert len(CELLS) == 104
    problem = make("four_rooms")
    np.testing.assert_array_equal(problem.grid.cells, CELLS)
    assert np.flatnonzero(problem.initial).tolist() == [START]
    assert np.flatnonzero(problem.at_target).tolist() == [TARGET]
    np.testing.assert_array_equal(np.nonzero(problem.at_goal), [[0, 1], GOALS])
    x = problem.start(KEY)
    assert x.shape == (105,)
    assert 0.005 < np.std(x) < 0.02
    assert problem.mdp(x).batch_shape == (2,)


def test_four_rooms_dynamics():
    kernel = np.asarray(make("four_rooms").transition.probability)
    np.testing.assert_allclose(kernel, four_rooms_kernel(), atol=1e-15)
    middle = INDEX[2, 2]
    assert kernel[middle, 0, INDEX[1, 2]] == pytest.approx(0.56)
    assert kernel[middle, 0, INDEX[3, 2]] == pytest.approx(0.44 / 3)
    corner = INDEX[1, 1]
    assert kernel[corner, 0, corner] == pytest.approx(0.56 + 0.44 / 3)  # up and left are walls
    bands = make("four_rooms", transition="stencil").transition
    v = np.random.default_rng(0).normal(size=104)
    np.testing.assert_allclose(bands.expect(v), kernel @ v, rtol=1e-13, atol=1e-14)


def test_an_open_map_is_a_stencil_of_five_moves():
    grid = parse_map("xxxxx\nx...x\nx...x\nxxxxx")
    stencil, dense = (dynamics(grid, 0.3, kind) for kind in ("stencil", "dense"))
    assert stencil.grid == (2, 3)
    assert set(stencil.offsets) == {(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)}
    v = np.random.default_rng(0).normal(size=6)
    np.testing.assert_allclose(stencil.expect(v), dense.expect(v), rtol=1e-13)
    slope = [jax.jvp(lambda s, k=k: dynamics(grid, s, k).expect(v), (0.3,), (1.0,))[1] for k in ("stencil", "dense")]
    np.testing.assert_allclose(*slope, rtol=1e-12)


@pytest.mark.slow
def test_four_rooms_rewards_and_goals():
    problem, x = make("four_rooms", temperature=0.01), random_like(2, np.zeros(105))
    mdp, penalty = problem.mdp(x), -0.2 * softmax(x)[:-1]
    np.testing.assert_allclose(problem.incentive(x), penalty, rtol=1e-13)
    solution = bj.solve(mdp, problem.regularizer(x), solver=bj.PolicyIteration())  # to the last digits
    for context, goal in enumerate(GOALS):
        elsewhere = np.arange(104) != goal
        want = np.repeat(penalty[elsewhere, None], 4, 1)
        np.testing.assert_allclose(np.asarray(mdp.reward)[context, elsewhere], want, rtol=1e-13)
        np.testing.assert_array_equal(mdp.reward[context, goal], np.ones(4))
        np.testing.assert_array_equal(mdp.discount[context], np.where(elsewhere, 0.99, 0)[:, None].repeat(4, 1))
        # Acting at the goal pays 1 and the entropy of that last choice, then nothing.
        np.testing.assert_allclose(solution.value[context, goal], 1 + 0.01 * np.log(4), atol=1e-13)
        np.testing.assert_allclose(solution.policy[context, goal], 0.25)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "beta"), [(0.003, 1.0), (0.05, 3.0)])
@pytest.mark.parametrize("layout", ["dense", "successor"])
def test_four_rooms_objective(temperature, beta, layout):
    x = 3 * random_like(3, np.zeros(105))  # far enough from uniform for the penalties to matter
    problem = make("four_rooms", temperature=temperature, beta=beta, transition=layout)
    want, value = four_rooms_objective(x, temperature, beta)
    result = bj.check(bj.hypergradient(problem, jnp.asarray(x), with_error=False))
    np.testing.assert_allclose(result.solution.value[1], value, rtol=1e-10)
    np.testing.assert_allclose(result.value, -want, rtol=1e-9)


@pytest.mark.slow
def test_four_rooms_layouts_agree():
    dense, sparse = (make("four_rooms", transition=layout) for layout in ("dense", "successor"))
    x = dense.start(KEY)
    v, d = random_like(4, (np.zeros(104), np.zeros((104, 4))))
    np.testing.assert_allclose(
        dense.transition.expect(jnp.asarray(v)), sparse.transition.expect(jnp.asarray(v)), atol=1e-14
    )
    np.testing.assert_allclose(
        dense.transition.push(jnp.asarray(d)), sparse.transition.push(jnp.asarray(d)), atol=1e-13
    )
    gradients = [bj.check(bj.hypergradient(problem, x, with_error=False)).gradient for problem in (dense, sparse)]
    np.testing.assert_allclose(*gradients, rtol=0, atol=1e-9 * np.abs(gradients[0]).max())


def test_four_rooms_options():
    other = make("four_rooms", goals=((1, 1),), origin=(11, 11), target=(3, 6), slip=0.0, max_penalty=0.5)
    x = other.start(KEY)
    assert other.mdp(x).batch_shape == (1,)
    assert np.flatnonzero(other.at_goal[0]).tolist() == [INDEX[1, 1]]
    assert np.flatnonzero(other.initial).tolist() == [INDEX[11, 11]]
    assert np.flatnonzero(other.at_target).tolist() == [INDEX[3, 6]]
    assert set(np.unique(other.transition.probability)) == {0.0, 1.0}
    np.testing.assert_allclose(other.incentive(jnp.zeros(105)), -0.5 / 105, rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "beta", "measured"), [(0.005, 1.0, 1.346), (0.001, 3.0, 0.516)])
def test_four_rooms_by_adam(temperature, beta, measured):
    """Adam 0.05, 1500 exact steps: the designer's value that a prototype reached (other seed, other code)."""
    with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
        problem = make("four_rooms", temperature=temperature, beta=beta)
        algorithm = bj.algorithms.m_sobirl(problem, optax.adam(0.05), solver=bj.PolicyIteration(), adjoint=bj.Direct())
        state = algorithm.init(KEY, problem.start(KEY))
        train = jax.jit(lambda s: jax.lax.scan(lambda s, _: algorithm.step(KEY, s), s, length=1500))
        _, info = train(state)
    bj.check(info)
    assert abs(-float(info.objective[-1]) - measured) < 0.03
    assert -float(info.objective[0]) < measured - 0.05  # it had to get there
