"""Tax design: rates of income tax and of value-added tax on each good, for households that work, consume and save.

The macroeconomic model of Thoma, Pasztor, Krause, Ramponi and Hu (NeurIPS 2024, "Contextual Bilevel Reinforcement
Learning for Incentive Alignment", arXiv 2406.01575) after Hill, Bardoscia and Turrell (2021, arXiv 2103.16977), with
the formulas and numbers of the authors' code (lasgroup/HPGD). They simulate it; here it is solved exactly as well.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logit, ndtr
from jaxtyping import Array, Float, Int32, Integer, PRNGKeyArray

from bilevel_jax.bilevel import Problem
from bilevel_jax.core.errors import InputError
from bilevel_jax.core.promotion import with_rank
from bilevel_jax.core.validation import as_float, require_distribution, require_positive
from bilevel_jax.environments import Discrete, Environment, TimeStep
from bilevel_jax.environments.sampling import choose, uniform
from bilevel_jax.mdp.process import MDP
from bilevel_jax.mdp.regularizers import ShannonEntropy
from bilevel_jax.mdp.transitions import DenseTransition
from bilevel_jax.problems.options import (
    as_fraction,
    as_number,
    as_positive,
    as_sequence,
    require_count,
    require_room_for,
    require_room_to_solve,
    require_size,
)
from bilevel_jax.problems.panels import Curves, Panel
from bilevel_jax.problems.registry import register
from bilevel_jax.solvers.policy_value import policy_value

HOURS, SPENDING = 8.0, 5.0  # the most that a household works, and that it spends on each good, in a period
START = 0.15  # share of the largest rate: 0.3 as published
INITIAL_SPREAD = 2**0.5  # standard deviation of the first assets
MOST_ENTRIES = 100_000_000  # of the transition


@dataclasses.dataclass(frozen=True)
class TaxDesignOptions:
    """Tax design: rates of income and value-added taxes, for welfare and revenue, given how households respond.

    households: one row per type, with its share of the population, then its preference for each good.
    hours_levels, spending_levels: levels that a household can choose, of hours (0 to 8) and on each good (0 to 5).
    grid: points of the grid of assets, from -largest_assets to largest_assets.
    largest_assets: what assets are clipped to.
    noise: standard deviation of the assets' noise.
    wage: for an hour.
    work_disutility: weight of the squared hours.
    asset_utility: weight of log(1 + assets / 20); debts count themselves.
    consumption_weight, revenue_weight: of the government, see `TaxDesign.welfare`.
    max_rate: what tax rates are below.
    discount: of households and government.
    temperature: of the households' entropy.
    """

    households: tuple[tuple[float, ...], ...] = ((0.5, 0.6, 0.3, 0.1), (0.5, 0.1, 0.7, 0.2))
    hours_levels: int = 3
    spending_levels: int = 3
    grid: int = 21
    largest_assets: float = 100.0
    noise: float = 5.0
    wage: float = 1.0
    work_disutility: float = 0.1
    asset_utility: float = 1.0
    consumption_weight: float = 15.0
    revenue_weight: float = 5.0
    max_rate: float = 2.0
    discount: float = 0.9
    temperature: float = 0.1


class TaxDesign(Problem):
    """The problem. The upper variable is x[1 + G]: rates are max_rate * sigmoid(x), of income, then of G goods.

    A household of a type works h hours and spends c_g on good g, both of finitely many levels: an action. Goods are
    measured in units that cost 1 before tax, so that it gets c_g / (1 + rate_g) of them. Its reward is
      prod_g (c_g / (1 + rate_g))^preference_g - work_disutility h^2 + u(assets),
      u(a) = asset_utility log(1 + a / 20) for a > 0, else a.
    Assets become a + (1 - income rate) wage h - sum_g c_g + noise N(0, 1), clipped to the grid's ends. The government
    maximises the discounted sum of `welfare` over types by their shares, from assets of N(0, 2).

    In the exact solution, each period's assets are rounded to the nearest point of the grid (Tauchen 1986): the
    probability of a point is the probability of its cell under the noise. It is smooth in the rates, like everything
    else in x; there are no kinks. For the households the rounding is additional noise, of variance cell^2 / 12. It
    hides drifts where cells are wider than two standard deviations of the noise. Welfare with 21 points (cells of two)
    is 2.5% off, with 41 points 0.3%.

    Income tax enters the dynamics, so that this is no `bilevel_jax.SampledProblem`, whose dynamics do not depend on x.
    `simulator(x)` simulates the economy at given rates, with rounded or with continuous assets.

    Published otherwise: 10 levels of hours and 5 of spending; continuous assets, clipped before the noise, which is
    truncated; episodes of 200 periods; policies that choose hours and goods independently of each other.

    Raises:
      InputError: sizes or numbers out of range, shares or preferences that are none, too large a transition.
    """

    assets: Float[Array, " S"]
    share: Float[Array, " C"]
    preference: Float[Array, "C G"]
    hours: Float[Array, " A"]
    spending: Float[Array, "A G"]
    noise: Float[Array, ""]
    wage: Float[Array, ""]
    work_disutility: Float[Array, ""]
    asset_utility: Float[Array, ""]
    consumption_weight: Float[Array, ""]
    revenue_weight: Float[Array, ""]
    max_rate: Float[Array, ""]
    discount: Float[Array, ""]
    temperature: Float[Array, ""]

    def __init__(self, options: TaxDesignOptions):
        self.share, self.preference = _households(options.households)
        goods = self.preference.shape[1]
        require_size(options, "hours_levels", least=2)
        require_size(options, "spending_levels", least=2)
        require_size(options, "grid", least=2)
        count = options.hours_levels * options.spending_levels**goods
        require_count(
            "grid",
            options.grid**2 * count,
            MOST_ENTRIES,
            f"{options.grid} points make a transition of {{count}} entries (grid^2 hours_levels spending_levels^goods)",
            "are taken; take fewer points or levels",
        )
        require_room_for("grid", options.grid, count, options.grid, copies=8)  # cells' probabilities and derivatives
        require_room_to_solve("households", len(options.households), options.grid, count)
        levels = [np.linspace(0, HOURS, options.hours_levels)]
        levels += [np.linspace(0, SPENDING, options.spending_levels)] * goods
        actions = jnp.asarray(np.stack(np.meshgrid(*levels, indexing="ij"), -1).reshape(count, 1 + goods), float)
        self.hours, self.spending = actions[:, 0], actions[:, 1:]
        largest = as_positive(options, "largest_assets", "100 is usual")
        self.assets = largest * jnp.linspace(-1, 1, options.grid)
        self.noise = as_positive(options, "noise", "5 is usual; without it assets would jump by cells")
        self.max_rate = as_positive(options, "max_rate", "2 is usual")
        self.wage = as_number(options, "wage", 0, "1 is usual")
        self.work_disutility = as_number(options, "work_disutility", 0, "0 makes work free")
        self.asset_utility = as_number(options, "asset_utility", 0, "0 makes savings useless")
        self.consumption_weight = as_number(options, "consumption_weight", 0, "0 counts no consumption")
        self.revenue_weight = as_number(options, "revenue_weight", 0, "0 counts no revenue")
        self.discount = as_fraction(options, "discount", "0.9 is usual")
        self.temperature = ShannonEntropy(options.temperature).temperature

    def start(self, key: PRNGKeyArray) -> Float[Array, " n"]:
        """x ~ N(logit(0.15), 0.1^2), [1 + G]: rates near 0.15 max_rate."""
        return logit(START) + 0.1 * jax.random.normal(key, (1 + self.preference.shape[1],))

    def rates(self, x: Float[Array, " n"]) -> tuple[Float[Array, ""], Float[Array, " G"]]:
        """Return the rates of income tax, and of value-added tax on each good."""
        rates = self.max_rate * jax.nn.sigmoid(x)
        return rates[0], rates[1:]

    def mdp(self, x):
        reward = self.utility(x)[:, None] + _asset_utility(self.assets, self.asset_utility)[None, :, None]
        return self._process(x, reward)

    def regularizer(self, x):
        del x
        return ShannonEntropy(self.temperature)

    def objective(self, x, solution) -> Float[Array, ""]:
        welfare = jnp.broadcast_to(self.welfare(x), solution.policy.shape)
        process = self._process(x, welfare)
        return -self.share @ (policy_value(process, solution.policy) @ process.initial[0])

    def utility(self, x: Float[Array, " n"]) -> Float[Array, "C A"]:
        """Return the utility of each action for each type, without that of assets."""
        # As two factors: at no spending, the derivative of one power would be infinite times 0.
        spent = jnp.prod(self.spending[None] ** self.preference[:, None], -1)
        taxed = jnp.prod((1 + self.rates(x)[1])[None] ** -self.preference, -1)
        return spent * taxed[:, None] - self.work_disutility * self.hours[None] ** 2

    def welfare(self, x: Float[Array, " n"]) -> Float[Array, " A"]:
        """What the government counts of each action.

        consumption_weight times the mean over goods of c_g / (1 + rate_g), as a share of the most spending, and
        revenue_weight times log(1 + tax revenue).
        """
        income, added = self.rates(x)
        quantity = self.spending / (1 + added)[None]
        revenue = quantity @ added + income * self.wage * self.hours
        return self.consumption_weight * jnp.mean(quantity, -1) / SPENDING + self.revenue_weight * jnp.log1p(revenue)

    def saving(self, x: Float[Array, " n"]) -> Float[Array, " A"]:
        """Return how much each action adds to assets, on average."""
        return (1 - self.rates(x)[0]) * self.wage * self.hours - jnp.sum(self.spending, -1)

    def nearest(self, assets: Float[Array, "*batch"]) -> Int32[Array, "*batch"]:
        """The index of the grid's point nearest to some assets."""
        low, high = self.assets[0], self.assets[-1]
        last = self.assets.shape[0] - 1
        return jnp.clip(jnp.round((assets - low) / (high - low) * last), 0, last).astype(jnp.int32)

    def simulator(self, x: Float[Array, " n"], *, rounded: bool = False) -> "Household":
        """Return a simulator of one household after another at the rates of x.

        `rounded` rounds to the grid, as `mdp(x)` does.
        """
        return Household(self, x, rounded)

    def behaviour(self, policy: Float[Array, "C S A"]) -> "Behaviour":
        """Return a policy for the simulator: the policy at the grid's nearest point."""
        return Behaviour(self, policy)

    def panels(self, x, solution) -> tuple[Panel, ...]:
        """What each type does at which assets."""
        income, added = self.rates(x)
        goods = [f"good {g + 1}, {rate:.0%} VAT" for g, rate in enumerate(np.asarray(added))]
        titles = [(f"work, {income:.0%} income tax", "mean hours"), *((good, "mean spending") for good in goods)]
        chosen = np.column_stack([self.hours, self.spending])
        means = np.moveaxis(np.asarray(solution.policy) @ chosen, -1, 0)  # [1 + G, C, S]
        return tuple(
            Curves(
                title=title,
                x=np.asarray(self.assets),
                curves={f"type {c + 1}": y for c, y in enumerate(curves)},
                x_label="assets",
                y_label=label,
            )
            for (title, label), curves in zip(titles, means, strict=True)
        )

    def _process(self, x: Float[Array, " n"], reward: Float[Array, "#C #S A"]) -> MDP:
        """The economy with a reward that broadcasts to [C, S, A]."""
        transition = DenseTransition(self._cells(self.assets[:, None] + self.saving(x)[None], self.noise))
        initial = self._cells(jnp.zeros_like(self.noise), INITIAL_SPREAD)
        shape = (*self.share.shape, *transition.shape)
        return MDP(transition, jnp.broadcast_to(reward, shape), self.discount, initial)

    def _cells(self, mean: Float[Array, "*batch"], deviation: Float[Array, ""] | float) -> Float[Array, "*batch S"]:
        """Probabilities of the grid's cells under a normal distribution; the outermost have its tails."""
        borders = (self.assets[1:] + self.assets[:-1]) / 2
        below = ndtr((with_rank(borders, mean.ndim + 1) - mean[..., None]) / deviation)
        return jnp.maximum(jnp.diff(below, prepend=0.0, append=1.0), 0)  # rounding may leave -1e-17


