"""Bias and variance of the estimators of the hyper-gradient, against the exact one."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from scipy import stats

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax.estimators import (
    Exact,
    LeaveOneOut,
    NestedRollouts,
    NoBaseline,
    SharedRollouts,
    StateBaseline,
    estimate,
)


@dataclasses.dataclass(frozen=True)
class AccuracyOptions:
    """z-tests of every unbiased estimator on random MDPs and Four Rooms, and how its variance falls.

    mdps: Garnet MDPs, with seeds from 0.
    discount, horizon: of the Garnet MDPs; what is cut is worth discount^horizon.
    temperature, rooms_horizon: of Four Rooms.
    trajectories: behind each test.
    batch: trajectories of one estimate; their spread gives the standard error.
    directions: random directions along which each gradient is compared.
    variance_batches: trajectories of an estimate, for how the variance falls with them.
    """

    mdps: int = 20
    discount: float = 0.6
    horizon: int = 30
    temperature: float = 0.005
    rooms_horizon: int = 800
    trajectories: int = 100_000
    batch: int = 100
    directions: int = 3
    variance_batches: tuple[int, ...] = (4, 16, 64, 256)


def run(options: AccuracyOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write accuracy.csv (one row per problem and estimator) and variance.csv (one row per estimator and batch)."""
    cases = [
        (f"garnet {seed}", "garnet", {"discount": options.discount, "horizon": options.horizon, "seed": seed})
        for seed in range(options.mdps)
    ]
    rooms = {"temperature": options.temperature, "horizon": options.rooms_horizon}
    cases.append(("four_rooms", "four_rooms", rooms))
    rows = []
    for label, name, settings in cases:
        problem = bj.problems.make(name, **settings)
        x = _point(problem)
        for estimator, (response, baseline) in estimators(float(problem.discount), name == "four_rooms").items():
            seed = 1 + len(rows)  # each test has samples of its own
            rows.append(
                {"problem": label, "estimator": estimator, **_test(problem, x, response, baseline, options, seed)}
            )
        report(label)
    write_rows(directory / "accuracy.csv", rows)
    tests = sum(int(row["tests"]) for row in rows)
    worst = max(rows, key=lambda row: row["largest_z"])
    alarm = 1 - (1 - 2 * stats.norm.sf(worst["largest_z"])) ** tests
    report(
        f"largest |z| of {tests}: {worst['largest_z']:.2f} ({worst['estimator']}, {worst['problem']}); "
        f"as large by chance in {100 * alarm:.0f}% of such studies"
    )
    problem = bj.problems.make("garnet", discount=options.discount, horizon=options.horizon)
    write_rows(directory / "variance.csv", _variances(problem, options))


def estimators(discount: float, large: bool) -> dict[str, tuple[Any, Any]]:
    """The unbiased estimators, truncated where what is cut is below 1e-4 of what is not."""
    length = math.ceil(math.log(1e-4) / math.log(discount))
    found = {
        "exact response": (Exact(), NoBaseline()),
        "exact response, leave-one-out": (Exact(), LeaveOneOut()),
        "exact response, state baseline": (Exact(), StateBaseline()),
        "shared rollouts": (SharedRollouts(length), LeaveOneOut()),
        "nested rollouts, one visit": (NestedRollouts(length, visits=1), LeaveOneOut()),
    }
    if not large:  # what follows takes 2 length steps for each step of a trajectory
        found["nested rollouts"] = (NestedRollouts(length), LeaveOneOut())
        found["nested rollouts, not coupled"] = (NestedRollouts(length, coupled=False), LeaveOneOut())
    return found


def _point(problem: Any) -> Any:
    """An x that is no stationary point."""
    x = problem.start(jax.random.key(1))
    return jax.tree.map(lambda leaf: 10 * leaf, x)


def _optimal(problem: Any, x: Any) -> tuple[Any, bj.Table]:
    exact = bj.check(bj.hypergradient(problem, x))
    policy = exact.solution.policy
    return exact, bj.Table(policy.reshape(-1, policy.shape[-1]))


