"""Cut many runs of one program into chunks that fit a memory limit."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bilevel_jax.core.errors import InputError


class Cut(NamedTuple):
    """Runs that go through a program together; `padded` repeats the last one so that one program serves all cuts."""

    runs: list[int]
    padded: list[int]


def cut(runs: Sequence[int], limit_mb: float, compile_for: Callable[[list[int]], Any]) -> tuple[Any, list[Cut]]:
    """Cut the runs into the largest even chunks with which the compiled program fits into the limit.

    Args:
      runs: places in the grid.
      limit_mb: MiB of arguments, results and everything between them, as the compiler counts them.
      compile_for: a function that compiles the program for the given runs.

    Returns:
      The compiled program, and the chunks.

    Raises:
      InputError: a single run does not fit.
    """
    limit = limit_mb * 2**20
    size = len(runs)
    compiled = compile_for(list(runs))
    while (needed := _bytes(compiled)) > limit:
        if size == 1:
            raise InputError(
                f"memory_limit_mb: one run needs about {needed / 2**20:.3g} MiB, the limit is "
                f"{limit / 2**20:.3g}; raise it or choose a smaller problem"
            )
        size = max(1, min(size - 1, int(size * limit / needed)))
        size = -(-len(runs) // -(-len(runs) // size))  # the same number of cuts, evenly filled
        compiled = compile_for(list(runs[:size]))
    cuts = [list(runs[first : first + size]) for first in range(0, len(runs), size)]
    return compiled, [Cut(own, own + own[-1:] * (size - len(own))) for own in cuts]


def _bytes(compiled: Any) -> float:
    counts = compiled.memory_analysis()
    if counts is None:  # some backends do not count
        return 0.0
    return counts.temp_size_in_bytes + counts.argument_size_in_bytes + counts.output_size_in_bytes
