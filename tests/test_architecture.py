"""Imports point one way, the core stays a core, and what is public is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel_jax as bj
from bilevel_jax.results import Reports

PACKAGE = Path(bj.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CORE = sorted(name for name in MODULES if not name.startswith("bilevel_jax.runner") and name != "bilevel_jax")

# Each may import what stands above it, and its own row.
LAYERS = [
    {"errors", "promotion"},
    {"results", "validation", "batching", "captures", "derivatives", "indexing"},
    {"memory", "reductions", "rounding", "rounds"},
    {"transitions", "functions"},
    {"mdp", "interchange"},
    {"regularizers", "environments"},
    {"bellman", "preferences"},
    {"adjoint"},
    {"evaluation", "occupancy"},
    {"solvers", "finite_horizon", "average_reward"},
    {"hypergradient"},
    {"estimators"},
    {"agents"},
    {"algorithms"},
    {"runner"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
# Problems describe MDPs and simulators, evaluate policies and solve for those of experts; they know no gradients.
LEVEL["problems"] = LEVEL["solvers"] + 0.5

FOREIGN = {"matplotlib", "yaml", "pydantic", "tqdm", "argparse", "pathlib", "csv"}


def imports(name):
    """Full names of the modules that a module imports, wherever in it; names from a module included."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(name):
    """The layer's name: second part of a module's name in the package."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "bilevel_jax" and len(pieces) > 1 else None


def test_every_module_has_a_layer():
    assert {part(name) for name in MODULES} - {None} == set(LEVEL)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"bilevel_jax"}))
def test_imports_point_one_way(name):
    for imported in imports(name):
        if imported.split(".")[0] == "bilevel_jax":
            # The package as a whole stands above all but the runner.
            assert LEVEL[part(imported) or "runner"] <= LEVEL[part(name)], f"{name} imports {imported}"


@pytest.mark.parametrize("name", CORE)
def test_core_imports_nothing_of_the_command_line(name):
    for imported in imports(name):
        assert imported.split(".")[0] not in FOREIGN, imported
        assert part(imported) != "runner", imported


def test_the_checks_above_see_imports():
    assert "bilevel_jax.adjoint.LinearSolver" in imports("bilevel_jax.solvers.solve")
    # also those inside functions
    assert "bilevel_jax.interchange.gymnasium" in imports("bilevel_jax.mdp")
    assert LEVEL["problems"] < LEVEL["hypergradient"]


def documented(function):
    return bool(inspect.getdoc(function))


# What these say of their methods holds for every class that keeps the protocol, by inheritance or not.
PROTOCOLS = (bj.Problem, bj.SampledProblem, Reports)


def first_definition(cls, name):
    """Whether no base class or protocol defines the name, and so documents it."""
    above = (set(cls.__mro__) | set(PROTOCOLS)) - {cls}
    return not any(name in vars(base) for base in above)


@pytest.mark.parametrize("name", bj.__all__)
def test_public_names_are_documented(name):
    thing = getattr(bj, name)
    if name == "MESSAGES":  # a table, see `Result`
        assert set(thing) == set(bj.Result)
        return
    assert documented(thing)
    if not inspect.isclass(thing):
        return
    assert thing.__doc__, "its own, not a base class's"
    for method, value in vars(thing).items():
        public = not method.startswith("_") and (
            inspect.isfunction(value) or isinstance(value, property | staticmethod)
        )
        if public and first_definition(thing, method):
            assert documented(value), f"{name}.{method}"


def test_all_is_sorted_and_complete():
    assert set(bj.__all__) == set(dict.fromkeys(bj.__all__))
    public = {
        name
        for name, thing in vars(bj).items()
        if not name.startswith("_")
        and (
            not inspect.ismodule(thing)
            or name in {"agents", "algorithms", "environments", "estimators", "preferences", "problems"}
        )
    }
    assert public == set(bj.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= 450


def test_modules_have_docstrings():
    assert [name for name, path in MODULES.items() if not ast.get_docstring(ast.parse(path.read_text()))] == []


IMPORT = """
import jax
before = dict(jax.config.values)
import bilevel_jax
from jax._src import xla_bridge
assert not xla_bridge._backends, "a backend was started"
after = dict(jax.config.values)
assert before == after, {k: (before.get(k), v) for k, v in after.items() if before.get(k) != v}
import sys
loaded = {"matplotlib", "yaml", "pydantic", "tqdm", "bilevel_jax.runner"} & set(sys.modules)
assert not loaded, loaded
print("quiet")
"""


def test_importing_starts_and_changes_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.stdout == "quiet\n", done.stderr
