"""Rewards learned from labels, and what agents trained on them earn where the dynamics have changed."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main
from bilevel_jax.algorithms.labels.sources import FixedPairs
from bilevel_jax.preferences import Preferences
from bilevel_jax.problems.preference_learning import TASKS

DYNAMICS = ("usual", "heavy", "other", "reversed")
CHANGED = ("heavy", "other")
LEARNERS = {
    "full": "through the agent's answer, r(s')",
    "one_step": "the same, one step of it",
    "virtual_step": "through a virtual step, r(s')",
    "drlhf_state": "DRLHF, r(s')",
    "drlhf_pair": "DRLHF, r(s, a)",
    "policy": "policy only",
    "true": "true reward",
}
HELD_OUT = 500
# Of the reward network, as it served each kind of learner on seeds of their own.
SCALES = {"drlhf_state": 0.3, "drlhf_pair": 0.3}
SCALE = 0.1


@dataclasses.dataclass(frozen=True)
class DynamicsOptions:
    """Returns of agents that are trained anew on learned rewards, under usual and under changed dynamics.

    Each seed has its own teacher, pairs and labels, which all learners share. The teacher is a soft PQN that was
    trained on the true reward; it judges decisions by temperature log pi, or outcomes by true rewards. A learned reward
    trains fresh agents, each in one of the dynamics; greedy returns are 0 for uniform actions and 1 for an agent of the
    true reward in the same dynamics. A policy alone is carried over as it is.

    task: see `problems.preference_learning`.
    judging: "decisions" or "outcomes".
    labels: pairs that are labelled.
    rationality: of the teacher, in units of 1 / score.
    iterations: of the learners through the agent's answer; twice as many for the others, which are cheap.
    improvements: updates of an agent that is trained on a reward.
    length: steps of nested rollouts.
    seeds, first_seed, at_once: runs, the first one's seed, and how many go through one program.
    """

    task: str = "cart_pole"
    judging: Literal["decisions", "outcomes"] = "decisions"
    labels: int = 200
    rationality: float = 10.0
    iterations: int = 800
    improvements: int = 400
    length: int = 48
    seeds: int = 8
    first_seed: int = 1000
    at_once: int = 4


def run(options: DynamicsOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write dynamics.csv, one row per seed, learner and dynamics. Parts that have their rows are not run again."""
    path = directory / "dynamics.csv"
    rows: list[dict[str, Any]] = [dict(row) for row in read_rows(path)] if path.exists() else []
    with jax.enable_x64(False):
        for start in range(0, options.seeds, options.at_once):
            seeds = range(options.first_seed + start, options.first_seed + min(start + options.at_once, options.seeds))
            missing = [name for name in LEARNERS if not _has(rows, options, name, seeds)]
            if not missing:
                continue
            keys = jax.vmap(jax.random.key)(jnp.asarray(list(seeds)))
            data = _labels(keys, options)
            for name in sorted(missing, key=lambda name: name != "true"):  # the scale of the others
                began = time.perf_counter()
                made, held_out = _learn(name, keys, data, options)
                returns = made if name == "policy" else {d: _retrain(name, d, keys, made, options) for d in DYNAMICS}
                seconds = (time.perf_counter() - began) / len(keys)
                for dynamics, values in returns.items():
                    random = _random(dynamics, keys, options)
                    for seed, value, least, loss in zip(seeds, values, random, held_out, strict=True):
                        row = {"task": options.task, "judging": options.judging, "labels": options.labels}
                        row |= {"learner": name, "dynamics": dynamics, "seed": seed, "return": float(value)}
                        row |= {"random": float(least), "held_out": float(loss), "seconds": round(seconds, 1)}
                        rows.append(row)
                write_rows(path, rows)
                report(f"{options.task} {options.labels} {name} {seeds[0]}: " + _summary(returns))
    table = _table(rows)
    write_rows(directory / "dynamics_table.csv", table)


