"""HPGD of its authors (JAX, CPU): seconds an upper-level iteration, and environment steps a second.

PYTHON -m pip install jax==0.4.21 jaxlib==0.4.21 flax==0.7.4 chex==0.1.85 distrax==0.1.5 gymnax==0.0.6 \
    tensorflow-probability==0.23.0 "scipy<1.13" "numpy<2" pyyaml "setuptools<81"
PYTHON benchmarks/published/hpgd_peer.py --checkout PATH_TO_THEIR_CHECKOUT

PYTHON is one of an environment of its own (3.10 or 3.11): their code needs an older JAX than ours, so
this file imports nothing of ours. Their modules come from a checkout of theirs
(github.com/lasgroup/HPGD, read at 89f3644). The setting is their Four Rooms experiment with
regularization 0.003, as one run: upper-level penalty 3, step 0.1, 5 environments of 2000 steps. One
JSON object goes to stdout, float32 throughout.

`iteration`: their update step (a context drawn, 100 policy updates of 5 sweeps each, rollouts, gradient,
SGD), as a jitted call of one, and as a share of a scan of 20. It also reports an exact upper-level
value, 500 more sweeps; `without reports` returns no reports, and the compiler drops their work.
`rollouts`: the scan of their environment step alone, with their best response as the policy. `whole`
returns all that their transition holds, `used` only the part that their update step reads.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml

EXPERIMENT = "data/experiment_reg_lambda_0_003/config.yaml"
SETTING = {"incentive_reg_param": 3.0, "learning_rate": 0.1, "num_envs": 5, "num_total_steps": 10_000}
SINGLES = 30  # jitted calls of one iteration, each timed
SCANNED = 20  # iterations in one scan
SCANS = 5
ROLLOUTS = {5: (2000, 51), 1024: (200, 7), 16384: (50, 7)}  # environments: (steps, timed repetitions)


def seconds(call: Callable[[], Any], repeats: int, warm_up: int = 2) -> list[float]:
    """Wall seconds of each of `repeats` calls, their results waited for."""
    for _ in range(warm_up):
        jax.block_until_ready(call())
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return taken


def summary(taken: list[float]) -> dict[str, float]:
    return {"median": statistics.median(taken), "min": min(taken), "max": max(taken), "runs": len(taken)}


def iteration(peer: Any, env: Any, config: dict, start: tuple) -> dict:
    update = peer.create_update_step(env, config)
    temperature = jnp.asarray(config["lower_optimisation"]["reg_lambda"])

    def single(step: Callable[[tuple, jax.Array], tuple]) -> dict[str, float]:
        carry = start

        def advance() -> tuple:
            nonlocal carry
            carry, *reports = step(carry, temperature)
            return carry, reports

        return summary(seconds(advance, SINGLES))

    scan = jax.jit(lambda carry: jax.lax.scan(update, carry, jnp.full(SCANNED, temperature)))
    reports = scan(start)[1]
    return {
        "single_call_seconds": single(jax.jit(update)),
        "single_call_without_reports_seconds": single(jax.jit(lambda *arguments: update(*arguments)[:1])),
        f"scan_of_{SCANNED}_seconds_an_iteration": summary([t / SCANNED for t in seconds(lambda: scan(start), SCANS)]),
        "all_reports_finite": all(bool(jnp.isfinite(report).all()) for report in reports.values()),
    }


def rollouts(peer: Any, env: Any, params: Any, config: dict) -> dict:
    env = peer.FlattenObservationWrapper(env)
    lower = config["lower_optimisation"]
    q, _ = peer.general_value_iteration(
        env,
        params,
        gamma=lower["discount_factor"],
        n_policy_iter=lower["n_policy_iter"],
        n_value_iter=lower["n_value_iter"],
        regularization=lower["regularization"],
        reg_lambda=lower["reg_lambda"],
        return_q_value=True,
    )
    # The first goal, drawn as in their update step, and the best response to it.
    params = params.replace(resample_goal_logits=jnp.log(jnp.full(len(q), 1e-16).at[0].set(1.0)))
    agent = peer.TrainState.create(
        apply_fn=lambda table, obs: peer.apply_greedy_policy(table, obs, env.coords),
        params={"best_response_policy": peer.regularized_softmax(q[0], lower["reg_lambda"])},
        tx=peer.optax.identity(),
    )
    views = {"whole": lambda seen: seen, "used": lambda seen: (seen.done, seen.t, seen.state, seen.action)}
    figures: dict = {}
    for count, (steps, repeats) in ROLLOUTS.items():
        env_step = peer.make_env_step_fn(env=env, num_envs=count)
        key_reset, key = jax.random.split(jax.random.PRNGKey(1))
        obs, state = jax.vmap(env.reset, (0, None))(jax.random.split(key_reset, count), params)
        start = (agent, params, state, obs, key)
        for name, view in views.items():
            run = jax.jit(lambda start, env_step=env_step, n=steps, view=view: view(trajectory(env_step, start, n)))
            taken = summary(seconds(lambda run=run, start=start: run(start), repeats))
            figures.setdefault(f"{count} environments, {steps} steps", {})[name] = {
                "steps_a_second": count * steps / taken["median"],
                "seconds": taken,
            }
    return figures


def trajectory(step: Callable, start: tuple, steps: int) -> Any:
    return jax.lax.scan(step, start, None, steps)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    checkout = parser.parse_args().checkout
    sys.path.insert(0, str(checkout))
    peer = importlib.import_module("train_stochastic_bilevel_opt")
    config = yaml.safe_load((checkout / EXPERIMENT).read_text())
    config["upper_optimisation"].update(SETTING, advantage_gradient_sampling="on_policy")
    key_env, key = jax.random.split(jax.random.PRNGKey(config["random_seed"]))
    env, params, incentives, _ = peer.environment_setup(key_env, config)
    figures = {
        "versions": {"python": platform.python_version(), "jax": version("jax"), "jaxlib": version("jaxlib")},
        "machine": {"device": jax.devices()[0].device_kind, "cores": os.cpu_count()},
        "iteration": iteration(peer, env, config, (key, params, incentives)),
        "rollouts": rollouts(peer, env, params, config),
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
