"""What one of several processes holds and sends in a step, from formulas.

N ranks; S bytes that a collective is about. A rank sends, on average (nccl-tests,
doc/PERFORMANCE.md, whatever the algorithm, but for reductions inside of a switch):

    all-reduce                  2 (N − 1) / N · S
    reduce-scatter, all-gather    (N − 1) / N · S
    broadcast                                   S

DistributedDataParallel: an all-reduce of the gradients; it keeps a bucket for each gradient that
it exchanges (torch.nn.parallel.DistributedDataParallel, `gradient_as_bucket_view=False`).
`exchange_factors` takes the others, and keeps none.

`fully_shard` of each block and of the model, resharded after forward: a block's weights are
gathered in the forward and again in the backward pass, all others once; gradients are
reduce-scattered (torch.distributed.fsdp.fully_shard). With `reshard_after_forward=False` (ZeRO-2)
all are gathered once, and stay until their backward. Parts are padded to equal ones. A sketched
weight is sharded in the dimension that its factor keeps: in its rows, or in its columns where
these come out even, which fully_shard asks for; elsewhere its gradient is dense.

Both: every `update_interval` steps an all-reduce of Y, in float32, and a broadcast of P. Every rank
has all of P and Y.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from tabulate import tabulate
from torch import nn

from compact_fx.passes.live_bytes import Moment
from compact_fx.plan import Plan
from compact_fx.projections import Projection
from compact_fx.reading.memory import Breakdown

Parallel = Literal["ddp", "fsdp", "zero2"]
Collective = Literal["all_reduce", "reduce_scatter", "all_gather", "broadcast"]


def sent(collective: Collective, size: int, ranks: int) -> int:
    """Bytes that each rank sends for a collective about so many bytes."""
    if collective == "broadcast":
        return size if ranks > 1 else 0
    return (2 if collective == "all_reduce" else 1) * (ranks - 1) * size // ranks


@dataclass(frozen=True, kw_only=True)
class Held:
    """One parameter of a model.

    Attributes:
        itemsize: bytes of each element, of its gradient as well.
        block: the module that it is sharded with; "" for what is not in a block.
        trained: whether it has a gradient.
        in_ddp: whether DistributedDataParallel exchanges its gradient when factors are exchanged.
        factor: the shape of its gradient where that stays a factor.
        kept: in which dimension the factor is as long as the weight.
    """

    shape: tuple[int, ...]
    itemsize: int
    block: str
    trained: bool = True
    in_ddp: bool = False
    factor: tuple[int, ...] | None = None
    kept: int = 0

    def in_parts(self, ranks: int) -> "Held":
        """The same; dense where a factor could not be sharded."""
        if self.factor is None or not self.kept or self.shape[self.kept] % ranks == 0:
            return self
        return replace(self, factor=None, kept=0)

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return math.prod(self.shape) * self.itemsize

    @property
    def gradient(self) -> int:
        """Bytes of its gradient."""
        return math.prod(self.factor or self.shape) * self.itemsize if self.trained else 0

    def part(self, ranks: int) -> int:
        """Bytes of the largest part of one rank."""
        return self._part(self.shape, ranks)

    def part_of_gradient(self, ranks: int) -> int:
        """The same of its gradient."""
        return self._part(self.factor or self.shape, ranks) if self.trained else 0

    def _part(self, shape: tuple[int, ...], ranks: int) -> int:
        if not shape:
            return self.itemsize
        length = shape[self.kept]
        return math.prod(shape) // max(length, 1) * -(-length // ranks) * self.itemsize


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a step of one way to train is about.

    Attributes:
        held: all parameters.
        inputs, buffers: bytes; every rank has them.
        states: moments of the optimizer for each gradient.
        projections: all of them; those that are tracked are exchanged,
        interval: each time that so many steps are over.
        timeline: of one process, without weights, states and inputs.
    """

    held: tuple[Held, ...]
    inputs: int
    buffers: int
    states: int
    projections: tuple[Projection, ...]
    interval: int
    timeline: Sequence[Moment]

    @property
    def exchanges(self) -> bool:
        """Whether `exchange_factors` has to be called under DistributedDataParallel."""
        factors = any(h.factor is not None for h in self.held)
        return factors or any(p.is_tracked for p in self.projections)

    @property
    def matrices(self) -> int:
        """Bytes of P, of all that are tracked."""
        return sum(p.features * p.rank * p.dtype.itemsize for p in self.projections if p.is_tracked)

    @property
    def seen(self) -> int:
        """Bytes of Y."""
        return sum(4 * p.features * p.rank for p in self.projections if p.is_tracked)

    @property
    def largest(self) -> int:
        """Bytes of the largest P."""
        sizes = (p.features * p.rank * p.dtype.itemsize for p in self.projections)
        return max(sizes, default=0)


