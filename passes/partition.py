"""Cut the joint graph in two and say what crosses."""

import functools
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from compact_fx import _torch
from compact_fx.errors import CannotCompact
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import (
    PRODUCT_NAMES,
    SKETCH,
    bytes_of,
    is_recomputed,
    is_relabelling,
    is_tensor,
    mark_saved,
    source_line,
    storage_of,
)
from compact_fx.plan import Saved, SavedKind
from compact_fx.projections import RANDOM_PROJECTION


@dataclass(frozen=True)
class Partition:
    """The two graphs and what the forward keeps for the backward.

    Attributes:
        num_fwd_outputs: how many of the forward's outputs are not for the backward alone.
        lasting: storages that are there anyway, of parameters, buffers and keys.
        packed: storage of a part that crosses → of what it is a part of, and its description.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    num_fwd_outputs: int
    lasting: frozenset[int]
    packed: Mapping[int, tuple[int, Saved]] = field(default_factory=dict)

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The forward's outputs that are not for the backward alone."""
        outputs = self._outputs[: self.num_fwd_outputs]
        return tuple(node for node in outputs if isinstance(node, fx.Node))

    @property
    def _outputs(self) -> list[Any]:
        return list(self.forward.graph.output_node().args[0])  # type: ignore[arg-type]

    def crossing(self) -> Iterator[tuple[int, fx.Node, fx.Node]]:
        """Tensors that cross: at which output, the forward's node, and the backward's input.

        Raises:
            CannotCompact: the two halves do not fit together.
        """
        received = filter(is_tensor, self.backward.graph.find_nodes(op="placeholder"))
        for at, node in enumerate(self._outputs):
            if at < self.num_fwd_outputs or not (isinstance(node, fx.Node) and is_tensor(node)):
                continue
            arriving = next(received, None)
            if arriving is None or arriving.meta["val"].shape != node.meta["val"].shape:
                raise CannotCompact("what the forward saves is not what the backward receives")
            yield at, node, arriving

    @functools.cached_property
    def saved_by_storage(self) -> dict[int, Saved]:
        """What crosses, one for each storage that does not last."""
        saved: dict[int, Saved] = {}
        for _, node, received in self.crossing():
            storage = storage_of(node)
            if storage in self.packed:
                saved[storage] = self.packed[storage][1]
            elif storage not in self.lasting and storage not in saved:
                saved[storage] = _describe(node, received)
        return saved

    def bytes_for(self, storages: Set[int]) -> int:
        """Bytes that cross of these storages, packed or not."""
        return sum(
            saved.bytes
            for storage, saved in self.saved_by_storage.items()
            if self.packed.get(storage, (storage,))[0] in storages
        )

    @property
    def saved(self) -> tuple[Saved, ...]:
        """What crosses, in the order of the forward's outputs."""
        return tuple(self.saved_by_storage.values())

    @property
    def storages(self) -> set[int]:
        """The storages that cross, to ask whether an activation does."""
        return set(self.saved_by_storage)

    @property
    def bytes(self) -> int:
        """Bytes that cross."""
        return sum(saved.bytes for saved in self.saved)


def partition(joint: JointGraph, *, recompute: bool, early: Sequence[fx.Node] = ()) -> Partition:
    """Split a joint graph with torch's min-cut.

    ::

        joint(primals, tangents) -> outputs, gradients
        forward(primals) -> outputs, saved        backward(saved, tangents) -> gradients

    Args:
        joint: taken over.
        recompute: matmul inputs may be rebuilt in the backward pass.
        early: nodes that the forward has to compute.

    Raises:
        CannotCompact: a projection would be saved instead of drawn again.

    Contract: both graphs together compute what the joint graph does.
    """
    if joint.like_eager:
        _keep_what_backward_reads(joint)
    forward, backward = _torch.min_cut(
        joint.module,
        joint.num_fwd_outputs,
        joint.lasting_inputs(),
        recompute_matmul_inputs=recompute,
        in_forward=early,
    )
    # Views of parameters cross as well; their storages are there anyway.
    lasting = frozenset(storage_of(node) for node in joint.static_placeholders())
    halves = Partition(forward, backward, joint.num_fwd_outputs, lasting)
    if any(node.target is RANDOM_PROJECTION for _, node, _ in halves.crossing()):
        raise CannotCompact("the partitioner would save a projection")
    return halves


def _keep_what_backward_reads(joint: JointGraph) -> None:
    """Mark each tensor of the forward that an operator of the backward reads: autograd keeps it."""
    backward = joint.backward_nodes()
    backward |= {node for node in joint.module.graph.nodes if is_recomputed(node)}
    lasting = joint.static_placeholders()
    for node in joint.module.graph.nodes:
        if is_tensor(node) and node not in backward | lasting and backward & set(node.users):
            mark_saved(node)


def _describe(node: fx.Node, received: fx.Node) -> Saved:
    """What crosses: a node of the forward, and the placeholder it is in the backward."""
    value = node.meta["val"]
    readers = tuple(dict.fromkeys(_torch.operator_name(reader) for reader in _readers(received)))
    return Saved(
        name=node.name,
        op=_torch.operator_name(node),
        shape=str(tuple(value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        bytes=bytes_of(node),
        kind=_kind(node, readers),
        readers=readers,
        source=source_line(node),
    )


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a node's values: through views and casts, which are no reason to keep it."""
    found: list[fx.Node] = []
    for user in node.users:
        found += _readers(user) if is_relabelling(user) else [user]
    return found


def _kind(node: fx.Node, readers: Sequence[str]) -> SavedKind:
    if SKETCH in node.meta:
        return "sketch"
    if not node.meta["val"].dtype.is_floating_point:
        return "index or mask"
    if any("attention" in reader for reader in readers):
        return "attention"
    if any(reader.split(".")[0] in PRODUCT_NAMES for reader in readers):
        return "matmul input"
    return "norm or activation"
