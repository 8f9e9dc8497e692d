"""One of two processes that run the same scenarios; `test_exchange.py` starts both and judges.

python two_processes.py RANK FOLDER SCENARIO...
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from compact_fx import CompactAdamW, SketchedGrad, compact_backend, exchange_factors
from compact_fx.training import exchange
from compact_fx.training.weights import known_record

FULL = {"rank": 1.0, "projection": "orthogonal"}
QUARTER = {"rank": 0.25, "update_interval": 20}
DENSE = FULL | {"gradients": "dense"}
RANK = int(sys.argv[1])


class Layer(nn.Linear):
    """A class of its own: Dynamo does not compile calls of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class Net(nn.Module):
    """Three linear layers, which may be compiled one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle, self.down = Layer(32, 64), Layer(64, 64), Layer(64, 16)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.up(x))))
        return self.norm(self.down(x))


class Wide(nn.Module):
    """Weights of more than a megabyte, where Dynamo cuts graphs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.middle = Layer(32, 640), Layer(640, 640)
        self.down, self.norm = Layer(640, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.middle(torch.tanh(self.up(x))))
        return self.norm(self.down(x))


class Heads(Net):
    """Has a head that a forward pass may leave out, and one that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.unused = Layer(16, 16), Layer(16, 16)

    def forward(self, x: Tensor, with_head: bool = True) -> Tensor:
        x = super().forward(x)
        return self.head(x) if with_head else x


class Checkpointed(Net):
    """Its layers are compiled one by one, with checkpoints around them."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.middle, self.down):
            x = torch.tanh(checkpoint(layer, x, use_reentrant=False))
        return self.norm(x)


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.middle = nn.Embedding(32, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 32)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.table(x[:, 0].abs().long()))))


def compact(**settings: Any) -> Any:
    """A backend that sketches the small weights here."""
    return compact_backend(**{"inner": "aot_eager", "min_features": 8} | settings)


def batch(number: int, rank: int | None = RANK) -> tuple[Tensor, Tensor]:
    """Inputs and targets: a rank's half, or all of it."""
    generator = torch.Generator().manual_seed(number)
    x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 16, generator=generator)
    part = slice(None) if rank is None else slice(8 * rank, 8 * rank + 8)
    return x[part], y[part]


