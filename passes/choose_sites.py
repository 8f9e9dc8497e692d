"""Decide which weight gradients are sketched, and on which side of the boundary."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import fx

from compact_fx import _torch
from compact_fx.config import CompactConfig, resolve_rank
from compact_fx.passes.find_weight_grads import Use, WeightGrad, find_weight_grads
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.partition import Partition, bytes_of, is_tensor, partition, storage_of
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.plan import Plan, Proxy, Site
from compact_fx.projections import Kind, Projection, is_gathered, salt_of


def choose_sites(joint: JointGraph, config: CompactConfig) -> Plan:
    """Choose for each weight gradient: early, late, or left alone and why.

    ::

        x = norm(h); q = x Wq; k = x Wk      # x crosses for two weight gradients only: early,
        grad_q = dqᵀ x; grad_k = dkᵀ x       #   one z = x P is saved in its place
        o = attention(q, k, v); y = o Wo     # attention's backward keeps o anyway: late,
        grad_o = dyᵀ o                       #   z is made there, nothing more crosses

    First all sketches are late, and torch's own partition shows which saved tensors would then
    cross for a sketch alone. Where these take at least the bytes of the sketch, it is left to the
    partitioner, which saves it in their place.

    Contract: changes nothing. With `place="auto"`, `bytes_after` ≤ `bytes_before`, which is
    torch.compile's own partition; if no placement reaches that, nothing is sketched. Source: paper
    section 3; its exception for the attention output projection is an instance of this rule.
    """
    before = partition(joint.copy(), recompute=False)
    plan = _draft(joint, config)
    if not plan.projections:
        return replace(plan, saved_before=before.saved, saved_after=before.saved)
    everything = frozenset(site.sketch for site in plan.sketched if site.sketch is not None)
    late = frozenset() if config.place == "early" else everything
    # What is rebuilt from an input has to find the value that the forward saw.
    recompute = config.recompute and not joint.mutates_inputs()
    best = _try(joint, replace(plan, place=config.place, recompute=recompute, late=late))
    if config.place == "auto" and (early := best.smaller_early()):
        trial = _try(joint, replace(best.plan, late=everything - early))
        best = min(best, trial, key=lambda trial: trial.cut.bytes)
    if config.place == "auto" and best.cut.bytes > before.bytes:
        reason = f"sketching keeps {best.cut.bytes - before.bytes} bytes more than without"
        sites = tuple(
            _left_alone(s, s.reason if s.placement is None else reason) for s in plan.sites
        )
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
    cut: Partition
    activations: dict[int, fx.Node]
    sketches: dict[int, fx.Node]

    def smaller_early(self) -> set[int]:
        """Late sketches that take no more bytes than what crosses for their sake alone."""
        nodes = {node.name: node for node in self.cut.backward.graph.nodes}
        sketches = {i: nodes[z.name] for i, z in self.sketches.items() if z.name in nodes}
        output = self.cut.backward.graph.output_node()
        needed_anyway = self._read_by(output, stop=set(sketches.values()))
        needed_anyway |= {storage_of(node) for node in self.cut.results if is_tensor(node)}
        groups: list[tuple[set[int], set[int]]] = []  # sketches, and the storages only they read
        for i, z in sketches.items():
            members, storages = {i}, self._read_by(z) - needed_anyway
            for group in [group for group in groups if group[1] & storages]:
                groups.remove(group)
                members, storages = members | group[0], storages | group[1]
            groups.append((members, storages))
        early: set[int] = set()
        for members, storages in groups:
            whole = sum(self.cut.saved_by_storage[storage].bytes for storage in storages)
            if whole >= sum(bytes_of(sketches[i]) for i in members):
                early |= members
        return early

    def _read_by(self, node: fx.Node, stop: Set[fx.Node] = frozenset()) -> set[int]:
        """Storages crossing the boundary that a node of the backward graph depends on."""
        seen, pending = {node}, [node]
        while pending:
            sources = set(pending.pop().all_input_nodes) - seen - stop
            seen |= sources
            pending += sources
        saved = {storage_of(n) for n in seen if n.op == "placeholder" and is_tensor(n)}
        return saved & self.cut.storages


def _try(joint: JointGraph, plan: Plan) -> _Trial:
    copy = joint.with_keys(plan.projections, plan.proxies)
    uses = _uses(find_weight_grads(copy))
    activations = {
        site.sketch: uses[site.index, site.use].activation
        for site in plan.sketched
        if site.sketch is not None
    }
    sketches = rewrite_weight_grads(copy, plan)
    cut = partition(copy, recompute=plan.recompute, early=plan.early(sketches))
    return _Trial(plan, cut, activations, sketches)


def _uses(grads: Iterable[WeightGrad]) -> dict[tuple[int, int], Use]:
    return {(grad.index, i): use for grad in grads for i, use in enumerate(grad.uses)}


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
    """Every site with its rank, sketch, projection and FLOPs."""
    grads = find_weight_grads(joint)
    uses = _uses(grads)
    sites: list[Site] = []
    for grad in grads:
        if not grad.uses:
            sites.append(Site(weight=grad.name, index=grad.index, reason=grad.reason))
        sites += [_site(grad, i, use, config) for i, use in enumerate(grad.uses)]
        if grad.uses and grad.reason:
            part = Site(weight=grad.name, index=grad.index, reason=f"another part: {grad.reason}")
            sites.append(replace(part, use=len(grad.uses)))

    salts = _salts(sites, uses)
    sketches: dict[tuple[fx.Node, bool, Projection], int] = {}
    projections: dict[Projection, int] = {}
    owners: list[int] = []
    for position, site in enumerate(sites):
        if site.placement is None:
            continue
        use = uses[site.index, site.use]
        projection = Projection(
            salt=salts[site.weight],
            in_features=site.in_features,
            rank=site.rank,
            kind=config.projection,
            dtype=use.activation.meta["val"].dtype,
        )
        if projection not in projections:
            projections[projection] = len(projections)
            owners.append(site.index)
        key = (use.activation, use.features_first, projection)
        sketch = sketches.setdefault(key, len(sketches))
        sites[position] = replace(site, sketch=sketch, projection=projections[projection])
    proxies: dict[int, Proxy] = {}
    if config.gradients == "sketched":
        for grad in grads:
            own = [(i, site) for i, site in enumerate(sites) if site.index == grad.index]
            if all(site.placement is None for _, site in own):
                continue
            proxy = _proxy(grad, [site for _, site in own], joint)
            if isinstance(proxy, Proxy):
                proxies[grad.index] = proxy
            else:
                for i, site in own:
                    sites[i] = replace(site, reason=site.reason or f"dense gradient: {proxy}")
    return Plan(
        sites=tuple(_with_flops(sites, uses, proxies, config.projection)),
        projections=tuple(projections),
        owners=tuple(owners),
        proxies=tuple(proxies.values()),
    )


def _proxy(grad: WeightGrad, sites: list[Site], joint: JointGraph) -> Proxy | str:
    """The proxy of a weight, or the reason why its gradient cannot stay sketched."""
    if grad.reason:
        return grad.reason
    if len({site.projection for site in sites}) > 1:
        return "its uses are not sketched alike"
    in_dim, *others = (use.in_dim for use in grad.uses)
    if in_dim is None or any(other != in_dim for other in others):
        return "it is reshaped before it is used"
    assert sites[0].projection is not None
    shape = list(joint.inputs()[grad.index].meta["val"].shape)
    shape[in_dim] = sites[0].rank
    return Proxy(
        index=grad.index,
        projection=sites[0].projection,
        shape=tuple(shape),
        in_dim=in_dim,
    )


def _site(grad: WeightGrad, position: int, use: Use, config: CompactConfig) -> Site:
    """The site with its rank, or with the reason why it is left alone."""
    n, m = use.in_features, use.out_features
    bare = Site(weight=grad.name, index=grad.index, use=position)
    if not (isinstance(n, int) and isinstance(m, int) and isinstance(use.experts, int)):
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
    if columns % use.rank_multiple:
        reason = f"rank {columns} is not a multiple of {use.rank_multiple} in a grouped matmul"
        return replace(bare, reason=reason)
    if not use.activation.meta["val"].dtype.is_floating_point:
        return replace(bare, reason=f"its input is {use.activation.meta['val'].dtype}")
    return replace(bare, rank=columns, placement="late")


def _salts(sites: Iterable[Site], uses: dict[tuple[int, int], Use]) -> dict[str, int]:
    """One salt for all weights that are connected by activations they share.

    It comes from the first of their names: a weight that is used twice is sketched with one
    projection, and so is one in two graphs where it shares activations with the same weights.
    """
    group_of: dict[object, set[str]] = {}
    for site in sites:
        if site.placement is None:
            continue
        group = {site.weight}
        for member in (site.weight, uses[site.index, site.use].activation):
            group |= group_of.get(member, set())
            group_of[member] = group
        group_of.update(dict.fromkeys(group, group))
    return {site.weight: salt_of(min(group_of.get(site.weight, {""}))) for site in sites}


def _with_flops(
    sites: list[Site],
    uses: dict[tuple[int, int], Use],
    proxies: Mapping[int, Proxy],
    kind: Kind,
) -> Iterator[Site]:
    shares: dict[int | None, int] = {}
    for site in sites:
        shares[site.sketch] = shares.get(site.sketch, 0) + 1
    for site in sites:
        use = uses.get((site.index, site.use))
        if use is None:
            yield site
            continue
        t, e = _torch.size_hint(use.tokens), _torch.size_hint(use.experts)
        n, m, r = site.in_features, site.out_features, site.rank
        dense = sketched = 2 * t * n * m
        if site.placement is not None:
            terms = 1 if is_gathered(kind, n, r) else r  # for each row of P
            sketched = 2 * t * n * terms // shares[site.sketch] + 2 * t * r * m
            sketched += 0 if site.index in proxies else 2 * e * n * terms * m
        yield replace(site, flops_before=dense, flops_after=sketched)


def _with_bytes(best: _Trial, before: Partition) -> Iterator[Site]:
    """Each activation's bytes, counted at the first of its sites."""
    counted: set[int] = set()
    saved = {node.name for node in best.cut.forward.graph.output_node().all_input_nodes}
    for site in best.plan.sites:
        if site.sketch is None:
            yield site
            continue
        kept = {storage_of(best.activations[site.sketch]), storage_of(best.sketches[site.sketch])}
        kept -= counted
        counted |= kept
        yield replace(
            site,
            placement="early" if best.sketches[site.sketch].name in saved else "late",
            bytes_before=sum(before.saved_by_storage[s].bytes for s in kept & before.storages),
            bytes_after=sum(best.cut.saved_by_storage[s].bytes for s in kept & best.cut.storages),
        )
