"""What sites cost: FLOPs of weight gradients, and bytes that cross for them."""

from collections.abc import Mapping

from torch import fx

from compact_fx import _torch
from compact_fx.passes.list_sites import Uses
from compact_fx.passes.nodes import storage_of
from compact_fx.passes.partition import Partition
from compact_fx.plan import Plan, SiteCost
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
            kind = plan.projections[site.projection].kind
            terms = 1 if is_gathered(kind, n, r) else r  # for each row of P
            sketched = 2 * t * n * terms // shares[site.sketch] + 2 * t * r * m
            sketched += 0 if site.index in stays_sketched else 2 * e * n * terms * m
        flops.append((dense, sketched))
    return flops


def costs_of(
    plan: Plan,
    uses: Uses,
    before: Partition,
    after: Partition,
    sketches: Mapping[int, fx.Node],
) -> tuple[SiteCost, ...]:
    """For each site its FLOPs, and its activation's bytes, counted at the first of its sites.

    Args:
        before, after: the cut of the graph without and with the plan.
        sketches: by sketch, the node of z before the cut.
    """
    counted: set[int] = set()
    costs = []
    for site, (flops_before, flops_after) in zip(plan.sites, flops_of(plan, uses), strict=True):
        kept: set[int] = set()
        if site.sketch is not None:
            x, z = uses[site.index, site.use].activation, sketches[site.sketch]
            kept = {storage_of(x), storage_of(z)}
            kept -= counted
            counted |= kept
        costs.append(
            SiteCost(
                bytes_before=sum(before.saved_by_storage[s].bytes for s in kept & before.storages),
                bytes_after=sum(after.saved_by_storage[s].bytes for s in kept & after.storages),
                flops_before=flops_before,
                flops_after=flops_after,
            )
        )
    return tuple(costs)
