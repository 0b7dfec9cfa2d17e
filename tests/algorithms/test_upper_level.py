"""What every algorithm's upper level allows: projections, schedules of the temperature, line searches."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import ACTIONS, STATES, random_process, upper_problem, upper_start
from optax import projections
from sampled_helpers import garnet

import bilevel_jax as bj
from bilevel_jax.agents import ActorCritic, ExactAgent
from bilevel_jax.algorithms import (
    UpperLevel,
    amd,
    attenuating_actor_critic,
    base,
    bc_hg,
    hpgd,
    implicit,
    m_sobirl,
    naive,
    pbrl,
    sobirl,
    stoc_sobirl,
    zero_order,
)
from bilevel_jax.estimators import Exact

KEY = jax.random.key(0)


def own_temperature(problem, upper):
    """Of the problem, where none is given: by default this one brings a schedule."""
    if not isinstance(upper, UpperLevel) or upper.temperature is None:
        upper = UpperLevel(
            getattr(upper, "optimizer", upper), projection=getattr(upper, "projection", None), temperature=lambda k: 1.0
        )
    return attenuating_actor_critic(problem, upper, agent=ActorCritic(processes=8, steps=4), batch=8)


SAMPLED = {
    "attenuating_actor_critic": own_temperature,
    "sobirl": lambda problem, upper: sobirl(problem, upper, agent=ExactAgent(), response=Exact(), batch=8),
    "stoc_sobirl": lambda problem, upper: stoc_sobirl(problem, 27, optimizer=upper),
    "hpgd": lambda problem, upper: hpgd(problem, upper, agent=ExactAgent(), batch=8),
    "bc_hg": lambda problem, upper: bc_hg(problem, upper, agent=ExactAgent(), batch=8),
    "zero_order": lambda problem, upper: zero_order(problem, upper, agent=ExactAgent(), batch=8),
    "naive": lambda problem, upper: naive(problem, upper, agent=ExactAgent(), batch=8),
}
MODEL = {"m_sobirl": m_sobirl, "implicit": implicit, "amd": amd, "pbrl": pbrl}
ALGORITHMS = SAMPLED | MODEL
BOX = jax.tree_util.Partial(projections.projection_box, lower=-0.01, upper=0.02)


def run(algorithm, x, steps):
    """The last state and the infos, stacked."""

    def body(state, key):
        state, info = algorithm.step(key, state)
        return state, info

    return jax.lax.scan(body, algorithm.init(KEY, x), jax.random.split(KEY, steps))


@pytest.mark.often(4)
@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_projection_in_every_algorithm(name):
    problem = garnet()
    x = 0.1 * jax.random.normal(KEY, (5, 2))
    algorithm = ALGORITHMS[name](problem, UpperLevel(optax.sgd(1.0), projection=BOX))
    state, info = algorithm.step(KEY, algorithm.init(KEY, x))
    start = np.clip(x, -0.01, 0.02)
    np.testing.assert_allclose(state.x, np.clip(start - info.gradient, -0.01, 0.02), atol=1e-15)
    np.testing.assert_allclose(
        info.stationarity, np.linalg.norm(start - np.clip(start - info.gradient, -0.01, 0.02)), rtol=1e-12
    )
    np.testing.assert_allclose(info.gradient_norm, np.linalg.norm(info.gradient), rtol=1e-12)
    assert int(state.iteration) == 1


@pytest.mark.often(4)
@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_schedule_of_the_temperature_in_every_algorithm(name):
    problem, x = garnet(temperature=0.5), 0.1 * jax.random.normal(KEY, (5, 2))
    hot = garnet(temperature=2.0)
    schedule = lambda k: jnp.where(k < 1, 4.0, 1.0)  # noqa: E731
    annealed = ALGORITHMS[name](problem, UpperLevel(optax.sgd(0.0), temperature=schedule))
    after, first = annealed.step(KEY, annealed.init(KEY, x))
    _, second = annealed.step(KEY, after)

    for info, other, count in ((first, hot, 1), (second, problem, 2)):
        plain = ALGORITHMS[name](other, optax.sgd(0.0))
        state = plain.init(KEY, x)
        for _ in range(count):
            state, want = plain.step(KEY, state)
        # What an algorithm carries over it has from the other temperature: V and w, a critic, an agent that learns.
        if count == 1 or name not in ("m_sobirl", "pbrl", "bc_hg", "stoc_sobirl", "attenuating_actor_critic"):
            np.testing.assert_allclose(info.gradient, want.gradient, rtol=1e-9, atol=1e-10)
    assert not np.allclose(first.gradient, second.gradient)


def mixture(seed=5):
    """x: weights of a convex mixture of three kernels, on the simplex."""
    kernels = np.stack([random_process(k).dense for k in range(3)])
    process = random_process(seed)
    return bj.BilevelProblem(
        lambda x: bj.MDP(jnp.tensordot(x, kernels, 1), process.reward, 0.9, process.initial),
        bj.ShannonEntropy(0.3),
        lambda x, s: -jnp.sum(process.initial * s.value) + 0.5 * jnp.sum((x - jnp.array([0.1, 0.2, 0.7])) ** 2),
    )


def brute_force(problem, count=80):
    """The best weights on a grid of the simplex."""
    points = [(i / count, j / count) for i in range(count + 1) for j in range(count + 1 - i)]
    grid = np.array([(a, b, 1 - a - b) for a, b in points])
    value = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    paid = jax.lax.map(value, jnp.asarray(np.clip(grid, 0, 1)))
    return grid[int(np.argmin(paid))], float(np.min(paid))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODEL)
def test_on_the_simplex(name):
    problem = mixture()
    upper = UpperLevel(optax.sgd(0.05), projection=projections.projection_simplex)
    exact = {
        "m_sobirl": {"solver": bj.PolicyIteration(), "adjoint": bj.Direct()},
        "pbrl": {"weight": 1e3, "policy_updates": 3},
    }
    algorithm = MODEL[name](problem, upper, **exact.get(name, {}))
    state, infos = jax.jit(lambda x: run(algorithm, x, 300))(jnp.full(3, 1 / 3))
    best, value = brute_force(problem)
    np.testing.assert_allclose(np.sum(state.x), 1, atol=1e-12)
    assert np.all(np.asarray(state.x) >= 0)
    np.testing.assert_allclose(state.x, best, atol=0.02)
    assert float(infos.objective[-1]) <= value + 1e-9
    # Stationary on the simplex, though the gradient does not vanish.
    assert float(infos.stationarity[-1]) < 1e-8 < float(infos.gradient_norm[-1])


@pytest.mark.slow
def test_in_a_ball_of_a_tree():
    problem, x = upper_problem("kl"), upper_start()
    ball = jax.tree_util.Partial(projections.projection_l2_ball, scale=3.0)
    algorithm = implicit(problem, UpperLevel(optax.sgd(0.05), projection=ball))
    state, infos = jax.jit(lambda x: run(algorithm, x, 50))(x)
    assert optax.tree.norm(state.x) <= 3 + 1e-9
    assert float(infos.objective[-1]) < float(infos.objective[0])


@pytest.mark.slow
def test_warm_starts_save_work():
    problem, x = mixture(), jnp.full(3, 1 / 3)
    method = bj.Implicit(bj.ValueIteration(1e-10), bj.GMRES(1e-10))
    algorithm = implicit(problem, optax.sgd(0.0), method=method)
    state, first = algorithm.step(KEY, algorithm.init(KEY, x))
    _, second = algorithm.step(KEY, state)
    assert int(second.reports["lower level"].stats.iterations) <= 2 < int(first.reports["lower level"].stats.iterations)
    assert int(second.reports["adjoint"].stats.products) == 0 < int(first.reports["adjoint"].stats.products)
    bj.check(second)


@pytest.mark.slow
def test_implicit_is_gradient_descent():
    problem, x = upper_problem("kl"), upper_start()
    algorithm = implicit(problem, optax.sgd(0.01))
    state, info = algorithm.step(KEY, algorithm.init(KEY, x))
    made = bj.hypergradient(problem, x, with_error=False)
    jax.tree.map(
        lambda new, old, g: np.testing.assert_allclose(new, old - 0.01 * g, rtol=1e-12), state.x, x, made.gradient
    )
    np.testing.assert_allclose(info.objective, made.value, rtol=1e-12)
    np.testing.assert_allclose(info.stationarity, info.gradient_norm)


@pytest.mark.slow
@pytest.mark.parametrize("method", [bj.Unrolled(200), bj.FiniteDifferences(), bj.ExpectedTrajectories(200)])
def test_implicit_with_other_methods(method):
    problem, x = mixture(), jnp.array([0.5, 0.3, 0.2])
    upper = UpperLevel(optax.sgd(0.01), projection=projections.projection_simplex)
    (state, _), (want, _) = (run(implicit(problem, upper, **made), x, 5) for made in ({"method": method}, {}))
    assert np.linalg.norm(want.x - x) > 0.1
    np.testing.assert_allclose(state.x, want.x, atol=1e-6)


@pytest.mark.slow
def test_one_compilation():
    step = base._step
    problem, optimizer = garnet(), optax.adam(0.1)
    before = step._cache_size()
    for scale, upper in ((1.0, 0.5), (2.0, 0.7)):
        box = jax.tree_util.Partial(projections.projection_box, lower=-0.5, upper=jnp.asarray(upper))
        algorithm = implicit(problem, UpperLevel(optimizer, projection=box))
        state = algorithm.init(KEY, scale * jax.random.normal(KEY, (5, 2)))
        for _ in range(3):
            state, _ = algorithm.step(KEY, state)
    assert step._cache_size() == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_quasi_newton_takes_fewer_iterations(seed):
    problem = bj.problems.make("synthetic", seed=seed, dimension=20)
    x = problem.start(jax.random.key(seed))
    counts = {}
    for name, optimizer in (("lbfgs", optax.lbfgs()), ("adam", optax.adam(0.05)), ("sgd", optax.sgd(0.02))):
        algorithm = implicit(problem, optimizer)
        _, infos = jax.jit(lambda x, a=algorithm: run(a, x, 400))(x)
        reached = np.asarray(infos.gradient_norm) <= 1e-6
        counts[name] = int(np.argmax(reached)) if reached.any() else 401
    assert counts["lbfgs"] <= 100
    assert 2 * counts["lbfgs"] <= min(counts["adam"], counts["sgd"])


@pytest.mark.slow
def test_lbfgs_step_is_finite_and_descends():
    problem, x = mixture(), jnp.array([0.5, 0.3, 0.2])
    unconstrained = bj.BilevelProblem(
        lambda logits: problem.mdp(jax.nn.softmax(logits)),
        bj.ShannonEntropy(0.3),
        lambda logits, s: problem.objective(jax.nn.softmax(logits), s),
    )
    _, infos = jax.jit(lambda x: run(implicit(unconstrained, optax.lbfgs()), x, 15))(jnp.log(x))
    _, plain = jax.jit(lambda x: run(implicit(unconstrained, optax.sgd(1.0)), x, 15))(jnp.log(x))
    assert np.all(np.diff(np.asarray(infos.objective)) <= 1e-12)
    assert float(infos.objective[-1]) < float(plain.objective[-1])
    # The best weights are on the border of the simplex: there logits go to infinity.
    assert float(infos.gradient_norm[-1]) < 1e-3 < float(plain.gradient_norm[-1])


@pytest.mark.slow
def test_many_seeds_and_rates_in_one_program():
    problem = mixture()
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    algorithm = implicit(problem, UpperLevel(optimizer, projection=projections.projection_simplex))

    def final(x, rate):
        state = algorithm.init(KEY, x)
        state = eqx.tree_at(lambda s: s.optimizer_state.hyperparams["learning_rate"], state, rate)
        return jax.lax.scan(lambda s, _: (algorithm.step(KEY, s)[0], None), state, length=10)[0].x

    xs, rates = jnp.asarray(np.random.default_rng(0).dirichlet(np.ones(3), 2)), jnp.array([0.01, 0.05])
    many = jax.jit(jax.vmap(jax.vmap(final, (None, 0)), (0, None)))(xs, rates)
    for i in range(2):
        for j in range(2):
            np.testing.assert_allclose(many[i, j], final(xs[i], rates[j]), rtol=1e-10)


WRONG = [
    (lambda: UpperLevel("adam"), "optimizer: expected GradientTransformation"),
    (lambda: UpperLevel(optax.sgd(0.1), projection=3), "projection: expected a function"),
    (lambda: UpperLevel(optax.sgd(0.1), temperature=3.0), "temperature: expected a function"),
    (lambda: implicit(mixture(), optax.sgd(0.1), method="direct"), "method: expected Method or None"),
    (lambda: implicit(mixture(), optax.sgd(0.1), search="newton"), "search: expected Solver or None"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_bad_input(call, message):
    with pytest.raises(bj.InputError, match=message):
        call()


def test_no_temperature_to_anneal():
    problem = bj.BilevelProblem(
        lambda x: bj.MDP(random_process(0).dense, x, 0.8), bj.Unregularized(), lambda x, s: jnp.sum(s.value)
    )
    upper = UpperLevel(optax.sgd(0.1), temperature=lambda k: 2.0)
    algorithm = implicit(problem, upper)
    with pytest.raises(bj.InputError, match="Unregularized has none to multiply"):
        algorithm.init(KEY, jnp.zeros((STATES, ACTIONS)))


@pytest.mark.slow
def test_a_problem_at_another_temperature_is_of_the_kinds_that_it_was():
    both = bj.problems.make("garnet", states=4, actions=2, branching=2)
    model = bj.problems.make("synthetic", states=4, actions=2)
    simulator = bj.SampledBilevelProblem(
        both.environment, both.reward, bj.ShannonEntropy(0.5), both.loss, discount=0.9, horizon=3
    )
    for problem in (both, model, simulator):
        hot = bj.bilevel.at_temperature(problem, 3.0)
        for kind in (bj.Problem, bj.SampledProblem):
            assert isinstance(hot, kind) == isinstance(problem, kind)
        x = both.start(jax.random.key(0)) if problem is simulator else problem.start(jax.random.key(0))
        own = problem.regularizer(x).temperature
        np.testing.assert_allclose(hot.regularizer(x).temperature, 3 * own, rtol=1e-15)
        if isinstance(problem, bj.SampledProblem):
            assert (hot.horizon, hot.trajectories) == (problem.horizon, problem.trajectories)
            assert hot.environment is problem.environment
            assert hot.discount is problem.discount
    unregularized = bj.BilevelProblem(model.mdp, bj.Unregularized(), model.objective)
    with pytest.raises(bj.InputError, match="Unregularized has none to multiply"):
        bj.bilevel.at_temperature(unregularized, 2.0).regularizer(None)
