"""Decide which weight gradients are sketched, and on which side of the boundary."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace

from torch import fx

from compact_fx.config import CompactConfig
from compact_fx.passes.apply_plan import cut, observed, rewrite
from compact_fx.passes.costs import costs_of, flops_of
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.list_sites import Uses, list_sites
from compact_fx.passes.nodes import bytes_of, is_tensor, storage_of
from compact_fx.passes.partition import Partition, partition
from compact_fx.plan import Account, Placement, Plan, SiteCost


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

    Args:
        joint: read only.
        failed: weight name → reason, of those that a pass has failed for.

    Contract: changes nothing. With `place="auto"`, `bytes_after` ≤ `bytes_before`, which is
    torch.compile's own partition; if no placement reaches that, nothing is sketched. Source: paper
    section 3; its exception for the attention output projection is an instance of this rule.
    """
    with observed("partition", joint.module):
        before = partition(joint.copy(), recompute=False)
    with observed("list_sites", joint.module):
        draft, uses = list_sites(joint, config, failed)
    # What is rebuilt from an input has to find the value that the forward saw.
    draft = replace(draft, recompute=config.recompute and not joint.mutates_inputs())
    if not draft.sketched:
        return _untouched(draft, uses, before)
    everything = {site.sketch for site in draft.sketched if site.sketch is not None}
    best = _try(joint, _placed(draft, everything if config.place == "early" else set()))
    if config.place == "auto" and (early := best.smaller_early()):
        trial = _try(joint, _placed(draft, early))
        best = min(best, trial, key=lambda trial: trial.cut.bytes)
    if config.place == "auto" and best.cut.bytes > before.bytes:
        reason = f"sketching keeps {best.cut.bytes - before.bytes} bytes more than without"
        sites = (s.left_alone(s.reason if s.sketch is None else reason) for s in draft.sites)
        return _untouched(Plan(sites=tuple(sites)), uses, before)
    costs = costs_of(best.plan, uses, before, best.cut, best.sketches)
    account = Account(saved_before=before.saved, saved_after=best.cut.saved, sites=costs)
    return replace(best.plan, account=account)


def _placed(plan: Plan, early: Set[int]) -> Plan:
    """The plan with these sketches early and all others late."""

    def placement(sketch: int) -> Placement:
        return "early" if sketch in early else "late"

    sites = (
        site if site.sketch is None else replace(site, placement=placement(site.sketch))
        for site in plan.sites
    )
    return replace(plan, sites=tuple(sites))


def _untouched(plan: Plan, uses: Uses, before: Partition) -> Plan:
    costs = (SiteCost(flops_before=flops, flops_after=flops) for flops, _ in flops_of(plan, uses))
    account = Account(saved_before=before.saved, saved_after=before.saved, sites=tuple(costs))
    return Plan(sites=plan.sites, account=account)


@dataclass(frozen=True)
class _Trial:
    """One placement of all sketches, carried out on a copy of the joint graph.

    Attributes:
        sketches: by sketch, the node of z before the cut.
    """

    plan: Plan
    cut: Partition
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
    rewritten = rewrite(joint, plan)
    return _Trial(plan, cut(rewritten, plan), rewritten.sketches)
