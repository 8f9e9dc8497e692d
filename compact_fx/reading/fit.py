"""Which settings let a model train in a GPU's memory, and which is fastest, both predicted.

Graphs of two and of three layers say what every further layer brings; sizes that a prime number of
sequences divides are those that grow with the batch.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from compact_fx import _torch
from compact_fx.config import CompactConfig, Rank, Storage, resolve_rank
from compact_fx.errors import CannotCompact
from compact_fx.passes.choose_sites import Treatment, choose_for
from compact_fx.passes.costs import extra_bytes
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.live_bytes import GraphMemory, graph_memory, kernels_of
from compact_fx.passes.partition import Partition, partition
from compact_fx.plan import Plan
from compact_fx.reading.explanation import Analyser, faked, sketched_sizes, storage_bytes
from compact_fx.reading.memory import step_timeline
from compact_fx.training.low_bit import stored_bytes
from compact_fx.training.stand_ins import step_bytes

RANKS: tuple[Rank, ...] = (0.5, 0.25)
SAVED: tuple[Storage, ...] = ("keep", "int8")
MOMENTS: tuple[Literal["fp8"] | None, ...] = (None, "fp8")

UNLIKE = 1e-3  # of the weights' bytes: Gemma 3 has a rotary table more from its sixth layer on
_MOST_ROWS = 12


@dataclass(frozen=True, kw_only=True)
class GPU:
    """What a model has to fit into; times are a roofline of the peak rates.

    Attributes:
        memory: bytes, without what is kept for others than tensors.
        flops: a second, of matrix products in the model's dtype.
        bandwidth: of its memory, bytes a second.
    """

    memory: int
    flops: float
    bandwidth: float


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to train, as predicted.

    Attributes:
        batch: sequences.
        rank: None for torch.compile with AdamW.
        checkpointing: each layer is computed again in the backward pass.
        state_dtype: of `CompactAdamW`.
        bytes: the most that tensors take at one time.
        seconds: for each sequence, if the GPU reached its peak rates: to compare with others.
        of_compiled: that time, as a share of torch.compile's with AdamW and the same batch, without
            checkpointing.
    """

    batch: int
    rank: Rank | None
    saved: Storage
    checkpointing: bool
    state_dtype: Literal["fp8"] | None
    bytes: int
    seconds: float
    of_compiled: float


