"""`bilevel-jax run`: runs one config with a progress bar, and writes all files of the directory."""

import csv
import io
import json
import os
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from bilevel_jax.algorithms.labels.base import HELD_OUT
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import MESSAGES, Result
from bilevel_jax.core.saving import flat_names
from bilevel_jax.experiments.cells import Cell
from bilevel_jax.experiments.checkpoints import write_arrays
from bilevel_jax.experiments.config import Config
from bilevel_jax.experiments.directory import claimed, write_text
from bilevel_jax.experiments.interruption import InterruptionError, noticed
from bilevel_jax.experiments.outcome import Outcome, Point
from bilevel_jax.experiments.trainer import Event, Trainer
from bilevel_jax.preferences import verdict_of

# What a run without a model ends with beside its objective, with intervals of 95%.
SAMPLED = tuple(f"{name}{part}" for name in ("objective", "return", "greedy_return") for part in ("", "_low", "_high"))[
    1:
]
# What the progress bar shows of an agent, where it reports it.
WATCHED = {
    "agent_episode_return": "return",
    "agent_loss": "loss",
    "agent_critic_loss": "critic loss",
    "agent_policy_loss": "policy loss",
}
PACKAGES = ("bilevel_jax", "jax", "jaxlib", "optax", "equinox", "numpy")


def run(config: Config, directory: Path | None = None, *, fresh: bool = False) -> tuple[dict[str, Any], Path]:
    """Run every point of the config's grid and write the results into `directory`.

    Files: resolved.yaml (all defaults filled in), metrics.csv (one row per run and `record_every` iterations, and an
    exact one at the end), runs.csv (one row per run: swept values and outcome), summary.json, and final.npz (`x`,
    `best_x`, and `policy` and `value` or the leaves of the `agent`'s policy, one entry per run; see `trained`). An
    experiment that is started again with the same directory goes on where it stopped.

    A run whose objective is not finite ends there and is reported as such; the others go on.

    Args:
      config: see `load`.
      directory: None is runs/NAME-TIME.
      fresh: whether to begin anew; what was there is moved away.

    Returns:
      The summary, and the directory.

    Raises:
      InputError: the directory cannot be used (`directory.claimed`), or no run at all has a finite objective.
      InterruptionError: by a signal; the state is kept, and the results of what is finished are written.
    """
    started = time.perf_counter()
    with jax.enable_x64(config.values["precision"] == "float64"), noticed() as stop:
        trainer = Trainer(config.cell)
        if trainer.reason is not None:  # of a combination of swept values
            raise InputError(f"algorithm.name: does not run on a problem of the sweep, which {trainer.reason}")
        with claimed(
            directory, config.name, "run", {**config.values, "digests": config.cell.digests}, fresh=fresh
        ) as place:
            with _Metrics(config, place, trainer.outcome(place)) as metrics:
                interrupted: InterruptionError | None = None
                try:
                    outcome = trainer.run(place, stop, metrics)
                except InterruptionError as signal:
                    outcome, interrupted = trainer.outcome(place), signal
            write_text(place / "metrics.csv", metrics.table(outcome))
            if interrupted is None:
                _require_finite(config, outcome, place)
            summary = _write(config, place, outcome, time.perf_counter() - started, interrupted)
            if interrupted is not None:
                raise interrupted
            return summary, place


def _require_finite(config: Config, outcome: Outcome, directory: Path) -> None:
    """Raise InputError where no run has a finite objective."""
    assert outcome.curves is not None
    if np.isfinite(outcome.final["objective"]).any():
        return
    raise InputError(
        f"iteration {int(outcome.curves.iterations.max())}: no run has a finite objective; "
        f"{MESSAGES[Result.NOT_FINITE]}, or "
        f"lower optimizer.learning_rate. The metrics so far are in {directory / 'metrics.csv'}"
    )


