"""What sites cost: FLOPs of weight gradients, and bytes that cross for them."""

import math
from collections.abc import Mapping

from torch import fx

from compact_fx import _torch
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.list_sites import Uses
from compact_fx.passes.nodes import storage_of
from compact_fx.passes.partition import Partition
from compact_fx.plan import Plan, Site, SiteCost
from compact_fx.projections.countsketch import is_gathered


def flops_of(plan: Plan, uses: Uses) -> list[tuple[int, int]]:
    """For each site: FLOPs of its weight gradient without and with the plan's sketches."""
    shares: dict[int | None, int] = {}
    for site in plan.sites:
        shares[site.sketch] = shares.get(site.sketch, 0) + 1
    stays_sketched = {role.index for role in plan.factor_inputs}
    flops = []
    for site in plan.sites:
        use = uses.get((site.index, site.use))
        if use is None or not site.in_features:
            flops.append((0, 0))
            continue
        t, e = _torch.size_hint(use.tokens), _torch.size_hint(use.experts)
        n, m, r = site.in_features, site.out_features, site.rank
        dense = sketched = 2 * t * n * m
        if site.projection is not None:
            p = plan.projections[site.projection]
            n, m = (n, m) if site.side == "input" else (m, n)
            terms = 1 if is_gathered(p.kind, n, r) else r  # for each row of P
            sketched = 2 * t * n * terms // shares[site.sketch] + 2 * t * r * m
            sketched += sketched // plan.track_every if p.is_tracked else 0
            sketched += 0 if site.index in stays_sketched else 2 * e * n * terms * m
        flops.append((dense, sketched))
    return flops


def early_bytes(x: fx.Node, site: Site, plan: Plan) -> int:
    """Bytes that cross where a site's activation is sketched in the forward, on its input side."""
    assert site.projection is not None
    n, value = site.in_features, x.meta["val"]
    columns = site.rank * n // site.features
    if plan.projections[site.projection].is_tracked:
        columns += n // plan.track_every
    return _torch.size_hint(value.numel()) // n * columns * int(value.element_size())


def projection_bytes(plan: Plan) -> int:
    """Bytes of what tracked projections hold from step to step: P, and Y in float32."""
    return sum(
        p.features * p.rank * (p.dtype.itemsize + 4) for p in plan.projections if p.is_tracked
    )


def change_flops(plan: Plan) -> int:
    """FLOPs of matrix products where all tracked projections of the plan change, moments with them.

    For each P two Gram matrices, two products and a check (`orthonormal`); for each factor R and
    the rotation of two moments.
    """
    flops = sum(5 * 2 * p.features * p.rank**2 for p in plan.projections if p.is_tracked)
    for role in plan.factor_inputs:
        p = plan.projections[role.projection]
        if p.is_tracked:
            flops += 2 * p.features * p.rank**2 + 2 * 2 * math.prod(role.shape) * p.rank
    return flops


def extra_bytes(plan: Plan, joint: JointGraph) -> int:
    """Bytes that tracked projections hold beyond what gradients take less as factors."""
    inputs = joint.inputs()
    saved = sum(
        (_torch.size_hint(weight.numel()) - math.prod(role.shape)) * int(weight.element_size())
        for role in plan.factor_inputs
        for weight in [inputs[role.index].meta["val"]]
    )
    return max(0, projection_bytes(plan) - saved)


def costs_of(
    plan: Plan,
    uses: Uses,
    before: Partition,
    after: Partition,
    sketches: Mapping[int, tuple[fx.Node, ...]],
) -> tuple[SiteCost, ...]:
    """For each site its FLOPs, and its activation's bytes, counted at the first of its sites.

    Args:
        before, after: the cut of the graph without and with the plan.
        sketches: by sketch, the nodes that read its activation, before the cut.
    """
    counted: set[int] = set()
    costs = []
    for site, (flops_before, flops_after) in zip(plan.sites, flops_of(plan, uses), strict=True):
        kept: set[int] = set()
        if site.sketch is not None:
            reading = sketches[site.sketch] if site.placement == "early" else ()
            kept = {storage_of(n) for n in (uses[site.index, site.use].activation, *reading)}
            kept -= counted
            counted |= kept
        costs.append(
            SiteCost(
                bytes_before=before.bytes_for(kept),
                bytes_after=after.bytes_for(kept),
                flops_before=flops_before,
                flops_after=flops_after,
            )
        )
    return tuple(costs)
