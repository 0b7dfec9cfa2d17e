"""The registry: a name, a dataclass of options, and the function that builds the problem from them."""

import dataclasses
from collections.abc import Callable
from typing import Any

from bilevel_jax.bilevel import Problem, SampledProblem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.options import check_build, check_name, check_options, make_options, nearest

RESERVED = ("name", "label", "budget")  # what a problem's section of a config has beside its options


@dataclasses.dataclass(frozen=True)
class ProblemSpec:
    """A registered problem.

    `build(options)` returns a `bilevel_jax.Problem`, a `SampledProblem` or both, with `start(key)`, which
    draws an upper variable to start from. Options that are floats may be traced: they become leaves.
    """

    name: str
    options: type
    build: Callable[[Any], Any]

    @property
    def summary(self) -> str:
        """The first line of the options' docstring."""
        return (self.options.__doc__ or "").strip().partition("\n")[0]


_SPECS: dict[str, ProblemSpec] = {}


def register(name: str, options: type, build: Callable[[Any], Any]) -> None:
    """Add a problem to the registry, so that `make` and configs know it by its name.

    Args:
      name: what `make` takes: letters, digits and underscores.
      options: a frozen dataclass. Each field has a default and a type that a config can write: bool, int, float, str,
        Literal, and unions, tuples and lists of these. None is called name, label or budget.
      build: options -> problem, see `ProblemSpec`.

    Raises:
      InputError: the name is taken, or an argument is not as above.

    Example:
      >>> @dataclasses.dataclass(frozen=True)
      ... class SmallGarnetOptions:
      ...     price: float = 0.1
      >>> def build(options):
      ...     return bj.problems.make("garnet", states=3, price=options.price)
      >>> bj.problems.register("small_garnet", SmallGarnetOptions, build)
      >>> round(float(bj.problems.make("small_garnet", price=0.2).price), 3)
      0.2
    """
    check_name("name", name)
    if name in _SPECS:
        raise InputError(f"name: a problem {name!r} is registered already; take another name")
    check_options("options", options, RESERVED)
    check_build("build", build)
    _SPECS[name] = ProblemSpec(name, options, build)


def names() -> tuple[str, ...]:
    """Return the registered names, sorted.

    Example:
      >>> "four_rooms" in bj.problems.names()
      True
    """
    return tuple(sorted(_SPECS))


def spec(name: str) -> ProblemSpec:
    """Return the `ProblemSpec` that is registered under a name. Raises InputError that names the nearest one.

    Example:
      >>> bj.problems.spec("garnet").summary
      'Garnet random MDP whose designer pays bonuses to lower a cost of its own.'
    """
    if not isinstance(name, str) or name not in _SPECS:
        raise InputError(f"name: no problem {name!r}{nearest(str(name), _SPECS)}; there are {', '.join(names())}")
    return _SPECS[name]


def make(name: str, **options: Any) -> Any:
    """Build a problem by name.

    Raises:
      InputError: unknown name or option (the nearest valid one is named), a value out of range, or a registered
        function that returns no problem or one without `start`.

    Example:
      >>> problem = bj.problems.make("four_rooms", beta=3.0)
      >>> problem.start(jax.random.key(0)).shape
      (105,)
    """
    found = spec(name)
    problem = found.build(make_options("problem", name, found.options, options))
    _check_built(name, problem)
    return problem


def _check_built(name: str, problem: Any) -> None:
    """Raise InputError if what was built is no problem, or has no start."""
    if not isinstance(problem, Problem | SampledProblem):
        given = f"the class {problem.__name__}" if isinstance(problem, type) else type(problem).__name__
        raise InputError(
            f"build: problem {name!r} is {given}, neither a bilevel_jax.Problem nor a "
            f"bilevel_jax.SampledProblem; derive its class from bilevel_jax.Problem if its model is known, from "
            f"bilevel_jax.SampledProblem if it has a simulator, and return an instance of it"
        )
    if not callable(getattr(problem, "start", None)):
        raise InputError(
            f"build: problem {name!r} has no start; write a method start(self, key) of {type(problem).__name__} that "
            f"returns an upper variable to start from, such as 0.1 * jax.random.normal(key, (n,))"
        )
