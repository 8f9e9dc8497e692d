"""The backend object that torch.compile calls with each of Dynamo's graphs."""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from compact_fx import _torch
from compact_fx.compiler import GraphCompiler
from compact_fx.config import CompactConfig, config_from
from compact_fx.errors import BudgetTooSmall, CannotCompact, warn_at_caller
from compact_fx.passes.find_weight_grads import SCALED
from compact_fx.passes.joint_graph import Earlier, JointGraph
from compact_fx.passes.list_sites import CHOSEN
from compact_fx.plan import Plan
from compact_fx.reading.graphs import CompactedGraphs, named
from compact_fx.reading.report import CompactionReport
from compact_fx.training.watch import Watch

log = logging.getLogger(__name__)


class CompactBackend:
    """A torch.compile backend that computes weight gradients from sketches of activations.

    Attributes:
        config: the settings.
        plans: one `Plan` for each graph that was compiled for training, in that order.
        graphs: the graphs of each plan, with `keep_graphs=True`; empty otherwise.
    """

    def __init__(self, config: CompactConfig) -> None:
        self.config = config
        self._options = _torch.inductor_options(config.mode, config.options)
        self.plans: list[Plan] = []
        self.graphs: list[CompactedGraphs] = []
        self._watch = Watch()
        self._names: set[str] = set()
        self._earlier = Earlier()
        self._earlier_breaks = _torch.graph_breaks()
        if config.kind == "tracked" and config.gradients == "dense":
            warn_at_caller(
                "projection='tracked' with gradients='dense': the moments of an optimizer do not "
                "follow the projection, which trains badly; use gradients='sketched' with "
                "CompactAdamW or compact_optimizer",
            )

    def report(self) -> CompactionReport:
        """What was sketched, where, why not, bytes and FLOPs before and after; `print` it."""
        return CompactionReport(
            plans=tuple(self.plans),
            graph_breaks=_torch.graph_breaks(since=self._earlier_breaks),
            unsketched=+self._watch.unsketched,  # without those that were never called
            steps_unseen=self._watch.steps_unseen,
            energies={name: tuple(run) for name, run in self._watch.energies.items()},
        )

    def __call__(
        self,
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> Callable[..., Any]:
        """Compile one graph; called by torch.compile, which passes on its own `mode`."""
        if options:
            raise TypeError(
                f"options={dict(options)!r} of torch.compile would be lost: give settings to "
                "compact_backend(...), and Inductor's options to compact_backend(options={...})"
            )
        if mode is not None and mode != self.config.mode:
            inductor = _torch.inductor_options(mode, self.config.options)
        else:
            inductor = self._options
        compiler = GraphCompiler(self.config, inductor, module, example_inputs, self._earlier)
        graphs: list[CompactedGraphs] = []  # of the last plan

        def observe(joint: JointGraph, plan: Plan) -> None:
            if self.config.keep_graphs or _torch.is_traced():
                graphs[:] = [CompactedGraphs(named(joint), plan)]

        try:
            if not compiler.trains():
                return compiler.compile_untouched()
            plan, compiled = compiler.compile(compiler.plan(observe), self._watch, observe)
            self._earlier = compiler.earlier
        except CannotCompact as error:
            if self.config.strict or isinstance(error, BudgetTooSmall):
                raise
            warn_at_caller(f"a graph is compiled without sketches: {error}")
            return self._counted(compiler.compile_untouched(), str(error))
        if plan is None:
            return compiled
        return self._record(plan, graphs, compiled)

    def _counted(self, compiled: Callable[..., Any], reason: str) -> Callable[..., Any]:
        """A graph without sketches that could have some; its calls are in the report."""
        self._watch.expect(reason)

        def run(*args: Any) -> Any:
            if torch.is_grad_enabled():
                self._watch.ran_unsketched(reason)
            return compiled(*args)

        return run

    def _record(
        self, plan: Plan, graphs: Sequence[CompactedGraphs], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        self.plans.append(plan)
        if self.config.keep_graphs:
            self.graphs.extend(graphs)
        number = len(self.plans) - 1
        log.info(
            "graph %d: %d of %d weight gradients sketched, %d → %d bytes kept for backward",
            number,
            len(plan.sketched),
            len(plan.sites),
            plan.account.bytes_before,
            plan.account.bytes_after,
        )
        for site in plan.sites:
            log.debug("graph %d: %s", number, site)
        if _torch.is_traced():
            report = CompactionReport(plans=(plan,), graph_breaks={})
            _torch.trace_artifact(f"compact_fx_plan_{number}", "json", report.to_json())
            texts = ((name, text) for found in graphs for name, text in found.texts().items())
            for name, text in texts:
                _torch.trace_artifact(f"compact_fx_{name}_{number}", "string", text)
        self._names |= {site.weight for site in plan.sites}
        for text in self.config.unmatched(self._names):
            warn_at_caller(text)
        matmuls = (s for s in plan.sites if s.in_features or s.reason.startswith(SCALED))
        reasons = [reason for reason, _ in Counter(s.reason for s in matmuls).most_common()]
        if reasons and not plan.sketched:
            reason = f"nothing is sketched in a graph: {'; '.join(reasons)}"
            warn_at_caller(reason)
            if not CHOSEN.issuperset(reasons):
                return self._counted(compiled, reason)
        return compiled


def compact_backend(*arguments: Any, **settings: Any) -> CompactBackend:
    """A backend for `torch.compile(model, backend=...)` or `model.compile(backend=...)`.

    Args:
        settings: the fields of `CompactConfig`, such as `rank=0.25`.

    Raises:
        TypeError, ValueError: a setting that does not exist or cannot be.
    """
    if arguments:  # torch.compile calls what is given to it, and takes some for the backend itself
        raise TypeError(
            "settings are not positional: torch.compile(model, backend=compact_backend(rank=0.25))"
        )
    return CompactBackend(config_from(settings))


def compact(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """`torch.compile(model, backend="compact", options={"rank": 0.25}, mode=...)`."""
    settings = dict(options or {})
    if mode is not None:
        settings["mode"] = mode
    return _named_backend(config_from(settings))(module, example_inputs)


_named_backends: dict[str, CompactBackend] = {}


def _named_backend(config: CompactConfig) -> CompactBackend:
    return _named_backends.setdefault(repr(config), CompactBackend(config))
