"""The choices that a config can name: every solver, linear solver, response, agent, ... that exists, with its options.

Nothing is listed twice: the choices of a kind are its classes, the library's public ones and the user's own, and their
options are the arguments of their constructors.
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import optax

import bilevel_jax as bj
from bilevel_jax import linear, solvers
from bilevel_jax.algorithms.registry import BUDGET, algorithm_names, builder
from bilevel_jax.core.schedules import Schedule

KINDS: dict[str, type] = {
    "solver": bj.Solver,
    "linear solver": bj.LinearSolver,
    "preconditioner": bj.Preconditioner,
    "method": bj.Method,
    "response": bj.estimators.Response,
    "baseline": bj.estimators.Baseline,
    "agent": bj.agents.Agent,
    "labels": bj.algorithms.Labels,
    "network": bj.networks.Network,
    "schedule": Schedule,
}
"""Sections that are classes, by what they are called."""

# Arguments that are several numbers and have no name of their own.
GROUPS: tuple[type, ...] = (bj.algorithms.Reuse,)
NAMESPACES = (bj, solvers, linear, bj.estimators, bj.agents, bj.algorithms, bj.networks)
SPELLING = {"BiCGStab": "bicgstab", "NatureCNN": "nature_cnn", "RewardCNN": "reward_cnn"}
OPTIMIZERS = (
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad", "fromage", "lamb",
    "lars", "lion", "nadam", "nadamw", "novograd", "optimistic_adam_v2", "optimistic_gradient_descent", "radam",
    "rmsprop", "sgd", "sign_sgd", "signum", "sm3", "yogi",
)  # fmt: skip
LEARNING_RATES = {"sgd": 0.1}
LEARNING_RATE = 0.05


@dataclasses.dataclass(frozen=True)
class Option:
    """One argument that a config can write.

    `hint` is the type of a number, truth value or text. Where a section may stand, `bases` are the classes of which it
    names one, and `fixed` is the class of a section without a name. `default` is `inspect.Parameter.empty` where the
    option has to be given. `of_key`: the number is the seed of a random key, the argument `key`.
    """

    name: str
    default: Any
    hint: Any = None
    bases: tuple[type, ...] = ()
    fixed: type | None = None
    of_key: bool = False

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def scalar(self) -> bool:
        """Whether a number, truth value or text may stand here."""
        return self.hint is not None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Something that a section can name: `build` is called with its options by name."""

    name: str
    build: Callable[..., Any]
    options: tuple[Option, ...]
    rivals: tuple[type, ...] = ()  # other classes of the same name

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.build) or "").partition("\n")[0]


def choices(bases: Iterable[type]) -> dict[str, Choice]:
    """By name, every public class that is one of the bases, or derived from one; algorithms are those registered."""
    found: dict[str, Choice] = {}
    for base in bases:
        if base is bj.algorithms.Algorithm:
            found |= {name: algorithm(name) for name in algorithm_names()}
            continue
        for kind in _derived(base):
            name, before = name_of(kind), found.get(name_of(kind))
            same = before is None or before.build is kind or _place(before.build) == _place(kind)  # defined anew
            if before is None or same:
                found[name] = Choice(name, kind, options_of(kind))
            else:
                found[name] = dataclasses.replace(before, rivals=(*before.rivals, kind))
    return dict(sorted(found.items()))


def algorithm(name: str) -> Choice:
    """A registered algorithm; its builder takes the problem and the upper level first."""
    return Choice(name, builder(name), options_of(builder(name), skip=2))


def name_of(kind: type) -> str:
    """The name of a class in a config: PolicyIteration is policy_iteration."""
    if kind.__name__ in SPELLING:
        return SPELLING[kind.__name__]
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", kind.__name__).lower()


def _derived(base: type) -> Iterator[type]:
    """The base and what is derived from it, as far as it can be made and is public."""
    for kind in (base, *base.__subclasses__()):
        if kind is not base:
            yield from _derived(kind)
        elif _is_choice(kind):
            yield kind


def _is_choice(kind: type) -> bool:
    """Whether a config can name the class: it is public, can be made, and needs no array or function."""
    if inspect.isabstract(kind) or kind.__name__.startswith("_") or not _is_public(kind):
        return False
    writable = {"key" if option.of_key else option.name for option in options_of(kind)}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    own = [parameter for parameter in inspect.signature(kind).parameters.values() if parameter.kind not in variadic]
    return {parameter.name for parameter in own if parameter.default is parameter.empty} <= writable