def _has(rows: list[dict[str, Any]], options: DynamicsOptions, name: str, seeds: range) -> bool:
    own = {
        int(row["seed"])
        for row in rows
        if (row["task"], row["judging"], row["learner"]) == (options.task, options.judging, name)
        and int(row["labels"]) == options.labels
    }
    return set(seeds) <= own


def _summary(returns: dict[str, Any]) -> str:
    return ", ".join(f"{name} {np.mean(np.asarray(values)):.3g}" for name, values in returns.items())


# The parts of a run; each is one program for all of the seeds at once.


def _problem(options: DynamicsOptions, dynamics: str = "usual", name: str = "full") -> Any:
    inputs, scale = "state_action" if name == "drlhf_pair" else "next_state", SCALES.get(name, SCALE)
    return bj.problems.make("preference_learning", task=options.task, dynamics=dynamics, inputs=inputs, scale=scale)


def _q_network(options: DynamicsOptions) -> Any:
    own = TASKS[options.task]
    return bj.networks.Scaled(own.scale, own.offset, bj.networks.MLP(output_scale=0.0))


def _agent(options: DynamicsOptions, rate: Any, updates: int) -> bj.agents.SoftPQN:
    return bj.agents.SoftPQN(_q_network(options), updates=updates, learning_rate=rate, epsilon=0.05)


def _trained(options: DynamicsOptions, updates: int) -> tuple[bj.agents.SoftPQN, int]:
    """An agent that is trained from the beginning, and its improvements."""
    return _agent(options, bj.agents.LinearDecay(2e-3, 2e-4, updates), 10), max(1, updates // 10)


def _labels(keys: Any, options: DynamicsOptions) -> FixedPairs:
    problem = _problem(options)
    expert, improvements = _trained(options, 2 * options.improvements)
    source = bj.algorithms.SyntheticLabels(
        options.labels,
        HELD_OUT,
        judging=options.judging,
        rationality=options.rationality,
        expert=expert,
        improvements=improvements,
    )
    x = problem.start(keys[0])
    made = jax.jit(jax.vmap(lambda key: source.init(jax.random.fold_in(key, 1), problem, None, x)))(keys)
    return jax.block_until_ready(made)


class Setting(NamedTuple):
    """How a learner is run: the algorithm for some labels, and its number of iterations."""

    algorithm: Callable[[Preferences, Preferences | None], Any]
    iterations: int


def _setting(name: str, options: DynamicsOptions) -> Setting:
    def labels(train: Preferences, held_out: Preferences | None) -> Any:
        return bj.algorithms.GivenLabels(train, held_out)

    short, long = options.iterations, 2 * options.iterations

    def upper(rate: float, count: int) -> optax.GradientTransformation:
        decay = optax.cosine_decay_schedule(rate, count, alpha=0.1)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(decay, weight_decay=1e-4))

    following = _agent(options, 2e-3, 2)
    idle = bj.agents.SoftPQN(_q_network(options), processes=2, steps=2, epochs=1, minibatches=1)
    if name in ("full", "one_step"):
        length = options.length if name == "full" else 1
        response = bj.estimators.NestedRollouts(length, every_action=True)
        optimizer, problem = upper(4e-3, short), _problem(options)

        def through_the_answer(train: Preferences, held_out: Preferences | None) -> Any:
            return bj.algorithms.sobirl_labels(
                problem,
                optimizer,
                agent=following,
                response=response,
                labels=labels(train, held_out),
                warm_up=25,
                ridge=0.1,
            )

        return Setting(through_the_answer, short)
    if name == "virtual_step":
        optimizer, problem = upper(1e-3, short), _problem(options)

        def virtual(train: Preferences, held_out: Preferences | None) -> Any:
            return bj.algorithms.virtual_step(
                problem, optimizer, agent=following, labels=labels(train, held_out), warm_up=25
            )

        return Setting(virtual, short)
    if name == "policy":
        problem = _problem(options)

        def policy(train: Preferences, held_out: Preferences | None) -> Any:
            return bj.algorithms.contrastive(
                problem, network=_q_network(options), labels=labels(train, held_out), learning_rate=1e-3
            )

        return Setting(policy, long)
    optimizer, problem = upper(2e-3, long), _problem(options, name=name)

    def by_returns(train: Preferences, held_out: Preferences | None) -> Any:
        return bj.algorithms.drlhf(problem, optimizer, agent=idle, labels=labels(train, held_out), ridge=1e-2)

    return Setting(by_returns, long)


