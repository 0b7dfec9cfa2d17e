"""Batched linear solves on the CPU must not hang, in fresh processes with nothing set for them.

XLA's CPU thread pool deadlocks on concurrent batched LAPACK calls, in most runs on 2 cores
(bilevel_jax/batching.py). Whether it does is a matter of luck, hence many processes. The first two of them compile, the
others mostly load what those compiled, which hangs as readily: with batched LAPACK calls allowed, 2 of 3 processes that
loaded did, and 1 of 2 that compiled.
"""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel_jax as bj

LIMIT = 120  # seconds for each process
ROUNDS = 50
POINTS = 4

# 50 hyper-gradients of a batch of x, each over two contexts.
HYPERGRADIENTS = f"""
import sys, jax, numpy as np
jax.config.update("jax_enable_x64", True)
import bilevel_jax as bj
x, want = np.load(sys.argv[1]).values()
problem = bj.problems.make("four_rooms")
f = jax.jit(jax.vmap(lambda x: bj.hypergradient(problem, x, with_error=False)))
for _ in range({ROUNDS}):
    result = bj.check(f(x))
    np.testing.assert_allclose(result.gradient, want, rtol=0, atol=1e-8 * np.abs(want).max())
print("right")
"""

# Batched linear solves in one function, with nothing that orders them.
INDEPENDENT = f"""
import sys, jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_enable_x64", True)
import bilevel_jax as bj
policies, want = np.load(sys.argv[1]).values()
problem = bj.problems.make("four_rooms")
mdp = problem.mdp(jnp.zeros(105))
def solves(*policies):
    return [bj.policy_value(mdp, p) for p in policies] + [bj.policy_value(mdp, policies[0], bj.GMRES())]
f = jax.jit(jax.vmap(solves))
shifts = (0, 1, 2)
for _ in range({2 * ROUNDS}):
    *direct, krylov = f(*(np.roll(policies, shift, 0) for shift in shifts))
    for got, shift in zip(direct, shifts, strict=True):
        np.testing.assert_allclose(got, np.roll(want, shift, 0), rtol=1e-10)
    np.testing.assert_allclose(krylov, want, rtol=0, atol=1e-7)
print("right")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files with the inputs and the right answers: single calls, with no batch to hang on."""
    folder = tmp_path_factory.mktemp("no_hang")
    problem = bj.problems.make("four_rooms")
    xs = jax.random.normal(jax.random.key(0), (POINTS, 105))
    gradients = [bj.check(bj.hypergradient(problem, x, with_error=False)).gradient for x in xs]
    np.savez(folder / "hypergradients.npz", x=xs, want=np.stack(gradients))

    mdp = problem.mdp(jnp.zeros(105))
    policies = np.random.default_rng(0).dirichlet(np.ones(4), (POINTS, 2, 104))
    kernel, discount = np.asarray(mdp.transition.probability), np.asarray(mdp.discount)
    operator = np.einsum("bcsa,csa,saj->bcsj", policies, discount, kernel)
    rewards = (policies * np.asarray(mdp.reward)).sum(-1)
    values = np.linalg.solve(np.eye(104) - operator, rewards[..., None])[..., 0]
    np.savez(folder / "independent.npz", policies=policies, want=values)
    return folder


def environment(cache):
    """Ours without what changes jax's threads, so that the children see the defaults; and a folder of compiled code."""
    changes = ("NPROC", "XLA_", "JAX_", "OMP_", "OPENBLAS_", "MKL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(changes)}
    return kept | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def run_processes(script, path, count):
    """Run them two at a time; the output of those that did not end well in time."""
    stop = threading.Event()

    def one(index):
        if stop.is_set():
            return f"process {index}: not started"
        try:
            command = [sys.executable, "-c", script, str(path)]
            done = subprocess.run(
                command,
                env=environment(path.parent / "compiled"),
                capture_output=True,
                text=True,
                timeout=LIMIT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            stop.set()
            return f"process {index}: hung, killed after {LIMIT} s"
        return None if done.stdout == "right\n" else f"process {index}: {done.stderr[-2000:]}"

    with ThreadPoolExecutor(2) as pool:
        return [failure for failure in pool.map(one, range(count)) if failure]


# The fast tests see to the cause: no batched LAPACK call is made (test_batching.py).
@pytest.mark.slow
@pytest.mark.parametrize("processes", [10, pytest.param(30, marks=pytest.mark.nightly)])
def test_vmapped_hypergradients_over_contexts(processes, inputs):
    assert not run_processes(HYPERGRADIENTS, inputs / "hypergradients.npz", processes)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [6, pytest.param(12, marks=pytest.mark.nightly)])
def test_independent_vmapped_solves(processes, inputs):
    assert not run_processes(INDEPENDENT, inputs / "independent.npz", processes)
