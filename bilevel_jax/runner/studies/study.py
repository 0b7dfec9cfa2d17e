"""One study of a config: its options checked, its tables and pictures written."""

import dataclasses
import importlib
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import yaml
from pydantic.dataclasses import dataclass as pydantic_dataclass

from bilevel_jax.errors import InputError
from bilevel_jax.problems import registry
from bilevel_jax.runner.config import read, validated
from bilevel_jax.runner.schema import STRICT_KEYS

STUDIES = {
    "accuracy": "AccuracyOptions",
    "agents": "AgentsOptions",
    "preferences": "PreferencesOptions",
    "rates": "RatesOptions",
    "samples": "SamplesOptions",
    "truncation": "TruncationOptions",
}
"""The modules of this folder that are studies, each with `run(options, directory, report)` and `plot(directory)`."""


@dataclasses.dataclass(frozen=True)
class Study:
    """A checked config: the file's name, the study's module and its options."""

    name: str
    kind: str
    module: Any
    options: Any


def load(path: str | Path, overrides: list[str]) -> Study:
    """Read a YAML file with the key `study` and the options of that study.

    Raises:
      InputError: unreadable file, unknown study, key or problem, wrong type.
    """
    raw, source = read(path, overrides, lambda raw: None)
    kind = raw.pop("study", None)
    if kind not in STUDIES:
        hint = registry.nearest(str(kind), STUDIES)
        raise source.error("study", f"no study {kind!r}{hint}; valid: {', '.join(STUDIES)}")
    options = options_of(kind)
    # Checked by pydantic, passed on as the study's own dataclass.
    values = validated(pydantic_dataclass(options, config=STRICT_KEYS, frozen=True), raw, "", source)
    if "problem" in values:
        _check_problem(values["problem"], source)
    as_tuples = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Study(Path(path).stem, kind, _module(kind), options(**as_tuples))


def options_of(kind: str) -> type:
    """The dataclass of a study's options."""
    return getattr(_module(kind), STUDIES[kind])


def _module(kind: str) -> Any:
    return importlib.import_module(f"bilevel_jax.runner.studies.{kind}")


def _check_problem(section: dict[str, Any], source: Any) -> None:
    options = dict(section)
    name = options.pop("name", None)
    try:
        registry.make(str(name), **options)
    except InputError as error:
        raise source.error("problem", str(error)) from None


def run(study: Study, directory: Path, report: Callable[[str], None]) -> None:
    """Run it in float64 and write config.yaml, its tables, its pictures and study.json into the directory.

    Raises:
      InputError: the directory cannot be written, or the study refuses an option.
    """
    started = time.perf_counter()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        values = {"study": study.kind, **json.loads(json.dumps(dataclasses.asdict(study.options)))}
        (directory / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
        with jax.enable_x64(True):
            study.module.run(study.options, directory, report)
        study.module.plot(directory)
        summary = {
            "study": study.kind,
            "seconds": round(time.perf_counter() - started, 1),
            "device": str(jax.devices()[0].device_kind),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("bilevel_jax", "jax", "jaxlib", "optax", "equinox")},
            },
        }
        (directory / "study.json").write_text(json.dumps(summary, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"--out {directory}: cannot be written ({error}); give another directory") from None
