"""What was decided for one compiled graph: data, the same on a cold and on a warm cache."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

from compact_fx.config import Place
from compact_fx.projections import Projection

Placement = Literal["early", "late"]
SavedKind = Literal["sketch", "matmul input", "attention", "norm or activation", "index or mask"]
SAVED_KINDS: tuple[SavedKind, ...] = get_args(SavedKind)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A tensor that crosses the forward-backward boundary.

    Attributes:
        name: its node in the joint graph.
        op: the operator that makes it.
        shape, dtype: as text, with symbols for dynamic sizes.
        bytes: of its storage; symbolic sizes count with their hint.
        kind: what the backward pass needs it for.
        readers: the backward's operators that read it, and
        source: the line of the model that made it; neither decides anything, so that an edited
            comment in a model does not miss a cache.
    """

    name: str
    op: str
    shape: str
    dtype: str
    bytes: int
    kind: SavedKind
    readers: tuple[str, ...] = field(repr=False, compare=False)
    source: str = field(repr=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Site:
    """One use of one weight in one graph, sketched or left alone.

    Attributes:
        weight: qualified parameter name.
        index: which graph input the weight is; `use`: which of its uses, 0 for the first.
        in_features, out_features: 0 where its gradient is not a matrix product.
        rank: columns of the sketch, 0 where it is left alone.
        placement: "early" (sketch saved by the forward), "late" (made in the backward) or None.
        reason: why it was left alone, or why its gradient is dense although sketched gradients
            were asked for; "" for neither.
        sketch: which sketch of the graph; sites on one activation with one rank share it.
        projection: index into `Plan.projections`.
        bytes_before, bytes_after: what crosses for this use; weights on one activation count it
            once, at the first.
        flops_before, flops_after: of the weight gradient; a shared sketch is split evenly.
    """

    weight: str
    index: int
    use: int = 0
    in_features: int = 0
    out_features: int = 0
    rank: int = 0
    placement: Placement | None = None
    reason: str = ""
    sketch: int | None = None
    projection: int | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    flops_before: int = 0
    flops_after: int = 0


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """A graph input that stands for the sketched gradient of one weight.

    Attributes:
        index: the weight's graph input.
        projection: index into `Plan.projections`.
        shape: the weight's, with in_features replaced by the rank.
        in_dim: which dimension that is.
    """

    index: int
    projection: int
    shape: tuple[int, ...]
    in_dim: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every candidate weight of one graph and what crosses its boundary, before and after.

    Attributes:
        sites: one per use of each matrix-shaped parameter.
        place: "early" if the forward was made to compute all sketches, see `CompactConfig.place`.
        recompute: whether matmul inputs may be rebuilt in the backward pass.
        late: sketches that the backward is made to compute; the partitioner places the others.
        projections: the distinct ones, in the order of the graph's key inputs.
        proxies: one for each weight whose gradient stays sketched.
        owners: for each projection the graph input of a weight that uses it.
        saved_before: what torch.compile's own partition keeps; `saved_after`: what ours keeps.
    """

    sites: tuple[Site, ...]
    place: Place = "auto"
    recompute: bool = False
    late: frozenset[int] = frozenset()
    projections: tuple[Projection, ...] = ()
    owners: tuple[int, ...] = ()
    proxies: tuple[Proxy, ...] = ()
    saved_before: tuple[Saved, ...] = ()
    saved_after: tuple[Saved, ...] = ()

    @property
    def sketched(self) -> tuple[Site, ...]:
        """The sites that are sketched."""
        return tuple(site for site in self.sites if site.placement is not None)

    @property
    def bytes_before(self) -> int:
        """Bytes that torch.compile's own partition keeps for the backward pass."""
        return sum(saved.bytes for saved in self.saved_before)

    @property
    def bytes_after(self) -> int:
        """Bytes that the compacted graph keeps for the backward pass."""
        return sum(saved.bytes for saved in self.saved_after)

    def early(self, sketches: Mapping[int, T]) -> tuple[T, ...]:
        """Those of the sketches' nodes that the forward has to save, as a person asked."""
        return tuple(sketches.values()) if self.place == "early" else ()
