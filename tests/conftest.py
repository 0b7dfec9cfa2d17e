"""Tests run in float64 with strict promotion; float32 is asked for where it is tested.

Nearly all of the fast tests' time is XLA's compile time: without LLVM's optimizations and the MLIR fusion emitters it
is half of what it was. The slow ones run for longer than they compile and keep the cheaper optimizations. An XLA_FLAGS
that is already set, even to nothing, is left alone: `XLA_FLAGS= pytest` compiles as users do. Processes that tests
start inherit the flags; test_no_hang.py, for which they matter, removes them.
"""

import mmap
import os
from importlib.util import find_spec
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def known(flags):
    """Those that the installed jaxlib has: XLA aborts on any other."""
    libraries = Path(find_spec("jaxlib").origin).parent.glob("libjax_common.*")
    found = set()
    for library in libraries:
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {flag for flag in flags if content.find(flag.encode()) >= 0}
    return found


def pytest_configure(config):
    """Before anything is compiled, which is when XLA reads its flags; xdist's workers inherit them."""
    if "XLA_FLAGS" not in os.environ:
        level = "1" if config.option.markexpr == "slow" else "0"
        flags = {"xla_backend_optimization_level": level, "xla_cpu_use_fusion_emitters": "false"}
        os.environ["XLA_FLAGS"] = " ".join(f"--{flag}={flags[flag]}" for flag in sorted(known(flags)))
