"""Several comparisons, and tables of other benchmarks, as one Markdown page, from their files alone."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bilevel_jax.core.errors import InputError
from bilevel_jax.experiments.present.page import CLOCK, COUNTING, READING, budget_text

IMAGES = Path("images") / "benchmarks"


def report(sources: Sequence[Path], page: Path) -> list[Path]:
    """Write the page, and the comparisons' pictures to images/benchmarks beside it. Returns what was written.

    Args:
      sources: directories of finished comparisons; Markdown files (.md) stand on the page as they are, their
        headings one level lower.
      page: the file to write.

    Raises:
      InputError: a directory has no finished comparison, two have the same name, or a file cannot be read or written.
    """
    parts = [
        "# Benchmarks",
        "Algorithms compared by `bilevel-jax compare` ([runner.md](runner.md)); `bilevel-jax report` makes this page."
        f"\n\n{READING} {COUNTING} {CLOCK}",
    ]
    written, names = [page], set()
    try:
        images = page.parent / IMAGES
        images.mkdir(parents=True, exist_ok=True)
        for directory in sources:
            if directory.suffix == ".md":
                parts.append(re.sub(r"^#", "##", directory.read_text(encoding="utf-8").strip(), flags=re.MULTILINE))
                continue
            summary = _summary(directory)
            if summary["config"] in names:
                raise InputError(f"{directory}: a comparison {summary['config']!r} is on the page already; give one")
            names.add(summary["config"])
            parts.append(_section(summary, directory))
            for file in _pictures(summary):
                written.append(images / f"{summary['config']}-{file}")
                shutil.copyfile(directory / file, written[-1])
        page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{error.filename or page}: {error.strerror or error}; give files that exist and can be written"
        ) from None
    return written


def _summary(directory: Path) -> dict[str, Any]:
    path = directory / "summary.json"
    summary = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "pictures" not in summary:
        raise InputError(f"{directory}: holds no finished comparison (summary.json); give what --out was")
    return summary


def _pictures(summary: dict[str, Any]) -> list[str]:
    return [file for files in summary["pictures"].values() for file in files.values()]


def _section(summary: dict[str, Any], directory: Path) -> str:
    name, versions = summary["config"], ", ".join(f"{k} {v}" for k, v in summary["versions"].items())
    budgets = "".join(f"; {problem}: {budget_text(budget)}" for problem, budget in summary["budgets"].items())
    parts = [
        f"## {name}",
        f"{summary['runs']} runs in {budget_text(summary['budget'])} each{budgets}; {summary['diverged']} diverged. "
        f"Seeds {_list(summary['seeds'])}, for tuning {_list(summary['tuning_seeds'])}. {summary['rule']} "
        f"{summary['machine']}, {summary['precision']}; {versions}.",
        (directory / "table.md").read_text(encoding="utf-8").strip(),
    ]
    for problem, files in summary["pictures"].items():
        if files:
            parts.append(f"### {name}: {problem}")
        parts += [f"![{problem}, {kind}]({(IMAGES / f'{name}-{file}').as_posix()})" for kind, file in files.items()]
    return "\n\n".join(parts)


def _list(seeds: list[int]) -> str:
    return re.sub(r"[\[\]]", "", str(seeds)) or "none"
