"""What a comparison found: every method tuned on every problem, as rows of tables."""

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.runner.compare.cells import Outcome

RULE = (
    "Every point of a method's grid runs on every seed within the same budget. The point with the least mean final "
    "objective over the tuning seeds is the method's on that problem (a point with a diverged run comes after all "
    "without); what is reported is the final objective at that point over the other seeds."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A method on a problem at its tuned settings: mean and standard error over the reported seeds.

    `reason`: why it does not apply; the numbers are then NaN. `runs` are the reported runs, places in the
    outcome. `diverged` of them have no finite objective; mean and error are then NaN.
    """

    problem: str
    method: str
    reason: str | None
    settings: dict[str, float]
    runs: list[int]
    diverged: int
    mean: float
    standard_error: float
    gradient_norm: float
    iterations: float
    transitions: float
    seconds: float
    compile_seconds: float
    outcome: Outcome
    best: bool = False


def tuned(outcome: Outcome) -> list[int]:
    """The reported runs at the settings that the tuning seeds choose, by `RULE`."""
    assert outcome.curves is not None
    cell, final = outcome.cell, outcome.curves.objective[-1]

    def mean(place: int) -> tuple[int, float]:
        seeds = cell.shared["tuning_seeds"]
        own = np.array([final[run] for run, (at, seed) in enumerate(cell.runs) if at == place and seed in seeds])
        finite = np.isfinite(own)
        return int(np.sum(~finite)), float(np.mean(own[finite])) if finite.any() else np.inf

    best = min(range(len(cell.settings)), key=mean) if len(cell.settings) > 1 else 0
    return [run for run, (at, seed) in enumerate(cell.runs) if at == best and seed in cell.shared["seeds"]]


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """A row a cell, the best methods of each problem marked."""
    made = [_row(outcome) for outcome in outcomes]
    for problem in dict.fromkeys(row.problem for row in made):
        own = [i for i, row in enumerate(made) if row.problem == problem and np.isfinite(row.mean)]
        best = [made[i] for i in sorted(own, key=lambda i: made[i].mean)[:1]]
        for i in own:
            made[i] = dataclasses.replace(made[i], best=_as_good(made[i], best[0]))
    return made


def _as_good(row: Row, best: Row) -> bool:
    """Whether a mean is within two standard errors of the difference to the best, or equal to six digits."""
    error = np.nansum([row.standard_error**2, best.standard_error**2]) ** 0.5
    return bool(row.mean - best.mean <= max(2 * error, 1e-6 * abs(best.mean)))


def _row(outcome: Outcome) -> Row:
    cell, nan = outcome.cell, float("nan")
    names = cell.problem["label"], cell.method["label"]
    curves = outcome.curves
    if curves is None:
        return Row(*names, outcome.reason, {}, [], 0, nan, nan, nan, nan, nan, nan, nan, outcome)
    runs = tuned(outcome)
    final = curves.objective[-1, runs]
    diverged = int(outcome.diverged[runs].sum())
    mean = nan if diverged else float(final.mean())
    error = float(final.std(ddof=1) / np.sqrt(final.size)) if not diverged and final.size > 1 else nan
    settings = cell.settings[cell.runs[runs[0]][0]]
    norm, iterations, transitions, seconds = (
        float(np.mean(column[-1, runs]))
        for column in (curves.gradient_norm, curves.iterations, curves.transitions, curves.seconds)
    )
    return Row(
        *names,
        None,
        settings,
        runs,
        diverged,
        mean,
        error,
        norm,
        iterations,
        transitions,
        seconds,
        outcome.compile_seconds,
        outcome,
    )


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def entry(row: Row) -> str:
    """A row's cell of the table of problems and methods."""
    if row.reason is not None:
        return "-"
    if row.diverged:
        return f"diverged ({row.diverged} of {len(row.runs)})"
    return number(row.mean) if np.isnan(row.standard_error) else f"{_rounded(row.mean, row.standard_error)}"


def _rounded(mean: float, error: float) -> str:
    """Mean ± error, to two digits of the error, and at most eight decimals."""
    decimals = 8 if error == 0 else int(np.clip(1 - np.floor(np.log10(error)), 0, 8))
    # A mean needs no more than six significant digits to be told from another.
    significant = 6 - int(np.floor(np.log10(abs(mean)))) if mean else 6
    decimals = int(np.clip(decimals, 0, max(significant, 2)))
    return (
        f"{mean:.{decimals}f} ± {error:.1g}"
        if error < 10.0**-decimals
        else f"{mean:.{decimals}f} ± {error:.{decimals}f}"
    )


def settings_text(row: Row) -> str:
    """The tuned settings, e.g. 'learning rate 0.1'."""
    return ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in row.settings.items())


