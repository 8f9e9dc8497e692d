"""Projections: P as a function of a key, and what factors are expressed in."""

from compact_fx.projections.basis import Basis, DrawnBasis, TrackedBasis, Version, matrix_of
from compact_fx.projections.drawn import (
    DRAWN,
    KINDS,
    RANDOM_PROJECTION,
    Kind,
    Projection,
    draw,
    random_projection,
    source,
)
from compact_fx.projections.hashed import fold_in, salt_of
from compact_fx.projections.tracked import begin, finite_of, follow, unit_of

__all__ = [
    "DRAWN",
    "KINDS",
    "RANDOM_PROJECTION",
    "Basis",
    "DrawnBasis",
    "Kind",
    "Projection",
    "TrackedBasis",
    "Version",
    "begin",
    "draw",
    "finite_of",
    "fold_in",
    "follow",
    "matrix_of",
    "random_projection",
    "salt_of",
    "source",
    "unit_of",
]
