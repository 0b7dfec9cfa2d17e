"""The ways to a hyper-gradient: against the exact one, against each other, and their own word on their errors."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import STATES, but, central_difference, flat, random_like, random_process, upper_problem, upper_start

import bilevel_jax as bj

INEXACT = {
    "values to 1e-4": bj.Implicit(bj.ValueIteration(1e-4)),
    "five sweeps": bj.Implicit(bj.ValueIteration(max_iterations=5, centred=False)),
    "Krylov, both": bj.Implicit(bj.ValueIteration(1e-6), bj.GMRES(1e-3)),
    "neumann": bj.Implicit(adjoint=bj.Neumann(10)),
    "descent": bj.Implicit(bj.ValueIteration(max_iterations=10, centred=False), bj.Descent(0.3, 5)),
    "unrolled": bj.Unrolled(15),
    "truncated": bj.Unrolled(60, differentiated_sweeps=5),
    "nothing differentiated": bj.Unrolled(60, differentiated_sweeps=0),
    "forward": bj.Unrolled(15, mode="forward"),
    "trajectories": bj.ExpectedTrajectories(5),
    "one step": bj.ExpectedTrajectories(1),
}
EXACT = {
    "default": None,
    "direct": bj.Implicit(bj.PolicyIteration(), bj.Direct()),
    "GMRES": bj.Implicit(bj.PolicyIteration(), bj.GMRES()),
    "adaptive": bj.Implicit(bj.AdaptivePolicyIteration(), bj.AdaptiveKrylov()),
    "neumann": bj.Implicit(adjoint=bj.Neumann(200)),
    "unrolled": bj.Unrolled(200),
    "truncated": bj.Unrolled(400, differentiated_sweeps=150),
    "forward": bj.Unrolled(200, mode="forward"),
    "trajectories": bj.ExpectedTrajectories(200),
}


@functools.cache
def truth(kind, contexts=False):
    return bj.check(bj.hypergradient(upper_problem(kind, contexts), upper_start(), method=EXACT["direct"]))


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_all_roads_lead_to_the_same_gradient(name):
    made = bj.hypergradient(upper_problem("kl"), upper_start(), method=EXACT[name])
    np.testing.assert_allclose(made.value, truth("kl").value, rtol=1e-12)
    np.testing.assert_allclose(flat(made.gradient), flat(truth("kl").gradient), rtol=1e-8, atol=1e-9)
    assert float(made.error) < 1e-7
    if name != "forward":
        np.testing.assert_allclose(made.adjoint, truth("kl").adjoint, rtol=1e-7, atol=1e-9)


@pytest.mark.often(1)
@pytest.mark.parametrize(
    ("kind", "contexts"), but([], [("kl", False), ("kl", True), ("shannon", False), ("tsallis", False)])
)
def test_error_bounds_hold_and_are_tight(kind, contexts):
    problem, x = upper_problem(kind, contexts), upper_start()
    for name, method in INEXACT.items():
        made = bj.hypergradient(problem, x, method=method)
        error = np.linalg.norm(flat(made.gradient) - flat(truth(kind, contexts).gradient))
        assert error <= float(made.error) <= 10 * error, (name, error, float(made.error))


def grid(discount, temperature, states=300):
    """A ring on which the agent is paid at one place: slow to mix. Compiled once for all discounts."""
    place = np.arange(states)
    successor = np.stack([(place + 1) % states, (place - 1) % states], -1)[None].astype(np.int32)
    transition = bj.SuccessorTransition(jnp.asarray(successor), jnp.ones(successor.shape))
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(states, 2)))
    mdp = jax.tree_util.Partial(ring, transition, jnp.asarray(discount))
    x = {"reward": jnp.asarray(np.random.default_rng(1).normal(size=states)), "price": jnp.asarray(0.3)}
    return bj.BilevelProblem(mdp, bj.ShannonEntropy(temperature), jax.tree_util.Partial(paid_on_ring, weights)), x


def ring(transition, discount, x):
    return bj.MDP(transition, x["reward"][:, None] - x["price"] * jnp.arange(2.0)[None], discount)


def paid_on_ring(weights, x, solution):
    return jnp.sum(weights * solution.policy) + 0.1 * jnp.sum(solution.value) + jnp.sum(x["reward"] ** 2)


SLOW = {
    "values to 1e-3": bj.Implicit(bj.ValueIteration(1e-3)),
    "20 sweeps": bj.Implicit(bj.ValueIteration(max_iterations=20, centred=False)),
    "rough Krylov": bj.Implicit(bj.ValueIteration(1e-6), bj.GMRES(1e-2)),
    "neumann": bj.Implicit(adjoint=bj.Neumann(30)),
    "unrolled": bj.Unrolled(40),
    "trajectories": bj.ExpectedTrajectories(30),
}


# Either side of the default's change from factorization to Krylov.
@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("states", [300, pytest.param(600, marks=pytest.mark.nightly)])
@pytest.mark.parametrize("discount", [0.5, 0.9, 0.99, 0.999])
def test_error_bounds_on_slow_chains(discount, states):
    problem, x = grid(discount, 0.2, states)
    exact = bj.check(bj.hypergradient(problem, x, method=bj.Implicit(bj.PolicyIteration(), bj.Direct())))
    for name, method in SLOW.items():
        made = bj.hypergradient(problem, x, method=method)
        error = np.linalg.norm(flat(made.gradient) - flat(exact.gradient))
        rounding = 1e-10 * np.linalg.norm(flat(exact.gradient))
        assert error <= float(made.error) + rounding, name
        assert float(made.error) <= 10 * error + rounding, name


@pytest.mark.slow
def test_the_default_stops_where_it_is_told_to():
    problem, x = grid(0.95, 0.2, states=600)
    calls = hypergradient_cache()
    made = [bj.check(bj.hypergradient(problem, x, method=bj.Implicit(tolerance=t))) for t in (1e-2, 1e-5, 1e-8)]
    assert hypergradient_cache() == calls + 1
    exact = bj.check(bj.hypergradient(problem, x))
    named = bj.Implicit(bj.Auto(1e-5), bj.AdaptiveKrylov(1e-5))
    np.testing.assert_array_equal(
        bj.hypergradient(problem, x, method=named).gradient["price"], made[1].gradient["price"]
    )
    errors = [np.linalg.norm(flat(m.gradient) - flat(exact.gradient)) for m in made]
    size = np.linalg.norm(flat(exact.gradient))
    for tolerance, error, m in zip((1e-2, 1e-5, 1e-8), errors, made, strict=True):
        assert error <= float(m.error) <= 10 * error + 1e-9 * size
        assert error <= 10 * tolerance * size
    work = [int(m.solution.stats.products + m.stats.products) for m in (*made, exact)]
    assert work == sorted(set(work))


def hypergradient_cache():
    return bj.hypergradient.__globals__["_hypergradient"]._cache_size()


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("method", ["five sweeps", "neumann", "unrolled", "default"])
def test_error_bound_in_float32(method):
    x = jax.tree.map(jnp.float32, upper_start())
    narrow = bj.BilevelProblem(
        lambda x: bj.MDP(jax.nn.softmax(x["transition"]), x["reward"], jax.nn.sigmoid(x["discount"])),
        lambda x: bj.ShannonEntropy(jnp.exp(x["temperature"])),
        lambda x, s: jnp.sum(s.policy**2) + jnp.sum(s.value) * x["temperature"],
    )
    made = bj.hypergradient(narrow, x, method=(INEXACT | EXACT)[method])
    exact = bj.hypergradient(narrow, upper_start())
    error = np.linalg.norm(np.asarray(flat(made.gradient), float) - flat(exact.gradient))
    assert {leaf.dtype for leaf in jax.tree.leaves((made.value, made.gradient, made.error))} == {np.dtype("float32")}
    assert error <= float(made.error) <= 10 * error + 1e-2


@pytest.mark.slow
def test_a_lower_level_that_is_not_found_has_no_bound():
    problem, x = grid(0.999, 0.2)
    x["reward"] = x["reward"].at[3].set(jnp.nan)
    assert not np.isfinite(float(bj.hypergradient(problem, x, method=INEXACT["neumann"]).error))


class Weighted(bj.Problem):
    """weights' V; x is (discount, temperature): each derivative is a sum over the states whose terms may cancel."""

    transition: bj.DenseTransition
    reward: jax.Array
    weights: jax.Array

    def mdp(self, x):
        return bj.MDP(self.transition, self.reward, x[0])

    def regularizer(self, x):
        return bj.ShannonEntropy(x[1])

    def objective(self, x, solution):
        del x
        return self.weights @ solution.value


