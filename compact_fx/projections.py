"""Random projections as a function of a key, written once in plain aten operators.

The same few lines are the eager kernel of the custom op, what `expand_projections` puts into a
graph for Inductor to fuse, and what an optimizer calls: equal on every device and every rank.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["gaussian", "rademacher", "sparse", "orthogonal", "countsketch"]
KINDS: tuple[Kind, ...] = get_args(Kind)

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


def _range(key: Tensor, n: int) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device=key.device)


def _row_words(key: Tensor, index: Tensor) -> Tensor:
    return _fold(_fold((index ^ (key & _WORD)) * _MULTIPLIERS[0]) * _MULTIPLIERS[1])


def _column_words(key: Tensor, index: Tensor) -> Tensor:
    return _fold(_fold((index ^ (key >> 32)) * _MULTIPLIERS[1]) * _MULTIPLIERS[2])


def _words(key: Tensor, n: int, rank: int) -> Tensor:
    """(n, rank) independent 32-bit words: entry (i, j) depends on the key, i and j alone."""
    product = _row_words(key, _range(key, n))[:, None] * (
        _column_words(key, _range(key, rank)) >> 1
    )
    return ((_fold(product) * _MULTIPLIERS[2]) >> 20) & _WORD


def _gaussian(key: Tensor, n: int, rank: int) -> Tensor:
    # 23 bits and a half step: uniform on (-1, 1) without its ends, exact in float32.
    uniform = ((_words(key, n, rank) >> 9).to(torch.float32) + 0.5) * 2.0**-22 - 1.0
    return torch.erfinv(uniform) * math.sqrt(2.0 / rank)


def _rademacher(key: Tensor, n: int, rank: int) -> Tensor:
    return (1.0 - 2.0 * (_words(key, n, rank) & 1).to(torch.float32)) * (1.0 / math.sqrt(rank))


def _sparse(key: Tensor, n: int, rank: int) -> Tensor:
    face = (_words(key, n, rank) * (2 * _DENSITY)) >> 32  # a fair die: 0 is +, 1 is -, the rest 0
    sign = (face == 0).to(torch.float32) - (face == 1).to(torch.float32)
    return sign * math.sqrt(_DENSITY / rank)


def _orthogonal(key: Tensor, n: int, rank: int) -> Tensor:
    """Random signs × randomly chosen columns of the orthonormal DCT-II, PᵀP = (n / rank)·I."""
    row = _range(key, n)
    columns = torch.argsort(_column_words(key, row), stable=True)[:rank]
    # The angle is reduced in integers: float32 would lose it for large n.
    quarter_turns = ((2 * row[:, None] + 1) * columns) % (4 * n)
    cosines = torch.cos(quarter_turns.to(torch.float32) * (math.pi / (2 * n)))
    norms = torch.where(columns == 0, math.sqrt(1.0 / rank), math.sqrt(2.0 / rank))
    return _signs(key, row)[:, None] * cosines * norms


def _signs(key: Tensor, row: Tensor) -> Tensor:
    return 1.0 - 2.0 * _sign_bits(key, row).to(torch.float32)


def _sign_bits(key: Tensor, row: Tensor) -> Tensor:
    return _row_words(key, row) & 1


def _countsketch(key: Tensor, n: int, rank: int) -> Tensor:
    table = key if key.dim() else countsketch_table(key, n, rank)
    columns, signs = countsketch_columns(table, n, rank, torch.float32)
    return torch.where(columns[:, None] == _range(table, rank), signs[:, None], 0.0)


def countsketch_table(key: Tensor, n: int, rank: int) -> Tensor:
    """Where the entries of a countsketch are, one ±1 in each row: what a graph gets of its key.

    Blocks of `rank` rows are rotated, each by its own random shift. Any two rows of different
    blocks meet in a column with probability 1 / rank, as with independent columns, and neighbours
    stay neighbours, which memory likes.

    Returns:
        (n + blocks · rank,) int32: for each row its column, then for each column a row of each
        block, -1 for none. The lowest bit is the sign.
    """
    row = _range(key, n)
    columns = (row + _shifts(key, row // rank, rank)) % rank
    block = _range(key, math.prod(_rows_shape(n, rank)[:-1]))[:, None]
    rows = block * rank + (_range(key, rank) - _shifts(key, block, rank)) % rank
    packed = torch.where(rows < n, 2 * rows + _sign_bits(key, rows), -1)
    return torch.cat([2 * columns + _sign_bits(key, row), packed.flatten()]).to(torch.int32)


def _rows_shape(n: int, rank: int) -> tuple[int, ...]:
    """(blocks, rank), or (blocks / 4, 4, rank): Inductor fuses only sums of less than 8 terms."""
    blocks = -(-n // rank)
    return (blocks, rank) if blocks < 8 else (-(-blocks // 4), 4, rank)


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


def is_gathered(kind: str, n: int, rank: int) -> bool:
    """Whether products with P are gathers; with more terms than these a matmul takes no longer."""
    return kind == "countsketch" and n <= 16 * rank


def _shifts(key: Tensor, block: Tensor, rank: int) -> Tensor:
    return _column_words(key, block) % rank


_DRAW: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "gaussian": _gaussian,
    "rademacher": _rademacher,
    "sparse": _sparse,
    "orthogonal": _orthogonal,
    "countsketch": _countsketch,
}


def draw(key: Tensor, n: int, rank: int, kind: str, dtype: torch.dtype) -> Tensor:
    """P (n, rank) for a 0-d int64 key in [0, 2**63), in aten operators only; E[P Pᵀ] = I.

    Instead of the key of a countsketch, its table.
    """
    return _DRAW[kind](key, n, rank).to(dtype)


def source(key: Tensor, n: int, rank: int, kind: str) -> Tensor:
    """What a graph gets to make P of: the key, or the table of a countsketch."""
    return countsketch_table(key, n, rank) if kind == "countsketch" else key


@torch.library.custom_op("compact_fx::random_projection", mutates_args=())
def _random_projection(key: Tensor, n: int, rank: int, kind: str, dtype: torch.dtype) -> Tensor:
    return draw(key, n, rank, kind, dtype)


@_random_projection.register_fake
def _(key: Tensor, n: int, rank: int, kind: str, dtype: torch.dtype) -> Tensor:
    return key.new_empty((n, rank), dtype=dtype)


RANDOM_PROJECTION = torch.ops.compact_fx.random_projection.default
"""The projection as one graph node: (key or table, n, rank, kind, dtype) -> (n, rank)."""


def salt_of(name: str) -> int:
    """A 63-bit salt from a weight's qualified name: the same in every process and graph."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1


