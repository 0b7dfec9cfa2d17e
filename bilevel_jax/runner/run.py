"""One run of a config: the loop with its progress bar, and everything it leaves in the directory."""

import csv
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from tqdm import tqdm

from bilevel_jax.errors import InputError
from bilevel_jax.results import MESSAGES, Result
from bilevel_jax.runner.config import Config
from bilevel_jax.runner.sweep import Chunk, Final, Program, Progress, Record

METRICS = ("run", "iteration", *Record._fields)
RESULTS = (
    "config.yaml",
    "metrics.csv",
    "runs.csv",
    "summary.json",
    "final.npz",
    "learning_curves.png",
    "incentive.png",
)


def run(config: Config, directory: Path) -> dict[str, Any]:
    """Run every point of the config's grid and write the results into `directory`.

    Files: config.yaml (all defaults filled in), metrics.csv (a row each `record_every` iterations and
    run, and a last exact one), runs.csv (a row a run: swept values and outcome), summary.json, and
    final.npz (`x`, `best_x`, `policy`, `value`, one entry a run). The metrics are written while it
    runs, and an interrupted run keeps what it has.

    Results of an earlier run in the same directory are removed first. A run whose objective is not
    finite ends there and is reported as such, the others go on.

    Returns:
      The summary.

    Raises:
      InputError: the directory cannot be written, or no run at all has a finite objective.
    """
    prepare_directory(directory)
    try:
        with jax.enable_x64(config.values["precision"] == "float64"):
            return _run(config, directory)
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error}); give another directory") from None


def _run(config: Config, directory: Path) -> dict[str, Any]:
    (directory / "config.yaml").write_text(yaml.safe_dump(config.values, sort_keys=False))
    started = time.perf_counter()
    program = Program(config)
    finals: list[tuple[Chunk, Final]] = []
    timing = {"compile": 0.0}
    interrupted, diverged = False, None
    with (directory / "metrics.csv").open("w", newline="") as file, _bar(config) as bar:
        rows = csv.writer(file)
        rows.writerow(METRICS)
        chunks = program.chunks()
        timing["compile"] = time.perf_counter() - started
        try:
            for chunk in chunks:
                progress, ended = _advance_all(program, chunk, config, rows, file, bar)
                final = jax.device_get(program.finish(chunk.numbers, progress))
                finals.append((chunk, final))
                if ended is None:
                    rows.writerows(_final_rows(chunk, final, config.values["iterations"]))
                else:
                    diverged = ended
        except KeyboardInterrupt:
            interrupted = True
    if diverged is not None and not any(np.isfinite(final.hypergradient.value).any() for _, final in finals):
        raise InputError(
            f"iteration {diverged}: no run has a finite objective; {MESSAGES[Result.NOT_FINITE]}, or lower "
            f"optimizer.learning_rate. The metrics so far are in {directory / 'metrics.csv'}"
        )
    timing["total"] = time.perf_counter() - started
    summary = _write_results(config, directory, finals, timing, interrupted)
    if interrupted:
        raise KeyboardInterrupt
    return summary


