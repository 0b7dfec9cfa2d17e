"""What the objective of RLHF with the agent's own segments does not promise: it is not least at the true reward.

`tabular_rlhf` fits a reward to labels of segments that the agent itself draws, as it acts for that reward. At the
teacher's own reward every label is predicted as well as it can be: with the agent's policy fixed, the gradient is 0.
The gradient through the policy is not 0. It leads to policies whose segments are easier to tell apart, good or not.
"""

import jax
import jax.numpy as jnp
import optax

import bilevel_jax as bj


def measure(problem, iterations: int):
    """Gradients at the true reward, the slope of the true return there, and loss and true return along a descent.

    The true return is 0 for the uniform policy and 1 for the best.
    """
    truth = problem.teacher.rationality * problem.hidden_reward  # in the units of the labels
    x = truth.reshape(-1)

    def solved(x):
        return bj.solve(problem.mdp(x), problem.regularizer(x))

    best = bj.solve(problem.mdp(x), bj.Unregularized()).policy
    least, most = (problem.true_return(policy) for policy in (jnp.full_like(best, 1 / best.shape[-1]), best))

    def gain(x):
        return (problem.true_return(solved(x).policy) - least) / (most - least)

    direct = jax.grad(problem.objective)(x, solved(x))  # the agent's answer fixed
    whole = bj.hypergradient(problem, x, with_error=False)  # and through it
    slope = -jax.grad(gain)(x) @ whole.gradient / jnp.linalg.norm(whole.gradient)

    algorithm = bj.algorithms.implicit(problem, optax.adam(0.05))

    def iterate(state, key):
        state, info = algorithm.step(key, state)
        return state, info.objective

    keys = jax.random.split(jax.random.key(0), iterations)
    state, losses = jax.lax.scan(iterate, algorithm.init(keys[0], x), keys)
    norms = jnp.linalg.norm(direct), jnp.linalg.norm(whole.gradient)
    return *norms, slope, losses[0], losses[-1], gain(x), gain(state.x)


def main(problems: int = 16, iterations: int = 40) -> None:
    made = [bj.problems.make("tabular_rlhf", noise=0.0, ridge=0.0, seed=seed) for seed in range(problems)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)
    rows = jnp.stack(jax.jit(jax.vmap(lambda problem: measure(problem, iterations)))(stacked), 1)
    print("MDP  |direct|  |implicit|  slope of return   loss: true, after   return: true, after")
    for seed, row in enumerate(rows):
        print("{:3d}  {:8.0e}  {:10.3f}  {:15.3f}   {:10.3f} {:7.3f}   {:12.3f} {:6.3f}".format(seed, *row))
    lower = int(jnp.sum(rows[:, 2] < 0))
    print(f"a step along minus the hyper-gradient lowers the true return in {lower} of {problems} MDPs")
    print("mean loss {:.3f} to {:.3f}".format(*rows[:, 3:5].mean(0)))
    print("mean true return {:.3f} -> {:.3f}".format(*rows[:, 5:].mean(0)))


if __name__ == "__main__":
    main()
