"""What the library raises: bad input, and results that are not what was asked for."""


class InputError(ValueError):
    """An argument that cannot be used. The message names it, its value and the remedy.

    Example:
      >>> try:
      ...     bj.ShannonEntropy(-1.0)
      ... except bj.InputError as error:
      ...     print("refused")
      refused
    """


class RequirementError(InputError):
    """The problem lacks something that an algorithm needs. `reason` says what, after the problem's name."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"problem: {name} {reason}")
        self.reason = reason


class ConvergenceError(RuntimeError):
    """Raised by `bilevel_jax.check` for a result that did not reach what was asked.

    Example:
      >>> mdp = bj.problems.make("garnet").mdp(jnp.zeros((8, 3)))
      >>> one_sweep = bj.solve(mdp, bj.ShannonEntropy(0.5), solver=bj.ValueIteration(max_iterations=1))
      >>> try:
      ...     bj.check(one_sweep)
      ... except bj.ConvergenceError:
      ...     print("not solved")
      not solved
    """
