"""Kernels that run one at a time on a CPU: the same numbers, never a batched LAPACK call, batched elsewhere."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import lu_factor, lu_solve

import bilevel_jax as bj
from bilevel_jax.core import batching
from bilevel_jax.core.cpu import one_at_a_time_on_cpu

solve_one = one_at_a_time_on_cpu(lambda matrix, rhs: lu_solve(lu_factor(matrix), rhs))


def systems(*batch, size=4, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    shape = (*batch, size, size)
    matrix = jax.random.uniform(keys[0], shape) + size * jnp.broadcast_to(jnp.eye(size), shape)
    return matrix, jax.random.normal(keys[1], (*batch, size))


@pytest.mark.parametrize(("in_axes", "batch"), [((0, 0), (5,)), ((0, None), (5,)), ((None, 0), (5,)), ((0, 0), (2, 3))])
def test_vmap_equals_single_solves(in_axes, batch):
    matrix, rhs = systems(*batch)
    if None in in_axes:
        matrix, rhs = (a if axis == 0 else a[0] for a, axis in zip((matrix, rhs), in_axes, strict=True))
    mapped = solve_one
    for _ in batch:
        mapped = jax.vmap(mapped, in_axes)
    expected = np.linalg.solve(np.asarray(matrix), np.asarray(rhs)[..., None])[..., 0]
    np.testing.assert_allclose(jax.jit(mapped)(matrix, rhs), expected, rtol=1e-12)


def vmapped_hypergradient(problem, xs, adjoint):
    method = bj.Implicit(adjoint=adjoint)
    return jax.vmap(lambda x: bj.hypergradient(problem, x, method=method).gradient)(xs)


def four_rooms_batch(count=3):
    problem = bj.problems.make("four_rooms", temperature=0.005)
    return problem, jax.random.normal(jax.random.key(0), (count, 105))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Direct", "GMRES"])
def test_no_batched_lapack_call_is_made_on_the_cpu(name):
    """Two batched calls ready at once deadlock XLA's CPU thread pool; so there must be none at all."""
    text = (
        jax.jit(vmapped_hypergradient)
        .trace(*four_rooms_batch(), getattr(bj, name)())
        .lower(lowering_platforms=("cpu",))
        .as_text()
    )
    calls = re.findall(r"stablehlo.custom_call @(?:lapack|blas)\w+\(.*?-> \((.*?)\)", text)
    calls += re.findall(r"stablehlo.custom_call @(?:lapack|blas)\w+\(.*?-> (tensor<.*?>)", text)
    shapes = [shape for call in calls for shape in re.findall(r"tensor<((?:\d+x)+)f\d+>", call)]
    assert shapes, "no LAPACK call found: has its name changed?"
    assert max(shape.count("x") for shape in shapes) == 2


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_other_platforms_get_the_batched_form(platform):
    """Lowered without the device: it has fewer loops than the CPU's, which maps over the batch."""
    problem, xs = four_rooms_batch()
    traced = jax.jit(vmapped_hypergradient).trace(problem, xs, bj.Direct())
    loops = {p: traced.lower(lowering_platforms=(p,)).as_text().count("stablehlo.while") for p in ("cpu", platform)}
    assert loops[platform] < loops["cpu"]


@pytest.mark.slow
def test_the_batched_form_gives_the_same_numbers(monkeypatch):
    problem, xs = four_rooms_batch(2)
    expected = jax.jit(vmapped_hypergradient)(problem, xs, bj.Direct())
    monkeypatch.setattr(batching.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    jax.clear_caches()
    np.testing.assert_allclose(
        jax.jit(vmapped_hypergradient)(problem, xs, bj.Direct()), expected, rtol=1e-9, atol=1e-12
    )
    monkeypatch.undo()
    jax.clear_caches()
