"""Results of `pareto.py`: a file that grows row by row, a table, and the picture."""

import json
import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]

BASE = "torch.compile"
COLUMNS = {  # of the table; those named _ratio are to BASE
    "name": "",
    "ms": "ms",
    "ms_ratio": "ratio",
    "tokens_per_s": "tokens/s",
    "peak_gb": "peak GB",
    "peak_ratio": "ratio",
    "kept_gb": "kept GB",
    "gradient_gb": "gradients GB",
    "state_gb": "states GB",
    "compile_s": "compile s",
    "error": "error",
}


def read(path: Path) -> dict[str, Any]:
    """The results: `name` and `shape` of what was trained, and `rows`."""
    return json.loads(path.read_text())


def write(results: dict[str, Any], path: Path) -> None:
    """The whole file, with ratios to the BASE of the same device."""
    rows = results["rows"]
    bases = {row["device"]: row for row in rows if row["name"] == BASE and "ms" in row}
    for row in rows:
        base = bases.get(row["device"])
        for value, ratio in (("ms", "ms_ratio"), ("peak_gb", "peak_ratio")):
            if base is not None and row.get(value) is not None and base[value] is not None:
                row[ratio] = row[value] / base[value]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """One table for each device, in the order of the rows."""
    parts = []
    for device, rows in by_device(results).items():
        lines = [[row.get(column) for column in COLUMNS] for row in rows]
        headers = list(COLUMNS.values())
        text = tabulate(lines, headers=headers, floatfmt=".4g", intfmt=",", tablefmt="github")
        parts.append(f"{results['name']}, {device}\n\n{text}")
    return "\n\n".join(parts)


def by_device(results: dict[str, Any]) -> dict[str, list[Row]]:
    """Rows that may be compared."""
    groups: dict[str, list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault(row["device"], []).append(row)
    return groups


def frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other beats in both, from the left; smaller is better."""
    best, kept = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            kept.append((x, y))
    return kept


def is_ours(row: Row) -> bool:
    """Whether this package made it."""
    return row["name"].startswith("compact")


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """A picture for each device."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for device, rows in by_device(results).items():
        rows = [row for row in rows if "ms_ratio" in row and "peak_ratio" in row]
        if rows:
            number = f"_{len(paths)}" if paths else ""
            paths.append(folder / f"pareto_{results['name']}{number}.png")
            picture(title_of(results, device), rows).savefig(paths[-1])
    return paths


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs of one shape, each row relative to the BASE of its own run; the first of each name."""
    first = runs[0]
    if any((run["name"], run["shape"]) != (first["name"], first["shape"]) for run in runs):
        raise SystemExit("these are results of different shapes")
    rows = {(row["device"], row["name"]): row for run in runs[::-1] for row in run["rows"]}
    return {**first, "rows": [*rows.values()]}


def title_of(results: dict[str, Any], device: str) -> str:
    """What was trained, on what."""
    shape = results["shape"]
    model = f"{shape['layers']} layers, {shape['hidden']} wide, MLP {shape['mlp']}"
    batch = f"{shape['batch']} x {shape['seq']} tokens, bf16"
    return f"{results['name']}: {model}; {batch}; {device}"


def picture(title: str, rows: list[Row]) -> Any:
    """Time against peak memory, both relative to BASE, everyone's names, and our frontier."""
    from matplotlib.figure import Figure  # not there on every GPU machine

    figure = Figure(figsize=(10.5, 6), dpi=130, layout="constrained")
    axes = figure.subplots()
    ours = [(row["peak_ratio"], row["ms_ratio"]) for row in rows if is_ours(row)]
    others = [(row["peak_ratio"], row["ms_ratio"]) for row in rows if not is_ours(row)]
    groups = (("compact_fx", ours, "C3", "o"), ("others", others, "C0", "s"))
    for label, points, color, marker in groups:
        axes.scatter(*coordinates(points), color=color, marker=marker, s=30, label=label, zorder=3)
    line = frontier(ours)
    axes.plot(*coordinates(line), color="C3", alpha=0.6)
    for draw_line in (axes.axhline, axes.axvline):
        draw_line(1.0, color="gray", linewidth=0.8, linestyle=":")
    axes.set(xlabel="peak memory / torch.compile", ylabel="step time / torch.compile", title=title)
    axes.margins(0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    write_names(axes, rows, line)
    return figure


def coordinates(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """What matplotlib wants of points."""
    return [x for x, _ in points], [y for _, y in points]


def write_names(axes: Any, rows: list[Row], line: list[tuple[float, float]]) -> None:
    """Each point's name, as near to it as there is room, with a thin line where that is far."""
    from matplotlib.transforms import Bbox

    def around(x: float, y: float, half_width: float, half_height: float) -> Any:
        return Bbox.from_extents(x - half_width, y - half_height, x + half_width, y + half_height)

    axes.figure.canvas.draw()  # the layout is known only then
    axes.autoscale(False)
    to_pixels, point = axes.transData.transform, axes.figure.dpi / 72
    room = axes.get_window_extent()
    taken = [axes.get_legend().get_window_extent()]
    for row in rows:
        taken.append(around(*to_pixels((row["peak_ratio"], row["ms_ratio"])), 5 * point, 5 * point))
    for (x0, y0), (x1, y1) in pairwise(map(to_pixels, line)):
        parts = [part / 50 for part in range(51)]
        taken += [around(x0 + (x1 - x0) * p, y0 + (y1 - y0) * p, 1, 1) for p in parts]
    for row in sorted(rows, key=lambda row: row["ms_ratio"]):
        at = (row["peak_ratio"], row["ms_ratio"])
        style = {"fontsize": 8, "color": "C3" if is_ours(row) else "black", "zorder": 4}
        text = axes.annotate(
            row["name"], at, (0, 0), textcoords="offset pixels", ha="center", va="center", **style
        )
        half_width, half_height = (side / 2 for side in text.get_window_extent().size)
        middle_x, middle_y = to_pixels(at)
        for far, shift_x, shift_y in shifts(half_width, half_height, 4 * point):
            end = (middle_x + shift_x, middle_y + shift_y)
            box = around(*end, half_width, half_height)
            is_inside = room.contains(*box.min) and room.contains(*box.max)
            if is_inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                text.set_position((shift_x, shift_y))
                if far > 12 * point:
                    x, y = axes.transData.inverted().transform(end)
                    axes.plot((at[0], x), (at[1], y), color=style["color"], lw=0.4, zorder=1)
                    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.5})
                break


def shifts(
    half_width: float, half_height: float, step: float
) -> Iterator[tuple[float, float, float]]:
    """Distance to a point, and where the middle of a box of this size goes: nearest first."""
    for distance in (step * number for number in range(1, 60)):
        for angle in (math.pi / 8 * turn for turn in range(16)):
            shift_x = math.cos(angle) * (distance + half_width)
            yield distance, shift_x, math.sin(angle) * (distance + half_height)
