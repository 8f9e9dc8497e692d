"""One P at one version: what a factor is expressed in."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.projections import countsketch
from compact_fx.projections.drawn import RANDOM_PROJECTION, Kind, Projection, draw, source
from compact_fx.projections.hashed import fold_in


class Basis(ABC):
    """The P that a factor is expressed in: which one, and in which version.

    Attributes:
        projection: everything about P but its version.
        seed: of the run, and
        generation: how often this P has changed since its beginning.
        dim: which dimension of the weight P takes from its features to the rank; one of the last
            two. All matrices of a batch, as of experts, share P.
    """

    projection: Projection
    seed: int
    generation: int
    dim: int

    @abstractmethod
    def source(self, device: torch.device) -> Tensor:
        """What a graph gets to make P of."""

    @abstractmethod
    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P (features, rank), rounded as the compiled graph rounds it, then in this dtype."""

    @abstractmethod
    def is_same(self, other: "Basis") -> bool:
        """Whether the other is the same P, up to rounding to another dtype."""

    @abstractmethod
    def along(self, dim: int) -> "Basis":
        """The same P for a weight that has its features in another dimension."""

    @property
    def gain(self) -> float:
        """What makes F Pᵀ as large, entry for entry, as F: 1 where E[P Pᵀ] = I."""
        return 1.0

    @property
    def is_orthonormal(self) -> bool:
        """Whether the columns of P are, so that F Pᵀ has the norm of F."""
        return False

    def __deepcopy__(self, memo: dict[int, Any]) -> "Basis":
        return self

    # --- products with P -------------------------------------------------------------------------

    def is_last(self, tensor: Tensor) -> bool:
        """Whether P's features are the last dimension of a weight or factor."""
        return self.dim == tensor.dim() - 1

    def shape_of(self, factor: Tensor) -> tuple[int, ...]:
        """The dense shape."""
        shape = [*factor.shape]
        shape[self.dim] = self.projection.features
        return tuple(shape)

    def factor_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the factor of a weight of this shape."""
        rank = self.projection.rank
        return tuple(rank if i == self.dim else size for i, size in enumerate(shape))

    def expand(self, factor: Tensor) -> Tensor:
        """The dense matrix of a factor: factor Pᵀ, or P factor where the features come first."""
        p = self.matrix(factor.device, factor.dtype)
        with torch.autocast(factor.device.type, enabled=False):
            return factor @ p.T if self.is_last(factor) else p @ factor

    def compress(self, dense: Tensor) -> Tensor:
        """The factor of a gradient: dense P, or Pᵀ dense."""
        p = self.matrix(dense.device, dense.dtype)
        with torch.autocast(dense.device.type, enabled=False):
            return dense @ p if self.is_last(dense) else p.T @ dense

    def fit(self, dense: Tensor) -> Tensor:
        """The factor whose dense matrix is nearest to this one; of `expand(factor)`, the factor."""
        wide = torch.promote_types(dense.dtype, torch.float32)
        p = self.matrix(dense.device, wide)
        rows = dense.to(wide)
        rows = rows.mT if self.is_last(dense) else rows
        with torch.autocast(dense.device.type, enabled=False):
            fitted: Tensor = torch.linalg.lstsq(p.expand(*rows.shape[:-2], *p.shape), rows).solution
        return (fitted.mT if self.is_last(dense) else fitted).to(dense.dtype)

    def norm(self, factor: Tensor) -> Tensor:
        """‖factor Pᵀ‖ without building it: √tr(F PᵀP Fᵀ), in the factor's dtype."""
        p = self.matrix(factor.device, factor.dtype)
        rows = factor if self.is_last(factor) else factor.mT
        with torch.autocast(factor.device.type, enabled=False):
            return ((rows @ (p.T @ p)) * rows).sum().clamp(min=0).sqrt()

    def update_(self, weight: Tensor, factor: Tensor, *, keep: float, scale: float) -> None:
        """weight ← keep · weight + scale · factor Pᵀ, in place and in one pass over the weight."""
        drawn = self.matrix(weight.device, weight.dtype)
        left, right = (factor, drawn.T) if self.is_last(weight) else (drawn, factor)
        if weight.dim() == 2:
            weight.addmm_(left, right, beta=keep, alpha=scale)
        else:  # a batch of experts
            left, right = (part.expand(len(weight), -1, -1) for part in (left, right))
            weight.baddbmm_(left, right, beta=keep, alpha=scale)

    def turn_to(self, other: "Basis", like: Tensor) -> Tensor:
        """R = P₁ᵀP₂ from this basis to another, for tensors like this, at least in float32."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        mine, others = (b.matrix(like.device, dtype) for b in (self, other))
        with torch.autocast(like.device.type, enabled=False):
            return mine.T @ others

    def turned(self, factor: Tensor, turn: Tensor) -> Tensor:
        """F R, or Rᵀ F where the features come first, in the dtype of R."""
        wide = factor.to(turn.dtype)
        with torch.autocast(wide.device.type, enabled=False):
            return wide @ turn if self.is_last(wide) else turn.T @ wide

    def change_to(self, other: "Basis", factor: Tensor) -> Tensor:
        """What a factor in this basis is in another one: F P₁ᵀP₂, at least in float32."""
        return self.turned(factor, self.turn_to(other, factor))


@dataclass(frozen=True, kw_only=True)
class DrawnBasis(Basis):
    """P as a function of seed and generation.

    Two are equal where they make the same P. What a graph or an optimizer makes P of is drawn once
    for each, and is gone with it.
    """

    projection: Projection
    seed: int
    generation: int
    dim: int
    _sources: dict[torch.device, Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @functools.cached_property
    def key(self) -> int:
        """63-bit number that P is drawn from."""
        return fold_in(self.seed, self.projection.salt, self.generation)

    def is_same(self, other: Basis) -> bool:
        """Whether the other is the same P, up to rounding to another dtype."""
        mine = replace(self.projection, dtype=other.projection.dtype)
        return replace(self, projection=mine) == other

    def along(self, dim: int) -> "DrawnBasis":
        """The same P for a weight that has its features in another dimension."""
        if dim == self.dim:
            return self
        other = replace(self, dim=dim)
        object.__setattr__(other, "_sources", self._sources)
        return other

    def __reduce__(self) -> tuple[Any, ...]:
        return _drawn_basis, (self.projection, self.seed, self.generation, self.dim)

    def source(self, device: torch.device) -> Tensor:
        """The key, 0-d int64, or the table of a countsketch."""
        given = self._sources.get(device)
        if given is None:
            p = self.projection
            with torch.inference_mode(False):  # a graph keeps it for its backward pass
                key = torch.full((), self.key, dtype=torch.int64, device=device)
                if device.type == "cuda" and p.kind == "countsketch" and type(key) is Tensor:
                    given = _compiled_table(device, p.features, p.rank)(key)
                else:
                    given = source(key, p.features, p.rank, p.kind)
            if type(given) is Tensor:  # not a fake one
                self._sources[device] = given
        return given

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P (features, rank), rounded as the compiled graph rounds it, then in this dtype."""
        p = self.projection
        return matrix_of(self.source(device), p.features, p.rank, p.kind, p.dtype).to(dtype)

    # --- the products of a countsketch are gathers -----------------------------------------------

    @property
    def _is_gathered(self) -> bool:
        p = self.projection
        return countsketch.is_gathered(p.kind, p.features, p.rank)

    def _table(self, device: torch.device) -> tuple[Tensor, int, int]:
        return self.source(device), self.projection.features, self.projection.rank

    def expand(self, factor: Tensor) -> Tensor:
        if not self._is_gathered:
            return super().expand(factor)
        return countsketch.expand(factor, *self._table(factor.device), self.dim)

    def compress(self, dense: Tensor) -> Tensor:
        if not self._is_gathered:
            return super().compress(dense)
        return countsketch.compress(dense, *self._table(dense.device), self.dim)

    def fit(self, dense: Tensor) -> Tensor:
        if not self._is_gathered:
            return super().fit(dense)
        wide = torch.promote_types(dense.dtype, torch.float32)
        counts = countsketch.column_counts(*self._table(dense.device), wide)
        counts = counts if self.is_last(dense) else counts[:, None]
        return (self.compress(dense.to(wide)) / counts).to(dense.dtype)

    def norm(self, factor: Tensor) -> Tensor:
        if not self._is_gathered:
            return super().norm(factor)
        counts = countsketch.column_counts(*self._table(factor.device), factor.dtype)
        weights = counts if self.is_last(factor) else counts[:, None]
        return (factor.square() * weights).sum().sqrt()

    def update_(self, weight: Tensor, factor: Tensor, *, keep: float, scale: float) -> None:
        if not self._is_gathered:
            super().update_(weight, factor, keep=keep, scale=scale)
        elif weight.device.type == "cuda" and weight.is_contiguous():
            p = self.projection
            update = _compiled_update(
                weight.device, p.features, p.rank, self.dim, weight.shape, weight.dtype
            )
            numbers = torch.tensor([keep, scale], dtype=torch.float64).unbind()
            update(weight, factor, self.source(weight.device), *numbers)
        else:
            weight.mul_(keep).add_(self.expand(factor), alpha=scale)

    def change_to(self, other: Basis, factor: Tensor) -> Tensor:
        if not (self._is_gathered and isinstance(other, DrawnBasis) and other._is_gathered):
            return super().change_to(other, factor)
        wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
        return other.compress(self.expand(wide))


