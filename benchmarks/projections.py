"""Loss of a byte-level LLaMA after training with each kind of projection.

python benchmarks/projections.py --out benchmarks/results/projections.json
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pretrain_llama import load_config, loss_of, make_model, make_schedule, validate
from text import batches, load_text

from compact_fx import CompactAdamW, compact_backend
from compact_fx.projections import KINDS


def train(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Train one model; returns the run with its losses."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")  # nothing stale
    device = torch.device(args.device)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    model = make_model(load_config(args.config, args.seq), run["seed"], device)
    settings = {"exclude": ("lm_head*",), "seed": run["seed"], "strict": True}
    if run["projection"] is None:
        model.compile()
    else:
        settings |= {k: run[k] for k in ("rank", "projection", "gradients")}
        model.compile(backend=compact_backend(**settings))
    sketched = run["gradients"] == "sketched"
    optimizer_class = CompactAdamW if sketched else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=args.lr)
    schedule = make_schedule(optimizer, args.steps)
    training, validation = (batches(t, args.batch, args.seq, run["seed"]) for t in load_text())
    losses = []
    for tokens in islice(training, args.steps):
        loss = loss_of(model, tokens.to(device), autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
    held_out = [tokens.to(device) for tokens in islice(validation, 32)]
    model.compile(backend="eager")  # validation is not what is compared
    loss = validate(model, held_out, autocast)
    return {**run, "train": statistics.fmean(torch.stack(losses[-50:]).tolist()), "loss": loss}


def main() -> None:
    """Train one model for each kind, way of giving gradients, and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="60m")
    parser.add_argument("--projections", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", nargs="+", type=float, default=[0.25])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="models trained at the same time")
    parser.add_argument("--out", type=Path, default=Path("out/projections.json"))
    args = parser.parse_args()

    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        runs.append({"projection": None, "rank": None, "gradients": "dense", "seed": seed})
        runs += [
            {"projection": kind, "rank": rank, "gradients": gradients, "seed": seed}
            for gradients in ("dense", "sketched")
            for rank in args.ranks
            for kind in args.projections
        ]
    done: list[dict[str, Any]] = []
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), max_tasks_per_child=1) as pool:
        for result in pool.map(train, runs, [args] * len(runs)):
            done.append(result)
            print(result, flush=True)
            write(done, args)
    headers = {"projection": "projection", "train": "train loss", "loss": "validation loss"}
    print(tabulate(done, headers={key: headers.get(key, key) for key in done[0]}, floatfmt=".4f"))


def write(done: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Everything so far as JSON."""
    record = {
        **provenance(),
        "runs": done,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
