"""Derivatives of `solve` and `policy_value`: finite differences, an unrolled run, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    ACTIONS,
    KINDS,
    LAYOUTS,
    STATES,
    WEIGHTS,
    but,
    central_difference,
    flat,
    make_mdp,
    make_regularizer,
    random_like,
    random_process,
)
from jax import lax

import bilevel_jax as bj
from bilevel_jax.linear import linear_solve
from bilevel_jax.mdp.bellman import backup, discounted_operator, greedy

PROCESS = random_process(3)
CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
SIMPLEX_AXIS = {"initial": -1, "reference": -1}


def parameters(kind, layout):
    """Everything that an MDP and its regularizer are made of."""
    theta = {
        "reward": PROCESS.reward,
        "probability": PROCESS.dense if layout == "dense" else PROCESS.probability,
        "discount": np.random.default_rng(1).uniform(0.6, 0.8, (STATES, ACTIONS)),
        "temperature": np.asarray(0.7),
        "initial": PROCESS.initial,
    }
    return theta | ({"reference": PROCESS.reference} if kind == "kl" else {})


def direction(theta, layout, seed=2, only=None):
    """A random direction; probabilities keep their sums. With `only`, of one parameter alone."""
    axes = SIMPLEX_AXIS | {"probability": -1 if layout == "dense" else 0}
    full = {
        name: d - d.mean(axes[name], keepdims=True) if name in axes else d
        for name, d in random_like(seed, theta).items()
    }
    return full if only is None else {name: d * (name == only) for name, d in full.items()}


def build(theta, kind, layout):
    # Called under a trace only, where values pass unchecked: finite differences leave the simplex by rounding.
    if layout == "dense":
        kernel = bj.DenseTransition(theta["probability"])
    else:
        kernel = bj.SuccessorTransition(PROCESS.successor, theta["probability"])
    mdp = bj.MDP(kernel, theta["reward"], theta["discount"], theta["initial"])
    return mdp, make_regularizer(kind, theta["temperature"], theta.get("reference"))


def score(mdp, value, q, policy):
    """A scalar that is nonlinear in everything that a solution holds."""
    a, b, c = WEIGHTS
    return jnp.vdot(a, value**2) + jnp.vdot(b, jnp.sin(q)) + jnp.vdot(c, policy**2) + mdp.initial @ value


@functools.cache
def solved(kind, layout, adjoint=None):
    # The rule is the same after either solver; sweeps compile faster.
    solver = bj.ValueIteration() if layout == "dense" else bj.PolicyIteration()

    def f(theta):
        mdp, regularizer = build(theta, kind, layout)
        solution = bj.solve(mdp, regularizer, solver=solver, adjoint=adjoint)
        return score(mdp, solution.value, solution.q, solution.policy)

    return f


def unrolled(kind, layout):
    """The same by 400 sweeps of T from zero: 0.8^400 is 2e-39."""

    def f(theta):
        mdp, regularizer = build(theta, kind, layout)
        sweep = lambda v, _: (backup(mdp, regularizer, v), None)  # noqa: E731
        value, _ = lax.scan(sweep, jnp.zeros(STATES), length=400)
        return score(mdp, value, *greedy(mdp, regularizer, value))

    return f


@functools.cache
def value_of(kind, layout):
    return jax.jit(solved(kind, layout))


@functools.cache
def gradient_of(kind, layout, adjoint=None):
    return jax.jit(jax.grad(solved(kind, layout, adjoint)))


def jvp_of(f):
    return jax.jit(lambda theta, d: jax.jvp(f, (theta,), (d,))[1])


def dot(a, b):
    return np.vdot(flat(a), flat(b))


@pytest.mark.few(1)
@pytest.mark.often(2)
@pytest.mark.parametrize(("kind", "layout"), but([("kl", "dense"), ("tsallis", "successor")], CASES))
def test_first_derivatives(kind, layout):
    theta = parameters(kind, layout)
    gradient, forward, slow = (
        gradient_of(kind, layout)(theta),
        jvp_of(solved(kind, layout)),
        jvp_of(unrolled(kind, layout)),
    )
    for name in theta:
        d = direction(theta, layout, only=name)
        along = forward(theta, d)
        assert abs(along) > 1e-3, name  # there is something to compare
        np.testing.assert_allclose(along, dot(gradient, d), rtol=1e-10, err_msg=f"{name}: jvp, vjp")
        np.testing.assert_allclose(along, slow(theta, d), rtol=1e-8, err_msg=f"{name}: unrolled")
        differences = central_difference(value_of(kind, layout), theta, d, 3e-4)
        np.testing.assert_allclose(along, differences[0], rtol=1e-7, err_msg=f"{name}: differences")


@pytest.mark.slow
def test_the_tsallis_case_is_sparse_and_away_from_the_ends_of_its_supports():
    theta = parameters("tsallis", "dense")
    support = jax.jit(lambda theta: bj.solve(*build(theta, "tsallis", "dense")).policy > 0)
    sizes = np.asarray(support(theta)).sum(-1)
    assert set(sizes) >= {1, 2}
    for name in theta:
        d = direction(theta, "dense", only=name)
        for step in (-6e-4, 6e-4):  # as far as the differences go
            moved = jax.tree.map(lambda x, d, step=step: x + step * d, theta, d)
            np.testing.assert_array_equal(support(moved), support(theta), err_msg=name)


MODES = {
    "forward over reverse": lambda f: lambda x, d: jax.jvp(jax.grad(f), (x,), (d,))[1],
    "reverse over reverse": lambda f: lambda x, d: jax.grad(lambda x: jnp.vdot(ravel(jax.grad(f)(x)), ravel(d)))(x),
    "reverse over forward": lambda f: lambda x, d: jax.grad(lambda x: jax.jvp(f, (x,), (d,))[1])(x),
}


def ravel(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "layout", "mode"),
    [
        *(("kl", "successor", mode) for mode in MODES),
        ("tsallis", "dense", "forward over reverse"),
        ("shannon", "dense", "forward over reverse"),
    ],
)
def test_hessian_vector_products(kind, layout, mode):
    theta = parameters(kind, layout)
    d = direction(theta, layout)
    product = flat(jax.jit(MODES[mode](solved(kind, layout)))(theta, d))
    want = central_difference(gradient_of(kind, layout), theta, d, 2e-4)
    np.testing.assert_allclose(product, want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


@pytest.mark.slow
def test_gmres_adjoint_equals_the_direct_one():
    theta = parameters("shannon", "dense")
    d = direction(theta, "dense")
    gradients = [flat(gradient_of("shannon", "dense", adjoint)(theta)) for adjoint in (None, bj.GMRES(1e-13))]
    np.testing.assert_allclose(*gradients, rtol=1e-8, atol=1e-11)
    tangents = [jvp_of(solved("shannon", "dense", adjoint))(theta, d) for adjoint in (None, bj.GMRES(1e-13))]
    np.testing.assert_allclose(*tangents, rtol=1e-8)


def hasty(reward, adjoint):
    mdp = bj.MDP(PROCESS.dense, reward, 0.9)
    solution = bj.solve(mdp, bj.ShannonEntropy(0.5), solver=bj.ValueIteration(), adjoint=adjoint)
    return solution.value[0], solution


hasty_gradient = jax.jit(jax.grad(hasty, has_aux=True))
hasty_tangent = jax.jit(lambda r, adjoint: jax.jvp(lambda r: hasty(r, adjoint)[0], (r,), (r,))[1])
HASTY = bj.BilevelProblem(
    lambda x: bj.MDP(PROCESS.dense, x, 0.9), bj.ShannonEntropy(0.5), lambda x, s: jnp.sum(s.policy**2)
)


@pytest.mark.slow
@pytest.mark.parametrize("cycles", [0, 1])
def test_an_adjoint_that_fails_shows(cycles):
    adjoint, reward = bj.GMRES(restart=1, max_cycles=cycles), jnp.asarray(PROCESS.reward)
    gradient, solution = hasty_gradient(reward, adjoint)
    bj.check(solution)  # the solve itself went well
    assert np.isnan(gradient).all()
    assert np.isnan(hasty_tangent(reward, adjoint))
    reported = bj.hypergradient(HASTY, reward, method=bj.Implicit(bj.ValueIteration(), adjoint), with_error=False)
    assert int(reported.stats.result) == bj.Result.MAX_ITERATIONS
    with pytest.raises(bj.ConvergenceError, match=r"adjoint: the maximum number of iterations"):
        bj.check(reported)


@pytest.mark.slow
def test_the_adjoint_above_succeeds_with_enough_cycles():
    assert np.isfinite(hasty_gradient(jnp.asarray(PROCESS.reward), bj.GMRES(restart=1, max_cycles=1000))[0]).all()


@pytest.mark.slow
def test_cost_of_the_gradient_does_not_depend_on_the_sweeps():
    theta = parameters("shannon", "dense")

    def temporary(run):
        """Bytes that the compiled gradient needs beside its arguments and results."""
        gradient = jax.jit(jax.grad(lambda r: run(*build(theta | {"reward": r}, "shannon", "dense"))))
        return gradient.lower(PROCESS.reward).compile().memory_analysis().temp_size_in_bytes

    def by_loop(steps):
        return temporary(lambda m, r: bj.solve(m, r, solver=bj.ValueIteration(0.0, steps)).value.sum())

    def by_unrolling(steps):
        sweeps = lambda m, r: lax.scan(lambda v, _: (backup(m, r, v), None), jnp.zeros(STATES), length=steps)  # noqa: E731
        return temporary(lambda m, r: sweeps(m, r)[0].sum())

    assert by_loop(10) == by_loop(10_000)
    assert by_unrolling(1000) > 10 * by_unrolling(10)  # what is measured can grow


@pytest.mark.slow
def test_an_inexact_solve_differentiates_at_its_own_value():
    # Reverse mode goes through the while loop at any number of sweeps; the rule is taken at the V reached.
    theta = parameters("shannon", "dense")
    solver = bj.ValueIteration(0.0, 3)

    def run(reward):
        mdp, regularizer = build(theta | {"reward": reward}, "shannon", "dense")
        return bj.solve(mdp, regularizer, solver=solver)

    gradient = jax.jit(jax.jacrev(lambda r: run(r).value))(PROCESS.reward)
    policy = np.asarray(jax.jit(run)(PROCESS.reward).policy)
    operator = np.einsum("sa,saj->sj", theta["discount"] * policy, PROCESS.dense)
    want = np.linalg.inv(np.eye(STATES) - operator)[:, :, None] * policy
    np.testing.assert_allclose(gradient, want, rtol=1e-12)


def test_initial_value_has_no_derivative():
    mdp = make_mdp(PROCESS)
    f = lambda v: bj.solve(mdp, bj.ShannonEntropy(0.5), initial_value=v).value.sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(f)(jnp.ones(STATES)), 0)


@pytest.mark.slow
def test_under_checkpoint_and_scan():
    theta = parameters("shannon", "dense")

    def f(reward):
        return solved("shannon", "dense")(theta | {"reward": reward})

    gradient = jax.jit(jax.grad(f))
    start = jnp.asarray(PROCESS.reward)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.checkpoint(f)))(start), gradient(start), rtol=1e-12)

    def descend(reward):
        return lax.scan(lambda r, _: (r - 0.01 * jax.grad(f)(r), f(r)), reward, length=3)

    last, scores = jax.jit(descend)(start)
    reward = start
    for k in range(3):
        np.testing.assert_allclose(scores[k], jax.jit(f)(reward), rtol=1e-12)
        reward = reward - 0.01 * gradient(reward)
    np.testing.assert_allclose(last, reward, rtol=1e-12)
    # and through all of it: three gradient steps, differentiated
    through = jax.jit(jax.grad(lambda r: descend(r)[1].sum()))(start)
    d = jnp.asarray(random_like(5, start))
    want = central_difference(jax.jit(lambda r: descend(r)[1].sum()), start, d)[0]
    np.testing.assert_allclose(jnp.vdot(through, d), want, rtol=1e-8)


@pytest.mark.slow
def test_vmap_of_gradients():
    rewards = jnp.asarray(np.random.default_rng(6).normal(size=(3, STATES, ACTIONS)))
    theta = parameters("kl", "successor")
    gradient = jax.grad(lambda r: solved("kl", "successor")(theta | {"reward": r}))
    many = jax.jit(jax.vmap(gradient))(rewards)
    one = jax.jit(gradient)
    np.testing.assert_allclose(many, np.stack([one(r) for r in rewards]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_policy_value(layout):
    theta = parameters("shannon", layout) | {"policy": PROCESS.reference}

    def f(theta):
        return bj.policy_value(build(theta, "shannon", layout)[0], theta["policy"])

    operator = np.einsum("sa,saj->sj", theta["discount"] * theta["policy"], PROCESS.dense)
    want = np.linalg.solve(np.eye(STATES) - operator, (theta["policy"] * theta["reward"]).sum(-1))
    np.testing.assert_allclose(jax.jit(f)(theta), want, rtol=1e-10)

    scalar = jax.jit(lambda theta: jnp.vdot(WEIGHTS[0], f(theta) ** 2))
    gradient, forward = jax.jit(jax.grad(scalar))(theta), jvp_of(scalar)
    for name in ("reward", "probability", "discount", "policy"):
        d = direction(theta, layout, only=name)
        along = dot(gradient, d)
        np.testing.assert_allclose(along, central_difference(scalar, theta, d)[0], rtol=1e-8, err_msg=name)
        np.testing.assert_allclose(along, forward(theta, d), rtol=1e-9, err_msg=name)


def test_policy_value_of_a_batch():
    rng = np.random.default_rng(7)
    rewards, policies = rng.normal(size=(2, STATES, ACTIONS)), rng.dirichlet(np.ones(ACTIONS), (2, STATES))
    many = bj.policy_value(bj.MDP(PROCESS.dense, rewards, 0.9), policies)
    for i in range(2):
        one = bj.policy_value(bj.MDP(PROCESS.dense, rewards[i], 0.9), policies[i])
        np.testing.assert_allclose(many[i], one, rtol=1e-13)


@pytest.mark.slow
def test_policy_value_of_the_optimum_is_its_value_plus_the_penalty():
    mdp, regularizer = make_mdp(PROCESS, 0.9), bj.TsallisEntropy(0.4)
    solution = bj.solve(mdp, regularizer)
    shaped = mdp.replace(reward=mdp.reward - regularizer.penalty(solution.policy)[:, None])
    np.testing.assert_allclose(bj.policy_value(shaped, solution.policy), solution.value, rtol=1e-11)


def test_policy_value_that_fails_is_nan():
    mdp = make_mdp(PROCESS, 0.9)
    assert np.isnan(bj.policy_value(mdp, jnp.asarray(PROCESS.reference), bj.GMRES(restart=1, max_cycles=1))).all()


@pytest.mark.slow
def test_gmres_reaches_its_tolerance():
    # Its inner error estimate is not the residual: a cycle that trusts it can stop just short of the tolerance.
    rooms = bj.problems.make("four_rooms")
    mdp = rooms.mdp(jnp.zeros(105))
    mdp = mdp.replace(reward=mdp.reward[0], discount=mdp.discount[0], initial=mdp.initial[0])

    def solve(policy):
        operator = discounted_operator(mdp, policy)
        return linear_solve(bj.GMRES(), operator, mdp.modulus, policy[:, 0], transpose=True)[1]

    policies = np.random.default_rng(0).dirichlet(np.ones(4), (32, 104))
    stats = jax.jit(jax.vmap(solve))(policies)
    np.testing.assert_array_equal(stats.result, np.zeros(32))
    assert int(jnp.max(stats.products)) > 1
