"""The results of a comparison as rows of tables: every algorithm, tuned, on every problem."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bilevel_jax.experiments.directory import write_text
from bilevel_jax.experiments.outcome import Outcome

RULE = (
    "Every point of an algorithm's grid runs on every seed within the same budget. The point with the least mean final "
    "objective over the tuning seeds is the algorithm's on that problem (a point with a diverged run comes after all "
    "without); what is reported is the final objective at that point over the other seeds."
)


@dataclasses.dataclass(frozen=True)
class Row:
    """An algorithm on a problem at its tuned settings: mean and standard error over the reported seeds.

    `reason`: why it does not apply; the numbers are then NaN. `runs` are the reported runs, places in the
    outcome; `ended_by`, the limits that ended them. `diverged` of them have no finite objective; mean and error are
    then NaN.
    """

    problem: str
    algorithm: str
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
    ended_by: tuple[str, ...] = ()
    best: bool = False


def short_names(setting: dict[str, Any]) -> dict[str, Any]:
    """A point of an algorithm's grid without the names of the sections that its keys are of."""
    return {key.removeprefix("optimizer.").removeprefix("algorithm."): value for key, value in setting.items()}


def tuned(outcome: Outcome) -> list[int]:
    """The reported runs at the settings that the tuning seeds choose, by `RULE`."""
    assert outcome.curves is not None
    cell, final = outcome.cell, outcome.curves.objective[-1]

    def mean(place: int) -> tuple[int, float]:
        seeds = cell.tuning_seeds
        own = np.array([final[run] for run, (at, seed) in enumerate(cell.runs) if at == place and seed in seeds])
        finite = np.isfinite(own)
        return int(np.sum(~finite)), float(np.mean(own[finite])) if finite.any() else np.inf

    best = min(range(len(cell.settings)), key=mean) if len(cell.settings) > 1 else 0
    return [run for run, (at, seed) in enumerate(cell.runs) if at == best and seed not in cell.tuning_seeds]


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """Return one row per cell, with the best algorithms of each problem marked."""
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
    names = cell.labels
    curves = outcome.curves
    if curves is None:
        return Row(*names, outcome.reason, {}, [], 0, nan, nan, nan, nan, nan, nan, nan, outcome)
    runs = tuned(outcome)
    final = curves.objective[-1, runs]
    diverged = int(outcome.diverged[runs].sum())
    mean = nan if diverged else float(final.mean())
    error = float(final.std(ddof=1) / np.sqrt(final.size)) if not diverged and final.size > 1 else nan
    settings = short_names(cell.settings[cell.runs[runs[0]][0]])
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
        tuple(dict.fromkeys(outcome.ended_by[run] for run in runs)),
    )


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def entry(row: Row) -> str:
    """A row's cell of the table of problems and algorithms."""
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
    """Write curves.csv: one row per problem, algorithm, grid point, seed and point."""
    keys = list(dict.fromkeys(key for outcome in outcomes for key in short_names(outcome.cell.settings[0])))
    columns = ["iterations", "transitions", "seconds", "objective", "gradient_norm"]
    with io.StringIO() as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["problem", "algorithm", *keys, "seed", "tuning", "point", *columns])
        for outcome in outcomes:
            cell, curves = outcome.cell, outcome.curves
            if curves is None:
                continue
            for run, (place, seed) in enumerate(cell.runs):
                settings = short_names(cell.settings[place])
                same = [*cell.labels, *(settings.get(key, "") for key in keys)]
                for point in range(len(curves.seconds)):
                    values = [getattr(curves, name)[point, run].item() for name in columns]
                    values = [f"{v:.10g}" if isinstance(v, float) else v for v in values]
                    table.writerow([*same, seed, int(seed in cell.tuning_seeds), point, *values])
        write_text(path, file.getvalue())


def write_table(path: Path, made: Sequence[Row]) -> None:
    """Write table.csv: one row per problem and algorithm; the reason where an algorithm does not apply."""
    with io.StringIO() as file:
        table = csv.writer(file, lineterminator="\n")
        numbers = ("mean", "standard_error", "gradient_norm", "iterations", "transitions", "seconds", "compile_seconds")
        table.writerow(
            ["problem", "algorithm", "best", "seeds", "diverged", "settings", *numbers, "ended_by", "does_not_apply"]
        )
        for row in made:
            values = [f"{getattr(row, name):.10g}" for name in numbers]
            same = [row.problem, row.algorithm, int(row.best), len(row.runs), row.diverged, settings_text(row)]
            table.writerow([*same, *values, "; ".join(row.ended_by), row.reason or ""])
        write_text(path, file.getvalue())


def grid(made: Sequence[Row]) -> tuple[list[str], list[str], dict[tuple[str, str], Row]]:
    """Problems, algorithms, and the row of each pair."""
    problems = list(dict.fromkeys(row.problem for row in made))
    algorithms = list(dict.fromkeys(row.algorithm for row in made))
    return problems, algorithms, {(row.problem, row.algorithm): row for row in made}


def markdown(made: Sequence[Row]) -> str:
    """Problem by algorithm, the best in bold; what was tuned; and what does not apply, with the reason."""
    problems, algorithms, pairs = grid(made)

    def line(cells: list[Any]) -> str:
        return "| " + " | ".join(map(str, cells)) + " |"

    def bold(row: Row) -> str:
        return f"**{entry(row)}**" if row.best else entry(row)

    lines = [line(["algorithm", *problems]), line(["---"] + ["---:"] * len(problems))]
    lines += [line([algorithm, *(bold(pairs[problem, algorithm]) for problem in problems)]) for algorithm in algorithms]
    lines += [
        "",
        line(
            [
                "problem",
                "algorithm",
                "settings",
                "iterations",
                "transitions",
                "seconds per run",
                "compile s",
                "ended by",
            ]
        ),
    ]
    lines += [line(["---", "---", "---", "---:", "---:", "---:", "---:", "---"])]
    for row in made:
        if row.reason is None:
            measured = map(number, (row.iterations, row.transitions, row.seconds, row.compile_seconds))
            lines.append(
                line([row.problem, row.algorithm, settings_text(row) or "-", *measured, ", ".join(row.ended_by)])
            )
    reasons = not_applicable(made)
    if reasons:
        lines += ["", "A dash: does not apply.", "", *(f"- {text}" for text in reasons)]
    return "\n".join(lines) + "\n"


def not_applicable(made: Sequence[Row]) -> list[str]:
    """'algorithms on problems: why', one for problems that the same algorithms do not apply to for one reason."""
    algorithms: dict[tuple[str, str], list[str]] = {}
    for row in made:
        if row.reason is not None:
            algorithms.setdefault((row.reason, row.problem), []).append(row.algorithm)
    problems: dict[tuple[str, str], list[str]] = {}
    for (reason, problem), names in algorithms.items():
        problems.setdefault((reason, ", ".join(names)), []).append(problem)
    return [f"{names} on {', '.join(where)}: {reason}" for (reason, names), where in problems.items()]
