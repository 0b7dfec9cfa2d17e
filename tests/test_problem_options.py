"""Options of problems: none without effect is taken silently, none that is wrong ends in a traceback."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest

import bilevel_jax as bj
from bilevel_jax.problems import options, registry

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


def test_seeds_may_be_numpys_or_traced():
    for seed in (3, np.int64(3), jax.numpy.asarray(3)):
        options.require_seed(types.SimpleNamespace(seed=seed))
    jax.jit(lambda seed: options.require_seed(types.SimpleNamespace(seed=seed)))(3)
