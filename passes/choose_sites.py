"""Decide which weight gradients are sketched, and on which side of the boundary."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import fx

from compact_fx import _torch
from compact_fx.config import CompactConfig, resolve_rank
from compact_fx.passes.find_weight_grads import Use, WeightGrad, find_weight_grads
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.partition import Partition, partition, storage_of
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.plan import Placement, Plan, Site
from compact_fx.projections import Projection, salt_of


def choose_sites(joint: JointGraph, config: CompactConfig) -> Plan:
    """Choose for each weight gradient: early, late, or left alone and why.

    ::

        x = norm(h); q = x Wq; k = x Wk      # x crosses for two weight gradients only: early,
        grad_q = dqᵀ x; grad_k = dkᵀ x       #   one z = x P is saved in its place
        o = attention(q, k, v); y = o Wo     # attention's backward keeps o anyway: late,
        grad_o = dyᵀ o                       #   z is made there, nothing more crosses

    What the backward has anyway is read off torch's own partition of the graph with all sketches
    early; of the placements tried, the one that keeps the fewest bytes wins.

    Contract: changes nothing. With `place="auto"`, `bytes_after` ≤ `bytes_before`, which is
    torch.compile's own partition; if no placement reaches that, nothing is sketched. Source: paper
    section 3; its exception for the attention output projection is an instance of this rule.
    """
    before = partition(joint.copy(), recompute=False)
    plan = _draft(joint, config)
    if not plan.projections:
        return replace(plan, saved_before=before.saved, saved_after=before.saved)
    trials = list(_trials(joint, plan, config, before))
    best = min(trials, key=lambda trial: trial.cut.bytes)
    if config.place == "auto" and best.cut.bytes > before.bytes:
        reason = f"sketching keeps {best.cut.bytes - before.bytes} bytes more than without"
        sites = tuple(_left_alone(s, s.reason or reason) for s in plan.sites)
        return Plan(sites=sites, saved_before=before.saved, saved_after=before.saved)
    return replace(
        best.plan,
        sites=tuple(_with_bytes(best, before)),
        saved_before=before.saved,
        saved_after=best.cut.saved,
    )


@dataclass(frozen=True)
class _Trial:
    """One placement of all sketches, carried out on a copy of the joint graph.

    Attributes:
        activations, sketches: by sketch, the nodes of x and of z before the cut.
    """

    plan: Plan
    joint: JointGraph
    cut: Partition
    activations: dict[int, fx.Node]
    sketches: dict[int, fx.Node]

    def crossing(self) -> set[int]:
        """Sketches whose whole activation crosses the boundary."""
        return {i for i, x in self.activations.items() if storage_of(x) in self.cut.storages}

    def available(self, recompute: bool) -> set[int]:
        """Sketches whose activation the backward has, or can rebuild by views and pointwise work."""
        present = {node.name for node in self.cut.backward.graph.nodes if node.op != "output"}
        static = self.joint.static_placeholders()
        has: set[fx.Node] = set()
        for node in next(iter(self.activations.values())).graph.nodes:
            rebuilt = _torch.is_view(node) or (recompute and _torch.is_cheap(node))
            if (
                node.name in present
                or node in static
                or _torch.is_recomputed(node)
                or (rebuilt and node.all_input_nodes and has.issuperset(node.all_input_nodes))
            ):
                has.add(node)
        return {i for i, x in self.activations.items() if x in has} | self.crossing()


def _trials(
    joint: JointGraph, plan: Plan, config: CompactConfig, before: Partition
) -> Iterator[_Trial]:
    everything = {site.sketch for site in plan.sketched}
    if config.place != "auto":
        yield _try(joint, _placed(plan, everything if config.place == "late" else ()), config)
        return
    yield (early := _try(joint, plan, config))
    smallest = early.cut.bytes
    if late := early.available(config.recompute):
        yield (mixed := _try(joint, _placed(plan, late), config))
        smallest = min(smallest, mixed.cut.bytes)
        # The partitioner would rather save these than rebuild them: a sketch is smaller.
        if needless := mixed.crossing() - early.crossing():
            yield (settled := _try(joint, _placed(plan, late - needless), config))
            smallest = min(smallest, settled.cut.bytes)
    if smallest > before.bytes:
        yield _try(joint, _placed(plan, everything), config)


def _try(joint: JointGraph, plan: Plan, config: CompactConfig) -> _Trial:
    copy = joint.with_keys(len(plan.projections))
    uses = _uses(find_weight_grads(copy))
    activations = {
        site.sketch: uses[site.index, site.use].activation
        for site in plan.sketched
        if site.sketch is not None
    }
    sketches = rewrite_weight_grads(copy, plan)
    return _Trial(plan, copy, partition(copy, recompute=config.recompute), activations, sketches)


def _uses(grads: Iterable[WeightGrad]) -> dict[tuple[int, int], Use]:
    return {(grad.index, i): use for grad in grads for i, use in enumerate(grad.uses)}


def _placed(plan: Plan, late: Iterable[int | None]) -> Plan:
    late = set(late)

    def place(site: Site) -> Placement | None:
        return site.placement and ("late" if site.sketch in late else "early")

    return replace(plan, sites=tuple(replace(s, placement=place(s)) for s in plan.sites))


def _left_alone(site: Site, reason: str) -> Site:
    return replace(
        site,
        rank=0,
        placement=None,
        reason=reason,
        sketch=None,
        projection=None,
        flops_after=site.flops_before,
    )


def _draft(joint: JointGraph, config: CompactConfig) -> Plan:
    """Every site with its rank, sketch, projection and FLOPs, all early."""
    grads = find_weight_grads(joint)
    uses = _uses(grads)
    sites: list[Site] = []
    for grad in grads:
        if not grad.uses:
            sites.append(Site(weight=grad.name, index=grad.index, reason=grad.reason))
        sites += [_site(grad, i, use, config) for i, use in enumerate(grad.uses)]

    salts = _salts(sites, uses)
    sketches: dict[tuple[fx.Node, Projection], int] = {}
    projections: dict[Projection, int] = {}
    owners: list[int] = []
    for position, site in enumerate(sites):
        if site.placement is None:
            continue
        x = uses[site.index, site.use].activation
        projection = Projection(
            salt=salts[site.weight],
            in_features=site.in_features,
            rank=site.rank,
            kind=config.projection,
            dtype=x.meta["val"].dtype,
        )
        if projection not in projections:
            projections[projection] = len(projections)
            owners.append(site.index)
        sketch = sketches.setdefault((x, projection), len(sketches))
        sites[position] = replace(site, sketch=sketch, projection=projections[projection])
    return Plan(
        sites=tuple(_with_flops(sites, uses)),
        projections=tuple(projections),
        owners=tuple(owners),
    )


def _site(grad: WeightGrad, position: int, use: Use, config: CompactConfig) -> Site:
    """The site with its rank, or with the reason why it is left alone."""
    n, m = use.in_features, use.out_features
    bare = Site(weight=grad.name, index=grad.index, use=position)
    if not (isinstance(n, int) and isinstance(m, int)):
        return replace(bare, reason="its shape is symbolic")
    bare = replace(bare, in_features=n, out_features=m)
    rank = config.rank_of(grad.name)
    if not any(fnmatchcase(grad.name, pattern) for pattern in config.include):
        return replace(bare, reason="not in include")
    if any(fnmatchcase(grad.name, pattern) for pattern in config.exclude):
        return replace(bare, reason="in exclude")
    if rank is None:
        return replace(bare, reason="no pattern of rank matches")
    if n < config.min_features:
        return replace(bare, reason=f"in_features {n} < min_features {config.min_features}")
    if (columns := resolve_rank(rank, n)) > n:
        return replace(bare, reason=f"rank {columns} > in_features {n}")
    if not use.activation.meta["val"].dtype.is_floating_point:
        return replace(bare, reason=f"its input is {use.activation.meta['val'].dtype}")
    return replace(bare, rank=columns, placement="early")


def _salts(sites: Iterable[Site], uses: dict[tuple[int, int], Use]) -> dict[str, int]:
    """One salt for all weights that are connected by activations they share.

    It comes from the first of their names: a weight used twice, or in two graphs, is sketched with
    one projection, and so can its gradients be added.
    """
    connected: dict[object, set[str]] = {}
    for site in sites:
        if site.placement is not None:
            x = uses[site.index, site.use].activation
            names = connected.get(x, set()) | connected.get(site.weight, set()) | {site.weight}
            for member in (x, *names):
                connected[member] = names
            for other, members in connected.items():
                if members & names:
                    connected[other] = names
    return {site.weight: salt_of(min(connected.get(site.weight, {""}))) for site in sites}


def _with_flops(
    sites: list[Site], uses: dict[tuple[int, int], Use]
) -> Iterator[Site]:
    shares: dict[int | None, int] = {}
    for site in sites:
        shares[site.sketch] = shares.get(site.sketch, 0) + 1
    for site in sites:
        use = uses.get((site.index, site.use))
        if use is None:
            yield site
            continue
        t, n, m, r = _torch.size_hint(use.tokens), site.in_features, site.out_features, site.rank
        dense = 2 * t * n * m
        sketched = 2 * t * n * r // shares[site.sketch] + 2 * t * r * m + 2 * n * r * m
        yield replace(
            site, flops_before=dense, flops_after=dense if site.placement is None else sketched
        )


def _with_bytes(best: _Trial, before: Partition) -> Iterator[Site]:
    """Each activation's bytes, counted at the first of its sites."""
    counted: set[int] = set()
    for site in best.plan.sites:
        if site.sketch is None:
            yield site
            continue
        kept = {storage_of(best.activations[site.sketch]), storage_of(best.sketches[site.sketch])}
        kept -= counted
        counted |= kept
        yield replace(
            site,
            bytes_before=sum(before.saved_by_storage[s].bytes for s in kept & before.storages),
            bytes_after=sum(best.cut.saved_by_storage[s].bytes for s in kept & best.cut.storages),
        )