def test_errors_see_sums_over_the_states_that_cancel():
    """In float32 the rounding of such a sum is that of its terms. The reference has the same numbers in float64."""
    states, count = 60, 200
    rng = np.random.default_rng(0)
    p = bj.DenseTransition(np.eye(states, k=1)[:, None] + np.eye(states, k=1 - states)[:, None] + np.zeros((1, 3, 1)))
    weights = rng.normal(size=(count, states)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def made(weights, x):
        dtype = x.dtype
        transition = jax.tree.map(lambda leaf: leaf.astype(dtype), p)
        problem = Weighted(transition, jnp.zeros((states, 3), dtype), weights.astype(dtype))
        return bj.hypergradient(problem, x)

    for discount, temperature in ((0.0, 300.0), (0.5, 0.01)):
        x = jnp.array([discount, temperature], jnp.float32)
        found, right = made(weights, x), made(weights, x.astype(jnp.float64))
        off = np.linalg.norm(np.asarray(found.gradient, np.float64) - np.asarray(right.gradient), axis=-1)
        assert (off <= np.asarray(found.error)).all()
        size = (1 + temperature) * np.abs(weights).sum(-1) / (1 - discount) ** 2
        assert np.median(np.asarray(found.error) / size) < 1e-5


class FromReference(bj.Problem):
    """weights' V; x are logits of the reference, [A] for all states."""

    transition: bj.DenseTransition
    reward: jax.Array
    weights: jax.Array

    def mdp(self, x):
        return bj.MDP(self.transition, self.reward, jnp.asarray(0.5, x.dtype))

    def regularizer(self, x):
        return bj.KLDivergence(jnp.asarray(300.0, x.dtype), jax.nn.softmax(x))

    def objective(self, x, solution):
        del x
        return self.weights @ solution.value


@pytest.mark.often(1)
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(60, 8), (8, 60)])
def test_errors_of_derivatives_in_a_reference(shape):
    """At a high temperature, with weights that cancel: the gradient keeps its digits, and `error` says so."""
    count, rng = 200, np.random.default_rng(0)
    p = rng.dirichlet(np.ones(shape[0]), shape).astype(np.float32)
    reward = rng.normal(size=shape).astype(np.float32)
    weights = rng.normal(size=(count, shape[0])).astype(np.float32)
    weights -= weights.mean(-1, keepdims=True)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None, None))
    def made(weights, reward, x):
        problem = FromReference(bj.DenseTransition(jnp.asarray(p, x.dtype)), reward.astype(x.dtype), weights)
        return bj.hypergradient(problem, x)

    x = jnp.asarray(rng.normal(size=shape[1]), jnp.float32)
    for scale in (np.float32(1e-6), np.float32(1)):
        found = made(weights, scale * reward, x)
        right = made(weights.astype(np.float64), scale * reward, x.astype(jnp.float64))
        off = np.linalg.norm(np.asarray(found.gradient, np.float64) - np.asarray(right.gradient), axis=-1)
        assert (off <= np.asarray(found.error)).all()
        assert np.median(np.asarray(found.error) / np.linalg.norm(right.gradient, axis=-1)) < 1e-4