class Household(Environment):
    """The simulator of a household at given rates.

    State and observation are its type, int32, and its assets; it emits its reward.

    With rounded assets it has the distribution of the process of `TaxDesign.mdp(x)`.
    """

    problem: TaxDesign
    x: Float[Array, " n"]
    rounded: bool = eqx.field(static=True)

    @property
    def action_space(self):
        return Discrete(self.problem.hours.shape[0])

    def reset(self, key):
        for_type, for_assets = jax.random.split(key)
        kind = choose(uniform(for_type), self.problem.share)
        return kind, self._noisy(for_assets, jnp.zeros_like(self.problem.noise), INITIAL_SPREAD)

    def observe(self, state):
        return state

    def step(self, key, state, action):
        kind, assets = state
        problem = self.problem
        reward = problem.utility(self.x)[kind, action] + _asset_utility(assets, problem.asset_utility)
        following = kind, self._noisy(key, assets + problem.saving(self.x)[action], problem.noise)
        never = jnp.zeros((), bool)
        return following, TimeStep(observation=following, reward=reward, terminated=never, truncated=never)

    def _noisy(
        self, key: PRNGKeyArray, mean: Float[Array, ""], deviation: Float[Array, ""] | float
    ) -> Float[Array, ""]:
        grid = self.problem.assets
        assets = mean + deviation * jax.random.normal(key, dtype=grid.dtype)
        return grid[self.problem.nearest(assets)] if self.rounded else jnp.clip(assets, grid[0], grid[-1])


