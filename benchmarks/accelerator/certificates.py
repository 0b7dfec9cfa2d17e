"""CONVERGED is not said of a wrong number at the default precision of matrix products: no faults are expected.

The first structures of `benchmarks.solvers.certificate_search`, which compares each solve and gradient with an exact
reference. Products are as the library asks for them; nothing else is set.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax

from benchmarks.solvers import certificate_search as search

STRUCTURES, EACH, SEED = 40, 10, 0


def cases(toy: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    """A case per structure, which is compiled once."""
    search.prepare(optimized=False)
    count, each = (1, 2) if toy else (STRUCTURES, EACH)
    return {f"structure {index}": lambda index=index: measure(index, each) for index in range(count)}


def measure(index: int, each: int) -> dict[str, Any]:
    """Codes and faults of `each` calls."""
    chunk = search.examine_structure(SEED, index, each)
    verdicts = chunk["verdicts"]
    faults = [f"{index}:{i} {': '.join(fault)}" for i, one in enumerate(verdicts) for fault in one["faults"]]
    return {
        "solver": chunk["of"]["solver"],
        "cases": len(verdicts),
        "faults": len(faults),
        "examples": faults[:4],
        "codes": dict(collections.Counter(one["code"] for one in verdicts)),
        "matmul_precision": str(jax.config.jax_default_matmul_precision or "default"),  # type: ignore[attr-defined]
    }