@dataclass(frozen=True, kw_only=True)
class PerRank:
    """One of several processes, in bytes.

    Attributes:
        weights: parameters and buffers, its part of them.
        gradients: its part, when the backward pass is over.
        moments: of the optimizer.
        projections: P and Y.
        whole: beside its parts: with FSDP2 what is gathered at a time, two blocks and what is in
            none (with ZeRO-2 all), and gradients on the way; with DDP its buckets.
        peak: the most that is alive at one time.
        sent_gradients: in a step.
        sent_weights: in a step.
        sent_projections: in a step, on average.
    """

    weights: int
    gradients: int
    moments: int
    projections: int
    whole: int
    peak: int
    sent_gradients: int
    sent_weights: int
    sent_projections: int

    @property
    def sent(self) -> int:
        """Bytes that it sends in a step."""
        return self.sent_gradients + self.sent_weights + self.sent_projections


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One of several processes, by variant; `print` it.

    Attributes:
        world_size: how many there are.
        parallel: see `Explanation.ranks`.
        each: by variant, as in `Explanation.memory`.
    """

    world_size: int
    parallel: Parallel
    each: Mapping[str, PerRank]

    def __str__(self) -> str:
        return self.table()

    def table(self, tablefmt: str = "simple") -> str:
        """Memory and what is sent, in GB (10⁹ bytes), or in MB where all is small."""
        small = max(rank.peak for rank in self.each.values()) < 1e9
        unit, name_of_unit = (1e6, "MB") if small else (1e9, "GB")
        names = ["weights", "gradients", "moments", "projections", "whole", "peak"]
        names += ["sent_gradients", "sent_weights", "sent_projections", "sent"]
        rows = [
            [variant, *(f"{getattr(rank, name) / unit:.2f}" for name in names)]
            for variant, rank in self.each.items()
        ]
        headers = ["weights", "gradients", "moments", "P and Y", "whole", "peak"]
        headers += ["sent: gradients", "weights", "P and Y", "all"]
        first = f"{name_of_unit}, one of {self.world_size} ({self.parallel})"
        return tabulate(rows, [first, *headers], tablefmt, disable_numparse=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable names, all sizes in bytes."""
        each = {name: {**asdict(rank), "sent": rank.sent} for name, rank in self.each.items()}
        return {"world_size": self.world_size, "parallel": self.parallel, "each": each}


