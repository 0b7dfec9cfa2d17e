"""How near sampled lower levels come to the optimal policy, and what a warm start is worth."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from benchmarks.studies.records import draw, read_rows, write_rows
from benchmarks.studies.study import Study, main, make_problem
from bilevel_jax.agents import Agent, policy_gap
from bilevel_jax.core.results import where_converged


@dataclasses.dataclass(frozen=True)
class AgentsOptions:
    """|pi - pi*|^2 of each sampled agent against steps of the simulator, cold and warm-started.

    "cold" starts with nothing; "warm" starts from what was learned in twice the most steps at an x nearby.

    problem: name and options.
    improves: after which numbers of calls of `improve` the gap is measured.
    steps: of the simulator in a call, for 64 parallel processes.
    distance: between the two x, a fraction of a unit normal.
    seeds: runs.
    """

    problem: dict[str, Any] = dataclasses.field(default_factory=lambda: {"name": "garnet", "states": 20})
    improves: tuple[int, ...] = (1, 4, 16, 64, 256)
    steps: int = 1024
    distance: float = 0.1
    seeds: int = 8


def run(options: AgentsOptions, directory: Path, report: Callable[[str], None]) -> None:
    """Write agents.csv, one row per agent, start, number of steps and seed."""
    problem = make_problem(options.problem)
    each = max(1, options.steps // 64)
    features = jnp.eye(problem.environment.num_states)
    agents: dict[str, Agent] = {
        "soft Q-learning": bj.agents.SoftQLearning(steps=each),
        "soft Q-learning, linear": bj.agents.SoftQLearning(steps=each, features=features),
        "soft SARSA": bj.agents.SoftSARSA(steps=each),
        "sampled policy iteration": bj.agents.SampledPolicyIteration(steps=max(1, each // 4), improvements=4),
    }
    rows = []
    for name, agent in agents.items():
        taken = agent.environment_steps(problem)
        gaps = np.asarray(_gaps(agent, problem, options))
        for start, by_seed in zip(("cold", "warm"), gaps, strict=True):
            for seed, gap in enumerate(by_seed):
                rows += [
                    {"agent": name, "start": start, "steps": count * taken, "seed": seed, "gap": float(value)}
                    for count, value in zip(options.improves, gap, strict=True)
                ]
        report(f"{name}: {gaps[0, :, -1].mean():.2g} cold, {gaps[1, :, -1].mean():.2g} warm")
    write_rows(directory / "agents.csv", rows)


def _gaps(agent: Agent, problem: Any, options: AgentsOptions) -> jax.Array:
    """[cold or warm, seeds, numbers of improves]."""
    most = max(options.improves)

    @jax.jit
    def one(agent, problem, key):
        keys = jax.random.split(key, 5)
        x = problem.start(keys[0])
        nearby = x + options.distance * jax.random.normal(keys[1], x.shape, x.dtype)
        solution = bj.solve(problem.mdp(x), problem.regularizer(x))
        optimal = where_converged(solution.result, solution.policy)

        def improved(state, i, x, key):
            return agent.improve(jax.random.fold_in(key, i), state, problem, x)

        def measured(state, key):
            def step(state, i):
                state = improved(state, i, x, key)
                return state, policy_gap(agent.policy(state, problem, x), optimal)

            gaps = jax.lax.scan(step, state, jnp.arange(most))[1]
            return gaps[jnp.asarray(options.improves) - 1]

        cold = agent.init(keys[2], problem, x)
        warm = jax.lax.fori_loop(0, 2 * most, lambda i, s: improved(s, i, nearby, keys[3]), cold)
        return jnp.stack([measured(cold, keys[4]), measured(warm, keys[4])])

    keys = jax.vmap(jax.random.key)(jnp.arange(options.seeds, dtype=jnp.uint32))
    return jnp.stack([one(agent, problem, key) for key in keys], 1)


def plot(directory: Path) -> None:
    """agents.png: geometric means over the seeds; cold solid, warm dashed."""
    rows = read_rows(directory / "agents.csv")

    def curves(axes: Any) -> None:
        for i, name in enumerate(dict.fromkeys(row["agent"] for row in rows)):
            for start, style in (("cold", "o-"), ("warm", "o--")):
                own = [row for row in rows if row["agent"] == name and row["start"] == start]
                steps = sorted({int(row["steps"]) for row in own})
                gaps = [np.log([float(row["gap"]) for row in own if int(row["steps"]) == s]).mean() for s in steps]
                label = name if start == "cold" else None
                axes.loglog(steps, np.exp(gaps), style, color=f"C{i}", markersize=4, label=label)
        axes.set_xlabel("steps of the simulator (dashed: warm-started from an x nearby)")
        axes.set_ylabel("|policy - optimal policy|^2, mean over states")
        axes.legend(frameon=False, fontsize=8)

    draw(directory / "agents.png", curves)


STUDY = Study("agents", {"agents": AgentsOptions()}, run, plot)

if __name__ == "__main__":
    sys.exit(main(STUDY))
