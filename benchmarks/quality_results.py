"""Results of `quality.py`: what a run is, and tables and figures of many."""

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

Run = dict[str, Any]

DEFAULTS: Run = {
    "model": "25m",
    "method": "adamw",
    "rank": None,
    "lr": 1e-3,
    "rest_lr": 1.0,  # multiplies lr of embeddings, head and norms
    "seed": 0,  # of the weights, the order of the text and projections
    "steps": 1000,
    "betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "clip": 1.0,  # norm of all gradients; 0: they stay as they are
    "warm_up": 0.1,  # of the steps; a cosine follows
    "floor": 0.1,  # of the learning rate, at the end
    "inner": "inductor",
}


def key_of(settings: Run, *without: str) -> str:
    """Runs of one key are the same run."""
    kept = {k: v for k, v in settings.items() if k not in without}
    return json.dumps(kept, sort_keys=True)


def read(path: Path) -> list[Run]:
    """The results, one of each line."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def label(settings: Run) -> str:
    """A method with its rank and what is not as usual, for people; neither lr nor seed."""
    rank = settings["rank"]
    parts = [settings["method"]]
    if isinstance(rank, float):
        parts.append(f"n/{1 / rank:g}" if rank < 1 else "n")
    elif rank is not None:
        parts.append(f"rank {rank}")
    own = settings.keys() - {"model", "method", "rank", "lr", "seed", "steps", "inner"}
    shown = [k for k in sorted(own) if settings[k] != DEFAULTS.get(k)]
    parts += [
        str(settings[k]) if isinstance(settings[k], str) else f"{k} {settings[k]}" for k in shown
    ]
    return " ".join(parts)


def kind_of(settings: Run) -> str:
    """What a curve is of: method, rank and projection."""
    return key_of({name: settings.get(name) for name in ("method", "rank", "projection")})


def groups_of(rows: list[Run]) -> dict[tuple[str, int, str], dict[str, list[Run]]]:
    """Rows of one model, length and text; in each, those that differ in nothing but the seed."""
    groups: dict[tuple[str, int, str], dict[str, list[Run]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for row in rows:
        settings = row["settings"]
        group = (settings["model"], settings["steps"], row["data"])
        groups[group][key_of(settings, "seed")].append(row)
    return groups


def mean_of(rows: list[Run], name: str = "loss") -> float:
    """Over seeds; infinite where one diverged."""
    return statistics.fmean(math.inf if row.get(name) is None else row[name] for row in rows)


def table(rows: list[Run]) -> str:
    """Mean and deviation over seeds, and the difference to the best full-rank AdamW."""
    lines = []
    for (model, steps, _), runs in groups_of(rows).items():
        full = [r for r in runs.values() if r[0]["settings"]["method"] == "adamw"]
        best = min(full, key=mean_of, default=None)
        for same in sorted(
            runs.values(), key=lambda same: (label(same[0]["settings"]), mean_of(same))
        ):
            settings = same[0]["settings"]
            losses = [row["loss"] for row in same]
            spread = statistics.stdev(losses) if len(losses) > 1 and None not in losses else None
            line = [model, steps, label(settings), settings["lr"], len(same), mean_of(same), spread]
            line.append(mean_of(same, "perplexity"))
            for name in ("loss", "perplexity"):
                line.append(
                    best and f"{100 * (mean_of(same, name) / mean_of(best, name) - 1):+.2f}"
                )
            lines.append([*line, *(same[0].get(k) for k in ("step_ms", "peak_gb"))])
    headers = ["model", "steps", "run", "lr", "seeds", "loss", "±", "perplexity", "loss %"]
    headers += ["perplexity %", "ms", "GB"]
    digits = ("", "", "", "g", "", ".4f", ".4f", ".3f", "", "", ".1f", ".2f")
    return tabulate(lines, headers=headers, floatfmt=digits, tablefmt="github")


def plot(rows: list[Run], folder: Path, others: list[Run]) -> None:
    """Validation loss against steps and seconds: each method, rank and projection at its best.

    Times are those of any run of the kind that had its GPU to itself, here or in `others`.
    """
    from matplotlib.figure import Figure  # not there on every GPU machine

    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in (*rows, *others) if row.get("step_ms") is not None]
    step_ms = {
        (row["settings"]["model"], kind_of(row["settings"])): row["step_ms"] for row in timed
    }
    largest: dict[tuple[str, int], dict[str, list[Run]]] = {}  # of several texts
    for (model, steps, _), runs in groups_of(rows).items():
        if len(runs) > len(largest.get((model, steps), ())):
            largest[model, steps] = runs
    for (model, steps), runs in largest.items():
        best: dict[str, list[Run]] = {}
        for same in sorted(runs.values(), key=mean_of):
            best.setdefault(kind_of(same[0]["settings"]), same)
        if len(best) < 2:
            continue
        is_timed = any((model, kind) in step_ms for kind in best)
        figure = Figure(figsize=(10, 5 + 0.2 * len(best)), layout="constrained")
        axes = figure.subplots(1, 1 + is_timed, sharey=True, squeeze=False)[0]
        for number, (kind, same) in enumerate(best.items()):
            if math.isinf(mean_of(same)):
                continue
            at = [step for step, _ in same[0]["validation"]]
            curves = zip(*(row["validation"] for row in same), strict=True)
            losses = [statistics.fmean(loss for _, loss in points) for points in curves]
            style = {"color": f"C{number % 10}", "marker": "o", "markersize": 4}
            style["linestyle"] = ("-", "--", ":")[number // 10 % 3]
            settings = same[0]["settings"]
            name = f"{losses[-1]:.3f} {label(settings)}, lr {settings['lr']:g}"
            axes[0].plot(at, losses, **style, label=name)
            if (ms := step_ms.get((model, kind))) is not None:
                axes[1].plot([step * ms / 1e3 for step in at], losses, **style)
        names = ("optimizer steps", "seconds of training")
        for part, name in zip(axes, names, strict=False):
            part.set(xlabel=name)
            part.grid(alpha=0.3)
        axes[0].set(ylabel="validation loss, nats per token")
        figure.legend(loc="outside lower center", title="loss at the end", fontsize="small")
        figure.suptitle(f"LLaMA {model}, {steps} steps")
        figure.savefig(folder / f"quality_{model}_{steps}.png", dpi=150)


def best_by_rank(rows: list[Run]) -> dict[int, dict[float | None, list[Run]]]:
    """By steps and rank, None for AdamW: the runs at their best rates, on the longest's text.

    Of sketched runs only those that change nothing but rank and rates.
    """
    longest = max(rows, key=lambda row: row["settings"]["steps"])
    best: dict[int, dict[float | None, list[Run]]] = defaultdict(dict)
    plain = {**DEFAULTS, "gradients": "sketched", "projection": "tracked"}
    for (model, steps, text), runs in groups_of(rows).items():
        if (model, text) != (longest["settings"]["model"], longest["data"]):
            continue
        for same in sorted(runs.values(), key=mean_of):
            settings = same[0]["settings"]
            rank = settings["rank"]
            free = {"model", "method", "rank", "lr", "rest_lr", "betas", "seed", "steps"}
            is_plain = all(settings[k] == plain.get(k) for k in settings.keys() - free)
            is_sketched = settings["method"] == "compact" and isinstance(rank, float) and rank < 1
            if is_plain and (is_sketched or settings["method"] == "adamw"):
                best[steps].setdefault(rank, same)
    return best


def plot_ranks(rows: list[Run], folder: Path) -> None:
    """Validation loss against steps, AdamW's and each rank's; a panel for each number of steps."""
    from matplotlib.figure import Figure

    best = best_by_rank(rows)
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, (steps, runs) in zip(
        figure.subplots(1, len(best), squeeze=False)[0], sorted(best.items()), strict=True
    ):
        for rank in sorted(runs, key=lambda rank: -math.inf if rank is None else -rank):
            same = runs[rank]
            at = [step for step, _ in same[0]["validation"]]
            curves = zip(*(row["validation"] for row in same), strict=True)
            losses = [statistics.fmean(loss for _, loss in points) for points in curves]
            color, name = "k", "AdamW"
            if rank is not None:
                color, name = f"C{round(-math.log2(rank)) - 1}", f"rank 1/{1 / rank:g}"
            percent = 100 * (losses[-1] / mean_of(runs[None]) - 1)
            name += f"  {losses[-1]:.3f}" + (f"  ({percent:+.1f} %)" if rank else "")
            axes.plot(at, losses, color=color, marker="o", markersize=4, label=name)
        axes.set(title=f"{steps} steps", xlabel="optimizer steps", xlim=(0, None))
        axes.set(ylabel="validation loss, nats per token")
        axes.grid(alpha=0.3)
        axes.legend(title="at the end")
    model = rows[0]["settings"]["model"].upper()
    figure.suptitle(f"LLaMA {model}, AdamW and projections that follow the gradient")
    figure.savefig(folder / f"quality_{model.lower()}_ranks.png", dpi=120)
