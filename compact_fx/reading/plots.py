"""Pictures of memory; needs matplotlib (extra `plots`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compact_fx.passes.live_bytes import Moment
from compact_fx.plan import SAVED_KINDS, Plan, bytes_of_kind
from compact_fx.reading.memory import Breakdown, size_unit

COLORS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'compact_fx[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    _matplotlib().close(figure)
    return path


def _bars(
    rows: Mapping[str, Mapping[str, float]],
    title: str,
    path: str | Path,
    gpu_memory: float | None = None,
) -> Path:
    """One stacked bar for each row, its sum behind it; a line for a GPU; everything in bytes."""
    size = (8, 1.6 + 0.5 * len(rows))
    figure, axes = _matplotlib().subplots(figsize=size, layout="constrained")
    parts = list(dict.fromkeys(part for row in rows.values() for part in row if row[part] > 0))
    most = max(*(sum(row.values()) for row in rows.values()), gpu_memory or 0, 1)
    unit, name = size_unit(most)
    left = dict.fromkeys(rows, 0.0)
    for part, color in zip(parts, COLORS, strict=False):
        widths = [row.get(part, 0) / unit for row in rows.values()]
        axes.barh(list(rows), widths, left=list(left.values()), label=part, color=color)
        for row, width in zip(rows, widths, strict=True):
            share = width * unit / most
            if share > 0.015:
                small = {"rotation": 90, "fontsize": 7} if share < 0.07 else {}
                at = (left[row] + width / 2, row)
                axes.text(*at, f"{width:.2g}", ha="center", va="center", color="w", **small)
            left[row] += width
    for row, end in left.items():
        axes.text(end + 0.01 * most / unit, row, f"{end:.3g}", va="center", weight="bold")
    if gpu_memory is not None:
        label = f"GPU, {gpu_memory / unit:.3g} {name}"
        axes.axvline(gpu_memory / unit, color="k", linestyle="--", linewidth=1, label=label)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.12 * most / unit)
    axes.set_xlabel(name)
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    columns = len(parts) + (gpu_memory is not None)
    figure.legend(ncols=columns, frameon=False, loc="outside lower center", fontsize=9)
    return _save(figure, path)


def energies(runs: Mapping[str, Sequence[tuple[int, float]]], path: str | Path) -> Path:
    """A row for each tracked projection, dark where it holds little of its weights' gradient.

    Args:
        runs: first weight of each → steps, and the share of energy that was held until then.

    Raises:
        ValueError: there are none.
    """
    runs = {name: run for name, run in runs.items() if run}
    if not runs:
        raise ValueError("no tracked projection has changed yet: train for some steps first")
    figure, axes = _matplotlib().subplots(figsize=(8, 1.6 + 0.18 * len(runs)), layout="constrained")
    for row, run in enumerate(runs.values()):
        ends = [steps for steps, _ in run]
        edges = [0, *ends]
        mesh = axes.pcolormesh(
            edges, [row - 0.45, row + 0.45], [[held for _, held in run]], vmin=0, vmax=1
        )
    axes.set_yticks(range(len(runs)), list(runs), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer steps")
    axes.set_title("share of the gradient's energy that P holds", loc="left")
    axes.spines[:].set_visible(False)
    figure.colorbar(mesh, ax=axes)
    return _save(figure, path)


def crossing(plans: Sequence[Plan], path: str | Path) -> Path:
    """What all graphs keep for backward, before and after, per kind of tensor."""
    rows = {
        "torch.compile": [saved for plan in plans for saved in plan.account.saved_before],
        "compact": [saved for plan in plans for saved in plan.account.saved_after],
    }
    kinds = [k for k in SAVED_KINDS if any(bytes_of_kind(saved, k) for saved in rows.values())]
    parts = {
        row: {str(kind): bytes_of_kind(saved, kind) for kind in kinds}
        for row, saved in rows.items()
    }
    return _bars(parts, "kept for the backward pass", path)


def breakdown(
    memory: Mapping[str, Breakdown],
    path: str | Path,
    *,
    title: str = "one training step",
    gpu_memory: float | None = None,
) -> Path:
    """What is alive at the peak of each variant; saved activations are gone when gradients are all.

    Args:
        title: what was trained.
        gpu_memory: bytes of a GPU, drawn as a line.
    """
    rows = {
        variant: {
            "weights": row.weights,
            "optimizer states": row.optimizer,
            "saved activations": row.saved if row.saved >= row.gradients else 0,
            "gradients": row.gradients if row.gradients > row.saved else 0,
            "other at peak": row.other,
        }
        for variant, row in memory.items()
    }
    return _bars(rows, f"{title}: at the peak", path, gpu_memory)


def timeline(moments: Mapping[str, Sequence[Moment]], path: str | Path, *, title: str = "") -> Path:
    """Live memory over one step: one line for each run, forward and backward side by side.

    Args:
        moments: by the name of a run, such as `explanation.memory[...].timeline`, or what
            `from_snapshot` reads from CUDA's memory history.
        path: of the picture.
        title: what was trained.
    """
    figure, axes = _matplotlib().subplots(figsize=(9, 4.4), layout="constrained")
    unit, name_of_unit = size_unit(max(moment.bytes for run in moments.values() for moment in run))
    for (name, run), color in zip(moments.items(), COLORS, strict=False):
        x = list(_positions(run))
        y = [moment.bytes / unit for moment in run]
        peak = max(range(len(y)), key=y.__getitem__)
        axes.plot(
            x, y, label=f"{name}: peak {y[peak]:.3g} {name_of_unit}", color=color, linewidth=1.4
        )
        axes.plot(x[peak], y[peak], "o", color=color, markersize=4)
    axes.axvline(1, color="0.7", linewidth=0.8)
    axes.set_xlim(0, 2.02)
    axes.set_ylim(bottom=0)
    axes.set_xticks([0.5, 1.5], ["forward", "backward"])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel(f"{name_of_unit} alive")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)
    return _save(figure, path)


def _positions(run: Sequence[Moment]) -> Sequence[float]:
    """Forward on 0 to 1, what follows on 1 to 2: runs of different lengths lie side by side."""
    forward = sum(moment.phase == "forward" for moment in run)
    rest = max(len(run) - forward, 1)
    before = [i / max(forward, 1) for i in range(forward)]
    return before + [1 + i / rest for i in range(len(run) - forward)]


def from_snapshot(snapshot: Mapping[str, Any], *, device: int = 0) -> list[Moment]:
    """Live bytes over time from `torch.cuda.memory._snapshot()`, its peak between the phases.

    Record with `torch.cuda.memory._record_memory_history()` around one step.

    Raises:
        ValueError: the snapshot has no history of this device.
    """
    traces = snapshot.get("device_traces", [])
    signs = {"alloc": 1, "free_completed": -1}
    sizes, now = [], 0
    for event in traces[device] if device < len(traces) else ():
        if event["action"] in signs:
            now += signs[event["action"]] * event["size"]
            sizes.append(now)
    if not sizes:
        raise ValueError(
            f"the snapshot has no memory history of device {device}: call "
            "torch.cuda.memory._record_memory_history() before the step"
        )
    below = min(0, *sizes)  # what was there before the history began is freed in it
    peak = max(range(len(sizes)), key=sizes.__getitem__)
    return [
        Moment("forward" if i < peak else "backward", "", size - below)
        for i, size in enumerate(sizes)
    ]
