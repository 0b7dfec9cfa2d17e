"""The table of methods that `compare` runs: options, what each needs of a problem, and how it is built."""

import dataclasses
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
from pydantic import Field
from pydantic.dataclasses import dataclass

import bilevel_jax as bj
from bilevel_jax.algorithms.upper import as_upper_level
from bilevel_jax.environments import TabularEnvironment
from bilevel_jax.errors import InputError
from bilevel_jax.runner.counting import amd_transitions, model_transitions, pbrl_transitions, sampled_transitions
from bilevel_jax.runner.parts import ADJOINT, LOWER, named
from bilevel_jax.runner.schema import (
    STRICT_KEYS,
    Adjoint,
    Count,
    DescentSection,
    Lower,
    Positive,
    ValueIterationSection,
)

Reason = str | None


@dataclass(config=STRICT_KEYS, frozen=True)
class ExactAgentSection:
    """Agent: `bilevel_jax.agents.ExactAgent`, the oracle of the published experiments; it takes no samples."""

    name: Literal["exact"] = "exact"


@dataclass(config=STRICT_KEYS, frozen=True)
class SoftQLearningSection:
    """Agent: `bilevel_jax.agents.SoftQLearning`; its samples count."""

    name: Literal["soft_q_learning"] = "soft_q_learning"
    processes: Count = 64
    steps: Count = 64


AgentChoice = Annotated[ExactAgentSection | SoftQLearningSection, Field(discriminator="name")]
AGENT = {"exact": bj.agents.ExactAgent, "soft_q_learning": bj.agents.SoftQLearning}


@dataclass(config=STRICT_KEYS, frozen=True)
class MSoBiRLOptions:
    """M-SoBiRL (Yang, Gao and Yuan 2025): a few warm-started sweeps and adjoint steps, or exact solves, an iteration.

    lower: solver of the lower level; the default is the published one.
    adjoint: linear solver of the adjoint; the default is the published one.
    """

    lower: Lower = dataclasses.field(default_factory=ValueIterationSection)
    adjoint: Adjoint = dataclasses.field(default_factory=DescentSection)


@dataclass(config=STRICT_KEYS, frozen=True)
class ImplicitOptions:
    """Any optimizer on the exact hyper-gradient; L-BFGS included.

    tolerance: of the lower level and the adjoint; null is working precision.
    """

    tolerance: Positive | None = None


@dataclass(config=STRICT_KEYS, frozen=True)
class ContinuationOptions:
    """Any optimizer on the exact hyper-gradient, from a higher temperature down to the problem's own.

    start: factor of the temperature at the start.
    steps: iterations until the factor is 1; it falls geometrically.
    tolerance: of the lower level and the adjoint; null is working precision.
    """

    start: Positive = 10.0
    steps: Positive = 200.0
    tolerance: Positive | None = None


@dataclass(config=STRICT_KEYS, frozen=True)
class AMDOptions:
    """AMD, adaptive model design (Chen et al. 2022): sweeps of V and of dV/dx, forward mode.

    sweeps: an iteration.
    """

    sweeps: Count = 100


@dataclass(config=STRICT_KEYS, frozen=True)
class PBRLOptions:
    """PBRL, penalty-based bilevel RL (Shen, Yang and Chen 2024): x and a policy descend on one penalized function.

    penalty: on values or on the Bellman equation.
    weight: of the penalty.
    steps: of the penalized policy an iteration.
    rate: its step size, at most 1.
    """

    penalty: Literal["value", "bellman"] = "value"
    weight: Positive = 100.0
    steps: Count = 1
    rate: Positive = 1.0


@dataclass(config=STRICT_KEYS, frozen=True)
class ActorCriticOptions:
    """Two actor-critics in one loop, penalty and entropy attenuating (Zeng et al. 2026).

    batch: losses an iteration and policy.
    softness: inverse weight of the penalty at the start; it decays.
    cost_rate: step size of the upper level's critic.
    """

    batch: Count = 10
    softness: Positive = 0.5
    cost_rate: Positive = 0.1


@dataclass(config=STRICT_KEYS, frozen=True)
class SampledOptions:
    """What the methods from samples share.

    batch: losses an iteration.
    agent: the lower level.
    """

    batch: Count = 10
    agent: AgentChoice = dataclasses.field(default_factory=ExactAgentSection)


@dataclass(config=STRICT_KEYS, frozen=True)
class SoBiRLOptions(SampledOptions):
    """SoBiRL (Yang, Gao and Yuan 2025) from trajectories.

    response: of the agent to x, by a model learned from all samples so far, or by rollouts.
    """

    response: Literal["learned_model", "rollouts"] = "learned_model"


