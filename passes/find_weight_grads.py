"""Find the matmuls whose results only feed a parameter's gradient."""

import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import fx

from compact_fx.errors import failures_of
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import (
    COPYING,
    MATMULS,
    PERMUTING,
    RESHAPING,
    SCALED_PRODUCT_NAMES,
    is_transposition,
    operator_base,
    permutation,
)
from compact_fx.plan import Side

aten = torch.ops.aten

# What may stand between a matmul and the gradient: relabels, rounds or adds, elementwise linear.
_TRANSPARENT = PERMUTING | RESHAPING | COPYING | {aten.add.Tensor}


@dataclass(frozen=True)
class Use:
    """One product of an activation and an incoming gradient that a weight's gradient consists of.

    A sketch projects one of the two operands: the activation x on the weight's input side, the
    incoming gradient dy on its output side.

    Attributes:
        matmul: its node, see `MATMULS`; what follows its two operands says how experts share
            the tokens.
        position: which operand is the activation: 1 in `dyᵀ·x` (`F.linear`), 0 in `xᵀ·dy`
            (GPT-2's Conv1D).
        dims: which dimensions of the weight the last two of the product are, None where it is
            reshaped on its way to the gradient.
        side: which operand is projected.
    """

    matmul: fx.Node
    position: Literal[0, 1]
    dims: tuple[int, int] | None
    side: Side = "input"

    def on(self, side: Side) -> "Use":
        """The same with this operand projected."""
        return self if side == self.side else replace(self, side=side)

    @property
    def activation(self) -> fx.Node:
        """x: (tokens, in_features), or its transpose where the graph has no node for it.

        With one more dimension in front where each expert has tokens of its own.
        """
        return self._operand(self.position)

    @property
    def projected(self) -> fx.Node:
        """What the side projects, x or dy, laid out as `activation`."""
        return self._operand(self.projected_position)

    @property
    def projected_position(self) -> int:
        """Which operand that is."""
        return self.position if self.side == "input" else 1 - self.position

    def _operand(self, position: int) -> fx.Node:
        operand = self.matmul.args[position]
        assert isinstance(operand, fx.Node)
        if position == 0 and is_transposition(operand):
            return operand.args[0]  # type: ignore[return-value]
        return operand

    @property
    def features_first(self) -> bool:
        """Whether `projected` has tokens last."""
        return self.projected is self.matmul.args[0]

    @property
    def tokens(self) -> int | torch.SymInt:
        """Rows of x, of all experts together; may be symbolic."""
        *batch, _, tokens = self.matmul.args[0].meta["val"].shape  # type: ignore[union-attr]
        total: int | torch.SymInt = math.prod(batch, start=tokens)
        return total

    @property
    def experts(self) -> int | torch.SymInt:
        """How many matrices the product is: 1, or those that a batched or grouped matmul gives."""
        *batch, _, _ = self.matmul.meta["val"].shape
        count: int | torch.SymInt = math.prod(batch)
        return count

    @property
    def rank_multiple(self) -> int:
        """A sketch needs a multiple of this many columns: rows of 16 bytes in a grouped matmul."""
        if self.matmul.target is not aten._grouped_mm.default:
            return 1
        return 16 // int(self.activation.meta["val"].element_size())

    @property
    def in_features(self) -> int | torch.SymInt:
        """Columns of x."""
        size: int | torch.SymInt = self.matmul.meta["val"].shape[self.position - 2]
        return size

    @property
    def out_features(self) -> int | torch.SymInt:
        """Columns of dy."""
        size: int | torch.SymInt = self.matmul.meta["val"].shape[-1 - self.position]
        return size

    @property
    def features(self) -> int | torch.SymInt:
        """Columns of what is projected."""
        return self.in_features if self.side == "input" else self.out_features

    @property
    def dim(self) -> int | None:
        """Which dimension of the weight `features` is, None where it is not known."""
        return None if self.dims is None else self.dims[self.projected_position]


@dataclass(frozen=True)
class WeightGrad:
    """How the gradient of one matrix-shaped parameter is made.

    Attributes:
        index: which graph input the parameter is.
        name: qualified.
        uses: its matmuls; empty where there is none.
        reason: why there is none, or what the gradient holds besides them; "" for neither.
    """

    index: int
    name: str
    uses: tuple[Use, ...] = ()
    reason: str = ""