def write_curves(path: Path, outcomes: Sequence[Outcome]) -> None:
    """curves.csv: a row a problem, method, grid point, seed and point."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in outcome.cell.method["grid"]))
    columns = ["iterations", "transitions", "seconds", "objective", "gradient_norm"]
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["problem", "method", *keys, "seed", "tuning", "point", *columns])
        for outcome in outcomes:
            cell, curves = outcome.cell, outcome.curves
            if curves is None:
                continue
            for run, (place, seed) in enumerate(cell.runs):
                settings = cell.settings[place]
                same = [cell.problem["label"], cell.method["label"], *(settings.get(key, "") for key in keys)]
                for point in range(len(curves.seconds)):
                    values = [getattr(curves, name)[point, run].item() for name in columns]
                    values = [f"{v:.10g}" if isinstance(v, float) else v for v in values]
                    table.writerow([*same, seed, int(seed in cell.shared["tuning_seeds"]), point, *values])


def write_table(path: Path, made: Sequence[Row]) -> None:
    """table.csv: a row a problem and method, those that do not apply with the reason."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        numbers = ("mean", "standard_error", "gradient_norm", "iterations", "transitions", "seconds", "compile_seconds")
        table.writerow(["problem", "method", "best", "seeds", "diverged", "settings", *numbers, "does_not_apply"])
        for row in made:
            values = [f"{getattr(row, name):.10g}" for name in numbers]
            same = [row.problem, row.method, int(row.best), len(row.runs), row.diverged, settings_text(row)]
            table.writerow([*same, *values, row.reason or ""])


def grid(made: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Problems, methods, and the row of each pair."""
    problems = list(dict.fromkeys(row.problem for row in made))
    methods = list(dict.fromkeys(row.method for row in made))
    return problems, methods, {(row.problem, row.method): row for row in made}


def markdown(made: Sequence[Row]) -> str:
    """Problem by method, the best in bold; what was tuned; and what does not apply, with the reason."""
    problems, methods, pairs = grid(made)

    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    def bold(row: Row) -> str:
        return f"**{entry(row)}**" if row.best else entry(row)

    lines = [line(["method", *problems]), line(["---"] + ["---:"] * len(problems))]
    lines += [line([method, *(bold(pairs[problem, method]) for problem in problems)]) for method in methods]
    lines += ["", line(["problem", "method", "settings", "iterations", "transitions", "seconds a run", "compile s"])]
    lines += [line(["---", "---", "---", "---:", "---:", "---:", "---:"])]
    for row in made:
        if row.reason is None:
            measured = map(number, (row.iterations, row.transitions, row.seconds, row.compile_seconds))
            lines.append(line([row.problem, row.method, settings_text(row) or "-", *measured]))
    reasons = not_applicable(made)
    if reasons:
        lines += ["", "A dash: does not apply.", "", *(f"- {text}" for text in reasons)]
    return "\n".join(lines) + "\n"


def not_applicable(made: Sequence[Row]) -> list[str]:
    """'methods on problems: why', one for the problems that the same methods do not apply to for the same reason."""
    methods: dict[tuple[str, str], list[str]] = {}
    for row in made:
        if row.reason is not None:
            methods.setdefault((row.reason, row.problem), []).append(row.method)
    problems: dict[tuple[str, str], list[str]] = {}
    for (reason, problem), names in methods.items():
        problems.setdefault((reason, ", ".join(names)), []).append(problem)
    return [f"{names} on {', '.join(where)}: {reason}" for (reason, names), where in problems.items()]