def _learn(name: str, keys: Any, data: FixedPairs, options: DynamicsOptions) -> tuple[Any, Any]:
    """What was learned by each seed, x or the returns of a policy, and the loss on the pairs that were held out."""
    if name == "true":
        problem = _problem(options)
        return jax.vmap(problem.start)(keys), np.full(len(keys), np.nan)
    setting = _setting(name, options)

    @jax.jit
    @jax.vmap
    def fit(key: Any, own: FixedPairs) -> tuple[Any, Any]:
        algorithm = setting.algorithm(own.train, own.held_out)
        for_start, for_init, for_steps = jax.random.split(jax.random.fold_in(key, 2), 3)
        state = algorithm.init(for_init, algorithm.problem.start(for_start))

        def step(state: Any, number: Any) -> tuple[Any, None]:
            return algorithm.step(jax.random.fold_in(for_steps, number), state)[0], None

        state = lax.scan(step, state, jnp.arange(setting.iterations))[0]
        loss = algorithm.at_the_end(state)["held_out_outcomes" if name.startswith("drlhf") else "held_out_decisions"]
        if name != "policy":
            return state.x, loss
        policy = algorithm.policy(state)
        return {d: _return(_problem(options, d), policy, key) for d in DYNAMICS}, loss

    return jax.block_until_ready(fit(keys, data))


def _retrain(name: str, dynamics: str, keys: Any, xs: Any, options: DynamicsOptions) -> Any:
    problem = _problem(options, dynamics, name)
    agent, improvements = _trained(options, options.improvements)
    own = problem.with_true_reward() if name == "true" else problem
    return np.asarray(_trained_return(agent, problem, own, keys, xs, improvements=improvements))


# Dynamics are leaves of the problem, so that all of them are one program.
@functools.partial(jax.jit, static_argnames="improvements")
def _trained_return(agent: Any, problem: Any, own: Any, keys: Any, xs: Any, *, improvements: int) -> Any:
    def each(key: Any, x: Any) -> Any:
        trained = bj.agents.train(jax.random.fold_in(key, 3), agent, own, x, improvements)
        return _return(problem, agent.policy(trained.state, own, x), key)

    return jax.vmap(each)(keys, xs)


def _random(dynamics: str, keys: Any, options: DynamicsOptions) -> Any:
    problem = _problem(options, dynamics)
    count = problem.environment.num_actions
    uniform = jax.tree_util.Partial(_uniform, jnp.full(count, 1 / count))
    return np.asarray(jax.vmap(lambda key: _return(problem, uniform, key))(keys))


def _uniform(chances: Any, observation: Any) -> Any:
    del observation
    return chances


@jax.jit
def _return(problem: Any, policy: Any, key: Any) -> Any:
    environment = bj.environments.TimeLimit(problem.environment, problem.horizon)
    key, greedy = jax.random.fold_in(key, 4), not isinstance(policy, jax.tree_util.Partial)
    return bj.environments.evaluate(key, environment, policy, episodes=64, steps=problem.horizon, greedy=greedy).mean


# Tables and pictures.


