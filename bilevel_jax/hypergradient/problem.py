"""The bilevel problem: what the upper level chooses, and what it pays."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.bellman import check_compatible
from bilevel_jax.captures import as_run_by_jit
from bilevel_jax.errors import InputError
from bilevel_jax.functions import as_pytree
from bilevel_jax.mdp import MDP
from bilevel_jax.regularizers import Regularizer
from bilevel_jax.solvers import Solution
from bilevel_jax.validation import as_array, require_computable, require_kind


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

    Plain functions are static; when what they read was edited, the next call compiles anew (docs/composition.md). A
    function that is a pytree, such as `jax.tree_util.Partial(f, data)`, keeps its data as leaves.

    Raises:
      InputError: an argument that is not callable.
    """

    _mdp: Callable
    _regularizer: Callable
    _objective: Callable

    def __init__(self, mdp: Callable, regularizer: Regularizer | Callable, objective: Callable):
        constant = isinstance(regularizer, Regularizer)
        self._mdp = as_pytree("mdp", mdp)
        self._regularizer = _Constant(regularizer) if constant else as_pytree("regularizer", regularizer)
        self._objective = as_pytree("objective", objective)

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


def require_problem(problem: Any) -> None:
    """Raise InputError if the argument is no `Problem`, or one that jit cannot take."""
    require_problem_kind(problem)
    require_computable("problem", problem, any_floats=True)  # what is in it is the user's own


def require_problem_kind(problem: Any) -> None:
    """Raise InputError if the argument is no `Problem`, or no pytree."""
    require_kind("problem", problem, Problem)
    if jax.tree_util.all_leaves([problem]):
        raise InputError(
            f"problem: {type(problem).__name__} is no pytree; make it an equinox.Module, or use a "
            f"bilevel_jax.BilevelProblem"
        )


@as_run_by_jit
def lower_level(problem: Problem, x: Any) -> tuple[MDP, Regularizer]:
    """The MDP and the regularizer at x, checked. Outside jit the values are checked too.

    Raises:
      InputError: what the problem's functions return is no MDP or no Regularizer, or does not fit.
    """
    require_computable("problem", problem, any_floats=True)
    mdp, regularizer = problem.mdp(x), problem.regularizer(x)
    for name, value, kind in (("mdp", mdp, MDP), ("regularizer", regularizer, Regularizer)):
        if not isinstance(value, kind):
            raise InputError(f"{name}(x) must return a bilevel_jax.{kind.__name__}, got {type(value).__name__}")
        require_computable(f"{name}(x)", value)
    check_compatible(mdp, regularizer)
    return mdp, regularizer


def as_upper_variable(x: Any) -> Any:
    """x with array leaves. Raises InputError where a leaf is not floating point, and where there is no number."""

    def convert(path, leaf):
        where = f"x{jax.tree_util.keystr(path)}"
        dtype = getattr(leaf, "dtype", None)
        if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise InputError(
                f"{where}: a random key is no number to be chosen; keep it out of x, e.g. as a field of the problem"
            )
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise InputError(
                f"{where}: expected an array of numbers, got {type(leaf).__name__}; x holds what is differentiated, "
                f"and nothing else: split it, e.g. by equinox.partition(x, equinox.is_inexact_array)"
            )
        leaf = as_array(where, leaf)
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise InputError(f"{where}: expected real numbers, got {leaf.dtype}; give real and imaginary parts as two")
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"{where}: expected floating-point numbers, got {leaf.dtype}; use x.astype(float)")
        return leaf

    made = jax.tree_util.tree_map_with_path(convert, x)
    if not any(leaf.size for leaf in jax.tree.leaves(made)):
        raise InputError(
            f"x: has no number to be chosen, got {x!r}; for the objective alone, call problem.objective with the "
            f"solution that bilevel_jax.solve gives"
        )
    return made
