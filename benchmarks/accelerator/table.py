"""The parts as Markdown."""

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "bandwidth": ("sweep_GB_per_s", "copy_GB_per_s", "sweep_of_copy", "bytes_per_sweep"),
    "batches": ("per_s", "singles_per_s", "batch_times_faster", "relative_error", "converged"),
    "four_rooms": ("iterations_per_s", "iterations_per_s_of_all_runs", "batch_times_faster", "cold_ms", "warm_ms"),
    "crossover": ("accelerator_ms", "cpu_ms", "cpu_over_accelerator"),
    "certificates": ("cases", "faults"),
}


def table(parts: Mapping[str, Any]) -> str:
    """A table per part; of the certificates one row."""
    return "\n\n".join(_part(name, part) for name, part in parts.items())


def _part(name: str, part: Mapping[str, Any]) -> str:
    columns, cells = COLUMNS[name], dict(part["cells"])
    if name == "certificates":
        whole = {column: sum(cell.get(column, 0) for cell in cells.values()) for column in columns}
        examples = [example for cell in cells.values() for example in cell.get("examples", ())]
        failed = {key: cell for key, cell in cells.items() if "failed" in cell}
        cells = {f"{len(cells)} structures": whole, **failed, **{example: {} for example in examples}}
    lines = [f"{name} ({part['machine']['device']}, {part['seconds']:.0f} s)", ""]
    lines += [_row("case", *(column.replace("_", " ") for column in columns)), "|---" * (1 + len(columns)) + "|"]
    for key, cell in cells.items():
        if "failed" in cell:
            lines.append(_row(key, f"failed: {cell['failed']}", *[""] * (len(columns) - 1)))
        else:
            lines.append(_row(key, *(_shown(cell.get(column)) for column in columns)))
    for key, crossing in part.get("crossings", {}).items():
        about = "" if crossing["about"] is None else f", about {crossing['about']:.3g}"
        lines.append(f"\n{key}: faster from {crossing['faster_from'] or 'no size measured'}{about}")
    if part["left_out"]:
        lines.append(f"\nleft out, the time was up: {'; '.join(part['left_out'])}")
    return "\n".join(lines)


def _row(*entries: str) -> str:
    return f"| {' | '.join(entries)} |"


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