def _place(kind: Any) -> str:
    """Where a class was defined."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _is_public(kind: type) -> bool:
    """Whether a class is the user's own, or one of the names that the library gives to users."""
    if not kind.__module__.startswith("bilevel_jax."):
        return True
    return any(getattr(namespace, kind.__name__, None) is kind for namespace in NAMESPACES)


@functools.cache
def options_of(build: Callable[..., Any], skip: int = 0) -> tuple[Option, ...]:
    """The arguments of a class or function that a config can write, without the first `skip`."""
    made = [_option(parameter) for parameter in list(_parameters(build))[skip:] if parameter.name != BUDGET]
    return tuple(option for option in made if option is not None)


def _parameters(build: Any) -> Iterator[inspect.Parameter]:
    """Arguments by name; what a class hands on by **options is its parents'."""
    seen = set()
    for made in build.__mro__ if inspect.isclass(build) else (build,):
        if made is object:
            return
        parameters = inspect.signature(made, eval_str=True).parameters.values()
        for parameter in parameters:
            if parameter.name not in seen and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                seen.add(parameter.name)
                yield parameter
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return


def _option(parameter: inspect.Parameter) -> Option | None:
    """None for what a config cannot write, such as an array or a function."""
    hint, default = parameter.annotation, parameter.default
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    nullable = default is None or types.NoneType in parts
    if parameter.name == "key" and jax.Array in parts:
        return Option("seed", 0, hint=int, of_key=True)
    fixed = next((part for part in parts if part in GROUPS), None)
    if fixed is not None:
        return Option(parameter.name, default, fixed=fixed)
    kinds = (*KINDS.values(), bj.algorithms.Algorithm)
    bases = tuple(part for part in parts if inspect.isclass(part) and issubclass(part, kinds))
    schedule = (Schedule,) if any(part is Callable or typing.get_origin(part) is Callable for part in parts) else ()
    scalar = next(
        (part for part in parts if typing.get_origin(part) is Literal or part in (bool, int, float, str)), None
    )
    if bases:  # beside a section, a number or text may stand where the annotation has both
        beside = scalar | None if scalar is not None and nullable else scalar
        return Option(parameter.name, default, hint=beside, bases=bases)
    if scalar is None and hint is Any:
        scalar = type(default) if isinstance(default, bool | int | float | str) else float | int
    if scalar is None:
        return Option(parameter.name, default, bases=schedule) if schedule else None
    return Option(parameter.name, default, hint=scalar | None if nullable else scalar, bases=schedule)


def optimizers() -> dict[str, Choice]:
    """By name, optax's optimizers, with the gradient clipped to `clip_norm` (2-norm) if given; and L-BFGS."""
    made = {name: _optimizer(name) for name in OPTIMIZERS if hasattr(optax, name)}
    return dict(sorted((made | {"lbfgs": Choice("lbfgs", lbfgs, options_of(lbfgs))}).items()))


def _optimizer(name: str) -> Choice:
    rule = getattr(optax, name)
    options = [
        Option("learning_rate", LEARNING_RATES.get(name, LEARNING_RATE), hint=float, bases=(Schedule,)),
        Option("clip_norm", None, hint=float | None),
    ]
    for parameter in inspect.signature(rule).parameters.values():
        default = parameter.default
        unwritable = "mask" in parameter.name or "dtype" in parameter.name or parameter.name == "learning_rate"
        if unwritable or not isinstance(default, bool | int | float | None):
            continue
        hint = float | None if default is None else bool if isinstance(default, bool) else float
        hint = int if type(default) is int else hint
        options.append(Option(parameter.name, default, hint=hint))
    return Choice(name, rule, tuple(options))


def lbfgs(*, memory_size: int = 10, line_search_steps: int = 20) -> optax.GradientTransformation:
    """L-BFGS with a zoom line search, for algorithms that know phi; no step size to tune."""
    search = optax.scale_by_zoom_linesearch(max_linesearch_steps=line_search_steps, initial_guess_strategy="one")
    return optax.lbfgs(memory_size=memory_size, linesearch=search)


def projections() -> dict[str, Choice]:
    """By name, optax's projections that need numbers only: box, simplex, l2_ball, ..."""
    made = {}
    for name in dir(optax.projections):
        if not name.startswith("projection_"):
            continue
        rule = getattr(optax.projections, name)
        own = list(inspect.signature(rule).parameters.values())[1:]
        if any(parameter.name in ("a", "b") for parameter in own):  # vectors
            continue
        numbers = tuple(
            Option(p.name, p.default if p.default is p.empty else float(p.default), hint=float) for p in own
        )
        short = name.removeprefix("projection_")
        made[short] = Choice(short, rule, numbers)
    return made
