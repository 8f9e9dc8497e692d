"""Several processes: gradients of sketched weights are averaged over ranks while backward runs."""

import functools
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from compact_fx import _torch
from compact_fx.training.gradients import SketchedGrad, accumulate
from compact_fx.training.weights import WeightRecord, record_of

BUCKET_BYTES = 25 * 2**20
"""What is exchanged at once, as in DistributedDataParallel."""


def exchange_factors(model: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> None:
    """Exchange sketched gradients under DistributedDataParallel; call it before that is made.

    From then on DistributedDataParallel leaves weights of two and more dimensions alone, but those
    of embeddings. They get the first rank's values here, and their gradients are averaged over
    ranks as they arrive: as factors where sketched, dense elsewhere. Without torch.distributed
    nothing is done.

    Args:
        model: what DistributedDataParallel is given, on all ranks.
        process_group: what it will use; all processes by default.

    Raises:
        ValueError: ranks have other weights, or DistributedDataParallel would have none left.
    """
    if not _is_initialized():
        return
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "exchange_factors(model) comes before DistributedDataParallel(model): it decides then "
            "whose gradients it exchanges"
        )
    model = _torch.uncompiled(model)
    weights, others = _weights_of(model)
    if any(record_of(weight).exchange is not None for weight in weights.values()):
        raise ValueError("exchange_factors was called for a weight of this model before")
    if not others:
        raise ValueError(
            "DistributedDataParallel needs a parameter that requires a gradient besides those whose "
            'factors are exchanged, such as a bias or a norm: use gradients="dense" without '
            "exchange_factors, or leave one more parameter unfrozen"
        )
    exchange = Exchange(weights, process_group)
    exchange.check_weights()
    _torch.ignore_in_ddp(model, weights.values())
    exchange.send_weights()
    for name, weight in weights.items():
        record = record_of(weight)
        record.exchange, record.name = exchange, name
        weight.register_post_accumulate_grad_hook(_on_dense)  # type: ignore[no-untyped-call]


