"""Train any PyTorch model from sketched activations, through torch.compile."""

from compact_fx import _version as _version  # isort: skip
from compact_fx.backend import CompactBackend, compact_backend
from compact_fx.config import CompactConfig
from compact_fx.errors import CannotCompact
from compact_fx.explanation import Breakdown, Explanation, explain
from compact_fx.graphs import CompactedGraphs
from compact_fx.optimizers import CompactAdamW, compact_optimizer
from compact_fx.plan import Plan, Saved, Site
from compact_fx.projections import Projection, random_projection
from compact_fx.report import CompactionReport
from compact_fx.schedule import set_steps
from compact_fx.sketched_grad import SketchedGrad

__all__ = [
    "Breakdown",
    "CannotCompact",
    "CompactAdamW",
    "CompactBackend",
    "CompactConfig",
    "CompactedGraphs",
    "CompactionReport",
    "Explanation",
    "Plan",
    "Projection",
    "Saved",
    "Site",
    "SketchedGrad",
    "compact_backend",
    "compact_optimizer",
    "explain",
    "random_projection",
    "set_steps",
]
