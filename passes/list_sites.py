"""List the weight gradients that may be sketched: at what rank, with whom, or why not."""

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import get_args

from torch import fx

from compact_fx.config import CompactConfig, resolve_rank
from compact_fx.errors import failures_of
from compact_fx.passes.find_weight_grads import Use, WeightGrad, find_weight_grads
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.nodes import GROUPED_PRODUCT
from compact_fx.plan import FactorInput, Plan, ProjectionInput, Side, Site
from compact_fx.projections import Projection, salt_of

CHOSEN = {"not in include", "in exclude", "no pattern of rank matches"}
"""Reasons that a person gave."""

Uses = Mapping[tuple[int, int], Use]
"""By a site's index and use."""


def list_sites(
    joint: JointGraph,
    config: CompactConfig,
    failed: Mapping[str, str] | None = None,
    input_side: Set[int] = frozenset(),
) -> tuple[Plan, Uses]:
    """Every candidate weight, sketched late in a first draft, or left alone and why.

    ::

        q = x Wq; k = x Wk; y = o Wo     # q and k: one sketch of x, one projection
        sites = (Wq: rank 512, sketch 0, projection 0), (Wk: the same), (Wo: sketch 1, projection 1)

    Args:
        joint: read only.
        failed: weight name → reason, of those that a pass has failed for.
        input_side: indices of weights that may not be sketched on their output side.

    Raises:
        SiteFailed: a weight that this or an earlier pass fails for.

    Returns:
        The draft, and what each of its sites is in the graph.

    Contract: a tracked weight with less out_features than in_features is sketched on its output
    side; all others on their input side. A factor keeps the dimension in which its weight is
    sharded: that may ask for the other side. A weight that has a projection from another graph
    keeps it, and its side, and shares a sketch only with weights that have the same. A head is a
    weight of the same shape as a table of words, of this graph or of one before it, with more words
    than features.
    """
    grads = find_weight_grads(joint, skip=failed)
    uses = {(grad.index, i): use for grad in grads for i, use in enumerate(grad.uses)}
    known = {index for index, side in joint.sides.items() if side == "input"}
    heads = frozenset() if config.sketch_heads else joint.earlier.vocabularies
    sites = [
        site
        for grad in grads
        for site in _sites_of(
            grad, config, grad.index in known | set(input_side), heads, joint.shards.get(grad.index)
        )
    ]
    uses |= {(s.index, s.use): uses[s.index, s.use].on(s.side) for s in sites if s.rank}
    salts, connected = _salts(sites, uses, joint.salts)
    sketches: dict[tuple[fx.Node, bool, int], int] = {}
    # Drawn ones of one salt are one; tracked ones only if they follow the same gradients.
    numbers: dict[tuple[Projection, int], int] = {}
    owners: list[list[int]] = []
    for position, site in enumerate(sites):
        if site.placement is None:
            continue
        use = uses[site.index, site.use]
        projection = Projection(
            salt=salts[site.index],
            features=site.features,
            rank=site.rank,
            kind=config.kind,
            dtype=use.projected.meta["val"].dtype,
        )
        key = (projection, connected[site.index] if projection.is_tracked else 0)
        if key not in numbers:
            numbers[key] = len(numbers)
            owners.append([])
        number = numbers[key]
        if site.index not in owners[number]:
            owners[number].append(site.index)
        shared = (use.projected, use.features_first, number)
        sites[position] = replace(
            site, sketch=sketches.setdefault(shared, len(sketches)), projection=number
        )
    factors: list[FactorInput] = []
    if config.gradients == "sketched":
        for grad in grads:
            own = [(i, site) for i, site in enumerate(sites) if site.index == grad.index]
            if all(site.sketch is None for _, site in own):
                continue
            factor = _factor_input(grad, [site for _, site in own], uses, joint)
            if isinstance(factor, FactorInput):
                factors.append(factor)
            else:
                for i, site in own:
                    sites[i] = replace(site, reason=site.reason or f"dense gradient: {factor}")
    drawn = [ProjectionInput(projection=i, owners=tuple(own)) for i, own in enumerate(owners)]
    plan = Plan(
        sites=tuple(sites),
        projections=tuple(projection for projection, _ in numbers),
        inputs=(*drawn, *factors),
        track_every=config.track_every if config.kind == "tracked" else 1,
    )
    return plan, uses


def _sites_of(
    grad: WeightGrad,
    config: CompactConfig,
    on_input: bool,
    heads: Set[tuple[int, int]],
    shard: int | None,
) -> Iterable[Site]:
    bare = Site(weight=grad.name, index=grad.index)
    if not grad.uses:
        yield replace(bare, reason=grad.reason)
    for i, use in enumerate(grad.uses):
        with failures_of("list_sites", grad.name):
            yield _site(replace(bare, use=i), use, config, on_input, heads, shard)
    if grad.uses and grad.reason:
        yield replace(bare, use=len(grad.uses), reason=f"another part: {grad.reason}")


