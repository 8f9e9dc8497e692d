"""Decide which weight gradients are sketched, and on which side of the boundary."""

import math
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, replace

from torch import fx

from compact_fx.config import CompactConfig
from compact_fx.errors import BudgetTooSmall
from compact_fx.passes.apply_plan import cut, observed, rewrite
from compact_fx.passes.costs import (
    change_flops,
    costs_of,
    early_bytes,
    extra_bytes,
    flops_of,
    projection_bytes,
)
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.list_sites import Uses, keeps_shards, list_sites
from compact_fx.passes.live_bytes import graph_memory
from compact_fx.passes.nodes import is_tensor, storage_of
from compact_fx.passes.partition import Partition, partition
from compact_fx.plan import Account, LowBit, Placement, Plan, Site, SiteCost


def choose_sites(
    joint: JointGraph, config: CompactConfig, failed: Mapping[str, str] | None = None
) -> Plan:
    """Choose for each weight gradient: early, late, or left alone and why.

    ::

        x = norm(h); q = x Wq; k = x Wk      # x crosses for two weight gradients only: early,
        grad_q = dqᵀ x; grad_k = dkᵀ x       #   one z = x P is saved in its place
        o = attention(q, k, v); y = o Wo     # attention's backward keeps o anyway: late,
        grad_o = dyᵀ o                       #   z is made there, nothing more crosses

    First all sketches are late, and torch's own partition shows which saved tensors would then
    cross for a sketch alone. Where these take at least the bytes of the sketch, it is made early.
    On a weight's output side the activation is read as it is, so that there is no early sketch:
    where it would cross for the weight alone, the weight is sketched on its input side.

    Args:
        joint: read only.
        failed: weight name → reason, of those that a pass has failed for.

    Contract: changes nothing. With `place="auto"`, `bytes_after` ≤ `bytes_before`, which is
    torch.compile's own partition; if no placement reaches that, nothing is sketched. What tracked
    projections hold counts as well, less what factors save of gradients. Source: paper section 3;
    its exception for the attention output projection is an instance of this rule.
    """
    with observed("partition", joint.module):
        before = partition(joint.copy(), recompute=False)
    if config.memory_budget is None:
        saved = None if config.saved == "keep" else config.saved
        return choose_for(joint, config, failed, before, Treatment(config.recompute, saved))[0]
    whole = graph_memory(before, joint, with_reuse=True).peak
    allowed = config.memory_budget
    if isinstance(allowed, float):  # what another graph may take, this one may as well
        allowed = max(int(allowed * whole), joint.earlier.allowed)
    peaks = []
    for treatment in LADDER:
        plan, cut = choose_for(joint, config, failed, before, treatment)
        peaks.append(graph_memory(cut, joint).peak)
        if peaks[-1] <= allowed:
            return replace(plan, account=replace(plan.account, allowed=allowed, peak=peaks[-1]))
    if whole <= allowed:
        draft, uses = list_sites(joint, config, failed)
        draft = _left_alone(draft, f"memory_budget={config.memory_budget!r} allows no sketch")
        return _untouched(joint, draft, uses, before)[0]
    smallest = min(peaks)
    share = math.ceil(1000 * smallest / whole) / 1000
    hint = f": memory_budget={share}" if share <= 1 else ""
    raise BudgetTooSmall(
        f"memory_budget={config.memory_budget!r} allows activations to take {allowed} bytes at the "
        f"peak of a graph, where torch.compile's take {whole}; the smallest that can be reached is "
        f"{smallest}{hint}. Checkpointing takes less, a loss in chunks where logits are the most, "
        "and of a number of bytes a smaller batch",
        smallest,
        share,
    )


@dataclass(frozen=True)
class Treatment:
    """What is done to the tensors that cross; see `Plan`."""

    recompute: bool
    saved: LowBit | None = None
    share: float = 1.0

    def of(self, plan: Plan, joint: JointGraph) -> Plan:
        """The plan with this."""
        # What is rebuilt from an input has to find the value that the forward saw.
        recompute = self.recompute and not joint.mutates_inputs()
        return replace(plan, recompute=recompute, saved=self.saved, saved_share=self.share)


LADDER = (
    Treatment(recompute=False),
    Treatment(recompute=True),
    *(Treatment(True, "int8", share) for share in (0.25, 0.5, 0.75, 1.0)),
)
"""From what costs least time to what takes least memory.

Torch's `activation_memory_budget` is no further step: what it runs again is there at once, and the
predicted peak of six LLaMA blocks rises from 0.49 to 0.57 (at 0.8) and more.
"""


def choose_for(
    joint: JointGraph,
    config: CompactConfig,
    failed: Mapping[str, str] | None,
    before: Partition,
    treatment: Treatment,
) -> tuple[Plan, Partition]:
    """The plan of one treatment, and its cut; `before` is torch.compile's, as above."""
    with observed("list_sites", joint.module):
        on_input = set(joint.weights) if config.place == "early" else set()
        draft, uses = list_sites(joint, config, failed, on_input)
    if not draft.sketched:
        return _untouched(joint, treatment.of(draft, joint), uses, before)
    everything = {_key(site) for site in draft.sketched}
    draft = treatment.of(draft, joint)
    best = _try(joint, _placed(draft, everything if config.place == "early" else set()))
    early = best.smaller_early(uses) if config.place == "auto" else set()
    on_output = {site.index for site in draft.sketched if site.side == "output"}
    # Those that other graphs have on this side stay there, and those that are sharded for it.
    staying = on_output & {
        index
        for (index, _), use in uses.items()
        if index in joint.sides or not keeps_shards(use, "input", joint.shards.get(index))
    }
    early = {key for key in early if key[0] not in staying}
    if early:
        moved = on_output & {index for index, _ in early}
        staying_early = {key for key in early if key[0] not in moved}
        choices = [(draft, uses, staying_early)] if staying_early else []
        if moved:  # as their projections are larger there, it may not be worth it
            choices.append((*list_sites(joint, config, failed, moved), early))
        for other, others, chosen in choices:
            trial = _try(joint, _placed(treatment.of(other, joint), chosen))
            if trial.bytes(joint) < best.bytes(joint):
                best, uses = trial, others
    more = best.bytes(joint) - before.bytes
    if config.place == "auto" and more > 0:
        draft = _left_alone(draft, f"sketching keeps {more} bytes more than without")
        return _untouched(joint, draft, uses, before)
    account = Account(
        saved_before=before.saved,
        saved_after=best.cut.saved,
        projection_bytes=projection_bytes(best.plan),
        change_flops=change_flops(best.plan),
        sites=costs_of(best.plan, uses, before, best.cut, best.sketches),
    )
    return replace(best.plan, account=account), best.cut


