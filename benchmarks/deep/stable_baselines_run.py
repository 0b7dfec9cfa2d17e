"""Trains PPO of Stable-Baselines3 in its own environment; `against_peers` starts it.

    python stable_baselines_run.py TASK SEEDS STEPS

Seeds go one after the other, as the library has no way to train several at once. Prints one line of JSON, as
`rejax_run.py` does. MinAtar's tasks need the package minatar.
"""

import json
import sys
import time

import gymnasium  # type: ignore[reportMissingImports]
import numpy as np
import torch  # type: ignore[reportMissingImports]
from stable_baselines3 import PPO  # type: ignore[reportMissingImports]
from stable_baselines3.common.env_util import make_vec_env  # type: ignore[reportMissingImports]
from stable_baselines3.common.evaluation import evaluate_policy  # type: ignore[reportMissingImports]

# Of rl-baselines3-zoo for CartPole; for MinAtar the sizes that our agent has.
SETTINGS = {
    "CartPole-v1": {"envs": 8, "n_steps": 32, "batch_size": 256, "n_epochs": 20, "gae_lambda": 0.8, "gamma": 0.98,
                    "learning_rate": 1e-3, "ent_coef": 0.0},
    "Breakout-MinAtar": {"envs": 64, "n_steps": 256, "batch_size": 2048, "n_epochs": 4, "learning_rate": 5e-4,
                         "ent_coef": 0.01},
}  # fmt: skip


def environment(task: str):
    if not task.endswith("-MinAtar"):
        return task
    from minatar.gym import register_envs  # type: ignore[reportMissingImports]

    register_envs()
    name = f"MinAtar/{task.removesuffix('-MinAtar')}-v1"
    return lambda: gymnasium.wrappers.FlattenObservation(gymnasium.make(name))


def main(task: str, seeds: int, steps: int) -> None:
    torch.set_num_threads(2)
    settings = dict(SETTINGS[task])
    envs = settings.pop("envs")
    taken, returns = 0.0, []
    for seed in range(seeds):
        vector = make_vec_env(environment(task), n_envs=envs, seed=seed)
        agent = PPO("MlpPolicy", vector, seed=seed, device="cpu", **settings)
        start = time.perf_counter()
        agent.learn(steps)
        taken += time.perf_counter() - start
        mean, _ = evaluate_policy(agent, vector, 32, deterministic=True)
        returns.append(round(float(np.asarray(mean)), 2))
    print(json.dumps({"seconds": taken, "compile_seconds": 0.0, "returns": returns}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
