"""Incentives in Four Rooms: one gradient, with its error, then descent at several temperatures at once, by vmap."""

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


def descend(temperature, iterations: int):
    """The objective before and after so many iterations at a temperature."""
    problem = bj.problems.make("four_rooms", temperature=temperature)
    algorithm = bj.algorithms.implicit(problem, optax.adam(0.1))
    state = algorithm.init(jax.random.key(0), problem.start(jax.random.key(0)))

    def iterate(state, i):
        state, info = algorithm.step(jax.random.fold_in(jax.random.key(0), i), state)
        return state, info.objective

    _, objective = jax.lax.scan(iterate, state, jnp.arange(iterations))
    return objective[0], objective[-1]


def main(iterations: int = 60) -> None:
    problem = bj.problems.make("four_rooms", temperature=0.05)
    x = problem.start(jax.random.key(0))
    hg = bj.check(bj.hypergradient(problem, x))
    print(f"objective {hg.value:.4f}, |gradient| {optax.tree.norm(hg.gradient):.3f}, off by about {hg.error:.1e}")
    temperatures = jnp.array([0.05, 0.1, 0.2])
    before, after = jax.jit(jax.vmap(lambda t: descend(t, iterations)))(temperatures)
    for row in zip(temperatures, before, after, strict=True):
        print("temperature {:.2f}: objective {:.4f} -> {:.4f}".format(*row))


if __name__ == "__main__":
    main()
