"""x anywhere in the lower level, several of them at once, and objectives of all that a solution gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ACTIONS, STATES, central_difference, flat, random_like, random_process, solve_numpy

import bilevel_jax as bj

FIRST, SECOND, LEADER = (random_process(seed) for seed in (1, 2, 3))
WEIGHTS = np.random.default_rng(4).normal(size=(STATES, ACTIONS))


def start(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "reward": jnp.asarray(rng.normal(size=(STATES, ACTIONS))),
        "logits": jnp.asarray(rng.normal(size=(STATES, ACTIONS, STATES))),
        "mixture": jnp.asarray(0.3),
        "discount": jnp.asarray(0.8),
        "temperature": jnp.asarray(0.4),
        "initial": jnp.asarray(rng.normal(size=STATES)),
        "reference": jnp.asarray(rng.normal(size=(STATES, ACTIONS))),
    }


def mixed(x):
    return x["mixture"] * FIRST.dense + (1 - x["mixture"]) * SECOND.dense


def by_slots(x):
    """Probabilities of successor lists through a softmax over the slots."""
    shape = FIRST.successor.shape
    logits = jnp.moveaxis(x["logits"][..., : shape[0]], -1, 0)
    return bj.SuccessorTransition(FIRST.successor, jax.nn.softmax(logits, axis=0))


KERNELS = {"softmax": lambda x: jax.nn.softmax(x["logits"]), "mixture": mixed, "slots": by_slots}


def mdp_of(x, kernel, reward=None):
    reward = x["reward"] if reward is None else reward
    return bj.MDP(KERNELS[kernel](x), reward, x["discount"], jax.nn.softmax(x["initial"]))


def regularizer(x):
    return bj.KLDivergence(x["temperature"], jax.nn.softmax(x["reference"]))


# name -> f(x, solution, mdp of x)
OBJECTIVES = {
    "value": lambda x, s, mdp: mdp.initial @ s.value,
    "q": lambda x, s, mdp: jnp.sum(WEIGHTS * jnp.tanh(s.q)),
    "policy": lambda x, s, mdp: jnp.sum(WEIGHTS * s.policy**2) + x["mixture"] ** 2,
    "occupancy": lambda x, s, mdp: jnp.sum(WEIGHTS * bj.occupancy(mdp, s.policy) ** 2),
    # The leader has a reward and dynamics of its own, and meets the follower's policy.
    "leader": lambda x, s, mdp: (
        bj.policy_value(bj.MDP(LEADER.dense, LEADER.reward + x["reward"] ** 2, 0.7), s.policy) @ mdp.initial
    ),
    "stationary": lambda x, s, mdp: jnp.sum(WEIGHTS[:, 0] * bj.stationary_distribution(mdp, s.policy)),
}
CASES = [
    *[("softmax", objective) for objective in OBJECTIVES],
    ("mixture", "occupancy"),
    ("mixture", "leader"),
    ("slots", "occupancy"),
    ("slots", "value"),
]


def problem_of(kernel, objective):
    return bj.BilevelProblem(
        lambda x: mdp_of(x, kernel),
        regularizer,
        lambda x, s: OBJECTIVES[objective](x, s, mdp_of(x, kernel)),
    )


@pytest.mark.often(3)
@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "objective"), CASES)
def test_each_parameter_against_differences(kernel, objective):
    problem, x = problem_of(kernel, objective), start()
    made = bj.check(bj.hypergradient(problem, x, with_error=False))
    phi = jax.jit(lambda x: problem.objective(x, bj.solve(problem.mdp(x), problem.regularizer(x))))
    for name in x:
        d = {leaf: v * (leaf == name) for leaf, v in random_like(7, x).items()}
        want = central_difference(phi, x, d, 2e-4)[0]
        np.testing.assert_allclose(
            np.vdot(flat(made.gradient), flat(d)), want, rtol=2e-7, atol=2e-9, err_msg=f"{name} in {objective}"
        )


@pytest.mark.slow
def test_contexts_with_weights():
    """Three lower levels under one x, of rewards and discounts of their own: the weighted sum of single problems."""
    shifts, discounts, weights = (
        np.random.default_rng(5).normal(size=(3, STATES, ACTIONS)),
        [0.5, 0.8, 0.9],
        [0.2, 0.5, 0.3],
    )

    def lower(x):
        return bj.MDP(jax.nn.softmax(x["logits"]), x["reward"][None] + shifts, jnp.array(discounts) * x["discount"])

    def objective(x, solution):
        return jnp.array(weights) @ jnp.sum(WEIGHTS[None] * solution.policy + x["reward"][None] * solution.q, (-2, -1))

    x = start()
    made = bj.check(bj.hypergradient(bj.BilevelProblem(lower, regularizer, objective), x, with_error=False))
    total = None
    for shift, discount, weight in zip(shifts, discounts, weights, strict=True):
        single = bj.BilevelProblem(
            lambda x, shift=shift, discount=discount: bj.MDP(
                jax.nn.softmax(x["logits"]), x["reward"] + shift, discount * x["discount"]
            ),
            regularizer,
            lambda x, s, weight=weight: weight * jnp.sum(WEIGHTS * s.policy + x["reward"] * s.q),
        )
        part = bj.check(bj.hypergradient(single, x, with_error=False))
        both = part.value, part.gradient
        total = both if total is None else jax.tree.map(jnp.add, total, both)
    np.testing.assert_allclose(made.value, total[0], rtol=1e-11)
    np.testing.assert_allclose(flat(made.gradient), flat(total[1]), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_another_mdp_solved_under_this_policy():
    """Two levels of response: a second agent's rewards are made by the first one's policy, and it optimises, too."""

    def second(x, policy):
        return bj.solve(bj.MDP(SECOND.dense, 2 * policy - 1, 0.6), bj.ShannonEntropy(x["temperature"]))

    problem = bj.BilevelProblem(
        lambda x: mdp_of(x, "softmax"), regularizer, lambda x, s: jnp.sum(WEIGHTS * second(x, s.policy).policy)
    )
    x = start()
    made = bj.check(bj.hypergradient(problem, x, with_error=False))

    def phi_numpy(x):
        """In plain numpy, by sweeps."""
        x = jax.tree.map(np.asarray, x)
        logits = np.exp(x["logits"])
        reference = np.exp(x["reference"])
        policy = solve_numpy(
            "kl",
            logits / logits.sum(-1, keepdims=True),
            x["reward"],
            float(x["discount"]),
            float(x["temperature"]),
            reference / reference.sum(-1, keepdims=True),
        )[2]
        answer = solve_numpy("shannon", SECOND.dense, 2 * policy - 1, 0.6, float(x["temperature"]), None)[2]
        return np.sum(WEIGHTS * answer)

    np.testing.assert_allclose(made.value, phi_numpy(x), rtol=1e-11)
    d = random_like(8, x)
    d["discount"], d["temperature"] = 0.1 * d["discount"], 0.1 * d["temperature"]
    want = central_difference(phi_numpy, x, d, 1e-3)[0]
    np.testing.assert_allclose(np.vdot(flat(made.gradient), flat(d)), want, rtol=1e-7)
