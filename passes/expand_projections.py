"""Turn each projection node into plain aten operators that Inductor fuses."""

import functools
from typing import Any

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.passes.joint_graph import finish
from compact_fx.projections import RANDOM_PROJECTION, draw


def expand_projections(module: fx.GraphModule) -> int:
    """Inline `compact_fx.random_projection` nodes; returns how many there were.

    Before::

        P = compact_fx.random_projection(key, 2048, 512, "gaussian", torch.bfloat16)

    After (pointwise operators, one fused kernel)::

        iota = prims.iota(2048); ... ; erfinv = aten.erfinv(...); P = convert_element_type(...)

    Contract: the values are those of the custom op, bit for bit in eager execution.
    """
    templates: dict[tuple[Any, ...], fx.GraphModule] = {}
    nodes = module.graph.find_nodes(op="call_function", target=RANDOM_PROJECTION)
    for node in nodes:
        key, *settings = node.args
        assert isinstance(key, fx.Node)
        cached = (key.meta["val"].device, *settings)
        if cached not in templates:
            templates[cached] = _trace(key.meta["val"], *settings)
        _inline(module.graph, node, key, templates[cached])
    finish(module)
    return len(nodes)


def _trace(key: torch.Tensor, n: Any, rank: Any, kind: Any, dtype: Any) -> fx.GraphModule:
    return _torch.trace(functools.partial(draw, n=n, rank=rank, kind=kind, dtype=dtype), key)


def _inline(graph: fx.Graph, node: fx.Node, key: fx.Node, template: fx.GraphModule) -> None:
    copies: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(node):
        for original in template.graph.nodes:
            if original.op == "placeholder":
                copies[original] = key
            elif original.op != "output":
                copies[original] = graph.node_copy(original, copies.__getitem__)
    (result,) = template.graph.output_node().all_input_nodes
    node.replace_all_uses_with(copies[result])
    graph.erase_node(node)