def prepare_directory(directory: Path) -> None:
    """Make the directory, remove an earlier run's results, see that it can be written. Raises InputError."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in RESULTS:
            (directory / name).unlink(missing_ok=True)
        probe = directory / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error}); give another directory") from None


def _bar(config: Config) -> tqdm:
    total = config.values["iterations"] * len(config.grid)
    quiet = 0.1 if sys.stderr.isatty() else 10.0  # seconds between two lines in a log file
    return tqdm(total=total, unit="it", desc=config.name, file=sys.stderr, dynamic_ncols=True, mininterval=quiet)


def _advance_all(
    program: Program, chunk: Chunk, config: Config, rows: Any, file: Any, bar: tqdm
) -> tuple[Progress, int | None]:
    """All iterations of a chunk; and where its last finite run ended, if none went through."""
    progress = program.start(chunk.numbers)
    iterations, every = config.values["iterations"], config.values["record_every"]
    for iteration in range(0, iterations, every):
        steps = min(every, iterations - iteration)
        progress, record = program.advance(chunk.numbers, progress, np.asarray(steps, np.int32))
        record = Record(*(np.asarray(column)[: len(chunk.runs)] for column in record))
        rows.writerows([run, iteration, *(column[i].item() for column in record)] for i, run in enumerate(chunk.runs))
        file.flush()
        if not np.isfinite(record.objective).any():
            return progress, iteration
        best = int(np.argmin(np.where(np.isfinite(record.objective), record.objective, np.inf)))
        now = f"objective {record.objective[best]:.4g}, |hyper-gradient| {record.gradient_norm[best]:.3g}"
        bar.set_postfix_str(now, refresh=False)
        bar.update(steps * len(chunk.runs))
    return progress, None


def _final_rows(chunk: Chunk, final: Final, iteration: int) -> list[list[Any]]:
    exact = final.hypergradient
    norms = _gradient_norms(exact.gradient)

    def worst(column: Any, i: int) -> Any:
        return np.max(column[i]).item()

    return [
        [
            run,
            iteration,
            exact.value[i].item(),
            norms[i].item(),
            worst(exact.solution.result, i),
            worst(exact.solution.stats.error_bound, i),
            worst(exact.stats.result, i),
            worst(exact.stats.error_bound, i),
        ]
        for i, run in enumerate(chunk.runs)
    ]


def _gradient_norms(gradient: Any) -> np.ndarray:
    squares = [np.sum(np.square(leaf).reshape(len(leaf), -1), -1) for leaf in jax.tree.leaves(gradient)]
    return np.sqrt(sum(squares))


def _write_results(
    config: Config, directory: Path, finals: list[tuple[Chunk, Final]], timing: dict[str, float], interrupted: bool
) -> dict[str, Any]:
    grid = config.grid
    records, arrays = [], []
    for chunk, final in finals:
        rows = _final_rows(chunk, final, config.values["iterations"])
        for i, run in enumerate(chunk.runs):
            outcome = dict(zip(METRICS, rows[i], strict=True))
            records.append(
                {
                    **grid[run],
                    "final_value": outcome["objective"],
                    "best_value": float(final.best_objective[i]),
                    "gradient_norm": outcome["gradient_norm"],
                    "result": Result(max(outcome["lower_result"], outcome["adjoint_result"])).name.lower(),
                }
            )
        kept = slice(len(chunk.runs))
        arrays.append(
            {
                **_flat("x", final.x),
                **_flat("best_x", final.best_x),
                "policy": final.hypergradient.solution.policy,
                "value": final.hypergradient.solution.value,
            }
        )
        arrays[-1] = {name: np.asarray(array)[kept] for name, array in arrays[-1].items()}
    if records:
        with (directory / "runs.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, ["run", *records[0]])
            table.writeheader()
            table.writerows({"run": i, **record} for i, record in enumerate(records))
        together: dict[str, Any] = {name: np.concatenate([a[name] for a in arrays]) for name in arrays[0]}
        np.savez(directory / "final.npz", **together)
    finite = [i for i, record in enumerate(records) if np.isfinite(record["final_value"])]
    best = min(finite, key=lambda i: records[i]["final_value"], default=None)
    summary = {
        "config": config.name,
        "runs": len(grid),
        "finished_runs": len(records),
        "interrupted": interrupted,
        "final_value": None if best is None else records[best]["final_value"],
        "best_value": None if best is None else min(records[i]["best_value"] for i in finite),
        "best_run": best,
        "best_run_settings": None if best is None else grid[best],
        "final_gradient_norm": None if best is None else records[best]["gradient_norm"],
        "results": {name: sum(r["result"] == name for r in records) for name in {r["result"] for r in records}},
        "seconds": timing["total"],
        "compile_seconds": timing["compile"],
        "device": str(jax.devices()[0].device_kind),
        "platform": jax.default_backend(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("bilevel_jax", "jax", "jaxlib", "optax", "equinox", "numpy")},
        },
    }
    (directory / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _flat(name: str, tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(flat_names(name, tree)[0], jax.tree.leaves(tree), strict=True))


def flat_names(name: str, tree: Any) -> tuple[list[str], Any]:
    """The names of a pytree's leaves in final.npz, x or x/weights for {"weights": ...}, and its structure."""

    def label(path: tuple[Any, ...]) -> str:
        return "/".join([name, *(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)])

    return [label(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)], jax.tree.structure(tree)
