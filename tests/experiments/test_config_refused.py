"""Configs that are refused: the message names the line, the key and the remedy."""

import re
from pathlib import Path

import pytest
import yaml
from experiment_helpers import BARE_SYNTHETIC, ROOMS_BY_ADAM, Called, run, write

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.config import load

pytestmark = pytest.mark.usefixtures("nothing_is_computed")


def assert_refused(called: Called, patterns: list[str], directory: Path) -> None:
    assert called.code == 2
    assert called.out == ""
    assert called.err.startswith("bilevel-jax: error: ")
    assert called.err.count("\n") == 1
    assert "Traceback" not in called.err
    for pattern in patterns:
        assert re.search(pattern, called.err), f"{pattern!r} is not in {called.err!r}"
    assert not directory.exists()


# ---- Files that are no config ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "patterns"),
    [
        (b"", ["expected keys with values at the top", "NoneType"]),
        (b"# only a comment\n", ["expected keys with values at the top"]),
        (b"- problem\n- optimizer\n", ["expected keys with values at the top", "list"]),
        (b"four_rooms\n", ["expected keys with values at the top", "str"]),
        (b"problem: [1\n", ["not valid YAML", "line 2"]),
        (b"problem: four_rooms\n  seed: 1\n", ["not valid YAML", "line 2"]),
        (b"problem: four_rooms\n\tseed: 1\n", ["not valid YAML", "line 2"]),
        (b"problem: *undefined\n", ["not valid YAML", "undefined"]),
        (b"problem: !!python/object:os.system x\n", ["not valid YAML", "line 1"]),
        (b"problem: four_rooms\n---\nproblem: synthetic\n", ["not valid YAML"]),
        (b"problem: four_rooms\n? [a, b]\n: 1\n", ["not valid YAML", "line 2"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe\x00", ["cannot be read", "YAML config"]),
        (b"problem: four\x00rooms\n", ["not valid YAML"]),
        (b"problem: four_rooms\nseed: 2020-13-45\n", ["seed", "line 2"]),
        (b"problem: &a\n  name: four_rooms\n  b: *a\n", ["problem.b", "line 3"]),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, bytes) else "",
)
def test_malformed_file(content, patterns, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    called = run(path, tmp_path / "out")
    assert_refused(called, ["bad.yaml", *patterns], tmp_path / "out")


def test_missing_file_and_directory(tmp_path):
    out = tmp_path / "out"
    assert_refused(run(tmp_path / "nope.yaml", out), ["nope.yaml: cannot be read", "No such file"], out)
    assert_refused(run(tmp_path, out), ["cannot be read", "directory", "path of a YAML config"], out)


# ---- Keys and values in the file: the line is named ---------------------------------------------------


def line(number: int, key: str) -> str:
    return rf"error: {re.escape(key)} \(\S*bad\.yaml, line {number}\): "


UNKNOWN_KEYS = [
    ("problem: four_rooms\nalgoritm: {}\n", [line(2, "algoritm"), "did you mean 'algorithm'", "valid: .*sweep"]),
    ("problem: four_rooms\n\niters: 3\n", [line(3, "iters"), "did you mean 'iterations'"]),
    ("probelm: four_rooms\n", ["problem .*bad.yaml", "one of .*four_rooms, .*synthetic"]),
    (
        "problem:\n  name: four_rooms\n  temperatur: 1\n",
        [line(3, "problem.temperatur"), "did you mean 'temperature'", "valid: .*max_penalty"],
    ),
    (
        "problem:\n  name: synthetic\n  beta: 1\n",
        [line(3, "problem.beta"), "unknown key", "valid: .*states, actions"],
    ),
    (
        "problem: four_rooms\nalgorithm:\n  solver:\n    name: policy_iteration\n    tol: 1\n",
        [line(5, "algorithm.solver.tol"), "did you mean 'tolerance'", "valid: .*max_iterations"],
    ),
    (
        "problem: four_rooms\nalgorithm:\n  adjoint: {name: descent, stepsize: 1}\n",
        [line(3, "algorithm.adjoint.stepsize"), "did you mean 'step_size'"],
    ),
    ("problem: four_rooms\nalgorithm:\n  solvr: {}\n", [line(3, "algorithm.solvr"), "did you mean 'solver'"]),
    (
        "problem: four_rooms\noptimizer:\n  name: sgd\n  learning_rte: 1\n",
        [line(4, "optimizer.learning_rte"), "did you mean 'learning_rate'"],
    ),
    (
        "problem: {name: four_rooms}\nsweep:\n  seed: [0]\n  problem.tempratur: [1]\n",
        [line(4, "sweep.problem.tempratur"), "did you mean 'problem.temperature'", "what can: .*problem.beta"],
    ),
    (
        "problem: {name: four_rooms}\nsweep:\n  learning_rate: [1]\n",
        [line(3, "sweep.learning_rate"), "did you mean 'optimizer.learning_rate'"],
    ),
    ("problem: four_rooms\n1: 2\n", [line(2, "1"), "strings"]),
]
UNKNOWN_NAMES = [
    ("problem: four_room\n", [r"problem.name \(\S*bad.yaml, line 1\)", "did you mean 'four_rooms'"]),
    ("problem:\n  name: syntetic\n", [line(2, "problem.name"), "did you mean 'synthetic'"]),
    ("problem:\n  temperature: 1.0\n", [line(1, "problem"), "give the section a name", "four_rooms, .*synthetic"]),
    ("problem:\n  name: 3\n", [r"problem \(\S*bad.yaml, line 1\)", "four_rooms, .*synthetic"]),
    (
        "problem: four_rooms\nalgorithm:\n  name: m_sobrl\n",
        [line(3, "algorithm.name"), "m_sobirl"],
    ),
    (
        "problem: four_rooms\nalgorithm:\n  solver:\n    name: policy_iter\n",
        [line(4, "algorithm.solver.name"), "did you mean 'policy_iteration'", "value_iteration"],
    ),
    (
        "problem: four_rooms\nalgorithm:\n  adjoint:\n    name: gmrs\n",
        [line(4, "algorithm.adjoint.name"), "did you mean 'gmres'", "neumann"],
    ),
    (
        "problem: four_rooms\noptimizer:\n  name: adm\n",
        [line(3, "optimizer.name"), "did you mean 'adam'", "sgd"],
    ),
]
NO_SECTIONS = [
    ("problem: 3\n", [line(1, "problem"), "four_rooms, .*synthetic"]),
    ("problem: four_rooms\nalgorithm: 1\n", [line(2, "algorithm"), "got 1"]),
    ("problem: four_rooms\nalgorithm:\n  solver: 1\n", [line(3, "algorithm.solver"), "got 1"]),
    ("problem: four_rooms\noptimizer: adm\n", [r"optimizer.name \(\S*bad.yaml, line 2\)", "did you mean 'adam'"]),
    ("problem: four_rooms\noptimizer:\n", [line(2, "optimizer"), "dictionary", "None"]),
    ("problem: four_rooms\nsweep: 3\n", [line(2, "sweep"), "dictionary", "got 3"]),
    ("problem: four_rooms\nsweep: [seed]\n", [line(2, "sweep"), "dictionary"]),
    ("problem: four_rooms\niterations: {}\n", [line(2, "iterations"), "integer"]),
]
DUPLICATES = [
    ("problem: four_rooms\nproblem: synthetic\n", [line(2, "problem"), "second time"]),
    ("problem:\n  name: four_rooms\n  name: synthetic\n", [line(3, "problem.name"), "second time"]),
    ("problem: four_rooms\nsweep:\n  seed: [0]\n  seed: [1]\n", [line(4, "sweep.seed"), "second time"]),
]


@pytest.mark.parametrize(
    ("text", "patterns"),
    UNKNOWN_KEYS + UNKNOWN_NAMES + NO_SECTIONS + DUPLICATES,
    ids=lambda value: value.replace("\n", " ").strip() if isinstance(value, str) else "",
)
def test_bad_structure(text, patterns, tmp_path):
    path = write(tmp_path, text, "bad.yaml")
    assert_refused(run(path, tmp_path / "out"), patterns, tmp_path / "out")


# (key, what the file says, what the error must say); the key stands in a line of its own
BAD_VALUES = [
    ("iterations", "many", "valid integer"),
    ("iterations", "1.5", "valid integer.*1.5"),
    ("iterations", "0", "greater than or equal to 1, got 0"),
    ("iterations", "-3", "greater than or equal to 1, got -3"),
    ("iterations", "[3]", "valid integer"),
    ("iterations", ".nan", "finite"),
    ("record_every", "0", "greater than or equal to 1"),
    ("seed", "-1", "greater than or equal to 0"),
    ("seed", "4294967296", "less than 4294967296"),
    ("seed", "0.5", "valid integer"),
    ("precision", "float16", "'float32' or 'float64'"),
    ("precision", "64", "'float32' or 'float64'"),
    ("memory_limit_mb", "0", "greater than 0"),
    ("memory_limit_mb", "plenty", "valid number"),
    ("optimizer.learning_rate", "-1", "greater than 0"),
    ("optimizer.learning_rate", "0", "greater than 0"),
    ("optimizer.learning_rate", ".nan", "nan"),
    ("optimizer.learning_rate", "fast", "valid number.*fast"),
    ("optimizer.learning_rate", "[0.1, 0.2]", "valid number"),
    ("optimizer.learning_rate", "", "valid number.*None"),
    ("optimizer.clip_norm", "-1", "greater than 0"),
    ("algorithm.solver.tolerance", "small", "valid number.*small"),
    ("algorithm.solver.tolerance", "-1e-3", "at least 0.*-0.001"),
    ("algorithm.solver.max_iterations", "0", "at least 1.* 0"),
    ("problem.temperature", "0", "temperature must be above 0"),
    ("problem.temperature", "-1", "temperature must be above 0"),
    ("problem.temperature", ".nan", "finite.*nan"),
    ("problem.temperature", ".inf", "finite.*inf"),
    ("problem.temperature", "hot", "valid number.*hot"),
    ("problem.temperature", "", "valid number.*None"),
    ("problem.discount", "1", "below 1, got 1"),
    ("problem.discount", "-0.1", "at least 0.*-0.1"),
    ("problem.discount", ".nan", "finite.*nan"),
    ("problem.beta", ".nan", "finite.*nan"),
    ("problem.slip", "2", "slip must be at least 0 and below 1"),
    ("problem.slip", "-0.1", "slip must be at least 0 and below 1"),
    ("problem.goals", "[]", "at least one"),
    ("problem.goals", "[[0, 0]]", r"\(0, 0\) is no free cell"),
    ("problem.goals", "[[99, 1]]", r"\(99, 1\) is no free cell"),
    ("problem.origin", "[0, 0]", "no free cell"),
    ("problem.target", "[1.5, 2]", "valid integer"),
    ("problem.transition", "sparse", "'dense', 'successor' or 'stencil'.*sparse"),
    ("problem.transition", "3", "'dense', 'successor' or 'stencil', got 3"),
    ("sweep.seed", "[]", "at least 1 item"),
    ("sweep.seed", "3", "valid list"),
    ("sweep.seed", "[0, 0.5]", "0.5 is not valid.*seed.*integer"),
    ("sweep.seed", "[0, -1]", "-1 is not valid.*greater than or equal to 0"),
    ("sweep.problem.temperature", "[]", "at least 1 item"),
    ("sweep.problem.temperature", "[0.1, 0]", "0 is not valid.*temperature must be above 0"),
    ("sweep.problem.temperature", "[0.1, .nan]", "finite number, got nan"),
    ("sweep.problem.temperature", "[0.1, ]]", "YAML"),
    ("sweep.problem.discount", "[0.9, 1.0]", "1.0 is not valid.*discount must be .* below 1"),
    ("sweep.optimizer.learning_rate", "[0.1, -1]", "-1 is not valid.*greater than 0"),
    ("sweep.optimizer.clip_norm", "[0]", "0 is not valid.*greater than 0"),
    ("sweep.algorithm.solver.tolerance", "[1.0e-3, -1]", "-1 is not valid.*at least 0.*-1"),
    ("sweep.iterations", "[3, 4]", "cannot be swept.*what can: seed, .*problem.discount"),
    ("sweep.algorithm.solver.name", "[auto]", "cannot be swept.*options go with a name.*did you mean"),
    ("sweep.problem.goals", "[3]", "cannot be swept"),
    ("sweep.problem.name", "[3]", "cannot be swept.*did you mean"),
    ("sweep.sweep.seed", "[3]", "cannot be swept.*did you mean 'seed'"),
    ("iterations", "true", "integer"),
    ("seed", "true", "integer"),
    ("optimizer.learning_rate", "true", "number"),
    ("problem.temperature", "true", "number"),
    ("sweep.seed", "[true]", "integer"),
    ("optimizer.learning_rate", ".inf", "finite"),
    ("iterations", "100000000000", "less than"),
]


def with_line(text: str, key: str, value: str) -> tuple[str, int]:
    """`text` with the key's line exchanged or added, and the number of that line."""
    section, _, name = key.rpartition(".") if not key.startswith("sweep.") else ("sweep", "", key[6:])
    entry = f"{'  ' * (section.count('.') + 1 if section else 0)}{name}: {value}"
    lines = text.splitlines()
    tree = yaml.compose(text)
    for part in section.split(".") if section else []:
        node, tree = next((k, v) for k, v in tree.value if k.value == part)
    present = [k.start_mark.line for k, _ in tree.value if k.value == name]
    if present:
        lines[present[0]] = entry
        return "\n".join(lines), present[0] + 1
    place = node.start_mark.line + 1 if section else len(lines)
    lines.insert(place, entry)
    return "\n".join(lines), place + 1


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES)
def test_bad_value_in_file(key, value, message, tmp_path):
    text, number = with_line(
        ROOMS_BY_ADAM.replace("{name: policy_iteration}", "\n    name: policy_iteration"), key, value
    )
    path = write(tmp_path, text, "bad.yaml")
    called = run(path, tmp_path / "out")
    where = rf"error: {re.escape(key)}(\.\d+)* \(\S*bad\.yaml, line {number}\): "
    if message == "YAML":
        where = f"line {number}"
    assert_refused(called, [where, message], tmp_path / "out")


@pytest.mark.parametrize(("key", "value", "message"), BAD_VALUES)
def test_bad_value_in_override(key, value, message, tmp_path):
    path = write(tmp_path, ROOMS_BY_ADAM, "good.yaml")
    called = run(path, tmp_path / "out", [f"{key}={value}"])
    where = rf"error: {re.escape(key)}(\.\d+)* \(command line, {re.escape(key)}={re.escape(value)}\): "
    if message == "YAML":
        where = f"error: {re.escape(key)}="
    assert_refused(called, [where, message], tmp_path / "out")


def test_bad_item_of_a_sweep(tmp_path):
    path = write(tmp_path, ROOMS_BY_ADAM)
    called = run(path, tmp_path / "out", ["sweep.seed=[0, one]"])
    assert_refused(called, [r"sweep.seed.1 \(command line, sweep.seed=", "valid integer.*one"], tmp_path / "out")


def test_bad_item_of_a_sweep_in_file(tmp_path):
    text, number = with_line(ROOMS_BY_ADAM, "sweep.seed", "[0, one]")
    called = run(write(tmp_path, text, "bad.yaml"), tmp_path / "out")
    assert_refused(called, [line(number, "sweep.seed.1"), "valid integer.*one"], tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        ("foo", ["error: foo: expected key=value", "e.g."]),
        ("=3", ["error: =3: expected key=value"]),
        ("problem.temperature=[1", [r"problem.temperature=\[1: '\[1' is not a valid YAML value"]),
        ("seed={1: 2", ["seed={1: 2: .* is not a valid YAML value"]),
        ("optimizer.lr=1", [r"optimizer.lr \(command line, optimizer.lr=1\)", "did you mean 'learning_rate'"]),
        ("sed=1", [r"sed \(command line, sed=1\)", "did you mean 'seed'"]),
        ("problem.tempreature=1", [r"problem.tempreature \(command line", "did you mean 'temperature'"]),
        ("algorithm.solver.tol=1", [r"algorithm.solver.tol \(command line", "did you mean 'tolerance'"]),
        ("algorithm.solver.name=pi", [r"algorithm.solver.name \(command line", "'pi'", "policy_iteration"]),
        ("problem.name=four_doors", [r"problem.name \(command line", "did you mean 'four_rooms'"]),
        # the other problem has no such key, which stands in the file
        ("problem.name=synthetic", [r"problem.temperature|sweep.problem.beta", r"good.yaml, line \d+"]),
        ("iterations.x=3", ["iterations", "valid integer"]),
        ("optimizer=1", [r"optimizer \(command line, optimizer=1\)", "dictionary"]),
        ("sweep=[1]", [r"sweep \(command line, sweep=\[1\]\)", "dictionary"]),
        ("seed=2020-13-45", ["seed", "command line"]),
    ],
)
def test_bad_override(override, patterns, tmp_path):
    path = write(tmp_path, ROOMS_BY_ADAM, "good.yaml")
    assert_refused(run(path, tmp_path / "out", [override]), patterns, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("states", "1", "states must be at least 2, got 1"),
        ("actions", "0", "actions must be at least 1, got 0"),
        ("dimension", "0", "dimension must be at least 1, got 0"),
        ("states", "2.5", "valid integer"),
        ("temperature", "0", "temperature must be above 0"),
        ("discount", "1", "discount must be at least 0 and below 1"),
        ("seed", "-1", "at least 0"),
    ],
)
def test_bad_value_synthetic(key, value, message, tmp_path):
    path = write(tmp_path, BARE_SYNTHETIC)
    called = run(path, tmp_path / "out", [f"problem.{key}={value}"])
    assert_refused(called, [rf"problem\.{key} \(command line", message], tmp_path / "out")


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_problem_seed_of_sweep_out_of_range(seed, tmp_path):
    path = write(tmp_path, BARE_SYNTHETIC)
    with pytest.raises(InputError, match=rf"sweep\.problem\.seed\.0 .*{seed} is not valid"):
        load(path, [f"sweep.problem.seed=[{seed}]"])


