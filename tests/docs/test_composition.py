"""`solve` and `hypergradient` inside larger programs: each gives there what it gives alone."""

import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import (
    ACTIONS,
    STATES,
    central_difference,
    flat,
    random_like,
    random_process,
    upper_problem,
    upper_start,
)

import bilevel_jax as bj

PROCESS = random_process(31)
FEATURES = jnp.asarray(np.random.default_rng(31).normal(size=(STATES, ACTIONS, 4)))
EXPERT = jax.nn.one_hot(np.arange(STATES) % ACTIONS, ACTIONS)
LINEN = nn.Sequential([nn.Dense(8, param_dtype=float), nn.tanh, nn.Dense(1, param_dtype=float)])
PAGE = Path(__file__).parents[2] / "docs" / "composition.md"
DEVICES, BATCH = 8, 16


def composed(problem):
    """The objective as a function of x alone."""
    return lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x)))


def imitation(reward):
    """A reward network that is to make the agent act as an expert; its weights also stand in the objective."""

    def objective(params, solution):
        like_expert = -jnp.mean(jnp.sum(EXPERT * jnp.log(solution.policy), -1))
        return like_expert + 1e-2 * jnp.mean(solution.value**2) + 1e-2 * jnp.mean(reward(params) ** 2)

    return bj.BilevelProblem(
        lambda params: bj.MDP(PROCESS.dense, reward(params), 0.8), bj.ShannonEntropy(0.5), objective
    )


def linen_network():
    return lambda params: LINEN.apply(params, FEATURES)[..., 0], LINEN.init(jax.random.key(0), FEATURES)


def nnx_network():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(4, 8, param_dtype=float, rngs=rngs), jnp.tanh, nnx.Linear(8, 1, param_dtype=float, rngs=rngs)
    )
    graph, params = nnx.split(model)
    return lambda params: nnx.merge(graph, params)(FEATURES)[..., 0], params


def assert_trees_close(got, want, rtol=1e-10, atol=1e-12):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


@pytest.mark.slow
@pytest.mark.parametrize("make", [linen_network, nnx_network])
def test_weights_of_a_network_as_upper_variable(make):
    reward, params = make()
    problem = imitation(reward)
    result = bj.check(bj.hypergradient(problem, params))
    value, gradient = jax.jit(jax.value_and_grad(composed(problem)))(params)
    np.testing.assert_allclose(value, result.value, rtol=1e-13)
    assert_trees_close(gradient, result.gradient)
    d = random_like(1, params)
    along = np.vdot(flat(result.gradient), flat(d))
    assert abs(along) > 1e-3
    differences = central_difference(jax.jit(composed(problem)), params, d)[0]
    np.testing.assert_allclose(along, differences, rtol=1e-7)


def updated(optimizer, gradient, state, x):
    with jax.numpy_dtype_promotion("standard"):  # optax.adam is not made for strict promotion
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(x, updates), state


def train(problem, optimizer, params, length):
    """The objective before each step."""

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(composed(problem))(params)
        return updated(optimizer, gradient, state, params), value

    return jax.lax.scan(step, (params, optimizer.init(params)), length=length)[1]


@pytest.mark.slow
def test_training_a_network_inside_scan():
    reward, params = linen_network()
    losses = jax.jit(lambda params: train(imitation(reward), optax.adam(0.03), params, 30))(params)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
def test_vmap_over_seeds_and_learning_rates():
    problem = imitation(linen_network()[0])

    @jax.jit
    def run(seed, rate):
        return train(problem, optax.adam(rate), LINEN.init(jax.random.key(seed), FEATURES), 4)

    seeds, rates = jnp.arange(2), jnp.array([1e-2, 1e-1])
    many = jax.jit(jax.vmap(jax.vmap(run, in_axes=(None, 0)), in_axes=(0, None)))(seeds, rates)
    separate = np.array([[run(seed, rate) for rate in rates] for seed in seeds])
    np.testing.assert_allclose(many, separate, rtol=1e-9)
    assert np.unique(separate[..., -1].round(6)).size == 4


@pytest.mark.slow
def test_upper_iterations_in_scan_equal_a_python_loop():
    problem, optimizer = upper_problem("kl"), optax.adam(0.05)

    def step(carry, _=None):
        x, state, value, adjoint = carry
        made = bj.hypergradient(problem, x, initial_value=value, initial_adjoint=adjoint)
        moved = updated(optimizer, made.gradient, state, x)
        return (*moved, made.solution.value, made.adjoint), (made.value, made.gradient)

    x = upper_start()
    start = carry = x, optimizer.init(x), jnp.zeros(STATES), jnp.zeros(STATES)
    rows = []
    for _ in range(5):
        carry, row = step(carry)
        rows.append(row)
    ended, stacked = jax.jit(lambda start: jax.lax.scan(step, start, length=5))(start)
    assert_trees_close(ended, carry, rtol=1e-9)
    assert_trees_close(stacked, jax.tree.map(lambda *row: jnp.stack(row), *rows), rtol=1e-9, atol=1e-10)
    assert np.abs(flat(ended[0]) - flat(x)).max() > 0.1


