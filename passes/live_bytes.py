"""How many bytes are alive at each operator of a cut graph, predicted."""

import operator
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from compact_fx import _torch
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import (
    bytes_of,
    elements_of,
    is_tangent,
    is_tensor,
    operator_base,
    storage_of,
)
from compact_fx.passes.partition import Partition

aten = torch.ops.aten

Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True)
class Moment:
    """What is alive while one operator runs.

    Attributes:
        operator: `mm.default`; "" for the state before the first.
        bytes: of everything but what lasts for the whole run (weights, states, inputs).
        gradients: how many of them are gradients that a backward pass has made.
    """

    phase: Phase
    operator: str
    bytes: int
    gradients: int = 0


@dataclass(frozen=True)
class GraphMemory:
    """One compiled graph, as far as memory goes.

    Attributes:
        forward, backward: live bytes at each operator, without what is there for the whole step.
        saved: bytes that cross from one to the other.
        held: those of them that are not there for the whole step anyway.
        gradients: bytes that are left when the backward is over.
    """

    forward: tuple[Moment, ...]
    backward: tuple[Moment, ...]
    saved: int
    held: int

    @property
    def peak(self) -> int:
        """The most that is alive at one time."""
        return max(moment.bytes for moment in (*self.forward, *self.backward))

    @property
    def gradients(self) -> int:
        return self.backward[-1].bytes


def graph_memory(
    cut: Partition,
    joint: JointGraph,
    intermediate: Collection[int] = (),
    *,
    with_reuse: bool = False,
    counted: Callable[[int], int] = int,
) -> GraphMemory:
    """Follow the memory of both graphs of a partition, operator by operator.

    Inductor writes a pointwise result to memory only where a kernel that cannot compute it on the
    fly reads it. That is modelled here: values that only fused kernels read take no memory, and
    what they are computed from stays alive until the last of these kernels.

    Args:
        cut: the partition.
        joint: what it is of; its inputs are there for the whole step,
        intermediate: but for those at these indices, which come from another graph.
        with_reuse: it is torch.compile's own: this project has Inductor reuse no buffers on CUDA.
        counted: makes of the bytes of a storage those that count.
    """
    inputs = [*filter(is_tensor, joint.module.graph.find_nodes(op="placeholder"))]
    tangents = {storage_of(node) for node in inputs if is_tangent(node)}
    lasting = {
        storage_of(node) for node in inputs if _torch.input_index(node) not in intermediate
    } - tangents
    results = {storage_of(node) for node in cut.results if is_tensor(node)}
    kept = results | cut.storages
    how: dict[str, Any] = {"with_reuse": with_reuse, "counted": counted}
    forward = _moments(cut.forward, "forward", lasting, kept, **how)
    outputs = filter(is_tensor, cut.backward.graph.output_node().all_input_nodes)
    gradients = {storage_of(node) for node in outputs}
    backward = _moments(cut.backward, "backward", lasting, gradients, lent=tangents, **how)
    crossing = {storage: counted(saved.bytes) for storage, saved in cut.saved_by_storage.items()}
    held = sum(crossing[storage] for storage in cut.storages - lasting)
    return GraphMemory(tuple(forward), tuple(backward), sum(crossing.values()), held)


def _moments(
    module: fx.GraphModule,
    phase: Phase,
    static: set[int],
    kept: set[int],
    *,
    with_reuse: bool,
    counted: Callable[[int], int],
    lent: Collection[int] = (),
) -> list[Moment]:
    """Live bytes at each operator that writes memory.

    lent: storages of inputs that the caller keeps until the end: autograd does, of tangents.
    """
    steps, sizes = kernels_of(module)
    sizes = {storage: counted(size) for storage, size in sizes.items()}
    last = {storage: i for i, step in enumerate(steps) for storage in step.reads}
    live = {
        storage_of(node): counted(bytes_of(node))
        for node in module.graph.find_nodes(op="placeholder")
        if is_tensor(node)
    }
    live = {storage: size for storage, size in live.items() if storage not in static}
    given = frozenset(live)
    start = now = sum(live.values())
    alive: list[int] = []  # bytes at each step
    written: list[list[int]] = []  # bytes of each tensor that gets memory at a step
    freed: list[list[int]] = []  # bytes of each that is done with, but for the graph's inputs
    late = [0] * len(steps)  # bytes that are held although Inductor counts them as free
    returned, ready = 0, []  # bytes of the graph's results so far, at each step
    for i, step in enumerate(steps):
        dying = [s for s in step.reads if last[s] == i and s in live and s not in kept]
        new = [s for s in step.writes if s not in live and s not in static]
        # One result takes the place of what nothing reads later, but not of the graph's inputs.
        if step.fused and len(step.writes) == 1:
            now -= sum(live.pop(storage) for storage in dying if storage not in given)
        live.update({storage: sizes[storage] for storage in new})
        now += sum(sizes[storage] for storage in new)
        alive.append(now)
        returned += sum(sizes[storage] for storage in new if storage in kept)
        ready.append(returned if phase == "backward" else 0)
        gone = [s for s in dying if s in live]
        gone += [s for s in new if s not in last and s not in kept]
        now -= sum(live.pop(storage) for storage in gone)
        written.append([sizes[storage] for storage in new])
        freed.append([sizes[storage] for storage in gone if storage not in given])
        late[i] = sum(sizes[storage] for storage in gone if storage in lent)
    if with_reuse:
        _keep_for_reuse(alive, written, freed)
    moments, after = [Moment(phase, "", start)], 0
    for step, size, made, released in zip(steps, alive, ready, late, strict=True):
        moments.append(Moment(phase, step.operator, size + counted(step.workspace) + after, made))
        after += released
    moments[-1] = replace(moments[-1], bytes=alive[-1])
    return moments


