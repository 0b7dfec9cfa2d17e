"""Identity of functions, with what they capture: `jit` compiles again where that was edited, and only there.

`names.py` finds which names a function reads, `reader.py` which values they have, and `watch.py` whether these are
still the same.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax

from bilevel_jax.core.captures.watch import is_tracing, tokens_of, tracing

P = ParamSpec("P")
R = TypeVar("R")

# JAX keeps what it traces and compiles under each value of this apart, in all its caches: also in those of helpers
# that the user jitted, and of loops whose body is the user's.
_CONTEXT = jax.make_user_context(None)


def jit(
    function: Callable, *, watched: Callable[..., tuple] | None = None, static_argnames: str | tuple[str, ...] = ()
) -> Any:
    """`jax.jit` for arguments that hold the user's functions, or objects with methods of the user.

    A number, an array, a global or a default that these functions read may be edited between two calls: then the next
    call compiles again. Otherwise it does not. A call inside another trace becomes a part of that trace.

    Args:
      watched: a function that returns a tuple of those arguments that may hold functions; None watches all of them.
      static_argnames: as in `jax.jit`.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with tracing():
            return function(*args, **kwargs)

    compiled: Any = jax.jit(traced, static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        token = tokens_of((*args, *kwargs.values()) if watched is None else watched(*args, **kwargs))
        if token is _CONTEXT.value:
            return compiled(*args, **kwargs)
        with _CONTEXT(token):
            return compiled(*args, **kwargs)

    for name in ("lower", "_cache_size", "clear_cache"):
        setattr(call, name, getattr(compiled, name))
    return call


def as_run_by_jit(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function`, which calls the user's functions without compiling; it sees the same edits as `jit` does."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if is_tracing():
            return function(*args, **kwargs)
        with _CONTEXT(tokens_of((*args, *kwargs.values()))), tracing():
            return function(*args, **kwargs)

    return call


__all__ = ["as_run_by_jit", "jit"]
