"""Calls of the library with every annotation checked, in a process of their own: see test_annotations.py."""

import jax
import jax.numpy as jnp
import jaxtyping
import optax
from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as type checkers have it

with jaxtyping.install_import_hook("bilevel_jax", "annotations.checked"):
    import bilevel_jax as bj


def lower_level(problem, x):
    hg = bj.check(bj.hypergradient(problem, x))
    jax.vmap(lambda x: bj.hypergradient(problem, x, with_error=False).gradient)(jnp.stack([x, x]))
    mdp, regularizer = problem.mdp(x), problem.regularizer(x)
    for solver in (bj.ValueIteration(1e-3), bj.AdaptivePolicyIteration(1e-3), bj.AndersonIteration(1e-3)):
        bj.check(bj.solve(mdp, regularizer, solver=solver, initial_value=hg.solution.value))
    bj.solve_finite_horizon(mdp, regularizer, 3)
    bj.solve_average_reward(mdp, regularizer)
    bj.occupancy(mdp, hg.solution.policy)


def algorithms(problem, x):
    key = jax.random.key(0)
    for name in (
        "m_sobirl",
        "sobirl",
        "stoc_sobirl",
        "amd",
        "pbrl",
        "hpgd",
        "bc_hg",
        "attenuating_actor_critic",
        "two_policy_penalty",
    ):
        algorithm = bj.algorithms.make_algorithm(name, problem, optax.adam(0.1))
        _, info = algorithm.step(key, algorithm.init(key, x))
        assert jnp.isfinite(info.gradient_norm), name


if __name__ == "__main__":
    import annotations  # by the name that the hook looks the checker up under

    garnet = annotations.bj.problems.make("garnet", states=4, actions=2, horizon=6)
    start = garnet.start(jax.random.key(0))
    annotations.lower_level(garnet, start)
    annotations.algorithms(garnet, start)
    print("true")