def _keep_for_reuse(alive: list[int], written: list[list[int]], freed: list[list[int]]) -> None:
    """Add to live bytes what Inductor does not free, since a later result takes its place.

    It does so where its own estimate of the peak, which knows no workspaces, stays what it is
    (`AllocateLine.should_reuse_buffer`).
    """
    peak = max(alive)
    free: dict[int, list[int]] = {}  # by size: the steps since which such memory is not used
    for i, new in enumerate(written):
        for size in new:
            since = free.get(size)
            if not since:
                continue
            between = alive[since[-1] + 1 : i]
            if max(between, default=0) + size <= peak:
                start = since.pop() + 1
                alive[start:i] = [bytes_ + size for bytes_ in between]
        for size in freed[i]:
            free.setdefault(size, []).append(i)


@dataclass(frozen=True)
class Kernel:
    """An operator that writes memory, with everything that is fused into it.

    Attributes:
        elements: how many it runs over, if it may be fused with others, or 0.
        workspace: bytes that it takes for itself.
        flops: of matrix products and attention; of others 0.
    """

    operator: str
    reads: frozenset[int]
    writes: frozenset[int]
    elements: int
    workspace: int = 0
    flops: int = 0

    @property
    def fused(self) -> bool:
        return self.elements > 0


# Inductor computes a value with more than one reader on the fly only up to so many buffers.
_MOST_READS = 4


def kernels_of(module: fx.GraphModule) -> tuple[list[Kernel], dict[int, int]]:
    """The operators that write memory, in order, and the bytes of every storage."""
    returned = {storage_of(n) for n in module.graph.output_node().all_input_nodes if is_tensor(n)}
    readers = _readers(module.graph)
    sizes: dict[int, int] = {}
    on_the_fly: dict[int, frozenset[int]] = {}  # what to read to compute a value that is not stored
    passed_on: dict[fx.Node, frozenset[int]] = {}  # the same for tuples and numbers
    kernels: list[Kernel] = []

    def needed(node: fx.Node) -> frozenset[int]:
        if not is_tensor(node):
            return passed_on.get(node, frozenset())
        storage = storage_of(node)
        return on_the_fly.get(storage, frozenset([storage]))

    for node in module.graph.nodes:
        reads = frozenset[int]().union(*map(needed, node.all_input_nodes))
        if not is_tensor(node):
            passed_on[node] = reads
            continue
        storage = storage_of(node)
        if storage in sizes or storage in on_the_fly:  # a view, or written in place
            continue
        users = readers.get(storage, [])
        fused = node.op == "call_function" and _is_fused(node)
        inlined = fused and storage not in returned and all(map(_reads_on_the_fly, users))
        if inlined and (len(users) < 2 or len(reads) <= _MOST_READS):
            on_the_fly[storage] = reads
            continue
        sizes[storage] = bytes_of(node)
        if node.op != "placeholder":
            made = frozenset([storage])
            name = _torch.operator_name(node)
            costs = (_elements(node), _workspace(node), _flops(node))
            kernels.append(Kernel(name, reads, made, *costs))
    kernels.append(Kernel("return", frozenset(returned), frozenset(), 0))
    return _fused_side_by_side(kernels, sizes), sizes


# How far Inductor's scheduler looks for kernels to fuse, in kernels; most pairs are close.
_WINDOW = 64


