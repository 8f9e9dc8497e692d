"""Cut the joint graph in two and say what crosses."""

from collections.abc import Sequence
from dataclasses import dataclass

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
        results: the forward's outputs that are not for the backward alone.
        saved_by_storage: one for each storage that is no parameter, buffer or key.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    results: tuple[fx.Node, ...]
    saved_by_storage: dict[int, Saved]

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
    free = {storage_of(node) for node in joint.static_placeholders()}
    saved: dict[int, Saved] = {}
    received = {node.name: node for node in backward.graph.find_nodes(op="placeholder")}
    outputs = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    for node in outputs[joint.num_fwd_outputs :]:
        if isinstance(node, fx.Node) and node.target is RANDOM_PROJECTION:
            raise CannotCompact("the partitioner would save a projection")
        if isinstance(node, fx.Node) and is_tensor(node) and storage_of(node) not in free:
            saved.setdefault(storage_of(node), _describe(node, received.get(node.name, node)))
    results = tuple(n for n in outputs[: joint.num_fwd_outputs] if isinstance(n, fx.Node))
    return Partition(forward, backward, results, saved)


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
