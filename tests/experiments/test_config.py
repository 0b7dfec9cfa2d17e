"""What an accepted config becomes: defaults, overrides, grids, sections that are left out."""

import dataclasses
import itertools
import re
import warnings
from pathlib import Path

import jax
import pytest
import yaml
from experiment_helpers import BARE_SYNTHETIC, ROOMS_BY_ADAM, library_choices, write
from helpers import WITH_MODEL

from bilevel_jax import problems
from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.choices import KINDS, optimizers
from bilevel_jax.experiments.config import Config, load, sweepable

pytestmark = pytest.mark.usefixtures("nothing_is_computed")

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted([*FOLDER.glob("*.yaml"), *(FOLDER / "deep").glob("*.yaml")])

ADAM = {
    "name": "adam",
    "learning_rate": 0.05,
    "clip_norm": None,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "eps_root": 0.0,
    "nesterov": False,
}
SGD = {"name": "sgd", "learning_rate": 0.1, "clip_norm": None, "momentum": None, "nesterov": False}


@pytest.fixture
def x64_off():
    """As in a fresh process, where the config is read before float64 is switched on."""
    jax.config.update("jax_enable_x64", False)
    yield
    jax.config.update("jax_enable_x64", True)


def test_defaults_are_filled_in(tmp_path):
    config = load(write(tmp_path, "problem: synthetic\n", "small.yaml"))
    assert config.name == "small"
    assert config.values == {
        "problem": {
            "name": "synthetic",
            "states": 10,
            "actions": 5,
            "dimension": 100,
            "discount": 0.5,
            "temperature": 1.0,
            "seed": 0,
        },
        "algorithm": {
            "name": "m_sobirl",
            "solver": {"name": "policy_iteration", "tolerance": None, "max_iterations": 1000, "linear_solver": None},
            "adjoint": {"name": "direct"},
        },
        "optimizer": ADAM,
        "projection": None,
        "temperature": None,
        "iterations": 500,
        "record_every": 10,
        "budget": {"transitions": None, "seconds": None},
        "checkpoint": {"minutes": 5.0, "points": None, "keep": 2},
        "samples": 1000,
        "seed": 0,
        "precision": "float64",
        "memory_limit_mb": 4096.0,
        "sweep": {},
        "modules": [],
    }
    assert config.grid == [{"seed": 0}]


@pytest.mark.parametrize("name", problems.names())
def test_problem_defaults_are_those_of_the_registry(name, tmp_path):
    values = load(write(tmp_path, f"problem: {{name: {name}}}\n")).values["problem"]
    defaults = dataclasses.asdict(problems.spec(name).options())
    assert yaml.safe_dump(values) == yaml.safe_dump({"name": name, **as_lists(defaults)})


