"""Tokens a second, traffic and memory of LLaMA blocks on 1, 2, 4, 8 GPUs, and how much is hidden.

python benchmarks/scaling.py --gpus 1 2 4 8 --shape 1b 8b --out benchmarks/results/scaling.json
python benchmarks/scaling.py --gpus 2 --shape tiny --parallel ddp --device cpu --steps 2

It starts a process for each GPU by itself. What the results have already is not measured again.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pareto_competitors import SHAPES as BLOCKS
from provenance import provenance
from scaling_worker import PARALLEL
from step import VARIANTS
from tabulate import tabulate
from training import build, inputs_of, loss_of

from compact_fx import explain
from compact_fx.reading.explanation import COMPILED, DENSE, SKETCHED, Explanation

TINY = {"layers": 2, "hidden": 256, "mlp": 512, "heads": 4, "vocabulary": 0, "batch": 2, "seq": 256}
SHAPES = {
    "tiny": TINY,
    **{name: BLOCKS[name] for name in ("1b", "8b")},
    "8b-8k": {**BLOCKS["8b"], "batch": 4},
}
"""Blocks; the batch is that of each process: 16384 tokens of 1b, 4096 or 8192 of 8b."""
NAMES = ("torch.compile", "compact n/4, tracked")
COLUMNS = {
    "parallel": "",
    "shape": "shape",
    "step": "step",
    "gpus": "GPUs",
    "ms": "ms",
    "host_ms": "host ms",
    "ms_ratio": "/ compile",
    "tokens_per_second": "tokens/s",
    "efficiency": "efficiency",
    "share_hidden": "hidden",
    "sent_mb": "MB sent",
    "sent_of_predicted": "/ predicted",
    "peak_gb": "peak GB",
    "peak_ratio": "/ compile",
}


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What is measured once."""
    return row["parallel"], row["shape"], row["step"], row["gpus"], row["hardware"]


@cache
def explained(shape: str, step: str) -> tuple[Explanation, int]:
    """What `explain` says, and bytes of the target; nothing is run."""
    model, inputs = build(SHAPES[shape], "meta"), inputs_of(SHAPES[shape], "meta")
    model.embed_tokens.requires_grad_(False)
    target = torch.zeros_like(inputs["inputs_embeds"], device="cpu")
    settings = VARIANTS[step].settings
    found = explain(
        model,
        loss=partial(loss_of, target=target),
        **inputs,
        **settings,
    )
    return found, target.nbytes


def predicted(shape: str, parallel: str, step: str, gpus: int) -> dict[str, float]:
    """Of a rank."""
    found, target_bytes = explained(shape, step)
    is_sketched = VARIANTS[step].settings.get("gradients") == "sketched"
    way = SKETCHED if is_sketched else DENSE
    ranks = found.ranks(gpus, parallel.split()[0])
    rank = ranks.each[way if VARIANTS[step].backend == "compact" else COMPILED]
    return {
        "predicted_mb": rank.sent / 1e6,
        "predicted_peak_gb": (rank.peak + target_bytes) / 1e9,
    }


def measure(row: dict[str, Any], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start as many processes; what the first one has measured, or the error of one of them."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        task = {
            **{name: row[name] for name in ("parallel", "step", "gpus")},
            "shape": SHAPES[row["shape"]],
            "device": args.device,
            "steps": args.steps,
            "warmup": args.warmup,
            "folder": own,
            "cache": str(folder / "inductor"),
        }
        command = [sys.executable, str(Path(__file__).with_name("scaling_worker.py"))]
        errors = [Path(own) / f"{rank}.txt" for rank in range(row["gpus"])]
        processes = [
            subprocess.Popen([*command, str(rank), json.dumps(task)], stderr=path.open("w"))
            for rank, path in enumerate(errors)
        ]
        try:
            found = predicted(row["shape"], row["parallel"], row["step"], row["gpus"])
            ended = wait_for(processes, args.timeout)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        result = Path(own) / "result.json"
        if result.exists():
            return {**row, **provenance(), **json.loads(result.read_text()), **found}
        lines = (line for path in errors for line in path.read_text().splitlines())
        raised = (re.match(r"(?:\[rank\d+\]: )?([\w.]*Error: .*)", line) for line in lines)
        return {**row, "error": next((found[1] for found in raised if found), ended)}