def _table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Normalised returns: mean, standard error, and the paired difference of `full` with its interval of 95%."""
    table = []
    groups = dict.fromkeys((row["task"], row["judging"], int(row["labels"])) for row in rows)
    for task, judging, labels in groups:
        own = [r for r in rows if (r["task"], r["judging"], int(r["labels"])) == (task, judging, labels)]
        scores = _normalised(own)
        for name in LEARNERS:
            for dynamics in (*DYNAMICS, "changed"):
                values = _of(scores, name, dynamics)
                ahead = {seed: _of(scores, "full", dynamics)[seed] - value for seed, value in values.items()}
                mean, error = _mean(list(values.values()))
                difference, spread = _mean(list(ahead.values()))
                losses = [float(r["held_out"]) for r in own if r["learner"] == name and r["dynamics"] == "usual"]
                table.append(
                    {
                        "task": task,
                        "judging": judging,
                        "labels": labels,
                        "learner": name,
                        "dynamics": dynamics,
                        "mean": mean,
                        "standard_error": error,
                        "full_ahead": difference,
                        "half_width": _quantile(len(ahead)) * spread,
                        "held_out": float(np.mean(losses)),
                        "seeds": len(values),
                    }
                )
    return table


def _normalised(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[int, float]]:
    """By learner and dynamics, of each seed: 0 is random, 1 the true reward's mean over the seeds."""
    best: dict[str, float] = {
        d: float(np.mean([float(r["return"]) for r in rows if r["learner"] == "true" and r["dynamics"] == d]))
        for d in DYNAMICS
    }
    least = {d: float(np.mean([float(r["random"]) for r in rows if r["dynamics"] == d])) for d in DYNAMICS}
    made: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        d = row["dynamics"]
        score = (float(row["return"]) - least[d]) / (best[d] - least[d])
        made.setdefault((row["learner"], d), {})[int(row["seed"])] = score
    return made


def _of(scores: dict[tuple[str, str], dict[int, float]], name: str, dynamics: str) -> dict[int, float]:
    """The scores of a learner by seed; "changed" is the mean over `CHANGED`."""
    if dynamics != "changed":
        return scores[name, dynamics]
    parts = [scores[name, d] for d in CHANGED]
    return {seed: float(np.mean([part[seed] for part in parts])) for seed in parts[0]}


def _mean(values: list[float]) -> tuple[float, float]:
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(error)


def _quantile(count: int) -> float:
    """Of Student's t, 97.5%."""
    from scipy.stats import t

    return float(t.ppf(0.975, max(count - 1, 1)))


def plot(directory: Path) -> None:
    """dynamics.png: a panel for each task, judging and number of labels, with bars of each learner and dynamics."""
    rows = read_rows(directory / "dynamics_table.csv")
    groups = list(dict.fromkeys((row["task"], row["judging"], row["labels"]) for row in rows))

    def panel(group: tuple[str, str, str]) -> Callable[[Any], None]:
        def paint(axes: Any) -> None:
            names = [name for name in LEARNERS if name != "true"]
            for place, name in enumerate(names):
                own = {
                    r["dynamics"]: r
                    for r in rows
                    if (r["task"], r["judging"], r["labels"]) == group and r["learner"] == name
                }
                x = np.arange(len(DYNAMICS)) + 0.13 * (place - (len(names) - 1) / 2)
                mean = [float(own[d]["mean"]) for d in DYNAMICS]
                error = [float(own[d]["standard_error"]) for d in DYNAMICS]
                axes.bar(x, mean, 0.12, yerr=error, label=LEARNERS[name], error_kw={"linewidth": 0.8})
            axes.set_xticks(range(len(DYNAMICS)), DYNAMICS)
            axes.set_ylim(-0.6, 1.25)
            axes.axhline(1, color="0.4", linewidth=0.8, linestyle="--")
            axes.set_title(f"{group[0]}, {group[2]} labels of {group[1]}", fontsize=10)
            axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper right")

        return paint

    draw(directory / "dynamics.png", *(panel(group) for group in groups))


CASES = {"dynamics_cart_pole": DynamicsOptions()}
STUDY = Study("dynamics", CASES, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