def _weights_of(model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """The weights to exchange by name, and the names of other parameters with a gradient."""
    own = {
        weight
        for module in model.modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for weight in module.parameters(recurse=False)
        if weight.dim() > 1
    }
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights = {name: weight for name, weight in named.items() if weight in own}
    return cast(dict[str, Tensor], weights), [name for name in named if name not in weights]


def _is_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def before_forward(records: Sequence[WeightRecord], *, is_shared: bool) -> None:
    """Before a graph runs with these weights: whether their gradients will be exchanged.

    is_shared: whether ranks have to exchange more than dense gradients.

    Raises:
        ValueError: there are several processes, and something that they would have to exchange
            would not be.
    """
    if not _is_initialized():
        return
    ddp = _torch.active_ddp()
    if ddp is None and dist.get_world_size() == 1:
        return
    for record in records:
        if record.listener is not None:
            raise ValueError(
                "step_in_backward=True steps before gradients are averaged over processes: set it "
                "to False"
            )
        if is_shared and record.exchange is None:
            raise ValueError(
                "with torch.distributed sketched gradients and tracked projections need "
                "compact_fx.exchange_factors(model), after init_process_group and before "
                "DistributedDataParallel(model); or use gradients='dense' with another projection, "
                "as with sharded weights (FSDP)"
            )
    for exchange in {record.exchange for record in records if record.exchange is not None}:
        exchange.begin_forward(ddp)
    for record in records:
        record.is_local = ddp is not None and not ddp.require_backward_grad_sync


def _on_dense(weight: Tensor) -> None:
    """A gradient of the weight itself; autograd also calls this where it gives none."""
    gradient, record = weight.grad, record_of(weight)
    is_factor = isinstance(gradient, SketchedGrad) and gradient.factor is not None
    if gradient is not None and not is_factor and record.exchange is not None:
        record.exchange.arrive(weight, record)


_on_dense.is_compact = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class _Slot:
    """One tensor that ranks average.

    Attributes:
        weight: its name.
        part: of the gradient, see `SketchedGrad.parts`; "gradient" of one that is a plain tensor.
        nth: a weight in several graphs has several arrivals in one backward pass.
    """

    weight: str
    part: str
    nth: int


@dataclass(frozen=True)
class _Form:
    """What all ranks have to have alike in a slot."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    settings: str


def _text(forms: Mapping[_Slot, _Form]) -> str:
    return ", ".join(
        f"{slot.part} {form.shape} {form.dtype} {form.settings}" for slot, form in forms.items()
    )


@dataclass(eq=False)
class _Arrival:
    """A gradient that was taken from its weight to be averaged."""

    weight: Tensor
    gradient: Tensor

    def parts(self) -> dict[str, Tensor]:
        if isinstance(self.gradient, SketchedGrad):
            return self.gradient.parts()
        return {"gradient": self.gradient}

    def replace(self, part: str, averaged: Tensor) -> None:
        if isinstance(self.gradient, SketchedGrad):
            self.gradient.replace(part, averaged)
        else:
            self.gradient = averaged

    def put_back(self) -> None:
        gradient = self.gradient
        if not (isinstance(gradient, SketchedGrad) or self.weight.is_contiguous()):
            gradient = torch.empty_like(self.weight).copy_(gradient)  # fused optimizers ask for it
        accumulate(self.weight, gradient)


@dataclass(eq=False)
class _Backward:
    """One backward pass.

    Attributes:
        arrived: what has, and is not under way yet.
        launched: how many of the buckets are under way.
        absent: slot, its mean, and the share of ranks that had something for it, where this one
            had nothing.
    """

    arrived: dict[_Slot, tuple[_Arrival, Tensor]] = field(default_factory=dict)
    forms: dict[_Slot, _Form] = field(default_factory=dict)
    arrivals: list[_Arrival] = field(default_factory=list)
    launched: int = 0
    works: list[Any] = field(default_factory=list)
    absent: list[tuple[_Slot, Tensor, Tensor]] = field(default_factory=list)


class Exchange:
    """Averages what the weights of one model get, over the ranks of a group of its own.

    The ranks agree once on the slots and their order, and so on buckets. A bucket is averaged as
    soon as all of it, and the bucket before it, is there; the end of a backward pass sends the
    others, with zeros for what has not come. So ranks always exchange the same, whatever order
    gradients come in. A slot that is new to all ranks is agreed on at the end of its first pass.
    """

    def __init__(self, weights: Mapping[str, Tensor], group: "dist.ProcessGroup | None") -> None:
        self.ranks = dist.get_process_group_ranks(group)
        # DistributedDataParallel's own messages come in between in an order of their own.
        self._group = dist.new_group(self.ranks, use_local_synchronization=True)
        self._weights = {name: weakref.ref(weight) for name, weight in weights.items()}
        self._forms: dict[_Slot, _Form] = {}
        self._buckets: list[list[_Slot]] = []
        self._backwards: dict[int, _Backward] = {}  # by autograd's number of the pass
        self._note: _Note | None = None
        self._wraps: weakref.ref[Any] | None = None

    # --- before and while backward runs ----------------------------------------------------------

    def begin_forward(self, ddp: Any) -> None:
        """No backward pass is running: one that is left has failed."""
        self._backwards.clear()
        if ddp is not None and (self._wraps is None or self._wraps() is not ddp):
            self._check_ddp(ddp)
            self._wraps = weakref.ref(ddp)
        if ddp is not None and _torch.joins(ddp):
            raise ValueError(
                "DistributedDataParallel.join() cannot be used with sketched gradients: give every "
                "rank as many batches (drop_last=True of the sampler and the loader)"
            )

    def _check_ddp(self, ddp: Any) -> None:
        owned = set(map(id, _torch.parameters_of_ddp(ddp)))
        for name, reference in self._weights.items():
            if id(reference()) in owned:
                raise ValueError(
                    f"DistributedDataParallel exchanges {name} as well: call exchange_factors with "
                    "the module that it wraps, after parts of it were replaced by compiled ones"
                )
        if dist.get_process_group_ranks(ddp.process_group) != self.ranks:
            raise ValueError(
                f"DistributedDataParallel exchanges with other ranks than {self.ranks}: give "
                "exchange_factors its process_group"
            )

    @torch.no_grad()
    def arrive(self, weight: Tensor, record: WeightRecord) -> None:
        """A gradient has arrived in `weight.grad`: all that is there is averaged, and comes back.

        After a pass under `no_sync()` it stays, and goes with the next one.
        """
        is_local, record.is_local = record.is_local, False
        if is_local or weight.grad is None:
            return
        arrival, weight.grad = _Arrival(weight, weight.grad), None
        backward = self._backward()
        backward.arrivals.append(arrival)
        for part, tensor in arrival.parts().items():
            nth = 0
            while (slot := _Slot(record.name, part, nth)) in backward.forms:
                nth += 1
            settings = ""
            if isinstance(arrival.gradient, SketchedGrad):
                basis = arrival.gradient.basis
                settings = f"{basis.projection}, seed={basis.seed}, {record.settings}"
            backward.forms[slot] = _Form(tuple(tensor.shape), tensor.dtype, settings)
            backward.arrived[slot] = (arrival, tensor)
        while backward.launched < len(self._buckets) and all(
            slot in backward.arrived for slot in self._buckets[backward.launched]
        ):
            self._launch(backward)

    def _backward(self) -> _Backward:
        """The pass that is running."""
        number = _torch.backward_pass()
        if number not in self._backwards:
            if self._note is not None:
                self._note.check()
                self._note = None
            self._backwards[number] = _Backward()
            _torch.after_backward(functools.partial(self._finish, number))
        return self._backwards[number]

    def _launch(self, backward: _Backward) -> None:
        """Average the next bucket; what belongs to it becomes a view of what is sent."""
        bucket = self._buckets[backward.launched]
        backward.launched += 1
        form = self._forms[bucket[0]]
        taken = [backward.arrived.pop(slot, None) for slot in bucket]
        device = self._weight(bucket[0]).device
        tensors = [
            torch.zeros(self._forms[slot].shape, dtype=form.dtype, device=device)
            if found is None
            else found[1]
            for slot, found in zip(bucket, taken, strict=True)
        ]
        shares = [tensors[0].new_full((1,), float(found is not None)) for found in taken]
        flat = torch.cat([tensor.reshape(-1) for tensor in (*tensors, *shares)])
        flat.div_(len(self.ranks))
        backward.works.append(self._all_reduce(flat))
        *averaged, shares_of_all = flat.split([*(t.numel() for t in tensors), len(bucket)])
        for slot, found, tensor, share in zip(bucket, taken, averaged, shares_of_all, strict=True):
            tensor = tensor.view(self._forms[slot].shape)
            if found is None:
                backward.absent.append((slot, tensor, share))
            else:
                found[0].replace(slot.part, tensor)

    def _weight(self, slot: _Slot) -> Tensor:
        weight = self._weights[slot.weight]()
        if weight is None:
            raise RuntimeError(f"{slot.weight} is gone, and other ranks exchange its gradient")
        return weight

    def _all_reduce(self, flat: Tensor) -> Any:
        """The one place where gradients go to other ranks; a work to wait for."""
        return dist.all_reduce(flat, group=self._group, async_op=True)

    # --- the end of a backward pass --------------------------------------------------------------

    @torch.no_grad()
    def _finish(self, number: int) -> None:
        backward = self._backwards.pop(number, None)
        if backward is None:
            return
        while backward.launched < len(self._buckets):
            self._launch(backward)
        self._note = _Note(self._group, len(self.ranks), list(backward.arrived), self._records())
        if backward.arrived:
            self._note.check()
            self._note = None
            self._agree({slot: backward.forms[slot] for slot in backward.arrived})
            while backward.launched < len(self._buckets):
                self._launch(backward)
        for work in backward.works:
            work.wait()
        for arrival in backward.arrivals:
            arrival.put_back()
        for slot, averaged, share in backward.absent:
            self._take_of_others(slot, averaged, share)

    def _take_of_others(self, slot: _Slot, averaged: Tensor, share: Tensor) -> None:
        """What other ranks have for a weight that this one has not used."""
        if not share.item():
            return
        if slot.part != "gradient":
            raise RuntimeError(
                f"the sketched gradient of {slot.weight} has arrived on other ranks and not on "
                "this one: every rank has to use the same layers. Exclude the weight, or use "
                'gradients="dense"'
            )
        _Arrival(self._weight(slot), averaged).put_back()

    def _agree(self, new: Mapping[_Slot, _Form]) -> None:
        """Every rank appends the same slots, in the same order."""
        before = len(self._forms)
        known: dict[str, tuple[int, dict[_Slot, _Form]]] = {}
        for rank, of_rank in zip(self.ranks, self.gather(dict(new)), strict=True):
            by_weight: dict[str, dict[_Slot, _Form]] = {}
            for slot, form in cast(dict[_Slot, _Form], of_rank).items():
                by_weight.setdefault(slot.weight, {})[slot] = form
            for name, mine in by_weight.items():
                first, others = known.setdefault(name, (rank, mine))
                if others != mine:
                    raise ValueError(
                        f"ranks have different settings. The gradient of {name} is on rank "
                        f"{first}: {_text(others)}; on rank {rank}: {_text(mine)}"
                    )
                self._forms.update(mine)
        open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[_Slot], int]] = {}
        for slot in list(self._forms)[before:]:
            form, device = self._forms[slot], self._weight(slot).device
            size = torch.Size(form.shape).numel() * form.dtype.itemsize
            bucket, filled = open_buckets.get((form.dtype, device), ([], 0))
            if not bucket or filled + size > BUCKET_BYTES:
                bucket, filled = [], 0
                self._buckets.append(bucket)
            bucket.append(slot)
            open_buckets[form.dtype, device] = bucket, filled + size

    def _records(self) -> list[WeightRecord]:
        weights = (reference() for reference in self._weights.values())
        return [record_of(weight) for weight in weights if weight is not None]

    # --- what ranks have alike -------------------------------------------------------------------

    def gather(self, value: object) -> list[object]:
        """What each rank gives."""
        values: list[object] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its mean over ranks; one message for all, which are of one dtype."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).div_(len(self.ranks))
        self._all_reduce(flat).wait()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.view(tensor.shape))

    def send(self, tensors: Iterable[Tensor]) -> None:
        """Each becomes what the first rank has."""
        for tensor in tensors:
            dist.broadcast(tensor, self.ranks[0], group=self._group)

    def check_weights(self) -> None:
        """Raise where ranks have weights of other names, shapes or dtypes."""
        mine = {
            n: (tuple(w.shape), w.dtype) for n, r in self._weights.items() if (w := r()) is not None
        }
        for rank, others in zip(self.ranks, self.gather(mine), strict=True):
            if others != mine:
                theirs = cast(dict[str, Any], others)
                name = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
                raise ValueError(
                    f"ranks have different models: {name} is {theirs.get(name)} on rank {rank}, "
                    f"{mine.get(name)} on rank {dist.get_rank()}"
                )

    @torch.no_grad()
    def send_weights(self) -> None:
        """All ranks begin with the first one's, also where a model is on the CPU for now."""
        for reference in self._weights.values():
            weight = reference()
            assert weight is not None
            sent = weight.detach()
            if dist.get_backend(self._group) == "nccl":
                sent = sent.to(torch.device("cuda", torch.cuda.current_device()))
            sent = sent.contiguous()
            self.send([sent])
            weight.copy_(sent)


class _Note:
    """What ranks tell each other after a backward pass; read when the next begins, without waiting.

    Args:
        new: slots of this pass that the ranks have not agreed on.
        records: of all weights; each has seen as many steps on every rank.
    """

    def __init__(
        self,
        group: "dist.ProcessGroup",
        ranks: int,
        new: Sequence[_Slot],
        records: Sequence[WeightRecord],
    ) -> None:
        self._new, self._ranks = new, ranks
        self._steps = sum(i * record.steps for i, record in enumerate(records, 1))
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        self._sum = torch.zeros(2, dtype=torch.int64, device=device)
        self._sum[0].fill_(bool(new))
        self._sum[1].fill_(self._steps)
        work = dist.all_reduce(self._sum, group=group, async_op=True)
        self._wait: Callable[[], object] = work.wait
        if device == "cuda":
            work.wait()  # a stream does, and no host
            self._sum = self._sum.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
            self._wait = copied.synchronize

    def check(self) -> None:
        """Raise where ranks differ: on all of them, at the latest when the next pass begins."""
        self._wait()
        with_new, steps = self._sum.tolist()
        if with_new not in (0, self._ranks):
            names = ", ".join(dict.fromkeys(slot.weight for slot in self._new))
            raise RuntimeError(
                f"gradients came on {with_new} of {self._ranks} ranks that came on none before "
                f"(here: {names or 'none'}): every rank has to run the same layers in the same "
                "compiled graphs"
            )
        if steps != self._ranks * self._steps:
            raise RuntimeError(
                "ranks have counted different steps of their weights, so that their projections "
                "differ: load the same checkpoint, and step optimizers, on all of them"
            )
