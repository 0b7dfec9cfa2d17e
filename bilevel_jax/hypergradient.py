"""The bilevel problem and its hyper-gradient: the gradient of f(x, solution of the MDP at x) in x."""

import abc
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp

from bilevel_jax.adjoint import LinearSolver, LinearStats, default_linear_solver, linear_solve
from bilevel_jax.bellman import backup, check_compatible, discounted_operator
from bilevel_jax.errors import InputError
from bilevel_jax.mdp import MDP, over_batch
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.results import Outcome
from bilevel_jax.solvers import Solution, Solver, read_out, solve
from bilevel_jax.validation import as_array, as_float, require_instance

ReadOut = Callable[[MDP, Regularizer, jax.Array], Solution]


@runtime_checkable
class Problem(Protocol):
    """What a bilevel problem is: three functions of the upper variable x, any pytree of floats.

    An object with these methods that is a pytree (an `equinox.Module`) keeps its numbers as leaves,
    so that changing or vmapping them does not recompile. MDPs with batch axes are several lower
    levels under one x; the objective then sees every field of the solution with those axes.
    """

    def mdp(self, x: Any) -> MDP:
        """The lower level's process at x."""
        ...

    def regularizer(self, x: Any) -> Regularizer:
        """The lower level's regularizer at x."""
        ...

    def objective(self, x: Any, solution: Solution) -> jax.Array:
        """What the upper level pays, a scalar."""
        ...


class BilevelProblem(eqx.Module):
    """A `Problem` from three functions: minimise objective(x, solve(mdp(x), regularizer(x))) over x.

    Args:
      mdp: x -> `MDP`.
      regularizer: a `Regularizer`, or x -> `Regularizer`.
      objective: (x, `Solution`) -> scalar to be minimised.

    Plain functions are static. A function that is a pytree, such as `jax.tree_util.Partial(f, data)`,
    keeps its data as leaves.

    Raises:
      InputError: an argument that is not callable.
    """

    _mdp: Callable
    _regularizer: Callable
    _objective: Callable

    def __init__(self, mdp: Callable, regularizer: Regularizer | Callable, objective: Callable):
        constant = isinstance(regularizer, Regularizer)
        self._mdp = _as_pytree("mdp", mdp)
        self._regularizer = _Constant(regularizer) if constant else _as_pytree("regularizer", regularizer)
        self._objective = _as_pytree("objective", objective)

    def mdp(self, x):
        return self._mdp(x)

    def regularizer(self, x):
        return self._regularizer(x)

    def objective(self, x, solution):
        return self._objective(x, solution)


class _Constant(eqx.Module):
    value: Any

    def __call__(self, x):
        del x
        return self.value


def _as_pytree(name: str, function: Callable) -> Callable:
    if not callable(function):
        raise InputError(f"{name}: expected a function of x, got {type(function).__name__}; wrap it in a lambda")
    is_leaf = jax.tree.structure(function) == jax.tree.structure(0)
    return jax.tree_util.Partial(function) if is_leaf else function


class Hypergradient(eqx.Module):
    """The hyper-gradient at one x.

    `value` f(x, pi*(x)), a scalar; `gradient`, a pytree as x; `solution` of the lower level; `adjoint`
    w[S] with (I - discount P_pi)' w = df/dV (batch axes as in the MDP), a signed discounted occupancy;
    `stats` of the adjoint solve. `bj.check(hypergradient)` raises where either did not converge.
    """

    value: jax.Array
    gradient: Any
    solution: Solution
    adjoint: jax.Array
    stats: LinearStats

    def outcomes(self) -> tuple[Outcome, ...]:
        return (*self.solution.outcomes(), Outcome("adjoint", self.stats.result, self.stats.error_bound))


class Method(eqx.Module):
    """How a hyper-gradient is made."""

    @abc.abstractmethod
    def estimate(
        self, problem: Problem, x: Any, initial_value: jax.Array | None, initial_adjoint: jax.Array | None
    ) -> Hypergradient: ...


class Implicit(Method):
    """The implicit function theorem at the solved lower level.

    Args:
      solver: of the lower level; None is `Auto()`.
      adjoint: linear solver of the adjoint; None chooses by the number of states.
    """

    solver: Solver | None = None
    adjoint: LinearSolver | None = None

    def __check_init__(self):
        require_instance("solver", self.solver, Solver | None)
        require_instance("adjoint", self.adjoint, LinearSolver | None)

    def estimate(self, problem, x, initial_value, initial_adjoint):
        mdp, regularizer = lower_level(problem, x)
        if initial_adjoint is not None:
            initial_adjoint = as_float("initial_adjoint", initial_adjoint, mdp.reward.dtype, mdp.reward.shape[:-1])
        solution = solve(mdp, regularizer, solver=self.solver, adjoint=self.adjoint, initial_value=initial_value)

        def read(mdp, regularizer, value):
            return read_out(mdp, regularizer, value, solution.result, solution.stats)

        adjoint = default_linear_solver(mdp.num_states) if self.adjoint is None else self.adjoint
        return implicit_gradient(problem, x, solution, adjoint, initial_adjoint, read)