@pytest.mark.parametrize("key", ["seed", "problem.seed"])
@pytest.mark.parametrize("points", ["[0.0, 1.0]", "['0', '1']"])
def test_seeds_of_a_sweep_are_integers(key, points, tmp_path):
    config = load(write(tmp_path, BARE_SYNTHETIC), [f"sweep.{key}={points}"])
    seeds = [point[key] for point in config.grid]
    assert seeds == [0, 1]
    assert all(isinstance(seed, int) for seed in seeds)


@pytest.mark.parametrize("value", ["!!int abc", "!!float abc", "!!timestamp abc"])
def test_value_that_is_not_of_its_tag(value, tmp_path):
    good, bad = BARE_SYNTHETIC, BARE_SYNTHETIC + f"seed: {value}\n"
    called = run(write(tmp_path, good), tmp_path / "out", [f"seed={value}"])
    assert_refused(called, ["seed"], tmp_path / "out")
    called = run(write(tmp_path, bad), tmp_path / "out")
    assert_refused(called, ["YAML"], tmp_path / "out")


def test_first_error_is_one_of_the_file_even_with_good_overrides(tmp_path):
    path = write(tmp_path, BARE_SYNTHETIC + "recrd_every: 3\n", "bad.yaml")
    called = run(path, tmp_path / "out", ["iterations=4", "seed=3"])
    assert_refused(called, [line(3, "recrd_every"), "did you mean 'record_every'"], tmp_path / "out")
