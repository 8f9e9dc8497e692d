"""Countsketch (Charikar et al., 2002): one ±1 in each row, so that products with P are gathers.

The entries lie in a table that is drawn once for each version of a projection.
"""

import math

import torch
from torch import Tensor

from compact_fx.projections.hashed import column_words, index_range, sign_bits


def countsketch(key: Tensor, n: int, rank: int) -> Tensor:
    """P (n, rank) of a key, or of its table."""
    table = key if key.dim() else countsketch_table(key, n, rank)
    columns, signs = countsketch_columns(table, n, rank, torch.float32)
    return torch.where(columns[:, None] == index_range(table, rank), signs[:, None], 0.0)


def countsketch_table(key: Tensor, n: int, rank: int) -> Tensor:
    """Where the entries of a countsketch are, one ±1 in each row: what a graph gets of its key.

    Blocks of `rank` rows are rotated, each by its own random shift. Any two rows of different
    blocks meet in a column with probability 1 / rank, as with independent columns, and neighbours
    stay neighbours, which memory likes.

    Returns:
        (n + blocks · rank,) int32: for each row its column, then for each column a row of each
        block, -1 for none. The lowest bit is the sign.
    """
    row = index_range(key, n)
    columns = (row + _shifts(key, row // rank, rank)) % rank
    block = index_range(key, math.prod(_rows_shape(n, rank)[:-1]))[:, None]
    rows = block * rank + (index_range(key, rank) - _shifts(key, block, rank)) % rank
    packed = torch.where(rows < n, 2 * rows + sign_bits(key, rows), -1)
    return torch.cat([2 * columns + sign_bits(key, row), packed.flatten()]).to(torch.int32)


def table_length(n: int, rank: int) -> int:
    """Elements of `countsketch_table`."""
    return n + math.prod(_rows_shape(n, rank))


def _rows_shape(n: int, rank: int) -> tuple[int, ...]:
    """(blocks, rank), or (blocks / 4, 4, rank): Inductor fuses only sums of less than 8 terms."""
    blocks = -(-n // rank)
    return (blocks, rank) if blocks < 8 else (-(-blocks // 4), 4, rank)


def _shifts(key: Tensor, block: Tensor, rank: int) -> Tensor:
    return column_words(key, block) % rank


def countsketch_columns(
    table: Tensor, n: int, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Column and sign (n,) of each row's entry: F Pᵀ = F[:, columns] · signs."""
    packed = table[:n]
    # Where Inductor can see that an index is within bounds, it does not check each one.
    return (packed >> 1).clamp(0, rank - 1), (1 - 2 * (packed & 1)).to(dtype)


def countsketch_rows(table: Tensor, n: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and signs of each column's entries: x P = Σ x[:, rows] · signs over all but the last."""
    packed = table[n:].view(_rows_shape(n, rank))
    signs = 1 - 2 * (packed & 1)
    if packed.numel() > n:
        signs = torch.where(packed < 0, 0, signs)
    return (packed >> 1).clamp(0, n - 1), signs.to(dtype)


def column_counts(table: Tensor, n: int, rank: int, dtype: torch.dtype) -> Tensor:
    """How many entries each column has (rank,): PᵀP is diagonal, and this is its diagonal."""
    packed = table[n:].view(_rows_shape(n, rank))
    return (packed >= 0).flatten(0, -2).sum(0).to(dtype)


def is_gathered(kind: str, n: int, rank: int) -> bool:
    """Whether products with P are gathers; with more terms than these a matmul takes no longer."""
    return kind == "countsketch" and n <= 16 * rank


def expand(factor: Tensor, table: Tensor, n: int, rank: int, dim: int) -> Tensor:
    """F Pᵀ, or P F where `dim` is not the last dimension: a choice of signed columns of F."""
    columns, signs = countsketch_columns(table, n, rank, factor.dtype)
    is_last = dim == factor.dim() - 1
    return factor.index_select(dim, columns) * (signs if is_last else signs[:, None])


def compress(dense: Tensor, table: Tensor, n: int, rank: int, dim: int) -> Tensor:
    """G P, or Pᵀ G: sums of signed columns of G."""
    rows, signs = countsketch_rows(table, n, rank, dense.dtype)
    is_last = dim == dense.dim() - 1
    result: Tensor | None = None
    for block, sign in zip(rows.flatten(0, -2), signs.flatten(0, -2), strict=True):
        term = dense.index_select(dim, block) * (sign if is_last else sign[:, None])
        result = term if result is None else result.add_(term)
    assert result is not None
    return result