class Behaviour(eqx.Module):
    """See `TaxDesign.behaviour`."""

    problem: TaxDesign
    policy: Float[Array, "C S A"]

    def __call__(self, observation: tuple[Integer[Array, ""], Float[Array, ""]]) -> Float[Array, " A"]:
        kind, assets = observation
        return self.policy[kind, self.problem.nearest(assets)]


def _asset_utility(assets: Float[Array, "*batch"], weight: Float[Array, ""]) -> Float[Array, "*batch"]:
    return jnp.where(assets > 0, weight * jnp.log1p(jnp.maximum(assets, 0) / 20), assets)


def _households(rows: Any) -> tuple[Float[Array, " C"], Float[Array, "C G"]]:
    """Shares and preferences."""
    rows = [as_sequence("households", row, "numbers") for row in as_sequence("households", rows, "rows")]
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths[0] < 2:
        raise InputError(
            f"households: expected at least one row (share, preference of each good), all of one length, got lengths "
            f"{lengths}"
        )
    table = as_float("households", rows, float)
    require_distribution("households (shares)", table[:, 0], -1, "divide them by their sum")
    require_positive("households (preferences)", table[:, 1:], "leave out a good that nobody wants")
    return table[:, 0], table[:, 1:]


register("tax_design", TaxDesignOptions, TaxDesign)
