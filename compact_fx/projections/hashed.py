"""Projections whose entries are a function of a key, in plain aten operators.

Entry (i, j) depends on (key, i, j) alone: the same on every device, on every rank, in eager mode
and in a compiled graph.
"""

import hashlib
import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
# Odd and below 2**31, so that a 32-bit word times one of them never overflows an int64.
_MULTIPLIERS = (0x2C1B3C6D, 0x297A2D39, 0x5BD1E995)
_DENSITY = 3  # a sparse projection keeps one entry in three (Achlioptas, 2003)


def _fold(product: Tensor) -> Tensor:
    """A 32-bit word, held in int64, from both halves of a product below 2**63.

    Multiplying and folding is how wyhash mixes. It reads its input twice, xorshift rounds read it
    many more times, and Inductor's time to compile a pointwise chain doubles with each.
    """
    return (product ^ (product >> 32)) & _WORD


def index_range(key: Tensor, n: int) -> Tensor:
    """0 to n - 1, on the key's device."""
    return torch.arange(n, dtype=torch.int64, device=key.device)


def _row_words(key: Tensor, index: Tensor) -> Tensor:
    return _fold(_fold((index ^ (key & _WORD)) * _MULTIPLIERS[0]) * _MULTIPLIERS[1])


def column_words(key: Tensor, index: Tensor) -> Tensor:
    return _fold(_fold((index ^ (key >> 32)) * _MULTIPLIERS[1]) * _MULTIPLIERS[2])


def _words(key: Tensor, n: int, rank: int) -> Tensor:
    """(n, rank) independent 32-bit words: entry (i, j) depends on the key, i and j alone."""
    product = _row_words(key, index_range(key, n))[:, None] * (
        column_words(key, index_range(key, rank)) >> 1
    )
    return ((_fold(product) * _MULTIPLIERS[2]) >> 20) & _WORD


def gaussian(key: Tensor, n: int, rank: int) -> Tensor:
    # 23 bits and a half step: uniform on (-1, 1) without its ends, exact in float32.
    uniform = ((_words(key, n, rank) >> 9).to(torch.float32) + 0.5) * 2.0**-22 - 1.0
    return torch.erfinv(uniform) * math.sqrt(2.0 / rank)


def rademacher(key: Tensor, n: int, rank: int) -> Tensor:
    return (1.0 - 2.0 * (_words(key, n, rank) & 1).to(torch.float32)) * (1.0 / math.sqrt(rank))


def sparse(key: Tensor, n: int, rank: int) -> Tensor:
    face = (_words(key, n, rank) * (2 * _DENSITY)) >> 32  # a fair die: 0 is +, 1 is -, the rest 0
    sign = (face == 0).to(torch.float32) - (face == 1).to(torch.float32)
    return sign * math.sqrt(_DENSITY / rank)


def orthogonal(key: Tensor, n: int, rank: int) -> Tensor:
    """Random signs × randomly chosen columns of the orthonormal DCT-II, PᵀP = (n / rank)·I."""
    row = index_range(key, n)
    columns = torch.argsort(column_words(key, row), stable=True)[:rank]
    # The angle is reduced in integers: float32 would lose it for large n.
    quarter_turns = ((2 * row[:, None] + 1) * columns) % (4 * n)
    cosines = torch.cos(quarter_turns.to(torch.float32) * (math.pi / (2 * n)))
    signed = _signs(key, row)[:, None] * cosines
    # Two numbers alone would make a tensor of the default dtype.
    return torch.where(columns == 0, signed * math.sqrt(1.0 / rank), signed * math.sqrt(2.0 / rank))


def _signs(key: Tensor, row: Tensor) -> Tensor:
    return 1.0 - 2.0 * sign_bits(key, row).to(torch.float32)


def sign_bits(key: Tensor, row: Tensor) -> Tensor:
    return _row_words(key, row) & 1


def salt_of(name: str) -> int:
    """A 63-bit salt from a weight's qualified name: the same in every process and graph."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def fold_in(seed: int, salt: int, generation: int = 0) -> int:
    """The 63-bit key of one projection from the run's seed, its salt and how often it changed."""
    return salt_of(f"{seed}/{salt}/{generation}")
