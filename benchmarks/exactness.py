"""Two processes with half the batch each against one with all of it: gradients, losses, weights.

torchrun --nproc-per-node 2 benchmarks/exactness.py --out benchmarks/results/exactness.json

With NCCL on GPUs, with gloo and without code generation on CPUs, in float32. One process
accumulates over both halves, as what tracked projections see is of a micro-batch.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from provenance import provenance
from scaling_worker import ddp_of_blocks, fsdp
from tabulate import tabulate
from torch import Tensor
from training import build, loss_of

from compact_fx import CompactAdamW, compact_backend

SHAPE = {
    "layers": 3,
    "hidden": 256,
    "mlp": 704,
    "heads": 4,
    "kv_heads": 2,
    "vocabulary": 0,
    "seq": 64,
}
WAYS = {"ddp": ddp_of_blocks, "fsdp": fsdp}
FULL = {"rank": 1.0, "projection": "orthogonal"}
QUARTER = {"rank": 0.25, "update_interval": 20}


@dataclass(frozen=True)
class Trained:
    """What a run has come to; gradients are those of the first step."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]


def whole(tensor: Any) -> Tensor:
    """A matrix, of a part of it or of a factor."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return (tensor.to_dense() if hasattr(tensor, "basis") else tensor).detach().clone()


def batch(step: int, half: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and a target."""
    generator = torch.Generator().manual_seed(2 * step + half)
    x, y = torch.randn(2, 4, SHAPE["seq"], SHAPE["hidden"], generator=generator).to(device)
    return {"inputs_embeds": x}, y


def train(
    way: str | None, steps: int, device: torch.device, half: int | None, **settings: Any
) -> Trained:
    """Blocks compiled one by one; in a way, or in one process with both halves."""
    torch._dynamo.reset()
    model = build(SHAPE, str(device)).float()
    model.embed_tokens.requires_grad_(False)  # the blocks get what it would give
    on_cpu = {} if device.type == "cuda" else {"inner": "aot_eager"}
    backend = compact_backend(strict=True, **on_cpu, **settings)
    is_sketched = backend.config.gradients == "sketched"
    if way is None:
        for layer in model.layers:
            layer.compile(backend=backend)
        step: Any = model
    else:
        step, _ = WAYS[way](model, backend, is_sketched)
    optimizer: Any = (CompactAdamW if is_sketched else torch.optim.AdamW)(
        model.parameters(), lr=1e-3
    )
    losses, gradients = [], {}
    for number in range(steps):
        optimizer.zero_grad()
        parts = []
        for own in (0, 1) if half is None else (half,):
            inputs, target = batch(number, own, device)
            parts.append(loss_of(step(**inputs), target))
        loss = torch.stack(parts).mean()
        loss.backward()
        named = dict(model.named_parameters())
        if not gradients:
            gradients = {n: whole(w.grad) for n, w in named.items() if w.grad is not None}
        optimizer.step()
        loss = loss.detach()
        if half is not None:
            dist.all_reduce(loss)
            loss /= dist.get_world_size()
        losses.append(loss.item())
    return Trained(losses, gradients, {n: whole(w) for n, w in model.named_parameters()})


def relative(mine: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    """The largest ‖A - B‖ / ‖B‖ of all."""
    assert mine.keys() == others.keys()
    return max(((mine[n] - b).norm() / b.norm()).item() for n, b in others.items())


def are_equal_everywhere(weights: dict[str, Tensor]) -> bool:
    """Whether all ranks have the first one's, to the bit."""
    differing = 0
    for weight in weights.values():
        first = weight.clone()
        dist.broadcast(first, 0)
        differing += not torch.equal(first, weight)
    count = torch.tensor(differing, device=weight.device)
    dist.all_reduce(count)
    return not count.item()


def main() -> None:
    """Every way, dense and sketched; the first rank prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--more", type=int, default=100, help="until ranks are compared")
    parser.add_argument("--out", type=Path, default=Path("out/exactness.json"))
    args = parser.parse_args()
    rank, on_cuda = int(os.environ["RANK"]), torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)

    # One process first: with a group it would be told to exchange.
    alone = {
        gradients: [
            train(None, steps, device, None, gradients=gradients, **settings)
            for steps, settings in ((1, FULL), (args.steps, QUARTER))
        ]
        for gradients in ("sketched", "dense")
    }
    dist.init_process_group("nccl" if on_cuda else "gloo")
    rows = []
    for gradients, (full, quarter) in alone.items():
        for way in WAYS:
            mine = train(way, 1, device, rank, gradients=gradients, **FULL)
            long = train(way, args.steps, device, rank, gradients=gradients, **QUARTER)
            off = [abs(a / b - 1) for a, b in zip(long.losses, quarter.losses, strict=True)]
            row = {"parallel": way, "gradients": gradients, "steps": args.steps}
            row["full_rank_gradients"] = relative(mine.gradients, full.gradients)
            row["quarter_losses"] = max(off)
            row["quarter_weights"] = relative(long.weights, quarter.weights)
            rows.append(row)
    more = train("ddp", args.more, device, rank, **QUARTER)
    record = {
        **provenance(),
        "backend": dist.get_backend(),
        "shape": SHAPE,
        "rows": rows,
        "ddp_weights_equal_to_the_bit": are_equal_everywhere(more.weights),
        "ddp_steps": args.more,
    }
    if rank == 0:
        print(tabulate(rows, headers="keys", floatfmt=".2g", tablefmt="github"))
        same = record["ddp_weights_equal_to_the_bit"]
        print(f"weights equal to the bit on all ranks after {args.more} steps of DDP: {same}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
