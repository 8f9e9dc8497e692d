"""Put the sketches of a plan into the joint graph."""

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.errors import CannotCompact, failures_of
from compact_fx.passes.find_weight_grads import Use, find_weight_grads
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import (
    MATMULS,
    SKETCH,
    WEIGHT,
    finish,
    insert,
    mark_recomputed,
    transposed,
)
from compact_fx.plan import FactorInput, Plan, ProjectionInput, Site
from compact_fx.projections import RANDOM_PROJECTION

aten = torch.ops.aten


def rewrite_weight_grads(joint: JointGraph, plan: Plan) -> dict[int, fx.Node]:
    """Replace each planned weight gradient `dyᵀ x` by `(dyᵀ z) Pᵀ` with the sketch `z = x P`.

    Before::

        mm = aten.mm(dyᵀ, x)                                  # (m, n), x crosses the boundary

    After::

        P = compact_fx.random_projection(key, n, r, kind, dtype)   # (n, r), drawn on both sides
        z = aten.mm(x, P)                                     # (tokens, r), crosses in x's place
        factor = aten.mm(dyᵀ, z)                              # (m, r)
        mm = aten.mm(factor, Pᵀ)                              # (m, n)

    and `xᵀ dy` by `P (zᵀ dy)`. A batched or grouped matmul stays one, of z instead of x, and all
    of its experts share P. For a weight with a factor input the factor stays as it is: the
    weight's gradient becomes None and that input's the factor. Sites on one activation with one
    projection share P and z. P is marked to be drawn on each side, and late sketches to be
    computed in the backward pass.

    Args:
        joint: changed in place; has the plan's inputs.
        plan: decides everything.

    Returns:
        The node of each sketch z.

    Raises:
        CannotCompact: the graph does not have a site of the plan.
        SiteFailed: a site cannot be rewritten; the graph is then of no use.

    Contract: only the gradients of the plan's sketched sites change. Source: paper section 3.
    """
    inputs = joint.inputs()
    sources = {
        role.projection: inputs[index]
        for index, role in joint.added.items()
        if isinstance(role, ProjectionInput)
    }
    planned = {site.weight for site in plan.sketched}
    others = {name: "" for name in joint.weights.values() if name not in planned}
    grads = find_weight_grads(joint, skip=others)
    uses = {(grad.index, i): use for grad in grads for i, use in enumerate(grad.uses)}
    sketches: dict[int, tuple[fx.Node, fx.Node]] = {}
    stays_sketched = {role.index for role in plan.factor_inputs}
    for site in plan.sketched:
        use = uses.get((site.index, site.use))
        if use is None or (use.in_features, use.out_features) != (
            site.in_features,
            site.out_features,
        ):
            raise CannotCompact(
                f"the gradient of {site.weight} is not the one that was planned for"
            )
        assert site.sketch is not None
        assert site.projection is not None
        with failures_of("rewrite_weight_grads", site.weight):
            if site.sketch not in sketches:
                source = sources[site.projection]
                sketches[site.sketch] = _sketch(joint.module.graph, use, site, plan, source)
            expand = site.index not in stays_sketched
            _replace(joint.module.graph, use, *sketches[site.sketch], expand)
    _return_factors(joint)
    finish(joint.module)
    return {i: sketch for i, (_, sketch) in sketches.items()}


def _sketch(
    graph: fx.Graph, use: Use, site: Site, plan: Plan, source: fx.Node
) -> tuple[fx.Node, fx.Node]:
    assert site.projection is not None
    x = use.activation
    projection = plan.projections[site.projection]
    # Behind the inputs even where x is one itself: the source is an input too.
    before = x if x.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(before.next):
        if use.features_first:
            x = transposed(graph, x, like=x)
        args = (source, projection.in_features, projection.rank, projection.kind, projection.dtype)
        drawn = insert(graph, RANDOM_PROJECTION, args, like=x, name="projection")
        sketch = _product(graph, x, drawn, like=x, name="sketch")
    drawn.meta[WEIGHT], sketch.meta[SKETCH] = site.weight, site.sketch
    # P is drawn again on each side: saving it would cost memory.
    mark_recomputed(drawn)
    if site.placement == "late":
        mark_recomputed(sketch)
    return drawn, sketch


def _replace(graph: fx.Graph, use: Use, drawn: fx.Node, sketch: fx.Node, expand: bool) -> None:
    old = use.matmul
    operands = list(old.args)
    full = f"{old.name}_from_factor"
    with graph.inserting_before(old):
        operands[use.position] = (
            sketch if use.position == 1 else transposed(graph, sketch, like=old)
        )
        name = f"{old.name}_factor"
        new = factor = insert(graph, old.target, operands, like=old, name=name)  # type: ignore[arg-type]
        if expand and use.position == 1:
            back = transposed(graph, drawn, like=old, name="back")
            new = _product(graph, factor, back, like=old, name=full)
        elif expand:
            new = _product(graph, drawn, factor, like=old, name=full)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _product(
    graph: fx.Graph, left: fx.Node, right: fx.Node, *, like: fx.Node, name: str
) -> fx.Node:
    """left · right, at the insertion point; a matrix beside a batch is the same for all of it."""
    batches = [node.meta["val"].shape[0] for node in (left, right) if node.meta["val"].dim() == 3]
    if not batches:
        return insert(graph, aten.mm.default, (left, right), like=like, name=name)
    operands = []
    for node in (left, right):
        if node.meta["val"].dim() == 2:
            node_and_shape = (node, [batches[0], *node.meta["val"].shape])
            node = insert(graph, aten.expand.default, node_and_shape, like=like, name="shared")
        operands.append(node)
    return insert(graph, aten.bmm.default, operands, like=like, name=name)


def _return_factors(joint: JointGraph) -> None:
    """Move each factor from its weight's place among the outputs to that of its own input."""
    output = joint.module.graph.output_node()
    outputs = list(output.args[0])  # type: ignore[arg-type]
    positions = joint.gradient_positions()
    for index, role in joint.added.items():
        if not isinstance(role, FactorInput):
            continue
        source, target = positions[role.index], positions.get(index)
        if target is None or outputs[target] is not None:
            raise CannotCompact("a factor's input has no free place among the gradients")
        outputs[source], outputs[target] = None, outputs[source]
        _update_values(outputs[target])
        if tuple(outputs[target].meta["val"].shape) != role.shape:
            raise CannotCompact(f"a factor of shape {role.shape} was planned for")
    output.args = (outputs,)


def _update_values(node: fx.Node) -> None:
    """New fake values from the factors down to the gradient: the shape has changed."""
    if node.target in MATMULS:
        return
    for source in node.all_input_nodes:
        _update_values(source)
    arguments, keywords = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with _torch.fake_mode_of(node.meta["val"]):
        node.meta["val"] = node.target(*arguments, **keywords)  # type: ignore[operator]
    node.meta.pop("tensor_meta", None)
