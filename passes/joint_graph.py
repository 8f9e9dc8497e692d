"""The graph that the passes work on: AOTAutograd's forward and backward in one."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.errors import CannotCompact
from compact_fx.passes.nodes import gradient_nodes
from compact_fx.passes.split_grouped_backward import split_grouped_backward
from compact_fx.plan import FactorInput, Plan, ProjectionInput, Side

aten = torch.ops.aten


@dataclass(frozen=True)
class Earlier:
    """What the graphs of one backend say to those that come after them.

    Attributes:
        vocabularies: shapes of their tables of words.
        allowed: the most bytes that a share in `memory_budget` has allowed to one of them.
    """

    vocabularies: frozenset[tuple[int, int]] = frozenset()
    allowed: int = 0


@dataclass(frozen=True)
class JointGraph:
    """A joint graph and what its inputs mean.

    Attributes:
        module: outputs are the forward's, then one gradient (or None) for each input.
        num_fwd_outputs: how many of the outputs are the forward's.
        static_inputs: positions of placeholders that outlive the step, as far as torch says so.
        weights: input index → qualified name, of the parameters.
        buffers: input indices of the buffers.
        salts: input index → salt, of those parameters that have a projection from other graphs.
        sides: input index → side, of those that are sketched in other graphs.
        shards: input index → dimension, of those that processes have parts of: a factor keeps it.
        earlier: what this and the graphs before it say of each other.
        added: input index → role, of the inputs that this project adds; in the plan's order.
        like_eager: cut it as eager autograd would, which recomputes nothing; to compare with.
    """

    module: fx.GraphModule
    num_fwd_outputs: int
    static_inputs: tuple[int, ...]
    weights: Mapping[int, str]
    buffers: frozenset[int] = frozenset()
    salts: Mapping[int, int] = field(default_factory=dict)
    sides: Mapping[int, Side] = field(default_factory=dict)
    shards: Mapping[int, int] = field(default_factory=dict)
    earlier: Earlier = Earlier()
    added: Mapping[int, ProjectionInput | FactorInput] = field(default_factory=dict)
    like_eager: bool = False

    def copy(self) -> "JointGraph":
        """The same with a graph of its own; nodes keep their names."""
        graph = copy.deepcopy(self.module.graph)
        return replace(self, module=fx.GraphModule(self.module, graph))

    def with_inputs(self, plan: Plan) -> "JointGraph":
        """A copy with the plan's inputs, as the compiled graph has them."""
        duplicate = self.copy()
        if not plan.inputs:
            return duplicate
        graph, inputs = duplicate.module.graph, duplicate.inputs()
        first, last = max(inputs) + 1, inputs[max(inputs)]
        added = dict(enumerate(plan.inputs, first))
        for index, role in added.items():
            like = inputs[role.index if isinstance(role, FactorInput) else role.owners[0]]
            with graph.inserting_after(last), _torch.fake_mode_of(like.meta["val"]):
                if isinstance(role, FactorInput):
                    last = graph.placeholder(f"factor_{index}")
                    last.meta["val"] = like.meta["val"].new_empty(1).expand(role.shape)
                else:
                    value = plan.projections[role.projection].empty_source(like.meta["val"])
                    kind = ("key", "table", "tracked")[value.dim()]
                    last = graph.placeholder(f"{kind}_{index}")
                    last.meta["val"] = value
            _torch.set_input_index(last, index)
        receiving = [i for i, receives in zip(added, plan.has_gradient, strict=True) if receives]
        _torch.add_gradient_outputs(graph, receiving)
        return replace(duplicate, added=added)

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
        return gradient_nodes(self.module.graph)

    def activation_nodes(self) -> set[fx.Node]:
        """Nodes that depend on an input that is no parameter and no buffer."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        found = set(placeholders) - self.static_placeholders()
        for node in self.module.graph.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def vocabulary(self) -> tuple[int, int] | None:
        """The shape of the largest table that rows are looked up in: words, features of each."""
        lookups = self.module.graph.find_nodes(op="call_function", target=aten.embedding.default)
        shapes = (lookup.args[0].meta["val"].shape for lookup in lookups)
        tables = [(words, n) for words, n in shapes if isinstance(words, int)]
        return max(tables, default=None)

    def static_placeholders(self) -> set[fx.Node]:
        """Placeholders that outlive the step: parameters, buffers and what this project adds."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        lasting = {*self.weights, *self.buffers, *self.added}
        return {
            node
            for position, node in enumerate(placeholders)
            if position in self.static_inputs or _torch.input_index(node) in lasting
        }

    def lasting_inputs(self) -> list[int]:
        """Positions of placeholders that are no activations: also those that this project adds."""
        placeholders = self.module.graph.find_nodes(op="placeholder")
        return [
            position
            for position, node in enumerate(placeholders)
            if position in self.static_inputs or _torch.input_index(node) in self.added
        ]

    def weight_inputs(self) -> dict[int, fx.Node]:
        """Placeholders of the parameters, by input index."""
        return {index: node for index, node in self.inputs().items() if index in self.weights}


def capture(
    module: fx.GraphModule,
    num_fwd_outputs: int,
    static_inputs: Sequence[int],
    weights: Mapping[int, str],
    buffers: frozenset[int] = frozenset(),
    salts: Mapping[int, int] | None = None,
    sides: Mapping[int, Side] | None = None,
    shards: Mapping[int, int] | None = None,
) -> JointGraph:
    """What AOTAutograd gives to a partitioner, in the form that all passes expect; taken over.

    Gradients that one operator returns together are taken apart, nothing is dead, and equal nodes
    are one.
    """
    split_grouped_backward(module)
    module.graph.eliminate_dead_code()
    _torch.eliminate_common_subexpressions(module)
    positions = tuple(static_inputs)
    return JointGraph(
        module,
        num_fwd_outputs,
        positions,
        weights,
        buffers,
        salts or {},
        sides or {},
        shards or {},
    )
