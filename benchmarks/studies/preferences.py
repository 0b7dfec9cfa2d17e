"""How the ranking of segments is recovered as labels grow: pairs drawn once, or by the policy of the model so far."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.results import where_converged
from bilevel_jax.core.validation import require_positive, require_setting
from bilevel_jax.preferences import fit_linear_reward, misordered_fraction, segment_features

SOURCES = {
    "uniform": "fixed: the uniform policy",
    "first_model": "fixed: the first model's policy",
    "closed_loop": "closed loop: the current model's policy",
}
MEASURES = {
    "misordered": "pairs in the wrong order, of all segments",
    "misordered_optimal": "pairs in the wrong order, as the optimal policy draws them",
    "gain": "true return of the learned policy (0: uniform, 100%: best)",
}


@dataclasses.dataclass(frozen=True)
class PreferencesOptions:
    """Ranking of segments by a reward model fitted to sampled labels, against the number of labels and their source.

    Pairs of segments come from the uniform policy; from the policy that is optimal for a first, random
    reward model; or in a closed loop: in one round for each number of labels, from the policy that is
    optimal for the model fitted to all labels so far, the first model at first. Each seed has its own MDP.

    problem: tabular_rlhf and its options; its seed is that of the first run.
    first: the smallest number of labels.
    most: the largest.
    points: numbers of labels, evenly spaced in their logarithm.
    spread: standard deviation of the first model's weights.
    ridge: weight of |x|^2 / 2 beside the sum of the labels' losses.
    seeds: runs.
    """

    problem: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "tabular_rlhf", "labels": "sampled"})
    first: int = 10
    most: int = 30_000
    points: int = 12
    spread: float = 2.0
    ridge: float = 1.0
    seeds: int = 40


def run(options: PreferencesOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write preferences.csv (one row per run, source and label count) and preferences_table.csv (means over runs).

    The source "true_reward" is the limit of a perfect fit: the teacher's reward times its rationality.
    """
    _check(options)
    labels = tuple(np.unique(np.geomspace(options.first, options.most, options.points).round().astype(int)).tolist())
    rows = []
    for seed in range(options.seeds):
        problem = _problem(options, seed)
        curves = _curves(problem, jax.random.key(seed), options.spread, options.ridge, labels=labels)
        for source, curve in zip((*SOURCES, "true_reward"), np.asarray(curves), strict=True):
            for count, values in zip(labels, curve.tolist(), strict=True):
                measured = dict(zip(MEASURES, values, strict=True))
                rows.append({"source": source, "seed": seed, "labels": count, **measured})
    table = _table(rows)
    write_rows(directory / "preferences.csv", rows)
    write_rows(directory / "preferences_table.csv", table)
    for source in SOURCES:
        last = [row for row in table if row["source"] == source][-1]
        report(
            f"{source}, {last['labels']} labels: {last['misordered']:.2%} of all pairs in the wrong order, "
            f"{last['misordered_optimal']:.2%} of the optimal policy's; {last['gain']:.1%} of the best gain"
        )


def _check(options: PreferencesOptions) -> None:
    if options.problem.get("name") != "tabular_rlhf":
        raise InputError(f"problem: expected tabular_rlhf, whose segments are enumerated, got {options.problem}")
    for name in ("first", "points", "seeds"):
        require_setting(name, getattr(options, name), 1, "10 is usual", whole=True)
    require_setting("most", options.most, options.first, "`first` is the smallest number of labels", whole=True)
    require_setting("spread", options.spread, 0, "2 is that of the teacher's own, times its rationality")
    require_positive("ridge", np.asarray(options.ridge), "few labels alone leave the weights free")


def _problem(options: PreferencesOptions, run: int) -> Any:
    given = {name: value for name, value in options.problem.items() if name != "name"}
    return bj.problems.make("tabular_rlhf", **{**given, "seed": given.get("seed", 0) + run})


