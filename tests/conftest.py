"""Tests run in float64 with strict promotion of dtypes and of ranks; float32 is asked for where it is tested.

Nearly all of most tests' time is XLA's compile time: without LLVM's optimizations and the MLIR fusion emitters it is
half of what it was. Slow tests that run for longer than they compile keep the cheaper optimizations. An XLA_FLAGS that
is already set, even to nothing, is left alone: `XLA_FLAGS= pytest` compiles as users do. Processes that tests start
inherit the flags; test_no_hang.py, for which they matter, removes them.
"""

import gc
import itertools
import mmap
import os
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes and drops objects by the million: the usual thresholds look through all the living ones too often.
gc.set_threshold(200_000, 20, 100)

# Nobody reads where in Python an operation came from, and noting it is an eighth of the time.
jax.config.update("jax_include_full_tracebacks_in_locations", False)
jax.config.update("jax_traceback_in_locations_limit", 0)

FLAGS = {
    "xla_backend_optimization_level": "1",
    "xla_cpu_parallel_codegen_split_count": "1",  # the other core has a worker of its own
    "xla_cpu_use_fusion_emitters": "false",
}
RUN_LONG = {"test_estimators", "test_sampled_problems", "test_studies"}


def known(flags):
    """Those that the installed jaxlib has: XLA aborts on any other."""
    libraries = Path(find_spec("jaxlib").origin).parent.glob("libjax_common.*")
    found = set()
    for library in libraries:
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {flag for flag in flags if content.find(flag.encode()) >= 0}
    return found


# XLA reads them when something is first compiled; xdist's workers inherit them.
OURS = " ".join(f"--{flag}={FLAGS[flag]}" for flag in sorted(known(FLAGS)))
CHEAPLY = os.environ.setdefault("XLA_FLAGS", OURS) == OURS


# Every program that XLA compiled holds several memory mappings; a process may have 65,530 and dies of one more.
# Some tests add 6,000.
MAPPINGS, EVERY = 36_000, 2
FINISHED = itertools.count(1)


def pytest_runtest_teardown():
    maps = Path("/proc/self/maps")
    if next(FINISHED) % EVERY == 0 and maps.exists() and maps.read_bytes().count(b"\n") > MAPPINGS:
        jax.clear_caches()


@pytest.hookimpl(tryfirst=True)  # before fixtures compile
def pytest_runtest_setup(item):
    if CHEAPLY:
        runs_long = item.get_closest_marker("slow") and item.module.__name__ in RUN_LONG
        jax.config.update("jax_disable_most_optimizations", not runs_long)
