"""What a config may say: typed dataclasses, one a section. Fields are the keys, defaults included.

A problem's section is the options dataclass that it registered. Numbers that structure the program
(sizes, counts) are ints; those that may be swept are floats, and the seeds.
"""

import dataclasses
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT_KEYS = ConfigDict(extra="forbid", allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass(config=STRICT_KEYS, frozen=True)
class ValueIterationSection:
    """Lower level: `bilevel_jax.ValueIteration`, warm-started. A few steps only make it inexact."""

    name: Literal["value_iteration"] = "value_iteration"
    tolerance: NonNegative | None = None
    max_steps: Count = 10


@dataclass(config=STRICT_KEYS, frozen=True)
class PolicyIterationSection:
    """Lower level: `bilevel_jax.PolicyIteration`, warm-started, exact to the tolerance."""

    name: Literal["policy_iteration"] = "policy_iteration"
    tolerance: NonNegative | None = None
    max_steps: Count = 1000


@dataclass(config=STRICT_KEYS, frozen=True)
class AutoSection:
    """Lower level: `bilevel_jax.Auto`, warm-started, for many states."""

    name: Literal["auto"] = "auto"
    tolerance: NonNegative | None = None
    max_steps: Count = 100_000


@dataclass(config=STRICT_KEYS, frozen=True)
class DescentSection:
    """Adjoint: `bilevel_jax.Descent`, warm-started; the paper's."""

    name: Literal["descent"] = "descent"
    step_size: Positive = 0.5
    steps: Count = 1


@dataclass(config=STRICT_KEYS, frozen=True)
class DirectSection:
    """Adjoint: `bilevel_jax.Direct`, exact."""

    name: Literal["direct"] = "direct"


@dataclass(config=STRICT_KEYS, frozen=True)
class GMRESSection:
    """Adjoint: `bilevel_jax.GMRES`, for many states."""

    name: Literal["gmres"] = "gmres"
    tolerance: Positive | None = None
    restart: Count = 30
    max_cycles: Count = 100


@dataclass(config=STRICT_KEYS, frozen=True)
class BiCGStabSection:
    """Adjoint: `bilevel_jax.BiCGStab`, for many states, in less memory."""

    name: Literal["bicgstab"] = "bicgstab"
    tolerance: Positive | None = None
    max_steps: Count = 5000


@dataclass(config=STRICT_KEYS, frozen=True)
class NeumannSection:
    """Adjoint: `bilevel_jax.Neumann`, a truncated series."""

    name: Literal["neumann"] = "neumann"
    terms: Count = 50


Lower = Annotated[ValueIterationSection | PolicyIterationSection | AutoSection, Field(discriminator="name")]
Adjoint = Annotated[
    DescentSection | DirectSection | GMRESSection | BiCGStabSection | NeumannSection, Field(discriminator="name")
]


@dataclass(config=STRICT_KEYS, frozen=True)
class MSoBiRLSection:
    """Algorithm: `bilevel_jax.algorithms.m_sobirl`."""

    name: Literal["m_sobirl"] = "m_sobirl"
    lower: Lower = dataclasses.field(default_factory=PolicyIterationSection)
    adjoint: Adjoint = dataclasses.field(default_factory=DirectSection)


@dataclass(config=STRICT_KEYS, frozen=True)
class SGDSection:
    """Optimizer: gradient descent, with the gradient clipped to `clip_norm` (2-norm) if given."""

    name: Literal["sgd"] = "sgd"
    learning_rate: Positive = 0.1
    clip_norm: Positive | None = None


@dataclass(config=STRICT_KEYS, frozen=True)
class AdamSection:
    """Optimizer: Adam, with the gradient clipped to `clip_norm` (2-norm) if given."""

    name: Literal["adam"] = "adam"
    learning_rate: Positive = 0.05
    clip_norm: Positive | None = None


@dataclass(config=STRICT_KEYS, frozen=True)
class LBFGSSection:
    """Optimizer: L-BFGS with a zoom line search, for methods that know phi; nothing to tune."""

    name: Literal["lbfgs"] = "lbfgs"
    memory_size: Count = 10
    line_search_steps: Count = 20


@dataclass(config=STRICT_KEYS, frozen=True)
class RunSection:
    """The whole config but the problem's section, whose keys depend on its name.

    iterations: of the upper level. record_every: iterations between two rows of the metrics.
    seed: of the start. precision: of all arrays. memory_limit_mb: a sweep is cut into chunks below it.
    sweep: dotted keys, each with a list of numbers; all combinations are run.
    modules: files (.py, relative to the config) or modules to import first, which register problems.
    """

    algorithm: MSoBiRLSection = dataclasses.field(default_factory=MSoBiRLSection)
    optimizer: Annotated[SGDSection | AdamSection, Field(discriminator="name")] = dataclasses.field(
        default_factory=AdamSection
    )
    iterations: Count = 500
    record_every: Count = 10
    seed: Seed = 0
    precision: Literal["float32", "float64"] = "float64"
    memory_limit_mb: Positive = 4096.0
    sweep: dict[str, Annotated[list[float | int], Field(min_length=1)]] = dataclasses.field(default_factory=dict)
    modules: list[str] = dataclasses.field(default_factory=list)


SECTIONS = {
    "algorithm": (MSoBiRLSection,),
    "algorithm.lower": (PolicyIterationSection, ValueIterationSection, AutoSection),
    "algorithm.adjoint": (DirectSection, DescentSection, GMRESSection, BiCGStabSection, NeumannSection),
    "optimizer": (AdamSection, SGDSection),
}
"""The choices at each place that has a `name`, the default first."""
