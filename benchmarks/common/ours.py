"""This library's solvers for `solvers_against_peers.py`: a name, a solver made from a tolerance, a transition form."""

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.common.peer_problems import Problem, stencil

LONG = 10_000_000


class Entry(NamedTuple):
    """`make(tolerance)` gives the solver (None: what `solve` takes by itself), `form` is successor or stencil."""

    make: Callable[[float], Any]
    form: str

    def build(self, problem: Problem) -> Callable[[float], Any]:
        """`solve(tolerance)` of a problem whose arrays are on the device already; float64."""
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        import bilevel_jax as bj

        if self.form == "stencil":
            offsets, probability = stencil(problem)
            transition = bj.StencilTransition(offsets, jnp.asarray(probability), problem.grid)
        else:
            transition = bj.SuccessorTransition(jnp.asarray(problem.successor), jnp.asarray(problem.probability))
        mdp = bj.MDP(transition, jnp.asarray(problem.reward), problem.discount)
        if problem.temperature:
            regularizer = bj.ShannonEntropy(problem.temperature)
        elif hasattr(bj, "Unregularized"):
            regularizer = bj.Unregularized()
        else:
            regularizer = bj.ShannonEntropy(1e-9)
        return lambda tolerance: jax.block_until_ready(bj.solve(mdp, regularizer, solver=self.make(tolerance)))


def _entries() -> dict[str, Entry]:
    import bilevel_jax as bj

    makers: dict[str, Callable[[float], Any]] = {
        "plain vi": lambda tolerance: bj.ValueIteration(tolerance, LONG, centred=False),
        "vi": lambda tolerance: bj.ValueIteration(tolerance, LONG),
        "pi": bj.PolicyIteration,
    }
    names = {
        "mpi": "ModifiedPolicyIteration",
        "newton krylov": "NewtonKrylov",
        "anderson": "AndersonIteration",
        "adaptive": "AdaptivePolicyIteration",
        "auto": "Auto",
    }
    # The tolerance is the first field of each.
    makers |= {short: getattr(bj, name) for short, name in names.items() if hasattr(bj, name)}
    forms = ["successor"] + ["stencil"] * hasattr(bj, "StencilTransition")
    return {f"ours {short} {form}": Entry(make, form) for short, make in makers.items() for form in forms}


OURS = _entries()
