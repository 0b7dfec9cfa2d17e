"""Deterministic chains, and V* in long double for what is said of rounding."""

import jax.numpy as jnp
import numpy as np


def exact(mdp, temperature=0.0):
    """V* [S] in long double: policy iteration, refined until it stands still; Shannon entropy above temperature 0."""
    reward = np.asarray(mdp.reward, np.longdouble)
    states, actions = reward.shape
    basis = np.eye(states, dtype=reward.dtype)
    columns = [np.asarray(mdp.transition.expect(jnp.asarray(basis[j], mdp.reward.dtype))) for j in range(states)]
    p = np.stack(columns, -1).astype(np.longdouble)
    discount = np.broadcast_to(np.asarray(mdp.discount, np.longdouble), reward.shape)
    available = np.ones(reward.shape, bool) if mdp.available is None else np.asarray(mdp.available)
    value, last = np.zeros(states, np.longdouble), np.inf
    for _ in range(300):
        q = np.where(available, reward + discount * (p @ value), -np.inf)
        top = q.max(1, keepdims=True)
        if temperature:
            weight = np.exp((q - top) / temperature)
            backup = top[:, 0] + temperature * np.log(weight.sum(1))
            policy = weight / weight.sum(1, keepdims=True)
        else:
            backup, policy = top[:, 0], np.eye(actions)[q.argmax(1)]
        matrix = np.eye(states) - np.einsum("sa,saj->sj", policy * discount, p)
        gap, step = backup - value, np.zeros_like(value)
        for _ in range(4):  # refined: the factors are in double
            step += np.linalg.solve(matrix.astype(float), (gap - matrix @ step).astype(float))
        value = value + step
        size = np.abs(step).max()
        if size == 0 or (size >= last and size <= 1e-15 * np.abs(value).max()):
            break
        last = size
    return value


def chain(*moves):
    """P[S, A, S] of deterministic moves[S][A]."""
    p = np.zeros((len(moves), len(moves[0]), len(moves)))
    for state, to in enumerate(moves):
        for action, next_state in enumerate(to):
            p[state, action, next_state] = 1
    return p
