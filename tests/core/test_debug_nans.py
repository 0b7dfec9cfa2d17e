"""Nothing that was not computed is a NaN: JAX's own search for NaN finds none where every solve succeeds."""

import jax
import jax.numpy as jnp
import optax
import pytest
from sampled_helpers import garnet

import bilevel_jax as bj
from bilevel_jax.agents import ExactAgent
from bilevel_jax.experiments.cli import main

METHODS = {
    "implicit": bj.Implicit(),
    "unrolled": bj.Unrolled(200),
    "trajectories": bj.ExpectedTrajectories(5),
    "differences": bj.FiniteDifferences(),
    "perturbation": bj.SimultaneousPerturbation(jax.random.key(0), 2),
}


@pytest.fixture(autouse=True)
def _debug_nans():
    with jax.debug_nans(True):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", ["implicit", "unrolled", "trajectories", "perturbation"])
def test_no_error_is_none_in_every_method(name):
    problem = garnet()
    made = bj.hypergradient(problem, jnp.zeros((5, 2)), method=METHODS[name], with_error=False)
    assert made.error is None
    bj.check(made.solution)


@pytest.mark.slow
def test_reports_without_a_bound_say_what_failed():
    made = bj.hypergradient(
        garnet(), jnp.zeros((5, 2)), method=bj.Implicit(bj.ValueIteration(max_iterations=1)), with_error=False
    )
    with pytest.raises(bj.ConvergenceError, match=r"solve: the maximum number of iterations.*largest error bound"):
        bj.check(made)
    outcome = bj.core.results.Outcome("estimate", jnp.asarray(2), None)
    report = type("Report", (), {"outcomes": lambda self: (outcome,)})()
    with pytest.raises(bj.ConvergenceError, match=r"\(1 of 1 failed\)"):
        bj.check(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m_sobirl", "implicit", "naive"])
def test_reports_of_algorithms(name):
    make = getattr(bj.algorithms, name)
    algorithm = make(garnet(), optax.adam(0.1), **({"agent": ExactAgent()} if name == "naive" else {}))
    _, info = algorithm.step(jax.random.key(0), algorithm.init(jax.random.key(0), jnp.zeros((5, 2))))
    assert all(outcome.error_bound is None or jnp.isfinite(outcome.error_bound) for outcome in info.outcomes())
    with jax.debug_nans(False):
        bad = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), info)
        if name == "naive":
            with pytest.raises(bj.ConvergenceError, match="objective or its gradient"):
                bj.check(bad)


@pytest.mark.slow
def test_the_command_line_keeps_its_results(tmp_path):
    (tmp_path / "run.yaml").write_text("problem: {name: synthetic, dimension: 3}\niterations: 20\n")
    assert main(["run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "summary.json").exists()
