"""M-SoBiRL an iteration: ours against the authors' PyTorch code, same problem, same work, one machine.

python -m benchmarks.published.m_sobirl_against_authors --peer PATH_TO_THEIR_CHECKOUT --peer-python PYTHON_WITH_TORCH

Their module is imported from a checkout of theirs (github.com/UCAS-YanYang/SoBiRL), told to use the
CPU, its logging replaced by a clock. It hands over its random problem, so that both run the same one,
and the hyper-gradient norms of both are compared.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ITERATIONS = 100  # of theirs, each timed; the norms of as many are compared
RESTARTS = 10  # the same iterations in one call of ours: theirs counts no start of the program either
SHAPE = {"states": 10, "actions": 5, "dimension": 100}

PEER = """
import builtins, json, sys, time, types
import numpy as np, torch
path, out, iterations = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(int(sys.argv[4]))
class Done(Exception): pass
stamps, norms = [], []
class Clock:
    def __init__(self, *a, **k): stamps.append(time.perf_counter())
    def add_text(self, *a, **k): stamps[0] = time.perf_counter()
    def add_scalar(self, name, value, step):
        if name != "hyper_grad": return
        stamps.append(time.perf_counter()); norms.append(float(value))
        if len(norms) == iterations: raise Done
wandb = types.ModuleType("wandb")
wandb.init = lambda **k: None
wandb.tensorboard = types.SimpleNamespace(patch=lambda **k: None)
sys.modules["wandb"] = wandb
board = types.ModuleType("torch.utils.tensorboard"); board.SummaryWriter = Clock
sys.modules["torch.utils.tensorboard"] = board
sys.path.insert(0, path + "/SyntheticProblem")
import RanMDP as peer
torch.set_default_dtype(torch.float64)
peer.device = "cpu"
args = types.SimpleNamespace(gamma=0.5, seed=3, gym_id="RanMDP", exp_name="b", wandb_project_name="", wandb_entity=None)
np.random.seed(0); torch.manual_seed(0)
env = peer.RandMDP(10, 5, args)
start = env.x.detach().clone()
torch.manual_seed(args.seed)
first_adjoint = torch.randn((10, 1))
print_ = builtins.print
builtins.print = lambda *a, **k: None
try: env.M_SoBiRL()
except Done: pass
builtins.print = print_
np.savez(out, transition=env.transition_probs, coefficient=env.rewards_coef, matrix=env.mat, x0=start.ravel(),
         w0=first_adjoint.ravel(), norms=norms, seconds=np.diff(stamps))
"""


def peer(path: Path, python: str, out: Path, threads: int) -> dict[str, np.ndarray]:
    command = [python, "-c", PEER, str(path), str(out), str(ITERATIONS), str(threads)]
    subprocess.run(command, check=True, timeout=600)
    return dict(np.load(out))


def ours(data: dict[str, np.ndarray]) -> tuple[np.ndarray, list[float]]:
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    import optax

    import bilevel_jax as bj
    from benchmarks.common import timing
    from bilevel_jax.problems.synthetic import Synthetic

    jax.config.update("jax_enable_x64", True)
    arrays = [jnp.asarray(data[k]) for k in ("transition", "coefficient", "matrix")]
    problem = Synthetic(*arrays, discount=jnp.asarray(0.5), temperature=jnp.asarray(1.0))
    # 10 sweeps with an early stop, one adjoint step of 0.5, an upper step of 8e-3: as in their code.
    algorithm = bj.algorithms.m_sobirl(
        problem, optax.sgd(8e-3), solver=bj.ValueIteration(1e-6, 10, centred=False), adjoint=bj.Descent(0.5)
    )
    state = algorithm.init(
        jax.random.key(0),
        jnp.asarray(data["x0"]),
        initial_value=jnp.zeros(SHAPE["states"]),
        initial_policy=jnp.full((SHAPE["states"], SHAPE["actions"]), 1 / SHAPE["actions"]),
        initial_adjoint=-jnp.asarray(data["w0"]),
    )

    @jax.jit
    def run(algorithm, state):
        def step(state, _):
            state, info = algorithm.step(None, state)
            return state, info.gradient_norm

        def restart(last, _):
            first = eqx.tree_at(lambda s: s.x, state, state.x + 0 * last)  # the same start, made anew
            end, norms = jax.lax.scan(step, first, None, ITERATIONS)
            return end.x, norms

        return jax.lax.scan(restart, state.x, None, RESTARTS)

    norms = np.asarray(run(algorithm, state)[1])
    return norms[0], [t / (ITERATIONS * RESTARTS) for t in timing.seconds(lambda: run(algorithm, state), 30)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    from benchmarks.common import timing

    figures: dict = {"iterations": ITERATIONS, **SHAPE}
    with tempfile.TemporaryDirectory() as folder:
        for threads in (1, 2):
            data = peer(options.peer, options.peer_python, Path(folder) / "peer.npz", threads)
            norms, own = ours(data)
            apart = np.abs(norms - data["norms"]) / data["norms"]
            theirs = timing.summary(data["seconds"].tolist())
            mine = timing.summary(own)
            figures[f"peer with {threads} threads"] = {
                "peer_seconds_an_iteration": theirs,
                "our_seconds_an_iteration": mine,
                "times_faster": theirs["median"] / mine["median"],
                "largest_relative_difference_of_hypergradient_norms": float(apart.max()),
            }
    timing.write("m_sobirl_against_authors", json.loads(json.dumps(figures)))


if __name__ == "__main__":
    main()
