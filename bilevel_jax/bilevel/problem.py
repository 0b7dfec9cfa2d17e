"""The bilevel problem: what the upper level chooses, and what it pays for the answer."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from bilevel_jax.core.arrays import Scalar
from bilevel_jax.core.captures import as_run_by_jit
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.functions import as_pytree
from bilevel_jax.core.validation import as_array, require_computable, require_kind
from bilevel_jax.mdp.bellman import check_compatible
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import Regularizer
from bilevel_jax.solvers import Solution


class Problem(eqx.Module):
    """A bilevel problem: three functions of the upper variable x, any pytree of floats.

    The base class of problems whose model is known. A subclass is an `equinox.Module`: its numbers are leaves,
    so that changing or vmapping them does not recompile. MDPs with batch axes are several lower
    levels under one x; the objective then sees every field of the solution with those axes.

    Example:
      >>> class Bonus(bj.Problem):
      ...     temperature: jax.Array
      ...
      ...     def mdp(self, x):  # one state, two actions, the first of which gets a bonus
      ...         return bj.MDP(jnp.ones((1, 2, 1)), jnp.stack([x, jnp.zeros(())])[None], 0.5)
      ...
      ...     def regularizer(self, x):
      ...         return bj.ShannonEntropy(self.temperature)
      ...
      ...     def objective(self, x, solution):  # the designer pays the bonus, and gains 1, per first action
      ...         return (x - 1) * solution.policy[0, 0]
      >>> gradient = bj.hypergradient(Bonus(jnp.asarray(1.0)), jnp.asarray(0.0)).gradient  # 1 / 2 - 1 / 4
      >>> round(float(gradient), 3)
      0.25
    """

    @abc.abstractmethod
    def mdp(self, x: Any) -> MDP:
        """The lower level's process at x."""

    @abc.abstractmethod
    def regularizer(self, x: Any) -> Regularizer:
        """The lower level's regularizer at x."""

    @abc.abstractmethod
    def objective(self, x: Any, solution: Solution) -> Scalar:
        """What the upper level pays, a scalar."""


class BilevelProblem(Problem):
    """A `Problem` from three functions: minimise objective(x, solve(mdp(x), regularizer(x))) over x.

    Args:
      mdp: x -> `MDP`.
      regularizer: a `Regularizer`, or x -> `Regularizer`.
      objective: (x, `Solution`) -> scalar to be minimised.

    Plain functions are static. After a value that they read was edited, the next call compiles again
    (docs/composition.md). A function that is a pytree, such as `jax.tree_util.Partial(f, data)`, keeps its data as
    leaves.

    Raises:
      InputError: an argument that is not callable.

    Example:
      >>> problem = bj.BilevelProblem(
      ...     mdp=lambda x: bj.MDP(jnp.ones((1, 2, 1)), jnp.stack([x, jnp.zeros(())])[None], 0.5),
      ...     regularizer=bj.ShannonEntropy(1.0),
      ...     objective=lambda x, solution: (x - 1) * solution.policy[0, 0],
      ... )
      >>> round(float(bj.hypergradient(problem, jnp.asarray(0.0)).gradient), 3)
      0.25
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
    """Raise InputError if the argument is no `Problem`, or one that jit cannot take.

    Example:
      >>> bj.bilevel.require_problem(bj.problems.make("garnet"))
    """
    require_problem_kind(problem)
    require_computable("problem", problem, any_floats=True)  # what is in it is the user's own


def require_problem_kind(problem: Any) -> None:
    """Raise InputError if the argument is no `Problem`."""
    if not isinstance(problem, type | Problem) and all(hasattr(problem, name) for name in Problem.__abstractmethods__):
        raise InputError(
            f"problem: {type(problem).__name__} has the methods of a bilevel_jax.Problem and is none; derive its "
            f"class from bilevel_jax.Problem, or give the three to bilevel_jax.BilevelProblem"
        )
    require_kind("problem", problem, Problem)


@as_run_by_jit
def lower_level(problem: Problem, x: Any) -> tuple[MDP, Regularizer]:
    """Return the MDP and the regularizer at x, checked. Outside jit their values are checked, too.

    Raises:
      InputError: the problem's functions return no MDP or no Regularizer, or the two do not fit.

    Example:
      >>> problem = bj.problems.make("garnet")
      >>> x = problem.start(jax.random.key(0))
      >>> mdp, regularizer = bj.bilevel.lower_level(problem, x)
      >>> mdp.reward.shape
      (8, 3)
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
    """Return x with array leaves.

    Raises:
      InputError: a leaf is not floating point, or there is no number.

    Example:
      >>> bj.bilevel.as_upper_variable({"bonus": 1.0})["bonus"].dtype
      dtype('float32')
    """

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
