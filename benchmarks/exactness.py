"""Processes with a part of the batch each against one with all of it: gradients, losses, weights.

torchrun --nproc-per-node 2 benchmarks/exactness.py --out benchmarks/results/exactness.json
torchrun --nproc-per-node 8 benchmarks/exactness.py --checkpoint out/eight
torchrun --nproc-per-node 4 benchmarks/exactness.py --go-on out/eight    # with two parts each

With NCCL on GPUs, with gloo and without code generation on CPUs, in float32. A process accumulates
over its parts, as what tracked projections see is of a micro-batch.
"""

import argparse
import json
import os
from argparse import RawDescriptionHelpFormatter as RawText
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from provenance import provenance
from scaling_worker import ddp_of_blocks, fsdp
from tabulate import tabulate
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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
SAVED_AT, GONE_ON = 30, 25  # steps; P changes within both
LOSSES = "losses.json"  # beside the checkpoint


def whole(tensor: Any) -> Tensor:
    """A matrix, of a part of it or of a factor."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return (tensor.to_dense() if hasattr(tensor, "basis") else tensor).detach().clone()


def batch(step: int, part: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and a target."""
    generator = torch.Generator().manual_seed(2**16 * part + step)
    x, y = torch.randn(2, 4, SHAPE["seq"], SHAPE["hidden"], generator=generator).to(device)
    return {"inputs_embeds": x}, y


class Run:
    """Blocks compiled one by one, trained in a way, or in one process (None).

    Attributes:
        losses: of all steps, means over all processes.
        gradients: of the first step.
    """

    def __init__(
        self, way: str | None, parts: Sequence[int], device: torch.device, **settings: Any
    ) -> None:
        torch._dynamo.reset()
        self.model = build(SHAPE, str(device)).float()
        self.model.embed_tokens.requires_grad_(False)  # the blocks get what it would give
        on_cpu = {} if device.type == "cuda" else {"inner": "aot_eager"}
        backend = compact_backend(strict=True, **on_cpu, **settings)
        is_sketched = backend.config.gradients == "sketched"
        self._call: Any = self.model
        if way is None:
            for layer in self.model.layers:
                layer.compile(backend=backend)
        else:
            self._call, _ = WAYS[way](self.model, backend, is_sketched)
        self.optimizer: Any = (CompactAdamW if is_sketched else torch.optim.AdamW)(
            self.model.parameters(), lr=1e-3
        )
        self._way, self._parts, self._device = way, parts, device
        self.losses: list[float] = []
        self.gradients: dict[str, Tensor] = {}

    def loss(self, step: int) -> Tensor:
        """Of this process's parts."""
        batches = (batch(step, part, self._device) for part in self._parts)
        return torch.stack([loss_of(self._call(**x), y) for x, y in batches]).mean()

    def train(self, steps: Iterable[int]) -> "Run":
        """These steps, of which each has its own batch."""
        for step in steps:
            self.optimizer.zero_grad()
            loss = self.loss(step)
            loss.backward()
            if not self.gradients:
                named = self.model.named_parameters()
                self.gradients = {n: whole(w.grad) for n, w in named if w.grad is not None}
            self.optimizer.step()
            loss = loss.detach()
            if self._way is not None:
                dist.all_reduce(loss)
                loss /= dist.get_world_size()
            self.losses.append(loss.item())
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        """As they are now."""
        return {name: whole(weight) for name, weight in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        parts = get_state_dict(self.model, self.optimizer)
        return dict(zip(("model", "optimizer"), parts, strict=True))


def save(run: Run, parts: int, folder: Path) -> None:
    """A checkpoint within an interval of P, and the losses of after that."""
    dcp.save(run.train(range(SAVED_AT)).state(), checkpoint_id=folder)
    losses = run.train(range(SAVED_AT, SAVED_AT + GONE_ON)).losses[SAVED_AT:]
    if dist.get_rank() == 0:
        (folder / LOSSES).write_text(json.dumps({"parts": parts, "losses": losses}))


def go_on(folder: Path, rank: int, processes: int, device: torch.device) -> float:
    """How far losses are from those of the run that has saved: the most of all, relative."""
    saved = json.loads((folder / LOSSES).read_text())
    run = Run("fsdp", range(rank, saved["parts"], processes), device, **QUARTER)
    run.loss(0).backward()  # the optimizer gets to know what is sketched
    run.optimizer.zero_grad()
    state = run.state()
    dcp.load(state, checkpoint_id=folder)
    states = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
    set_state_dict(run.model, run.optimizer, **states)
    run.train(range(SAVED_AT, SAVED_AT + GONE_ON))
    return farthest(run.losses, saved["losses"])


def farthest(losses: Sequence[float], expected: Sequence[float]) -> float:
    """The most that one of them is off, relative."""
    return max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True))


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RawText)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--more", type=int, default=100, help="until ranks are compared")
    parser.add_argument("--out", type=Path, default=Path("out/exactness.json"))
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="save one, of FSDP2")
    parser.add_argument("--go-on", type=Path, metavar="FOLDER", help="from it, and no more")
    args = parser.parse_args()
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    parts, mine = range(processes), (rank,)
    on_cuda = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)

    # One process first: with a group it would be told to exchange.
    alone: dict[str, tuple[Run, Run]] = {}
    for gradients in ("sketched", "dense") if rank == 0 and not args.go_on else ():
        full = Run(None, parts, device, gradients=gradients, **FULL).train(range(1))
        quarter = Run(None, parts, device, gradients=gradients, **QUARTER).train(range(args.steps))
        alone[gradients] = full, quarter
    dist.init_process_group("nccl" if on_cuda else "gloo")
    if args.go_on:
        off = go_on(args.go_on, rank, processes, device)
        if rank == 0:
            print(f"losses of {GONE_ON} steps on {processes} processes: {off:.2g} apart")
        dist.destroy_process_group()
        return
    rows = []
    for gradients in ("sketched", "dense"):
        for way in WAYS:
            once = Run(way, mine, device, gradients=gradients, **FULL).train(range(1))
            long = Run(way, mine, device, gradients=gradients, **QUARTER).train(range(args.steps))
            weights = long.weights  # all processes together
            if rank == 0:
                full, quarter = alone[gradients]
                row = {"parallel": way, "gradients": gradients, "steps": args.steps}
                row["full_rank_gradients"] = relative(once.gradients, full.gradients)
                row["quarter_losses"] = farthest(long.losses, quarter.losses)
                row["quarter_weights"] = relative(weights, quarter.weights)
                rows.append(row)
                print(row, flush=True)
    more = Run("ddp", mine, device, **QUARTER).train(range(args.more))
    record = {
        **provenance(),
        "backend": dist.get_backend(),
        "processes": processes,
        "shape": SHAPE,
        "rows": rows,
        "ddp_weights_equal_to_the_bit": are_equal_everywhere(more.weights),
        "ddp_steps": args.more,
    }
    if args.checkpoint:
        save(Run("fsdp", mine, device, **QUARTER), processes, args.checkpoint)
    if rank == 0:
        print(tabulate(rows, headers="keys", floatfmt=".2g", tablefmt="github"))
        same = record["ddp_weights_equal_to_the_bit"]
        print(f"weights equal to the bit on all ranks after {args.more} steps of DDP: {same}")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
