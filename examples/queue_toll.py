"""A toll for a queue: the revenue's gradient through the customers' optimal answer, and the best toll.

A group of customers arrive at a queue of up to 20 places, and join or leave; they decide jointly, for the discounted
sum of what all of them gain. Who joins pays the toll and waits. The operator chooses the toll per length of the queue.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel_jax as bj

PLACES, ARRIVAL, SERVICE = 20, 0.45, 0.5
JOIN, LEAVE = 0, 1


def transition() -> np.ndarray:
    """P[s, a, s'] of the queue's length: after the decision of a customer, a service may end."""
    probability = np.zeros((PLACES + 1, 2, PLACES + 1))
    for length in range(PLACES + 1):
        for action, after in ((JOIN, min(length + 1, PLACES)), (LEAVE, length)):
            served = SERVICE / (ARRIVAL + SERVICE)
            probability[length, action, max(after - 1, 0)] += served
            probability[length, action, after] += 1 - served
    return probability


LENGTH = jnp.arange(PLACES + 1.0)
KERNEL = jnp.asarray(transition())


def mdp(toll):
    """A customer gains 2 by being served, and waits 0.15 per place before it."""
    joins = 2.0 - 0.15 * LENGTH - toll
    return bj.MDP(KERNEL, jnp.stack([joins, jnp.zeros_like(joins)], -1), discount=0.95)


def loss(toll, solution):
    """Minus the mean revenue per arrival, by the discounted frequencies of the lengths that a customer finds."""
    frequency = bj.occupancy(mdp(toll), solution.policy).sum(-1)
    return -jnp.sum(frequency * solution.policy[:, JOIN] * toll) / jnp.sum(frequency)


def main(iterations: int = 150) -> float:
    problem = bj.BilevelProblem(mdp, bj.ShannonEntropy(temperature=0.2), loss)
    algorithm = bj.algorithms.implicit(problem, optax.adam(0.05))
    state = algorithm.init(jax.random.key(0), jnp.full(PLACES + 1, 0.5))
    first = bj.check(bj.hypergradient(problem, state.x))
    for i in range(iterations):
        state, _ = algorithm.step(jax.random.key(i), state)
    last = bj.check(bj.hypergradient(problem, state.x))
    print(f"revenue {-first.value:.4f} -> {-last.value:.4f}, |gradient| {jnp.linalg.norm(last.gradient):.1e}")
    print("toll by length:", np.round(np.asarray(state.x[:8]), 2))
    return float(last.value - first.value)


if __name__ == "__main__":
    main()
