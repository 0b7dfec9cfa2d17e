"""The page of a comparison: one HTML file that opens from disk, pictures and all."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from bilevel_jax.experiments.comparison import Comparison
from bilevel_jax.experiments.present.tables import Row, entry, grid, not_applicable, number, settings_text

STYLE = """
:root { --ink: #1d2733; --soft: #5d6b7a; --line: #dfe4ea; --best: #e6f4ec; --mark: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 2.5rem 1.5rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 2.8rem 0 .6rem; padding-top: 1rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 76ch; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
nav a { color: var(--mark); text-decoration: none; margin-right: 1.1rem; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .88rem; }
th, td { padding: .36rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--soft); }
th:first-child, td:first-child, .left { text-align: left; }
td { font-variant-numeric: tabular-nums; }
td.best { background: var(--best); font-weight: 600; }
td.none { color: #a7b1bc; text-align: center; }
td.bad { color: #b3261e; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; display: block; }
pre { background: #f6f8fa; padding: 1rem; overflow-x: auto; font-size: .82rem; line-height: 1.45; border-radius: 6px; }
summary { cursor: pointer; color: var(--mark); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.4rem; margin: .8rem 0; font-size: .95rem; }
dt { color: var(--soft); } dd { margin: 0; max-width: 80ch; }
"""

COUNTING = (
    "Transitions: algorithms from samples count the steps of their simulator. Algorithms that know the model count "
    "contexts times states times actions for every Bellman sweep, product with a policy's transitions and step of the "
    "adjoint, and a factorization as many sweeps as have its operations; a line search counts each trial point. An "
    "exact agent's own solves are not counted, nor is the work of the objective itself."
)
CLOCK = (
    "Seconds are of the iterations alone, after a warm-up, device idle at both ends; compiling is in a column of its "
    "own and evaluating counts nowhere. Runs of an algorithm go through one vmapped program and share its time equally."
)
READING = (
    "Mean ± standard error of the final exact objective over the reported seeds; lower is better. Marked: the best "
    "mean of a problem, and those within two standard errors of the difference."
)


def page(comparison: Comparison, made: Sequence[Row], summary: dict[str, Any], directory: Path) -> str:
    """Return the whole page; pictures are read from the directory."""
    problems, algorithms, pairs = grid(made)
    name = escape(comparison.name)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name}: algorithms compared</title><style>{STYLE}</style></head><body>",
        f"<h1>{name}: {_count(algorithms, 'algorithm')} on {_count(problems, 'problem')}</h1>",
        f'<p class="soft">{summary["runs"]} runs in {budget_text(summary["budget"])} each, '
        f"{summary['diverged']} diverged. bilevel_jax {summary['versions']['bilevel_jax']}.</p>",
        "<nav>" + "".join(f'<a href="#p{i}">{escape(problem)}</a>' for i, problem in enumerate(problems)) + "</nav>",
        f'<p>{READING}</p><div class="wide"><table><tr><th>algorithm</th>',
        "".join(f"<th>{escape(problem)}</th>" for problem in problems) + "</tr>",
    ]
    for algorithm in algorithms:
        cells = "".join(_entry(pairs[problem, algorithm]) for problem in problems)
        parts.append(f"<tr><td>{escape(algorithm)}</td>{cells}</tr>")
    parts.append("</table></div>")
    reasons = not_applicable(made)
    if reasons:
        parts.append(f'<details class="soft"><summary>What does not apply, and why</summary>{_list(reasons)}</details>')
    parts.append(_conditions(summary))
    for i, problem in enumerate(problems):
        parts.append(_problem(i, problem, [row for row in made if row.problem == problem], summary, directory))
    dumped = escape(yaml.safe_dump(comparison.values, sort_keys=False))
    parts.append(
        f"<h2>Config</h2><details><summary>resolved.yaml, every default filled in</summary><pre>{dumped}</pre>"
    )
    parts.append("</details></body></html>\n")
    return "\n".join(parts)


def _problem(place: int, problem: str, own: Sequence[Row], summary: dict[str, Any], directory: Path) -> str:
    budget = summary["budgets"].get(problem, summary["budget"])
    parts = [f'<h2 id="p{place}">{escape(problem)}</h2><p class="soft">Budget of a run: {budget_text(budget)}.</p>']
    heads = (
        "objective",
        "settings",
        "iterations",
        "transitions",
        "seconds per run",
        "compile s",
        "|gradient|",
        "diverged",
        "ended by",
    )
    parts.append(
        '<div class="wide"><table><tr><th>algorithm</th>' + "".join(f"<th>{head}</th>" for head in heads) + "</tr>"
    )
    for row in sorted((row for row in own if row.reason is None), key=lambda row: (row.mean != row.mean, row.mean)):
        measured = (row.iterations, row.transitions, row.seconds, row.compile_seconds, row.gradient_norm)
        parts.append(
            f"<tr><td>{escape(row.algorithm)}</td>{_entry(row)}<td>{escape(settings_text(row)) or 'none to tune'}</td>"
            + "".join(f"<td>{number(value)}</td>" for value in measured)
            + f"<td>{row.diverged} of {len(row.runs)}</td><td>{escape(', '.join(row.ended_by))}</td></tr>"
        )
    parts.append("</table></div>")
    captions = {
        "curves": "Mean over the reported seeds at each algorithm's tuned settings, band of one standard error. Above: "
        "the exact objective. Below: its distance to the best objective that any run on this problem found.",
        "best": "The best solution found.",
    }
    for kind, file in summary["pictures"][problem].items():
        parts.append(
            f"<figure>{_image(directory / file, f'{problem}: {kind}')}<figcaption>{captions[kind]}</figcaption>"
        )
        parts.append("</figure>")
    return "\n".join(parts)


def _conditions(summary: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in summary["versions"].items())
    facts = {
        "Budget of a run": budget_text(summary["budget"]) + (", some problems their own" if summary["budgets"] else ""),
        "Seeds": f"reported {summary['seeds']}, for tuning {summary['tuning_seeds']}",
        "Tuning": summary["rule"],
        "Transitions": COUNTING.removeprefix("Transitions: "),
        "Seconds": CLOCK.removeprefix("Seconds are "),
        "Precision": summary["precision"],
        "Machine": summary["machine"],
        "Versions": versions,
        "Whole job": f"{summary['seconds']:.0f} s; what was there from an earlier start is not in it",
    }
    items = "".join(f"<dt>{key}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items())
    return f"<h3>Conditions</h3><dl>{items}</dl>"


def _entry(row: Row) -> str:
    kind = "none" if row.reason else "bad" if row.diverged else "best" if row.best else ""
    hint = f' title="{escape(row.reason)}"' if row.reason else ""
    return f'<td class="{kind}"{hint}>{entry(row)}</td>' if kind else f"<td>{entry(row)}</td>"


def _image(path: Path, text: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{data}">'


def budget_text(budget: dict[str, Any]) -> str:
    """A budget in words."""
    limits = []
    if budget["transitions"] is not None:
        limits.append(f"{budget['transitions']:,} transitions")
    if budget["seconds"] is not None:
        limits.append(f"{budget['seconds']:g} s")
    if budget["iterations"] is not None:
        limits.append(f"{budget['iterations']:,} iterations")
    return " or ".join(limits)


def _count(things: Sequence[str], word: str) -> str:
    return f"{len(things)} {word}{'s' * (len(things) != 1)}"


def _list(texts: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>"