def gradients(problem: Any, x: Any, policy: Any, response: Any, baseline: Any, batch: int, count: int, seed: int):
    """`count` independent estimates, each from `batch` groups, as rows [count, |x|]."""
    learned = baseline.init(problem)
    if isinstance(baseline, StateBaseline):  # learned from samples of its own, once
        made = estimate(
            jax.random.fold_in(jax.random.key(seed), count), problem, x, policy, batch=1000, response=Exact()
        )
        learned = baseline.update(learned, problem, made.groups, made.costs)

    keys = jax.random.split(jax.random.key(seed), count)
    return np.asarray(_each(problem, x, policy, response, baseline, learned, keys, batch=batch))


@functools.partial(jax.jit, static_argnames="batch")
def _each(problem, x, policy, response, baseline, learned, keys, batch):
    def one(key):
        made = estimate(
            key, problem, x, policy, batch=batch, response=response, baseline=baseline, baseline_state=learned
        )
        return ravel_pytree(made.gradient)[0]

    return jax.lax.map(one, keys)


def _test(problem: Any, x: Any, response: Any, baseline: Any, options: AccuracyOptions, seed: int) -> dict[str, Any]:
    exact, policy = _optimal(problem, x)
    truth = np.asarray(ravel_pytree(exact.gradient)[0])
    count = options.trajectories // options.batch
    sampled = gradients(problem, x, policy, response, baseline, options.batch, count, seed)
    directions = np.random.default_rng(0).normal(size=(truth.size, options.directions))
    along = sampled @ directions
    error = along.std(0, ddof=1) / np.sqrt(count)
    z = (along.mean(0) - truth @ directions) / error
    return {
        "trajectories": count * options.batch,
        "tests": options.directions,
        "z": " ".join(f"{value:.2f}" for value in z),
        "largest_z": float(np.abs(z).max()),
        "relative_error": float(np.linalg.norm(sampled.mean(0) - truth) / np.linalg.norm(truth)),
        "relative_standard_error": float(np.sqrt(sampled.var(0, ddof=1).sum() / count) / np.linalg.norm(truth)),
        "deviation_of_one_trajectory": float(
            np.sqrt(options.batch * sampled.var(0, ddof=1).sum()) / np.linalg.norm(truth)
        ),
    }


def _variances(problem: Any, options: AccuracyOptions) -> list[dict[str, Any]]:
    x = _point(problem)
    exact, policy = _optimal(problem, x)
    norm = float(np.sum(np.square(np.asarray(exact.gradient))))
    rows = []
    for name, (response, baseline) in estimators(float(problem.discount), large=False).items():
        for batch in options.variance_batches:
            sampled = gradients(problem, x, policy, response, baseline, batch, 400, 3)
            rows.append(
                {"estimator": name, "batch": batch, "relative_variance": float(sampled.var(0, ddof=1).sum()) / norm}
            )
    return rows


def plot(directory: Path) -> None:
    """accuracy.png: all z-values against the normal distribution, and variance against the batch."""
    rows, variances = read_rows(directory / "accuracy.csv"), read_rows(directory / "variance.csv")

    def z_values(axes: Any) -> None:
        for name in dict.fromkeys(row["estimator"] for row in rows):
            z = np.sort([float(v) for row in rows if row["estimator"] == name for v in row["z"].split()])
            normal = stats.norm.ppf((np.arange(z.size) + 0.5) / z.size)
            axes.plot(normal, z, ".", markersize=4, label=name)
        axes.axline((0, 0), slope=1, color="0.4", linewidth=0.8)
        axes.set_xlabel("quantile of the normal distribution")
        axes.set_ylabel("z of the estimate against the exact gradient")
        axes.legend(frameon=False, fontsize=7)

    def falling(axes: Any) -> None:
        for name in dict.fromkeys(row["estimator"] for row in variances):
            own = [row for row in variances if row["estimator"] == name]
            batch = np.array([float(row["batch"]) for row in own])
            variance = np.array([float(row["relative_variance"]) for row in own])
            slope = np.polyfit(np.log(batch), np.log(variance), 1)[0]
            axes.loglog(batch, variance, ".-", label=f"{name}: slope {slope:.2f}")
        axes.set_xlabel("trajectories")
        axes.set_ylabel("variance / |gradient|^2")
        axes.legend(frameon=False, fontsize=7)

    draw(directory / "accuracy.png", z_values, falling)


STUDY = Study("accuracy", {"accuracy": AccuracyOptions()}, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
