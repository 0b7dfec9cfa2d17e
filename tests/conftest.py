"""Tests run in float64 with strict promotion; float32 is asked for where it is tested.

Nearly all of their time is XLA's compile time: without LLVM's optimizations and the MLIR fusion emitters it is half of
what it was. An XLA_FLAGS that is already set, even to nothing, is left alone: `XLA_FLAGS= pytest` compiles as users do.
Processes that tests start inherit the flags; test_no_hang.py, for which they matter, removes them.
"""

import mmap
import os
from importlib.util import find_spec
from pathlib import Path

CHEAP = {"xla_backend_optimization_level": "0", "xla_cpu_use_fusion_emitters": "false"}


def known(flags):
    """Those that the installed jaxlib has: XLA aborts on any other."""
    libraries = Path(find_spec("jaxlib").origin).parent.glob("libjax_common.*")
    found = set()
    for library in libraries:
        with open(library, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found |= {flag for flag in flags if content.find(flag.encode()) >= 0}
    return found


if "XLA_FLAGS" not in os.environ:  # before jax is imported
    os.environ["XLA_FLAGS"] = " ".join(f"--{flag}={CHEAP[flag]}" for flag in sorted(known(CHEAP)))

import jax  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
