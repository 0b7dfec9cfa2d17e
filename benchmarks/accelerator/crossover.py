"""The sizes from which the accelerator is faster than the CPU of its host, the same program on both, in turns.

Problems of `benchmarks.solvers.scale`, float32: `sweep` is five sweeps in a loop, `solve` a solve to 5e-3, `gradient`
the solve and its gradient in the reward. `cpu_over_accelerator` is the ratio of their times.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel_jax as bj
from benchmarks.common.timing import alternate, summary
from benchmarks.solvers import scale

FORMS = ("random", "grid")
SIZES = {
    "sweep": (10**2, 10**3, 10**4, 10**5, 10**6),
    "solve": (10**3, 10**4, 10**5, 10**6),
    "gradient": (10**3, 10**4, 10**5),
}
TOY = {"sweep": (25, 100), "solve": (25,)}
REPEATS = 5


def cases(toy: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """A case per program, form and size."""
    return {
        f"{kind}, {form}, {states}": functools.partial(measure, kind, form, states, 1 if toy else REPEATS)
        for kind, sizes in (TOY if toy else SIZES).items()
        for form in (FORMS[:1] if toy else FORMS)
        for states in sizes
    }


def measure(kind: str, form: str, states: int, repeats: int) -> dict[str, Any]:
    """Milliseconds of one program on both devices."""
    mdp = _build(form, states)
    tolerance, adjoint = scale.TOLERANCE["float32"]
    regularizer, solver = bj.ShannonEntropy(np.float32(scale.TEMPERATURE)), bj.Auto(tolerance)
    program, given = {
        "sweep": (scale.sweeps, (scale.LOOP, jnp.max(mdp.reward, -1), mdp, regularizer)),
        "solve": (_solve, (mdp, regularizer, solver)),
        "gradient": (_gradient, (mdp, regularizer, solver, bj.BiCGStab(adjoint))),
    }[kind]
    devices = {"accelerator": jax.devices()[0], "cpu": jax.devices("cpu")[0]}
    calls = {name: functools.partial(program, *jax.device_put(given, device)) for name, device in devices.items()}
    each = {name: summary(taken)["median"] for name, taken in alternate(calls, repeats, 1).items()}
    times = {f"{name}_ms": 1e3 * taken for name, taken in each.items()}
    return {"states": mdp.num_states, **times, "cpu_over_accelerator": each["cpu"] / each["accelerator"]}


def crossings(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each program and form, `faster_from` and `about`, see `crossing`."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for name, cell in cells.items():
        if "cpu_over_accelerator" in cell:
            curves.setdefault(name.rpartition(", ")[0], []).append((cell["states"], cell["cpu_over_accelerator"]))
    return {name: crossing(sorted(curve)) for name, curve in curves.items()}


def crossing(curve: list[tuple[int, float]]) -> dict[str, Any]:
    """`faster_from`: the least size from which on every ratio is above 1; None if the last one is not.

    `about`: where the line between the logarithms of the ratios on both sides is 0; None without both sides.
    """
    slower = [i for i, (_, ratio) in enumerate(curve) if ratio <= 1]
    first = slower[-1] + 1 if slower else 0
    if first == len(curve):
        return {"faster_from": None, "about": None}
    if first == 0:
        return {"faster_from": curve[0][0], "about": None}
    (below, low), (above, high) = curve[first - 1], curve[first]
    share = -np.log(low) / (np.log(high) - np.log(low))
    return {"faster_from": above, "about": float(below * (above / below) ** share)}


@functools.lru_cache(maxsize=1)
def _build(form: str, states: int) -> bj.MDP:
    return jax.block_until_ready(scale.build(form, states, np.float32))


@jax.jit
def _solve(mdp, regularizer, solver):
    return bj.solve(mdp, regularizer, solver=solver)


_gradient = jax.jit(scale.gradient_in_reward)
