"""A problem whose upper variable is made by a function of another one: the weights of a network, say."""

from collections.abc import Callable
from typing import Any

from jaxtyping import PRNGKeyArray

from bilevel_jax.bilevel.wrapper import WrappedModel, WrappedSimulator, Wrapper, kinds
from bilevel_jax.core.functions import as_pytree


def reparameterized(problem: Any, function: Callable[[Any], Any], start: Callable[[Any], Any]) -> Any:
    """The problem at `function(weights)`, as a problem in the weights.

    It is a `Problem`, a `SampledProblem` or both, as the given one is. Its hyper-gradient is the chain rule's, exact
    where the problem's is.

    Args:
      function: weights -> upper variable of the problem, differentiable.
      start: key -> weights to start from.

    Raises:
      InputError: no problem, or arguments that are not callable.

    Example:
      >>> problem = bj.problems.make("garnet")  # x[8, 3]
      >>> network = bj.networks.OneHot(8, bj.networks.MLP(width=4))
      >>> states = jnp.arange(8)
      >>> through = bj.bilevel.reparameterized(
      ...     problem,
      ...     lambda weights: jax.vmap(lambda state: network.apply(weights, state))(states),
      ...     lambda key: network.init(key, states[0], 3),
      ... )
      >>> weights = through.start(jax.random.key(0))
      >>> made = bj.check(bj.hypergradient(through, weights))
      >>> jax.tree.structure(made.gradient) == jax.tree.structure(weights)
      True
    """
    model, simulator = kinds(problem)
    kind: Any = _Both if model and simulator else _Model if model else _Simulator
    return kind(problem, as_pytree("function", function), as_pytree("start", start))


class _Reparameterized(Wrapper):
    function: Callable
    draw: Callable

    def inner(self, x: Any) -> Any:
        return self.function(x)

    def start(self, key: PRNGKeyArray) -> Any:
        """Weights to start from."""
        return self.draw(key)

    def panels(self, x: Any, solution: Any) -> Any:
        """The pictures of the wrapped problem."""
        return self.problem.panels(self.inner(x), solution)


class _Model(_Reparameterized, WrappedModel):
    pass


class _Simulator(_Reparameterized, WrappedSimulator):
    pass


class _Both(_Model, _Simulator):
    pass
