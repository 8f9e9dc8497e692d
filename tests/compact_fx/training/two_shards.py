"""One of two processes that shard a model with FSDP2; `test_sharded.py` starts both and judges.

python two_shards.py RANK FOLDER SCENARIO...
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import (
    DENSE,
    FULL,
    QUARTER,
    RANK,
    Layer,
    batch,
    compact,
    main,
)

from compact_fx import CompactAdamW, SketchedGrad, shard_placement
from compact_fx.training.weights import known_record

WHOLE = {"rank": 1.0, "place": "late"}  # tracked, of full rank
ON_INPUT = QUARTER | {"place": "early"}  # all weights on their input sides
ON_BOTH = QUARTER | {"place": "late"}


class Block(nn.Module):
    """As many MLPs: the larger side of its weights is `hidden`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = Layer(32, hidden), Layer(hidden, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks, one of an odd size, and a head of 15 rows."""

    def __init__(self, hidden: int = 51) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(64), Block(hidden)])
        self.head = Layer(32, 15)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(step: Callable[..., Tensor], number: int, rank: int | None = RANK) -> Tensor:
    """Of one forward pass."""
    x, y = batch(number, rank)
    return (step(x).float() - y[:, :15]).pow(2).mean()


def sharded(
    settings: dict[str, Any], how: str = "blocks", placed: bool = False, **fsdp: Any
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model and what is called: as torchtitan shards and compiles it, or compiled as a whole."""
    torch._dynamo.reset()
    model, backend = Net(48 if placed else 51), compact(**settings)
    placement = shard_placement if placed else None
    for block in (*model.blocks, model.head):
        if how == "blocks":
            block.compile(backend=backend)
        fully_shard(block, shard_placement_fn=placement, **fsdp)
    fully_shard(model, **fsdp)
    return model, model if how == "blocks" else torch.compile(model, backend=backend)


def train(
    model: nn.Module,
    step: Callable[..., Tensor],
    steps: int,
    parts: tuple[int | None, ...] = (RANK,),
) -> Any:
    """Losses of each step."""
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        loss = sum(loss_of(step, number, part) for part in parts) / len(parts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(tensor: Tensor) -> Tensor:
    """All of it, dense."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor().detach().clone()
    if isinstance(tensor, SketchedGrad):
        return tensor.to_dense()
    return tensor.detach().clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters."""
    return {name: whole(weight) for name, weight in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Dense ones."""
    named = model.named_parameters()
    return {n: None if w.grad is None else whole(w.grad) for n, w in named}


def is_sketched(model: nn.Module) -> dict[str, bool]:
    """Of which weights this process has a factor."""
    named = model.named_parameters()
    return {
        name: isinstance(getattr(weight.grad, "_local_tensor", None), SketchedGrad)
        for name, weight in named
    }


# --- alone ----------------------------------------------------------------------------------------


def alone(
    settings: dict[str, Any], steps: int, parts: tuple[int | None, ...] = (0, 1), hidden: int = 51
) -> Any:
    """What two processes have to equal: losses and weights."""
    torch._dynamo.reset()
    model, backend = Net(hidden), compact(**settings)
    for block in (*model.blocks, model.head):
        block.compile(backend=backend)
    return train(model, model, steps, parts), values(model)


def eager(*numbers: int, hidden: int = 51) -> Any:
    """Gradients of these batches."""
    model = Net(hidden)
    for number in numbers:
        loss_of(model, number, None).backward()
    return gradients(model)


# --- together -------------------------------------------------------------------------------------


def passes(settings: dict[str, Any], *args: Any, synced: bool = True, **fsdp: Any) -> Any:
    """Gradients of three passes, the first two without sync or with it; and what is sketched."""
    model, step = sharded(settings, *args, **fsdp)
    loss_of(step, 0).backward()  # compiled, and agreed on
    model.zero_grad()
    for number in (0, 1):
        model.set_requires_gradient_sync(synced)
        loss_of(step, number).backward()
    before = gradients(model)
    model.set_requires_gradient_sync(True)
    loss_of(step, 2).backward()
    return gradients(model), before, is_sketched(model)


def trained(settings: dict[str, Any], steps: int, *args: Any, **fsdp: Any) -> Any:
    """Losses and weights; versions of P, and the last."""
    model, step = sharded(settings, *args, **fsdp)
    losses = train(model, step, steps)
    weight = model.blocks[0].down.weight
    basis = known_record(weight).basis
    version = (basis.generation, basis.matrix(torch.device("cpu"), torch.float32))
    return losses, values(model), version, is_sketched(model)


ALONE: dict[str, Callable[[], Any]] = {
    "alone: three passes": lambda: eager(0, 1, 2),
    "alone: three passes, placed": lambda: eager(0, 1, 2, hidden=48),
    "alone: full": lambda: alone(FULL, 5, (None,)),
    "alone: quarter": lambda: alone(ON_INPUT, 50),
    "alone: quarter, placed": lambda: alone(ON_BOTH, 50, hidden=48),
}
TOGETHER: dict[str, Callable[[], Any]] = {
    "three passes": lambda: passes(FULL),
    "three passes, no sync": lambda: passes(FULL, synced=False),
    "three passes, placed": lambda: passes(WHOLE, placed=True),
    "three passes, whole": lambda: passes(FULL, "whole"),
    "three passes, dense": lambda: passes(DENSE),
    "full": lambda: trained(FULL, 5),
    "full, whole": lambda: trained(FULL, 5, "whole"),
    "quarter": lambda: trained(ON_INPUT, 50),
    "quarter, placed": lambda: trained(ON_BOTH, 50, placed=True),
}

if __name__ == "__main__":
    main(ALONE, TOGETHER)