def held_by(model: nn.Module, planned: Iterable[tuple[Plan, Sequence[Any]]]) -> tuple[Held, ...]:
    """Every parameter of a model; planned: for each graph, its plan and its inputs."""
    factors = {id(inputs[f.index]): f for plan, inputs in planned for f in plan.factor_inputs}
    embeddings = {
        id(weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for weight in module.parameters(recurse=False)
    }
    blocks = blocks_of(model)
    held = []
    for name, weight in model.named_parameters():
        factor = factors.get(id(weight))
        held.append(
            Held(
                shape=tuple(weight.shape),
                itemsize=weight.element_size(),
                block=blocks[name],
                trained=weight.requires_grad,
                in_ddp=weight.dim() < 2 or id(weight) in embeddings,
                factor=None if factor is None else factor.shape,
                kept=1 if factor is not None and factor.dim == 0 else 0,
            )
        )
    return tuple(held)


def blocks_of(model: nn.Module) -> dict[str, str]:
    """By parameter name: the member of the outermost list of modules that has it; "" for others."""
    lists = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    blocks = {}
    for name, _ in model.named_parameters():
        outer = min((prefix for prefix in lists if name.startswith(prefix)), key=len, default=None)
        rest = "" if outer is None else name[len(outer) :].split(".")[0]
        blocks[name] = "" if outer is None else outer + rest
    return blocks


def ranks_of(
    trainings: Mapping[str, Training],
    alone: Mapping[str, Breakdown],
    world_size: int,
    parallel: Parallel,
) -> Ranks:
    """One of so many processes for each variant; `alone`: what one process takes without others.

    Raises:
        ValueError: there can be no such processes.
    """
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size={world_size!r} must be an int ≥ 1")
    if parallel not in get_args(Parallel):
        choices = ", ".join(map(repr, get_args(Parallel)))
        raise ValueError(f"parallel={parallel!r} must be one of {choices}")
    each = {
        way: with_ddp(training, world_size, alone[way])
        if parallel == "ddp"
        else with_fsdp(training, world_size, reshards=parallel == "fsdp")
        for way, training in trainings.items()
    }
    return Ranks(world_size=world_size, parallel=parallel, each=each)


def with_ddp(training: Training, ranks: int, alone: Breakdown) -> PerRank:
    """A rank under DistributedDataParallel; `alone`: one process without it."""
    in_buckets = (h for h in training.held if h.in_ddp or not training.exchanges)
    buckets = sum(h.bytes for h in in_buckets if h.trained)
    gradients = sum(h.gradient for h in training.held)
    return PerRank(
        weights=alone.weights,
        gradients=gradients,
        moments=training.states * gradients,
        projections=training.matrices + training.seen,
        whole=buckets,
        peak=alone.peak + buckets,
        sent_gradients=sent("all_reduce", gradients, ranks),
        sent_weights=0,
        sent_projections=_of_projections(training, ranks),
    )


def with_fsdp(training: Training, ranks: int, *, reshards: bool = True) -> PerRank:
    """A rank under `fully_shard` of each block and of the model, blocks compiled one by one.

    Args:
        reshards: `reshard_after_forward` of `fully_shard`.
    """
    held = [h.in_parts(ranks) for h in training.held]
    weights = sum(h.part(ranks) for h in held)
    gradients = sum(h.part_of_gradient(ranks) for h in held)
    others, blocks = _by_block(held)
    gathered = [ranks * sum(h.part(ranks) for h in block) for block in blocks]
    gathered_once = ranks * sum(h.part(ranks) for h in others)
    at_once = gathered_once + (2 * max(gathered, default=0) if reshards else sum(gathered))
    # What is in no block has gradients until the end; a block's are copied to be sent.
    on_the_way = sum(h.gradient for h in others)
    on_the_way += 2 * max((sum(h.gradient for h in block) for block in blocks), default=0)
    moments, projections = training.states * gradients, training.matrices + training.seen
    lasting = weights + training.inputs + training.buffers + moments + projections
    while_running = [
        m.bytes
        - m.gradients
        + m.gradients // ranks
        + at_once
        + (on_the_way if m.phase == "backward" else 0)
        for m in training.timeline
    ]
    factors = sum(h.part_of_gradient(ranks) for h in held if h.factor is not None)
    optimizer = gradients + factors + (training.largest if factors else 0)
    return PerRank(
        weights=weights + training.buffers,
        gradients=gradients,
        moments=moments,
        projections=projections,
        whole=at_once + on_the_way,
        peak=lasting + max(*while_running, optimizer),
        sent_gradients=sent("reduce_scatter", ranks * gradients, ranks),
        sent_weights=sent(
            "all_gather", gathered_once + (2 if reshards else 1) * sum(gathered), ranks
        ),
        sent_projections=_of_projections(training, ranks),
    )


def _by_block(held: Sequence[Held]) -> tuple[list[Held], list[list[Held]]]:
    """Those in no block, and those of each block."""
    blocks: dict[str, list[Held]] = {}
    for h in held:
        blocks.setdefault(h.block, []).append(h)
    return blocks.pop("", []), list(blocks.values())


def _of_projections(training: Training, ranks: int) -> int:
    """Sent in a step, on average."""
    change = sent("all_reduce", training.seen, ranks) + sent("broadcast", training.matrices, ranks)
    return change // training.interval