def keeps_shards(use: Use, side: Side, shard: int | None) -> bool:
    """Whether the factor of a weight has the dimension in which that is sharded, if it is."""
    return shard is None or use.on(side).dim != shard


def _site(
    bare: Site,
    use: Use,
    config: CompactConfig,
    on_input: bool,
    heads: Set[tuple[int, int]],
    shard: int | None,
) -> Site:
    """The site with its rank, or with the reason why it is left alone.

    heads: out_features and in_features of heads over a vocabulary.
    shard: the dimension in which the weight is sharded.
    """
    n, m = use.in_features, use.out_features
    if not (isinstance(n, int) and isinstance(m, int) and isinstance(use.experts, int)):
        return replace(bare, reason="its shape is symbolic")
    bare = replace(bare, in_features=n, out_features=m)
    rank = config.rank_of(bare.weight)
    if not any(fnmatchcase(bare.weight, pattern) for pattern in config.include):
        return replace(bare, reason="not in include")
    if any(fnmatchcase(bare.weight, pattern) for pattern in config.exclude):
        return replace(bare, reason="in exclude")
    if rank is None:
        return replace(bare, reason="no pattern of rank matches")
    if n < config.min_features:
        return replace(bare, reason=f"in_features {n} < min_features {config.min_features}")
    if (m, n) in heads and m > n:
        return replace(bare, reason=f"a head over {m} words: sketch_heads=False")
    if config.kind == "tracked" and use.matmul.target is GROUPED_PRODUCT:
        return replace(bare, reason="a grouped matmul of this dtype is not tracked")
    may_be_output = config.kind == "tracked" and config.min_features <= m <= n and not on_input
    may_be_output = may_be_output and resolve_rank(rank, m) <= m
    fits_input, fits_output = (keeps_shards(use, side, shard) for side in get_args(Side))
    hint = f"sharded in dimension {shard}: see compact_fx.shard_placement"
    if may_be_output and fits_output and (m < n or not fits_input):
        bare, n = replace(bare, side="output"), m
    elif not fits_input:
        return replace(bare, reason=hint)
    elif may_be_output and m < n:
        bare = replace(bare, reason=f"on its input side, {hint}")
    if (columns := resolve_rank(rank, n)) > n:
        return replace(bare, reason=f"rank {columns} > in_features {n}")
    if columns % use.rank_multiple:
        reason = f"rank {columns} is not a multiple of {use.rank_multiple} in a grouped matmul"
        return replace(bare, reason=reason)
    if not use.activation.meta["val"].dtype.is_floating_point:
        return replace(bare, reason=f"its input is {use.activation.meta['val'].dtype}")
    return replace(bare, rank=columns, placement="late")


def _salts(
    sites: Iterable[Site], uses: Uses, given: Mapping[int, int]
) -> tuple[dict[int, int], dict[int, int]]:
    """By index: one salt for all weights that are connected by activations they share, and who is.

    It comes from the first of their names: a weight that is used twice is sketched with one
    projection. Those that have a salt from another graph keep it, and those that have none get
    the first that a weight they are connected with has.
    """
    group_of: dict[object, set[tuple[str, int]]] = {}
    for site in sites:
        if site.placement is None:
            continue
        group = {(site.weight, site.index)}
        for member in (site.index, uses[site.index, site.use].projected):
            group |= group_of.get(member, set())
            group_of[member] = group
        for _, index in group:
            group_of[index] = group
    salts: dict[int, int] = {}
    connected: dict[int, int] = {}
    for index, group in ((i, g) for i, g in group_of.items() if isinstance(i, int)):
        members = sorted(group)
        known = [given[member] for _, member in members if member in given]
        salts[index] = given.get(index, known[0] if known else salt_of(members[0][0]))
        connected[index] = members[0][1]
    return salts, connected


def _factor_input(
    grad: WeightGrad, sites: list[Site], uses: Uses, joint: JointGraph
) -> FactorInput | str:
    """The input that receives a weight's factor, or why its gradient cannot stay one."""
    if grad.reason:
        return grad.reason
    if len({site.projection for site in sites}) > 1:
        return "its uses are not sketched alike"
    dim, *others = (uses[site.index, site.use].dim for site in sites)
    if dim is None or any(other != dim for other in others):
        return "it is reshaped before it is used"
    assert sites[0].projection is not None
    shape = list(joint.inputs()[grad.index].meta["val"].shape)
    shape[dim] = sites[0].rank
    return FactorInput(
        index=grad.index, projection=sites[0].projection, shape=tuple(shape), dim=dim
    )
