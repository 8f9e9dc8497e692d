"""Nodes of a graph: which operators mean what, and helpers that read and write them.

Operators that passes rewrite are overloads: their arguments are known. Operators that are only read
about are base names, `mm` for all of `aten.mm`: graphs that are read come from anywhere.
"""

import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from compact_fx import _torch

aten = torch.ops.aten


@torch.library.custom_op("compact_fx::grouped_product", mutates_args=())
def _grouped_product(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    result = left.new_zeros(offsets.shape[0], left.shape[0], right.shape[1])
    start = 0
    for expert, stop in enumerate(offsets.tolist()):
        torch.mm(left[:, start:stop], right[start:stop], out=result[expert])
        start = stop
    return result


@_grouped_product.register_fake
def _(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])


GROUPED_PRODUCT = torch.ops.compact_fx.grouped_product.default
"""left (m, tokens), right (tokens, n), where each expert's tokens end -> (experts, m, n).

What `aten._grouped_mm` does, which torch.compile accepts for bfloat16 alone.
"""

MATMULS = {
    aten.mm.default,
    aten.bmm.default,
    aten._grouped_mm.default,  # (left, right, where each expert's tokens end)
    GROUPED_PRODUCT,
}
"""Products over tokens; all but the first give a batch of matrices, one for each expert."""

PERMUTING = {aten.permute.default, aten.transpose.int, aten.t.default}
RESHAPING = {
    aten.view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten._unsafe_view.default,
}
COPYING = {
    aten.clone.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
}


def _names(overloads: set[Any]) -> set[str]:
    return {overload._schema.name.split("::")[1] for overload in overloads}


SCALED_PRODUCT_NAMES = {
    "_scaled_mm",
    "_scaled_mm_v2",
    "_scaled_grouped_mm",
    "_scaled_grouped_mm_v2",
}
"""Products of operands in 8 bits or fewer, times their scales."""
PRODUCT_NAMES = _names(MATMULS) | SCALED_PRODUCT_NAMES | {"addmm", "baddbmm", "grouped_mm"}
PRODUCT_NAMES |= {"convolution_backward"}  # which reads a convolution's input alike
_RELABELLING_NAMES = _names(PERMUTING | RESHAPING | COPYING) | {"expand", "alias"}


SKETCH = "compact_fx.sketch"
"""In `node.meta` of a sketch x P: its number in the plan."""
WEIGHT = "compact_fx.weight"
"""In `node.meta` of a projection: the name of the first weight that is sketched with it."""

_KEPT_META = ("stack_trace", "nn_module_stack", "seq_nr", "partitioner_tag", "custom")


def insert(
    graph: fx.Graph, target: Callable[..., Any], args: Sequence[Any], *, like: fx.Node, name: str
) -> fx.Node:
    """A new node at the insertion point, with its fake value and the provenance of `like`."""
    values = fx.map_arg(tuple(args), lambda node: node.meta["val"])
    with _torch.fake_mode_of(like.meta["val"]):
        value = target(*values)
    node = graph.create_node("call_function", target, tuple(args), name=name)
    node.meta = {key: like.meta[key] for key in _KEPT_META if key in like.meta}
    node.meta["val"] = value
    return node


def transposed(graph: fx.Graph, node: fx.Node, *, like: fx.Node, name: str = "rows") -> fx.Node:
    """A new node that swaps the last two dimensions, of a matrix or of a batch of them."""
    *batch, rows, columns = range(node.meta["val"].dim())
    order = [*batch, columns, rows]
    return insert(graph, aten.permute.default, (node, order), like=like, name=name)


def inline(graph: fx.Graph, function: Callable[..., Any], *nodes: fx.Node) -> list[fx.Node]:
    """Write a function of these nodes into the graph, at the insertion point; its results."""
    template = _torch.trace(function, *(node.meta["val"] for node in nodes)).graph
    return insert_copy(graph, template, nodes)