@dataclass(config=STRICT_KEYS, frozen=True)
class StocSoBiRLOptions:
    """Stoc-SoBiRL (Yang, Gao and Yuan 2025): agent and x learn at once, sizes by the schedule.

    iterations: that the schedule is made for; null is as many as fit the budget, 1000 without one.
    """

    iterations: Count | None = None


@dataclass(config=STRICT_KEYS, frozen=True)
class HPGDOptions(SampledOptions):
    """HPGD (Thoma et al. 2024): Monte Carlo advantages over the visits of a batch."""


@dataclass(config=STRICT_KEYS, frozen=True)
class BCHGOptions(SampledOptions):
    """BC-HG (Kudo et al. 2026): Boltzmann covariance hyper-gradient with a SARSA critic.

    critic_rate: step size of SARSA.
    """

    critic_rate: Positive = 0.3


@dataclass(config=STRICT_KEYS, frozen=True)
class ZeroOrderOptions(SampledOptions):
    """Two values of the objective along a random direction.

    radius: distance of the two points, in units of x.
    """

    radius: Positive = 0.1


@dataclass(config=STRICT_KEYS, frozen=True)
class NaiveOptions(SampledOptions):
    """The gradient without the implicit term: the policy is taken for a constant."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A method that can be compared.

    `options`: a pydantic dataclass, each field with a default. `needs(problem, options)`: None, or why the
    method does not apply. `make(problem, optimizer, options, transitions)`: the algorithm.
    `count(algorithm, state, info)`: transitions of the iteration that led to `state`. `optimizers`: by name,
    the first the default.
    """

    options: type
    needs: Callable[[Any, Any], Reason]
    make: Callable[[Any, Any, Any, int | None], Any]
    count: Callable[[Any, Any, Any], jax.Array]
    optimizers: tuple[str, ...] = ("adam", "sgd")

    @property
    def summary(self) -> str:
        """First line of the options' docstring."""
        return (self.options.__doc__ or "").strip().splitlines()[0]

    def applies(self, problem: Any, options: Any = None) -> Reason:
        """None if the method can run on the problem, or else the reason why not."""
        return self.needs(problem, self.options() if options is None else options)

    def build(self, problem: Any, optimizer: Any, options: Any = None, transitions: int | None = None) -> Any:
        """The algorithm.

        Args:
          problem: one that the method applies to.
          optimizer: an optax transformation or an `UpperLevel`.
          options: None is the defaults.
          transitions: the whole budget, for methods whose sizes depend on it.

        Raises:
          InputError: the method does not apply.
        """
        options = self.options() if options is None else options
        if (reason := self.applies(problem, options)) is not None:
            raise InputError(f"problem: {type(problem).__name__} {reason}")
        return self.make(problem, optimizer, options, transitions)


def _regularizer(problem: Any) -> Any:
    """The problem's, with shapes for arrays."""
    return jax.eval_shape(lambda: problem.regularizer(problem.start(jax.random.key(0))))


def _needs_model(problem: Any, options: Any = None) -> Reason:
    del options
    if not isinstance(problem, bj.Problem):
        return "has no model: mdp(x), regularizer(x) and objective(x, solution)"
    if not _regularizer(problem).smooth:
        return f"has the regularizer {type(_regularizer(problem)).__name__}, whose policy has no derivative"
    return None


def _needs_samples(problem: Any, options: Any = None) -> Reason:
    if not isinstance(problem, bj.SampledProblem):
        return "has no simulator: environment, reward(x) and loss(key, x, trajectories)"
    if not isinstance(_regularizer(problem), bj.ShannonEntropy | bj.KLDivergence):
        return f"has the regularizer {type(_regularizer(problem)).__name__}, whose policy has no logarithm everywhere"
    if isinstance(getattr(options, "agent", None), ExactAgentSection) and not isinstance(problem, bj.Problem):
        return "has no model for agent: exact; agent: soft_q_learning learns from samples"
    return None


def _needs_table(problem: Any, options: Any = None) -> Reason:
    if (reason := _needs_samples(problem, options)) is not None:
        return reason
    return (
        None if _is_tabular(problem) else f"has the simulator {type(problem.environment).__name__}, not a tabular one"
    )


def _needs_samples_for_sobirl(problem: Any, options: SoBiRLOptions) -> Reason:
    needs = _needs_table if options.response == "learned_model" else _needs_samples
    return needs(problem, options)


def _is_tabular(problem: Any) -> bool:
    return isinstance(problem.environment, TabularEnvironment)


