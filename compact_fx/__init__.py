"""Train any PyTorch model from sketched activations, through torch.compile."""

from compact_fx.backend import CompactBackend, compact_backend
from compact_fx.config import CompactConfig
from compact_fx.errors import CannotCompact
from compact_fx.optimizers import CompactAdamW, compact_optimizer
from compact_fx.plan import Plan, Saved, Site
from compact_fx.projections import Projection, random_projection
from compact_fx.sketched_grad import SketchedGrad

__all__ = [
    "CannotCompact",
    "CompactAdamW",
    "CompactBackend",
    "CompactConfig",
    "Plan",
    "Projection",
    "Saved",
    "Site",
    "SketchedGrad",
    "compact_backend",
    "compact_optimizer",
    "random_projection",
]