@dataclass(frozen=True)
class Fit:
    """What `fit` found; `print` it.

    Attributes:
        candidates: those that fit, the fastest first.
        compiled: torch.compile with AdamW, where that fits, the fastest first.
        config: their other settings.
    """

    candidates: tuple[Candidate, ...]
    compiled: tuple[Candidate, ...]
    config: CompactConfig

    def __str__(self) -> str:
        return self.recommendation() + "\n\n" + self.table()

    def recommendation(self) -> str:
        """The fastest, as a line of code, and how long torch.compile would take."""
        best, default = self.candidates[0], CompactConfig()
        assert best.rank is not None
        config = replace(self.config, rank=best.rank, saved=best.saved)
        settings = [
            f"{field.name}={getattr(config, field.name)!r}"
            for field in fields(config)
            if field.name == "rank" or getattr(config, field.name) != getattr(default, field.name)
        ]
        states = "" if best.state_dtype is None else f", state_dtype={best.state_dtype!r}"
        how = ", with checkpointing" if best.checkpointing else ""
        code = f"compact_backend({', '.join(settings)}), CompactAdamW(params{states})"
        other = "does not fit"
        if self.compiled:
            plain = self.compiled[0]
            other = f"takes {plain.seconds / best.seconds:.2f} times as long (batch {plain.batch}"
            other += ", with checkpointing)" if plain.checkpointing else ")"
        return f"{code}  # batch {best.batch}{how}; torch.compile with AdamW {other}"

    def table(self, tablefmt: str = "simple") -> str:
        """The twelve fastest, and torch.compile with AdamW; GB are 10⁹ bytes."""
        fastest = self.candidates[0].seconds
        rows = [
            [
                c.batch,
                "full" if c.rank is None else c.rank,
                c.saved,
                "yes" if c.checkpointing else "no",
                c.state_dtype or "as gradients",
                f"{c.bytes / 1e9:.2f}",
                f"{c.seconds / fastest:.3f}",
                f"{c.of_compiled:.3f}",
            ]
            for c in (*self.candidates[:_MOST_ROWS], *self.compiled)
        ]
        headers = ["batch", "rank", "saved", "checkpointing", "moments", "GB", "time a token"]
        headers.append("torch.compile = 1")
        aligned = ("right", "right", "left", "left", "left", "right", "right", "right")
        return tabulate(rows, headers, tablefmt, disable_numparse=True, colalign=aligned)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable names, sizes in bytes."""
        return {
            "recommendation": self.recommendation(),
            "candidates": [asdict(candidate) for candidate in self.candidates],
            "compiled": [asdict(candidate) for candidate in self.compiled],
        }

    def to_json(self, indent: int | None = 1) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)


def fit(
    build: Callable[[int, bool], nn.Module],
    inputs: Callable[[int], Mapping[str, Any]],
    *,
    layers: int,
    gpu: GPU,
    ranks: Sequence[Rank] = RANKS,
    checkpointing: Sequence[bool] = (False, True),
    batch: int | None = None,
    config: CompactConfig | None = None,
) -> Fit:
    """Predict for each combination of settings how many sequences fit, and how fast they are.

    Nothing is run and nothing is allocated; graphs of at most three layers are traced.

    Args:
        build: a model with so many layers, with or without checkpointing, on the "meta" device;
            its output has a `loss`.
        inputs: keyword arguments of its forward for a batch of so many sequences.
        layers: of the model in question.
        batch: only this one; by default the largest that fits, for each combination.
        config: all other settings.

    Raises:
        ValueError: a setting that cannot be; nothing fits; layers that are not all alike.
        CannotCompact: a graph that the backend would leave untouched, or nothing to sketch.
    """
    config = replace(config or CompactConfig(), gradients="sketched")
    configs = {
        (rank, saved): replace(config, rank=rank, saved=saved) for rank in ranks for saved in SAVED
    }
    depths = (2, 3) if layers > 3 else (layers,)
    model = build(layers, False)
    size = _Size.of(model, inputs(1), ranks)
    ways: dict[tuple[bool, Any], _Way] = {}
    for checkpointed in sorted({False, *checkpointing}):
        traced = [
            _traced(build(depth, checkpointed), inputs(size.batch), configs, size)
            for depth in depths
        ]
        for key in (None, *configs):
            steps = [steps_of[key] for steps_of in traced]
            ways[checkpointed, key] = _Way(steps[0], steps[-1], layers - depths[0])
    compiled = ways[False, None]
    expected = storage_bytes([*model.parameters(), *model.buffers()])
    lasting = compiled.totals.lasting
    if abs(lasting - expected) > UNLIKE * expected:
        raise ValueError(
            f"weights of {layers} layers take {expected} bytes, and {lasting} if all were "
            f"like the first {depths[-1]}: layers that are not alike cannot be predicted from few"
        )
    found: list[Candidate] = []
    too_large: list[Candidate] = []
    with_adamw: Iterable[Any] = ((checkpointed, None, None) for checkpointed in checkpointing)
    others = itertools.product(checkpointing, configs, MOMENTS)
    for checkpointed, key, state_dtype in itertools.chain(with_adamw, others):
        way = ways[checkpointed, key]
        most = way.batch(gpu.memory, state_dtype) if batch is None else batch
        if key is not None and not way.sketches(max(most, 1)):
            continue
        rank, saved = (None, CompactConfig.saved) if key is None else key
        given = max(most, 1)
        seconds = way.seconds(given, gpu, state_dtype, config.interval)
        candidate = Candidate(
            batch=given,
            rank=rank,
            saved=saved,
            checkpointing=checkpointed,
            state_dtype=state_dtype,
            bytes=way.peak(given, state_dtype),
            seconds=seconds / given,
            of_compiled=seconds / compiled.seconds(given, gpu, None, config.interval),
        )
        if replace(candidate, saved="keep") in found:  # nothing crosses in 8 bits
            continue
        (found if candidate.bytes <= gpu.memory else too_large).append(candidate)
    if all(c.rank is None for c in (*found, *too_large)):
        raise CannotCompact("no weight is sketched with any of these settings: see `explain`")
    found.sort(key=lambda c: (c.seconds, c.bytes))
    ours = tuple(c for c in found if c.rank is not None)
    if not ours:
        raise ValueError(
            _nothing_fits(gpu, min(too_large, key=lambda c: (c.rank is None, c.bytes)))
        )
    return Fit(ours, tuple(c for c in found if c.rank is None), config)


def _nothing_fits(gpu: GPU, smallest: Candidate) -> str:
    how = "with" if smallest.checkpointing else "without"
    return (
        f"none of these settings fits into {gpu.memory / 1e9:.2f} GB; the smallest prediction is "
        f"{smallest.bytes / 1e9:.2f} GB (batch {smallest.batch}, rank={smallest.rank}, "
        f"saved={smallest.saved!r}, {how} checkpointing, moments "
        f"{smallest.state_dtype or 'as gradients'}). Layers compiled and stepped one by one take "
        "less: python examples/train_8b.py --count. Here shorter sequences and a smaller rank do, "
        "down to weights and what is in no sketch, such as embeddings and heads"
    )


# --- sizes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Size:
    """Tells what grows with the batch: its bytes are a multiple of a prime that nothing else has.

    Attributes:
        batch: sequences that are traced: such that sketches of some of the tokens, scales of 8 bits
            and masks in single bits come out even.
    """

    prime: int
    batch: int

    @staticmethod
    def of(model: nn.Module, one: Mapping[str, Any], ranks: Sequence[Rank]) -> "_Size":
        """one: the inputs for one sequence."""
        tensors = [*model.parameters(), *model.buffers()]
        numbers = {size for tensor in tensors for size in tensor.shape}
        numbers |= {resolve_rank(rank, number) for rank in ranks for number in numbers}
        counts = [t.numel() for t in _torch.tree_leaves(one) if isinstance(t, Tensor)]
        numbers |= {size for count in counts for size in (count, count - 1, count + 1)}
        prime = next(p for p in _primes() if all(number % p or not number for number in numbers))
        return _Size(prime, prime * (1024 // math.gcd(1024, *counts)))

    def fixed(self, size: int) -> int:
        """A size, but for what grows with the batch."""
        return size if size % self.prime else 0


def _primes() -> Any:
    return (n for n in itertools.count(5) if all(n % d for d in range(2, math.isqrt(n) + 1)))


# --- graphs of few layers ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Graph:
    """One graph in one way to train.

    Attributes:
        plan: None for torch.compile's own.
        extra: bytes that its projections hold beyond what gradients take less.
        whole: its memory, and `fixed`: without what grows with the batch.
        kernels: of each (FLOPs for each sequence, bytes read and written, those for each sequence).
    """

    plan: Plan | None
    extra: int
    whole: GraphMemory
    fixed: GraphMemory
    kernels: Sequence[tuple[float, float, float]]
    inputs: Sequence[Any]


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """What is linear in the number of layers, for any batch.

    Attributes:
        lasting: bytes of weights and buffers.
        gradients, elements: bytes of all gradients, and how many numbers they are.
        in_8_bits: bytes of one of AdamW's two moments in 8 bits.
        projections: bytes that tracked projections hold.
        scratch: bytes that the optimizer's step needs beside gradients.
        flops: of the optimizer's step; `change_flops`: where all projections change.
        extra, extra_each: bytes that sketching keeps beyond torch.compile, and for each sequence.
        sketched: weight gradients.
    """

    lasting: int
    gradients: int
    elements: int
    in_8_bits: int
    projections: int = 0
    scratch: int = 0
    flops: int = 0
    change_flops: int = 0
    extra: int = 0
    extra_each: float = 0
    sketched: int = 0

    def grown(self, other: "_Totals", by: int) -> "_Totals":
        """With what the other has more, so many times."""
        mine, others = asdict(self), asdict(other)
        return _Totals(**{name: mine[name] + by * (others[name] - mine[name]) for name in mine})


@dataclass(frozen=True, kw_only=True)
class _Step:
    """One way to train.

    Attributes:
        moments: by phase: live bytes, with any batch and for each sequence (moments, 2).
        kernels: as those of `_Graph` (kernels, 3).
        given: bytes of inputs, for each sequence.
        largest: elements of the largest gradient.
    """

    moments: Mapping[str, Tensor]
    kernels: Tensor
    given: float
    largest: int
    totals: _Totals


def _traced(
    model: nn.Module, inputs: Mapping[str, Any], configs: Mapping[Any, CompactConfig], size: _Size
) -> dict[Any, _Step]:
    """By key of `configs`, and None for torch.compile's own."""
    with _torch.fake_mode(), torch.enable_grad():
        model, _, inputs = faked((model, (), dict(inputs)))
        given = _torch.tree_leaves(inputs)
        analyse = functools.partial(_analyse, configs, size)
        analyser = Analyser(next(iter(configs.values())), analyse, given)
        output = _torch.call_compiled(model, analyser, (), inputs)
    if getattr(output, "loss", None) is None:
        raise ValueError(
            f"the model's output has no loss for {', '.join(inputs)}: fit trains with it"
        )
    return {
        key: _step(model, [graphs[key] for graphs in analyser.found], storage_bytes(given), size)
        for key in (None, *configs)
    }


