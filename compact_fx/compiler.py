"""Compile one graph: capture it, plan, compile what was planned."""

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

import compact_fx
from compact_fx import _torch, passes
from compact_fx.config import CompactConfig
from compact_fx.errors import CannotCompact, SiteFailed, failures_of, warn_at_caller
from compact_fx.passes.apply_plan import apply_plan, expand
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.joint_graph import Earlier, JointGraph, capture
from compact_fx.plan import Plan
from compact_fx.training.inputs import GraphInputs
from compact_fx.training.watch import Watch
from compact_fx.training.weights import known_record

T = TypeVar("T")
Observer = Callable[[JointGraph, Plan], None]
"""Called once with the joint graph and the plan, while the graph is there."""


class _Visited(BaseException):
    """Ends a compilation at the partitioner; no `except Exception` may eat it."""


class GraphCompiler:
    """Compiles one graph of Dynamo's, in two phases: plan, then compile what was planned.

    Dynamo's own graph is never changed: every phase gets a copy.

    Attributes:
        earlier: what is known of the graphs before it, and from `plan` on of this one.
    """

    def __init__(
        self,
        config: CompactConfig,
        options: Mapping[str, Any],
        module: fx.GraphModule,
        example_inputs: Sequence[Any],
        earlier: Earlier | None = None,
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
        self.earlier = Earlier() if earlier is None else earlier
        self._failed: dict[str, str] = {}  # weight → reason, of those that a pass has failed for

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
        tensors = [value for value in self._example_inputs if isinstance(value, Tensor)]
        if any(map(_torch.is_of_flat_parameter, tensors)):
            raise CannotCompact(
                "FullyShardedDataParallel (FSDP1) makes one flat parameter of its weights; use "
                "fully_shard (FSDP2)"
            )
        trained = [self._example_inputs[index] for index in self._weights]
        trained = [weight for weight in trained if weight.requires_grad]
        if any(map(_torch.is_sharded, trained)):
            raise CannotCompact(
                "its weights are DTensors within the graph, as tensor parallelism makes them; "
                "fully_shard alone (FSDP2) gathers them before"
            )
        return bool(trained)

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
            with failures_of("the analysis"):
                joint = self._capture(module, num_fwd_outputs, static_inputs)
                results.append(visitor(replace(joint, like_eager=like_eager)))
            raise _Visited

        with contextlib.suppress(_Visited), _torch.cold_joint_graph():
            module = _torch.copy_graph_module(self._module)
            self._compile(module, self._example_inputs, partition, like_eager=like_eager)
        return results[0] if results else None

    def plan(self, observe: Observer | None = None) -> Plan | None:
        """The first phase; nothing is compiled. None without a backward pass.

        A weight that a pass fails for is left alone, and the others are planned again.

        Raises:
            CannotCompact: a pass failed for the whole graph.
        """

        def visitor(joint: JointGraph) -> Plan:
            while True:
                try:
                    with failures_of("choose_sites"):
                        plan = choose_sites(joint, self._config, self._failed)
                    break
                except SiteFailed as error:
                    self._leave_alone(error)
            allowed = max(self.earlier.allowed, plan.account.allowed)
            self.earlier = replace(self.earlier, allowed=allowed)
            if observe is not None:
                observe(joint, plan)
            return plan

        return self.visit(visitor)

    def compile(
        self, plan: Plan | None, watch: Watch, observe: Observer | None = None
    ) -> tuple[Plan | None, Callable[..., Any]]:
        """The second phase: the graph, compiled as planned, and the plan that it follows."""
        while plan is not None and (plan.sketched or plan.saved):
            try:
                return plan, self._compile_plan(plan, watch)
            except SiteFailed as error:
                self._leave_alone(error)
                plan = self.plan(observe)
        return plan, self.compile_untouched()

    def compile_untouched(self) -> Callable[..., Any]:
        """What torch.compile does without this project."""
        return self._compile(_torch.copy_graph_module(self._module), self._example_inputs)

    # ---------------------------------------------------------------------------------------------

    def _leave_alone(self, error: SiteFailed) -> None:
        """From now on plan without this weight."""
        if self._config.strict or error.weight in self._failed:
            raise error
        self._failed[error.weight] = str(error)
        warn_at_caller(f"{error.weight} is left without a sketch: {error}")

    def _compile_plan(self, plan: Plan, watch: Watch) -> Callable[..., Any]:
        config = self._config
        in_place = _torch.records_cuda_graphs(self._options, self._example_inputs)
        inputs = GraphInputs(
            plan,
            watch,
            seed=config.seed,
            interval=config.interval,
            follow=config.follow,
            in_place=in_place,
        )
        module = _torch.copy_graph_module(self._module)
        extra = map(_torch.with_fixed_sizes, inputs.examples(self._example_inputs))
        for number in range(len(plan.inputs)):
            _torch.append_placeholder(module, f"compact_input_{number}", is_static=in_place)
        module.recompile()

        def partition(
            module: fx.GraphModule, num_fwd_outputs: int, static_inputs: Sequence[int]
        ) -> tuple[fx.GraphModule, fx.GraphModule]:
            with failures_of("capture"):
                joint = self._capture(module, num_fwd_outputs, static_inputs)
            added = dict(enumerate(plan.inputs, len(self._example_inputs)))
            return expand(apply_plan(replace(joint, added=added), plan))

        example_inputs = [*self._example_inputs, *extra]
        compiled = self._compile(module, example_inputs, partition, _cache_id(plan))

        def run(*args: Any) -> Any:
            return compiled(*args, *inputs(args))

        return run if plan.inputs else compiled

    def _compile(
        self,
        module: fx.GraphModule,
        example_inputs: list[Tensor],
        partition: _torch.Partitioner | None = None,
        cache_id: str = "",
        like_eager: bool = False,
    ) -> Callable[..., Any]:
        return _torch.compile_graph(
            module,
            example_inputs,
            inner="aot_eager" if like_eager else self._config.inner,
            decompose=not like_eager,
            options=self._options,
            partition=partition,
            cache_id=cache_id or _cache_id(None),
        )

    def _capture(
        self, module: fx.GraphModule, num_fwd_outputs: int, static_inputs: Sequence[int]
    ) -> JointGraph:
        records = {i: known_record(self._example_inputs[i]) for i in self._weights}
        salts = {
            index: record.group.root().salt
            for index, record in records.items()
            if record is not None and record.group is not None
        }
        sides = {i: r.side for i, r in records.items() if r is not None and r.side is not None}
        joint = capture(
            module,
            num_fwd_outputs,
            static_inputs,
            self._weights,
            self._buffers,
            salts,
            sides,
            self._shards(),
        )
        if (vocabulary := joint.vocabulary()) is not None:
            known = self.earlier.vocabularies | {vocabulary}
            self.earlier = replace(self.earlier, vocabularies=known)
        return replace(joint, earlier=self.earlier)

    def _shards(self) -> dict[int, int]:
        """By index which dimension `fully_shard` has sharded, where that matters to a gradient."""
        if self._config.gradients == "dense":
            return {}
        found = {i: _torch.sharding_of(self._example_inputs[i]) for i in self._weights}
        return {index: known.dim for index, known in found.items() if known is not None}


def _cache_id(plan: Plan | None) -> str:
    """Everything that decides what the partitioner does; stands for it in the keys of caches."""
    parts = (_source_hash(), torch.__version__, plan.digest() if plan is not None else "")
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _source_hash() -> str:
    """Of all source of this package and its passes: an edited pass must not hit an old entry."""
    digest = hashlib.sha256()
    for folder in (compact_fx.__path__[0], passes.__path__[0]):
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return digest.hexdigest()
