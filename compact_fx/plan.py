"""What was decided for one graph, and what it costs: the same on a cold and a warm cache."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from compact_fx.projections import Projection

Placement = Literal["early", "late"]
Side = Literal["input", "output"]
LowBit = Literal["int8", "fp8"]
SavedKind = Literal["sketch", "matmul input", "attention", "norm or activation", "index or mask"]
SAVED_KINDS: tuple[SavedKind, ...] = get_args(SavedKind)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One use of one weight in one graph, sketched or left alone.

    Attributes:
        weight: qualified parameter name.
        index: which graph input the weight is.
        use: which of its uses, 0 for the first.
        in_features: of the weight; 0 where its gradient is not a matrix product.
        out_features: likewise.
        side: which operand of the weight gradient is sketched: the activation ("input"), or the
            incoming gradient ("output").
        rank: columns of the sketch, 0 where it is left alone.
        placement: which pass computes the sketch: the forward ("early", the sketch is saved) or
            the backward ("late"); None where it is left alone.
        reason: why it was left alone, or why its gradient is dense although sketched gradients
            were asked for; "" for neither.
        sketch: which sketch of the graph; sites on one activation with one rank share it.
        projection: index into `Plan.projections`.
    """

    weight: str
    index: int
    use: int = 0
    in_features: int = 0
    out_features: int = 0
    side: Side = "input"
    rank: int = 0
    placement: Placement | None = None
    reason: str = ""
    sketch: int | None = None
    projection: int | None = None

    @property
    def features(self) -> int:
        """How many are sketched."""
        return self.in_features if self.side == "input" else self.out_features

    def left_alone(self, reason: str) -> "Site":
        """The same without a sketch, and why."""
        bare = replace(self, side="input", rank=0, placement=None, sketch=None, projection=None)
        return replace(bare, reason=reason)


@dataclass(frozen=True, kw_only=True)
class ProjectionInput:
    """A graph input that P is made of: a key, the table of a countsketch, or a tracked P itself.

    A tracked P has a gradient: what says where P is to go.

    Attributes:
        projection: index into `Plan.projections`.
        owners: graph inputs of the weights that are sketched with it.
    """

    projection: int
    owners: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FactorInput:
    """A graph input that stands for the sketched gradient of one weight, and receives it.

    Attributes:
        index: the weight's graph input.
        projection: index into `Plan.projections`.
        shape: the weight's, with the features of its side replaced by the rank.
        dim: which dimension that is.
    """

    index: int
    projection: int
    shape: tuple[int, ...]
    dim: int


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that crosses the forward-backward boundary.

    Attributes:
        name: its node in the joint graph.
        op: the operator that makes it.
        shape: as text, with symbols for dynamic sizes.
        dtype: as text.
        bytes: of its storage; symbolic sizes count with their hint.
        kind: what the backward pass needs it for.
        readers: the backward's operators that read it.
        source: the line of the model that made it.
    """

    name: str
    op: str
    shape: str
    dtype: str
    bytes: int
    kind: SavedKind
    readers: tuple[str, ...] = field(repr=False)
    source: str = field(repr=False)


def bytes_of_kind(saved: Iterable[Saved], kind: str) -> int:
    """Bytes that cross for one kind of tensor."""
    return sum(tensor.bytes for tensor in saved if tensor.kind == kind)


@dataclass(frozen=True, kw_only=True)
class SiteCost:
    """What one site costs, without this project and with it.

    Attributes:
        bytes_before: what crosses for this use without this project; weights on one activation
            count it once, at the first.
        bytes_after: the same with it.
        flops_before: of the weight gradient without it.
        flops_after: the same with it; a shared sketch is split evenly.
    """

    bytes_before: int = 0
    bytes_after: int = 0
    flops_before: int = 0
    flops_after: int = 0


@dataclass(frozen=True, kw_only=True)
class Account:
    """What a plan costs; decides nothing.

    Attributes:
        saved_before: what torch.compile's own partition keeps.
        saved_after: what ours keeps.
        projection_bytes: what tracked projections hold from step to step: P, and Y in float32.
        change_flops: what it takes when all of them change.
        sites: for each of the plan's.
        allowed: with `memory_budget`, bytes that activations may take at the peak of the graph.
        peak: those that they are predicted to take then.
    """

    saved_before: tuple[Saved, ...] = ()
    saved_after: tuple[Saved, ...] = ()
    projection_bytes: int = 0
    change_flops: int = 0
    sites: tuple[SiteCost, ...] = ()
    allowed: int = 0
    peak: int = 0

    @property
    def bytes_before(self) -> int:
        """Bytes that torch.compile's own partition keeps for the backward pass."""
        return sum(saved.bytes for saved in self.saved_before)

    @property
    def bytes_after(self) -> int:
        """Bytes that the compacted graph keeps for the backward pass."""
        return sum(saved.bytes for saved in self.saved_after)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every candidate weight of one graph, and what is done about it.

    Attributes:
        sites: one per use of each matrix-shaped parameter.
        projections: the distinct ones.
        inputs: what the graph gets beyond its own inputs, in that order, by their role.
        recompute: whether matmul inputs may be rebuilt in the backward pass.
        track_every: tracked projections see every so many tokens.
        saved: what large values cross in; None for their own dtype.
        saved_share: how much of their bytes does at least, the largest first.
        account: what it costs; not compared, and not in the keys of caches.
    """

    sites: tuple[Site, ...]
    projections: tuple[Projection, ...] = ()
    inputs: tuple[ProjectionInput | FactorInput, ...] = ()
    recompute: bool = False
    track_every: int = 1
    saved: LowBit | None = None
    saved_share: float = 1.0
    account: Account = field(default_factory=Account, compare=False, repr=False)

    @property
    def sketched(self) -> tuple[Site, ...]:
        """The sites that are sketched."""
        return tuple(site for site in self.sites if site.sketch is not None)

    @property
    def projection_inputs(self) -> tuple[ProjectionInput, ...]:
        """Those of `inputs` that projections are made of, in the order of `projections`."""
        return tuple(i for i in self.inputs if isinstance(i, ProjectionInput))

    @property
    def has_gradient(self) -> tuple[bool, ...]:
        """For each of `inputs` whether it receives something: factors, and tracked projections."""
        return tuple(
            isinstance(i, FactorInput) or self.projections[i.projection].is_tracked
            for i in self.inputs
        )

    @property
    def factor_inputs(self) -> tuple[FactorInput, ...]:
        """Those of `inputs` that receive factors: one for each weight whose gradient stays one."""
        return tuple(i for i in self.inputs if isinstance(i, FactorInput))

    def cost_of(self, site: Site) -> SiteCost:
        """What this site of the plan costs."""
        return self.account.sites[self.sites.index(site)]

    def digest(self) -> str:
        """Stands for everything that the plan does to a graph: no names, no reasons, no salts."""
        sites = [
            (s.index, s.use, s.side, s.rank, s.placement, s.sketch, s.projection)
            for s in self.sketched
        ]
        projections = [(p.features, p.rank, p.kind, str(p.dtype)) for p in self.projections]
        others = (self.inputs, self.recompute, self.track_every, self.saved, self.saved_share)
        decisions = repr((sites, projections, *others))
        return hashlib.sha256(decisions.encode()).hexdigest()