def _analyse(
    configs: Mapping[Any, CompactConfig],
    size: _Size,
    joint: JointGraph,
    inputs: Sequence[Any],
    intermediate: set[int],
) -> dict[Any, _Graph]:
    before = partition(joint.copy(), recompute=False)

    def graph(plan: Plan | None, cut: Partition) -> _Graph:
        return _Graph(
            plan,
            0 if plan is None else extra_bytes(plan, joint),
            graph_memory(cut, joint, intermediate),
            graph_memory(cut, joint, intermediate, counted=size.fixed),
            [*_work(cut.forward, size), *_work(cut.backward, size)],
            inputs,
        )

    found = {None: graph(None, before)}
    for key, config in configs.items():
        treatment = Treatment(config.recompute, None if config.saved == "keep" else config.saved)
        found[key] = graph(*choose_for(joint, config, None, before, treatment))
    return found


def _work(module: fx.GraphModule, size: _Size) -> list[tuple[float, float, float]]:
    kernels, sizes = kernels_of(module)
    work: list[tuple[float, float, float]] = []
    for kernel in kernels[:-1]:  # the last one returns
        touched = [sizes[storage] for storage in (*kernel.reads, *kernel.writes)]
        fixed, whole = sum(map(size.fixed, touched)), sum(touched)
        work.append((kernel.flops / size.batch, fixed, (whole - fixed) / size.batch))
    return work