class TwoStates(bj.Problem):
    """pi[0, 0] - share pi[1, 0] of two states apart, which x moves in opposite directions by way of `moves`."""

    share: jax.Array
    moves: str = eqx.field(static=True)

    def mdp(self, x):
        reward = jnp.array([[0.0, 3.1], [0.0, 4.7]], x.dtype)
        discount = x if self.moves == "discount" else jnp.asarray(0.5, x.dtype)
        return bj.MDP(jnp.broadcast_to(jnp.eye(2, dtype=x.dtype)[:, None], (2, 2, 2)), reward, discount)

    def regularizer(self, x):
        temperature = x if self.moves == "temperature" else jnp.asarray(1.3, x.dtype)
        return bj.KLDivergence(temperature, x) if self.moves == "reference" else bj.ShannonEntropy(temperature)

    def objective(self, x, solution):
        del x
        return solution.policy[0, 0] - self.share * solution.policy[1, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moves", "x"), [("temperature", 1.3), ("discount", 0.3), ("reference", [0.25, 0.75])], ids=lambda case: str(case)
)
def test_errors_see_policies_of_states_that_cancel(moves, x):
    """The share is chosen such that nothing is left of the two states' terms, of which each is 0.1 (discount: 0)."""

    def made(share, dtype):
        return bj.check(bj.hypergradient(TwoStates(jnp.asarray(share, dtype), moves), jnp.asarray(x, dtype)))

    alone = np.ravel(made(0, jnp.float64).gradient)
    other = alone - np.ravel(made(1, jnp.float64).gradient)
    share = np.float32(alone @ other / (other @ other) if other.any() else 0.5)
    found, right = made(share, jnp.float32), made(share, jnp.float64)
    off = np.linalg.norm(np.asarray(found.gradient, np.float64) - np.asarray(right.gradient))
    assert 1e-9 < off <= float(found.error) <= 1e-5


