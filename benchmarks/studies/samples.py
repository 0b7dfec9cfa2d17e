"""Samples to quality: what each sampled algorithm reaches with how many steps of the simulator."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optax

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.runs import curves
from benchmarks.studies.study import Study, main, make_problem
from bilevel_jax.core.errors import InputError

ALGORITHMS = ("sobirl", "sobirl_rollouts", "stoc_sobirl", "hpgd", "bc_hg", "zero_order", "naive")
LABELS = {
    "sobirl": "SoBiRL, learned model",
    "sobirl_rollouts": "SoBiRL, rollouts",
    "stoc_sobirl": "Stoc-SoBiRL",
    "hpgd": "HPGD",
    "bc_hg": "BC-HG",
    "zero_order": "zero-order",
    "naive": "naive",
}


@dataclasses.dataclass(frozen=True)
class SamplesOptions:
    """Exact objective against steps of the simulator, for all sampled algorithms on one problem.

    Each algorithm runs with every learning rate of the grid and every seed; at each budget it is judged by
    its best learning rate there. All but stoc_sobirl, whose lower level is sampled and counted, answer
    with the exact optimal policy, as the published experiments do.

    problem: name and options.
    algorithms: which.
    learning_rates: of Adam, the grid that each algorithm is tuned over.
    seeds: runs for each learning rate.
    budget: steps of the simulator of a run.
    points: budgets, evenly spaced in their logarithm, at which the objective is evaluated.
    first: the smallest budget.
    batch: losses an iteration (stoc_sobirl has its own).
    """

    problem: dict[str, Any]
    algorithms: tuple[str, ...] = ALGORITHMS
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    seeds: int = 10
    budget: int = 1_000_000
    points: int = 12
    first: int = 20_000
    batch: int = 10


def run(options: SamplesOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write samples.csv (one row per run and budget) and samples_table.csv (one row per algorithm and budget)."""
    unknown = [name for name in options.algorithms if name not in ALGORITHMS]
    if unknown:
        raise InputError(f"algorithms: no algorithm {unknown[0]!r}; valid: {', '.join(ALGORITHMS)}")
    problem = make_problem(options.problem)
    budgets = np.geomspace(options.first, options.budget, options.points).astype(int)
    rows = []
    for name in options.algorithms:
        for rate, seed, budget, steps, value in _run_algorithm(name, problem, options, budgets):
            rows.append(
                {
                    "algorithm": name,
                    "learning_rate": rate,
                    "seed": seed,
                    "budget": budget,
                    "steps": steps,
                    "objective": value,
                }
            )
        best = [row for row in _table(rows) if row["algorithm"] == name][-1]
        report(f"{name}: {best['mean']:.4f} +- {best['standard_error']:.4f} (Adam {best['learning_rate']:g})")
    write_rows(directory / "samples.csv", rows)
    write_rows(directory / "samples_table.csv", _table(rows))


def _run_algorithm(
    name: str, problem: Any, options: SamplesOptions, budgets: np.ndarray
) -> Iterator[tuple[float, int, int, int, float]]:
    optimizer = optax.inject_hyperparams(optax.adam)(float(options.learning_rates[0]))
    algorithm = build(name, problem, optimizer, options)
    grid = [(float(rate), seed) for rate in options.learning_rates for seed in range(options.seeds)]
    rates, seeds = zip(*grid, strict=True)
    transitions, objective = curves(algorithm, rates, seeds, budgets)
    for point, budget in enumerate(budgets):
        for run, (rate, seed) in enumerate(grid):
            yield rate, seed, int(budget), int(transitions[point, run]), float(objective[point, run])


