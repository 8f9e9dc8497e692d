"""Turn each projection node into plain aten operators that Inductor fuses."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.errors import failures_of
from compact_fx.passes.nodes import WEIGHT, finish, insert, insert_copy, is_transposition
from compact_fx.projections import RANDOM_PROJECTION, draw
from compact_fx.projections.countsketch import countsketch_columns, countsketch_rows, is_gathered

aten = torch.ops.aten


def expand_projections(module: fx.GraphModule) -> int:
    """Inline `compact_fx.random_projection` nodes; returns how many there were.

    Before::

        P = compact_fx.random_projection(key, 2048, 512, "gaussian", torch.bfloat16)

    After (pointwise operators, one fused kernel)::

        iota = prims.iota(2048); ... ; erfinv = aten.erfinv(...); P = convert_element_type(...)

    A countsketch has one ±1 in each row, so its products are gathers and P is never made. Before::

        P = compact_fx.random_projection(table, 2048, 512, "countsketch", torch.bfloat16)
        z = aten.mm(x, P)
        dW = aten.mm(factor, Pᵀ)

    After::

        rows, signs = ...                           # (4, 512) each, from the table
        z = aten.sum(x[:, rows] * signs, [-2])      # one kernel: (tokens, 4, 512) is never stored
        columns, signs = ...                        # (2048,) each
        dW = factor[:, columns] * signs

    Contract: in eager execution the values are those of the custom op bit for bit; in products of
    a countsketch, up to the order in which n / r terms are added.
    """
    graph = module.graph
    nodes = graph.find_nodes(op="call_function", target=RANDOM_PROJECTION)
    inline = _Inliner(graph)
    for node in nodes:
        _, n, rank, kind, _ = node.args
        if is_gathered(kind, n, rank):  # type: ignore[arg-type]
            with failures_of("expand_projections", node.meta.get(WEIGHT)):
                _gather(graph, node, inline)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=RANDOM_PROJECTION):
        with failures_of("expand_projections", node.meta.get(WEIGHT)):
            (drawn,) = inline(draw, node, *node.args[1:])
            node.replace_all_uses_with(drawn)
    finish(module)
    return len(nodes)


class _Inliner:
    """Writes functions of a projection's key or table into the graph, in front of it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._graph = graph
        self._templates: dict[tuple[Any, ...], fx.GraphModule] = {}

    def __call__(
        self, function: Callable[..., Any], projection: fx.Node, *settings: Any
    ) -> list[fx.Node]:
        source = projection.args[0]
        assert isinstance(source, fx.Node)
        value = source.meta["val"]
        cached = (function, value.device, *settings)
        if cached not in self._templates:
            self._templates[cached] = _torch.trace(lambda given: function(given, *settings), value)
        with self._graph.inserting_before(projection):
            return insert_copy(self._graph, self._templates[cached].graph, [source])


def _gather(graph: fx.Graph, projection: fx.Node, inline: _Inliner) -> None:
    """Replace the products with a countsketch."""
    _, n, rank, _, dtype = projection.args
    tables = functools.cache(lambda function: inline(function, projection, n, rank, dtype))
    for product, position, is_transposed in list(_products(projection)):
        other = product.args[1 - position]
        assert isinstance(other, fx.Node)
        if position == 1:
            function = countsketch_columns if is_transposed else countsketch_rows
            dim = other.meta["val"].dim() - 1
        elif not is_transposed:
            function, dim = countsketch_columns, other.meta["val"].dim() - 2
        else:
            continue
        index, signs = tables(function)
        new = functools.partial(insert, graph, like=product, name=product.name)
        with graph.inserting_before(product):
            if position == 0:
                signs = new(aten.unsqueeze.default, (signs, 1))
            # The indices are clamped, which Inductor's C++ does not see: it would check each one.
            terms = new(aten._unsafe_index.Tensor, (other, [None] * dim + [index]))
            terms = new(aten.mul.Tensor, (terms, signs))
            if function is countsketch_rows:
                for _ in index.meta["val"].shape[:-1]:
                    terms = new(aten.sum.dim_IntList, (terms, [-2]))
        product.replace_all_uses_with(terms)
        graph.erase_node(product)


def _products(node: fx.Node, is_transposed: bool = False) -> Iterator[tuple[fx.Node, int, bool]]:
    """The matmuls that read a projection, at which operand, and whether transposed."""
    for user in node.users:
        if is_transposition(user):
            yield from _products(user, not is_transposed)
        elif user.target is aten.expand.default:  # for each of a batch
            yield from _products(user, is_transposed)
        elif user.target in (aten.mm.default, aten.bmm.default):
            yield user, user.args.index(node), is_transposed
