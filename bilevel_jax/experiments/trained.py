"""What a finished run has learned: its upper variable, and the agent's policy."""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.errors import InputError
from bilevel_jax.core.saving import flat_names, of_run
from bilevel_jax.experiments.config import Config, from_directory
from bilevel_jax.experiments.present.run import policy_like


class Trained(NamedTuple):
    """The result of `trained`: the run's `problem`, its last `x`, and the agent's `policy` there, a `Policy`."""

    problem: Any
    x: Any
    policy: Any


def trained(directory: str | Path, run: int = 0) -> Trained:
    """Read what a finished run of `bilevel-jax run` has learned.

    Call it with the precision of the run set (`jax.enable_x64`). Where the lower level was solved on a model, `policy`
    is the table [S, A].

    Args:
      directory: what --out was.
      run: the number of the run in runs.csv.

    Raises:
      InputError: there is no such run in the directory, or it is of another precision.
      OSError: a file is missing.

    Example (of a directory):
      trained("runs/cart_pole").policy.distribution(observation)
    """
    directory = Path(directory)
    config = from_directory(directory)
    double = config.values["precision"] == "float64"
    if double != (jnp.result_type(float) == jnp.float64):
        raise InputError(
            f"directory: the run is of {config.values['precision']}; call it with jax.enable_x64({double})"
        )
    with (directory / "runs.csv").open(encoding="utf-8") as file:
        numbers = [int(row["run"]) for row in csv.DictReader(file)]
    if run not in numbers:
        raise InputError(f"run: {run!r} is not one of the finished runs of {directory}, {numbers[0]} to {numbers[-1]}")
    with np.load(directory / "final.npz", allow_pickle=False) as final:
        return _read(config, final, numbers.index(run), run)


def _read(config: Config, final: Any, row: int, run: int) -> Trained:
    place, _ = config.cell.runs[run]
    problem = config.cell.problem(place)

    def read(name: str, like: Any) -> Any:
        leaves = [jnp.asarray(of_run(final, one, row, run)) for one in flat_names(name, like)]
        return jax.tree.unflatten(jax.tree.structure(like), leaves)

    x = read("x", jax.eval_shape(problem.start, jax.random.key(0)))
    if any(name == "policy" or name.startswith("policy/run") for name in final.files):
        return Trained(problem, x, jnp.asarray(of_run(final, "policy", row, run)))
    return Trained(problem, x, read("agent", policy_like(config.cell, place)))
