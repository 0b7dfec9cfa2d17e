"""Every example in a docstring runs as a user would type it: float32, JAX's own settings, in the order of the file.

The examples of one file share one namespace, which has what IMPORTS names and what the file itself defines.
"""

import ast
import dataclasses
import doctest
import importlib
import types
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel_jax as bj

IMPORTS = {"bj": bj, "dataclasses": dataclasses, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "Literal": Literal}
PACKAGE = Path(bj.__file__).parent
NAMESPACES = ["bilevel_jax", *sorted(f"bilevel_jax.{path.parent.name}" for path in PACKAGE.glob("*/__init__.py"))]

# Nobody builds these: base classes, of which the classes derived from them are the examples ...
PROTOCOLS = {
    *("ActionFunction", "Agent", "Algorithm", "AverageRewardSolver", "Baseline", "Distribution", "Environment"),
    *("Labels", "LinearSolver", "Method", "Module", "Network", "Policy", "Preconditioner", "Regularizer", "Response"),
    *("SampledProblem", "Solver", "Transition"),
}
# ... and results, of which the functions that return them are the examples.
RESULTS = {
    *("Attempt", "AverageRewardSolution", "AverageRewardStats", "Comparison", "Costs", "Cut", "Estimate", "Evaluation"),
    *("FiniteHorizonSolution", "GradientCheck", "Header", "Hypergradient", "Info", "Judgement", "LinearStats"),
    *("ProblemSpec", "RationalityFit", "Reading", "RefusedLine", "Report"),
    *("Solution", "SolveStats", "State", "StocSchedule", "TimeStep", "Training", "Trajectory", "Verdict", "Weights"),
}


def documented(tree):
    """All docstrings of a file, each with the line where it begins, from the first to the last."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            name = "module" if isinstance(node, ast.Module) else node.name
            yield node.body[0].lineno, name, ast.get_docstring(node)


def examples(path):
    """The examples of a file as one `doctest.DocTest` each."""
    parser = doctest.DocTestParser()
    for line, name, text in sorted(documented(ast.parse(path.read_text()))):
        if ">>>" in text:
            yield parser.get_doctest(text, {}, name, str(path), line)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if ">>>" in path.read_text())
# The examples of the others compile large programs.
QUICK = {"core", "environments", "interchange", "linear", "mdp", "replay"}


def case(path):
    name = path.relative_to(PACKAGE)
    return pytest.param(path, id=str(name), marks=[] if name.parts[0] in QUICK else [pytest.mark.slow])


def module_of(path):
    parts = ("bilevel_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))


@pytest.mark.parametrize("path", [case(path) for path in FILES])
def test_the_examples_of_a_file_run(path, monkeypatch):
    monkeypatch.setattr("bilevel_jax.problems.registry._SPECS", dict(bj.problems.registry._SPECS))
    monkeypatch.setattr("bilevel_jax.algorithms.registry._BUILDERS", dict(bj.algorithms.registry._BUILDERS))
    names = vars(module_of(path)) | IMPORTS
    failures = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for example in examples(path):
            example.globs = names
            runner.run(example, out=failures.append, clear_globs=False)
    assert runner.tries > 0
    assert not failures, "".join(failures)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_every_public_name_has_an_example(namespace):
    module = importlib.import_module(namespace)
    without = []
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        if isinstance(thing, types.ModuleType) or not callable(thing) or name in PROTOCOLS | RESULTS:
            continue
        if ">>>" not in (thing.__doc__ or ""):
            without.append(name)
    assert not without


def test_an_example_that_is_wrong_fails():
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert doctest.DocTestRunner().run(wrong, out=lambda text: None).failed == 1
