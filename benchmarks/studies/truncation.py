"""What is lost by cutting rollouts, and by the one-step form."""

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax.bilevel.sampled_problem import discounts
from bilevel_jax.estimators import Estimate, Exact, LeaveOneOut, OneStep, SharedRollouts, estimate_from, sample_groups

WHOLE = 100  # steps of rollouts that count as not cut


@dataclasses.dataclass(frozen=True)
class TruncationOptions:
    """Bias of truncated rollouts against its bound, and of the one-step form over discount and horizon.

    The estimators are compared on the same trajectories, so that what they share cancels.

    lengths: of the truncated rollouts.
    discount: of the MDP for them.
    discounts, horizons: of the MDPs for the one-step form.
    mdps: Garnet MDPs, over which biases are averaged.
    batches, batch: estimates of each bias, and trajectories of an estimate.
    """

    lengths: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    discount: float = 0.8
    discounts: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
    horizons: tuple[int, ...] = (1, 2, 5, 20, 100)
    mdps: int = 5
    batches: int = 400
    batch: int = 200


def run(options: TruncationOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write truncation.csv and one_step.csv: per case the bias divided by |gradient|, and its standard error."""
    rows = []
    for seed in range(options.mdps):
        problem = bj.problems.make("garnet", discount=options.discount, horizon=60, seed=seed)
        for length in options.lengths:
            # The same random numbers, longer: only what is cut differs.
            whole = SharedRollouts(WHOLE)
            bias, error, bound = _bias(problem, SharedRollouts(length), whole, options, length)
            rows.append({"seed": seed, "length": length, "bias": bias, "standard_error": error, "bound": bound})
        report(f"truncation, MDP {seed}")
    write_rows(directory / "truncation.csv", rows)
    rows = []
    for seed in range(options.mdps):
        for discount in options.discounts:
            for horizon in options.horizons:
                problem = bj.problems.make("garnet", discount=discount, horizon=horizon, seed=seed)
                bias, error, _ = _bias(problem, OneStep(), Exact(), options, 1)
                rows.append(
                    {"seed": seed, "discount": discount, "horizon": horizon, "bias": bias, "standard_error": error}
                )
        report(f"one-step form, MDP {seed}")
    write_rows(directory / "one_step.csv", rows)


def _bias(
    problem: Any, response: Any, reference: Any, options: TruncationOptions, length: int
) -> tuple[float, float, float]:
    """|E g - E g_exact| / |E g_exact|, its standard error, and the bound on it for rollouts of `length` steps."""
    x = jax.tree.map(lambda leaf: 10 * leaf, problem.start(jax.random.key(1)))
    policy = bj.Table(bj.check(bj.hypergradient(problem, x, with_error=False)).solution.policy)

    keys = jax.random.split(jax.random.key(2), options.batches)
    made = _differences(problem, x, policy, response, reference, keys, batch=options.batch)
    difference, whole, charged = (np.asarray(a) for a in made)
    norm = np.linalg.norm(whole.mean(0))
    bias = difference.mean(0)
    spread = difference.var(0, ddof=1).sum() / options.batches
    # The squared length of a mean exceeds that of its expectation by its variance.
    unbiased = np.sqrt(max(0.0, np.sum(bias**2) - spread))
    # x is the reward, up to a constant: |dr| is 1 for each pair, and rollouts that were cut would have met
    # one pair a step, sqrt(2) in norm for two rollouts in different pairs, 2 at most.
    discount = float(problem.discount)
    bound = 2 * discount**length / (1 - discount) * charged.mean() / float(problem.temperature)
    return float(unbiased / norm), float(np.sqrt(spread) / norm), float(bound / norm)


@functools.partial(jax.jit, static_argnames="batch")
def _differences(problem, x, policy, response, reference, keys, batch):
    """Of estimates with the same random numbers; the gradients by the exact response; the sums of |credits|."""

    def one(key):
        for_groups, for_rest = jax.random.split(key)
        groups = sample_groups(for_groups, problem, policy, batch)

        def gradient(response: Any) -> Estimate:
            return estimate_from(for_rest, problem, x, policy, groups, response, None, LeaveOneOut())

        cut, uncut, whole = gradient(response), gradient(reference), gradient(Exact())
        credit = LeaveOneOut().credit(None, problem, policy, groups, whole.costs)
        charged = jnp.mean(jnp.sum(jnp.abs(credit) @ discounts(problem, problem.horizon), 1))
        difference = jax.tree.map(jnp.subtract, cut.gradient, uncut.gradient)
        return ravel_pytree(difference)[0], ravel_pytree(whole.gradient)[0], charged

    return jax.lax.map(one, keys)


def plot(directory: Path) -> None:
    """truncation.png: bias against the length with its bound, and the one-step form's over discount and horizon."""
    cut, one_step = read_rows(directory / "truncation.csv"), read_rows(directory / "one_step.csv")

    def mean(rows: list[dict[str, str]], column: str) -> float:
        return float(np.mean([float(row[column]) for row in rows]))

    def lengths(axes: Any) -> None:
        values = sorted({int(row["length"]) for row in cut})
        for column, label, style in (
            ("bias", "bias", "o-"),
            ("standard_error", "standard error of the bias", ":"),
            ("bound", "bound, discount^length", "--"),
        ):
            heights = [mean([row for row in cut if int(row["length"]) == v], column) for v in values]
            axes.semilogy(values, heights, style, label=label)
        axes.set_xlabel("length of the rollouts")
        axes.set_ylabel("bias / |gradient|")
        axes.legend(frameon=False, fontsize=8)

    def steps(axes: Any) -> None:
        for horizon in sorted({int(row["horizon"]) for row in one_step}):
            own = [row for row in one_step if int(row["horizon"]) == horizon]
            values = sorted({float(row["discount"]) for row in own})
            heights = [mean([row for row in own if float(row["discount"]) == v], "bias") for v in values]
            axes.plot(values, heights, "o-", label=f"horizon {horizon}")
        axes.set_xlabel("discount")
        axes.set_ylabel("bias of the one-step form / |gradient|")
        axes.legend(frameon=False, fontsize=8)

    draw(directory / "truncation.png", lengths, steps)


STUDY = Study("truncation", {"truncation": TruncationOptions()}, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