def wait_for(processes: list["subprocess.Popen[bytes]"], timeout: float) -> str:
    """Until all have ended, or one has failed, and the others would wait for it; says which."""
    end = time.monotonic() + timeout
    while any(process.poll() is None for process in processes):
        failed = [process.returncode for process in processes if process.returncode]
        if failed:
            return f"a process ended with {failed[0]}"
        if time.monotonic() > end:
            return f"no result in {timeout:g} s"
        time.sleep(0.1)
    return "no result"


def with_ratios(rows: list[dict[str, Any]]) -> None:
    """To torch.compile, to one GPU, to what was predicted."""
    by_key = {key_of(row): row for row in rows if "ms" in row}
    for row in by_key.values():
        compiled = by_key.get(key_of({**row, "step": "torch.compile"}))
        alone = by_key.get(key_of({**row, "gpus": 1}))
        if compiled is not None:
            row["ms_ratio"] = row["ms"] / compiled["ms"]
            if row["peak_gb"]:
                row["peak_ratio"] = row["peak_gb"] / compiled["peak_gb"]
        if alone is not None:
            of_each = row["tokens_per_second"] / row["gpus"]
            row["efficiency"] = of_each / alone["tokens_per_second"]
        if row["predicted_mb"]:
            row["sent_of_predicted"] = row["sent_mb"] / row["predicted_mb"]


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Efficiency and traffic over the number of GPUs, a line for each way; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    size = (10, 1 + 3.2 * len(shapes))
    figure, grid = pyplot.subplots(
        len(shapes), 2, figsize=size, squeeze=False, layout="constrained"
    )
    ways = list(dict.fromkeys((row["parallel"], row["step"]) for row in rows))
    for shape, (left, right) in zip(shapes, grid, strict=True):
        for number, (parallel, step) in enumerate(ways):
            line = [
                row
                for row in sorted(rows, key=lambda row: row["gpus"])
                if (row["shape"], row["parallel"], row["step"]) == (shape, parallel, step)
                and "ms" in row
            ]
            gpus, color = [row["gpus"] for row in line], f"C{number}"
            name = f"{parallel}, {step}"
            left.plot(gpus, [row.get("efficiency") for row in line], "o-", color=color, label=name)
            right.plot(gpus, [row["sent_mb"] for row in line], "o-", color=color)
            right.plot(gpus, [row["predicted_mb"] for row in line], "x", color=color)
        left.set_title(f"{shape}: tokens/s of a GPU, one GPU = 1", loc="left")
        right.set_title(f"{shape}: MB sent a step (crosses: predicted)", loc="left")
        left.set_ylim(bottom=min(0.7, left.get_ylim()[0]))
        right.set_ylim(bottom=0)
        for axes in (left, right):
            axes.set_xlabel("GPUs")
            axes.set_xticks(sorted({row["gpus"] for row in rows}))
            axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure what is not in the results yet, and print all of them as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["1b"])
    parser.add_argument("--parallel", nargs="+", choices=PARALLEL, default=["ddp", "fsdp"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(NAMES))
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--steps", type=int, default=40)  # as many as one interval: one change of P
    parser.add_argument("--warmup", type=int, default=8)
    parser.add_argument("--timeout", type=float, default=600, help="seconds of one row (600)")
    parser.add_argument("--out", type=Path, default=Path("out/scaling.json"))
    args = parser.parse_args()
    if args.device == "cuda" and max(args.gpus) > torch.cuda.device_count():
        parser.error(f"--gpus {max(args.gpus)}: there are {torch.cuda.device_count()}")
    if args.device == "cpu" and not dist.is_gloo_available():
        parser.error("--device cpu needs a torch with gloo")

    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = [row for row in rows if "error" not in row]
    hardware = provenance()["device"] if args.device == "cuda" else "CPU"
    todo = [
        {"parallel": p, "shape": s, "step": v, "gpus": n, "hardware": hardware}
        for s in args.shape
        for n in args.gpus
        for p in args.parallel
        for v in args.variants
    ]
    known = set(map(key_of, rows))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for row in todo:
            if key_of(row) in known:
                continue
            rows.append(measure(row, args, Path(folder)))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()})
            sys.stdout.flush()
            with_ratios(rows)
            record = {"shapes": {s: SHAPES[s] for s in {r["shape"] for r in rows}}, "rows": rows}
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    table = [[row.get(column) for column in COLUMNS] for row in rows]
    print(tabulate(table, headers=list(COLUMNS.values()), floatfmt=".3g", tablefmt="github"))
    plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
