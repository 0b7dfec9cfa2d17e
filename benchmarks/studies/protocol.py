"""The paper's protocol of learning a reward from preferences: what the agent's answer in the gradient does."""

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax import preferences as pf
from bilevel_jax.algorithms.labels.sources import segments_of

CONDITIONS = {
    "fresh_0": "own pairs, implicit term 0",
    "fresh_0.1": "own pairs, implicit term 0.1",
    "fresh_1": "own pairs, implicit term 1",
    "bounded_1": "own pairs, implicit term 1, at most as long as the other",
    "fixed_0": "first pairs only, implicit term 0",
    "drlhf": "DRLHF, three networks, disagreement",
    "true": "true reward",
}
REFERENCE = "fresh_0"
FRESH = 1000  # pairs on which the loss of the end is measured
EPISODES = 64


@dataclasses.dataclass(frozen=True)
class ProtocolOptions:
    """A reward r(s, a) learned from outcomes of an agent's own segments, as in Yang, Gao and Yuan (2025), by condition.

    A soft PQN earns the learned reward while it is fitted. A teacher labels pairs of segments by true returns
    (Boltzmann): `first` pairs of the untrained agent, then `count` more every `every` iterations; the newest `capacity`
    are fitted. `implicit term` is the coefficient of the gradient that passes through the agent's answer, estimated by
    one step as in the paper, with a baseline. At the end: the loss on new pairs of the agent's own, and true returns.

    gymnax: an environment of gymnax, which is never told that a game has ended; "" is the cart pole.
    temperature: of the agent's entropy, in units of the reward.
    length: steps of a segment.
    horizon: steps over which returns are summed.
    iterations: each has an update of the agent of `processes` times `steps` steps, and one step of the reward.
    conditions: which of them are run.
    first, count, every, capacity: see above.
    rationality: of the teacher, per unit of true return.
    processes, steps, width: of the agent.
    seeds, first_seed: runs, and the first one's seed.
    """

    gymnax: str = "Breakout-MinAtar"
    conditions: tuple[str, ...] = tuple(CONDITIONS)
    temperature: float = 0.1
    length: int = 25
    horizon: int = 500
    iterations: int = 1000
    first: int = 600
    count: int = 10
    every: int = 8
    capacity: int = 600
    rationality: float = 1.0
    processes: int = 64
    steps: int = 16
    width: int = 128
    seeds: int = 5
    first_seed: int = 100