class _Metrics:
    """metrics.csv and the progress bar, while the trainer runs. What is appended is written anew at the end."""

    def __init__(self, config: Config, directory: Path, finished: Outcome):
        self._config, self._path = config, directory / "metrics.csv"
        self._names: list[str] = []
        self._partial: list[dict[str, Any]] = []  # rows of the chunk under way
        self._finished, self._chunk_at = finished, 0

    def __enter__(self) -> "_Metrics":
        grid, values = self._config.grid, self._config.values
        made = len(self._finished.runs)
        quiet = 0.1 if sys.stderr.isatty() else 10.0  # seconds between two lines in a log file
        self._bar = tqdm(
            total=values["iterations"] * len(grid),
            initial=values["iterations"] * made,
            unit="it",
            desc=self._config.name,
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=quiet,
        )
        write_text(self._path, self.table(self._finished) if made else "")
        self._names = self._names if made else []
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.close()

    def __call__(self, event: Event) -> None:
        """Take note of an event of the trainer."""
        if event.what == "restored":
            self._chunk_at = 0
            for point in event.points:
                self._append(self._rows(event.runs, point))
        if event.what == "point" and event.points[-1].recorded.any():
            self._append(self._rows(event.runs, event.points[-1]))
            self._show(event.points[-1])
        if event.what == "chunk":
            # Runs that a limit ended earlier count as done.
            done = self._config.values["iterations"] * len(event.runs)
            self._bar.update(done - self._chunk_at)
            self._chunk_at, self._partial = 0, []
            return
        now = event.iterations * len(event.runs)
        self._bar.update(now - self._chunk_at)
        self._chunk_at = now

    def _show(self, point: Point) -> None:
        objective = np.where(point.recorded, point.columns["objective"], np.nan)
        if np.isfinite(objective).any():
            best = int(np.nanargmin(np.where(np.isfinite(objective), objective, np.nan)))
            norm = point.columns["gradient_norm"][best]
            shown = [f"objective {objective[best]:.4g}", f"|hyper-gradient| {norm:.3g}"]
            for column, label in WATCHED.items():
                if column in point.columns and np.isfinite(point.columns[column][best]):
                    shown.append(f"{label} {point.columns[column][best]:.4g}")
            self._bar.set_postfix_str(", ".join(shown), refresh=False)

    def _rows(self, runs: list[int], point: Point) -> list[dict[str, Any]]:
        return [
            {
                "run": run,
                "iteration": int(point.iterations[i]),
                "transitions": point.transitions[i].item(),
                **{name: _plain(name, column[i]) for name, column in point.columns.items()},
            }
            for i, run in enumerate(runs)
            if point.recorded[i]
        ]

    def _append(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        self._partial += rows
        with self._path.open("a", encoding="utf-8", newline="") as file:
            if not self._names:
                self._names = [*list(rows[0])[:3], *sorted(list(rows[0])[3:], key=_order)]
            table = csv.DictWriter(file, self._names, extrasaction="ignore", lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            table.writerows(rows)

    def table(self, outcome: Outcome) -> str:
        """The whole table, run by run: of what is finished, and then the rows of what is under way."""
        curves = outcome.curves
        columns = list(self._partial[0])[3:] if curves is None and self._partial else getattr(curves, "columns", ())
        names = ["run", "iteration", "transitions", *sorted(columns, key=_order)]
        self._names = names
        text = io.StringIO()
        table = csv.DictWriter(text, names, lineterminator="\n", restval="")
        table.writeheader()
        for i, run in enumerate(outcome.runs):
            assert curves is not None
            for p in range(len(curves.iterations)):
                if curves.recorded[p, i]:
                    columns = {name: _plain(name, column[p, i]) for name, column in curves.columns.items()}
                    start = {"run": run, "iteration": int(curves.iterations[p, i])}
                    table.writerow({**start, "transitions": curves.transitions[p, i].item(), **columns})
            table.writerow(_exact_row(outcome, i, run, names))
        table.writerows({name: row[name] for name in names if name in row} for row in self._partial)
        return text.getvalue()


def _order(column: str) -> tuple[int, str]:
    """What every algorithm reports first, then what this one does."""
    first = ("objective", "gradient_norm", "stationarity")
    return (first.index(column) if column in first else len(first), column)


def _exact_row(outcome: Outcome, i: int, run: int, names: list[str]) -> dict[str, Any]:
    assert outcome.curves is not None
    final = outcome.final
    columns = {
        name.removeprefix("column "): _plain(name, array[i])
        for name, array in final.items()
        if name.startswith("column ")
    }
    row = {
        "run": run,
        "iteration": int(outcome.curves.iterations[-1, i]),
        "transitions": outcome.curves.transitions[-1, i].item(),
        "objective": final["objective"][i].item(),
        "gradient_norm": final["gradient_norm"][i].item(),
        **columns,
    }
    return {name: value for name, value in row.items() if name in names}


def _plain(name: str, value: Any) -> Any:
    if name.endswith("_result"):
        return int(value) if np.isfinite(value) else ""  # none reported, as others of the sweep did
    return value.item()


def _write(
    config: Config, directory: Path, outcome: Outcome, seconds: float, interrupted: InterruptionError | None
) -> dict[str, Any]:
    grid, records = config.grid, []
    final, curves = outcome.final, outcome.curves
    for i, run_ in enumerate(outcome.runs):
        assert curves is not None
        records.append(
            {
                **grid[run_],
                "final_value": final["objective"][i].item(),
                "best_value": final["best_objective"][i].item(),
                "gradient_norm": final["gradient_norm"][i].item(),
                **{
                    name: final[f"column {name}"][i].item()
                    for name in (*SAMPLED, *HELD_OUT)
                    if f"column {name}" in final
                },
                "result": Result(int(final["result"][i])).name.lower(),
                "ended_by": outcome.ended_by[i],
            }
        )
    if records:
        text = io.StringIO()
        table = csv.DictWriter(text, ["run", *records[0]], lineterminator="\n")
        table.writeheader()
        table.writerows({"run": run_, **record} for run_, record in zip(outcome.runs, records, strict=True))
        write_text(directory / "runs.csv", text.getvalue())
        write_arrays(directory / "final.npz", _arrays(config, outcome))
    finite = [i for i, record in enumerate(records) if np.isfinite(record["final_value"])]
    best = min(finite, key=lambda i: records[i]["final_value"], default=None)
    summary = {
        "config": config.name,
        "runs": len(grid),
        "finished_runs": len(records),
        "interrupted": interrupted is not None,
        "final_value": None if best is None else records[best]["final_value"],
        "best_value": None if best is None else min(records[i]["best_value"] for i in finite),
        "best_run": None if best is None else outcome.runs[best],
        "best_run_settings": None if best is None else grid[outcome.runs[best]],
        "final_gradient_norm": None if best is None else records[best]["gradient_norm"],
        "results": _counts(record["result"] for record in records),
        "ended_by": _counts(record["ended_by"] for record in records),
        **_what_labels_judge(records),
        "seconds": seconds,
        "compile_seconds": outcome.compile_seconds,
        **machine(),
    }
    written = {key: None if isinstance(v, float) and not np.isfinite(v) else v for key, v in summary.items()}
    write_text(directory / "summary.json", json.dumps(written, indent=2) + "\n")
    return summary


def _what_labels_judge(records: list[dict[str, Any]]) -> dict[str, Any]:
    """In words, what the labels of each run judge; nothing for runs without labels that were held out."""
    made = {}
    for record in records:
        if np.isfinite(record.get("held_out_error", np.nan)):
            decisions, outcomes, error, pairs = (record[name] for name in HELD_OUT)
            told = verdict_of(outcomes, decisions, error, int(pairs))
            made[told.kind] = (*made.get(told.kind, ()), told.text)
    if not made:
        return {}
    return {"labels": [f"{len(texts)} of {len(records)} runs: {texts[0]}" for texts in made.values()]}


def _counts(names: Any) -> dict[str, int]:
    listed = list(names)
    return {name: listed.count(name) for name in dict.fromkeys(listed)}


def machine() -> dict[str, Any]:
    """What runs were made on, as far as a reader of the seconds has to know."""
    device = jax.devices()[0]
    kind = platform.machine() if device.platform == "cpu" else device.device_kind
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": str(device.device_kind),
        "platform": jax.default_backend(),
        "machine": f"{device.platform.upper()} {kind}, {cores} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _arrays(config: Config, outcome: Outcome) -> dict[str, np.ndarray]:
    """final.npz: x, best_x, policy and value of the finished runs, or the leaves of the agent's policy."""
    names = flat_names("x", _start(config, outcome))
    renamed = {f"x{i}": name for i, name in enumerate(names)}
    renamed |= {f"best_x{i}": name.replace("x", "best_x", 1) for i, name in enumerate(names)}
    renamed |= {"policy": "policy", "value": "value"}
    if "agent0" in outcome.final:
        place, _ = config.cell.runs[outcome.runs[0]]
        renamed |= {f"agent{i}": name for i, name in enumerate(flat_names("agent", policy_like(config.cell, place)))}
    arrays = {}
    for name, array in outcome.final.items():
        whole, slash, run_ = name.partition("/run ")
        if whole in renamed:
            arrays[f"{renamed[whole]}{slash}{run_}"] = array
    return arrays


def policy_like(cell: Cell, place: int) -> Any:
    """The agent's policy at a point of the settings, with shapes for arrays."""
    algorithm = cell.algorithm(place)

    def made(key: Any) -> Any:
        return algorithm.policy(algorithm.init(key, algorithm.problem.start(key)))

    return jax.eval_shape(made, jax.random.key(0))


def _start(config: Config, outcome: Outcome) -> Any:
    place, _ = config.cell.runs[outcome.runs[0]]
    problem = config.cell.problem(place)
    return jax.eval_shape(problem.start, jax.random.key(0))
