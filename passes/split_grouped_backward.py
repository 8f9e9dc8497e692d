"""Take the backward of transformers' grouped matmul apart: one node for each gradient."""

import operator

import torch
from torch import fx

from compact_fx.passes.nodes import GROUPED_PRODUCT, insert, transposed


def split_grouped_backward(module: fx.GraphModule) -> int:
    """Give each of the two gradients a node of its own; returns how many pairs there were.

    Before (mixture-of-experts classes of Hugging Face, in other dtypes than bfloat16)::

        dx, dW = transformers.grouped_mm_fallback_backward(x, W, offsets, dy)

    After::

        dx = transformers.grouped_mm_fallback(dy, Wᵀ, offsets)
        dW = compact_fx.grouped_product(xᵀ, dy, offsets)

    Contract: every output keeps its values, bit for bit.
    """
    graph = module.graph
    # By name: the operator is there only where transformers is.
    name = "transformers.grouped_mm_fallback_backward.default"
    pairs = [node for node in graph.nodes if str(node.target) == name]
    for pair in pairs:
        x, weight, offsets, dy = pair.args
        forward = torch.ops.transformers.grouped_mm_fallback.default
        with graph.inserting_before(pair):
            back = transposed(graph, weight, like=pair)
            grad_x = insert(graph, forward, (dy, back, offsets), like=pair, name="grad_x")
            rows = transposed(graph, x, like=pair)
            grad_w = insert(graph, GROUPED_PRODUCT, (rows, dy, offsets), like=pair, name="grad_w")
        for reader in list(pair.users):
            assert reader.target is operator.getitem
            reader.replace_all_uses_with((grad_x, grad_w)[reader.args[1]])
            graph.erase_node(reader)
        graph.erase_node(pair)
    return len(pairs)