def _step(model: nn.Module, graphs: Sequence[_Graph], given: int, size: _Size) -> _Step:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    planned = [(graph.plan, graph.inputs) for graph in graphs if graph.plan is not None]
    sizes, scratch = sketched_sizes(weights, planned)
    plans = [plan for plan, _ in planned]
    moments = {}
    whole = step_timeline([graph.whole for graph in graphs])
    fixed = step_timeline([graph.fixed for graph in graphs])
    for phase in ("forward", "backward"):
        pairs = [(w.bytes, f.bytes) for w, f in zip(whole, fixed, strict=True) if w.phase == phase]
        moments[phase] = _table([(f, (w - f) / size.batch) for w, f in pairs], 2)
    kept = sum(plan.account.bytes_after - plan.account.bytes_before for plan in plans)
    return _Step(
        moments=moments,
        kernels=_table([kernel for graph in graphs for kernel in graph.kernels], 3),
        given=given / size.batch,
        largest=max(elements for elements, _ in sizes),
        totals=_Totals(
            lasting=storage_bytes([*model.parameters(), *model.buffers()]),
            gradients=sum(elements * itemsize for elements, itemsize in sizes),
            elements=sum(elements for elements, _ in sizes),
            in_8_bits=sum(stored_bytes(elements) for elements, _ in sizes),
            projections=sum(plan.account.projection_bytes for plan in plans),
            scratch=scratch,
            flops=sum(
                2 * math.prod(role.shape) * plan.projections[role.projection].features
                for plan in plans
                for role in plan.factor_inputs
            ),
            change_flops=sum(plan.account.change_flops for plan in plans),
            extra=sum(graph.extra for graph in graphs),
            extra_each=kept / size.batch,
            sketched=sum(len(plan.sketched) for plan in plans),
        ),
    )


