"""Train any PyTorch model from sketched activations, through torch.compile."""

from compact_fx.backend import CompactBackend, compact_backend
from compact_fx.config import CompactConfig
from compact_fx.errors import CannotCompact
from compact_fx.plan import Plan, Saved, Site
from compact_fx.projections import Projection, random_projection

__all__ = [
    "CannotCompact",
    "CompactBackend",
    "CompactConfig",
    "Plan",
    "Projection",
    "Saved",
    "Site",
    "compact_backend",
    "random_projection",
]
