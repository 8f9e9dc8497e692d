"""Peak memory as `explain` predicts it, on any machine, against what `step.py` measured on a GPU.

python benchmarks/predicted_peak.py benchmarks/results/step.json benchmarks/results/step_*.json
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from step import VARIANTS
from tabulate import tabulate
from training import build, inputs_of, loss_of

from compact_fx import explain
from compact_fx.reading.explanation import COMPILED, DENSE, SKETCHED

# What `step.py` has on the GPU beside what it gives to the model: the target, and this.
CUBLAS = 32 * 2**20  # https://docs.nvidia.com/cuda/cublas/#cublassetworkspace, on Hopper


def predicted(shape: dict[str, int], variant: str) -> int:
    """Peak bytes of one variant of `step.py`; nothing is run."""
    inputs = inputs_of(shape, "meta")
    target = (
        None if shape["vocabulary"] else torch.zeros_like(inputs["inputs_embeds"], device="cpu")
    )
    chosen = VARIANTS[variant]
    model = build(shape, "meta")
    if chosen.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    name = {None: "eager", "inductor": COMPILED, "compact": DENSE}[chosen.backend]
    if chosen.settings.get("gradients") == "sketched":
        name = SKETCHED
    loss = partial(loss_of, target=target)
    peak = explain(model, loss=loss, **inputs, **chosen.settings).memory[name].peak
    return peak + CUBLAS + (0 if target is None else target.nbytes)


def main() -> None:
    """Predict every row of the results and print both as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/predicted_peak.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in args.results:
        measured = json.loads(path.read_text())
        for row in measured["rows"]:
            if "peak_gb" not in row or VARIANTS[row["step"]].passes > 1:  # explain knows of one
                continue
            gb = predicted(measured["shape"], row["step"]) / 1e9
            ratio = gb / row["peak_gb"]
            rows.append(
                {
                    "results": path.name,
                    "step": row["step"],
                    "predicted_gb": gb,
                    "measured_gb": row["peak_gb"],
                    "ratio": ratio,
                }
            )
            print(rows[-1], flush=True)
    record = {
        **provenance(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
