"""Projections: P as a function of a key, and what factors are expressed in."""

from compact_fx.projections.basis import Basis
from compact_fx.projections.drawn import (
    KINDS,
    RANDOM_PROJECTION,
    Kind,
    Projection,
    draw,
    random_projection,
    source,
)
from compact_fx.projections.hashed import fold_in, salt_of

__all__ = [
    "KINDS",
    "RANDOM_PROJECTION",
    "Basis",
    "Kind",
    "Projection",
    "draw",
    "fold_in",
    "random_projection",
    "salt_of",
    "source",
]
