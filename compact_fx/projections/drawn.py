"""Projections that are drawn from a key: one node in a graph, one function for everybody.

The same few lines are the eager kernel of the custom op, what `expand_projections` puts into a
graph for Inductor to fuse, and what an optimizer calls.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from compact_fx.projections.countsketch import countsketch, countsketch_table, table_length
from compact_fx.projections.hashed import fold_in, gaussian, orthogonal, rademacher, sparse
from compact_fx.projections.tracked import begin

Kind = Literal["tracked", "countsketch", "gaussian", "rademacher", "sparse", "orthogonal"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DRAWN: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind != "tracked")
"""Those that are a function of a key; the other is stored and follows the gradient."""

_DRAW: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "gaussian": gaussian,
    "rademacher": rademacher,
    "sparse": sparse,
    "orthogonal": orthogonal,
    "countsketch": countsketch,
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
        seed: of the run.
        n: features to project.
        rank: how many to, 1 ≤ rank (≤ n for "orthogonal").
        salt: from the weight.
        generation: how often it has changed.
        kind: "gaussian" N(0, 1/rank), "rademacher" ±1/√rank, "sparse" (two in three entries
            are 0), "orthogonal" (PᵀP = (n / rank)·I exactly, so P Pᵀ = I at rank n),
            "countsketch" (one ±1 in each row, Charikar et al., 2002: products with P are gathers;
            a signed permutation at rank n).
        dtype: drawn in float32 and rounded to this.
        device: torch's default one if None.

    Raises:
        ValueError: an unknown kind, or a rank outside of what the kind allows.
    """
    if kind not in _DRAW:
        raise ValueError(f"kind={kind!r} is not drawn; choose one of {', '.join(DRAWN)}")
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
        features: rows of P: in_features of the weights, or out_features on their output side.
        rank: columns of P.
        kind: "tracked", or see `random_projection`.
        dtype: of what is projected.
    """

    salt: int
    features: int
    rank: int
    kind: Kind
    dtype: torch.dtype

    def __call__(
        self, seed: int, generation: int = 0, device: torch.device | str | None = None
    ) -> Tensor:
        """P (features, rank) as the compiled graph draws it; a tracked one begins like this."""
        if self.is_tracked:
            return begin(fold_in(seed, self.salt), self.features, self.rank, self.dtype, device)
        return random_projection(
            seed,
            self.features,
            self.rank,
            salt=self.salt,
            generation=generation,
            kind=self.kind,
            dtype=self.dtype,
            device=device,
        )

    @property
    def is_tracked(self) -> bool:
        """Whether P is stored and follows the gradient, instead of drawn from a key."""
        return self.kind == "tracked"

    def with_salt(self, salt: int) -> "Projection":
        """The same from another salt."""
        return self if salt == self.salt else replace(self, salt=salt)

    def canonical(self) -> "Projection":
        """The same where its dtype makes no difference: ±1 and 0 are exact in all of them."""
        return replace(self, dtype=torch.float32) if self.kind == "countsketch" else self

    def empty_source(self, like: Tensor) -> Tensor:
        """Of the shape and dtype of `source`, on the device of `like`; values undefined."""
        if self.is_tracked:
            return like.new_empty((self.features, self.rank), dtype=self.dtype)
        if self.kind == "countsketch":
            length = table_length(self.features, self.rank)
            return like.new_empty(length, dtype=torch.int32)
        return like.new_empty((), dtype=torch.int64)
