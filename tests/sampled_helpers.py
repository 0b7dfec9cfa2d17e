"""Small sampled problems with an exact answer, and tests of means that state what they can see."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from helpers import flat
from jax.flatten_util import ravel_pytree
from scipy import stats

import bilevel_jax as bj
from bilevel_jax.core.functions import Table
from bilevel_jax.estimators import estimate
from bilevel_jax.problems.garnet import Garnet, GarnetOptions

KEY = jax.random.key(7)
HORIZON = 20  # with the discount 0.5: what comes later weighs 1e-6 of the whole, far below all standard errors
SEED = 5  # of an MDP on which what comes later matters: without it, 36 percent of the gradient are missed
FALSE_ALARM = 5e-7


class WholeGarnet(Garnet):
    """Pays once, for the whole trajectory."""

    def loss(self, key, x, trajectories):
        paid = super().loss(key, x, trajectories)
        return paid @ self.discount ** jnp.arange(self.horizon, dtype=paid.dtype)


class NoisyGarnet(Garnet):
    """Costs times a factor of mean 1, drawn anew for each group and each step."""

    def loss(self, key, x, trajectories):
        factor = 1 + jax.random.normal(key, (self.horizon,), self.cost.dtype)
        return factor * super().loss(key, x, trajectories)


class EndingGarnet(Garnet):
    """Two pairs end the process, and the agent keeps to a reference policy: steps that are not valid, and KL."""

    def mdp(self, x):
        mdp = super().mdp(x)
        return mdp.replace(discount=self._discounts())

    def objective(self, x, solution):
        mdp = bj.MDP(self.transition, self._costs(x), self._discounts())
        return bj.policy_value(mdp, solution.policy) @ mdp.initial

    def loss(self, key, x, trajectories):
        return jnp.where(trajectories.valid[0], super().loss(key, x, trajectories), 0)

    def _discounts(self):
        return jnp.full(self.base.shape, self.discount).at[0, 1].set(0).at[2, 0].set(0)

    def regularizer(self, x):
        del x
        return bj.KLDivergence(self.temperature, jax.nn.softmax(0.7 * self.cost))


class PairGarnet(Garnet):
    """l = R(d_1) R(d_2) of two independent trajectories, R the discounted cost: the objective is (E R)^2."""

    @property
    def trajectories(self):
        return 2

    def objective(self, x, solution):
        return super().objective(x, solution) ** 2

    def loss(self, key, x, trajectories):
        del key
        costs = self._costs(x)[trajectories.observation, trajectories.action]
        return jnp.prod(costs @ self.discount ** jnp.arange(self.horizon, dtype=costs.dtype))


class StepPairGarnet(Garnet):
    """Two trajectories that pay c(s_1, a_1) c(s_2, a_2) at each step: a loss [H] of both."""

    @property
    def trajectories(self):
        return 2

    def objective(self, x, solution):
        mdp, costs = self.mdp(x), self._costs(x)

        def step(chance, _):
            pairs = chance[:, None] * solution.policy
            return mdp.transition.push(pairs), jnp.sum(pairs * costs) ** 2

        _, paid = jax.lax.scan(step, mdp.initial, length=self.horizon)
        return paid @ self.discount ** jnp.arange(self.horizon, dtype=paid.dtype)

    def loss(self, key, x, trajectories):
        del key
        costs = self._costs(x)[trajectories.observation, trajectories.action]
        return jnp.prod(costs, 0)


def garnet(kind=Garnet, **options) -> Garnet:
    small = {"states": 5, "actions": 2, "branching": 2, "discount": 0.5, "price": 0.5, "horizon": HORIZON, "seed": SEED}
    return kind(GarnetOptions(**(small | options)))


class Setting(NamedTuple):
    """A problem at a point x, solved: what every estimator is held against."""

    problem: Garnet
    x: jax.Array
    policy: Table
    value: np.ndarray
    gradient: np.ndarray


@functools.cache
def setting(kind=Garnet, seed=SEED, **options) -> Setting:
    return solved(garnet(kind, seed=seed, **options), None, seed)


def solved(problem, x=None, seed=0) -> Setting:
    x = 0.5 * jax.random.normal(jax.random.key(seed), problem.base.shape, problem.base.dtype) if x is None else x
    exact = bj.check(bj.hypergradient(problem, x, with_error=False))
    policy = exact.solution.policy
    return Setting(
        problem, x, Table(policy.reshape(-1, policy.shape[-1])), np.asarray(exact.value), flat(exact.gradient)
    )


class Draws(NamedTuple):
    """Independent batches: their values [n] and gradients [n, |x|]."""

    value: np.ndarray
    gradient: np.ndarray


def draws(at: Setting, response, *, batches=1000, batch=16, key=KEY, chunk=100, fast=False, **arguments) -> Draws:
    """Estimates from independent batches, at the x and the policy of a setting. `fast`: to run, not to compile."""
    draw = _draws_fast if fast else _draws
    return Draws(*map(np.asarray, draw(key, at.problem, at.x, at.policy, response, arguments, batches, batch, chunk)))


def _draw_many(key, problem, x, policy, response, arguments, batches, batch, chunk):
    def one(key):
        made = estimate(key, problem, x, policy, batch=batch, response=response, **arguments)
        return made.value, ravel_pytree(made.gradient)[0]

    return jax.lax.map(one, jax.random.split(key, batches), batch_size=chunk)


_draws_fast = jax.jit(_draw_many, static_argnums=(6, 7, 8))
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
_draws = quick_jit(_draw_many, static_argnums=(6, 7, 8))


class Seen(NamedTuple):
    """A test of a mean: `z` along the expected vector, `p` of all directions, `error` relative to its size."""

    z: float
    p: float
    error: float


def hotelling(samples: np.ndarray, expected: np.ndarray) -> Seen:
    """Hotelling's T^2 of independent samples [n, d] against an expected mean [d].

    In 5 directions: the expected vector's, and random ones. p is uniform where the mean is
    as expected, so that p > FALSE_ALARM fails as rarely as that; `error` is the standard error along the
    expected vector over its length, i.e. what share of it the test can tell apart.
    """
    samples, expected = np.asarray(samples, float).reshape(len(samples), -1), np.asarray(expected, float).reshape(-1)
    rng = np.random.default_rng(0)
    k = min(5, expected.size)
    basis = np.linalg.qr(np.column_stack([expected, rng.normal(size=(expected.size, k - 1))]))[0]
    off = (samples - expected) @ basis
    n = len(off)
    mean, covariance = off.mean(0), np.atleast_2d(np.cov(off.T))
    square = n * mean @ np.linalg.solve(covariance, mean)
    errors = np.sqrt(np.diag(covariance) / n)
    return Seen(
        float(mean[0] / errors[0]),
        float(stats.f.sf(square * (n - k) / (k * (n - 1)), k, n - k)),
        float(errors[0] / np.linalg.norm(expected)),
    )


def require_mean(samples, expected, error, name=""):
    """Fail if the mean is not the expected one (by chance, once in two million), or if the test could not tell."""
    seen = hotelling(samples, expected)
    print(f"{name}: z {seen.z:+.2f}, p {seen.p:.3g}, relative standard error {seen.error:.4f}")
    assert seen.p > FALSE_ALARM, seen
    assert seen.error < error, seen
