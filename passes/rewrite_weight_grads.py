"""Put the sketches of a plan into the joint graph."""

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from compact_fx import _torch
from compact_fx.errors import CannotCompact, failures_of
from compact_fx.passes.find_weight_grads import Use, find_weight_grads
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import (
    MATMULS,
    SKETCH,
    WEIGHT,
    elements_of,
    finish,
    inline,
    insert,
    is_tensor,
    is_view,
    mark_recomputed,
    transposed,
    update_value,
)
from compact_fx.plan import FactorInput, Plan, ProjectionInput, Side, Site
from compact_fx.projections import RANDOM_PROJECTION, finite_of, unit_of

aten = torch.ops.aten


def rewrite_weight_grads(joint: JointGraph, plan: Plan) -> dict[int, tuple[fx.Node, ...]]:
    """Replace each planned weight gradient `dyᵀ x` by `(dyᵀ z) Pᵀ` with the sketch `z = x P`.

    Before::

        mm = aten.mm(dyᵀ, x)                                  # (m, n), x crosses the boundary

    After::

        P = compact_fx.random_projection(key, n, r, kind, dtype)   # (n, r), drawn on both sides
        z = aten.mm(x, P)                                     # (tokens, r), crosses in x's place
        factor = aten.mm(dyᵀ, z)                              # (m, r)
        mm = aten.mm(factor, Pᵀ)                              # (m, n)

    and `xᵀ dy` by `P (zᵀ dy)`. On the output side it is `P ((dy P)ᵀ x)`. A batched or grouped
    matmul stays one, of z instead of x, and all of its experts share P. For a weight with a factor
    input the factor stays as it is: the weight's gradient becomes None and that input's the factor.
    Sites on one activation with one projection share P and z. P is marked to be drawn on each side,
    and late sketches to be computed in the backward pass.

    A tracked P is an input itself, and the gradient of that input becomes Y, see `_track`.

    Args:
        joint: changed in place; has the plan's inputs.
        plan: decides everything.

    Returns:
        For each sketch the nodes that read its activation: z, and what a tracked P sees of it; on
        the output side the factors.

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
    sketches: dict[int, _Sketch] = {}
    factors: dict[fx.Node, tuple[fx.Node, int]] = {}  # on the output side: dy, and where x is
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
        use = use.on(site.side)
        with failures_of("rewrite_weight_grads", site.weight):
            if site.sketch not in sketches:
                source = sources[site.projection]
                sketches[site.sketch] = _sketch(joint.module.graph, use, site, plan, source)
            expand, projected = site.index not in stays_sketched, use.projected
            _replace(joint.module.graph, use, sketches[site.sketch], expand, plan.track_every)
            if site.side == "output":
                factors[sketches[site.sketch].factors[-1]] = (projected, use.position)
    if plan.recompute and factors:
        # Most is alive when the backward begins; after its first layer there is room for both.
        first = next(node for node in joint.module.graph.nodes if node in factors)
        _let_go_of_activation(joint.module.graph, first, *factors[first])
    _return_directions(joint, plan, _track(joint.module.graph, sketches.values()))
    _return_factors(joint)
    finish(joint.module)
    return {i: sketch.reads_activation() for i, sketch in sketches.items()}


@dataclass
class _Sketch:
    """One sketch z = a P of an operand a, and what its P sees.

    Attributes:
        side: of its sites.
        projection: index into the plan's.
        drawn: P.
        node: z.
        seen: the rows of a, tokens first, that a tracked P sees; None for others.
        factors: of its sites, and
        others: of each, the rows of the other operand b that a tracked P sees, and
        turns: of each, b · F / ‖F‖.
    """

    side: Side
    projection: int
    drawn: fx.Node
    node: fx.Node
    seen: fx.Node | None
    factors: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    turns: list[fx.Node] = field(default_factory=list)

    def reads_activation(self) -> tuple[fx.Node, ...]:
        """What reads x: what the forward computes if the sketch is early."""
        if self.side == "output":
            return (*self.factors, *self.others)
        return (self.node,) if self.seen is None else (self.node, self.seen)


def _sketch(graph: fx.Graph, use: Use, site: Site, plan: Plan, source: fx.Node) -> _Sketch:
    assert site.projection is not None
    rows = use.projected
    projection = plan.projections[site.projection]
    seen = None
    # Behind the inputs even where it is one itself: the source is an input too.
    before = rows if rows.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_before(before.next):
        if use.features_first:
            rows = transposed(graph, rows, like=rows)
        if projection.is_tracked:
            drawn = source
        else:
            p = projection
            args = (source, p.features, p.rank, p.kind, p.dtype)
            drawn = insert(graph, RANDOM_PROJECTION, args, like=rows, name="projection")
        sketch = _product(graph, rows, drawn, like=rows, name="sketch")
        if projection.is_tracked:
            seen = _every(graph, rows, plan.track_every, keep=site.placement == "early")
    sketch.meta[SKETCH] = site.sketch
    if not projection.is_tracked:
        drawn.meta[WEIGHT] = site.weight
        # P is drawn again on each side: saving it would cost memory.
        mark_recomputed(drawn)
    if site.placement == "late":
        mark_recomputed(sketch)
    return _Sketch(site.side, site.projection, drawn, sketch, seen)


def _every(graph: fx.Graph, rows: fx.Node, step: int, *, keep: bool = False) -> fx.Node:
    """Every so many tokens, of each expert; to be kept they need memory of their own."""
    args = (rows, rows.meta["val"].dim() - 2, 0, sys.maxsize, step)
    every = insert(graph, aten.slice.Tensor, args, like=rows, name="every")
    if not keep:
        mark_recomputed(every)
        return every
    (seen,) = inline(graph, lambda t: t.clone(memory_format=torch.contiguous_format), every)
    seen.meta[SKETCH] = None
    return seen


def _replace(graph: fx.Graph, use: Use, sketch: _Sketch, expand: bool, step: int) -> None:
    old, position = use.matmul, use.projected_position
    operands = list(old.args)
    other = operands[1 - position]
    full = f"{old.name}_from_factor"
    place, dy = old, operands[1 - use.position]
    if _is_read(dy, old, by_others_than=sketch.seen):  # type: ignore[arg-type]
        needed = [node for node in old.all_input_nodes if node is not operands[position]]
        needed += [sketch.node] if sketch.seen is None else [sketch.node, sketch.seen]
        place = max([_moved_up(node) for node in needed]).next
    with graph.inserting_before(place):
        z = sketch.node
        operands[position] = z if position == 1 else transposed(graph, z, like=old)
        name = f"{old.name}_factor"
        new = factor = insert(graph, old.target, operands, like=old, name=name)  # type: ignore[arg-type]
        if expand and position == 1:
            back = transposed(graph, sketch.drawn, like=old, name="back")
            new = _product(graph, factor, back, like=old, name=full)
        elif expand:
            new = _product(graph, sketch.drawn, factor, like=old, name=full)
        sketch.factors.append(factor)
        if sketch.seen is not None:
            rows = other if position == 0 else transposed(graph, other, like=old)  # type: ignore[arg-type]
            sketch.others.append(_every(graph, rows, step))  # type: ignore[arg-type]
            sketch.turns.append(_turn(graph, sketch.others[-1], factor, position, old, step))
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _is_read(dy: fx.Node, before: fx.Node, by_others_than: fx.Node | None) -> bool:
    """Whether a kernel that is no matmul reads dy before a node; then the factor goes first.

    ::

        dy = dh * silu(g); q = float8(dy); dx = scaled_mm(q, W); factor = mm(dyᵀ, z)
        dy = dh * silu(g); factor = mm(dyᵀ, z); q = float8(dy); dx = scaled_mm(q, W)

    Inductor gives dy memory for the factor. What comes later reads that; what comes before would
    compute dy again, and keep alive what it is made of.
    """
    while is_view(dy):
        dy = dy.args[0]  # type: ignore[assignment]
    pending = [dy]
    while pending:
        for user in pending.pop().users:
            if is_view(user):
                pending.append(user)
            elif user < before and user.target not in MATMULS and user is not by_others_than:
                return True
    return False


def _moved_up(node: fx.Node) -> fx.Node:
    """A node, behind the one that it is a view of."""
    if is_view(node):
        source = _moved_up(node.args[0])  # type: ignore[arg-type]
        if source.op != "placeholder":
            source.append(node)
    return node


def _let_go_of_activation(graph: fx.Graph, factor: fx.Node, dy: fx.Node, position: int) -> None:
    """Make the gradient of x only when the factor is there, so that both need no memory at once.

    ::

        dx = aten.mm(dy, W)                           # x is made by the kernel that reads dx
        dx = aten.addmm(factor[0], dy, W, beta=0)     # the same; x was made, read and let go before

    and for float8 `scale + 0 · factor[0, 0]` is the scale of dy. What is not finite in the factor
    is 0 there: Inductor may multiply it by beta, and 0 · NaN is NaN.
    """
    value = factor.meta["val"]
    if value.dim() != 2:
        return

    def product_after(f: Tensor, *operands: Tensor) -> Tensor:
        return torch.addmm(finite_of(f.select(1 - position, 0)), *operands, beta=0)

    def scale_after(f: Tensor, scale: Tensor) -> Tensor:
        return scale + 0.0 * finite_of(f[0, 0])

    plain = (n for n in dy.users if n.target is aten.mm.default and n.args[0] is dy)
    scaled = graph.find_nodes(op="call_function", target=aten._scaled_mm.default)
    for product in [*plain, *(n for n in scaled if _is_scaled(n, dy))]:
        made = product.meta["val"]
        columns = made.shape[-1]  # a comparison of symbolic ones would be a guard
        is_of_x = isinstance(columns, int) and columns == value.shape[position]
        if not is_of_x or made.dtype != value.dtype or any(n <= factor for n in product.users):
            continue
        if product.target is aten.mm.default:
            with graph.inserting_before(max(product, factor).next):
                (after,) = inline(graph, product_after, factor, *product.args)  # type: ignore[arg-type]
            product.replace_all_uses_with(after)
            graph.erase_node(product)
        elif product > factor:
            with graph.inserting_before(product):
                (scale,) = inline(graph, scale_after, factor, product.args[2])  # type: ignore[arg-type]
            product.update_arg(2, scale)


def _is_scaled(product: fx.Node, dy: fx.Node) -> bool:
    """Whether a product reads what operators on dy alone make of it, scaled as a whole or by rows.

    Other scales are laid out or rounded in ways that a sum may not keep.
    """
    node, _, scale, *_ = product.args
    of = scale.meta["val"]  # type: ignore[union-attr]
    if of.dtype is not torch.float32 or any(_torch.size_hint(n) != 1 for n in of.shape[-1:]):
        return False
    while isinstance(node, fx.Node) and node is not dy:
        size = elements_of(node)
        alike = [n for n in node.all_input_nodes if is_tensor(n) and elements_of(n) == size]
        node = alike[0] if len(alike) == 1 else None
    return node is dy


def _turn(
    graph: fx.Graph, rows: fx.Node, factor: fx.Node, position: int, old: fx.Node, step: int
) -> fx.Node:
    """b F / ‖F‖ for the seen rows of b: then aᵀ of it is Gᵀ G P, up to a positive factor."""
    (unit,) = inline(graph, unit_of, factor)
    if position == 0:
        unit = transposed(graph, unit, like=old)
    if rows.meta["val"].dim() == unit.meta["val"].dim():
        return _product(graph, rows, unit, like=old, name="turn")
    offsets = old.args[2]
    assert isinstance(offsets, fx.Node)
    if step > 1:  # of the tokens before each end, every so many
        (offsets,) = inline(
            graph, lambda ends: ((ends + (step - 1)) // step).to(ends.dtype), offsets
        )
    return insert(graph, aten._grouped_mm.default, (rows, unit, offsets), like=old, name="turn")


def _track(graph: fx.Graph, sketches: Iterable[_Sketch]) -> dict[int, fx.Node]:
    """By projection: Y, what its gradients say of where it is to go.

    ::

        turn = dy[::k] F / ‖F‖                   # for each weight that shares x
        Y = x[::k]ᵀ (turn_q + turn_k + turn_v)   # ∂(½ ‖G P‖²) / ∂P = Gᵀ G P on these tokens

    With x and dy, F and Fᵀ in each other's place on the output side. G itself is never made.
    What is not finite counts as 0.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    directions: dict[int, fx.Node] = {}
    # In the order of the backward, so that nothing waits for a later layer's.
    tracked = [sketch for sketch in sketches if sketch.seen is not None]
    last = {id(s): max(s.turns, key=order.__getitem__) for s in tracked}
    for sketch in sorted(tracked, key=lambda s: order[last[id(s)]]):
        at = last[id(sketch)]
        assert sketch.seen is not None
        with graph.inserting_before(at.next):
            turn, *others = sketch.turns
            for other in others:
                turn = insert(graph, aten.add.Tensor, (turn, other), like=at, name="turns")
            columns = transposed(graph, sketch.seen, like=at, name="columns")
            y = _product(graph, columns, turn, like=at, name="seen")
            if y.meta["val"].dim() == 3:
                y = insert(graph, aten.sum.dim_IntList, (y, [0]), like=at, name="seen")
            (y,) = inline(graph, finite_of, y)
            if sketch.projection in directions:
                both = (directions[sketch.projection], y)
                y = insert(graph, aten.add.Tensor, both, like=at, name="seen")
            directions[sketch.projection] = y
    return directions


def _return_directions(joint: JointGraph, plan: Plan, directions: dict[int, fx.Node]) -> None:
    """Make each Y the gradient of its projection's input."""
    output = joint.module.graph.output_node()
    outputs = list(output.args[0])  # type: ignore[arg-type]
    positions = joint.gradient_positions()
    for index, role in joint.added.items():
        if isinstance(role, ProjectionInput) and plan.projections[role.projection].is_tracked:
            target = positions.get(index)
            if target is None or outputs[target] is not None:
                raise CannotCompact("a tracked projection has no free place among the gradients")
            outputs[target] = directions[role.projection]
    output.args = (outputs,)


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
    update_value(node)