def fold_in(seed: int, salt: int, generation: int = 0) -> int:
    """The 63-bit key of one projection from the run's seed, its salt and how often it changed."""
    return salt_of(f"{seed}/{salt}/{generation}")


def random_projection(
    seed: int,
    n: int,
    rank: int,
    *,
    salt: int = 0,
    generation: int = 0,
    kind: Kind = "countsketch",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random projection P (n, rank) with E[P Pᵀ] = I (paper section 3).

    Args:
        seed: the run's seed; `generation`: how often it has changed; `salt`: from the weight.
        n: features to project, `rank`: how many to, 1 ≤ rank (≤ n for "orthogonal").
        kind: "gaussian" N(0, 1/rank), "rademacher" ±1/√rank, "sparse" (two in three entries
            are 0), "orthogonal" (PᵀP = (n / rank)·I exactly, so P Pᵀ = I at rank n),
            "countsketch" (one ±1 in each row, Charikar et al., 2002: products with P are gathers;
            a signed permutation at rank n).
        dtype: drawn in float32 and rounded to this.

    Raises:
        ValueError: an unknown kind, or a rank outside of what the kind allows.
    """
    if kind not in _DRAW:
        raise ValueError(f"kind={kind!r} is not a projection; choose one of {', '.join(KINDS)}")
    if n < 1 or not dtype.is_floating_point:
        raise ValueError(f"n={n} must be ≥ 1 and dtype={dtype} a floating-point type")
    if rank < 1 or (kind == "orthogonal" and rank > n):
        allowed = f"1..{n}" if kind == "orthogonal" else "≥ 1"
        raise ValueError(f"rank={rank} is not possible for n={n}; allowed: {allowed}")
    key = torch.tensor(fold_in(seed, salt, generation), dtype=torch.int64, device=device)
    result: Tensor = RANDOM_PROJECTION(key, n, rank, kind, dtype)
    return result


@dataclass(frozen=True, kw_only=True)
class Projection:
    """What fixes one P apart from the seed and the generation.

    Attributes:
        salt: from the qualified name of the first weight sketched with it.
        in_features: rows of P.
        rank: columns of P.
        kind: see `random_projection`.
        dtype: the activation's.
    """

    salt: int
    in_features: int
    rank: int
    kind: Kind
    dtype: torch.dtype

    def __call__(
        self, seed: int, generation: int = 0, device: torch.device | str | None = None
    ) -> Tensor:
        """P (in_features, rank) as the compiled graph draws it."""
        return random_projection(
            seed,
            self.in_features,
            self.rank,
            salt=self.salt,
            generation=generation,
            kind=self.kind,
            dtype=self.dtype,
            device=device,
        )

    def source(self, key: Tensor) -> Tensor:
        """See `source`."""
        return source(key, self.in_features, self.rank, self.kind)

    def source_of(self, key: int, device: torch.device) -> Tensor:
        """The same on a device: drawn once for the graphs and the optimizer that ask for it."""
        own = _sources.setdefault((device, self), {})
        given = own.get(key)
        if given is None:
            with torch.inference_mode(False):  # a graph keeps it for its backward pass
                given = self.source(torch.full((), key, dtype=torch.int64, device=device))
            if type(given) is not Tensor:  # a fake one
                return given
            if len(own) == _GENERATIONS_KEPT:
                del own[next(iter(own))]
            own[key] = given
        return given


_sources: dict[tuple[torch.device, Projection], dict[int, Tensor]] = {}
_GENERATIONS_KEPT = 2  # `refresh="project"` asks for the last one besides the present
