"""Tests run in float64 with strict promotion of dtypes and of ranks; float32 is asked for where it is tested.

Nearly all of most tests' time is XLA's compile time: without LLVM's optimizations and the MLIR fusion emitters it is
half of what it was. Slow tests that run for longer than they compile keep the cheaper optimizations.

`--compile as-users` leaves XLA its own settings, and so does an XLA_FLAGS that is already set, even to nothing; `--isa
AVX2` has it use no more than these instructions. Results must hold in all of them: rounding differs, with and without
contracted multiply-adds. `.ci/nightly` runs the `numerical` files in each. Processes that tests start inherit the
flags; test_no_hang.py, for which they matter, removes them.
"""

import gc
import itertools
import mmap
import os
from importlib.metadata import version
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
# jaxlib 0.12 knows the name of this one still, in messages, and aborts on the flag; 0.10 is the last seen to take it.
if tuple(map(int, version("jaxlib").split(".")[:2])) > (0, 10):
    del FLAGS["xla_cpu_use_fusion_emitters"]
RUN_LONG = {"test_estimators", "test_sampled_problems", "test_studies"}


def known(flags):
    """Those that the installed jaxlib has: XLA aborts on any other."""
    libraries = Path(find_spec("jaxlib").origin).parent.glob("libjax_common.*")
    found = set()
    for library in libraries:
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {flag for flag in flags if content.find(flag.encode()) >= 0}
    return found


# Whose numbers depend on how they are compiled.
NUMERICAL = {
    "test_linear_solvers",
    "test_cancellation",
    "test_certificates",
    "test_derivatives",
    "test_equal_terms",
    "test_failures",
    "test_hypergradient",
    "test_low_temperature",
    "test_methods",
    "test_regularizers",
    "test_rounding",
    "test_small_weights",
    "test_solve",
    "test_solvers",
    "test_told",
}


def pytest_addoption(parser):
    parser.addoption("--compile", choices=("cheaply", "as-users"), help="cheaply, unless XLA_FLAGS is set")
    parser.addoption("--isa", help="the most that XLA may use: SSE4_2, AVX, AVX2 or AVX512")


def pytest_configure(config):
    # What was compiled once is kept: the next run takes half the time. Delete the directory to begin anew.
    jax.config.update("jax_compilation_cache_dir", str(config.rootpath / ".pytest_cache" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if hasattr(config, "workerinput"):  # the flags are inherited, the options passed on
        return
    if config.option.compile is None:
        config.option.compile = "as-users" if "XLA_FLAGS" in os.environ else "cheaply"
    wanted = FLAGS if config.option.compile == "cheaply" else {}
    if config.option.isa:
        wanted = wanted | {"xla_cpu_max_isa": config.option.isa}
    ours = [f"--{flag}={wanted[flag]}" for flag in sorted(known(wanted))]
    # XLA reads them when something is first compiled; xdist's workers inherit them.
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *ours]).strip()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.module.__name__ in NUMERICAL:
            item.add_marker("numerical")
    mark_the_rest(items, "few", "slow", lambda item: not item.get_closest_marker("slow"))
    slow = [item for item in items if item.get_closest_marker("slow")]
    mark_the_rest(slow, "often", "nightly", lambda item: not item.get_closest_marker("nightly"))


def mark_the_rest(items, marker, rest, counts):
    """Of the cases of a test with `marker(n)`, n evenly spaced ones stay as they are; the others are marked `rest`."""
    cases = {}
    for item in items:
        if item.get_closest_marker(marker) and counts(item):
            cases.setdefault(item.nodeid.split("[")[0], []).append(item)
    for group in cases.values():
        (count,) = group[0].get_closest_marker(marker).args
        kept = {round(k * (len(group) - 1) / max(count - 1, 1)) for k in range(count)}
        for k, item in enumerate(group):
            if k not in kept:
                item.add_marker(rest)


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
    if item.config.option.compile == "cheaply":
        runs_long = item.get_closest_marker("slow") and item.module.__name__ in RUN_LONG
        jax.config.update("jax_disable_most_optimizations", not runs_long)
