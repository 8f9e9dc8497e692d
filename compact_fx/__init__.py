"""Train any PyTorch model from sketched activations, through torch.compile."""

from compact_fx import _version as _version  # isort: skip
from compact_fx.backend import CompactBackend, compact_backend
from compact_fx.config import CompactConfig
from compact_fx.errors import BudgetTooSmall, CannotCompact
from compact_fx.plan import Account, Plan, Saved, Site
from compact_fx.projections import Projection, random_projection
from compact_fx.reading import plots
from compact_fx.reading.explanation import Explanation, explain
from compact_fx.reading.graphs import CompactedGraphs
from compact_fx.reading.memory import Breakdown
from compact_fx.reading.report import CompactionReport
from compact_fx.training.distributed import exchange_factors
from compact_fx.training.gradients import SketchedGrad
from compact_fx.training.optimizers import CompactAdamW, compact_optimizer
from compact_fx.training.sharded import shard_placement
from compact_fx.training.weights import count_step, set_steps

__all__ = [
    "Account",
    "Breakdown",
    "BudgetTooSmall",
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
    "count_step",
    "exchange_factors",
    "explain",
    "plots",
    "random_projection",
    "set_steps",
    "shard_placement",
]