def hypergradient(
    problem: Problem,
    x: Any,
    *,
    method: Method | None = None,
    initial_value: jax.Array | None = None,
    initial_adjoint: jax.Array | None = None,
) -> Hypergradient:
    """f(x, pi*(x)) and its gradient in x (Yang, Gao and Yuan 2025, for any regularizer and parameter).

    Args:
      problem: a `Problem`; compiled once for each structure (a new lambda is a new structure).
      x: any pytree of floating-point arrays.
      method: None is `Implicit()`.
      initial_value, initial_adjoint: warm starts, e.g. `solution.value` and `adjoint` of a call nearby.

    Returns:
      `Hypergradient`. Itself differentiable in x: a jvp of its gradient is a Hessian-vector product.

    Raises:
      InputError: x has leaves that are not floating point, the objective is not a scalar, a warm start
        has another shape, or an argument another type.
    """
    require_problem(problem)
    require_instance("method", method, Method | None)
    starts = {"initial_value": initial_value, "initial_adjoint": initial_adjoint}
    starts = {name: as_float(name, start) for name, start in starts.items() if start is not None}
    return _hypergradient(problem, as_upper_variable(x), method, **starts)


@jax.jit
def _hypergradient(problem, x, method, initial_value=None, initial_adjoint=None):
    return (Implicit() if method is None else method).estimate(problem, x, initial_value, initial_adjoint)


def require_problem(problem: Any) -> None:
    """Raise InputError if the argument is no `Problem`, or one that jit cannot take."""
    require_instance("problem", problem, Problem)
    if jax.tree_util.all_leaves([problem]):
        raise InputError(
            f"problem: {type(problem).__name__} is no pytree; make it an equinox.Module, or use a "
            f"bilevel_jax.BilevelProblem"
        )


def lower_level(problem: Problem, x: Any) -> tuple[MDP, Regularizer]:
    """The MDP and the regularizer at x, checked. Outside jit the values are checked too.

    Raises:
      InputError: what the problem's functions return is no MDP or no Regularizer, or does not fit.
    """
    mdp, regularizer = problem.mdp(x), problem.regularizer(x)
    for name, value, kind in (("mdp", mdp, MDP), ("regularizer", regularizer, Regularizer)):
        if not isinstance(value, kind):
            raise InputError(f"{name}(x) must return a bilevel_jax.{kind.__name__}, got {type(value).__name__}")
    check_compatible(mdp, regularizer)
    return mdp, regularizer


def implicit_gradient(
    problem: Problem,
    x: Any,
    solution: Solution,
    adjoint: LinearSolver,
    guess: jax.Array | None,
    read: ReadOut,
) -> Hypergradient:
    """The hyper-gradient formula at a given V[S] and pi[S, A], exact or not.

    With `read` giving the solution as a function of (mdp, regularizer, V) and T the Bellman operator:
      (I - discount P_pi)' w = df/dV,   grad = df/dx + w' dT(V; x)/dx   (V fixed in both).

    Args:
      solution: value and policy at which to linearize.
      adjoint: linear solver for w, from `guess` [S] (zeros if None).
    """

    # theta: the floating-point leaves of MDP and regularizer. x is pulled back through them once.
    def leaves_at(x):
        return eqx.partition(lower_level(problem, x), eqx.is_inexact_array)

    theta, pull_theta, rest = jax.vjp(leaves_at, x, has_aux=True)

    def upper(x, theta, value):
        mdp, regularizer = eqx.combine(theta, rest)
        objective = as_float("objective(x, solution)", problem.objective(x, read(mdp, regularizer, value)))
        if objective.shape != ():
            raise InputError(f"objective(x, solution) must return a scalar, got shape {list(objective.shape)}")
        return objective

    objective, pull_upper = jax.vjp(upper, x, theta, solution.value)
    direct, of_theta, cotangent = pull_upper(jnp.ones_like(objective))
    mdp, regularizer = eqx.combine(theta, rest)
    w, stats = _solve_adjoint(mdp, regularizer, solution.policy, cotangent, guess, solver=adjoint)
    _, pull_backup = jax.vjp(lambda theta: over_batch(backup)(*eqx.combine(theta, rest), solution.value), theta)
    of_theta = jax.tree.map(jnp.add, of_theta, *pull_backup(w))
    gradient = jax.tree.map(jnp.add, direct, *pull_theta(of_theta))
    return Hypergradient(objective, gradient, solution, w, stats)


@over_batch
def _solve_adjoint(mdp, regularizer, policy, cotangent, guess, *, solver):
    del regularizer
    operator = discounted_operator(mdp, policy)
    return linear_solve(solver, operator, mdp.modulus, cotangent, transpose=True, guess=guess, share=False)


def as_upper_variable(x: Any) -> Any:
    """x with array leaves. Raises InputError where a leaf is not floating point."""

    def convert(path, leaf):
        where = f"x{jax.tree_util.keystr(path)}"
        leaf = as_array(where, leaf)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"{where}: expected floating-point numbers, got {leaf.dtype}; use x.astype(float)")
        return leaf

    return jax.tree_util.tree_map_with_path(convert, x)
