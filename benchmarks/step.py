"""Step time, peak memory and bytes kept for backward of LLaMA-1B-shaped blocks on one GPU.

python benchmarks/step.py --out benchmarks/results/step.json
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")  # nothing stale

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaModel

from compact_fx import CompactAdamW, CompactBackend, compact_backend


def dense(**settings: Any) -> tuple[Any, type[torch.optim.Optimizer]]:
    """A compact backend with torch's own optimizer."""
    return compact_backend(strict=True, **settings), torch.optim.AdamW


def sketched(**settings: Any) -> tuple[Any, type[torch.optim.Optimizer]]:
    """A compact backend whose gradients and moments stay sketched."""
    return compact_backend(strict=True, gradients="sketched", **settings), CompactAdamW


VARIANTS: dict[str, Callable[[], tuple[Any, type[torch.optim.Optimizer]]]] = {
    "eager": lambda: (None, torch.optim.AdamW),
    "torch.compile": lambda: ("inductor", torch.optim.AdamW),
    "compact n/4": lambda: dense(rank=0.25),
    "compact n/8": lambda: dense(rank=0.125),
    "compact n/4, recompute=False": lambda: dense(rank=0.25, recompute=False),
    "compact n/4, orthogonal": lambda: dense(rank=0.25, projection="orthogonal"),
    "compact n/4, sketched gradients": lambda: sketched(rank=0.25),
    "compact n/8, sketched gradients": lambda: sketched(rank=0.125),
}


COLUMNS = ("ms", "ms_ratio", "peak_gb", "peak_ratio", "kept_gb", "optimizer_ms")


def build(args: argparse.Namespace) -> LlamaModel:
    """Blocks of LLaMA-1B in bf16, without embedding and head."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 128,
        vocab_size=8,
        max_position_embeddings=args.seq,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaModel(config).to(args.device, torch.bfloat16)


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps; the numbers are of the last ones."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model = build(args)
    backend, optimizer_class = VARIANTS[name]()
    if backend is not None:
        model.compile(backend=backend)
    weights = [w for n, w in model.named_parameters() if "embed_tokens" not in n]
    optimizer = optimizer_class(weights, lr=1e-4, fused=True)  # type: ignore[call-arg]
    x = torch.randn(args.batch, args.seq, args.hidden, device=args.device, dtype=torch.bfloat16)
    target = torch.randn_like(x)

    def step() -> tuple[float, int, float]:
        optimizer.zero_grad()
        torch.cuda.synchronize()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        output = model(inputs_embeds=x).last_hidden_state
        kept = torch.cuda.memory_allocated() - before
        torch.nn.functional.mse_loss(output.float(), target.float()).backward()
        del output
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        optimizer.step()
        events[1].record()
        torch.cuda.synchronize()
        return time.perf_counter() - start, kept, events[0].elapsed_time(events[1])

    cold, *_ = step()
    for _ in range(args.warmup):
        step()
    torch.cuda.reset_peak_memory_stats()
    results = [step() for _ in range(args.steps)]
    times = [seconds for seconds, *_ in results]
    row = {
        "step": name,
        "ms": 1e3 * statistics.median(times),
        "ms_fastest": 1e3 * min(times),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "kept_gb": results[-1][1] / 1e9,
        "optimizer_ms": statistics.median(ms for *_, ms in results),
        "first_step_s": cold,
    }
    if isinstance(backend, CompactBackend):
        row["planned_kept_gb"] = sum(plan.bytes_after for plan in backend.plans) / 1e9
        row["sketched"] = sum(len(plan.sketched) for plan in backend.plans)
    return row


def main() -> None:
    """Measure every variant in one process and print them as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out/step.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")
    args.device = "cuda"

    rows: list[dict[str, Any]] = []
    for name in args.variants:
        try:
            rows.append(measure(name, args))
        except torch.OutOfMemoryError:
            rows.append({"step": name, "error": "out of memory"})
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}
        print(shown, flush=True)
        write(rows, args.out)
    table = [[row["step"], *(row.get(column) for column in COLUMNS)] for row in rows]
    headers = ["step", "ms", "/ compile", "peak GB", "/ compile", "kept GB", "optimizer ms"]
    print(tabulate(table, headers=headers, floatfmt=".3g", tablefmt="github"))


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Ratios to torch.compile, and everything so far as JSON."""
    base = next((row for row in rows if row["step"] == "torch.compile" and "ms" in row), None)
    for row in rows:
        if base and "ms" in row:
            row["ms_ratio"] = row["ms"] / base["ms"]
            row["peak_ratio"] = row["peak_gb"] / base["peak_gb"]
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
