"""The keys at the top of a config: typed dataclasses. Sections that name a choice are checked in sections.py."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclasses.dataclass(frozen=True)
class LimitSection:
    """What a run may take beside its iterations, whichever comes first; null is no limit.

    transitions: of the lower level that a run looks at.
    seconds: of a run, without compiling and evaluating. Runs that are vmapped share the time equally.
    """

    transitions: Annotated[int, Field(ge=1, lt=2**53)] | None = None
    seconds: Positive | None = None


@dataclasses.dataclass(frozen=True)
class BudgetSection:
    """What a run may take, whichever comes first; null is no limit. Without any, a run takes 1,000,000 transitions.

    transitions: of the lower level that a run looks at.
    seconds: of a run, without compiling and evaluating. Runs that are vmapped share the time equally.
    iterations: of the upper level.
    """

    transitions: Annotated[int, Field(ge=1, lt=2**53)] | None = None
    seconds: Positive | None = None
    iterations: Count | None = None


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    """When a run's state is kept on disk, from which it goes on after an interruption.

    minutes: between two of them.
    points: also at every such record; null is at none.
    keep: how many of the latest stay.
    """

    minutes: Positive = 5.0
    points: Count | None = None
    keep: Annotated[int, Field(ge=1, le=100)] = 2


@dataclasses.dataclass(frozen=True)
class RunSection:
    """The config of `run` beside the sections `problem`, `algorithm`, `optimizer`, `projection` and `temperature`.

    iterations: of the upper level.
    record_every: iterations between two rows of the metrics.
    budget: further limits.
    checkpoint: when states are kept.
    seed: of the start and the samples.
    precision: of all arrays.
    memory_limit_mb: a sweep is cut into chunks below it.
    samples: losses that estimate the final objective where the problem has no model.
    sweep: dotted keys, each with a list of values; all combinations are run.
    modules: files (.py, relative to the config) or modules to import first, which register problems and algorithms.
    """

    iterations: Count = 500
    record_every: Count = 10
    budget: LimitSection = dataclasses.field(default_factory=LimitSection)
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    seed: Seed = 0
    precision: Literal["float32", "float64"] = "float64"
    memory_limit_mb: Positive = 4096.0
    samples: Count = 1000
    sweep: dict[str, Any] = dataclasses.field(default_factory=dict)
    modules: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class CompareSection:
    """The config of `compare` beside the lists `problems` and `algorithms`.

    seeds: of the reported runs; they set start and samples.
    tuning_seeds: of the runs that choose an algorithm's settings from its grid, others than the reported ones.
    budget: of every run; a problem may have its own.
    points: of each curve beside its start, evenly spaced in the logarithm of the budget.
    first: fraction of the budget at the first of them.
    checkpoint: when states are kept.
    samples: losses that estimate the objective where the problem has no model.
    precision: of all arrays.
    memory_limit_mb: an algorithm's runs are cut into chunks below it.
    """

    seeds: Annotated[list[Seed], Field(min_length=1)] = dataclasses.field(default_factory=lambda: [0, 1, 2, 3, 4])
    tuning_seeds: list[Seed] = dataclasses.field(default_factory=lambda: [1000, 1001])
    budget: BudgetSection = dataclasses.field(default_factory=BudgetSection)
    points: Count = 16
    first: Annotated[float, Field(gt=0, le=1)] = 0.01
    checkpoint: CheckpointSection = dataclasses.field(default_factory=CheckpointSection)
    samples: Count = 1000
    precision: Literal["float32", "float64"] = "float64"
    memory_limit_mb: Positive = 4096.0