def build(name: str, problem: Any, optimizer: optax.GradientTransformation, options: SamplesOptions) -> Any:
    """The algorithm that a name of ALGORITHMS stands for."""
    batch = options.batch
    shared: dict[str, Any] = {"batch": batch, "agent": bj.agents.ExactAgent()}
    match name:
        case "sobirl":
            # Losses of several trajectories make more groups of the same ones.
            pairings = min(10, batch) if problem.trajectories > 1 else 1
            made, response = {"baseline": _baseline(problem), "pairings": pairings}, bj.estimators.LearnedModel()
            return bj.algorithms.sobirl(problem, optimizer, response=response, **made, **shared)
        case "sobirl_rollouts":
            # What follows later is worth less than a hundredth.
            length = max(1, math.ceil(math.log(100) / -math.log(max(float(problem.discount), 1e-6))))
            response = bj.estimators.NestedRollouts(min(length, problem.horizon), visits=1)
            return bj.algorithms.sobirl(problem, optimizer, response=response, baseline=_baseline(problem), **shared)
        case "stoc_sobirl":
            return _within(problem, optimizer, options.budget)
    return {
        "hpgd": bj.algorithms.hpgd,
        "bc_hg": functools.partial(bj.algorithms.bc_hg, critic_step_size=0.3),
        "zero_order": functools.partial(bj.algorithms.zero_order, radius=0.1),
        "naive": bj.algorithms.naive,
    }[name](problem, optimizer, **shared)


def _within(problem: Any, optimizer: optax.GradientTransformation, budget: int) -> Any:
    """Stoc-SoBiRL with the sizes for as many iterations as fit the budget."""

    def made(iterations: int) -> Any:
        response, baseline = bj.estimators.LearnedModel(), _baseline(problem)
        return bj.algorithms.stoc_sobirl(problem, iterations, optimizer=optimizer, response=response, baseline=baseline)

    low, high = 1, budget
    while low < high:
        middle = (low + high + 1) // 2
        fits = middle * made(middle).environment_steps <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return made(low)


def _baseline(problem: Any) -> Any:
    by_steps = problem.trajectories == 1 and isinstance(problem.environment, bj.environments.TabularEnvironment)
    return bj.estimators.LearnedAdvantage() if by_steps else bj.estimators.LeaveOneOut()


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds at each algorithm's best learning rate for each budget."""
    groups: dict[tuple[str, int], dict[float, list[float]]] = {}
    for row in rows:
        rates = groups.setdefault((row["algorithm"], int(row["budget"])), {})
        rates.setdefault(float(row["learning_rate"]), []).append(float(row["objective"]))
    table = []
    for (algorithm, budget), rates in groups.items():
        # A run that diverged is worse than any other, not missing.
        means = {rate: float(np.mean(values)) for rate, values in rates.items() if np.all(np.isfinite(values))}
        if not means:
            continue
        best = min(means, key=lambda rate: means[rate])
        values = np.asarray(rates[best])
        table.append(
            {
                "algorithm": algorithm,
                "budget": budget,
                "learning_rate": best,
                "mean": means[best],
                "standard_error": float(values.std(ddof=1) / np.sqrt(values.size)) if values.size > 1 else math.nan,
                "seeds": values.size,
            }
        )
    return table


def plot(directory: Path) -> None:
    """samples.png: one curve per algorithm, with a band of one standard error."""
    rows = read_rows(directory / "samples_table.csv")

    def curves(axes: Any) -> None:
        for algorithm in dict.fromkeys(row["algorithm"] for row in rows):
            own = [row for row in rows if row["algorithm"] == algorithm]
            steps = np.array([float(row["budget"]) for row in own])
            mean, error = (np.array([float(row[k]) for row in own]) for k in ("mean", "standard_error"))
            (line,) = axes.plot(steps, mean, label=LABELS[algorithm], linewidth=1.6)
            axes.fill_between(steps, mean - error, mean + error, color=line.get_color(), alpha=0.18, linewidth=0)
        axes.set_xscale("log")
        axes.set_xlabel("steps of the simulator")
        axes.set_ylabel("exact objective (lower is better)")
        axes.legend(frameon=False, fontsize=8)

    draw(directory / "samples.png", curves)


CASES = {
    "samples_four_rooms": SamplesOptions({"name": "four_rooms", "temperature": 0.005, "beta": 1.0}),
    "samples_reward_shaping": SamplesOptions({"name": "reward_shaping", "horizon": 100}, budget=300_000, first=5_000),
    "samples_tabular_rlhf": SamplesOptions({"name": "tabular_rlhf"}, budget=100_000, first=1_000, batch=20),
}
STUDY = Study("samples", CASES, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