def _fused_side_by_side(kernels: list[Kernel], sizes: dict[int, int]) -> list[Kernel]:
    """Make one kernel of those over equally many elements that share a tensor of this size.

    Inductor does so to read the tensor once. All results are then there at the same time, and
    before the first would have been needed.
    """
    writer = {storage: i for i, kernel in enumerate(kernels) for storage in kernel.writes}
    group = list(range(len(kernels)))  # of each kernel: the last one that is fused with it
    members = {i: [i] for i in group}

    def needs(later: int, earlier: int) -> bool:
        """Whether a group depends on another one through a third."""
        seen, pending = {later}, [later]
        while pending:
            current = pending.pop()
            for member in members[current]:
                for storage in kernels[member].reads & writer.keys():
                    source = group[writer[storage]]
                    if source == earlier and current != later:
                        return True
                    if source not in seen and source > members[earlier][0]:
                        seen.add(source)
                        pending.append(source)
        return False

    touched: dict[int, list[int]] = {}  # by storage: the kernels that read or write it, so far
    for j, kernel in enumerate(kernels):
        if not kernel.fused:
            continue
        own = [s for s in (*kernel.reads, *kernel.writes) if sizes.get(s, 0) >= kernel.elements]
        for i in dict.fromkeys(i for storage in own for i in touched.get(storage, ())):
            alike = kernels[i].elements == kernel.elements
            if alike and j - i <= _WINDOW and group[i] != j and not needs(j, group[i]):
                moved = members.pop(group[i])
                members[j] = sorted(moved + members[j])
                for member in moved:
                    group[member] = j
        for storage in own:
            touched.setdefault(storage, []).append(j)
    readers: dict[int, set[int]] = {}
    for i, kernel in enumerate(kernels):
        for storage in kernel.reads:
            readers.setdefault(storage, set()).add(group[i])
    merged = {
        g: _together([kernels[i] for i in own], {s for s, by in readers.items() if by == {g}})
        for g, own in members.items()
    }
    made_by = {storage: group[i] for storage, i in writer.items()}
    return [merged[g] for g in _sorted(merged, made_by)]


def _together(kernels: list[Kernel], inner: set[int]) -> Kernel:
    """One kernel; what only its members read is never written."""
    reads = frozenset[int]().union(*(kernel.reads for kernel in kernels))
    writes = frozenset[int]().union(*(kernel.writes for kernel in kernels))
    return replace(kernels[-1], reads=reads - writes, writes=writes - inner)


def _sorted(groups: dict[int, Kernel], made_by: dict[int, int]) -> Iterator[int]:
    """Groups in the order of their last kernels, each behind those that it needs."""
    opened: set[int] = set()
    done: set[int] = set()
    for first in sorted(groups):
        pending = [first]
        while pending:
            current = pending[-1]
            if current in opened:  # what it needs is done, or part of a ring of groups
                pending.pop()
                if current not in done:
                    done.add(current)
                    yield current
                continue
            opened.add(current)
            sources = {made_by[storage] for storage in groups[current].reads & made_by.keys()}
            pending += sorted(sources - opened, reverse=True)


def _readers(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """By storage: the nodes that read it and are no views of it."""
    readers: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for source in filter(is_tensor, node.all_input_nodes):
            if not (is_tensor(node) and storage_of(node) == storage_of(source)):
                readers.setdefault(storage_of(source), []).append(node)
    return readers


_MADE_ON_THE_FLY = {"iota", "full", "arange", "scalar_tensor", "convert_element_type", "where"}
_MADE_ON_THE_FLY |= {"full_like", "clone", "_to_copy", "index", "gather", "embedding", "fma"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "prod", "any", "all", "var", "var_mean", "argmax"}
_SCATTERS = {"index_put", "scatter", "scatter_add", "_unsafe_masked_index_put_accumulate"}
_SCATTERS |= {"_unsafe_index_put", "constant_pad_nd", "slice_scatter", "select_scatter", "copy_"}


def _is_fused(node: fx.Node) -> bool:
    """Whether Inductor can compute one element of the result wherever it is read."""
    tags = getattr(node.target, "tags", ())
    name = operator_base(node)
    return torch.Tag.pointwise in tags or name in _MADE_ON_THE_FLY


def _elements(node: fx.Node) -> int:
    """How many a fused kernel runs over; 0 where it is none. Sums over rows are fused as well."""
    if node.op == "call_function" and _is_fused(node):
        return elements_of(node)
    if operator_base(node) in _REDUCTIONS and len(node.args) > 1:
        (of, dims, *_) = node.args
        if isinstance(of, fx.Node) and is_tensor(of) and isinstance(dims, list | tuple):
            rank = of.meta["val"].dim()
            if [dim % rank for dim in dims] == list(range(rank - len(dims), rank)):
                return elements_of(of) if elements_of(node) > 1 else 0
    return 0


def _workspace(node: fx.Node) -> int:
    """Attention's backward adds up the gradient of the queries in float32, in all libraries."""
    name = _torch.operator_name(node)
    if "attention" in name and "backward" in name:
        call = node if node.target is not operator.getitem else node.args[0]
        return 4 * elements_of(call.args[1])  # type: ignore[union-attr,arg-type]
    return 0


def _flops(node: fx.Node) -> int:
    """As torch's counter has them; of an operator with several results, at the first."""
    if node.target is operator.getitem:
        call, at = node.args
        return _flops(call) if at == 0 else 0  # type: ignore[arg-type]
    packet: Any = getattr(node.target, "overloadpacket", None)
    formula = flop_registry.get(_ON_GPUS.get(packet, packet))
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    return _torch.size_hint(formula(*args, **kwargs, out_val=node.meta["val"]))


# The CPU's kernels, which torch's counter does not know, by those of GPUs with the same arguments.
_ON_GPUS = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}


def _reads_on_the_fly(node: fx.Node) -> bool:
    """Whether the operator's kernel can compute what it reads."""
    name = operator_base(node)
    return _is_fused(node) or name in _REDUCTIONS or name in _SCATTERS