def insert_copy(graph: fx.Graph, template: fx.Graph, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Write a graph of aten operators into another one, with these nodes as its inputs."""
    copies: dict[fx.Node, fx.Node] = {}
    inputs = iter(nodes)
    for node in template.nodes:
        if node.op == "placeholder":
            copies[node] = next(inputs)
        elif node.op != "output":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return [copies[node] for node in template.output_node().all_input_nodes]


def permutation(node: fx.Node) -> list[int] | None:
    """For a node that only permutes dimensions: for each of its own, which of its input's."""
    if node.target not in PERMUTING:
        return None
    order = list(range(node.meta["val"].dim()))
    if node.target is aten.permute.default:
        return [order[i] for i in node.args[1]]  # type: ignore[union-attr,index]
    if node.target is aten.transpose.int:
        i, j = node.args[1:3]
        order[i], order[j] = order[j], order[i]  # type: ignore[index]
        return order
    return order[::-1]


def is_transposition(node: fx.Node) -> bool:
    """Whether the node swaps the last two dimensions, of a matrix or of a batch of them."""
    order = permutation(node)
    if order is None or len(order) < 2:
        return False
    *batch, rows, columns = range(len(order))
    return order == [*batch, columns, rows]


def is_relabelling(node: fx.Node) -> bool:
    """Whether a node has the values of its input: a view, a copy or a cast."""
    return node.op == "call_function" and operator_base(node) in _RELABELLING_NAMES


def is_tangent(node: fx.Node) -> bool:
    """Whether a node is a gradient that flows into a joint or backward graph."""
    return node.op == "placeholder" and "tangents" in str(node.target)


def gradient_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes of a joint or backward graph that depend on a gradient that flows in."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if is_tangent(node) or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def is_view(node: fx.Node) -> bool:
    """Whether a node reads its input's memory in another shape or order, with fixed sizes."""
    if node.target not in PERMUTING | RESHAPING | {aten.alias.default}:
        return False
    source = node.args[0]
    return (
        isinstance(source, fx.Node)
        and storage_of(source) == storage_of(node)
        and node.all_input_nodes == [source]
    )


def is_tensor(node: fx.Node) -> bool:
    """Whether the node's value is a tensor, and not a symbolic size."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def storage_of(node: fx.Node) -> int:
    """An identity of the storage behind a node's value."""
    try:
        return _torch.storage_id(node.meta["val"])
    except NotImplementedError:  # a sparse or opaque tensor has none
        return id(node)


def bytes_of(node: fx.Node) -> int:
    """Bytes of the storage behind a node's value; symbolic sizes count with their hint."""
    value = node.meta["val"]
    try:
        return _torch.size_hint(value.untyped_storage().nbytes())
    except NotImplementedError:
        return _torch.size_hint(value.numel()) * int(value.element_size())


def elements_of(node: fx.Node) -> int:
    """How many values a node's tensor has; symbolic sizes count with their hint."""
    return _torch.size_hint(node.meta["val"].numel())


def update_value(node: fx.Node) -> None:
    """A new fake value, from those of its arguments."""
    arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with _torch.fake_mode_of(node.meta["val"]):
        node.meta["val"] = node.target(*arguments, **keywords)  # type: ignore[operator]
    node.meta.pop("tensor_meta", None)


def _views_another(node: fx.Node) -> bool:
    """Whether its value is a view of what was in its argument's place before."""
    if not (_torch.makes_view(node.target) and is_tensor(node)):
        return False
    source = next(iter(node.args), None)
    if not (isinstance(source, fx.Node) and is_tensor(source)):
        return False
    return storage_of(source) != storage_of(node)


def finish(module: fx.GraphModule) -> None:
    """Drop what a pass made dead, check the graph and make its code current.

    Views get the memory of what they view now: the partitioner makes equal nodes one, but for
    those in the memory of an output.
    """
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if _views_another(node):
            update_value(node)
    module.graph.lint()
    module.recompile()


def mark_recomputed(node: fx.Node) -> None:
    """Never save this node: each side of the boundary that needs it computes it."""
    node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE


def is_recomputed(node: fx.Node) -> bool:
    """Whether `mark_recomputed` was called for this node."""
    return node.meta.get("recompute") is CheckpointPolicy.MUST_RECOMPUTE


def mark_saved(node: fx.Node) -> None:
    """Save this node, even if it could be recomputed."""
    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def operator_base(node: fx.Node) -> str:
    """`mm` of `aten.mm.default`: all overloads of an operator alike."""
    return _torch.operator_name(node).split(".")[0]


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*(?:\n +([^\n]+))?')
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


def source_line(node: fx.Node) -> str:
    """`modeling.py:12: y = self.proj(x)`: the innermost line outside of torch; "" if unknown."""
    frames = _FRAME.findall(node.stack_trace or "")
    own = [frame for frame in frames if not frame[0].startswith(_TORCH_FOLDER)]
    if not frames:
        return ""
    file, line, code = (own or frames)[-1]
    return f"{os.path.basename(file)}:{line}" + (f": {code.strip()}" if code else "")
