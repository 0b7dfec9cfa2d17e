"""What is registered is checked when it is registered, and what is built when it is built; each error has a remedy."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
import pytest
from pydantic.dataclasses import dataclass as pydantic_dataclass

import bilevel_jax as bj
from bilevel_jax.core.options import check_options, choices, make_options, nearest
from bilevel_jax.problems import registry

NAME = "registered_by_a_test"
frozen = dataclasses.dataclass(frozen=True)


@pytest.fixture(autouse=True)
def unregister():
    yield
    registry._SPECS.pop(NAME, None)  # other tests are about the library's problems


def options_of(hint, default, name="value"):
    """A frozen dataclass of one field."""
    return dataclasses.make_dataclass("Options", [(name, hint, dataclasses.field(default=default))], frozen=True)


@frozen
class Good:
    """Good options."""

    number: float = 1.0
    kind: Literal["dense", "successor"] = "dense"


@dataclasses.dataclass
class Melted:
    number: float = 1.0


@frozen
class WithoutDefault:
    number: float


@frozen
class Computed:
    number: float = dataclasses.field(default=1.0, init=False)


@frozen
class Unknown:
    number: "Nowhere" = 1.0  # noqa: F821


@frozen
class Failing:
    number: float = 1.0

    def __post_init__(self):
        raise ValueError("no number is right")


class Plain:
    number: float = 1.0


def garnet(options):
    return bj.problems.make("garnet", states=3)


OPTIONS = {
    "no class": (Good(), r"options: expected a dataclass, got Good\(.*@dataclasses.dataclass\(frozen=True\)"),
    "none": (None, r"options: expected a dataclass, got None"),
    "no dataclass": (Plain, r"options: expected a dataclass, got <class .*Plain'>; write @dataclasses"),
    "not frozen": (Melted, r"options: Melted is not frozen; write @dataclasses.dataclass\(frozen=True\)"),
    "no default": (WithoutDefault, r"options: WithoutDefault.number has no default; write number: float = "),
    "no option": (Computed, r"options: Computed.number: init=False .*compute it where it is used"),
    "unknown type": (Unknown, r"options: Unknown: its types cannot be read \(NameError: .*'Nowhere'.*import them"),
    "defaults fail": (Failing, r"options: Failing\(\) fails with ValueError: no number is right; the defaults"),
}
OPTIONS |= {
    f"called {name}": (
        options_of(float, 1.0, name),
        rf"options: Options.{name}: configs use name, label, budget for something else; give it another name",
    )
    for name in ("name", "label", "budget")
}
UNWRITABLE = {
    "dict[str, float]": dict[str, float],
    "tuple": tuple,
    "list": list,
    "ndarray": np.ndarray,
    "Any": Any,
    "complex": complex,
    "bytes": bytes,
    "Sequence": Sequence[float],
    "set": set[int],
    "tuple of a union": tuple[int | bytes, ...],
    "optional": jax.Array | None,
    "literal": Literal[b"dense"],
}
OPTIONS |= {
    f"type {name}": (options_of(hint, None), r"options: Options.value: a config cannot write .*; take bool, int, float")
    for name, hint in UNWRITABLE.items()
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_no_config_can_write_are_refused(case):
    options, message = OPTIONS[case]
    with pytest.raises(bj.InputError, match=message):
        bj.problems.register(NAME, options, garnet)
    assert NAME not in bj.problems.names()


@pytest.mark.parametrize("name", ["", "two words", "a-b", "a.b", "straße", 3, None, ["a"], b"toll"], ids=str)
def test_names_are_words(name):
    with pytest.raises(bj.InputError, match=r"name: expected a string of letters, digits and underscores, got"):
        bj.problems.register(name, Good, garnet)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (3, r"build: expected a function, got 3; give a function, or a class, of the options"),
        (None, r"build: expected a function, got None"),
        (lambda: None, r"build: .* cannot be called with the options alone \(too many positional"),
        (lambda options, seed: None, r"build: .* cannot be called with the options alone \(missing .*'seed'"),
    ],
)
def test_what_builds_takes_the_options(build, message):
    with pytest.raises(bj.InputError, match=message):
        bj.problems.register(NAME, Good, build)


WRITABLE = {
    "bool": (bool, False),
    "int": (int, 1),
    "float": (float, 1.0),
    "str": (str, ""),
    "optional": (float | None, None),
    "literal": (Literal["a", 1, True, None], "a"),
    "tuple": (tuple[float, ...], ()),
    "nested": (tuple[tuple[int, str], ...] | None, None),
    "annotated": (Annotated[float, "at least 0"], 1.0),
    "no field": (ClassVar[dict], {}),
}


@pytest.mark.parametrize("case", WRITABLE)
def test_what_configs_write_is_taken(case):
    hint, default = WRITABLE[case]
    check_options("options", dataclasses.make_dataclass("Options", [("value", hint, default)], frozen=True), ("name",))


def test_defaults_may_be_made_by_functions():
    made = dataclasses.field(default_factory=list)
    check_options("options", dataclasses.make_dataclass("Options", [("value", list[float | int], made)], frozen=True))


def test_pydantics_dataclasses_are_taken():
    @pydantic_dataclass(frozen=True)
    class Section:
        number: float = 1.0

    check_options("options", Section)
    with pytest.raises(bj.InputError, match="not frozen"):
        check_options("options", pydantic_dataclass(Melted))


class Builder:
    def __call__(self, options):
        return garnet(options)


@pytest.mark.parametrize(
    "build",
    [garnet, functools.partial(garnet), Builder(), lambda options, seed=0: garnet(options)],
    ids=["function", "partial", "object", "default"],
)
def test_functions_and_objects_may_build(build):
    bj.problems.register(NAME, Good, build)
    assert bj.problems.make(NAME, number=2.0).base.shape == (3, 3)


def test_a_name_is_taken_once():
    bj.problems.register(NAME, Good, garnet)
    with pytest.raises(bj.InputError, match=rf"name: a problem '{NAME}' is registered already; take another name"):
        bj.problems.register(NAME, Good, garnet)


class Startless(bj.Problem):
    def mdp(self, x):
        return bj.MDP(np.ones((1, 1, 1)), np.zeros((1, 1)), 0.5)

    def regularizer(self, x):
        return bj.Unregularized()

    def objective(self, x, solution):
        return x.sum()


class Fixed(Startless):
    start: jax.Array


class DuckTyped:
    mdp = regularizer = objective = start = lambda self, *args: None


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (Startless(), r"build: problem '\w+' has no start; write a method start\(self, key\) of Startless that"),
        (Fixed(np.zeros(3)), r"has no start; write a method"),
        (DuckTyped(), r"build: problem '\w+' is DuckTyped, neither a bilevel_jax.Problem nor .*; derive its class"),
        (Startless, r"is the class Startless, neither .* return an instance of it"),
        (None, r"is NoneType, neither"),
    ],
    ids=["no start", "a start that is an array", "no base class", "a class", "nothing"],
)
def test_what_was_built_is_a_problem_with_a_start(built, message):
    bj.problems.register(NAME, Good, lambda options: built)
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make(NAME)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "stencil"}, r"^kind: expected 'dense' or 'successor', got 'stencil'"),
        ({"kind": 0}, r"^kind: expected 'dense' or 'successor', got 0"),
        ({"numer": 1.0}, r"^numer: problem '\w+' has no such option, did you mean 'number'\?; it has number, kind"),
    ],
)
def test_choices_are_checked_for_own_problems_too(given, message):
    bj.problems.register(NAME, Good, garnet)
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make(NAME, **given)


def test_truth_values_are_choices():
    options = options_of(bool, False)
    for value in (True, np.True_):
        assert make_options("problem", "toll", options, {"value": value}).value
    for value in (1, "yes", None, np.ones(2)):
        with pytest.raises(bj.InputError, match=r"value: expected False or True, got"):
            make_options("problem", "toll", options, {"value": value})
    with pytest.raises(bj.InputError, match=r"value: expected False or True, got a traced value"):
        jax.jit(lambda value: make_options("problem", "toll", options, {"value": value}))(True)
    with pytest.raises(bj.InputError, match=r"x: algorithm 'sgd' has no such option; it has none"):
        make_options("algorithm", "sgd", dataclasses.make_dataclass("Empty", [], frozen=True), {"x": 1})


def test_choices_of_a_type():
    assert choices(Literal["a", "b"]) == ("a", "b")
    assert choices(Literal["a"] | None) == ("a", None)
    assert choices(bool) == (False, True)
    for hint in (str, float, int | None, tuple[bool, ...], Literal["a"] | float):
        assert choices(hint) == ()


@pytest.mark.parametrize("name", [None, 3, ["garnet"], "garnets"], ids=str)
def test_names_of_nothing_are_refused(name):
    with pytest.raises(bj.InputError, match=r"name: no problem .*; there are environment_design, "):
        bj.problems.make(name)


def test_the_nearest_word():
    assert nearest("temp", ("price", "temperature")) == ", did you mean 'temperature'?"
    assert nearest("temp", ()) == ""


# Algorithms.


def untyped(problem, upper):
    return bj.algorithms.pbrl(problem, upper)


@pytest.mark.parametrize(
    ("name", "build", "message"),
    [
        ("my-algorithm", bj.algorithms.pbrl, "name: expected a string of letters, digits and underscores"),
        (3, bj.algorithms.pbrl, "name: expected a string"),
        ("pbrl", bj.algorithms.pbrl, "name: an algorithm 'pbrl' is registered already"),
        (NAME, "pbrl", "build: expected an Algorithm class or a function, got str"),
        (NAME, untyped, "build: expected an Algorithm class, or a function annotated to return one"),
        (NAME, dict, "build: expected an Algorithm class, or a function annotated to return one"),
    ],
)
def test_algorithms_are_checked_when_they_are_registered(name, build, message):
    with pytest.raises(bj.InputError, match=message):
        bj.algorithms.register_algorithm(name, build)
    assert NAME not in bj.algorithms.algorithm_names()


def test_an_algorithm_that_is_not_registered_names_the_nearest():
    with pytest.raises(bj.InputError, match="name: no algorithm 'm_sobirll', did you mean 'm_sobirl'"):
        bj.algorithms.make_algorithm("m_sobirll", None, None)
