"""Iterative differentiation: the derivative of what a number of Bellman sweeps computes."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree

from bilevel_jax.adjoint.protocol import Attempt
from bilevel_jax.adjoint.truncated import TruncatedSolver
from bilevel_jax.errors import InputError
from bilevel_jax.hypergradient.error import error_bound
from bilevel_jax.hypergradient.lagrangian import Lagrangian, sweep
from bilevel_jax.hypergradient.problem import lower_level
from bilevel_jax.hypergradient.protocol import Hypergradient, Method
from bilevel_jax.solvers import ValueIteration, read_out, solve
from bilevel_jax.validation import plain, require_setting


class Unrolled(Method):
    """The exact derivative of f at V_K, the K-th Bellman sweep from V = 0 or a warm start.

    An independent route to the hyper-gradient: no linear system, no implicit function theorem. Reverse
    mode keeps all V_k that it differentiates, K S numbers, and returns as `adjoint` the sum of the
    cotangents that passed through the sweeps, which is the truncated Neumann series of the implicit
    adjoint. Forward mode keeps nothing and costs a derivative for each entry of x; it has no adjoint.

    Args:
      sweeps: K (static). The lower level reports MAX_STEPS unless they sufficed.
      differentiated: how many of the last sweeps are differentiated (static); None is all of them. The others
        run as they are (Shaban et al. 2019, "Truncated back-propagation for bilevel optimization").
      mode: "reverse" or "forward" (static).

    Raises:
      InputError: sweeps below 1, differentiated not from 0 to sweeps, another mode.
    """

    sweeps: int = eqx.field(static=True, converter=plain)
    differentiated: int | None = eqx.field(default=None, static=True, converter=plain)
    mode: Literal["reverse", "forward"] = eqx.field(default="reverse", static=True)

    def __check_init__(self):
        require_setting("sweeps", self.sweeps, 1, "100 suffice at discount 0.9", whole=True)
        if self.differentiated is not None:
            require_setting("differentiated", self.differentiated, 0, "None is all sweeps", whole=True)
            if self.differentiated > self.sweeps:
                raise InputError(f"differentiated: {self.differentiated} is more than the {self.sweeps} sweeps")
        if self.mode not in ("reverse", "forward"):
            raise InputError(f"mode: expected 'reverse' or 'forward', got {self.mode!r}")

    def estimate(self, problem, x, initial_value, initial_adjoint, with_error):
        del initial_adjoint
        kept = self.sweeps if self.differentiated is None else self.differentiated
        frozen = lax.stop_gradient(lower_level(problem, x))
        start = jnp.zeros_like(frozen[0].reward[..., 0]) if initial_value is None else lax.stop_gradient(initial_value)
        start = sweep(*frozen, start, jnp.zeros_like(start), count=self.sweeps - max(kept, 1))
        # The last sweep alone, for what a solver says of it.
        before = sweep(*frozen, start, jnp.zeros_like(start), count=max(kept, 1) - 1)
        report = solve(*frozen, solver=ValueIteration(max_steps=1, centred=False), initial_value=before)
        report = eqx.tree_at(lambda s: s.stats.steps, report, report.stats.steps + self.sweeps - 1)

        def read(mdp, regularizer, value):
            return read_out(mdp, regularizer, value, report.result, report.stats)

        def paid(x, shift):
            mdp, regularizer = lower_level(problem, x)
            value = sweep(mdp, regularizer, start, shift, count=kept) if kept else report.value
            solution = read(mdp, regularizer, value)
            return problem.objective(x, solution), solution

        shift = jnp.zeros_like(start)
        if self.mode == "forward":
            flat, unravel = ravel_pytree(x)

            def along(direction):
                return jax.jvp(lambda x: paid(x, shift)[0], (x,), (unravel(direction),))[1]

            objective, solution = paid(x, shift)
            gradient = unravel(jax.vmap(along)(jnp.eye(flat.size, dtype=flat.dtype)).astype(flat.dtype))
            w, stats = None, None
        else:
            objective, pull, solution = jax.vjp(paid, x, shift, has_aux=True)
            gradient, given = pull(jnp.ones_like(objective))
            here = Lagrangian(problem, x, read)
            of_value = here.paid(solution.value).of_value
            w, stats = here.solve_adjoint(_Given(steps=kept), solution.policy, of_value, given)
        error = error_bound(problem, x, gradient, solution.value, w) if with_error else None
        return Hypergradient(objective, gradient, solution, w, stats, error)


class _Given(TruncatedSolver):
    """The guess as it is, which `steps` products made elsewhere: for its report."""

    steps: int = eqx.field(static=True)
    tolerance: Any = None

    def solve(self, operator, prepared, rhs, guess, transpose):
        del operator, prepared, transpose
        given = jnp.zeros_like(rhs) if guess is None else guess
        return Attempt(given, jnp.asarray(self.steps, jnp.int32), jnp.asarray(False))