def run(options: ProtocolOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write protocol.csv, a row per condition and seed, and protocol_table.csv. What has a row is not run again."""
    unknown = [name for name in options.conditions if name not in CONDITIONS]
    if unknown or REFERENCE not in options.conditions:
        got, known = ", ".join(options.conditions), ", ".join(CONDITIONS)
        raise bj.InputError(f"conditions: expected {REFERENCE} and others of {known}, got {got}")
    path = directory / "protocol.csv"
    rows: list[dict[str, Any]] = [dict(row) for row in read_rows(path)] if path.exists() else []
    done = {(row["condition"], int(row["seed"])) for row in rows}
    with jax.enable_x64(False):
        for name in options.conditions:
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            missing = [seed for seed in seeds if (name, seed) not in done]
            one = _program(name, options) if missing else None
            for seed in missing:
                assert one is not None
                began = time.perf_counter()
                loss, returned, labels = (float(number) for number in one(jax.random.key(seed)))
                row = {"condition": name, "seed": seed, "loss": loss, "return": returned, "labels": int(labels)}
                rows.append(row | {"seconds": round(time.perf_counter() - began, 1)})
                write_rows(path, rows)
                report(f"{name} {seed}: loss {loss:.4f}, return {returned:.2f}, {rows[-1]['seconds']} s")
    write_rows(directory / "protocol_table.csv", _table(rows))


def _program(name: str, options: ProtocolOptions) -> Callable[[Any], Any]:
    task = {"gymnax": options.gymnax} if options.gymnax else {"task": "cart_pole"}
    members = 3 if name == "drlhf" else 1
    problem = bj.problems.make(
        "preference_learning",
        **task,
        inputs="state_action",
        scale=1.0,
        members=members,
        temperature=options.temperature,
        length=options.length,
        horizon=options.horizon,
        rationality=options.rationality,
    )
    agent = bj.agents.SoftPQN(
        bj.networks.MLP(width=options.width, output_scale=0.0),
        processes=options.processes,
        steps=options.steps,
        trace=0.65,
        epochs=1,
        minibatches=8,
        restart_every=2 * options.horizon,
        learning_rate=bj.agents.LinearDecay(5e-4, 5e-5, options.iterations),
    )
    labels = bj.algorithms.FreshLabels(
        options.count,
        every=options.every,
        first=options.first,
        capacity=options.capacity,
        candidates=4 if name == "drlhf" else 1,
        budget=options.first if name == "fixed_0" else None,
        rationality=options.rationality,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=1e-4))
    if name == "drlhf":
        algorithm: Any = bj.algorithms.drlhf(problem, optimizer, agent=agent, labels=labels, batch=64)
    else:
        algorithm = bj.algorithms.sobirl_labels(
            problem,
            optimizer,
            agent=agent,
            response=bj.estimators.OneStep(),
            labels=labels,
            judging="outcomes",
            coefficient=0.0 if name == "true" else float(name.split("_")[1]),
            max_ratio=1.0 if name.startswith("bounded") else None,
            batch=64,
            warm_up=0,
            ridge=1e-3,
        )

    @jax.jit
    def one(key: Any) -> Any:
        keys = jax.random.split(key, 5)
        x = problem.start(keys[0])
        if name == "true":
            own = problem.with_true_reward()
            trained = bj.agents.train(keys[1], agent, own, x, options.iterations)
            policy, loss, count = agent.policy(trained.state, own, x), jnp.nan, 0
        else:

            def step(state: Any, number: Any) -> tuple[Any, None]:
                return algorithm.step(jax.random.fold_in(keys[2], number), state)[0], None

            state = lax.scan(step, algorithm.init(keys[1], x), jnp.arange(options.iterations))[0]
            policy, count = algorithm.policy(state), _asked(options, name)
            loss = _loss_of_new_pairs(keys[3], problem, labels.teacher, policy, state.x)
        judged = bj.environments.TimeLimit(problem.environment, options.horizon)
        returned = bj.environments.evaluate(keys[4], judged, policy, episodes=EPISODES, steps=options.horizon)
        return loss, returned.mean, count

    return one


def _asked(options: ProtocolOptions, name: str) -> int:
    """The number of labels that a run asks for."""
    return options.first + (0 if name == "fixed_0" else options.count * (options.iterations // options.every))


def _loss_of_new_pairs(key: Any, problem: Any, teacher: Any, policy: Any, x: Any) -> Any:
    """The objective of the paper at the end: the mean loss of labels on new pairs of the agent's own segments."""
    keys = jax.random.split(key, 4)
    steps = max(problem.horizon, 2 * problem.length)
    processes = -(-2 * FRESH * problem.length // steps)
    simulator = bj.environments.with_restarts(problem.environment, every=problem.horizon)
    states = bj.environments.start_processes(keys[0], simulator, processes)
    shown = bj.environments.collect(keys[1], states, policy, steps, with_states=True)[1]
    segments, found = segments_of(keys[2], problem, shown, 2 * FRESH)
    number = jnp.arange(FRESH, dtype=jnp.int32)
    data = pf.labelled(keys[3], teacher, pf.Preferences(segments, jnp.stack([number, number + FRESH], -1)))
    losses = pf.pair_losses(data, jnp.mean(problem.member_scores(x, segments), 0))
    counts = (data.weight > 0) & found[:FRESH] & found[FRESH:]
    return jnp.mean(losses, where=counts)


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means with half widths of 95% intervals, and the paired differences from `REFERENCE`."""
    by = {(row["condition"], int(row["seed"])): row for row in rows}
    table = []
    for name in CONDITIONS:
        seeds = sorted(seed for condition, seed in by if condition == name)
        if not seeds:
            continue
        made: dict[str, Any] = {"condition": name, "seeds": len(seeds)}
        for number in ("loss", "return"):
            values = [float(by[name, seed][number]) for seed in seeds]
            apart = [value - float(by[REFERENCE, seed][number]) for value, seed in zip(values, seeds, strict=True)]
            made[number], made[f"{number}_half_width"] = _interval(values)
            made[f"{number}_against_0"], made[f"{number}_against_0_half_width"] = _interval(apart)
        table.append(made)
    return table


def _interval(values: list[float]) -> tuple[float, float]:
    from scipy.stats import t

    if len(values) < 2:
        return float(np.mean(values)), math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values))
    return float(np.mean(values)), float(t.ppf(0.975, len(values) - 1) * error)


def plot(directory: Path) -> None:
    """protocol.png: loss and return of each condition, the mean and each seed; returns have intervals of 95%."""
    table, rows = read_rows(directory / "protocol_table.csv"), read_rows(directory / "protocol.csv")

    def panel(number: str, title: str) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            for place, row in enumerate(table):
                width = float(row[f"{number}_half_width"]) if number == "return" else None
                axes.errorbar(float(row[number]), place, xerr=width, fmt="o", capsize=3)
                own = [float(r[number]) for r in rows if r["condition"] == row["condition"]]
                axes.plot(own, [place + 0.2] * len(own), ".", color="0.6", markersize=4)
            axes.set_yticks(range(len(table)), [CONDITIONS[row["condition"]] for row in table], fontsize=8)
            axes.invert_yaxis()
            axes.set_xlabel(title)
            axes.set_xscale("linear" if number == "return" else "log")

        return paint

    draw(directory / "protocol.png", panel("loss", "loss of new pairs"), panel("return", "true return"))


CASES = {"protocol_breakout": ProtocolOptions()}
STUDY = Study("protocol", CASES, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
