"""The graphs of one compilation, before and after, for a person to read."""

import difflib
import re
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from compact_fx import _torch
from compact_fx.passes.apply_plan import apply_plan, rewrite
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import is_relabelling, source_line
from compact_fx.passes.partition import Partition, partition
from compact_fx.plan import Plan
from compact_fx.projections import RANDOM_PROJECTION


@dataclass(frozen=True)
class CompactedGraphs:
    """What a plan does to one joint graph; kept with `keep_graphs=True` only.

    The graphs hold shapes and no data, and one `random_projection` node for each projection.
    Each is a GraphModule: `graphs.forward.print_readable()`.

    Attributes:
        joint_before: as AOTAutograd made it; parameters have their own names.
        plan: what was decided.
    """

    _joint: JointGraph
    plan: Plan

    def __repr__(self) -> str:
        sketched, sites = len(self.plan.sketched), len(self.plan.sites)
        return f"CompactedGraphs({sketched} of {sites} weight gradients sketched)"

    @property
    def joint_before(self) -> fx.GraphModule:
        """The joint graph as AOTAutograd made it."""
        return self._joint.module

    @cached_property
    def joint_after(self) -> fx.GraphModule:
        """The joint graph with the plan's sketches in it."""
        return rewrite(self._joint, self.plan).joint.module

    @property
    def forward(self) -> fx.GraphModule:
        """The forward graph; its last outputs are kept for the backward."""
        return self.cut.forward

    @property
    def backward(self) -> fx.GraphModule:
        """The backward graph."""
        return self.cut.backward

    @cached_property
    def cut(self) -> Partition:
        """Both sides of the boundary, as planned."""
        return apply_plan(self._joint, self.plan)

    @cached_property
    def cut_before(self) -> Partition:
        """Both sides of the boundary, as torch.compile makes them without this project."""
        return partition(self._joint.copy(), recompute=False)

    def modules(self) -> dict[str, fx.GraphModule]:
        """All graphs by name, in the order in which they come about."""
        names = ("joint_before", "joint_after", "forward", "backward")
        return {name: getattr(self, name) for name in names}

    def texts(self) -> dict[str, str]:
        """By name, what a person may want to read: the diff, and each graph."""
        readable = {
            name: module.print_readable(print_output=False)
            for name, module in self.modules().items()
        }
        return {"diff": self.diff(), **readable}

    def diff(self) -> str:
        """Lines of the joint graph that the rewriting took out (-) and put in (+)."""
        lines = difflib.unified_diff(
            text_of(self.joint_before), text_of(self.joint_after), lineterm="", n=0
        )
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def text_of(module: fx.GraphModule) -> list[str]:
    """One line for each node: its shape, what makes it, and the line of the model it serves."""
    lines = []
    for node in module.graph.nodes:
        arguments = ", ".join(
            [*map(_argument, node.args), *(f"{k}={_argument(v)}" for k, v in node.kwargs.items())]
        )
        if node.op == "placeholder":
            line = f"{node.name}: {_torch.type_of(node)}"
        elif node.op == "output":
            line = f"return {arguments}"
        else:
            call = f"{_torch.operator_name(node)}({arguments})"
            line = f"{node.name}: {_torch.type_of(node)} = {call}"
        source = source_line(node)
        lines.append(f"{line}  # {source}" if source else line)
    return lines


def dot_of(module: fx.GraphModule) -> str:
    """A graph in graphviz's language; sketches and projections stand out."""
    lines = ["digraph {", "node [shape=box, style=filled, fillcolor=white, fontname=monospace];"]
    for node in module.graph.nodes:
        label = f"{node.name}\\n{_torch.operator_name(node)} {_torch.type_of(node)}"
        color = "orange" if node.target is RANDOM_PROJECTION else _COLORS.get(node.op, "white")
        lines.append(f'"{node.name}" [label="{label}", fillcolor={color}];')
        lines += [f'"{source.name}" -> "{node.name}";' for source in node.all_input_nodes]
    return "\n".join([*lines, "}"])


_COLORS = {"placeholder": "lightblue", "output": "lightgray"}


def _argument(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return re.sub(r"^torch\.", "", str(value))


def named(joint: JointGraph) -> JointGraph:
    """A copy whose parameters, and their gradients, have the parameters' own names."""
    joint = joint.copy()
    gradients = joint.gradients()
    for index, node in joint.weight_inputs().items():
        # torch looks nodes up by name in graphs that it copies, where fx writes names like this.
        name = re.sub(r"\W", "_", re.sub(r"([a-z])([A-Z])", r"\1_\2", joint.weights[index])).lower()
        _torch.rename(node, name)
        gradient = gradients.get(index)
        if gradient is not None:
            _name_gradient(gradient, f"grad_{name}")
    joint.module.recompile()
    return joint


def _name_gradient(gradient: fx.Node, name: str) -> None:
    """What a weight's gradient is made by, and the views and casts of it that follow."""
    chain = [gradient]
    while is_relabelling(chain[-1]) and len(chain[-1].users) == 1:
        chain += chain[-1].all_input_nodes
    for node in reversed(chain):
        if node.op == "call_function":
            _torch.rename(node, name)