def _key(site: Site) -> tuple[int, int]:
    return site.index, site.use


def _placed(plan: Plan, early: Set[tuple[int, int]]) -> Plan:
    """The plan with the sketches of these sites early and all others late."""
    chosen = {site.sketch for site in plan.sketched if _key(site) in early}

    def placement(sketch: int) -> Placement:
        return "early" if sketch in chosen else "late"

    sites = (
        site if site.sketch is None else replace(site, placement=placement(site.sketch))
        for site in plan.sites
    )
    return replace(plan, sites=tuple(sites))


def _left_alone(plan: Plan, reason: str) -> Plan:
    """The plan without sketches, and why."""
    sites = (s.left_alone(s.reason if s.sketch is None else reason) for s in plan.sites)
    return replace(plan, sites=tuple(sites))


def _untouched(
    joint: JointGraph, plan: Plan, uses: Uses, before: Partition
) -> tuple[Plan, Partition]:
    """Nothing is sketched; what crosses is treated all the same, if anything is asked for."""
    if plan.saved is None:  # it is compiled as torch would
        cut, plan = before, Plan(sites=plan.sites)
    else:
        plan = Plan(
            sites=plan.sites,
            recompute=plan.recompute,
            saved=plan.saved,
            saved_share=plan.saved_share,
        )
        cut = _try(joint, plan).cut
    costs = (SiteCost(flops_before=flops, flops_after=flops) for flops, _ in flops_of(plan, uses))
    account = Account(saved_before=before.saved, saved_after=cut.saved, sites=tuple(costs))
    return replace(plan, account=account), cut


@dataclass(frozen=True)
class _Trial:
    """One placement of all sketches, carried out on a copy of the joint graph.

    Attributes:
        sketches: for each the nodes that read its activation, before the cut.
    """

    plan: Plan
    cut: Partition
    sketches: dict[int, tuple[fx.Node, ...]]

    def bytes(self, joint: JointGraph) -> int:
        """What crosses, and what projections hold beyond what factors save."""
        return self.cut.bytes + extra_bytes(self.plan, joint)

    def smaller_early(self, uses: Uses) -> set[tuple[int, int]]:
        """Sites whose sketches take no more bytes early than what crosses for their sake alone."""
        nodes = {node.name: node for node in self.cut.backward.graph.nodes}
        readers = {
            i: [nodes[node.name] for node in reading if node.name in nodes]
            for i, reading in self.sketches.items()
        }
        output = self.cut.backward.graph.output_node()
        stop = {node for reading in readers.values() for node in reading}
        needed_anyway = self._read_by([output], stop=stop)
        needed_anyway |= {storage_of(node) for node in self.cut.results if is_tensor(node)}
        groups: list[tuple[set[int], set[int]]] = []  # sketches, and the storages only they read
        for i, reading in readers.items():
            if not reading:
                continue
            members, storages = {i}, self._read_by(reading) - needed_anyway
            for group in [group for group in groups if group[1] & storages]:
                groups.remove(group)
                members, storages = members | group[0], storages | group[1]
            groups.append((members, storages))
        sizes = self._early_bytes(uses)
        early: set[int] = set()
        for members, storages in groups:
            whole = sum(self.cut.saved_by_storage[storage].bytes for storage in storages)
            if whole >= sum(sizes[i] for i in members):
                early |= members
        return {_key(site) for site in self.plan.sketched if site.sketch in early}

    def _early_bytes(self, uses: Uses) -> dict[int, int]:
        """For each sketch what crosses if it is early, on the input side."""
        sizes: dict[int, dict[fx.Node, int]] = {i: {} for i in self.sketches}
        for site in self.plan.sketched:
            assert site.sketch is not None
            x = uses[site.index, site.use].activation
            sizes[site.sketch][x] = early_bytes(x, site, self.plan)
        return {i: sum(by_activation.values()) for i, by_activation in sizes.items()}

    def _read_by(self, nodes: Iterable[fx.Node], stop: Set[fx.Node] = frozenset()) -> set[int]:
        """Storages crossing the boundary that nodes of the backward graph depend on."""
        pending = list(nodes)
        seen = set(pending)
        while pending:
            sources = set(pending.pop().all_input_nodes) - seen - stop
            seen |= sources
            pending += sources
        saved = {storage_of(n) for n in seen if n.op == "placeholder" and is_tensor(n)}
        return saved & self.cut.storages


def _try(joint: JointGraph, plan: Plan) -> _Trial:
    rewritten = rewrite(joint, plan)
    return _Trial(plan, cut(rewritten, plan), rewritten.sketches)
