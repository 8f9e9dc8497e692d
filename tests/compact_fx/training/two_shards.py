"""One of two processes that shard a model with FSDP2; `test_sharded.py` starts both and judges.

python two_shards.py RANK FOLDER SCENARIO...
"""

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint
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

from compact_fx import (
    CompactAdamW,
    SketchedGrad,
    compact_optimizer,
    exchange_factors,
    set_steps,
    shard_placement,
)
from compact_fx.training.weights import known_record

WHOLE = {"rank": 1.0, "place": "late", "min_features": 32}  # tracked, of full rank
CHECKPOINTS = Path(sys.argv[2]).parent / "checkpoints"
ON_INPUT = QUARTER | {"place": "early"}  # all weights on their input sides
ON_BOTH = QUARTER | {"place": "late", "min_features": 32}
OFTEN = {"rank": 0.25, "update_interval": 2, "place": "early"}
TRACKED_DENSE = OFTEN | {"gradients": "dense", "projection": "tracked"}
GAUSSIAN = OFTEN | {"projection": "gaussian"}


class Block(nn.Module):
    """As many MLPs: the larger side of its weights is `hidden`."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = Layer(32, hidden), Layer(hidden, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Net(nn.Module):
    """Two blocks, one of an odd size, a head of 15 rows, and a gate of one."""

    def __init__(self, hidden: int = 51) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(64), Block(hidden)])
        self.head, self.gate = Layer(32, 15), Layer(32, 1)

    def forward(self, x: Tensor, checkpointed: bool = False) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return self.head(x) * self.gate(x)

    @property
    def parts(self) -> list[nn.Module]:
        """What is compiled and sharded."""
        return [*self.blocks, self.head, self.gate]


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
    fsdp = {"mesh": init_device_mesh("cpu", (2,))} | fsdp  # also where there are GPUs
    placement = shard_placement if placed else None
    for block in model.parts:
        if how == "blocks":
            block.compile(backend=backend)
        fully_shard(block, shard_placement_fn=placement, **fsdp)
    fully_shard(model, **fsdp)
    return model, model if how == "blocks" else torch.compile(model, backend=backend)


def go_on(model: nn.Module, step: Any, optimizer: Any, numbers: range, parts: Any) -> list[float]:
    """Losses of these steps."""
    losses = []
    for number in numbers:
        optimizer.zero_grad()
        loss = sum(loss_of(step, number, part) for part in parts) / len(parts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train(
    model: nn.Module,
    step: Callable[..., Tensor],
    steps: int,
    parts: tuple[int | None, ...] = (RANK,),
) -> Any:
    """Losses of each step."""
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    return go_on(model, step, optimizer, range(steps), parts)


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
    for block in model.parts:
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
    version = basis.generation, basis.matrix(torch.device("cpu"), torch.float32)
    return losses, values(model), is_sketched(model), version


def mixed(settings: dict[str, Any], placed: bool = False) -> Any:
    """Gradients of one pass in bf16, sent in float32, and their dtypes."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, step = sharded(settings, placed=placed, mp_policy=policy)
    loss_of(step, 0).backward()
    return gradients(model), {str(weight.grad.dtype) for weight in model.parameters()}


def clipped() -> Any:
    """The norm of all gradients, what is left of them, then zeros, and what comes on top."""
    model, step = sharded(FULL)
    loss_of(step, 0).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1).full_tensor()
    clipped = gradients(model)
    model.zero_grad(set_to_none=False)
    zeros = gradients(model)
    loss_of(step, 0).backward()
    return norm, clipped, zeros, gradients(model), is_sketched(model)


def eager_clipped() -> Any:
    """The same of one process."""
    model = Net()
    loss_of(model, 0, None).backward()
    before = gradients(model)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return norm, gradients(model), before


def scaled() -> Any:
    """An overflow on one rank: all of them skip the step."""
    model, step = sharded(ON_INPUT)
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scales, steps = [], []
    for number in range(3):
        optimizer.zero_grad()
        loss = loss_of(step, number)
        scaler.scale(loss * float("inf") if number == 1 and RANK else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        steps.append(known_record(model.head.weight).steps)
    return scales, steps, values(model)


def with_optimizer(make: Callable[[Any], Any], settings: dict[str, Any], one: bool = False) -> Any:
    """Weights after four steps, of both halves in one process."""
    torch._dynamo.reset()
    if one:
        model, backend = Net(), compact(**settings)
        for block in model.parts:
            block.compile(backend=backend)
    else:
        model, _ = sharded(settings)
    optimizer = make(model.parameters())
    parts = (0, 1) if one else (RANK,)
    for number in range(4):
        optimizer.zero_grad()
        (sum(loss_of(model, number, part) for part in parts) / len(parts)).backward()
        optimizer.step()
    return values(model)


OPTIMIZERS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "AdamW": (lambda p: torch.optim.AdamW(p, lr=1e-2), OFTEN),
    "AdamW, one by one": (lambda p: CompactAdamW(p, lr=1e-2, foreach=False), OFTEN),
    "AdamW, fused": (lambda p: CompactAdamW(p, lr=1e-2, fused=True), OFTEN),
    "AdamW, dense": (lambda p: torch.optim.AdamW(p, lr=1e-2), TRACKED_DENSE),
    "Adam": (lambda p: compact_optimizer(torch.optim.Adam, p, lr=1e-2, weight_decay=0.1), OFTEN),
    "SGD": (lambda p: compact_optimizer(torch.optim.SGD, p, lr=0.1, momentum=0.9), OFTEN),
    "gaussian": (lambda p: CompactAdamW(p, lr=1e-2, refresh="project"), GAUSSIAN),
}


