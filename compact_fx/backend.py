"""The backend object that torch.compile calls with each of Dynamo's graphs."""

import contextlib
import difflib
import functools
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

import compact_fx
from compact_fx import _torch, passes
from compact_fx.config import CompactConfig, config_from
from compact_fx.errors import CannotCompact
from compact_fx.graphs import CompactedGraphs, named
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.expand_projections import expand_projections
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.passes.partition import partition
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.passes.split_grouped_backward import split_grouped_backward
from compact_fx.plan import Plan
from compact_fx.proxies import ProxyInputs, refuse_distributed
from compact_fx.report import CompactionReport
from compact_fx.schedule import KeySchedule

log = logging.getLogger(__name__)
T = TypeVar("T")


class CompactBackend:
    """A torch.compile backend that computes weight gradients from random sketches.

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
        self._names: set[str] = set()
        self._earlier_breaks = _torch.graph_breaks()

    def report(self) -> CompactionReport:
        """What was sketched, where, why not, bytes and FLOPs before and after; `print` it."""
        breaks = _torch.graph_breaks(since=self._earlier_breaks)
        return CompactionReport(plans=tuple(self.plans), graph_breaks=breaks)

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
        if self.config.gradients == "sketched" and torch.is_grad_enabled():
            refuse_distributed()
        compiler = GraphCompiler(self.config, inductor, module, example_inputs)
        try:
            if not compiler.trains():
                return compiler.compile_untouched()
            analysis = compiler.analyse()
            compiled = compiler.compile(analysis)
        except CannotCompact as error:
            if self.config.strict:
                raise
            warnings.warn(f"a graph is compiled without sketches: {error}", stacklevel=2)
            return compiler.compile_untouched()
        if analysis is not None:
            self._record(analysis)
        return compiled

    def _record(self, analysis: "Analysis") -> None:
        plan = analysis.plan
        self.plans.append(plan)
        graphs = analysis.graphs
        if graphs is not None and self.config.keep_graphs:
            self.graphs.append(graphs)
        number = len(self.plans) - 1
        log.info(
            "graph %d: %d of %d weight gradients sketched, %d → %d bytes kept for backward",
            number,
            len(plan.sketched),
            len(plan.sites),
            plan.bytes_before,
            plan.bytes_after,
        )
        for site in plan.sites:
            log.debug("graph %d: %s", number, site)
        if graphs is not None and _torch.is_traced():
            report = CompactionReport(plans=(plan,), graph_breaks={})
            _torch.trace_artifact(f"compact_fx_plan_{number}", "json", report.to_json())
            for name, text in graphs.texts().items():
                _torch.trace_artifact(f"compact_fx_{name}_{number}", "string", text)
        self._check_patterns(plan)
        reasons = sorted({site.reason for site in plan.sites if site.in_features})
        if reasons and not plan.sketched:
            warnings.warn(f"nothing is sketched in a graph: {'; '.join(reasons)}", stacklevel=3)

    def _check_patterns(self, plan: Plan) -> None:
        self._names |= {site.weight for site in plan.sites}
        for pattern in self.config.patterns():
            if not any(fnmatchcase(name, pattern) for name in self._names):
                near = difflib.get_close_matches(pattern.replace("*", ""), self._names, 3, 0.1)
                warnings.warn(
                    f"pattern {pattern!r} matches no weight that was compiled so far (patterns "
                    "match whole names, such as '*.mlp.*' or 'lm_head.weight'); "
                    f"the nearest: {', '.join(near) or 'none'}",
                    stacklevel=3,
                )


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


@dataclass(frozen=True)
class Analysis:
    """What the first phase finds in one graph.

    Attributes:
        graphs: None unless they are kept or traced.
    """

    plan: Plan
    graphs: CompactedGraphs | None


class _Analysed(BaseException):
    """Ends a compilation at the partitioner; no `except Exception` may eat it."""


class GraphCompiler:
    """Compiles one graph of Dynamo's, in two phases: analyse, then compile what was planned.

    Dynamo's own graph is never changed: every phase gets a copy.
    """

    def __init__(
        self,
        config: CompactConfig,
        options: Mapping[str, Any],
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
    ) -> None:
        self._config = config
        self._options = options
        self._module = module
        self._example_inputs = list(example_inputs)
        placeholders = module.graph.find_nodes(op="placeholder")
        self._weights = {
            index: _torch.qualified_name(node)
            for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True))
            if isinstance(value, torch.nn.Parameter)
        }
        self._buffers = frozenset(
            i for i, node in enumerate(placeholders) if _torch.is_buffer(node)
        )

    def trains(self) -> bool:
        """Whether a backward pass may be asked of this graph.

        Raises:
            CannotCompact: its weights are out of reach.
        """
        if not torch.is_grad_enabled():
            return False
        if any(weight.requires_grad for weight in self._module.parameters()):
            raise CannotCompact(
                "its parameters are attributes and not inputs, as Dynamo's splitting of graphs for "
                "DistributedDataParallel makes them; switch off Dynamo's optimize_ddp"
            )
        return any(self._example_inputs[index].requires_grad for index in self._weights)

    def compile_untouched(self) -> Callable[..., Any]:
        """What torch.compile does without this project."""
        return self._compile(_torch.copy_graph_module(self._module), self._example_inputs)

    def visit(self, visitor: Callable[[JointGraph], T], *, like_eager: bool = False) -> T | None:
        """What the visitor makes of the joint graph; None for a graph without a backward pass.

        like_eager: of the operators that eager autograd sees, and cut as it would.

        Raises:
            CannotCompact: the visitor failed.
        """
        results: list[T] = []

        def partition(
            module: fx.GraphModule, num_fwd_outputs: int, static_inputs: Sequence[int]
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            with _failures_are_cannot_compact():
                joint = self._joint(module, num_fwd_outputs, static_inputs)
                results.append(visitor(replace(joint, like_eager=like_eager)))
            raise _Analysed

        with contextlib.suppress(_Analysed), _torch.cold_joint_graph():
            module = _torch.copy_graph_module(self._module)
            self._compile(module, self._example_inputs, partition, like_eager=like_eager)
        return results[0] if results else None

    def analyse(self) -> Analysis | None:
        """The first phase: the plan, and nothing compiled. None without a backward pass."""

        def visitor(joint: JointGraph) -> Analysis:
            plan = choose_sites(joint, self._config)
            keep = self._config.keep_graphs or _torch.is_traced()
            return Analysis(plan, CompactedGraphs(named(joint), plan) if keep else None)

        return self.visit(visitor)

    def compile(self, analysis: Analysis | None) -> Callable[..., Any]:
        """The second phase: the graph, compiled as planned."""
        if analysis is None or not analysis.plan.sketched:
            return self.compile_untouched()
        plan = analysis.plan
        schedule = KeySchedule(plan, self._config.seed, self._config.update_interval)
        owners = plan.owners
        proxy_inputs = ProxyInputs(plan)

        def extra_inputs(arguments: Sequence[Any]) -> list[Tensor]:
            drawn = schedule.keys([arguments[index] for index in owners])
            return [*drawn.sources, *proxy_inputs.proxies(arguments, drawn)]

        module = _torch.copy_graph_module(self._module)
        extra = extra_inputs(self._example_inputs)
        for number in range(len(extra)):
            _torch.append_placeholder(module, f"compact_input_{number}")
        module.recompile()
        compiled = self._compile(
            module,
            [*self._example_inputs, *extra],
            functools.partial(self._partition, plan),
            plan,
        )

        def run(*args: Any) -> Any:
            return compiled(*args, *extra_inputs(args))

        return run

    def _compile(
        self,
        module: fx.GraphModule,
        example_inputs: list[Tensor],
        partition: _torch.Partitioner | None = None,
        plan: Plan | None = None,
        like_eager: bool = False,
    ) -> Callable[..., Any]:
        return _torch.compile_graph(
            module,
            example_inputs,
            inner="aot_eager" if like_eager else self._config.inner,
            decompose=not like_eager,
            options=self._options,
            partition=partition,
            cache_id=_cache_id(self._config, plan),
        )

    def _joint(
        self, module: fx.GraphModule, num_fwd_outputs: int, static_inputs: Sequence[int]
    ) -> JointGraph:
        joint = JointGraph(
            module, num_fwd_outputs, tuple(static_inputs), self._weights, self._buffers
        )
        split_grouped_backward(joint)
        module.graph.eliminate_dead_code()
        _torch.eliminate_common_subexpressions(module)
        return joint

    def _partition(
        self,
        plan: Plan,
        module: fx.GraphModule,
        num_fwd_outputs: int,
        static_inputs: Sequence[int],
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        first_key = len(self._example_inputs)
        first_proxy = first_key + len(plan.projections)
        with _failures_are_cannot_compact():
            joint = replace(
                self._joint(module, num_fwd_outputs, static_inputs),
                key_inputs=tuple(range(first_key, first_proxy)),
                proxy_inputs=tuple(range(first_proxy, first_proxy + len(plan.proxies))),
            )
            sketches = rewrite_weight_grads(joint, plan)
            early = plan.early(sketches)
            cut = partition(joint, recompute=plan.recompute, early=early)
            if cut.bytes != plan.bytes_after:
                raise CannotCompact(f"{cut.bytes} bytes cross, {plan.bytes_after} were planned")
            expand_projections(cut.forward)
            expand_projections(cut.backward)
        return cut.forward, cut.backward


@contextlib.contextmanager
def _failures_are_cannot_compact() -> Iterator[None]:
    """The one place where a failure in a pass becomes a graph left untouched."""
    try:
        yield
    except CannotCompact:
        raise
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        raise CannotCompact(f"{type(error).__name__} in a pass: {first_line}") from error


def _cache_id(config: CompactConfig, plan: Plan | None) -> str:
    """Everything that decides what the partitioner does; stands for it in the keys of caches."""
    parts = (_source_hash(), torch.__version__, repr(config), repr(plan))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _source_hash() -> str:
    """Of all source of this package and its passes: an edited pass must not hit an old entry."""
    digest = hashlib.sha256()
    for folder in (compact_fx.__path__[0], passes.__path__[0]):
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
