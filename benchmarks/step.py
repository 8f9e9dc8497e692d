"""Step time, peak memory and bytes kept for backward of LLaMA-1B-shaped blocks on one GPU.

python benchmarks/step.py --out benchmarks/results/step.json
"""

import argparse
import gc
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")  # nothing stale

import torch
from provenance import provenance
from tabulate import tabulate
from training import build, inputs_of, measure_steps, to_float8

from compact_fx import CompactAdamW, CompactBackend, compact_backend


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        backend: of torch.compile; None for eager.
        settings: of the compact backend.
        checkpointing: recompute each layer in the backward pass.
        passes: forward and backward passes for each optimizer step.
        state_dtype: of the compact optimizer's moments.
        float8: torchao's recipe for the linear layers; None for bf16.
    """

    backend: str | None = "compact"
    settings: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    passes: int = 1
    state_dtype: Any = None
    float8: str | None = None


# Dense gradients and countsketches unless the name says something else; "tracked" is the default.
RANDOM = {"gradients": "dense", "projection": "countsketch"}
HALF, QUARTER, EIGHTH = (RANDOM | {"rank": rank} for rank in (0.5, 0.25, 0.125))
SKETCHED, GAUSSIAN = {"gradients": "sketched"}, {"projection": "gaussian"}
TRACKED = SKETCHED | {"projection": "tracked"}
INT8, FP8 = TRACKED | {"saved": "int8"}, TRACKED | {"saved": "fp8"}
VARIANTS = {
    "torch.compile": Variant("inductor"),
    "compact n/4": Variant(settings=QUARTER),
    "compact n/4, sketched gradients": Variant(settings=QUARTER | SKETCHED),
    "compact n/4, tracked": Variant(settings=QUARTER | TRACKED),
    "compact n/4, tracked, int8": Variant(settings=QUARTER | INT8),
    "compact n/4, tracked, fp8": Variant(settings=QUARTER | FP8),
    "compact n/4, tracked, int8, 8-bit moments": Variant(
        settings=QUARTER | INT8, state_dtype="fp8"
    ),
    "compact n/2, tracked": Variant(settings=HALF | TRACKED),
    "compact n/2, tracked, int8, 8-bit moments": Variant(settings=HALF | INT8, state_dtype="fp8"),
    "compact n/4, gaussian": Variant(settings=QUARTER | GAUSSIAN),
    "compact n/4, gaussian, sketched gradients": Variant(settings=QUARTER | GAUSSIAN | SKETCHED),
    "compact n/4, recompute=False": Variant(settings=QUARTER | {"recompute": False}),
    "compact n/8": Variant(settings=EIGHTH),
    "compact n/8, sketched gradients": Variant(settings=EIGHTH | SKETCHED),
    "compact n/8, tracked": Variant(settings=EIGHTH | TRACKED),
    "eager": Variant(None),
    "torch.compile, checkpointing": Variant("inductor", checkpointing=True),
    "compact n/4, checkpointing": Variant(settings=QUARTER, checkpointing=True),
    "compact n/4, sketched gradients, checkpointing": Variant(
        settings=QUARTER | SKETCHED, checkpointing=True
    ),
    "compact n/4, tracked, checkpointing": Variant(settings=QUARTER | TRACKED, checkpointing=True),
    "compact n/4, tracked, int8, checkpointing": Variant(
        settings=QUARTER | INT8, checkpointing=True
    ),
    "torch.compile, 2 passes": Variant("inductor", passes=2),
    "compact n/4, 2 passes": Variant(settings=QUARTER, passes=2),
    "compact n/4, sketched gradients, 2 passes": Variant(settings=QUARTER | SKETCHED, passes=2),
    "torchao float8 tensorwise": Variant("inductor", float8="tensorwise"),
    "torchao float8 rowwise": Variant("inductor", float8="rowwise"),
    "torchao float8 rowwise_with_gw_hp": Variant("inductor", float8="rowwise_with_gw_hp"),
    "compact n/4, tracked, float8": Variant(
        settings=QUARTER | TRACKED, float8="rowwise_with_gw_hp"
    ),
}


COLUMNS = ("ms", "ms_ratio", "peak_gb", "peak_ratio", "kept_gb", "optimizer_ms")


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Train for a few steps; the numbers are of the last ones."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    shape = shape_of(args)
    model = build(shape, "cuda")
    variant = VARIANTS[name]
    if variant.float8 is not None:
        model = to_float8(model, variant.float8)
    if variant.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    backend: Any = variant.backend
    if backend == "compact":
        backend = compact_backend(strict=True, **variant.settings)
    if backend is not None:
        model.compile(backend=backend)
    sketched = variant.settings.get("gradients") == "sketched"
    own = {"state_dtype": variant.state_dtype} if sketched else {}
    optimizer_class: Any = CompactAdamW if sketched else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=1e-4, fused=True, **own)
    inputs = inputs_of(shape, "cuda")
    target = None if args.vocabulary else torch.randn_like(inputs["inputs_embeds"])
    counts = {"steps": args.steps, "warmup": args.warmup, "passes": variant.passes}
    row = {"step": name, **measure_steps(model, optimizer, inputs, target, **counts).row()}
    if isinstance(backend, CompactBackend):
        row["planned_kept_gb"] = sum(plan.account.bytes_after for plan in backend.plans) / 1e9
        row["sketched"] = sum(len(plan.sketched) for plan in backend.plans)
    return row


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """What the results are of."""
    names = ("layers", "hidden", "mlp", "vocabulary", "batch", "seq")
    return {name: getattr(args, name) for name in names}


def main() -> None:
    """Measure every variant in one process and print them as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--mlp", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=0, help="0: blocks without a head")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=2048)
    # Together with the first step, a change of tracked projections is among those measured.
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/step.json"))
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU")

    rows: list[dict[str, Any]] = []
    for name in args.variants:
        try:
            rows.append(measure(name, args))
        except torch.OutOfMemoryError:
            rows.append({"step": name, "error": "out of memory"})
        except ImportError as error:  # torchao
            rows.append({"step": name, "error": str(error)})
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}
        print(shown, flush=True)
        write(rows, shape_of(args), args.out)
    table = [[row["step"], *(row.get(column) for column in COLUMNS)] for row in rows]
    headers = ["step", "ms", "/ compile", "peak GB", "/ compile", "kept GB", "optimizer ms"]
    print(tabulate(table, headers=headers, floatfmt=".3g", tablefmt="github"))


def write(rows: list[dict[str, Any]], shape: dict[str, int], path: Path) -> None:
    """Ratios to torch.compile, and everything so far as JSON."""
    base = next((row for row in rows if row["step"] == "torch.compile" and "ms" in row), None)
    for row in rows:
        if base and "ms" in row:
            row["ms_ratio"] = row["ms"] / base["ms"]
            row["peak_ratio"] = row["peak_gb"] / base["peak_gb"]
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **provenance(),
        "shape": shape,
        "rows": rows,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
