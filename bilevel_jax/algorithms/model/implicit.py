"""Descent on phi(x) = f(x, pi*(x)) with its hyper-gradient by any method: the exact counterpart of M-SoBiRL."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from bilevel_jax.algorithms import cost
from bilevel_jax.algorithms.base import Estimate
from bilevel_jax.algorithms.model.base import ModelAlgorithm, Warm, solve_reports
from bilevel_jax.algorithms.registry import register_algorithm
from bilevel_jax.algorithms.upper import UpperLevel, as_upper_level
from bilevel_jax.bilevel import Problem, lower_level, require_problem
from bilevel_jax.core.validation import require_instance
from bilevel_jax.hypergradient import Hypergradient, Implicit, Method, hypergradient
from bilevel_jax.mdp.process import MDP
from bilevel_jax.solvers import Auto, Solver, solve


class ImplicitDescent(ModelAlgorithm):
    """See `implicit`. Its memory is `Warm`, of the last hyper-gradient, from which the next one starts."""

    problem: Problem
    upper: UpperLevel = eqx.field(converter=as_upper_level)
    method: Method
    search: Solver | None
    searches: ClassVar[bool] = True

    def init_memory(self, key, x):
        del key
        mdp, _ = lower_level(self.problem, x)
        shapes = jax.eval_shape(lambda x: hypergradient(self.problem, x, method=self.method).adjoint, x)
        adjoint = None if shapes is None else jnp.zeros(shapes.shape, shapes.dtype)
        return Warm(jnp.zeros_like(mdp.reward[..., 0]), adjoint)

    def estimate(self, key, state):
        del key
        problem, warm = self.problem, state.memory
        made = hypergradient(
            problem,
            state.x,
            method=self.method,
            initial_value=warm.value,
            initial_adjoint=warm.adjoint,
            with_error=False,
        )
        value = made.solution.value

        def phi(x):
            return problem.objective(x, solve(*lower_level(problem, x), solver=self.search, initial_value=value))

        return Estimate(
            objective=made.value,
            gradient=made.gradient,
            memory=Warm(value, made.adjoint),
            transitions=self._transitions(made, lower_level(problem, state.x)[0]),
            reports=solve_reports(made.solution, made.stats),
            value_fn=phi,
        )

    def _transitions(self, made: Hypergradient, mdp: MDP) -> Float[Array, ""]:
        """Of the solve and the adjoint that `made` reports; a method that solves more than once reports one."""
        method: Any = self.method
        solver = getattr(method, "solver", None)
        lower = Auto(getattr(method, "tolerance", None)) if solver is None else solver
        sweeps = cost.solve_sweeps(lower, mdp, made.solution.stats) + 1
        if made.stats is not None:
            sweeps += cost.linear_sweeps(getattr(method, "adjoint", None), mdp, made.stats)
        return sweeps * cost.pairs(mdp)


def implicit(
    problem: Problem,
    optimizer: optax.GradientTransformation | UpperLevel,
    *,
    method: Method | None = None,
    search: Solver | None = None,
) -> ImplicitDescent:
    """Minimise phi with any optax optimizer and the gradient of `hypergradient`, warm-started with the last V and w.

    With `optax.lbfgs()` it is a quasi-Newton method with a line search on phi. At each trial point the lower level is
    solved from the current V, and the slope is computed there.

    Args:
      problem: a `Problem`; its numbers are leaves and may be changed or vmapped.
      optimizer: an optax transformation, or an `UpperLevel` with projection or schedule of the temperature. A line
        search sees phi without the projection; give it one or the other.
      method: the method of the hyper-gradient; None is `Implicit()`, exact. With inexact ones, `check(info)` raises.
      search: the lower-level solver at the trial points of a line search; None is `Auto()`.

    Returns:
      An `Algorithm`: `init(key, x)`, `step(key, state)`, both compiled.

    Raises:
      InputError: an argument of another type.

    Example:
      >>> problem = bj.problems.make("garnet", horizon=20)
      >>> algorithm = bj.algorithms.implicit(problem, optax.adam(0.1))
      >>> state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(1)))
      >>> state, info = algorithm.step(jax.random.key(2), state)
      >>> state.x.shape, info.objective.shape
      ((8, 3), ())
    """
    require_problem(problem)
    require_instance("method", method, Method | None)
    require_instance("search", search, Solver | None)
    return ImplicitDescent(problem, optimizer, Implicit() if method is None else method, search)


register_algorithm("implicit", implicit)
