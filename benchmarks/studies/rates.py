"""How fast the gradient falls: Stoc-SoBiRL against samples, SoBiRL against iterations."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main, make_problem
from bilevel_jax.algorithms.sampled.base import SampledAlgorithm
from bilevel_jax.core.results import where_converged

# Exponents of E|grad phi|^2 that the paper proves: samples^(-1 / 3.5) and 1 / iterations.
PROVED = {"stoc_sobirl": -1 / 3.5, "sobirl": -1.0}


@dataclasses.dataclass(frozen=True)
class RatesOptions:
    """E|grad phi|^2, the mean over the iterates, against samples (Stoc-SoBiRL) and iterations (SoBiRL).

    problem: name and options.
    iterations: of the runs of Stoc-SoBiRL, each with sizes made for it.
    sobirl_iterations: of the runs of SoBiRL.
    step_size: of SoBiRL's gradient descent.
    batch: of SoBiRL, trajectories for each iteration that the run has: the noise falls as 1 / iterations.
    seeds: runs of each length.
    """

    problem: dict[str, Any] = dataclasses.field(
        default_factory=lambda: {"name": "garnet", "discount": 0.8, "horizon": 40}
    )
    iterations: tuple[int, ...] = (10, 22, 46, 100, 220, 460, 1000, 2200)
    sobirl_iterations: tuple[int, ...] = (10, 20, 40, 80, 160)
    step_size: float = 0.3
    batch: float = 10.0
    seeds: int = 8


def run(options: RatesOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write rates.csv (one row per run) and slopes.csv (one row per algorithm: slope and 95% interval)."""
    problem = make_problem(options.problem)
    rows = []
    for count in options.iterations:
        algorithm = bj.algorithms.stoc_sobirl(problem, count)
        rows += _rows("stoc_sobirl", algorithm, count, options.seeds)
        report(f"Stoc-SoBiRL, {count} iterations, {count * algorithm.environment_steps:.3g} samples")
    optimizer = optax.sgd(options.step_size)
    for count in options.sobirl_iterations:
        algorithm = bj.algorithms.sobirl(
            problem,
            optimizer,
            agent=bj.agents.ExactAgent(),
            response=bj.estimators.Exact(),
            batch=max(1, round(options.batch * count)),
        )
        rows += _rows("sobirl", algorithm, count, options.seeds)
        report(f"SoBiRL, {count} iterations")
    write_rows(directory / "rates.csv", rows)
    slopes = [_slope(name, rows) for name in PROVED]
    write_rows(directory / "slopes.csv", slopes)
    for row in slopes:
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        report(f"{row['algorithm']}: slope {row['slope']:.2f} {interval}, proved {row['proved']:.2f}")


def _rows(name: str, algorithm: SampledAlgorithm, count: int, seeds: int) -> list[dict[str, Any]]:
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds, dtype=jnp.uint32))

    @jax.jit
    def squares(algorithm, key):
        state = algorithm.init(jax.random.fold_in(key, 0), algorithm.problem.start(key))

        def step(state, i):
            exact = bj.hypergradient(algorithm.problem, state.x, with_error=False)
            length = where_converged(exact.solution.result, optax.tree.norm(exact.gradient, squared=True))
            return algorithm.step(jax.random.fold_in(key, 1 + i), state)[0], length

        return jnp.mean(jax.lax.scan(step, state, jnp.arange(count))[1])

    values = [float(squares(algorithm, key)) for key in keys]
    samples = count * algorithm.environment_steps
    return [
        {"algorithm": name, "iterations": count, "samples": samples, "seed": seed, "mean_squared_gradient": value}
        for seed, value in enumerate(values)
    ]


def _against(name: str) -> str:
    return "samples" if name == "stoc_sobirl" else "iterations"


def _slope(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Least squares through the means over seeds, in logarithms; the interval by resampling the seeds."""
    own = [row for row in rows if row["algorithm"] == name]
    sizes = sorted({row[_against(name)] for row in own})
    values = np.array([[row["mean_squared_gradient"] for row in own if row[_against(name)] == s] for s in sizes])

    def fit(values: np.ndarray) -> float:
        return float(stats.linregress(np.log(sizes), np.log(values.mean(1))).slope)  # type: ignore[union-attr]

    rng = np.random.default_rng(0)
    count = values.shape[1]
    resampled = [fit(values[:, rng.integers(count, size=count)]) for _ in range(2000)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {
        "algorithm": name,
        "against": _against(name),
        "slope": fit(values),
        "low": float(low),
        "high": float(high),
        "proved": PROVED[name],
    }


def plot(directory: Path) -> None:
    """rates.png: both rates on logarithmic axes, with the fitted and the proved slopes."""
    rows = [
        {**row, "mean_squared_gradient": float(row["mean_squared_gradient"])}
        for row in read_rows(directory / "rates.csv")
    ]
    slopes = {row["algorithm"]: row for row in read_rows(directory / "slopes.csv")}

    def panel(name: str, title: str) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            own = [row for row in rows if row["algorithm"] == name]
            sizes = np.array([float(row[_against(name)]) for row in own])
            values = np.array([row["mean_squared_gradient"] for row in own])
            axes.loglog(sizes, values, ".", alpha=0.4)
            unique = np.unique(sizes)
            means = np.array([values[sizes == s].mean() for s in unique])
            fitted = slopes[name]
            label = f"slope {float(fitted['slope']):.2f} [{float(fitted['low']):.2f}, {float(fitted['high']):.2f}]"
            axes.loglog(unique, means, "o-", label=label)
            proved = means[0] * (unique / unique[0]) ** PROVED[name]
            axes.loglog(unique, proved, "--", color="0.4", label=f"proved: {PROVED[name]:.2f}")
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("steps of the simulator" if name == "stoc_sobirl" else "iterations")
            axes.set_ylabel("mean |hyper-gradient|^2 of the iterates")
            axes.legend(frameon=False, fontsize=8)

        return paint

    draw(directory / "rates.png", panel("stoc_sobirl", "Stoc-SoBiRL"), panel("sobirl", "SoBiRL"))


STUDY = Study("rates", {"rates": RatesOptions()}, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
