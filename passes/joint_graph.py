"""The graph that the passes work on: AOTAutograd's forward and backward in one."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.errors import CannotCompact
from compact_fx.plan import Proxy
from compact_fx.projections import Projection

aten = torch.ops.aten


@dataclass(frozen=True)
class JointGraph:
    """A joint graph and what its inputs mean.

    Attributes:
        module: outputs are the forward's, then one gradient (or None) for each input.
        num_fwd_outputs: how many of the outputs are the forward's.
        static_inputs: positions of placeholders that outlive the step, as far as torch says so.
        weights: input index → qualified name, of the parameters.
        buffers: input indices of the buffers.
        key_inputs: input indices of the projections' keys or tables, in the plan's order.
        proxy_inputs: input indices of the plan's proxies; empty while the plan is being made.
        like_eager: cut it as eager autograd would, which recomputes nothing; to compare with.
    """

    module: fx.GraphModule
    num_fwd_outputs: int
    static_inputs: tuple[int, ...]
    weights: Mapping[int, str]
    buffers: frozenset[int] = frozenset()
    key_inputs: tuple[int, ...] = ()
    proxy_inputs: tuple[int, ...] = ()
    like_eager: bool = False

    def copy(self) -> "JointGraph":
        """The same with a graph of its own; nodes keep their names."""
        graph = copy.deepcopy(self.module.graph)
        return replace(self, module=fx.GraphModule(self.module, graph))

    def with_keys(
        self, projections: Sequence[Projection], proxies: Sequence[Proxy] = ()
    ) -> "JointGraph":
        """A copy with inputs for projections and for proxies, as the compiled graph has."""
        duplicate = self.copy()
        graph, inputs = duplicate.module.graph, duplicate.inputs()
        weights = duplicate.weight_inputs()
        first = max(inputs) + 1
        last = inputs[max(inputs)]
        count = len(projections)
        if not count:
            return duplicate
        like = next(iter(weights.values())).meta["val"]
        with _torch.fake_mode_of(like):
            values = [p.source(like.new_empty((), dtype=torch.int64)) for p in projections]
        values += [weights[p.index].meta["val"].new_empty(1).expand(p.shape) for p in proxies]
        for index, value in enumerate(values, first):
            with graph.inserting_after(last):
                kind = "table" if value.dim() else "key"
                kind = kind if index < first + count else "proxy"
                last = graph.placeholder(f"{kind}_{index}")
            last.meta["val"] = value
            _torch.set_input_index(last, index)
        end = first + len(values)
        _torch.add_gradient_outputs(graph, range(first + count, end))
        return replace(
            duplicate,
            key_inputs=tuple(range(first, first + count)),
            proxy_inputs=tuple(range(first + count, end)),
        )

    def inputs(self) -> dict[int, fx.Node]:
        """Placeholders by the input of Dynamo's graph that they are."""
        found = self.module.graph.find_nodes(op="placeholder")
        return {i: node for node in found if (i := _torch.input_index(node)) is not None}

    def gradients(self) -> dict[int, fx.Node | None]:
        """By input index: the node of that input's gradient, None where it gets none."""
        outputs = list(self.module.graph.output_node().args[0])  # type: ignore[arg-type]
        descriptors = _torch.output_descriptors(self.module.graph)
        if len(outputs) != len(descriptors):
            raise CannotCompact("the joint graph's outputs are not described one by one")
        pairs = list(zip(outputs, descriptors, strict=True))[self.num_fwd_outputs :]
        return {
            index: node  # type: ignore[misc]
            for node, descriptor in pairs
            if (index := _torch.gradient_index(descriptor)) is not None
        }

    def gradient_positions(self) -> dict[int, int]:
        """By input index: where among the outputs that input's gradient is."""
        descriptors = _torch.output_descriptors(self.module.graph)
        found = ((_torch.gradient_index(d), at) for at, d in enumerate(descriptors))
        return {index: at for index, at in found if index is not None}

    def mutates_inputs(self) -> bool:
        """Whether a parameter, buffer or other input has another value after the forward."""
        graph = self.module.graph
        copies = graph.find_nodes(op="call_function", target=aten.copy_.default)
        return bool(copies) or any(map(_torch.is_mutation, _torch.output_descriptors(graph)))

    def backward_nodes(self) -> set[fx.Node]:
        """Nodes that depend on a gradient that flows in."""
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            is_tangent = node.op == "placeholder" and "tangents" in str(node.target)
            if is_tangent or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def activation_nodes(self) -> set[fx.Node]:
        """Nodes that depend on an input that is no parameter and no buffer."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        found = set(placeholders) - self.static_placeholders()
        for node in self.module.graph.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def static_placeholders(self) -> set[fx.Node]:
        """Placeholders that outlive the step: parameters, buffers and keys."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        lasting = {*self.weights, *self.buffers, *self.key_inputs, *self.proxy_inputs}
        return {
            node
            for position, node in enumerate(placeholders)
            if position in self.static_inputs or _torch.input_index(node) in lasting
        }

    def lasting_inputs(self) -> list[int]:
        """Positions of placeholders that are no activations: also those that this project adds."""
        added = {*self.key_inputs, *self.proxy_inputs}
        placeholders = self.module.graph.find_nodes(op="placeholder")
        return [
            position
            for position, node in enumerate(placeholders)
            if position in self.static_inputs or _torch.input_index(node) in added
        ]

    def weight_inputs(self) -> dict[int, fx.Node]:
        """Placeholders of the parameters, by input index."""
        return {index: node for index, node in self.inputs().items() if index in self.weights}


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


PERMUTING = {aten.permute.default, aten.transpose.int, aten.t.default}


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


_RELABELLING = {
    "permute",
    "transpose",
    "t",
    "view",
    "reshape",
    "_unsafe_view",
    "squeeze",
    "unsqueeze",
    "expand",
    "alias",
    "clone",
    "_to_copy",
    "convert_element_type",
}


def is_relabelling(node: fx.Node) -> bool:
    """Whether a node has the values of its input: a view, a copy or a cast."""
    return node.op == "call_function" and _torch.operator_base(node) in _RELABELLING


def finish(module: fx.GraphModule) -> None:
    """Drop what a pass made dead, check the graph and make its code current."""
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
