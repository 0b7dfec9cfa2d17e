"""What soft PQN reaches on standard tasks, in how many steps and minutes.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.deep.soft_pqn [--only TASK] [--seeds 10] [--steps N]
                                                              [--tried] [--profile]

Every task has its own sizes (`TASKS`); the rest are defaults of `SoftPQN`. All seeds go through one vmapped program,
in float32. After the training each seed's policy is judged over EPISODES whole episodes in the environment's own
rewards: as it is, which is the answer of the regularized problem, and greedily (`greedy`). The settings of `TASKS`
were chosen on seeds of another key. Reported: the interquartile mean over the seeds with its bootstrap interval of
95% (2,000 resamples of seeds), all returns, steps per second of all seeds together without compiling, and the wall
time. Tasks of gymnax need `pip install 'bilevel_jax[gymnax]'`; they are skipped without it. The published returns are
those of gymnax-blines (PPO). `aggregate` is the interquartile mean over all seeds of all tasks of (return - least) /
(published - least), with the interval of a stratified bootstrap, which draws seeds anew within each task (Agarwal et
al. 2021).

With --profile it prints, for 5 seeds, where the time of an update goes instead: to the environment (steps with actions
drawn uniformly), to the network that acts (the same with the agent's policy), and to learning (the rest); and the
floating-point operations of learning per second, of the matrix products alone.

Each task is written when it is done; started again it is skipped. Writes results/soft_pqn.json.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from benchmarks.common.timing import RESULTS, machine

EPISODES = 32
RESAMPLES = 2000
REPORTED, TRIED = 7, 0  # keys of the seeds that are reported, and of those on which settings were chosen

SMALL = {"processes": 32, "steps": 32, "width": 64, "depth": 2, "trace": 0.9, "epochs": 2, "minibatches": 8}
MINATAR = {"processes": 128, "steps": 32, "width": 128, "depth": 2, "trace": 0.65, "epochs": 1, "minibatches": 32}
TASKS: dict[str, dict[str, Any]] = {
    "CartPole-v1": SMALL
    | {"temperature": 0.05, "scale": 0.1, "total": 3e5, "limit": 500, "published": 500.0, "least": 0.0},
    "Acrobot-v1": SMALL
    | {"temperature": 0.02, "scale": 0.1, "total": 5e5, "limit": 500, "published": -78.9, "least": -500.0},
    # Learning from episodes of 1,000 steps, it comes upon the goal, which nobody finds in 200 by chance.
    "MountainCar-v0": SMALL
    | {"observation_scale": (0.5, 0.03), "observation_offset": (-0.3, 0.0), "restart_every": 1000}
    | {"temperature": 0.002, "scale": 0.02, "total": 2e6, "limit": 200, "published": -118.0, "least": -200.0},
    "Breakout-MinAtar": MINATAR
    | {"temperature": 0.1, "scale": 1.0, "total": 3e6, "limit": 1000, "published": 22.9, "least": 0.0},
    "Asterix-MinAtar": MINATAR
    | {"temperature": 0.02, "scale": 1.0, "total": 1e6, "limit": 1000, "published": 15.0, "least": 0.0},
    "Freeway-MinAtar": MINATAR
    | {"temperature": 0.01, "scale": 1.0, "total": 2e6, "limit": 2500, "published": 58.8, "least": 0.0},
    "SpaceInvaders-MinAtar": MINATAR
    | {"temperature": 0.02, "scale": 1.0, "total": 2e6, "limit": 1000, "published": 131.6, "least": 0.0},
}
OURS = {"CartPole-v1": bj.environments.classic.CartPole, "MountainCar-v0": bj.environments.classic.MountainCar}
LEARNING_RATE = 5e-4


def environment_of(name: str) -> Any:
    """The environment, or None where its package is missing."""
    if name in OURS:
        return OURS[name]()
    try:
        import gymnax  # type: ignore[reportMissingImports]
    except ImportError:
        return None
    return bj.environments.GymnaxEnvironment(*gymnax.make(name))


def agent_of(task: dict[str, Any], updates: int) -> Any:
    return bj.agents.SoftPQN(
        bj.networks.Scaled(
            jnp.asarray(task.get("observation_scale", 1.0)),
            jnp.asarray(task.get("observation_offset", 0.0)),
            bj.networks.MLP(width=task["width"], depth=task["depth"], output_scale=0.0),
        ),
        learning_rate=bj.agents.LinearDecay(LEARNING_RATE, 0.05 * LEARNING_RATE, updates),
        restart_every=task.get("restart_every"),
        **{name: task[name] for name in ("processes", "steps", "trace", "epochs", "minibatches")},
    )


def measure(name: str, task: dict[str, Any], seeds: int, total: int, key: int = REPORTED) -> dict[str, Any] | None:
    environment = environment_of(name)
    if environment is None:
        return None
    problem = bj.problems.Task(
        environment, temperature=task["temperature"], scale=task["scale"], discount=0.99, horizon=task["limit"]
    )
    updates = max(1, total // (task["processes"] * task["steps"]))
    agent, x = agent_of(task, updates), jnp.zeros(())

    def run(key: Any) -> Any:
        trained = bj.agents.train(key, agent, problem, x, updates)
        return trained.state, trained.history["episode_return"]

    def judge(key: Any, state: Any, greedy: bool) -> Any:
        policy = agent.policy(state, problem, x)
        judged = bj.environments.TimeLimit(environment, task["limit"])
        return bj.environments.evaluate(
            key, judged, policy, episodes=EPISODES, steps=task["limit"], greedy=greedy
        ).returns.mean()

    def judged(greedy: bool) -> np.ndarray:
        keys = jax.random.split(jax.random.key(1), seeds)
        return np.asarray(jax.jit(jax.vmap(lambda key, state: judge(key, state, greedy)))(keys, state), float)

    keys = jax.random.split(jax.random.key(key), seeds)
    start = time.perf_counter()
    program = jax.jit(jax.vmap(run)).lower(keys).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    state, curve = jax.block_until_ready(program(keys))
    taken = time.perf_counter() - start
    steps = updates * task["processes"] * task["steps"]
    return {
        "published": task["published"],
        **over_seeds(judged(greedy=False)),
        "greedy": over_seeds(judged(greedy=True)),
        "while_training": [
            None if np.isnan(own).all() else round(float(np.nanmean(own)), 2) for own in np.asarray(curve)[:, -10:]
        ],
        "steps_per_seed": steps,
        "seeds": seeds,
        "steps_per_second": round(steps * seeds / taken),
        "seconds": round(taken, 1),
        "compile_seconds": round(compiling, 1),
    }


def profile(name: str, task: dict[str, Any], seeds: int = 5, repeats: int = 20) -> dict[str, Any] | None:
    """Shares of the time of an update, which is that of a loop of `repeats` updates."""
    environment = environment_of(name)
    if environment is None:
        return None
    problem = bj.problems.Task(
        environment, temperature=task["temperature"], scale=task["scale"], discount=0.99, horizon=task["limit"]
    )
    agent, x = agent_of(task, 1000), jnp.zeros(())
    state = jax.jit(jax.vmap(lambda key: agent.init(key, problem, x)))(jax.random.split(jax.random.key(0), seeds))
    dynamics = bj.environments.with_restarts(environment, task["limit"])

    def collected(key: Any, state: Any, policy: Any) -> Any:
        processes = bj.environments.Processes(dynamics, state.processes)
        processes, seen = bj.environments.collect(key, processes, policy, task["steps"])
        # What learning reads has to be made.
        return dataclasses.replace(state, processes=processes.states), sum(
            jnp.sum(leaf) for leaf in jax.tree.leaves((seen.observation, seen.next_observation, seen.reward))
        )

    steps = {
        "environment": lambda key, state: collected(key, state, _Uniform(environment.num_actions)),
        "acting": lambda key, state: collected(key, state, agent.acting(state, problem, x)),
        "all": lambda key, state: (agent.improve(key, state, problem, x), jnp.zeros(())),
    }
    seconds = {}
    for part, step in steps.items():

        def loop(key: Any, state: Any, step: Any = step) -> Any:
            return jax.lax.scan(lambda state, key: step(key, state), state, jax.random.split(key, repeats))

        program = jax.jit(jax.vmap(loop))
        keys = jax.random.split(jax.random.key(1), seeds)
        jax.block_until_ready(program(keys, state))
        times = []
        for _ in range(5):
            start = time.perf_counter()
            jax.block_until_ready(program(keys, state))
            times.append((time.perf_counter() - start) / repeats)
        seconds[part] = float(np.median(times))
    acting = seconds["acting"] - seconds["environment"]
    learning = seconds["all"] - seconds["acting"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params) if leaf.ndim == 3) // seeds  # matrices of a seed
    # Per sample and pass: two operations per weight forward, twice that backward; once more for the targets.
    operations = task["processes"] * task["steps"] * seeds * weights * (6 * task["epochs"] + 2)
    return {
        "milliseconds_per_update": round(1e3 * seconds["all"], 2),
        "environment": round(seconds["environment"] / seconds["all"], 3),
        "acting": round(acting / seconds["all"], 3),
        "learning": round(learning / seconds["all"], 3),
        "gigaflops_of_learning": round(operations / learning / 1e9, 1),
    }


class _Uniform(bj.environments.Policy):
    """All actions alike."""

    actions: int = eqx.field(static=True)

    def distribution(self, observation: Any) -> Any:
        del observation
        return bj.environments.Categorical(jnp.full(self.actions, 1 / self.actions))


def over_seeds(returns: np.ndarray) -> dict[str, Any]:
    """The interquartile mean over seeds, its bootstrap interval, and the returns themselves."""
    rng = np.random.default_rng(0)
    means = [middle(rng.choice(returns, len(returns))) for _ in range(RESAMPLES)]
    return {
        "interquartile_mean": round(middle(returns), 2),
        "interval": [round(float(np.quantile(means, q)), 2) for q in (0.025, 0.975)],
        "returns": [round(float(r), 2) for r in returns],
    }


def middle(returns: np.ndarray) -> float:
    """The interquartile mean: of the middle half of the seeds, those at its ends in part."""
    ordered, count = np.sort(returns), len(returns)
    edges = np.clip(np.arange(count + 1) / count, 0.25, 0.75)
    return float(ordered @ np.diff(edges) / 0.5)


def aggregate(tasks: dict[str, Any]) -> dict[str, Any]:
    """Over tasks: normalized returns, 0 for the least that a task can pay and 1 for the published one."""
    shares = {}
    for name, made in tasks.items():
        least = TASKS[name]["least"]
        shares[name] = (np.asarray(made["returns"]) - least) / (made["published"] - least)
    rng = np.random.default_rng(0)

    def resampled() -> float:
        return middle(np.concatenate([rng.choice(share, len(share)) for share in shares.values()]))

    drawn = [resampled() for _ in range(RESAMPLES)]
    return {
        "tasks": list(shares),
        "interquartile_mean": round(middle(np.concatenate(list(shares.values()))), 3),
        "interval": [round(float(np.quantile(drawn, q)), 3) for q in (0.025, 0.975)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=float, help="of the simulator per seed; by default the task's own")
    parser.add_argument("--tried", action="store_true", help="the seeds on which settings may be chosen")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, and write nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "soft_pqn.json")
    options = parser.parse_args()
    if options.profile:
        for name in options.only:
            print(name, profile(name, TASKS[name]), flush=True)
        return
    done = json.loads(options.out.read_text()) if options.out.exists() else {"tasks": {}}
    for name in options.only:
        if name in done["tasks"]:
            continue
        key = TRIED if options.tried else REPORTED
        made = measure(name, TASKS[name], options.seeds, int(options.steps or TASKS[name]["total"]), key)
        if made is None:
            print(f"{name}: needs gymnax", flush=True)
            continue
        print(name, made, flush=True)
        tasks = done["tasks"] | {name: made}
        done = {"machine": machine(), "aggregate": aggregate(tasks), "tasks": tasks}
        options.out.write_text(json.dumps(done, indent=2) + "\n")


if __name__ == "__main__":
    main()
