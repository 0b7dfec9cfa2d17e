"""A run of HPGD by its authors' code, in pieces: `hpgd_wall_time.py` calls it, one JSON object in, one out.

PYTHON of `hpgd_peer.py`, whose docstring says how to make its environment; nothing of ours is imported. In:

  checkout: path of theirs.
  temperature, beta, rate: of the run (learning rate); all else as in their configuration of that temperature.
  iterations, block: how many, and after how many each the weights are handed out.
  seed: of a start; or key and weights: from where the last piece ended.

Out: `compile_seconds`, of lowering and compiling the block; `seconds`, from the start of the piece to the end of each
block; `weights` after each block; `start`, the weights before the first; `key`, for the next piece. The update step's
reports (an exact value of 500 more sweeps an iteration, mainly) are not returned, so that the compiler drops them.
"""

import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml


def main() -> None:
    asked = json.load(sys.stdin)
    checkout = Path(asked["checkout"])
    sys.path.insert(0, str(checkout))
    peer: Any = importlib.import_module("train_stochastic_bilevel_opt")
    name = "data/experiment_reg_lambda_" + f"{asked['temperature']:g}".replace(".", "_")
    config = yaml.safe_load((checkout / name / "config.yaml").read_text())
    upper = config["upper_optimisation"]
    upper.update(learning_rate=asked["rate"], incentive_reg_param=asked["beta"])
    upper["advantage_gradient_sampling"] = "on_policy"
    for_env, key = jax.random.split(jax.random.PRNGKey(asked.get("seed", 0)))
    env, params, incentives, _ = peer.environment_setup(for_env, config)
    if "weights" in asked:
        weights = {"params": {"weights": jnp.asarray(asked["weights"], jnp.float32)}}
        incentives = incentives.replace(params=weights)
        params = params.replace(incentive_params=weights)
        key = jnp.asarray(asked["key"], jnp.uint32)
    update = peer.create_update_step(env, config)
    temperatures = jnp.full(asked["block"], config["lower_optimisation"]["reg_lambda"])

    def block(carry: tuple, temperatures: jax.Array) -> tuple:
        return jax.lax.scan(lambda carry, temperature: (update(carry, temperature)[0], None), carry, temperatures)[0]

    carry = (key, params, incentives)
    start = time.perf_counter()
    compiled = jax.jit(block).lower(carry, temperatures).compile()
    out: dict[str, Any] = {"compile_seconds": time.perf_counter() - start, "seconds": [], "weights": []}
    out["start"] = incentives.params["params"]["weights"].tolist()
    start = time.perf_counter()
    for _ in range(asked["iterations"] // asked["block"]):
        carry = jax.block_until_ready(compiled(carry, temperatures))
        out["seconds"].append(time.perf_counter() - start)
        out["weights"].append(carry[2].params["params"]["weights"].tolist())
    out["key"] = carry[0].tolist()
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
