"""The table (markdown) and the picture of benchmarks/results/solvers_against_peers.csv, beside it."""

import csv
from collections import defaultdict
from pathlib import Path
from typing import Any

PACKAGES = ("mdpsolver", "quantecon", "pymdptoolbox", "jaxdp", "scipy")
PLAIN = "ours plain vi successor"
HEAD = """# Solvers against peers

Made by `python -m benchmarks.solvers.solvers_against_peers --table` from `solvers_against_peers.csv`; what is compared
stands in that script. Each entry is the best of a package's methods and settings in that cell, in milliseconds
(medians, compile time apart). `ratio` is the fastest peer's time over ours, above 1 where we are faster, though peers
stop at the loosest tolerance that gives the accuracy and ours prove theirs; `tried` is the ratio where ours stop as
peers do; `auto` is `ratio` with our `Auto` alone; `plain` is the time of our value iteration with a sup-norm stop
over our best.
"""


def write_table(path: Path) -> None:
    """Write PATH.md and PATH.png for PATH.csv; the picture only where matplotlib is installed."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        cell = (float(row["temperature"]), row["problem"], int(row["states"]), float(row["discount"]))
        groups[cell].append(row)
    lines = [HEAD]
    ratios: dict[tuple, list[tuple[int, float]]] = defaultdict(list)
    for temperature in sorted({cell[0] for cell in groups}):
        title = "Unregularized" if temperature == 0 else f"Shannon entropy, temperature {temperature:g}"
        lines += [
            f"## {title}",
            "",
            _line("problem", "S", "discount", *PACKAGES, "ours", "ratio", "tried", "auto", "plain"),
        ]
        lines.append("|" + "---|" * (len(PACKAGES) + 8))
        for cell in sorted(cell for cell in groups if cell[0] == temperature):
            ratio, line = _summary(cell, groups[cell])
            lines.append(line)
            if ratio is not None:
                ratios[temperature, cell[1], cell[3]].append((cell[2], ratio))
        lines.append("")
    path.with_suffix(".md").write_text("\n".join(lines))
    _draw(ratios, path.with_suffix(".png"))


def _summary(cell: tuple, rows: list[dict[str, Any]]) -> tuple[float | None, str]:
    by_package = {name: [row for row in rows if row["method"].split()[0] == name] for name in (*PACKAGES, "ours")}
    passed = {name: [row for row in of if row["status"] == "ok"] for name, of in by_package.items()}
    best = {name: min(of, key=_seconds) for name, of in passed.items() if of}
    mine = _seconds(best["ours"]) if "ours" in best else None
    autos = [row for row in passed["ours"] if " auto " in row["method"]]
    plain = [row for row in passed["ours"] if row["method"] == PLAIN]
    peer = min((_seconds(best[name]) for name in PACKAGES if name in best), default=None)
    ratio = peer / mine if peer is not None and mine is not None else None
    entries = [_entry(name, best.get(name), by_package[name]) for name in (*PACKAGES, "ours")]
    entries.append("" if ratio is None else f"{ratio:.2g}")
    tried = [float(row["tried_seconds"]) for row in passed["ours"] if row["tried_seconds"]]
    entries.append(f"{peer / min(tried):.2g}" if peer is not None and tried else "")
    entries.append(f"{peer / min(map(_seconds, autos)):.2g}" if peer is not None and autos else "")
    entries.append(f"{_seconds(plain[0]) / mine:.2g}" if plain and mine is not None else "")
    return ratio, _line(cell[1], f"{cell[2]:,}", f"{cell[3]:g}", *entries)


def _entry(package: str, best: dict[str, Any] | None, rows: list[dict[str, Any]]) -> str:
    if best is not None:
        return f"{_seconds(best) * 1e3:.3g} ({best['method'].removeprefix(package).strip()})"
    limits = [row["status"].split(":")[0] for row in rows if row["status"].startswith(">")]
    return limits[0] if limits else "-" if not rows else rows[0]["status"].split(":")[0]


def _seconds(row: dict[str, Any]) -> float:
    return float(row["seconds"])


def _line(*entries: str) -> str:
    return "| " + " | ".join(entries) + " |"


def _draw(ratios: dict[tuple, list[tuple[int, float]]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        return
    if not ratios:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    temperatures = sorted({key[0] for key in ratios})
    figure, axes = plt.subplots(1, len(temperatures), figsize=(5.5 * len(temperatures), 4), squeeze=False, sharey=True)
    colours = dict(zip(sorted({key[1] for key in ratios}), ("C0", "C1", "C2"), strict=False))
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        for (own, problem, discount), points in sorted(ratios.items()):
            if own == temperature:
                style = {0.9: ":", 0.99: "--"}.get(discount, "-")
                label = f"{problem}, {discount:g}"
                axis.loglog(*zip(*sorted(points), strict=True), style, marker=".", color=colours[problem], label=label)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_title("unregularized" if temperature == 0 else f"Shannon, temperature {temperature:g}")
        axis.set_xlabel("states")
    axes[0, 0].set_ylabel("fastest peer's time / ours")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
