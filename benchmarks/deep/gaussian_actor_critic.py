"""What the actor-critic for continuous actions reaches on Pendulum, in how many steps and minutes.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.deep.gaussian_actor_critic [--seeds 10] [--steps 20000]

Sizes are `SIZES`, the rest are defaults of `GaussianActorCritic`. All seeds go through one vmapped program, in float32.
Judged and reported as in `soft_pqn`. Writes results/gaussian_actor_critic.json.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from benchmarks.common.timing import RESULTS, machine
from benchmarks.deep.soft_pqn import EPISODES, over_seeds

LIMIT, GOAL = 200, -200.0
SIZES: dict[str, Any] = {"processes": 16, "steps": 4, "updates": 1}
SIZES |= {"gradient_steps": 16, "batch": 128, "capacity": 50_000}
LEARNING_RATE = 1e-3


def measure(seeds: int, total: int) -> dict[str, Any]:
    environment = bj.environments.classic.Pendulum()
    problem = bj.problems.Task(environment, temperature=0.02, scale=0.1, discount=0.99, horizon=LIMIT)
    network, critic = bj.networks.MLP(width=64, output_scale=0.01), bj.networks.MLP(width=64)
    agent = bj.agents.GaussianActorCritic(network, critic, learning_rate=LEARNING_RATE, **SIZES)
    updates, x = max(1, total // (SIZES["processes"] * SIZES["steps"])), jnp.zeros(())

    def run(key: Any) -> Any:
        return bj.agents.train(key, agent, problem, x, updates).state

    def judge(key: Any, state: Any) -> Any:
        judged = bj.environments.TimeLimit(environment, LIMIT)
        policy = agent.policy(state, problem, x)
        return bj.environments.evaluate(key, judged, policy, episodes=EPISODES, steps=LIMIT, greedy=True).returns.mean()

    keys = jax.random.split(jax.random.key(0), seeds)
    start = time.perf_counter()
    program = jax.jit(jax.vmap(run)).lower(keys).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    state = jax.block_until_ready(program(keys))
    taken = time.perf_counter() - start
    returns = np.asarray(jax.jit(jax.vmap(judge))(jax.random.split(jax.random.key(1), seeds), state), float)
    steps = updates * SIZES["processes"] * SIZES["steps"]
    return {
        "to_reach": GOAL,
        **over_seeds(returns),
        "steps_per_seed": steps,
        "seeds": seeds,
        "steps_per_second": round(steps * seeds / taken),
        "seconds": round(taken, 1),
        "compile_seconds": round(compiling, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "gaussian_actor_critic.json")
    options = parser.parse_args()
    made = measure(options.seeds, options.steps)
    print(made)
    options.out.write_text(json.dumps({"machine": machine(), "tasks": {"Pendulum": made}}, indent=2) + "\n")


if __name__ == "__main__":
    main()