@pytest.mark.slow
def test_checkpoint_changes_nothing():
    problem, x = upper_problem("kl"), upper_start()
    plain = bj.check(bj.hypergradient(problem, x))
    f = composed(problem)
    made = jax.checkpoint(lambda x: bj.hypergradient(problem, x, with_error=False).value)
    inner = jax.checkpoint(lambda x: bj.solve(problem.mdp(x), problem.regularizer(x)))
    for remade in (jax.checkpoint(f), made, lambda x: problem.objective(x, inner(x))):
        assert "remat" in str(jax.make_jaxpr(remade)(x))  # else this compares a thing with itself
        value, gradient = jax.jit(jax.value_and_grad(remade))(x)
        np.testing.assert_allclose(value, plain.value, rtol=1e-13)
        assert_trees_close(gradient, plain.gradient)


@pytest.mark.slow
def test_checkpoint_of_the_network_alone():
    reward, params = linen_network()
    remade = bj.hypergradient(imitation(jax.checkpoint(reward)), params, with_error=False)
    assert_trees_close(remade.gradient, bj.hypergradient(imitation(reward), params).gradient)


@pytest.mark.slow
def test_hessian_vector_product_inside_jit():
    problem, x = upper_problem("kl"), upper_start()
    directions = jax.tree.map(lambda *d: jnp.stack(d), *(random_like(seed, x) for seed in range(2)))

    @jax.jit
    def products(x, directions):
        # Halved first: jit sees more than the one call.
        return jax.vmap(lambda d: bj.hessian_vector_product(problem, jax.tree.map(lambda v: 0.5 * v, x), d))(directions)

    @jax.jit
    def by_composition(x, directions):
        gradient = jax.grad(composed(problem))
        return jax.vmap(lambda d: jax.jvp(gradient, (jax.tree.map(lambda v: 0.5 * v, x),), (d,)))(directions)

    assert_trees_close(products(x, directions), by_composition(x, directions), rtol=1e-8, atol=1e-9)


# Both ways to share a batch out among devices, several calls each. Under jit there are collectives, several of which
# at once hang XLA's CPU pool: it waits for each call. Under shard_map there are none, and the calls may overlap.
SHARDED = """
import sys, jax, numpy as np
jax.config.update("jax_enable_x64", True)
import bilevel_jax as bj
from test_composition import imitation
x, want = np.load(sys.argv[1]).values()
problem = imitation(lambda x: x)
mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
axes = jax.P("batch")
rows = jax.NamedSharding(mesh, axes)
many = jax.vmap(lambda x: bj.hypergradient(problem, x, with_error=False))
whole = jax.jit(many)
parts = jax.jit(jax.shard_map(many, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False))
x = jax.device_put(x, rows)
assert len(x.sharding.device_set) == 8
results = [jax.block_until_ready(whole(x)) for _ in range(5)] + [parts(x) for _ in range(20)]
for result in results:
    policy = bj.check(result).solution.policy
    for leaf in (result.value, result.gradient, result.adjoint, policy):
        assert leaf.sharding.is_equivalent_to(rows, leaf.ndim), leaf.sharding
    np.testing.assert_allclose(result.gradient, want, rtol=1e-10, atol=1e-12)
print("right")
"""


@pytest.mark.slow
def test_sharded_over_devices(tmp_path):
    """In a fresh process with nothing set for it but the number of devices: it must not hang."""
    problem, x = imitation(lambda x: x), random_like(2, np.zeros((BATCH, STATES, ACTIONS)))
    want = [bj.check(bj.hypergradient(problem, one, with_error=False)).gradient for one in x]
    assert np.abs(want).max() > 1e-3
    np.savez(tmp_path / "batch.npz", x=x, want=np.stack(want))
    changes = ("NPROC", "XLA_", "JAX_", "OMP_", "OPENBLAS_", "MKL_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(changes)}
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, str(tmp_path / "batch.npz")],
        cwd=Path(__file__).parent,  # whence it imports, and from the folder above
        env=kept | flags | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "right\n", done.stderr[-2000:]


@pytest.mark.slow
def test_documentation():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    page = {"__name__": "page"}
    with jax.numpy_dtype_promotion("standard"):
        for block in blocks:
            exec(block, page)
    gradient = page["hg"].gradient
    assert_trees_close(page["same"], gradient)
    expected = jax.tree.map(
        jnp.add, gradient, jax.grad(lambda p: 1e-3 * jnp.mean(page["reward"](p) ** 2))(page["params"])
    )
    assert_trees_close(page["gradient"], expected)
    assert page["losses"].shape == (2, 3, 30)
    np.testing.assert_allclose(page["after"] - page["before"], 70, rtol=1e-9)
    assert np.all(page["losses"][..., -1] < page["losses"][..., 0])
    one = bj.hypergradient(page["problem"], jax.tree.map(lambda leaf: leaf[1], page["batch"])).gradient
    assert_trees_close(jax.tree.map(lambda leaf: leaf[1], page["hgs"].gradient), one)
