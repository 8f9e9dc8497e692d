"""Peak memory as `explain` predicts it, without a GPU, against what a GPU's allocator measures.

python benchmarks/predicted_peak.py --out benchmarks/results/predicted_peak.json
"""

import argparse
import gc
import json
import os
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")  # nothing stale

import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import CompactAdamW, compact_backend
from compact_fx.explanation import COMPILED, DENSE, SKETCHED, VARIANTS, explain

# hidden, MLP, layers, heads, batch, sequence; vocabulary 32000
SHAPES = {
    "350M, 8x1024": (1024, 2736, 24, 16, 8, 1024),
    "1B blocks, 6 layers, 4x2048": (2048, 5632, 6, 16, 4, 2048),
    "1B, 1x2048": (2048, 5461, 24, 16, 1, 2048),
}


def build(shape: tuple[int, ...], device: str) -> LlamaForCausalLM:
    """A LLaMA in bf16."""
    hidden, mlp, layers, heads, _, length = shape
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=32000,
        max_position_embeddings=length,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def measured(shape: tuple[int, ...], variant: str, rank: float) -> int:
    """Peak bytes over three steps on the GPU."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model = build(shape, "cuda")
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if variant == COMPILED:
        model.compile()
    elif variant == DENSE:
        model.compile(backend=compact_backend(rank=rank, strict=True))
    elif variant == SKETCHED:
        model.compile(backend=compact_backend(rank=rank, strict=True, gradients="sketched"))
        optimizer = CompactAdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(32000, shape[4:], device="cuda")
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cuda.max_memory_allocated()


def main() -> None:
    """Predict, measure, and print both as one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("out/predicted_peak.json"))
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.shapes:
        tokens = torch.zeros(SHAPES[name][4:], dtype=torch.int64, device="meta")
        model = build(SHAPES[name], "meta")
        predicted = explain(model, input_ids=tokens, labels=tokens, rank=args.rank).memory
        for variant in VARIANTS:
            row = {"shape": name, "variant": variant, "predicted_gb": predicted[variant].peak / 1e9}
            if torch.cuda.is_available():
                row["measured_gb"] = measured(SHAPES[name], variant, args.rank) / 1e9
                row["ratio"] = row["predicted_gb"] / row["measured_gb"]
            rows.append(row)
            print(row, flush=True)
            record = {
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
                "torch": torch.__version__,
                "date": date.today().isoformat(),
                "command": " ".join(["python", *sys.argv]),
                "rows": rows,
            }
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(tabulate(rows, headers="keys", floatfmt=".3g", tablefmt="github"))


if __name__ == "__main__":
    main()
