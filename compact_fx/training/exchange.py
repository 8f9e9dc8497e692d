"""What several processes average, in buckets and while a backward pass runs."""

import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from compact_fx import _torch
from compact_fx.projections import Basis, Projection
from compact_fx.training.gradients import SketchedGrad, accumulate

BUCKET_BYTES = 25 * 2**20
"""What is exchanged at once, as in DistributedDataParallel."""


class _Slot(NamedTuple):
    """One tensor that ranks average.

    Attributes:
        weight: its name.
        part: of the gradient, see `SketchedGrad.parts`; "gradient" of one that is a plain tensor.
        nth: a weight in several graphs has several arrivals in one backward pass.
    """

    weight: str
    part: str
    nth: int


class _Form(NamedTuple):
    """What all ranks have to have alike in a slot.

    Attributes:
        divisor: of the sum over ranks.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    settings: str
    divisor: float


def _text(forms: Mapping[_Slot, _Form]) -> str:
    fields = [
        (f"{slot.part} {f.shape}", f"{f.dtype}", f"divided by {f.divisor:g}", f.settings)
        for slot, f in forms.items()
    ]
    return "; ".join(field for of_slot in fields for field in of_slot if field)


@functools.cache
def told(projection: Projection, seed: int, settings: str) -> str:
    """All that decides what a factor is, as text: fields with "; " between them."""
    p = projection
    sizes = f"rank={p.rank} of {p.features}; {p.dtype}; salt={p.salt}"
    return f"projection={p.kind!r}; {sizes}; seed={seed}; {settings}"


def different_settings(name: str, texts: Mapping[int, str | None]) -> ValueError:
    """The error that says in what two ranks' gradients of a weight differ.

    Args:
        texts: by rank fields with "; " between them; None where nothing is sketched.
    """
    fields = {rank: (text or "not sketched").split("; ") for rank, text in texts.items()}
    (one, of_one), (other, of_other) = fields.items()
    only_one = [field for field in of_one if field not in of_other] or of_one
    only_other = [field for field in of_other if field not in of_one] or of_other
    return ValueError(
        f"ranks have different settings. The gradient of {name} is on rank {one}: "
        f"{'; '.join(only_one)}, and on rank {other}: {'; '.join(only_other)}. Give all ranks the "
        "same compact_backend(...)"
    )


class _Arrival(Protocol):
    """A gradient that was taken from its weight to be averaged.

    Attributes:
        basis: what it is sketched in; None for a plain one.
    """

    @property
    def basis(self) -> Basis | None: ...

    def parts(self) -> Mapping[str, Tensor]:
        """What it is the sum of, by name."""

    def replace(self, part: str, averaged: Tensor) -> None:
        """The mean of all ranks for a part."""

    def put_back(self) -> None:
        """The weight gets it."""


@dataclass(eq=False)
class _WholeArrival:
    """A gradient that each rank has all of, and gets all of the mean."""

    weight: Tensor
    gradient: Tensor

    @property
    def basis(self) -> Basis | None:
        """What it is sketched in."""
        return self.gradient.basis if isinstance(self.gradient, SketchedGrad) else None

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
        is_local: whether it exchanges nothing.
        arrived: what has, and is not under way yet.
        counts: of what has arrived, by its bucket.
        launched: how many of the buckets are under way.
        absent: slot, its mean, and the share of ranks that had something for it, where this one
            had nothing.
    """

    is_local: bool
    arrived: dict[_Slot, tuple[_Arrival, Tensor]] = field(default_factory=dict)
    forms: dict[_Slot, _Form] = field(default_factory=dict)
    arrivals: list[_Arrival] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    launched: int = 0
    works: list[Any] = field(default_factory=list)
    absent: list[tuple[_Slot, Tensor, Tensor]] = field(default_factory=list)


