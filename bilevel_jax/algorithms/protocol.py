"""What every algorithm is."""

from typing import Any, Protocol

import jax


class Algorithm(Protocol):
    """A pytree with two pure methods, compiled once for each structure of algorithm and state.

    The state is what an iteration needs of the last one, with `state.x` the upper variable; the info
    is what it reports: at least `objective`, `gradient_norm` and `outcomes()`.
    """

    def init(self, key: jax.Array, x: Any) -> Any: ...

    def step(self, key: jax.Array, state: Any) -> tuple[Any, Any]: ...