def _section(options: Any) -> dict[str, Any]:
    """The fields by name, sections within as they are."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}


def _m_sobirl(problem, optimizer, options, transitions):
    del transitions
    lower, adjoint = named(LOWER, _section(options.lower)), named(ADJOINT, _section(options.adjoint))
    return bj.algorithms.m_sobirl(problem, optimizer, lower=lower, adjoint=adjoint)


def _implicit(problem, optimizer, options, transitions):
    del transitions
    return bj.algorithms.implicit(problem, optimizer, method=bj.Implicit(tolerance=options.tolerance))


def _continuation(problem, optimizer, options, transitions):
    upper = as_upper_level(optimizer)
    schedule = bj.algorithms.Cooling(options.start, options.steps)
    upper = bj.algorithms.UpperLevel(upper.optimizer, projection=upper.projection, temperature=schedule)
    return _implicit(problem, upper, options, transitions)


def _baseline(problem: Any) -> Any:
    learned = problem.trajectories == 1 and _is_tabular(problem)
    return bj.estimators.LearnedAdvantage() if learned else bj.estimators.LeaveOneOut()


def _sobirl(problem, optimizer, options, transitions):
    del transitions
    if options.response == "learned_model":
        response: Any = bj.estimators.LearnedModel()
        pairings = min(10, options.batch) if problem.trajectories > 1 else 1
    else:
        # What follows later is worth less than a hundredth.
        length = max(1, math.ceil(math.log(100) / -math.log(max(float(problem.discount), 1e-6))))
        response, pairings = bj.estimators.NestedRollouts(min(length, problem.horizon), visits=1), 1
    return bj.algorithms.sobirl(
        problem,
        optimizer,
        agent=named(AGENT, _section(options.agent)),
        response=response,
        batch=options.batch,
        baseline=_baseline(problem),
        pairings=pairings,
    )


def _stoc_sobirl(problem, optimizer, options, transitions):
    def made(iterations: int) -> Any:
        return bj.algorithms.stoc_sobirl(
            problem,
            iterations,
            optimizer=optimizer,
            response=bj.estimators.LearnedModel(),
            baseline=_baseline(problem),
        )

    if options.iterations is not None or transitions is None:
        return made(options.iterations or 1000)
    low, high = 1, transitions
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle * made(middle).environment_steps <= transitions else (low, middle - 1)
    return made(low)


def _pbrl(problem, optimizer, options, transitions):
    del transitions
    return bj.algorithms.pbrl(problem, optimizer, **_section(options))


def _amd(problem, optimizer, options, transitions):
    del transitions
    return bj.algorithms.amd(problem, optimizer, sweeps=options.sweeps)


def _actor_critic(problem, optimizer, options, transitions):
    del transitions
    return bj.algorithms.attenuating_actor_critic(
        problem,
        optimizer,
        batch=options.batch,
        softness=bj.agents.Polynomial(options.softness, 10.0, 0.5),
        cost_rate=options.cost_rate,
    )


def _from_batches(algorithm: Callable[..., Any]) -> Callable[[Any, Any, Any, int | None], Any]:
    """The builder of an algorithm that takes an agent, and its options by name."""

    def make(problem, optimizer, options, transitions):
        del transitions
        keys = _section(options)
        return algorithm(problem, optimizer, **{**keys, "agent": named(AGENT, _section(keys["agent"]))})

    return make


def _model_based(options: type, make: Callable[..., Any], count: Any = model_transitions, **others: Any) -> Method:
    return Method(options, _needs_model, make, count, **others)


def _from_samples(options: type, make: Callable[..., Any], needs: Callable[..., Reason] = _needs_table) -> Method:
    return Method(options, needs, make, sampled_transitions)


METHODS: dict[str, Method] = {
    "m_sobirl": _model_based(MSoBiRLOptions, _m_sobirl),
    "implicit": _model_based(ImplicitOptions, _implicit, optimizers=("adam", "sgd", "lbfgs")),
    "continuation": _model_based(ContinuationOptions, _continuation),
    "amd": _model_based(AMDOptions, _amd, amd_transitions),
    "pbrl": _model_based(PBRLOptions, _pbrl, pbrl_transitions),
    "sobirl": _from_samples(SoBiRLOptions, _sobirl, _needs_samples_for_sobirl),
    "stoc_sobirl": _from_samples(StocSoBiRLOptions, _stoc_sobirl),
    "hpgd": _from_samples(HPGDOptions, _from_batches(bj.algorithms.hpgd)),
    "bc_hg": _from_samples(BCHGOptions, _from_batches(bj.algorithms.bc_hg)),
    "actor_critic": _from_samples(ActorCriticOptions, _actor_critic),
    "zero_order": _from_samples(ZeroOrderOptions, _from_batches(bj.algorithms.zero_order), _needs_samples),
    "naive": _from_samples(NaiveOptions, _from_batches(bj.algorithms.naive), _needs_samples),
}
"""By name, as in a config."""
