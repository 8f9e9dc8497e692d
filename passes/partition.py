"""Cut the joint graph in two and say what crosses."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.errors import CannotCompact
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.plan import Saved
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
    forward, backward = _torch.min_cut(
        joint.module,
        joint.num_fwd_outputs,
        joint.static_inputs,
        recompute_matmul_inputs=recompute,
        in_forward=early,
    )
    # Views of parameters cross as well; their storages are there anyway.
    free = {storage_of(node) for node in joint.static_placeholders()}
    saved: dict[int, Saved] = {}
    outputs = list(forward.graph.output_node().args[0])  # type: ignore[arg-type]
    for node in outputs[joint.num_fwd_outputs :]:
        if isinstance(node, fx.Node) and node.target is RANDOM_PROJECTION:
            raise CannotCompact("the partitioner would save a projection")
        if isinstance(node, fx.Node) and is_tensor(node) and storage_of(node) not in free:
            saved.setdefault(storage_of(node), _describe(node))
    results = tuple(n for n in outputs[: joint.num_fwd_outputs] if isinstance(n, fx.Node))
    return Partition(forward, backward, results, saved)


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is a tensor, and not a symbolic size."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def storage_of(node: fx.Node) -> int:
    """An identity of the storage behind a node's value."""
    try:
        return int(node.meta["val"].untyped_storage()._cdata)
    except NotImplementedError:  # a sparse or opaque tensor has none
        return id(node)


def bytes_of(node: fx.Node) -> int:
    """Bytes of the storage behind a node's value; symbolic sizes count with their hint."""
    value = node.meta["val"]
    try:
        return _torch.size_hint(value.untyped_storage().nbytes())
    except NotImplementedError:
        return _torch.size_hint(value.numel()) * int(value.element_size())


def _describe(node: fx.Node) -> Saved:
    value = node.meta["val"]
    return Saved(
        name=node.name,
        op=str(node.target),
        shape=str(tuple(value.shape)),
        dtype=str(value.dtype).removeprefix("torch."),
        bytes=bytes_of(node),
    )
