"""The registry of algorithms: a name, and a function that builds the algorithm from problem, upper level and
options.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from bilevel_jax.algorithms.base import Algorithm
from bilevel_jax.core.errors import InputError, RequirementError
from bilevel_jax.core.options import check_name, nearest

# What `build` may take beside the problem, the upper level and its options.
BUDGET = "transitions"

_BUILDERS: dict[str, Callable[..., Any]] = {}


def register_algorithm(name: str, build: Callable[..., Any]) -> None:
    """Add an algorithm to the registry: `bilevel-jax run`, `compare` and `list` know it from then on.

    Args:
      name: letters, digits and underscores, as configs write it.
      build: an `Algorithm` class, or a function whose return annotation is one. It is called as
        `build(problem, upper, **options)`. Its options are its keyword arguments after the first two. Configs write
        them as numbers or texts; where the annotation is a class such as `Solver`, `Agent` or `Response`, as a section
        with the name of one. An argument `transitions` is no option: it gets a run's whole budget, or None.

    Raises:
      InputError: the name is taken or no name, `build` is not callable, or it is not known which class it builds.

    Example:
      >>> class Mine(bj.algorithms.Algorithm): ...        # docs/extending.md
      >>> bj.algorithms.register_algorithm("mine", Mine)
    """
    check_name("name", name)
    if name in _BUILDERS:
        raise InputError(f"name: an algorithm {name!r} is registered already; choose another name")
    if not callable(build):
        raise InputError(f"build: expected an Algorithm class or a function, got {type(build).__name__}")
    class_of(build)
    _BUILDERS[name] = build


def class_of(build: Callable[..., Any]) -> Any:
    """Return the class of the algorithms that `build` builds. Raises InputError where nothing says it."""
    made = build if inspect.isclass(build) else typing.get_type_hints(build).get("return")
    if not hasattr(made, "requires"):
        raise InputError(
            f"build: expected an Algorithm class, or a function annotated to return one (-> MyAlgorithm), got "
            f"{getattr(build, '__name__', build)!r} -> {made!r}"
        )
    return made


def algorithm_names() -> tuple[str, ...]:
    """Return the registered names, sorted.

    Example:
      >>> "m_sobirl" in bj.algorithms.algorithm_names()
      True
    """
    return tuple(sorted(_BUILDERS))


def builder(name: str) -> Callable[..., Any]:
    """Return the class or function that is registered under a name. Raises InputError that names the nearest one."""
    if name not in _BUILDERS:
        raise InputError(
            f"name: no algorithm {name!r}{nearest(name, _BUILDERS)}; there are {', '.join(algorithm_names())}"
        )
    return _BUILDERS[name]


def requires(name: str, problem: Any) -> str | None:
    """Return None if the algorithm runs on the problem, or else the reason why it does not, as a phrase after the
    problem's name.

    Example:
      >>> print(bj.algorithms.requires("m_sobirl", bj.problems.make("garnet")))
      None
    """
    return class_of(builder(name)).requires(problem)


def make_algorithm(name: str, problem: Any, upper: Any, *, transitions: int | None = None, **options: Any) -> Algorithm:
    """Build a registered algorithm.

    Args:
      name: as registered.
      problem: one that has what the algorithm requires.
      upper: an optax transformation, or an `UpperLevel`.
      transitions: the whole budget of the run, for algorithms whose sizes depend on it.
      options: the algorithm's own options; those that are left out have their defaults.

    Raises:
      RequirementError: the problem lacks what the algorithm requires.
      InputError: no such name, or an option that the algorithm refuses.

    Example:
      >>> algorithm = bj.algorithms.make_algorithm("m_sobirl", bj.problems.make("garnet"), optax.adam(0.1))
      >>> type(algorithm).__name__
      'MSoBiRL'
    """
    build = builder(name)
    if (reason := class_of(build).requires(problem)) is not None:
        raise RequirementError(type(problem).__name__, reason)
    if BUDGET in inspect.signature(build).parameters:
        options[BUDGET] = transitions
    return build(problem, upper, **options)
