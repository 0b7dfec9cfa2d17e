"""Trains an agent of rejax in its own environment, which has no bilevel_jax; `against_peers` starts it.

    python rejax_run.py ALGORITHM TASK SEEDS STEPS

Prints one line of JSON: seconds of the whole training loop of all seeds in one program without compiling, its compile
time, and each seed's return in whole episodes at the end.
"""

import json
import sys
import time

import jax
import numpy as np
import rejax  # type: ignore[reportMissingImports]

# Of rejax's own configs: configs/gymnax/cartpole.yaml and benchmark/breakout_1m.yaml.
SETTINGS = {
    ("PPO", "CartPole-v1"): {
        "agent_kwargs": {"activation": "tanh"},
        "num_envs": 5,
        "num_steps": 100,
        "num_epochs": 5,
        "num_minibatches": 5,
        "learning_rate": 7.5e-4,
        "max_grad_norm": 0.5,
        "ent_coef": 0.01,
    },
    ("SAC", "CartPole-v1"): {
        "agent_kwargs": {"activation": "tanh"},
        "num_envs": 5,
        "buffer_size": 10_000,
        "fill_buffer": 1000,
        "batch_size": 256,
        "learning_rate": 1e-3,
        "num_epochs": 2,
        "polyak": 0.95,
        "target_entropy_ratio": 0.7,
    },
    ("PPO", "Breakout-MinAtar"): {
        "agent_kwargs": {"activation": "tanh"},
        "num_envs": 32,
        "num_steps": 32,
        "num_epochs": 4,
        "num_minibatches": 4,
        "learning_rate": 2.5674e-4,
        "max_grad_norm": 1.0,
        "gamma": 0.995,
        "ent_coef": 0.01,
    },
    # The file is of an older version: its gradient_steps and tau have other names now.
    ("SAC", "Breakout-MinAtar"): {
        "agent_kwargs": {"activation": "tanh"},
        "num_envs": 5,
        "buffer_size": 100_000,
        "fill_buffer": 1_000,
        "batch_size": 100,
        "learning_rate": 1e-3,
        "num_epochs": 5,
        "polyak": 0.99,
        "target_entropy_ratio": 0.5,
    },
}
EPISODES = 32


def main(algorithm: str, task: str, seeds: int, steps: int) -> None:
    kind = getattr(rejax, algorithm)
    agent = kind.create(
        env=task,
        total_timesteps=steps,
        eval_freq=steps,
        skip_initial_evaluation=True,
        **SETTINGS[algorithm, task],
    )
    # One short evaluation at the end instead of many on the way.
    limit = agent.env_params.max_steps_in_episode

    def evaluation(algo, state, key):
        from rejax.evaluate import evaluate  # type: ignore[reportMissingImports]

        return evaluate(algo.make_act(state), key, agent.env, agent.env_params, EPISODES, limit)

    agent = agent.replace(eval_callback=evaluation)
    keys = jax.random.split(jax.random.PRNGKey(0), seeds)
    start = time.perf_counter()
    program = jax.jit(jax.vmap(agent.train)).lower(keys).compile()
    compiling = time.perf_counter() - start
    start = time.perf_counter()
    _, (_, returns) = jax.block_until_ready(program(keys))
    taken = time.perf_counter() - start
    means = np.asarray(returns)[:, -1].mean(-1)
    print(json.dumps({"seconds": taken, "compile_seconds": compiling, "returns": [round(float(r), 2) for r in means]}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