def as_lists(value):
    if isinstance(value, dict):
        return {key: as_lists(item) for key, item in value.items()}
    return [as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def test_overrides_win(tmp_path):
    path = write(tmp_path, ROOMS_BY_ADAM)
    overrides = [
        "problem.temperature=0.5",
        "problem.goals=[[1, 1]]",
        "algorithm.solver.name=value_iteration",
        "algorithm.solver.max_iterations=7",
        "optimizer={name: sgd, learning_rate: 1e-3}",
        "seed=4",
        "seed=5",
        "precision=float32",
        "sweep.problem.beta=[2]",
        "sweep.problem.slip=[0.1, 0.2]",
    ]
    values = load(path, overrides).values
    assert values["problem"]["temperature"] == 0.5
    assert values["problem"]["goals"] == [[1, 1]]
    assert values["algorithm"]["solver"] == {
        "name": "value_iteration",
        "tolerance": None,
        "max_iterations": 7,
        "centred": True,
    }
    assert values["optimizer"] == SGD | {"learning_rate": 0.001}
    assert values["seed"] == 5
    assert values["precision"] == "float32"
    assert values["sweep"] == {"seed": [0, 1], "problem.beta": [2], "problem.slip": [0.1, 0.2]}
    # the rest stays the file's
    assert values["iterations"] == 5
    assert values["algorithm"]["adjoint"] == {"name": "direct"}


def test_override_of_a_whole_sweep(tmp_path):
    path = write(tmp_path, ROOMS_BY_ADAM)
    assert load(path, ["sweep={}"]).grid == [{"seed": 0}]
    assert load(path, ["sweep={}", "seed=7"]).grid == [{"seed": 7}]


def test_numbers_as_yaml_writes_them(tmp_path):
    """YAML reads 1e-3 as text; it is taken as the number it looks like."""
    path = write(tmp_path, ROOMS_BY_ADAM.replace("learning_rate: 0.1", "learning_rate: 1e-3"))
    assert load(path).values["optimizer"]["learning_rate"] == 0.001
    assert load(path, ["sweep.optimizer.learning_rate=[1e-3, 1]"]).grid[0]["optimizer.learning_rate"] == 0.001


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_shipped_configs_load_and_round_trip(path, tmp_path):
    if "gymnax" in path.read_text():
        pytest.importorskip("gymnax")
    config = load(path)
    assert config.name == path.stem
    again = load(write(tmp_path, yaml.safe_dump(config.values, sort_keys=False)))
    assert again.values == config.values
    assert again.grid == config.grid


def test_round_trip_of_unusual_values(tmp_path):
    overrides = [
        "problem.temperature=1.2345678901234567e-3",
        "problem.goals=[[1, 9], [11, 11], [1, 1]]",
        "optimizer.clip_norm=1e22",
        "algorithm.solver.tolerance=1e-300",
        "algorithm.adjoint={name: gmres, restart: 5}",
        "seed=4294967295",
        "sweep.problem.discount=[0.1, 0.30000000000000004]",
    ]
    config = load(write(tmp_path, ROOMS_BY_ADAM), overrides)
    again = load(write(tmp_path, yaml.safe_dump(config.values), "again.yaml"))
    assert again.values == config.values


def test_anchors_and_merge_keys(tmp_path):
    text = "problem: {name: synthetic}\noptimizer: &o\n  name: sgd\n  learning_rate: 0.5\nsweep: {seed: &s [1, 2]}\n"
    config = load(write(tmp_path, text))
    assert config.values["optimizer"]["learning_rate"] == 0.5
    assert len(config.grid) == 2


def test_grid_order_and_content(tmp_path):
    sweep = "sweep:\n  problem.beta: [1.0, 3.0]\n  optimizer.learning_rate: [0.1, 0.2, 0.3]\n  seed: [5, 3]\n"
    config = load(write(tmp_path, "problem: {name: four_rooms}\noptimizer: {name: sgd}\n" + sweep))
    # the seed varies slowest, then the others as they stand in the file
    expected = [
        {"seed": seed, "problem.beta": beta, "optimizer.learning_rate": rate}
        for seed, beta, rate in itertools.product([5, 3], [1.0, 3.0], [0.1, 0.2, 0.3])
    ]
    assert config.grid == expected
    assert all(isinstance(point["seed"], int) for point in config.grid)
    before = yaml.safe_dump(config.values)
    values = config.at(config.grid[-1])
    assert (values["seed"], values["problem"]["beta"], values["optimizer"]["learning_rate"]) == (3, 3.0, 0.3)
    assert values["problem"]["temperature"] == config.values["problem"]["temperature"]
    assert yaml.safe_dump(config.values) == before


def combinations() -> list[tuple[str, ...]]:
    """Every problem, solver, linear solver and optimizer, each with some of the others."""
    names = [list(WITH_MODEL), *(list(library_choices(KINDS[kind])) for kind in ("solver", "linear solver"))]
    names.append([name for name in optimizers() if name != "lbfgs"])
    rounds = max(map(len, names))
    return [tuple(column[i % len(column)] for column in names) for i in range(rounds)]


REQUIRED = {"neumann": {"terms": 5}}


@pytest.mark.slow
@pytest.mark.few(5)
@pytest.mark.parametrize(("problem", "solver", "adjoint", "optimizer"), combinations(), ids=lambda name: name)
def test_every_sweepable_key_is_accepted(problem, solver, adjoint, optimizer, tmp_path):
    raw = {
        "problem": {"name": problem},
        "algorithm": {
            "name": "m_sobirl",
            "solver": {"name": solver},
            "adjoint": {"name": adjoint, **REQUIRED.get(adjoint, {})},
        },
        "optimizer": {"name": optimizer},
    }
    base = load(write(tmp_path, yaml.safe_dump(raw)))
    keys = sweepable(base.values)
    points = {key: [leaf(base, key)] for key in keys if leaf(base, key) is not None}
    points["optimizer.clip_norm"] = [0.25]
    config = load(write(tmp_path, yaml.safe_dump(raw | {"sweep": points})))
    assert config.grid == [{"seed": 0} | {key: point[0] for key, point in points.items()}]
    assert {"seed", "problem.temperature", "problem.discount", "optimizer.learning_rate"} <= set(keys)
    assert {"optimizer.clip_norm", "algorithm.solver.tolerance"} <= set(keys)
    assert problem != "four_rooms" or {"problem.beta", "problem.slip", "problem.max_penalty"} <= set(keys)
    assert problem != "synthetic" or "problem.seed" in keys
    assert adjoint != "descent" or "algorithm.adjoint.step_size" in keys
    assert adjoint != "gmres" or "algorithm.adjoint.tolerance" in keys
    # Names, maps and what is of the whole experiment are refused.
    for key in set(leaves(base.values)) - set(keys):
        with pytest.raises(InputError, match=rf"sweep\.{re.escape(key)} .*cannot be swept"):
            load(write(tmp_path, yaml.safe_dump(raw | {"sweep": {key: [1]}})))


def leaf(config: Config, key: str):
    value = config.values
    for part in key.split("."):
        value = value[part]
    return value


def leaves(values: dict, prefix: str = "") -> list[str]:
    inner = [(prefix + key, value) for key, value in values.items() if key != "sweep"]
    return [x for key, v in inner for x in (leaves(v, key + ".") if isinstance(v, dict) else [key])]


# ---- A section may be left out, be a name alone, or have no name: then it is the default one -----------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: sgd", SGD),
        ("optimizer: {learning_rate: 1}", ADAM | {"learning_rate": 1.0}),
        ("seed: 1", ADAM),
    ],
)
def test_abbreviated_section(text, expected, tmp_path):
    config = load(write(tmp_path, f"problem: synthetic\n{text}\n"))
    assert config.values["optimizer"] == expected


