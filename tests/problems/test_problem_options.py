"""Options of problems: none without effect is taken silently, none that is wrong ends in a traceback."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.problems import options, registry
from bilevel_jax.problems.random_process import smallest

WHOLE = [
    (name, field.name)
    for name in bj.problems.names()
    for field in dataclasses.fields(registry.spec(name).options)
    if isinstance(field.default, int) and not isinstance(field.default, bool)
]
make = functools.cache(bj.problems.make)


@pytest.mark.parametrize(("problem", "option"), WHOLE)
@pytest.mark.parametrize("value", [True, 2.5, "3", None, -1], ids=str)
def test_what_is_no_whole_number_is_refused(problem, option, value):
    with pytest.raises(bj.InputError, match=f"^{option}"):
        bj.problems.make(problem, **{option: value})


@pytest.mark.parametrize("problem", ["four_rooms", "environment_design", "inverse_rl"])
def test_maps_are_lists_or_texts(problem):
    rows = registry.spec(problem).options().rows
    built = [make(problem), *(bj.problems.make(problem, rows=given) for given in (list(rows), "\n".join(rows)))]
    structures = [jax.tree.structure(p) for p in built]
    assert len(set(map(hash, structures))) == 1  # a list has no hash, and jit needs one
    assert structures[0] == structures[1] == structures[2]


@pytest.mark.parametrize(
    ("problem", "given", "message"),
    [
        ("reward_shaping", {"rows": ("sg.",)}, "rows: has no effect in the layout 'chain'"),
        ("reward_shaping", {"layout": "grid", "states": 12}, "states: has no effect in the layout 'grid'"),
        ("inverse_rl", {"length": 20}, "length: has no effect unless demonstrations are drawn"),
    ],
)
def test_options_without_effect_are_refused(problem, given, message):
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make(problem, **given)


@pytest.mark.parametrize("value", [[1.0, 2.0], [[1.0], [1.0, 2.0]], np.ones(2), jax.numpy.ones((1, 1)), ()], ids=str)
def test_a_number_is_one(value):
    for problem in bj.problems.names():
        with pytest.raises(bj.InputError, match=r"temperature: expected one number, got several"):
            bj.problems.make(problem, temperature=value)


@pytest.mark.parametrize(
    ("problem", "given", "message"),
    [
        ("inverse_rl", {"grounds": 3}, "grounds: expected a text, got 3"),
        ("inverse_rl", {"demonstrations_file": 3}, "demonstrations_file: expected a text, got 3"),
        ("inverse_rl", {"rows": None}, "rows: expected a list of texts, got None"),
        ("four_rooms", {"rows": (1, 2)}, "rows: expected texts, a letter per cell, got 1; put quotes around each row"),
        ("four_rooms", {"rows": ("", "")}, "rows: the map is empty"),
        ("four_rooms", {"goals": 3}, r"goals: expected a list of \(row, column\), got 3"),
        ("tax_design", {"households": 3}, "households: expected a list of rows, got 3"),
        ("tax_design", {"households": (1, 2)}, "households: expected a list of numbers, got 1"),
        ("tax_design", {"households": ((), ())}, "households: expected at least one row"),
        ("garnet", {"price": np.nan}, "price is nan"),
    ],
)
def test_options_of_another_kind_are_refused(problem, given, message):
    with pytest.raises(bj.InputError, match=message):
        bj.problems.make(problem, **given)


def test_seeds_may_be_numpys_or_traced():
    for seed in (3, np.int64(3), jax.numpy.asarray(3)):
        options.require_seed(types.SimpleNamespace(seed=seed))
    jax.jit(lambda seed: options.require_seed(types.SimpleNamespace(seed=seed)))(3)


@pytest.mark.parametrize("count", [1, 3, 32, 33, 40])
def test_the_smallest_are_those_of_a_sort(count):
    """By one minimum after another or by a sort, also among equals: of those the first."""
    values = np.random.default_rng(0).integers(12, size=(5, 2, 40)) / 12
    want = np.moveaxis(np.argsort(values, -1, kind="stable")[..., :count], -1, 0)
    got = smallest(jax.numpy.asarray(values), count)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, want)


CALLS = [(name, {}) for name in bj.problems.names()]
CALLS += [
    ("inverse_rl", {"demonstrations": 5}),
    ("tabular_rlhf", {"features": 2}),
    ("four_rooms", {"transition": "stencil"}),
]


@pytest.fixture
def compiled():
    """Names of what was handed to the compiler so far."""
    found = []

    def listen(event, _, **about):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            found.append(about.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize(("name", "given"), CALLS)
def test_other_numbers_compile_nothing(compiled, name, given):
    jax.clear_caches()
    seeded = {"seed": 1} if "seed" in {field.name for field in dataclasses.fields(registry.spec(name).options)} else {}
    bj.problems.make(name, **given, temperature=0.3, discount=0.5)
    assert compiled
    compiled.clear()
    bj.problems.make(name, **given, **seeded, temperature=0.4, discount=0.6)
    assert compiled == []
