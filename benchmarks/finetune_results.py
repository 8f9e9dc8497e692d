"""Results of `finetune.py`: what a run is, which learning rate is best, and a table."""

import math
import statistics
from collections import defaultdict
from typing import Any

from quality_results import key_of
from tabulate import tabulate

Run = dict[str, Any]

DEFAULTS: Run = {
    "task": "reuters-r8",
    "method": "full",
    "rank": None,  # of tracked projections; LoRA gets the memory that those of this rank take
    "lr": 2e-4,  # "best": that of the best run with seed 0 that differs in nothing else
    "rest_lr": 1.0,  # multiplies lr of the new head, norms and biases
    "embeddings": False,  # whether they are trained: no method makes them smaller
    "seed": 0,  # of a new head or adapters, the order of the text, dropout and projections
    "inner": "inductor",
}
TASKS: dict[str, Run] = {  # settings of each
    "reuters-r8": {"steps": 342},  # one epoch
    "20newsgroups": {"steps": 705},  # one epoch
    "lm": {"steps": 300, "model": "25m", "pretrain": 2000},  # a shape of quality.py, and steps
}
METHODS = {"full": "AdamW", "compact": "tracked", "lora": "LoRA, memory of tracked"}
MEMORY = ("gradients", "optimizer", "projections", "adapters")  # bytes of a row, by what has them


def label(settings: Run) -> str:
    """A method with its rank and what is not as usual, for people; neither lr nor seed."""
    rank = settings["rank"]
    parts = [METHODS[settings["method"]]]
    if isinstance(rank, float):
        parts.append(f"n/{1 / rank:g}")
    elif rank is not None:
        parts.append(f"rank {rank}")
    usual = {**DEFAULTS, **TASKS[settings["task"]]}
    told = {"task", "method", "rank", "lr", "seed", "steps", "inner"}
    shown = [k for k in sorted(settings.keys() - told) if settings[k] != usual.get(k)]
    return ", ".join([" ".join(parts), *(f"{k} {settings[k]}" for k in shown)])


def badness(row: Run) -> float:
    """Of two runs the one with less is better; infinite where one diverged."""
    metric: float | None = row["metric"]
    if metric is None:
        return math.inf
    return metric if row["settings"]["task"] == "lm" else -metric


def best_rate(settings: Run, rows: list[Run]) -> float:
    """The learning rate of the best run with seed 0 that differs in nothing else."""
    key = key_of({**settings, "seed": 0}, "lr")
    same = [row for row in rows if key_of(row["settings"], "lr") == key]
    if not same:
        raise ValueError("no run with seed 0 says which rate is best")
    rate: float = min(same, key=badness)["settings"]["lr"]
    return rate


def mean_and_deviation(values: list[float | None], digits: int) -> str:
    """Over seeds; a dash where one has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{digits}f}{deviation}"


def line_of(rows: list[Run], rates: list[float]) -> Run:
    """Runs that differ in nothing but the seed, as a line of the table."""
    settings, bytes_of = rows[0]["settings"], rows[0]["bytes"]
    is_loss, rank = settings["task"] == "lm", rows[0].get("lora_rank")
    peaks = [row["peak_gb"] for row in rows]
    times = [row["step_ms"] for row in rows if "step_ms" in row]  # not where runs shared a GPU
    return {
        "task": settings["task"],
        "steps": settings["steps"],
        "run": label(settings) + (f" (rank {rank})" if rank else ""),
        "lr": f"{settings['lr']:g}",
        "tried": " ".join(f"{rate:g}" for rate in sorted(rates)),
        "seeds": len(rows),
        "nats per byte" if is_loss else "accuracy %": mean_and_deviation(
            [row["metric"] for row in rows], 4 if is_loss else 2
        ),
        "training loss": mean_and_deviation([row["training_loss"] for row in rows], 3),
        "ms": f"{statistics.median(times):.1f}" if times else "",
        "peak GB": "-" if None in peaks else f"{max(peaks):.3f}",
        **{f"{name} MB": f"{bytes_of[name] / 1e6:.2f}" for name in MEMORY},
        "together MB": f"{sum(bytes_of.values()) / 1e6:.2f}",
    }


def table(rows: list[Run]) -> str:
    """One part for each task, length and text: each method at its best rate, over seeds."""
    groups: dict[tuple[Any, ...], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        settings = row["settings"]
        group = (settings["task"], settings["steps"], settings["inner"], row["data"])
        groups[group][key_of(settings, "lr", "seed")].append(row)
    parts = []
    for methods in groups.values():
        lines = []
        for same in methods.values():
            rate = best_rate(same[0]["settings"], same)
            best = [row for row in same if row["settings"]["lr"] == rate]
            lines.append(line_of(best, list({row["settings"]["lr"] for row in same})))
        parts.append(tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True))
    return "\n\n".join(parts)