def find_weight_grads(
    joint: JointGraph, skip: Mapping[str, str] | None = None
) -> tuple[WeightGrad, ...]:
    """Find, for each parameter of two or more dimensions, the matmuls of its gradient.

    ::

        mm = aten.mm(dyᵀ, x)        # x only from the forward, dy from the backward
        grad = aten.permute(mm)     # nothing but relabelling, rounding and adding in between,
        return (..., grad)          # and nothing else reads what lies on the way

    gives `WeightGrad(index, name, uses=(Use(mm, position=1),))`.

    Args:
        joint: read only.
        skip: weight name → reason, of those that nobody asks for.

    Raises:
        SiteFailed: a weight whose gradient cannot be followed.

    Contract: changes nothing. A matmul is in at most one `Use`; replacing it by any other estimate
    of the same product changes the gradient of that one parameter and no other output.
    """
    gradients = joint.gradients()
    finder = _Finder(joint)
    found = []
    for index, node in sorted(joint.weight_inputs().items()):
        if node.meta["val"].dim() < 2:
            continue
        gradient = gradients.get(index)
        if skip and joint.weights[index] in skip:
            name = joint.weights[index]
            found.append(WeightGrad(index, name, reason=skip[name]))
        elif gradient is None:
            reason = "frozen, or no gradient reaches it"
            found.append(WeightGrad(index, joint.weights[index], reason=reason))
        else:
            with failures_of("find_weight_grads", joint.weights[index]):
                uses, reason = finder.uses(gradient)
            found.append(WeightGrad(index, joint.weights[index], uses, reason))
    return tuple(found)


SCALED = "its matmul is in"
"""How a reason begins for a product in float8."""


def _reason(node: fx.Node) -> str:
    """Why a gradient that this node makes is left alone."""
    product = node
    while product.target in _TRANSPARENT | {aten.mul.Tensor}:  # with scales of rows and columns
        product = product.args[0]  # type: ignore[assignment]
    if operator_base(product) in SCALED_PRODUCT_NAMES:
        dtype = str(product.args[0].meta["val"].dtype)  # type: ignore[union-attr]
        return f"{SCALED} {dtype.removeprefix('torch.')}: {_operator(product)}"
    return f"its gradient is no matmul: {_operator(node)}"


def _operator(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return _operator(node.args[0])  # type: ignore[arg-type]
    return str(node.target)


class _Finder:
    def __init__(self, joint: JointGraph) -> None:
        self._output = joint.module.graph.output_node()
        self._outputs = list(self._output.args[0])  # type: ignore[arg-type]
        self._backward = joint.backward_nodes()
        self._activations = joint.activation_nodes()

    def uses(self, gradient: fx.Node) -> tuple[tuple[Use, ...], str]:
        """Walk from the gradient up to its matmuls."""
        if self._outputs.count(gradient) != 1:
            return (), "its gradient is also returned elsewhere"
        uses: list[Use] = []
        reasons: list[str] = []
        # Each node with its reader, and which of the weight's dimensions its own are.
        weight_dims: tuple[int, ...] = tuple(range(gradient.meta["val"].dim()))
        pending: list[tuple[fx.Node, fx.Node, tuple[int, ...] | None]]
        pending = [(gradient, self._output, weight_dims)]
        while pending:
            node, reader, dims = pending.pop()
            if set(node.users) != {reader}:
                reasons.append("its gradient is also used elsewhere")
            elif node.target in MATMULS:
                use = self._use(node, dims)
                if use is None:
                    reasons.append("its gradient is a product of no activation")
                else:
                    uses.append(use)
            elif node.target in _TRANSPARENT and node in self._backward:
                terms = node.args[:2] if node.target is aten.add.Tensor else node.args[:1]
                if "alpha" in node.kwargs or not all(isinstance(t, fx.Node) for t in terms):
                    reasons.append("its gradient is scaled or shifted")
                elif len(set(terms)) < len(terms):
                    reasons.append("its gradient is doubled")
                else:
                    dims = _dims_above(node, dims)
                    pending += [(term, node, dims) for term in terms]  # type: ignore[misc]
            else:
                reasons.append(_reason(node))
        order = {use.matmul: use for use in uses}
        graph_order = [n for n in self._output.graph.nodes if n in order]
        return tuple(order[node] for node in graph_order), "; ".join(dict.fromkeys(reasons))

    def _use(self, matmul: fx.Node, dims: tuple[int, ...] | None) -> Use | None:
        left, right = (operand.meta["val"] for operand in matmul.args[:2])  # type: ignore[union-attr]
        if matmul.kwargs or left.dim() != right.dim():
            return None
        for position in (0, 1):
            activation, gradient = matmul.args[position], matmul.args[1 - position]
            if (
                activation not in self._backward
                and activation in self._activations
                and gradient in self._backward
            ):
                kept = dims is not None and dims[:-2] == tuple(range(len(dims) - 2))
                known = dims[-2:] if dims is not None and kept else None
                return Use(matmul, position, known)  # type: ignore[arg-type]
        return None


def _dims_above(node: fx.Node, dims: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Which of the weight's dimensions those of a node's input are, None if that is not known."""
    if dims is None or node.target in RESHAPING:
        return None
    order = permutation(node)
    return dims if order is None else tuple(dims[order.index(i)] for i in range(len(order)))
