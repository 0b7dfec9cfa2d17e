"""Soft PQN against rejax and Stable-Baselines3: the whole training loop of several seeds on two cores.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.deep.against_peers --rejax PYTHON --stable-baselines PYTHON

Each peer runs in an environment of its own, whose interpreter is given (rejax needs gymnax 0.0.9; Stable-Baselines3
needs torch, and minatar for Breakout), with the settings of its own configs. Timed is the training without compiling
and without evaluating; the rate is that of all seeds together. Ours is timed before and after the peers, and the mean
counts. Each agent has the number of steps that is usual for it, and its return after them stands beside the rate: mean
over seeds of 32 whole episodes. An interpreter that is not given leaves its peer out.

Each result is written when it is there; started again, it is skipped. Writes results/agents_against_peers.json.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.timing import RESULTS, machine
from benchmarks.deep.soft_pqn import TASKS, measure

SEEDS = 5
HERE = Path(__file__).parent
# By task and agent: steps per seed, and the number of seeds.
RUNS = {
    "CartPole-v1": {
        "ours": (300_000, SEEDS),
        "rejax PPO": (300_000, SEEDS),
        "rejax SAC": (50_000, SEEDS),
        "Stable-Baselines3 PPO": (100_000, 2),
    },
    "Breakout-MinAtar": {
        "ours": (1_000_000, SEEDS),
        "rejax PPO": (300_000, SEEDS),
        "rejax SAC": (3_000, SEEDS),
        "Stable-Baselines3 PPO": (100_000, 2),
    },
}


def ours(task: str, steps: int, seeds: int) -> dict[str, Any] | None:
    made = measure(task, TASKS[task], seeds, steps)
    if made is None:
        return None
    total = made["steps_per_seed"] * seeds
    return _row(total, made["seconds"], made["compile_seconds"], made["returns"], made["steps_per_seed"])


def peer(command: list[str], steps: int, seeds: int) -> dict[str, Any]:
    made = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return _row(steps * seeds, made["seconds"], made["compile_seconds"], made["returns"], steps)


def _row(total: int, seconds: float, compiling: float, returns: list[float], steps: int) -> dict[str, Any]:
    return {
        "steps_per_second": round(total / seconds),
        "seconds": round(seconds, 1),
        "compile_seconds": round(compiling, 1),
        "steps_per_seed": steps,
        "seeds": len(returns),
        "mean_return": round(float(np.mean(returns)), 1),
        "returns": returns,
    }


def command_of(agent: str, task: str, steps: int, seeds: int, options: Any) -> list[str] | None:
    """How a peer is started; None where its interpreter was not given."""
    library, algorithm = agent.split(" ")
    if library == "rejax":
        script = [str(HERE / "rejax_run.py"), algorithm, task, str(seeds), str(steps)]
        return None if options.rejax is None else [options.rejax, *script]
    script = [str(HERE / "stable_baselines_run.py"), task, str(seeds), str(steps)]
    return None if options.stable_baselines is None else [options.stable_baselines, *script]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rejax", help="a Python that has rejax and gymnax 0.0.9")
    parser.add_argument("--stable-baselines", help="a Python that has stable-baselines3, torch and minatar")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--out", type=Path, default=RESULTS / "agents_against_peers.json")
    options = parser.parse_args()
    done = json.loads(options.out.read_text()) if options.out.exists() else {"tasks": {}}
    for task in options.only:
        rows = done["tasks"].setdefault(task, {})
        for agent, (steps, seeds) in [*RUNS[task].items(), ("ours, again", RUNS[task]["ours"])]:
            if agent in rows:
                continue
            if agent.startswith("ours"):
                made = ours(task, steps, seeds)
            else:
                command = command_of(agent, task, steps, seeds, options)
                made = None if command is None else peer(command, steps, seeds)
            if made is None:
                continue
            rows[agent] = made
            own = [row["steps_per_second"] for name, row in rows.items() if name.startswith("ours")]
            for row in rows.values():
                row["times_slower_than_ours"] = round(float(np.mean(own)) / row["steps_per_second"], 2)
            print(task, agent, made, flush=True)
            options.out.write_text(json.dumps({"machine": machine(), "tasks": done["tasks"]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