@functools.partial(jax.jit, static_argnames="labels")
def _curves(problem: Any, key: jax.Array, spread: Any, ridge: Any, *, labels: tuple[int, ...]) -> jax.Array:
    """The measures of one run, [4, points, 3]: of each source, and of the teacher's reward times its rationality."""
    keys = jax.random.split(key, 3)
    features = segment_features(problem)
    x = spread * jax.random.normal(keys[0], features.shape[1:], features.dtype)
    first = _optimal(problem, problem.reward(x).values)
    even = jnp.full_like(first, 1 / first.shape[-1])
    measure = _measures(problem, even)
    hidden = problem.segments(even, problem.hidden_reward)[2]
    row = jnp.arange(labels[-1])

    def fit_first(count):
        def fitted(x, pairs, label):
            return fit_linear_reward(features[pairs[:count, 0]] - features[pairs[:count, 1]], label[:count], ridge, x)

        return fitted

    def curve(policy, closed):
        def one_round(carry, this):
            x, policy, pairs = carry
            index, known = this
            probability = problem.segments(policy, problem.hidden_reward)[0]
            # The same keys in each round: what was drawn and labelled before stays as it was.
            drawn = jax.random.choice(keys[1], hidden.size, pairs.shape, p=probability)
            pairs = jnp.where(row[:, None] < known, pairs, drawn)
            label = problem.teacher.label(keys[2], *hidden[pairs].T)
            x = lax.switch(index, [fit_first(count) for count in labels], x, pairs, label)
            answer = _optimal(problem, problem.reward(x).values)
            return (x, jnp.where(closed, answer, policy), pairs), measure(features @ x, answer)

        rounds = jnp.arange(len(labels)), jnp.asarray((0, *labels[:-1]))
        return lax.scan(one_round, (x, policy, jnp.zeros((row.size, 2), row.dtype)), rounds)[1]

    policies = jnp.stack([even, first, first])
    curves = lax.map(lambda source: curve(*source), (policies, jnp.array([False, False, True])))
    truth = problem.teacher.rationality.astype(hidden.dtype) * problem.hidden_reward
    limit = measure(hidden, _optimal(problem, truth))
    return jnp.concatenate([curves, jnp.broadcast_to(limit, curves[:1].shape)])


def _measures(problem: Any, even: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """MEASURES of all segments' returns [N] and a policy[S, A]; the gain is 0 for `even` and 1 for the best."""
    answer = _optimal(problem, problem.hidden_reward)
    visited, _, hidden = problem.segments(answer, problem.hidden_reward)
    weights = jnp.stack([jnp.ones_like(visited), visited])
    least, best = (problem.true_return(policy) for policy in (even, _best(problem)))

    def measure(returns, policy):
        gain = (problem.true_return(policy) - least) / (best - least)
        return jnp.append(misordered_fraction(returns, hidden, weights), gain)

    return measure


def _optimal(problem: Any, reward: jax.Array) -> jax.Array:
    """The agent's policy for a reward [S, A]; its regularizer does not depend on x."""
    solution = bj.solve(_process(problem, reward), problem.regularizer(None))
    return where_converged(solution.result, solution.policy)


def _best(problem: Any) -> jax.Array:
    """The policy that earns the most of the hidden reward."""
    solution = bj.solve(_process(problem, problem.hidden_reward), bj.Unregularized())
    return where_converged(solution.result, solution.policy)


def _process(problem: Any, reward: jax.Array) -> bj.MDP:
    return bj.MDP(problem.transition, reward, problem.discount, problem.initial)


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard error over the seeds for each source and number of labels."""
    groups: dict[tuple[str, int], list[list[float]]] = {}
    for row in rows:
        groups.setdefault((row["source"], row["labels"]), []).append([row[name] for name in MEASURES])
    table = []
    for (source, labels), group in groups.items():
        values = np.asarray(group)
        count = len(values)
        errors = values.std(0, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(MEASURES), math.nan)
        made = {name: float(mean) for name, mean in zip(MEASURES, values.mean(0), strict=True)}
        made |= {f"{name}_standard_error": float(error) for name, error in zip(MEASURES, errors, strict=True)}
        table.append({"source": source, "labels": labels, **made, "seeds": count})
    return table


def plot(directory: Path) -> None:
    """preferences.png: one panel per measure, one curve per source, with a band of one standard error."""
    rows = read_rows(directory / "preferences_table.csv")

    def column(source: str, name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows if row["source"] == source])

    def panel(measure: str) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            for source, label in SOURCES.items():
                labels, mean, error = (column(source, k) for k in ("labels", measure, f"{measure}_standard_error"))
                (line,) = axes.plot(labels, mean, ".-", label=label, linewidth=1.6)
                axes.fill_between(labels, mean - error, mean + error, color=line.get_color(), alpha=0.18, linewidth=0)
            axes.set_xscale("log")
            axes.set_xlabel("labelled pairs")
            axes.set_title(MEASURES[measure], fontsize=10)
            labels = column("uniform", "labels")
            if measure == "gain":
                level, label = column("true_reward", measure), "the true reward's policy"
            else:
                axes.set_yscale("log")
                level, label = column("uniform", measure)[0] * (labels / labels[0]) ** -0.5, "slope -1/2"
            axes.plot(labels, level, "--", color="0.4", linewidth=1, label=label)
            axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
            axes.legend(frameon=False, fontsize=8)

        return paint

    draw(directory / "preferences.png", *(panel(measure) for measure in MEASURES))


CASES = {
    "preferences": PreferencesOptions(),
    "preferences_no_noise": PreferencesOptions({"name": "tabular_rlhf", "labels": "sampled", "noise": 0}),
}
STUDY = Study("preferences", CASES, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