# --- more passes ----------------------------------------------------------------------------------


def checkpointed() -> Any:
    """Blocks that backward runs again."""
    model, step = sharded(FULL)
    for _ in range(2):
        model.zero_grad()
        loss_of(functools.partial(step, checkpointed=True), 0).backward()
    return gradients(model)


def kept_of_others() -> Any:
    """A pass without sync, then one with it that does not use the head."""
    model, _ = sharded(FULL)
    loss_of(model, 0).backward()
    model.zero_grad()
    model.set_requires_gradient_sync(False)
    loss_of(model, 0).backward()
    model.set_requires_gradient_sync(True)
    x, _ = batch(1)
    model.blocks[0](x).sum().backward()
    return gradients(model)


def eager_kept_of_others() -> Any:
    model = Net()
    loss_of(model, 0, None).backward()
    x, _ = batch(1, None)
    (model.blocks[0](x).sum() / 2).backward()
    return gradients(model)


def two_graphs(model: nn.Module | None = None) -> Any:
    """Two graphs with the same weights before one backward pass, and an eager call."""
    step = model if model is not None else sharded(FULL)[0]
    rank = RANK if model is None else None
    for _ in range(1 if model is not None else 2):
        step.zero_grad()
        x, _ = batch(0, rank)
        loss = step(x).pow(2).mean() + step(x[None]).pow(2).mean()
        loss.backward()
    return gradients(step)


def an_eager_pass() -> Any:
    """A gradient of a graph without sketches, which fully_shard sends, on top of a factor."""
    model, step = sharded(FULL)
    loss_of(step, 0).backward()
    loss_of(step, 1).backward()
    with torch.compiler.set_stance("force_eager"):
        loss_of(step, 2).backward()
    between = is_sketched(model)
    return gradients(model), between


# --- checkpoints ----------------------------------------------------------------------------------