@pytest.mark.slow
def test_errors_see_expectations_that_cancel():
    """E V of successors of either sign is small, and its error that of V, which has one sign."""
    rng, count, states = np.random.default_rng(0), 100, 4
    p = rng.dirichlet(np.ones(states), (states, 3)).astype(np.float32)
    reward = (100 * rng.normal(size=(count, states, 3))).astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def made(reward, x):
        dtype = x.dtype
        problem = bj.BilevelProblem(
            lambda x: bj.MDP(bj.DenseTransition(jnp.asarray(p, dtype)), reward - reward.mean(), x),
            lambda x: bj.KLDivergence(jnp.asarray(800.0, dtype), jnp.full(3, 1 / 3, dtype)),
            lambda x, solution: jnp.sum(solution.value),
        )
        return bj.hypergradient(problem, x)

    found, right = made(reward, jnp.float32(0.5)), made(reward.astype(np.float64), jnp.float64(0.5))
    off = np.abs(np.asarray(found.gradient, np.float64) - np.asarray(right.gradient))
    assert (off <= np.asarray(found.error)).all()


class SharedReference(bj.Problem):
    """Many MDPs of which only the rewards and weights differ; x are logits of the reference of all of them, [S, A]."""

    weights: jax.Array
    reward: jax.Array

    def mdp(self, x):
        states, actions = self.reward.shape[1:]
        uniform = jnp.full((states, actions, states), 1 / states, x.dtype)
        return bj.MDP(bj.DenseTransition(uniform), self.reward, jnp.asarray(0.5, x.dtype))

    def regularizer(self, x):
        return bj.KLDivergence(jnp.asarray(0.5, x.dtype), jax.nn.softmax(x))

    def objective(self, x, solution):
        del x
        return jnp.sum(self.weights * solution.value)