def _table(rows: Sequence[Sequence[float]], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).view(-1, columns)


# --- more layers ---------------------------------------------------------------------------------


# By a step for each element: moments are joined, made float32, stepped, joined and rounded.
_MOVED_IN_8_BITS = 56


class _Way:
    """A step with more layers than were traced."""

    def __init__(self, short: _Step, long: _Step, by: int) -> None:
        """by: layers more than `short`, of which `long` has one."""
        self._short, self._long, self._by = short, long, by
        self.totals = short.totals.grown(long.totals, by)
        few, many = short.moments["backward"], long.moments["backward"]
        saved, gradients = many[0] - few[0], many[-1] - few[-1]  # of a layer
        self._moments = torch.cat(
            [
                _stretched(long.moments["forward"], 0 * saved, (by - 1) * saved),
                _stretched(many, (by - 1) * saved, (by - 1) * gradients),
            ]
        )

    def sketches(self, batch: int) -> bool:
        """Whether the backend would: not where that takes more than it saves."""
        more = self.totals.extra + batch * self.totals.extra_each
        return self.totals.sketched > 0 and more <= 0

    def peak(self, batch: int, state_dtype: str | None) -> int:
        """Bytes."""
        fixed, each = self._lines(state_dtype).unbind(1)
        return math.ceil(float((fixed + batch * each).max()))

    def batch(self, memory: int, state_dtype: str | None) -> int:
        """The largest that fits; 0 if none does."""
        fixed, each = self._lines(state_dtype).unbind(1)
        room = memory - fixed
        return int((room / each).min()) if room.min() > 0 else 0

    def _lines(self, state_dtype: str | None) -> Tensor:
        """Of each moment, bytes with any batch, and for each sequence."""
        totals = self.totals
        step = totals.gradients + totals.scratch
        if state_dtype == "fp8":
            step += step_bytes(totals.elements, self._long.largest)
        lasting = totals.lasting + totals.projections + self._state_bytes(state_dtype)
        lines = torch.cat([self._moments, _table([(step, 0)], 2)])
        return lines + _table([(lasting, self._short.given)], 2)

    def _state_bytes(self, state_dtype: str | None) -> int:
        totals = self.totals
        return 2 * (totals.in_8_bits if state_dtype == "fp8" else totals.gradients)

    def seconds(self, batch: int, gpu: GPU, state_dtype: str | None, interval: int) -> float:
        """Of a step, if every kernel reached the GPU's peak rates."""
        short, long = (_seconds(step.kernels, batch, gpu) for step in (self._short, self._long))
        totals = self.totals
        moved = 2 * totals.lasting + totals.gradients + 2 * self._state_bytes(state_dtype)
        if state_dtype == "fp8":
            moved += _MOVED_IN_8_BITS * totals.elements
        flops = totals.flops + totals.change_flops / interval
        return short + self._by * (long - short) + moved / gpu.bandwidth + flops / gpu.flops


def _seconds(kernels: Tensor, batch: int, gpu: GPU) -> float:
    flops, fixed, each = kernels.unbind(1)
    moving = (fixed + batch * each) / gpu.bandwidth
    return float(torch.maximum(batch * flops / gpu.flops, moving).sum())


def _stretched(moments: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Moments of a phase of three layers, as they are at both ends of one of more layers.

    What is alive changes by the same from layer to layer, so that the most is at one of the ends.
    Those of the middle layer may be taken for either end.
    """
    middle = len(moments) // 2
    return torch.cat([moments[:middle] + first, moments[middle:] + last])
