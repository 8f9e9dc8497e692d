"""What a call hands to a compiled graph beyond its own arguments."""

import functools
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.plan import FactorInput, Plan, ProjectionInput
from compact_fx.projections import Basis, DrawnBasis, Projection
from compact_fx.training.delivery import empty_leaf, leaf_of, refuse_hooks
from compact_fx.training.distributed import before_forward, exchange_shards
from compact_fx.training.exchange import told
from compact_fx.training.followed import Followed, change_those_due, changes
from compact_fx.training.watch import Watch
from compact_fx.training.weights import Group, WeightRecord, record_of

_recomputed: list[WeightRecord] = []  # since the last forward pass outside of a backward pass


class GraphInputs:
    """The inputs of one compiled graph that its plan adds, for each call.

    New tensors, never new values in old ones: a backward pass that is still to come keeps what its
    own forward pass got. Equal blocks share a graph, so each set of weights has its own.

    Args:
        seed, interval, follow: of the settings, see `CompactConfig`.
        in_place: new values in old tensors after all, for CUDA graphs, which are recorded anew
            where memory is not the same; a backward pass that is still to come raises then.
    """

    def __init__(
        self,
        plan: Plan,
        watch: Watch,
        *,
        seed: int,
        interval: int,
        follow: float = 0.0,
        in_place: bool = False,
    ) -> None:
        self._plan = plan
        self._watch = watch
        self._seed = seed
        self._interval = interval
        self._follow = follow
        self._in_place = in_place
        self._factors = plan.factor_inputs
        self._sites = {site.index: site for site in plan.sketched}
        named = {site.projection: site.weight for site in reversed(plan.sketched)}
        self._names = [named.get(number, "") for number in range(len(plan.projections))]
        self._indices = tuple(dict.fromkeys(i for p in plan.projection_inputs for i in p.owners))
        self._settings = f"update_interval={interval}; follow={follow}"
        self._is_shared = bool(self._factors) or any(p.is_tracked for p in plan.projections)
        self._last: dict[tuple[int, ...], _Entry] = {}  # by ids of weights

    def examples(self, arguments: Sequence[Any]) -> list[Tensor]:
        """Tensors like those of a call, to trace the graph with; weights may be fake ones."""
        return [self._example(role, arguments) for role in self._plan.inputs]

    def __call__(self, arguments: Sequence[Any]) -> list[Tensor]:
        """A source for each projection and a leaf for each factor, in the plan's order."""
        weights = [arguments[index] for index in self._indices]
        if _torch.is_fake(weights[0]):  # Dynamo's DDPOptimizer asks what comes out of a graph
            return self.examples(arguments)
        ids = tuple(map(id, weights))
        entry = self._last.get(ids)
        recomputes = _torch.in_backward()
        # In a backward pass a checkpoint recomputes: it needs what its forward got.
        if entry is None or not (recomputes or entry.is_current()):
            entry = self._entry(weights, arguments, entry)
            if not recomputes:  # a reentrant checkpoint has no other forward
                self._last[ids] = entry
        if not recomputes:
            before_forward(entry.records, is_shared=self._is_shared)
        if self._factors:
            refuse_hooks(arguments[role.index] for role in self._factors)
            refuse_hooks(r.sharding.parameter for r in entry.factor_records if r.sharding)
        for record in entry.records:
            record.in_graph = True
        for record in entry.dense_records:
            record.in_dense_graph = True
        for record, basis in zip(entry.factor_records, entry.factor_bases, strict=True):
            if recomputes:
                record.recomputed = basis
            else:
                record.basis = basis  # another graph may have had another since
        if recomputes:
            _recomputed.extend(entry.factor_records)
        elif _recomputed:  # a backward pass that wanted no gradients of weights
            for record in _recomputed:
                record.recomputed = None
            _recomputed.clear()
        if not (recomputes or entry.is_stepped):
            self._look_for_steps(entry, weights[0])
        return entry.inputs

    def _entry(
        self, weights: Sequence[Tensor], arguments: Sequence[Any], old: "_Entry | None"
    ) -> "_Entry":
        records = self._records(weights)
        if old is None and self._is_shared:
            dims = {role.index: role.dim for role in self._factors}
            exchange_shards(records, dims, self._texts())
        groups = self._groups(records) if old is None else old.groups
        device = weights[0].device
        followed = self._followed(groups, records, device)
        if any(own.is_due for own in followed.values()):
            change_those_due()
        now, versions = changes(), self._versions(groups)
        if old is not None and versions == old.versions:
            old.changes, old.stays = now, self._stays(groups, followed)
            return old
        bases: list[Basis] = []
        sources: list[Tensor] = []
        for number, (group, own) in enumerate(zip(groups, self._owners(records), strict=True)):
            projection = self._plan.projections[number].with_salt(group.root().salt)
            place = self._place(number, old, arguments)
            if number in followed:
                own_basis: Basis = followed[number].basis(projection, self._seed)
                sources.append(followed[number].leaf(projection.dtype, place))
            else:
                own_basis = self._drawn(projection, group.root())
            bases.append(self._shared(own_basis, own))
            if number not in followed:
                source = bases[-1].source(device)
                sources.append(source if place is None else place.copy_(source))
        factor_bases = [bases[role.projection].along(role.dim) for role in self._factors]
        for index, record in records.items():
            record.watch, record.is_factor = self._watch, False
            site = self._sites.get(index)
            record.side = None if site is None else site.side
            record.name = record.name or ("" if site is None else site.weight)
            record.settings = self._settings
        factor_records = [records[role.index] for role in self._factors]
        for record, basis in zip(factor_records, factor_bases, strict=True):
            record.basis, record.is_factor = basis, True
        leaves = []
        for number, (role, record, basis) in enumerate(
            zip(self._factors, factor_records, factor_bases, strict=True), len(sources)
        ):
            place = self._place(number, old, arguments)
            leaves.append(leaf_of(arguments[role.index], record, role.shape, basis, place))
        # With one of its weights all of it goes; no frame of Python, which Dynamo might trace.
        forget = functools.partial(self._last.pop, tuple(map(id, weights)))
        entry = _Entry(
            references=[weakref.ref(weight, forget) for weight in weights],
            records=list(records.values()),
            dense_records=[r for r in records.values() if not r.is_factor],
            factor_records=factor_records,
            changes=now,
            stays=self._stays(groups, followed),
            groups=groups,
            versions=versions,
            factor_bases=factor_bases,
            inputs=[*sources, *leaves],
        )
        if old is not None:
            entry.take_over(old)
        return entry

    def _records(self, weights: Sequence[Tensor]) -> dict[int, WeightRecord]:
        return dict(zip(self._indices, map(record_of, weights), strict=True))

    def _texts(self) -> dict[int, str]:
        """By weight all that decides what its gradient is."""
        shapes = {role.index: f"factor {role.shape}" for role in self._factors}
        return {
            index: f"{shapes.get(index, 'gradient')}; {told(p, self._seed, self._settings)}"
            for p, own in zip(self._plan.projections, self._plan.projection_inputs, strict=True)
            for index in own.owners
        }

    def _owners(self, records: Mapping[int, WeightRecord]) -> list[list[WeightRecord]]:
        """Of each projection."""
        return [[records[i] for i in p.owners] for p in self._plan.projection_inputs]

    def _groups(self, records: Mapping[int, WeightRecord]) -> list[Group]:
        owners = self._owners(records)
        return [self._group(number, own) for number, own in enumerate(owners)]

    def _group(self, number: int, owners: Sequence[WeightRecord]) -> Group:
        """The weights that have a projection in common, here and in other graphs."""
        known = next((record.group for record in owners if record.group is not None), None)
        group = known or Group(self._plan.projections[number].salt)
        for record in owners:
            group.add(record)
        return group

    def _followed(
        self, groups: Sequence[Group], records: Mapping[int, WeightRecord], device: torch.device
    ) -> dict[int, Followed]:
        """The tracked projections by number; they change as this graph's settings say."""
        found = {}
        owners = self._owners(records)
        for number, (group, p) in enumerate(zip(groups, self._plan.projections, strict=True)):
            if p.is_tracked:
                root = group.root()
                found[number] = followed = root.follow(p.with_salt(root.salt), self._seed, device)
                followed.take_up(p.dtype, device)
                followed.interval = self._interval
                followed.exchange = owners[number][0].exchange
                follows = max(1, round(self._follow * p.rank))
                followed.columns = follows if self._follow else 0
                followed.energies = self._watch.energies_of(self._names[number], followed.energies)
        return found

    def _versions(self, groups: Sequence[Group]) -> list[object]:
        """What stays the same for as long as each projection does."""
        versions: list[object] = []
        for group, p in zip(groups, self._plan.projections, strict=True):
            root = group.root()
            if p.is_tracked:
                followed = root.followed[p.features, p.rank, self._seed]
                # A restored one may be in the version of the one before, which has its own leaf.
                versions.append((root.salt, weakref.ref(followed), followed.version))
            else:
                versions.append((root.salt, root.steps // self._interval))
        return versions

    def _stays(
        self, groups: Sequence[Group], followed: Mapping[int, Followed]
    ) -> list[tuple[Group, range]]:
        """With how many steps of which weights projections stay as they are."""
        stays = []
        for number, root in enumerate(group.root() for group in groups):
            steps = root.steps
            if number in followed:
                end = followed[number].due_at
            else:
                end = (steps // self._interval + 1) * self._interval
            stays.append((root, range(steps, end)))
        return stays

    def _example(self, role: ProjectionInput | FactorInput, arguments: Sequence[Any]) -> Tensor:
        if isinstance(role, FactorInput):
            return empty_leaf(arguments[role.index], role.shape)
        projection = self._plan.projections[role.projection]
        example = projection.empty_source(arguments[role.owners[0]].detach())
        return example.requires_grad_(projection.is_tracked)

    def _place(self, number: int, old: "_Entry | None", arguments: Sequence[Any]) -> Tensor | None:
        """The memory that an input stays in; None where it need not."""
        if not self._in_place:
            return None
        device = arguments[self._indices[0]].device
        if old is not None and old.inputs[number].device == device:
            return old.inputs[number].detach()
        with torch.inference_mode(False):
            return self._example(self._plan.inputs[number], arguments).detach()

    def _drawn(self, projection: Projection, group: Group) -> Basis:
        """A projection in the version that the steps of its weights say."""
        generation = group.steps // self._interval
        return DrawnBasis(
            projection=projection.canonical(), seed=self._seed, generation=generation, dim=1
        )

    def _shared(self, basis: Basis, owners: Sequence[WeightRecord]) -> Basis:
        """The same object that other graphs have, if they have the same projection."""
        for known in (r.basis.along(1) for r in owners if r.basis is not None):
            if known == basis:
                return known
        for record in owners:
            record.basis = basis
        return basis

    def _look_for_steps(self, entry: "_Entry", weight: Tensor) -> None:
        """Whether a weight changes although nobody was seen to step it; at calls 1, 2, 4, 8, ..."""
        entry.calls += 1
        if entry.calls & (entry.calls - 1):
            return
        if any(record.is_stepped for record in entry.records):
            entry.is_stepped = True
            return
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        wide = torch.float32 if weight.device.type == "mps" else torch.float64
        value = weight.detach().sum(dtype=wide).item()
        if entry.value is not None and value != entry.value:
            entry.changed += 1
        entry.value = value
        if entry.changed > 1:  # once may be a checkpoint that was loaded
            self._watch.nobody_steps()


@dataclass(eq=False)
class _Entry:
    """What one set of weights gets, until one of its projections changes.

    Attributes:
        references: to the weights; when one is gone, the entry goes as well.
        changes: when it was made or looked at last.
        stays: with how many steps of which weights all is as it was then. They may be fewer too:
            the one that has seen most may be gone.
    """

    references: "list[weakref.ref[Tensor]]"
    records: list[WeightRecord]
    dense_records: list[WeightRecord]
    factor_records: list[WeightRecord]
    changes: int
    stays: list[tuple[Group, range]]
    groups: list[Group]
    versions: list[object]
    factor_bases: list[Basis]
    inputs: list[Tensor]
    calls: int = 0
    is_stepped: bool = False
    changed: int = 0
    value: float | None = None

    def is_current(self) -> bool:
        """Whether all projections are what they were: no more than steps has come since."""
        return self.changes == changes() and all(g.steps in steps for g, steps in self.stays)

    def take_over(self, old: "_Entry") -> None:
        """What was seen of the weights so far."""
        self.calls, self.is_stepped = old.calls, old.is_stepped
        self.changed, self.value = old.changed, old.value
