"""Step time, peak memory and traffic of LLaMA-1B-shaped blocks under DistributedDataParallel.

torchrun --nproc-per-node 2 benchmarks/ddp.py --out benchmarks/results/ddp.json
torchrun --nproc-per-node 2 benchmarks/ddp.py --layers 2 --hidden 256 --mlp 512 --seq 64 --steps 3
"""

import argparse
import gc
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from provenance import provenance
from step import VARIANTS, shape_of
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import build, inputs_of, loss_of

from compact_fx import CompactAdamW, compact_backend, exchange_factors

NAMES = ("torch.compile", "compact n/4", "compact n/4, tracked", "compact n/4, tracked, int8")
WRAPS = ("outside", "blocks")
COLUMNS = ("ms", "ms_ratio", "peak_gb", "peak_ratio", "sent_mb", "sent_ratio")


class Traffic:
    """Bytes that this process hands to collectives, without those of DistributedDataParallel."""

    def __init__(self) -> None:
        self.bytes = 0
        self._all_reduce, self._broadcast = dist.all_reduce, dist.broadcast
        dist.all_reduce = self._counted(dist.all_reduce)
        dist.broadcast = self._counted(dist.broadcast)

    def _counted(self, collective: Any) -> Any:
        def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.bytes += tensor.nbytes
            return collective(tensor, *args, **kwargs)

        return run

    def close(self) -> None:
        """Count no more."""
        dist.all_reduce, dist.broadcast = self._all_reduce, self._broadcast


def wrapped(model: nn.Module, how: str, backend: Any) -> nn.Module:
    """What a training loop calls: compiled around DistributedDataParallel, or block by block."""
    if how == "blocks":
        for layer in getattr(model, "model", model).layers:
            layer.compile(backend=backend)
        return DistributedDataParallel(model)
    return torch.compile(DistributedDataParallel(model), backend=backend)


def measure(name: str, how: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train for a few steps; times are those of the slowest process."""
    torch._dynamo.reset()
    gc.collect()
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
    model = build(shape_of(args), str(device))
    if not args.vocabulary:
        model.embed_tokens.requires_grad_(False)  # the blocks get what it would give
    variant = VARIANTS[name]
    backend: Any = variant.backend
    sketched = variant.settings.get("gradients") == "sketched"
    if backend == "compact":
        backend = compact_backend(strict=True, **variant.settings)
    own_bytes = sum(w.nbytes for w in model.parameters() if w.requires_grad)
    if sketched:
        exchange_factors(model)
        own_bytes = sum(
            weight.nbytes
            for weight in model.parameters()
            if weight.requires_grad and not weight._post_accumulate_grad_hooks
        )
    step_model = wrapped(model, how, backend)
    optimizer_class = CompactAdamW if sketched else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(dist.get_rank())
    inputs = inputs_of(shape_of(args), str(device))
    target = None if args.vocabulary else torch.randn_like(inputs["inputs_embeds"])

    def step() -> float:
        optimizer.zero_grad()
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        loss_of(step_model(**inputs), target).backward()
        optimizer.step()
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(1 + args.warmup):
        step()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    traffic = Traffic()
    times = [step() for _ in range(args.steps)]
    traffic.close()
    seconds = torch.tensor([statistics.median(times), min(times), max(times)], device=device)
    peak = torch.tensor(torch.cuda.max_memory_allocated() if on_cuda else 0, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    ms, fastest, slowest = (1e3 * seconds).tolist()
    return {
        "step": name,
        "compiled": how,
        "ms": ms,
        "ms_fastest": fastest,
        "ms_slowest": slowest,
        "peak_gb": peak.item() / 1e9,
        "sent_mb": (own_bytes + traffic.bytes / args.steps) / 1e6,
        "sent_by_ddp_mb": own_bytes / 1e6,
    }


def write(rows: list[dict[str, Any]], args: argparse.Namespace, device: torch.device) -> None:
    """Ratios to torch.compile compiled in the same way, and everything so far as JSON."""
    bases = {row["compiled"]: row for row in rows if row["step"] == "torch.compile" and "ms" in row}
    for row in rows:
        base = bases.get(row["compiled"])
        for column in ("ms", "peak", "sent"):
            unit = {"ms": "ms", "peak": "peak_gb", "sent": "sent_mb"}[column]
            if base is not None and unit in row and base[unit]:
                row[f"{column}_ratio"] = row[unit] / base[unit]
    record = {
        **provenance(),
        "shape": shape_of(args),
        "processes": dist.get_world_size(),
        "device": device.type,
        "rows": rows,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Measure each variant in each way of compiling it and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(NAMES))
    parser.add_argument("--compiled", nargs="+", choices=WRAPS, default=list(WRAPS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=0, help="0: blocks without a head")
    parser.add_argument("--batch", type=int, default=8, help="of each process")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=40)  # as many as one interval: one change of P
    parser.add_argument("--warmup", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/ddp.json"))
    args = parser.parse_args()
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")

    rows: list[dict[str, Any]] = []
    for name in args.variants:
        for how in args.compiled:
            rows.append(measure(name, how, args, device))
            if dist.get_rank() == 0:
                print(rows[-1], flush=True)
                write(rows, args, device)
    if dist.get_rank() == 0:
        table = [[r["step"], r["compiled"], *(r.get(column) for column in COLUMNS)] for r in rows]
        headers = ["step", "compiled", "ms", "/ compile", "peak GB", "/ compile", "MB", "/ compile"]
        print(tabulate(table, headers=headers, floatfmt=".3g", tablefmt="github"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