@pytest.mark.parametrize(
    ("override", "key", "expected"),
    [
        ("problem.temperature=0.5", "problem.temperature", 0.5),
        ("optimizer.learning_rate=0.5", "optimizer.learning_rate", 0.5),
        ("algorithm.solver.tolerance=0.5", "algorithm.solver.tolerance", 0.5),
    ],
)
def test_override_in_an_abbreviated_section(override, key, expected, tmp_path):
    assert leaf(load(write(tmp_path, "problem: synthetic\n"), [override]), key) == expected


def test_overrides_of_a_name_and_then_of_its_options(tmp_path):
    path = write(tmp_path, "problem: synthetic\n")
    values = load(path, ["optimizer=sgd", "optimizer.clip_norm=0.5"]).values
    assert values["optimizer"] == SGD | {"clip_norm": 0.5}
    values = load(path, ["problem=four_rooms", "problem.beta=3"]).values
    assert values["problem"]["name"] == "four_rooms"


@pytest.mark.parametrize(
    "key",
    [
        "problem.temperature",
        "optimizer.learning_rate",
        "algorithm.solver.tolerance",
    ],
)
def test_sweep_over_an_abbreviated_section(key, tmp_path):
    text = f"problem: synthetic\nsweep:\n  {key}: [0.5, 0.25]\n"
    config = load(write(tmp_path, text))
    assert [point[key] for point in config.grid] == [0.5, 0.25]


@pytest.mark.parametrize(
    "override",
    [
        "problem.discount=0.99999999",
        "problem.temperature=1e-50",
    ],
)
@pytest.mark.usefixtures("x64_off")
def test_values_are_checked_in_the_precision_of_the_config(override, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        load(write(tmp_path, BARE_SYNTHETIC), [override, "precision=float64"])