def loss_of(step: Callable[..., Tensor], number: int, rank: int | None = RANK) -> Tensor:
    """Of one forward pass."""
    x, y = batch(number, rank)
    output = step(x)
    return (output - y.repeat(1, output.shape[1] // y.shape[1])).pow(2).mean()


def loss_of_two(step: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Of two forward passes, with and without a dimension more."""
    return (step(x) - y).pow(2).mean() + (step(x[None]) - y).pow(2).sum()


def train(model: nn.Module, step: Callable[..., Tensor], steps: int, halves: bool = False) -> Any:
    """Losses of each step; with halves one process accumulates over what two would see."""
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    losses = []
    for number in range(steps):
        optimizer.zero_grad()
        parts = [loss_of(step, number, rank) for rank in (0, 1)] if halves else None
        if parts is None:
            parts = [loss_of(step, number, RANK if dist.is_initialized() else None)]
        loss = sum(parts) / len(parts)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def wrapped(
    settings: dict[str, Any],
    how: str = "outside",
    make: Callable[[], nn.Module] = Net,
    registered: bool | None = None,
    **ddp: Any,
) -> tuple[nn.Module, Callable[..., Tensor]]:
    """A model and what is called: compiled around, inside of, or within blocks of a DDP."""
    torch._dynamo.reset()
    model, backend = make(), compact(**settings)
    if RANK:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)  # the first rank's values have to come here
    if settings.get("gradients") != "dense" or registered:
        exchange_factors(model)
    if how == "outside":
        return model, torch.compile(DistributedDataParallel(model, **ddp), backend=backend)
    if how == "inside":
        return model, DistributedDataParallel(torch.compile(model, backend=backend), **ddp)
    for layer in model.children():
        if isinstance(layer, Layer):
            layer.compile(backend=backend)
    return model, DistributedDataParallel(model, **ddp)


def values(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters."""
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Dense ones."""
    return {
        name: None
        if (grad := weight.grad) is None
        else grad.to_dense()
        if isinstance(grad, SketchedGrad)
        else grad.clone()
        for name, weight in model.named_parameters()
    }


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """How many numbers each message of gradients has."""
    counts: list[int] = []
    send = exchange.Exchange._all_reduce

    def count(self: Any, flat: Tensor) -> Any:
        counts.append(flat.numel())
        return send(self, flat)

    exchange.Exchange._all_reduce = count
    try:
        yield counts
    finally:
        exchange.Exchange._all_reduce = send


# --- alone ----------------------------------------------------------------------------------------


def alone(settings: dict[str, Any], steps: int, halves: bool = False) -> Any:
    """What two processes have to equal: losses and weights."""
    torch._dynamo.reset()
    model = Net()
    step = torch.compile(model, backend=compact(**settings))
    return train(model, step, steps, halves), values(model)


def eager(*numbers: int, make: Callable[[], nn.Module] = Net) -> Any:
    """Gradients of these batches."""
    model = make()
    for number in numbers:
        loss_of(model, number, None).backward()
    return gradients(model)


def freeze(model: Net) -> None:
    """All that is exchanged."""
    for layer in (model.up, model.middle, model.down):
        layer.weight.requires_grad_(False)


def eager_frozen() -> Any:
    """Gradients of `frozen_at_last`."""
    model = Net()
    loss_of(model, 0, None).backward()
    freeze(model)
    loss_of(model, 1, None).backward()
    return gradients(model)


def eager_heads() -> Any:
    """Gradients where the second half of the batch leaves out the head."""
    model = Heads()
    x, y = batch(0, None)
    (torch.cat([model(x[:8]), model(x[8:], False)]) - y).pow(2).mean().backward()
    return gradients(model)


def eager_by_turns() -> Any:
    """Gradients of two passes, the second without the head."""
    model = Heads()
    loss_of(model, 0, None).backward()
    loss_of(functools.partial(model, with_head=False), 1, None).backward()
    return gradients(model)


def eager_two_graphs() -> Any:
    """Gradients of `two_graphs`."""
    model = Net()
    sum(loss_of_two(model, *batch(0, rank)) / 2 for rank in (0, 1)).backward()
    return gradients(model)


# --- together -------------------------------------------------------------------------------------


def full(how: str) -> Any:
    model, step = wrapped(FULL, how)
    return train(model, step, 5), values(model)


def quarter() -> Any:
    model, step = wrapped(QUARTER)
    losses = train(model, step, 50)
    at_50 = values(model)
    train(model, step, 50)
    record = known_record(model.middle.weight)
    return (
        losses,
        at_50,
        values(model),
        record.basis.version.generation,
        record.basis.version.matrix,
    )


def three_passes(settings: dict[str, Any], how: str = "outside", **ddp: Any) -> Any:
    """Two under no_sync, then one that sends the sum; messages of both kinds of passes."""
    model, step = wrapped(settings, how, **ddp)
    wrapper = step if isinstance(step, DistributedDataParallel) else step._orig_mod
    loss_of(step, 0).backward()  # compiled, and agreed on
    model.zero_grad()
    with counted() as counts:
        with wrapper.no_sync():
            for number in (0, 1):
                loss_of(step, number).backward()
        before = len(counts)
        loss_of(step, 2).backward()
    return gradients(model), before, sum(counts)


def by_turns(
    settings: dict[str, Any], registered: bool | None = None, freezes: bool = False
) -> Any:
    """Under no_sync with the head, then without it: what the head has kept goes as well."""
    model, step = wrapped(settings, make=Heads, registered=registered, find_unused_parameters=True)
    with step._orig_mod.no_sync():
        loss_of(step, 0).backward()
    model.head.weight.requires_grad_(not freezes)
    loss_of(functools.partial(step, with_head=False), 1).backward()
    return gradients(model)


def frozen_at_last() -> Any:
    """Under no_sync with all weights, then with biases and norms alone: what weights got goes."""
    model, step = wrapped(FULL)
    with step._orig_mod.no_sync():
        loss_of(step, 0).backward()
    freeze(model)
    loss_of(step, 1).backward()
    return gradients(model)


def probed_within() -> Any:
    """Each rank takes a gradient of its own of a bias, under no_sync or not, for itself alone."""
    model, step = wrapped(DENSE, registered=True)
    wrapper = step._orig_mod
    loss_of(step, 0).backward()
    model.zero_grad()

    def probe() -> None:
        kept, model.norm.bias.grad = model.norm.bias.grad, None
        model.norm(torch.ones(16)).sum().backward(inputs=[model.norm.bias])
        model.norm.bias.grad = kept

    with wrapper.no_sync():
        loss_of(step, 0).backward()
        probe() if RANK else None
        loss_of(step, 1).backward()
    probe() if not RANK else None
    loss_of(step, 2).backward()
    probe()
    return gradients(model)


def clipped_by_value() -> Any:
    """Gradients that something has written into, over two changes of P."""
    model, step = wrapped(QUARTER | {"update_interval": 4})
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    for number in range(8):
        optimizer.zero_grad()
        loss_of(step, number).backward()
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        optimizer.step()
    return values(model)


def one_has_kept() -> Any:
    """Both ranks have used the head under no_sync, and one uses it again."""
    model, step = wrapped(DENSE, make=Heads, registered=True, find_unused_parameters=True)
    with step._orig_mod.no_sync():
        loss_of(step, 0).backward()
    loss_of(functools.partial(step, with_head=RANK == 0), 1).backward()
    return gradients(model)


def eager_one_has_kept() -> Any:
    """Gradients of `one_has_kept`."""
    model = Heads()
    loss_of(model, 0, None).backward()
    x, y = batch(1, None)
    (torch.cat([model(x[:8]), model(x[8:], False)]) - y).pow(2).mean().backward()
    return gradients(model)


def probed() -> Any:
    """A forward pass under no_sync comes between another one and its backward pass."""
    model, step = wrapped(FULL)
    loss = loss_of(step, 0)
    with step._orig_mod.no_sync():
        loss_of(step, 1)
    loss.backward()
    return gradients(model)


def synced_passes() -> Any:
    """Three that are all exchanged add up to the same."""
    model, step = wrapped(FULL)
    for number in (0, 1, 2):
        loss_of(step, number).backward()
    return gradients(model)


def wrapped_again() -> Any:
    """A second DistributedDataParallel of the model; the first rank's values come once more."""
    model, step = wrapped(FULL)
    loss_of(step, 0).backward()
    model.zero_grad()
    if RANK:
        with torch.no_grad():
            model.up.weight.add_(1)
    exchange_factors(model)
    step = torch.compile(DistributedDataParallel(model), backend=compact(**FULL))
    for number in (0, 1, 2):
        loss_of(step, number).backward()
    return gradients(model)


def traffic(settings: dict[str, Any]) -> int:
    """Numbers that one backward pass sends."""
    torch._dynamo.reset()
    model = Net()
    exchange_factors(model)
    step = torch.compile(DistributedDataParallel(model), backend=compact(**settings))
    with counted() as counts:
        loss_of(step, 0).backward()
    return sum(counts)


def overlap(how: str) -> list[str]:
    """In which order things happen in a backward pass with buckets of 1 KB."""
    large, exchange.BUCKET_BYTES = exchange.BUCKET_BYTES, 2**10
    _, step = wrapped(QUARTER, how, make=Wide, bucket_cap_mb=1)
    loss_of(step, 0).backward()
    x, _ = batch(0)
    events: list[str] = []
    x.requires_grad_().register_hook(lambda _: events.append("input"))
    send = exchange.Exchange._all_reduce

    def note(self: Any, flat: Tensor) -> Any:
        events.append("sent")
        return send(self, flat)

    exchange.Exchange._all_reduce = note
    step(x).sum().backward()
    exchange.Exchange._all_reduce, exchange.BUCKET_BYTES = send, large
    return events


def tied() -> Any:
    model, step = wrapped(FULL, make=Tied)
    loss_of(step, 0).backward()
    return gradients(model)


def checkpointed() -> Any:
    model, step = wrapped(FULL, "blocks", Checkpointed)
    loss_of(step, 0).backward()
    return gradients(model)


def two_graphs() -> Any:
    """Two graphs with the same weights before one backward pass: two arrivals of each weight."""
    model, step = wrapped(FULL)
    for _ in range(2):
        model.zero_grad()
        loss_of_two(step, *batch(0)).backward()
    return gradients(model)


def an_eager_pass() -> Any:
    """A gradient of a graph without sketches, on top of a factor, under no_sync before that."""
    model, step = wrapped(FULL)
    wrapper = step._orig_mod
    loss_of(step, 0).backward()
    with wrapper.no_sync():
        loss_of(step, 1).backward()
    loss_of(wrapper, 2).backward()
    return gradients(model)


def scaled() -> Any:
    """An overflow on one rank: all of them skip the step."""
    model, step = wrapped(FULL)
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scales = []
    for number in range(3):
        optimizer.zero_grad()
        loss = loss_of(step, number)
        if number == 1 and RANK:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, known_record(model.up.weight).steps, values(model)


def not_a_number() -> Any:
    """On one rank before a projection changes: gradients of all have it, and P is the same."""
    model, step = wrapped(QUARTER | {"update_interval": 2})
    optimizer = CompactAdamW(model.parameters(), lr=0.0)
    reached = False
    for number in range(4):
        optimizer.zero_grad()
        loss = loss_of(step, number)
        (loss * float("nan") if number == 2 and RANK else loss).backward()
        reached |= number == 2 and bool(model.up.weight.grad.factor.isnan().all())
        optimizer.step() if number != 2 else None
    loss_of(step, 5)
    return reached, known_record(model.up.weight).basis.version.matrix


def dense(**ddp: Any) -> Any:
    """Gradients of full size, which DistributedDataParallel exchanges itself."""
    optimize = ddp.pop("optimize_ddp", True)
    with torch._dynamo.config.patch(optimize_ddp=optimize):
        return three_passes(DENSE, **ddp)[0]


def unused(settings: dict[str, Any], registered: bool | None = None) -> Any:
    """A head that the second rank leaves out."""
    model, step = wrapped(settings, make=Heads, registered=registered, find_unused_parameters=True)
    x, y = batch(0)
    for _ in range(2):
        model.zero_grad()
        (step(x, RANK == 0) - y).pow(2).mean().backward()
    return gradients(model)


# --- faults ---------------------------------------------------------------------------------------


def one_step(step: Callable[..., Tensor]) -> None:
    loss_of(step, 0).backward()


def unregistered() -> None:
    model = Net()
    one_step(torch.compile(DistributedDataParallel(model), backend=compact(**QUARTER)))


def other_settings(**settings: Any) -> None:
    _, step = wrapped(QUARTER | (settings if RANK else {}))
    one_step(step)


def other_shapes() -> None:
    model = Net()
    if RANK:
        model.down = nn.Linear(64, 8)
    exchange_factors(model)


def other_steps() -> None:
    model, step = wrapped(QUARTER)
    train(model, step, 2)  # the first change is over
    for number in range(4):
        loss_of(step, number).backward()
        if number == 1 and RANK:
            known_record(model.up.weight).count()


def joined() -> None:
    _, step = wrapped(QUARTER, "inside")
    with step.join():
        one_step(step)


def stepping_in_backward() -> None:
    model, step = wrapped(QUARTER)
    CompactAdamW(model.parameters(), step_in_backward=True)
    one_step(step)


def too_late() -> None:
    exchange_factors(DistributedDataParallel(Net()))


def after_ddp() -> None:
    """Both would exchange the weights: their gradients were 0."""
    model = Net()
    ddp = DistributedDataParallel(model)
    exchange_factors(model)
    one_step(ddp)


def other_names() -> None:
    model = nn.Sequential(Net())
    exchange_factors(model[0])
    one_step(torch.compile(DistributedDataParallel(model), backend=compact(**QUARTER)))


def nothing_left() -> None:
    exchange_factors(nn.Linear(8, 8, bias=False))


def unfrozen_later() -> None:
    def make() -> nn.Module:
        model = Net()
        model.up.requires_grad_(False)
        return model

    # torch 2.11 overlooks by default that weights are frozen.
    with torch._dynamo.config.patch(skip_tensor_guards_with_matching_dict_tags=False):
        model, step = wrapped(FULL, make=make)
        one_step(step)
        model.zero_grad()
        model.up.requires_grad_(True)
        one_step(step)


def another_module() -> None:
    model = Net()
    exchange_factors(model)
    exchange_factors(nn.Sequential(model))


def another_seed_later() -> None:
    """One rank compiles anew after all have agreed: factors of two projections must not mix."""
    model, step = wrapped(FULL)
    one_step(step)
    torch._dynamo.reset()
    step = torch.compile(step._orig_mod, backend=compact(**FULL, seed=RANK))
    for _ in range(2):
        model.zero_grad()
        one_step(step)


def a_new_layer_on_one_rank() -> None:
    """It goes wrong at once where it is, and one pass later elsewhere."""
    _, step = wrapped(QUARTER, "blocks", Heads, find_unused_parameters=True)
    x, _ = batch(0)
    step(x, False).sum().backward()
    step(x, RANK == 0).sum().backward()
    step(x, False).sum().backward()


ALONE: dict[str, Callable[[], Any]] = {
    "alone: full": lambda: alone(FULL, 5),
    "alone: quarter": lambda: alone(QUARTER, 50, halves=True),
    "alone: three passes": lambda: eager(0, 1, 2),
    "alone: tied": lambda: eager(0, make=Tied),
    "alone: checkpointed": lambda: eager(0, make=Checkpointed),
    "alone: heads": eager_heads,
    "alone: by turns": eager_by_turns,
    "alone: one has kept": eager_one_has_kept,
    "alone: frozen at last": eager_frozen,
    "alone: one pass": lambda: eager(0),
    "alone: two graphs": eager_two_graphs,
}
FAULTS = {
    "unregistered": unregistered,
    "unfrozen later": unfrozen_later,
    "other rank": lambda: other_settings(rank=0.5),
    "other seed": lambda: other_settings(seed=1),
    "other kind": lambda: other_settings(projection="gaussian"),
    "other interval": lambda: other_settings(update_interval=7),
    "other shapes": other_shapes,
    "other steps": other_steps,
    "join": joined,
    "step_in_backward": stepping_in_backward,
    "too late": too_late,
    "after DDP": after_ddp,
    "other names": other_names,
    "nothing left": nothing_left,
    "another module": another_module,
    "another seed later": another_seed_later,
    "a new layer on one rank": a_new_layer_on_one_rank,
    "sketched and unused on one rank": lambda: unused(FULL),
}
TOGETHER: dict[str, Callable[[], Any]] = FAULTS | {
    "full, outside": lambda: full("outside"),
    "full, inside": lambda: full("inside"),
    "quarter": quarter,
    "three passes": lambda: three_passes(FULL),
    "three passes, one weight dense": lambda: three_passes(FULL | {"exclude": ("up.weight",)}),
    "three passes, blocks": lambda: three_passes(FULL, "blocks"),
    "three passes, synced": synced_passes,
    "an eager pass": an_eager_pass,
    "wrapped again": wrapped_again,
    "by turns": lambda: by_turns(FULL),
    "by turns, frozen between": lambda: by_turns(FULL, freezes=True),
    "by turns, dense": lambda: by_turns(DENSE, registered=True),
    "one has kept": one_has_kept,
    "frozen at last": frozen_at_last,
    "probed within": probed_within,
    "clipped by value": clipped_by_value,
    "probed under no_sync": probed,
    "two graphs": two_graphs,
    "traffic, sketched": lambda: traffic(QUARTER),
    "traffic, dense": lambda: traffic(QUARTER | {"gradients": "dense", "projection": "gaussian"}),
    "overlap, outside": lambda: overlap("outside"),
    "overlap, blocks": lambda: overlap("blocks"),
    "tied": tied,
    "checkpointed": checkpointed,
    "scaled": scaled,
    "not a number": not_a_number,
    "dense": dense,
    "dense, optimize_ddp=False": lambda: dense(optimize_ddp=False),
    "dense, static_graph": lambda: dense(static_graph=True),
    "dense, gradient_as_bucket_view": lambda: dense(gradient_as_bucket_view=True),
    "dense, find_unused_parameters": lambda: unused(DENSE),
    "dense gradients, exchanged here": lambda: unused(DENSE, registered=True),
}


def outcome(scenario: Callable[[], Any]) -> Any:
    """What it returns, or the text of what it raises."""
    try:
        return scenario()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(alone: dict[str, Callable[[], Any]], together: dict[str, Callable[[], Any]]) -> None:
    """Run what was asked for, and save what came out."""
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[2]), sys.argv[3:]
    results: dict[str, Any] = {name: alone[name]() for name in names if name in alone and not RANK}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=RANK,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    for name in names:
        if name in together:
            print(name, file=sys.stderr, flush=True)  # says where a process has stopped
            results[name] = outcome(together[name])
    torch.save(results, folder / f"{RANK}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(ALONE, TOGETHER)
