"""Projections that follow the gradient: how P begins, and what it becomes of what it has seen."""

import math

import torch
from torch import Tensor

from compact_fx.projections.hashed import orthogonal


def begin(
    key: int, n: int, rank: int, dtype: torch.dtype, device: torch.device | str | None
) -> Tensor:
    """P (n, rank) for the first step: random, with orthonormal columns."""
    source = torch.tensor(key, dtype=torch.int64, device=device)
    return (orthogonal(source, n, rank) * math.sqrt(rank / n)).to(dtype)


def unit_of(factor: Tensor) -> Tensor:
    """F / ‖F‖, or 0: each weight counts alike, and so does any scale of the loss."""
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    return finite_of(wide * wide.square().sum().rsqrt()).to(factor.dtype)


def finite_of(gradient: Tensor) -> Tensor:
    """What is not finite becomes 0: an overflow, or a weight without gradient."""
    return torch.where(gradient.abs() < math.inf, gradient, 0.0)


def follow(
    p: Tensor, gradient: Tensor, explored: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The next P of each of a batch: what is largest in the gradient, and random directions.

    ::

        P ← orth([the largest columns of Y | Gaussian columns])

    Args:
        p: (batch, n, rank), orthonormal columns.
        gradient: Y (batch, n, rank), the sum of Gᵀ G P up to a positive factor.
        explored: (batch, n, rank - columns), Gaussian.
        columns: how many follow.

    Returns:
        P in the dtype of `p`; which of them stay as they are because Y is zero or not finite
        (batch,); and how much of the gradient's energy ‖G‖² the old P held (batch,), see `energy`.
    """
    total = gradient.abs().sum((1, 2))
    kept = ~(total.isfinite() & (total > 0))
    y = torch.where(kept[:, None, None], p, gradient).to(torch.float64)
    sizes = torch.linalg.vector_norm(y, dim=1)
    order = sizes.sort(dim=1, descending=True, stable=True).indices[:, None, :columns]
    smallest = torch.finfo(torch.float64).tiny
    largest = y.take_along_dim(order, 2) / sizes[:, None].take_along_dim(order, 2).clamp(smallest)
    lengths = torch.linalg.vector_norm(explored, dim=1, keepdim=True)
    largest = torch.cat([largest, (explored / lengths).to(torch.float64)], 2)
    new = orthonormal(largest).to(p.dtype)
    return torch.where(kept[:, None, None], p, new), kept, energy(p, gradient, columns)


def orthonormal(matrices: Tensor) -> Tensor:
    """Orthonormal columns (batch, n, rank) whose first k span what the first k of these do.

    Cholesky-QR, twice: a few batched products where Householder reflections take one launch for
    each column. In float64, where it stands condition numbers of 10⁷; beyond, it is Householder's.
    """
    result = matrices
    identity = torch.eye(matrices.shape[2], dtype=matrices.dtype, device=matrices.device).expand(
        len(matrices), -1, -1
    )
    for _ in range(2):
        lower, _ = torch.linalg.cholesky_ex(result.mT @ result)
        # The inverse of a small matrix and a product take less than a solution of many columns.
        result = result @ inverse_of_lower(lower).mT
    error = (result.mT @ result - identity).abs().amax((1, 2))
    failed = ~(error < 1e-10)
    if failed.any():
        result[failed] = torch.linalg.qr(matrices[failed])[0]
    return result


def inverse_of_lower(lower: Tensor) -> Tensor:
    """L⁻¹ (batch, n, n) of lower triangles, by halves.

    ::

        L = [A 0]     L⁻¹ = [    A⁻¹     0 ]
            [B C]           [-C⁻¹ B A⁻¹ C⁻¹]

    Nearly all of it are products then: a GPU solves a triangle a few columns at a time.
    """
    size = lower.shape[2]
    if size <= 128 or size % 2:
        identity = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(lower)
        solved: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
        return solved
    half = size // 2
    result = torch.zeros_like(lower)
    halves = inverse_of_lower(torch.cat([lower[:, :half, :half], lower[:, half:, half:]]))
    above, below = halves.chunk(2)
    result[:, :half, :half], result[:, half:, half:] = above, below
    result[:, half:, :half] = -below @ lower[:, half:, :half] @ above
    return result


def energy(p: Tensor, gradient: Tensor, columns: int) -> Tensor:
    """‖G P‖² / ‖G‖² (batch,), estimated from Y: NaN where no column explores.

    pᵀY of a column is ‖G p‖² up to a factor common to all. Those that explore are random directions
    outside of those that follow, so that they tell how much there is outside of P.
    """
    _, n, rank = p.shape
    held = (p.to(torch.float32) * gradient.to(torch.float32)).sum(1)
    followed, explored = held[:, :columns].sum(1), held[:, columns:].sum(1)
    if columns == rank and rank < n:
        return torch.full_like(followed, math.nan)
    outside = (n - columns) / max(1, rank - columns)
    return (followed + explored) / (followed + explored * outside)