def matrix_of(given: Tensor, n: int, rank: int, kind: Kind, dtype: torch.dtype) -> Tensor:
    """P (n, rank) of a key or table, where that is; on a GPU one kernel."""
    if given.device.type != "cuda":
        result: Tensor = RANDOM_PROJECTION(given, n, rank, kind, dtype)
        return result
    return _compiled_draw(given.device, n, rank, kind, dtype)(given)


def _drawn_basis(projection: Projection, seed: int, generation: int, dim: int) -> DrawnBasis:
    return DrawnBasis(projection=projection, seed=seed, generation=generation, dim=dim)


@dataclass(eq=False)
class Version:
    """One version of a tracked P; never changed.

    Attributes:
        matrix: (features, rank), orthonormal columns.
        generation: how often P has changed before.
    """

    matrix: Tensor
    generation: int

    def __deepcopy__(self, memo: dict[int, Any]) -> "Version":
        return self


@dataclass(frozen=True, kw_only=True)
class TrackedBasis(Basis):
    """P as stored: orthonormal columns that follow the gradient.

    Two are equal where they hold the same version.
    """

    projection: Projection
    seed: int
    version: Version
    dim: int

    @property
    def generation(self) -> int:  # type: ignore[override]
        """How often this P has changed since its beginning."""
        return self.version.generation

    def is_same(self, other: Basis) -> bool:
        """Whether the other is the same P, up to rounding to another dtype."""
        return isinstance(other, TrackedBasis) and self.version is other.version

    def along(self, dim: int) -> "TrackedBasis":
        """The same P for a weight that has its features in another dimension."""
        return self if dim == self.dim else replace(self, dim=dim)

    def source(self, device: torch.device) -> Tensor:
        """P itself."""
        return self.version.matrix.to(device, self.projection.dtype)

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P (features, rank), rounded as the compiled graph rounds it, then in this dtype."""
        return self.source(device).to(dtype)

    def fit(self, dense: Tensor) -> Tensor:
        """The factor whose dense matrix is nearest: G P (PᵀP)⁻¹, with 2 − PᵀP for the inverse.

        PᵀP is 1 up to rounding. Products alone: a solver rounds by where its memory lies, and
        processes would drift apart.
        """
        wide = torch.promote_types(dense.dtype, torch.float32)
        p = self.matrix(dense.device, wide)
        factor = self.compress(dense.to(wide))
        with torch.autocast(dense.device.type, enabled=False):
            gram = p.T @ p
            corrected = 2 * factor - (factor @ gram if self.is_last(dense) else gram @ factor)
        return corrected.to(dense.dtype)

    @property
    def gain(self) -> float:
        """√(n / r): the columns of P are orthonormal."""
        return math.sqrt(self.projection.features / self.projection.rank)

    @property
    def is_orthonormal(self) -> bool:
        return True


# --- on a GPU these are one fused kernel each; operator by operator they would be forty -----------


@functools.cache
def _compiled_draw(
    device: torch.device, n: int, rank: int, kind: str, dtype: torch.dtype
) -> Callable[..., Tensor]:
    function = functools.partial(draw, n=n, rank=rank, kind=kind, dtype=dtype)
    example = source(torch.zeros((), dtype=torch.int64, device=device), n, rank, kind)
    return _torch.compile_function(function, example)


@functools.cache
def _compiled_table(device: torch.device, n: int, rank: int) -> Callable[..., Tensor]:
    function = functools.partial(countsketch.countsketch_table, n=n, rank=rank)
    return _torch.compile_function(function, torch.zeros((), dtype=torch.int64, device=device))


@functools.cache
def _compiled_update(
    device: torch.device, n: int, rank: int, dim: int, shape: torch.Size, dtype: torch.dtype
) -> Callable[..., Tensor]:
    def update(
        weight: Tensor, factor: Tensor, table: Tensor, keep: Tensor, scale: Tensor
    ) -> Tensor:
        expanded = countsketch.expand(factor, table, n, rank, dim)
        return weight.copy_(weight * keep + expanded * scale)

    weight = torch.empty(shape, dtype=dtype, device=device)
    factor = torch.empty([rank if i == dim else size for i, size in enumerate(shape)]).to(weight)
    table = torch.zeros(countsketch.table_length(n, rank), dtype=torch.int32, device=device)
    keep, scale = torch.ones(2, dtype=torch.float64).unbind()  # one tensor would be one input
    return _torch.compile_function(update, weight, factor, table, keep, scale)