@pytest.mark.slow
def test_errors_see_sums_over_a_batch_that_cancel():
    states, actions, batch, count = 6, 10, 8, 100
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(count, batch, states))
    weights[:, batch // 2 :] = -weights[:, : batch // 2]
    reward = np.tile(rng.normal(size=(batch // 2, states, actions)), (2, 1, 1))
    reward[0] += 1e-5
    weights, reward = weights.astype(np.float32), reward.astype(np.float32)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def made(weights, x):
        return bj.hypergradient(SharedReference(weights, jnp.asarray(reward, x.dtype)), x)

    x = jnp.asarray(rng.normal(size=(states, actions)), jnp.float32)
    found, right = made(weights, x), made(weights.astype(np.float64), x.astype(jnp.float64))
    off = np.asarray(found.gradient, np.float64) - np.asarray(right.gradient)
    assert (np.linalg.norm(off.reshape(count, -1), axis=-1) <= np.asarray(found.error)).all()
    assert (np.asarray(found.error) < 1e-5 * np.abs(weights).sum((1, 2))).all()


@pytest.mark.slow
def test_without_error():
    made = bj.hypergradient(upper_problem("kl"), upper_start(), with_error=False)
    assert made.error is None
    with_error = bj.hypergradient(upper_problem("kl"), upper_start())
    np.testing.assert_allclose(flat(made.gradient), flat(with_error.gradient), rtol=1e-12, atol=1e-14)
    lowered = jax.jit(lambda x: bj.hypergradient(upper_problem("kl"), x).gradient).lower(upper_start())
    bare = jax.jit(lambda x: bj.hypergradient(upper_problem("kl"), x, with_error=False).gradient).lower(upper_start())
    flops = [program.compile().cost_analysis()["flops"] for program in (lowered, bare)]
    assert flops[0] <= 1.01 * flops[1]  # an error that nobody reads is not computed


@pytest.mark.often(2)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["neumann", "unrolled", "forward", "trajectories", "descent"])
def test_under_vmap(name):
    problem, method = upper_problem("kl", True), (INEXACT)[name]
    xs = [upper_start(seed) for seed in range(3)]
    many = jax.jit(jax.vmap(lambda x: bj.hypergradient(problem, x, method=method)))(
        jax.tree.map(lambda *x: jnp.stack(x), *xs)
    )
    for i, x in enumerate(xs):
        one = bj.hypergradient(problem, x, method=method)
        np.testing.assert_allclose(many.value[i], one.value, rtol=1e-12)
        np.testing.assert_allclose(many.error[i], one.error, rtol=1e-5)
        np.testing.assert_allclose(
            flat(jax.tree.map(lambda g, i=i: g[i], many.gradient)), flat(one.gradient), rtol=1e-9, atol=1e-11
        )


# What each method says that it is.


@pytest.mark.slow
def test_unrolled_is_the_derivative_of_the_sweeps():
    problem, x = upper_problem("kl"), upper_start()

    def after(sweeps, x):
        mdp, regularizer = problem.mdp(x), problem.regularizer(x)
        value = jnp.zeros(STATES)
        for _ in range(sweeps):
            q = mdp.reward + mdp.discount * mdp.transition.probability @ value
            value = regularizer.conjugate(q)
        q = mdp.reward + mdp.discount * mdp.transition.probability @ value
        return problem.objective(x, bj.Solution(value, q, regularizer.policy(q), None, None))

    made = bj.hypergradient(problem, x, method=bj.Unrolled(7))
    np.testing.assert_allclose(made.value, after(7, x), rtol=1e-13)
    np.testing.assert_allclose(flat(made.gradient), flat(jax.grad(functools.partial(after, 7))(x)), rtol=1e-10)
    forward = bj.hypergradient(problem, x, method=bj.Unrolled(7, mode="forward"))
    np.testing.assert_allclose(flat(forward.gradient), flat(made.gradient), rtol=1e-10, atol=1e-13)
    assert int(made.solution.stats.iterations) == 7
    error = np.abs(made.solution.value - truth("kl").solution.value).max()
    assert error <= made.solution.stats.error_bound
    d = random_like(5, x)
    np.testing.assert_allclose(
        np.vdot(flat(made.gradient), flat(d)), central_difference(functools.partial(after, 7), x, d)[0], rtol=1e-8
    )


@pytest.mark.slow
def test_unrolled_from_a_warm_start():
    exact = truth("kl")
    made = bj.hypergradient(
        upper_problem("kl"), upper_start(), method=bj.Unrolled(30), initial_value=exact.solution.value
    )
    # From V* on, k sweeps are k summands of the Neumann series.
    neumann = bj.hypergradient(upper_problem("kl"), upper_start(), method=bj.Implicit(adjoint=bj.Neumann(29)))
    np.testing.assert_allclose(flat(made.gradient), flat(neumann.gradient), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(made.adjoint, neumann.adjoint, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(made.stats.residual, neumann.stats.residual, rtol=1e-6)


@pytest.mark.slow
def test_warm_started_iterates_converge():
    """M-SoBiRL's way at a fixed x: a few sweeps and a step on the adjoint a call, both from where they stood."""
    problem, x = upper_problem("kl"), upper_start()
    method = bj.Implicit(bj.ValueIteration(max_iterations=3, centred=False), bj.Descent(0.5, 2))
    starts, errors, bounds = {}, [], []
    for _ in range(250):
        made = bj.hypergradient(problem, x, method=method, **starts)
        starts = {"initial_value": made.solution.value, "initial_adjoint": made.adjoint}
        errors.append(np.linalg.norm(flat(made.gradient) - flat(truth("kl").gradient)))
        bounds.append(float(made.error))
    assert errors[-1] < 1e-6 * errors[0]
    near = [(error, bound) for error, bound in zip(errors, bounds, strict=True) if error > 1e-9 * errors[0]]
    assert all(error <= bound <= 10 * error for error, bound in near)
    slope = np.polyfit(np.arange(20), np.log(errors[20:40]), 1)[0]
    assert slope < -0.05  # linear


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2, 4])
def test_trajectories_are_the_truncated_sums_of_the_estimator(length):
    process, weights = random_process(3), np.random.default_rng(3).normal(size=(STATES, 3))
    discount, temperature = 0.8, 0.5
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(process.dense, x, discount),
        bj.ShannonEntropy(temperature),
        lambda x, s: jnp.sum(weights * s.policy) + 0.1 * jnp.sum(x**2),
    )
    x = jnp.asarray(process.reward)
    made = bj.hypergradient(problem, x, method=bj.ExpectedTrajectories(length))
    policy = np.asarray(made.solution.policy)
    # d r = e at one pair; dQ sums it along trajectories of `length` steps from each pair.
    want = np.zeros(process.reward.shape)
    for state, action in np.ndindex(want.shape):
        e = np.zeros(want.shape)
        e[state, action] = 1
        total, pairs = np.zeros(want.shape), np.eye(want.size).reshape(*want.shape, *want.shape)
        for step in range(length):
            total += discount**step * np.einsum("sazb,zb->sa", pairs, e)
            pairs = np.einsum("sazb,zbj,jc->sajc", pairs, process.dense, policy)
        response = (total - np.sum(policy * total, 1, keepdims=True)) / temperature
        want[state, action] = np.sum(weights * policy * response) + 0.2 * process.reward[state, action]
    np.testing.assert_allclose(made.gradient, want, rtol=1e-10)


@pytest.mark.slow
def test_differences_and_random_signs():
    problem, x = upper_problem("shannon"), upper_start()
    exact = flat(truth("shannon").gradient)
    made = bj.hypergradient(problem, x, method=bj.FiniteDifferences())
    error = np.linalg.norm(flat(made.gradient) - exact)
    assert error <= 1e-8 * np.linalg.norm(exact)
    assert error <= made.error <= 1e-7 * np.linalg.norm(exact)
    wide = bj.hypergradient(problem, x, method=bj.FiniteDifferences(step=0.05))
    error = np.linalg.norm(flat(wide.gradient) - exact)
    assert error <= wide.error <= 10 * error
    assert made.adjoint is None
    bj.check(made)


@pytest.mark.slow
def test_random_signs_are_unbiased():
    problem, x = upper_problem("shannon"), upper_start()
    exact, samples = flat(truth("shannon").gradient), 500
    estimates = np.stack(
        [
            flat(bj.hypergradient(problem, x, method=bj.SimultaneousPerturbation(key, samples)).gradient)
            for key in jax.random.split(jax.random.key(1), 8)
        ]
    )
    # Along the exact gradient: |g|^2 on average. Eight means; |z| > 4.5 has probability 0.3% (t, 7 degrees of freedom).
    along = estimates @ exact / (exact @ exact)
    assert abs(along.mean() - 1) <= 4.5 * along.std(ddof=1) / 8**0.5
    assert along.std(ddof=1) < 0.2
    made = bj.hypergradient(problem, x, method=bj.SimultaneousPerturbation(jax.random.key(0), samples))
    error = np.linalg.norm(flat(made.gradient) - exact)
    assert error / 2 <= made.error <= 10 * error


@pytest.mark.often(1)
@pytest.mark.slow
@pytest.mark.parametrize("method", [bj.FiniteDifferences(), bj.SimultaneousPerturbation(jax.random.key(0), 4)])
def test_perturbations_jit_and_vmap(method):
    problem, x = upper_problem("kl"), upper_start()
    xs = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), x)
    many = jax.jit(jax.vmap(lambda x: bj.hypergradient(problem, x, method=method)))(xs)
    one = bj.hypergradient(problem, x, method=method)
    np.testing.assert_allclose(
        flat(jax.tree.map(lambda g: g[0], many.gradient)), flat(one.gradient), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
def test_hessian_vector_product(reverse):
    problem, x = upper_problem("kl"), upper_start()
    d = random_like(3, x)
    gradient, product = bj.hessian_vector_product(problem, x, d)
    np.testing.assert_allclose(flat(gradient), flat(truth("kl").gradient), rtol=1e-9)
    if reverse:  # the Hessian is symmetric: reverse mode over the same gradient
        pull = jax.vjp(lambda x: bj.hypergradient(problem, x, with_error=False).gradient, x)[1]
        np.testing.assert_allclose(flat(product), flat(pull(d)[0]), rtol=1e-7, atol=1e-8)
    else:
        want = central_difference(lambda x: bj.hypergradient(problem, x, with_error=False).gradient, x, d, 1e-4)
        np.testing.assert_allclose(flat(product), want, rtol=1e-6, atol=1e-7 * np.abs(want).max())


WRONG = [
    (lambda: bj.Unrolled(0), "sweeps must be at least 1"),
    (lambda: bj.Unrolled(5, differentiated_sweeps=6), "differentiated_sweeps: 6 is more than the 5 sweeps"),
    (lambda: bj.Unrolled(5, mode="sideways"), "mode: expected 'reverse' or 'forward'"),
    (lambda: bj.ExpectedTrajectories(0), "length must be at least 1"),
    (lambda: bj.FiniteDifferences(step=-1.0), "step must be at least 0"),
    (lambda: bj.FiniteDifferences(step=0.0), "step must be above 0"),
    (lambda: bj.SimultaneousPerturbation(jax.random.key(0), 1), "samples must be at least 2"),
    (lambda: bj.hypergradient(upper_problem("kl"), upper_start(), with_error=1), "with_error: expected bool"),
    (lambda: bj.hessian_vector_product(upper_problem("kl"), upper_start(), 1.0), "direction: expected a tree as x"),
    (
        lambda: bj.hessian_vector_product(upper_problem("kl"), {"a": jnp.ones(2)}, {"a": jnp.ones(3)}),
        "direction: expected leaves of shapes",
    ),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_bad_input(call, message):
    with pytest.raises(bj.InputError, match=message):
        call()