class Exchange:
    """Averages what the weights of one model get, over the ranks of a group of its own.

    The ranks agree once on the slots and their order, and so on buckets. A bucket is averaged as
    soon as all of it, and the bucket before it, is there; the end of a backward pass sends the
    others, with zeros for what has not come. So ranks always exchange the same, whatever order
    gradients come in. A slot that is new to all ranks is agreed on at the end of its first pass.

    Args:
        weights: by name.
        group: of the ranks; None for all.
        steps: how many each weight has seen.

    Raises:
        RuntimeError: other ranks have not come, until torch's timeout.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        group: "dist.ProcessGroup | None",
        steps: Callable[[], Iterable[int]],
    ) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        # DistributedDataParallel's own messages come in between in an order of their own.
        try:
            self._group = dist.new_group(
                self.ranks, timeout=_torch.timeout_of(group), use_local_synchronization=True
            )
        except dist.DistError as error:
            raise RuntimeError(
                "other ranks do not exchange sketched gradients or tracked projections as this one "
                "does, or are gone: give all ranks the same compact_backend(...), and call "
                "exchange_factors on all of them"
            ) from error
        self._weights = {name: weakref.ref(weight) for name, weight in weights.items()}
        self._steps = steps
        self._forms: dict[_Slot, _Form] = {}
        self._buckets: list[list[_Slot]] = []
        self._bucket_of: dict[_Slot, int] = {}
        self._backwards: dict[int, _Backward] = {}  # by autograd's number of the pass
        self._is_local: bool | None = None  # the next backward pass; None: no forward has said it
        self._left: dict[str, str] = {}  # by name what `no_sync()` left in `weight.grad`: settings
        self._note: _Note | None = None
        self._wraps: weakref.ref[Any] | None = None
        self._hooks: list[Any] = []

    def is_of(self, weights: Mapping[str, Tensor], group: "dist.ProcessGroup | None") -> bool:
        """Whether it is between these ranks, of these weights under these names."""
        own = {name: reference() for name, reference in self._weights.items()}
        return (
            own.keys() == weights.keys()
            and all(own[name] is weight for name, weight in weights.items())
            and self.ranks == dist.get_process_group_ranks(group)
        )

    # --- before and while backward runs ----------------------------------------------------------

    def begin_forward(self, ddp: Any) -> None:
        """A backward pass exchanges unless all forward passes before it ran under `no_sync()`."""
        self._backwards.clear()  # none is running: one that is left has failed
        if self._is_local is not False:
            self._is_local = ddp is not None and not ddp.require_backward_grad_sync
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

    def receive(
        self, weight: Tensor, factor: Tensor, basis: Basis, name: str, settings: str
    ) -> None:
        """A factor has arrived for a weight, without autograd; see `arrive`."""
        accumulate(weight, SketchedGrad(factor, basis))
        self.arrive(weight, name, settings)

    @torch.no_grad()
    def arrive(self, weight: Tensor, name: str, settings: str) -> None:
        """A gradient has arrived in `weight.grad`: all that is there is averaged, and comes back.

        After a forward pass under `no_sync()` it stays, and goes with that of the next pass.

        settings: of the weight's projection beyond its basis.
        """
        backward = self._backward()
        if backward.is_local:
            self._left[name] = settings
            return
        self._left.pop(name, None)
        self._take_gradient(backward, weight, name, settings)

    def listen_to(self, others: Iterable[Tensor]) -> None:
        """DistributedDataParallel exchanges these, maybe in a pass without any of the weights."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = [
            other.register_post_accumulate_grad_hook(self._on_other)  # type: ignore[no-untyped-call]
            for other in others
        ]

    @_torch.untraced  # a compiled function may call backward()
    def _on_other(self, _: Tensor) -> None:
        """What `no_sync()` has left goes if DistributedDataParallel now sends what it has."""
        ddp = None if self._wraps is None else self._wraps()
        if self._left and ddp is not None and _torch.sends_gradients(ddp):
            self._backward()

    def _take_gradient(self, backward: _Backward, weight: Tensor, name: str, settings: str) -> None:
        if weight.grad is None:
            return
        arrival, weight.grad = _WholeArrival(weight, weight.grad), None
        self._take(backward, arrival, name, settings, float(len(self.ranks)))

    def _take(
        self, backward: _Backward, arrival: _Arrival, name: str, settings: str, divisor: float
    ) -> None:
        """Average what has arrived, as soon as all of a bucket has."""
        backward.arrivals.append(arrival)
        basis = arrival.basis
        text = "" if basis is None else told(basis.projection, basis.seed, settings)
        for part, tensor in arrival.parts().items():
            form = _Form(tuple(tensor.shape), tensor.dtype, text, divisor)
            slot = _Slot(name, part, 0)
            # One that has arrived before, or of another form than was agreed on, is another slot.
            while slot in backward.forms or self._forms.get(slot, form) != form:
                slot = slot._replace(nth=slot.nth + 1)
            backward.forms[slot] = form
            backward.arrived[slot] = (arrival, tensor)
            if slot in self._bucket_of:
                backward.counts[self._bucket_of[slot]] += 1
        while backward.launched < len(self._buckets) and backward.counts[backward.launched] == len(
            self._buckets[backward.launched]
        ):
            self._launch(backward)

    def _backward(self) -> _Backward:
        """The pass that is running."""
        number = _torch.backward_pass()
        if number not in self._backwards:
            if self._note is not None and not self._is_local:
                self._note.check()
                self._note = None
            # A pass whose forward ran without any of our graphs says nothing, and exchanges.
            self._backwards[number], self._is_local = _Backward(bool(self._is_local)), None
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
        shares = tensors[0].new_ones(len(taken))
        for number, found in enumerate(taken):
            if found is None:
                shares[number].zero_()
        work, averaged, shares_of_all = self._send(bucket, tensors, shares)
        backward.works.append(work)
        for number, (slot, found, tensor) in enumerate(zip(bucket, taken, averaged, strict=True)):
            if found is None:
                backward.absent.append((slot, tensor, shares_of_all[number]))
            else:
                found[0].replace(slot.part, tensor)

    def _weight(self, slot: _Slot) -> Tensor:
        weight = self._weights[slot.weight]()
        if weight is None:
            raise RuntimeError(f"{slot.weight} is gone, and other ranks exchange its gradient")
        return weight

    def _send(
        self, bucket: Sequence[_Slot], tensors: Sequence[Tensor], shares: Tensor
    ) -> tuple[Any, Sequence[Tensor], Tensor]:
        """A work to wait for, and what is the mean of each tensor, and of the shares, after it."""
        flat = torch.cat([tensor.reshape(-1) for tensor in (*tensors, shares)])
        work = self._all_reduce(flat.div_(self._forms[bucket[0]].divisor))
        *averaged, shares = torch.split(flat, [*(t.numel() for t in tensors), len(bucket)])
        return work, [a.view(t.shape) for a, t in zip(averaged, tensors, strict=True)], shares

    def _all_reduce(self, flat: Tensor) -> Any:
        """The one place where whole gradients go to other ranks; a work to wait for."""
        return dist.all_reduce(flat, group=self._group, async_op=True)

    # --- the end of a backward pass --------------------------------------------------------------

    @_torch.untraced  # a compiled function may call backward()
    @torch.no_grad()
    def _finish(self, number: int) -> None:
        backward = self._backwards.pop(number, None)
        if backward is None or backward.is_local:
            return
        self._take_kept(backward)
        while backward.launched < len(self._buckets):
            self._launch(backward)
        self._note = _Note(self._group, list(backward.arrived), self._steps())
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

    def _take_kept(self, backward: _Backward) -> None:
        """What earlier passes have left goes now, also of weights that this one gives nothing."""
        left, self._left = self._left, {}
        for name, settings in left.items():
            if (weight := self._weights[name]()) is not None:
                self._take_gradient(backward, weight, name, settings)

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
        _WholeArrival(self._weight(slot), averaged).put_back()

    def _agree(self, new: Mapping[_Slot, _Form]) -> None:
        """Every rank appends the same slots, in the same order."""
        before = len(self._forms)
        known: dict[str, tuple[int, dict[_Slot, _Form]]] = {}
        for rank, of_rank in zip(self.ranks, self.gather(dict(new)), strict=True):
            by_weight: dict[str, dict[_Slot, _Form]] = {}
            for slot, form in of_rank.items():
                by_weight.setdefault(slot.weight, {})[slot] = form
            for name, mine in by_weight.items():
                first, others = known.setdefault(name, (rank, mine))
                if others != mine:
                    raise different_settings(name, {first: _text(others), rank: _text(mine)})
                self._forms.update(mine)
        open_buckets: dict[tuple[Any, ...], tuple[list[_Slot], int]] = {}
        for slot in list(self._forms)[before:]:
            form = self._forms[slot]
            alike = (form.dtype, form.divisor, self._weight(slot).device)
            size = torch.Size(form.shape).numel() * form.dtype.itemsize
            bucket, filled = open_buckets.get(alike, ([], 0))
            if not bucket or filled + size > BUCKET_BYTES:
                bucket, filled = [], 0
                self._buckets.append(bucket)
            bucket.append(slot)
            open_buckets[alike] = bucket, filled + size
        self._bucket_of = {s: i for i, slots in enumerate(self._buckets) for s in slots}

    # --- what ranks have alike -------------------------------------------------------------------

    def gather(self, value: object) -> list[Any]:
        """What each rank gives."""
        values: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self._group)
        return values

    def difference(self, mine: Mapping[str, Any]) -> tuple[str, int, Any] | None:
        """A name that another rank has something else for, that rank, and what it has."""
        for rank, others in zip(self.ranks, self.gather(dict(mine)), strict=True):
            if others != mine:
                name = next(n for n in {**mine, **others} if mine.get(n) != others.get(n))
                return name, rank, others.get(name)
        return None

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its mean over ranks; one message for all, which are of one dtype."""
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors]).div_(len(self.ranks))
        self._all_reduce(flat).wait()
        for tensor, mean in zip(
            tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True
        ):
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
        if (found := self.difference(mine)) is not None:
            name, rank, theirs = found
            raise ValueError(
                f"ranks have different models: {name} is {theirs} on rank {rank}, "
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
        steps: how many each weight has seen, in the same order on all ranks.
    """

    def __init__(
        self, group: "dist.ProcessGroup", new: Sequence[_Slot], steps: Iterable[int]
    ) -> None:
        self._new = new
        is_on_cuda = dist.get_backend(group) == "nccl"
        # One number for all steps, whose negative is an int64 too.
        mine = [int(bool(new)), hash(tuple(steps)) >> 1]
        both = [*mine, *(-number for number in mine)]  # the largest of -x is the smallest of x
        sent = torch.tensor(both, device="cpu", pin_memory=is_on_cuda)
        if is_on_cuda:
            sent = sent.to("cuda", non_blocking=True)
        work = dist.all_reduce(sent, dist.ReduceOp.MAX, group=group, async_op=True)
        self._largest = sent
        self._wait: Callable[[], object] = work.wait
        if is_on_cuda:
            self._largest, self._wait = _on_host(sent, work)

    def check(self) -> None:
        """Raise where ranks differ: on all of them, at the latest when the next pass begins."""
        self._wait()
        most_new, most_steps, *negated = self._largest.tolist()
        least_new, least_steps = (-number for number in negated)
        if most_new != least_new:
            names = ", ".join(dict.fromkeys(slot.weight for slot in self._new))
            raise RuntimeError(
                "gradients came on some ranks and not on others that came on none before "
                f"(here: {names or 'none'}): every rank has to run the same layers in the same "
                "compiled graphs"
            )
        if most_steps != least_steps:
            raise RuntimeError(
                "ranks have counted different steps of their weights, so that their projections "
                "differ: load the same checkpoint, and step optimizers, on all of them"
            )


def _on_host(sent: Tensor, work: Any) -> tuple[Tensor, Callable[[], object]]:
    """What will be on the host, and what waits for it; the model's stream does not."""
    stream = _stream_of_notes(torch.cuda.current_device())
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        work.wait()  # the stream does, and no host
        received = sent.to("cpu", non_blocking=True)
        copied.record()
    sent.record_stream(stream)
    return received, copied.synchronize


@functools.cache
def _stream_of_notes(device: int) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