def to_save(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What a checkpoint holds."""
    return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))


def made(settings: dict[str, Any], one: bool, placed: bool = False) -> Any:
    """A model, what is called, an optimizer, and which parts of a batch there are here."""
    if one:
        torch._dynamo.reset()
        model, backend = Net(48 if placed else 51), compact(**settings)
        for block in model.parts:
            block.compile(backend=backend)
    else:
        model, _ = sharded(settings, placed=placed)
    dense = settings.get("gradients") == "dense"
    optimizer = (torch.optim.AdamW if dense else CompactAdamW)(model.parameters(), lr=1e-2)
    return model, model, optimizer, (0, 1) if one else (RANK,)


def dying() -> None:
    """A checkpoint; then another one, within which the second process ends."""
    model, step, optimizer, parts = made(ON_INPUT, False)
    go_on(model, step, optimizer, range(3), parts)
    dcp.save(to_save(model, optimizer), checkpoint_id=CHECKPOINTS / "last")
    torch.save(values(model), CHECKPOINTS / f"{RANK}.pt")
    go_on(model, step, optimizer, range(3, 6), parts)

    class Writer(dcp.FileSystemWriter):
        def write_data(self, *args: Any) -> Any:
            if RANK:
                os._exit(1)
            return super().write_data(*args)

    dcp.save(to_save(model, optimizer), storage_writer=Writer(CHECKPOINTS / "next"))


def saved(name: str, *args: Any) -> list[float]:
    """Saves in the middle of an interval, and goes on: losses of after that."""
    model, step, optimizer, parts = made(*args)
    go_on(model, step, optimizer, range(25), parts)
    dcp.save(to_save(model, optimizer), checkpoint_id=CHECKPOINTS / name)
    return go_on(model, step, optimizer, range(25, 50), parts)


def loaded(name: str, settings: dict[str, Any], *args: Any) -> list[float]:
    """Another run goes on from there."""
    model, step, optimizer, parts = made(settings, *args)
    loss_of(step, 0, parts[0]).backward()
    optimizer.zero_grad()
    state = to_save(model, optimizer)
    dcp.load(state, checkpoint_id=CHECKPOINTS / name)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    if settings.get("gradients") == "dense":
        set_steps(model.parameters(), 25)
    return go_on(model, step, optimizer, range(25, 50), parts)


RESUMED: dict[str, tuple[dict[str, Any], bool]] = {
    "sketched": (ON_INPUT | {"update_interval": 10}, False),
    "placed": (ON_BOTH | {"update_interval": 10}, True),
    "dense": (DENSE | {"rank": 0.25, "update_interval": 10}, False),
}


def resuming(number: str, one: bool) -> dict[str, Callable[[], Any]]:
    """Scenarios of this many processes."""
    return {
        f"{what} on {number}: {name}": functools.partial(
            function, f"{name} of {source}", settings, one, placed
        )
        for name, (settings, placed) in RESUMED.items()
        for what, function, source in (
            ("saved", saved, number),
            ("loaded", loaded, "two" if one else "one"),
        )
    }


# --- faults ---------------------------------------------------------------------------------------


def other_settings(**settings: Any) -> None:
    _, step = sharded(ON_INPUT | (settings if RANK else {}))
    loss_of(step, 0).backward()


def hooked() -> None:
    model, step = sharded(QUARTER)
    model.head.weight.register_post_accumulate_grad_hook(lambda weight: None)
    loss_of(step, 0).backward()


def stepping_in_backward() -> None:
    model, step = sharded(QUARTER)
    CompactAdamW(model.parameters(), step_in_backward=True)
    loss_of(step, 0).backward()


def replicated() -> None:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    _, step = sharded(QUARTER, mesh=mesh)
    loss_of(step, 0).backward()


def registered() -> None:
    exchange_factors(sharded(QUARTER)[0])


def in_8_bits() -> None:
    CompactAdamW(sharded(QUARTER)[0].parameters(), state_dtype="fp8")


def tensor_parallel() -> None:
    torch._dynamo.reset()
    layer = Layer(32, 64)
    parallelize_module(layer, init_device_mesh("cpu", (2,)), ColwiseParallel())
    layer.compile(backend=compact(**QUARTER, strict=True))
    layer(batch(0)[0]).sum().backward()


def fsdp_1() -> None:
    torch._dynamo.reset()
    model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    step = torch.compile(model, backend=compact(**QUARTER, strict=True))
    step(batch(0)[0]).sum().backward()


FAULTS: dict[str, Callable[[], Any]] = {
    "other rank": lambda: other_settings(rank=0.5),
    "other seed": lambda: other_settings(seed=1),
    "other interval": lambda: other_settings(update_interval=7),
    "hooked": hooked,
    "step_in_backward": stepping_in_backward,
    "replicated": replicated,
    "registered": registered,
    "in 8 bits": in_8_bits,
    "tensor parallel": tensor_parallel,
    "FSDP1": fsdp_1,
}

ALONE: dict[str, Callable[[], Any]] = resuming("one", True) | {
    "alone: three passes": lambda: eager(0, 1, 2),
    "alone: three passes, placed": lambda: eager(0, 1, 2, hidden=48),
    "alone: full": lambda: alone(FULL, 5, (None,)),
    "alone: clipped": eager_clipped,
    "alone: one pass": lambda: eager(0),
    "alone: kept of others": eager_kept_of_others,
    "alone: two graphs": lambda: two_graphs(Net()),
    **{
        f"alone: {name}": functools.partial(with_optimizer, *of, one=True)
        for name, of in OPTIMIZERS.items()
    },
    "alone: quarter": lambda: alone(ON_INPUT, 50),
    "alone: often, placed": lambda: alone(ON_BOTH | {"update_interval": 4}, 10, hidden=48),
    "alone: quarter, placed": lambda: alone(ON_BOTH, 50, hidden=48),
}
TOGETHER: dict[str, Callable[[], Any]] = (
    FAULTS
    | resuming("two", False)
    | {
        "three passes": lambda: passes(FULL),
        "three passes, no sync": lambda: passes(FULL, synced=False),
        "three passes, placed": lambda: passes(WHOLE, placed=True),
        "three passes, whole": lambda: passes(FULL, "whole"),
        "three passes, dense": lambda: passes(DENSE),
        "full": lambda: trained(FULL, 5),
        "full, whole": lambda: trained(FULL, 5, "whole"),
        "quarter": lambda: trained(ON_INPUT, 50),
        "quarter, gathered once": lambda: trained(ON_INPUT, 50, reshard_after_forward=False),
        "mixed": lambda: mixed(FULL),
        "mixed, dense": lambda: mixed(DENSE),
        "mixed, placed": lambda: mixed(WHOLE, placed=True),
        "clipped": clipped,
        "dying": dying,
        "checkpointed": checkpointed,
        "kept of others": kept_of_others,
        "two graphs": two_graphs,
        "an eager pass": an_eager_pass,
        "scaled": scaled,
        **{name: functools.partial(with_optimizer, *of) for name, of in OPTIMIZERS.items()},
        "often, placed": lambda: trained(ON_BOTH | {"update_interval": 4}, 10, placed=True),
        "quarter, placed": lambda: trained(ON_BOTH, 50, placed=True),
    }
)

if __name__ == "__main__":
    main(ALONE, TOGETHER)
