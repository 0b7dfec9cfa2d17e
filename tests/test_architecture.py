"""Imports point one way, the core stays a core, and what is public is documented."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import bilevel_jax as bj
from bilevel_jax.core.results import Reports

PACKAGE = Path(bj.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
LIBRARY = sorted(name for name in MODULES if not name.startswith("bilevel_jax.experiments") and name != "bilevel_jax")

# What each part may import, beside itself: these, and what these may.
ABOVE = {
    "core": (),
    "mdp": ("core",),
    "interchange": ("mdp",),
    "linear": ("mdp",),
    "environments": ("mdp", "interchange"),
    "networks": ("environments",),
    "solvers": ("linear",),
    "criteria": ("solvers",),
    "bilevel": ("solvers", "environments"),
    # A reward learned from labels is a bilevel problem, too.
    "preferences": ("bilevel", "replay"),
    "hypergradient": ("bilevel",),
    # Problems describe MDPs and simulators, evaluate policies and solve for those of experts; they know no gradients.
    "problems": ("bilevel", "criteria", "preferences", "networks"),
    "estimators": ("bilevel", "hypergradient", "networks", "preferences"),
    "replay": ("core",),
    "agents": ("bilevel", "networks", "replay"),
    "algorithms": ("hypergradient", "estimators", "agents", "networks", "replay", "preferences"),
    "experiments": ("algorithms", "problems", "criteria"),
}


def closure(part):
    """All that a part may import."""
    return {part}.union(*(closure(above) for above in ABOVE[part]))


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


def modules_in(names):
    """Of full names, those of modules: of a name from a module, the module."""
    return {name if name in MODULES else name.rpartition(".")[0] for name in names} & set(MODULES)


def test_every_module_has_a_part():
    assert {part(name) for name in MODULES} - {None} == set(ABOVE)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"bilevel_jax"}))
def test_imports_point_one_way(name):
    for imported in modules_in(imports(name)):
        if part(imported) is None:  # the package as a whole, which only those who use it import
            assert part(name) == "experiments", name
        else:
            assert part(imported) in closure(part(name)), f"{name} imports {imported}"


def test_no_module_imports_itself_by_others():
    """A package counts as its own file: what imports one of its modules does not import the others."""
    edges = {name: modules_in(imports(name)) - {name} for name in MODULES}
    ahead = set(MODULES)
    while ahead:  # those that import nothing of what is left are in no cycle
        free = {name for name in ahead if not edges[name] & ahead}
        assert free, f"a cycle among {sorted(ahead)}"
        ahead -= free


@pytest.mark.parametrize("name", LIBRARY)
def test_the_library_imports_nothing_of_the_command_line(name):
    for imported in imports(name):
        assert imported.split(".")[0] not in FOREIGN, imported


@pytest.mark.parametrize("name", sorted(MODULES))
def test_networks_stay_in_folders_of_their_own(name):
    """The library knows networks by their protocol: it runs without flax."""
    if name not in ("bilevel_jax.networks.linen", "bilevel_jax.networks.nnx"):
        assert "flax" not in {imported.split(".")[0] for imported in imports(name)}


def test_the_checks_above_see_imports():
    assert "bilevel_jax.linear.LinearSolver" in imports("bilevel_jax.solvers.solve")
    assert "bilevel_jax.linear" in modules_in(imports("bilevel_jax.solvers.solve"))
    # also those inside functions
    assert "bilevel_jax.interchange.gymnasium.read_outcomes" in imports("bilevel_jax.environments.tabular")
    assert "hypergradient" not in closure("problems")


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


NAMESPACES = {
    "agents",
    "algorithms",
    "environments",
    "estimators",
    "interchange",
    "networks",
    "preferences",
    "problems",
    "replay",
}


def test_all_is_sorted_and_complete():
    assert set(bj.__all__) == set(dict.fromkeys(bj.__all__))
    public = {
        name
        for name, thing in vars(bj).items()
        if not name.startswith("_") and (not inspect.ismodule(thing) or name in NAMESPACES)
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
loaded = {"flax", "matplotlib", "yaml", "pydantic", "tqdm", "bilevel_jax.experiments"} & set(sys.modules)
assert not loaded, loaded
print("quiet")
"""


def test_importing_starts_and_changes_nothing():
    done = subprocess.run([sys.executable, "-W", "error", "-c", IMPORT], capture_output=True, text=True, check=False)
    assert done.stdout == "quiet\n", done.stderr


def test_the_package_is_found_beside_a_folder_of_its_name(tmp_path):
    """As in the folder that a clone named bilevel_jax lies in."""
    (tmp_path / "bilevel_jax" / "bilevel_jax").mkdir(parents=True)
    code = "import bilevel_jax; print(bilevel_jax.__file__, bilevel_jax.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == f"{bj.__file__} {bj.__version__}\n", done.stderr
