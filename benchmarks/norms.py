"""Norms of the gradient that a run logs: AdamW, tracked and Gaussian projections, on a CPU.

python benchmarks/norms.py --out benchmarks/results/norms.jsonl
"""

import argparse
import json
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import CompactAdamW, compact_backend

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from text import batches, load_text

SETTINGS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "tracked 1/4": {"rank": 0.25},
    "tracked 1/2": {"rank": 0.5},
    "gaussian 1/4": {"rank": 0.25, "projection": "gaussian"},
}
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}
STEPS = 400
PARTS = ((1, 20), (80, 120), (180, 220), (360, 400))
"""Steps from and to, of which medians are taken."""


def train(text: torch.Tensor, name: str, seed: int) -> dict[str, Any]:
    """One run: its loss at the end, and norms over all weights in parts of it."""
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, use_cache=False))
    settings, adamw = SETTINGS[name], {"lr": 1.4e-3, "betas": (0.9, 0.99)}
    if settings:
        step = torch.compile(model, backend=compact_backend(inner="aot_eager", **settings))
        optimizer: Any = CompactAdamW(model.parameters(), **adamw)
    else:
        step = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    norms, losses = [], []
    for tokens in islice(batches(text, 8, 128, seed), STEPS):
        loss = step(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm([w.grad for w in model.parameters()]).item())
        optimizer.step()
        losses.append(loss.item())
    medians = {f"{a}-{b}": round(statistics.median_high(norms[a:b]), 3) for a, b in PARTS}
    return {
        "name": name,
        "seed": seed,
        "first": round(norms[0], 3),
        **medians,
        "max after 20": round(max(norms[20:]), 3),
        "loss": round(statistics.mean(losses[-20:]), 4),
    }


def main() -> None:
    """Every setting with two seeds, a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/norms.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    text, _ = load_text()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w") as file:
        for seed in (0, 1):
            for name in SETTINGS:
                row = {**train(text, name, seed), **provenance()}
                print(row, flush=True)
                print(json.dumps(row), file=file, flush=True)


if __name__ == "__main__":
    main()
