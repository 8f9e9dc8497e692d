"""What training would take, without running or allocating anything."""

import copy
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from compact_fx import _torch
from compact_fx.compiler import GraphCompiler
from compact_fx.config import CompactConfig, config_from
from compact_fx.errors import warn_at_caller
from compact_fx.passes.choose_sites import Treatment, choose_for, choose_sites
from compact_fx.passes.joint_graph import Earlier, JointGraph
from compact_fx.passes.live_bytes import GraphMemory, Moment, graph_memory
from compact_fx.passes.partition import partition
from compact_fx.plan import Plan
from compact_fx.reading.graphs import CompactedGraphs, named
from compact_fx.reading.memory import Breakdown, LiveMemory, size_unit, step_timeline
from compact_fx.reading.ranks import (
    Parallel,
    Ranks,
    Training,
    held_by,
    ranks_of,
)
from compact_fx.reading.report import CompactionReport

STATES = {"adamw": 2, "adam": 2, "sgd": 0, "momentum": 1}
"""How many tensors of a gradient's size an optimizer keeps."""

COMPILED, DENSE, SKETCHED = "torch.compile", "compact, dense", "compact, sketched"
VARIANTS = ("eager", COMPILED, DENSE, SKETCHED)
MODES: Mapping[str, Literal["dense", "sketched"]] = {DENSE: "dense", SKETCHED: "sketched"}


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `explain` found; `print` it.

    Attributes:
        report: as `backend.report()` would give it.
        memory: by variant: "eager", "torch.compile", "compact, dense" and "compact, sketched"
            gradients.
        graphs: of each compiled graph, with the settings that were asked for.
        described: the model, its size and dtype, and its inputs, in one line.
    """

    report: CompactionReport
    memory: Mapping[str, Breakdown]
    graphs: tuple[CompactedGraphs, ...] = field(repr=False)
    described: str
    _trainings: Mapping[str, Training] = field(repr=False)

    def __str__(self) -> str:
        return self.table() + "\n\n" + str(self.report)

    def table(self, tablefmt: str = "simple") -> str:
        """The breakdown of each variant in GB (10⁹ bytes), or in MB where all is small."""
        names = ["weights", "gradients", "optimizer", "saved", "other", "peak"]
        unit, name_of_unit = size_unit(max(row.peak for row in self.memory.values()))
        rows = [
            [variant, *(f"{getattr(row, name) / unit:.2f}" for name in names)]
            for variant, row in self.memory.items()
        ]
        headers = [
            name_of_unit,
            "weights",
            "gradients",
            "optimizer",
            "saved",
            "other at peak",
            "peak",
        ]
        return tabulate(rows, headers, tablefmt, disable_numparse=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable names, all sizes in bytes."""
        memory = {
            variant: {k: v for k, v in asdict(row).items() if k != "timeline"}
            for variant, row in self.memory.items()
        }
        return {"memory": memory, "report": self.report.to_dict()}

    def to_json(self, indent: int | None = 1) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def ranks(self, world_size: int, parallel: Parallel) -> Ranks:
        """One of several processes, each with a batch like this one: what it holds, what it sends.

        Args:
            world_size: how many.
            parallel: "ddp" for DistributedDataParallel; "fsdp" for `fully_shard` of each block and
                of the model, "zero2" for the same with `reshard_after_forward=False`. A block is a
                member of an outermost ModuleList or Sequential.

        Raises:
            ValueError: there can be no such processes.
        """
        compiled = {way: self._trainings[way] for way in VARIANTS if way != "eager"}
        return ranks_of(compiled, self.memory, world_size, parallel)

    def plot(self, path: str | Path, *, gpu_memory: float | None = None) -> Path:
        """Stacked bars of each variant's memory at its peak; needs matplotlib.

        Args:
            gpu_memory: bytes of a GPU, drawn as a line.
        """
        from compact_fx.reading.plots import breakdown  # matplotlib is an extra

        return breakdown(self.memory, path, title=self.described, gpu_memory=gpu_memory)

    def timeline(self, path: str | Path) -> Path:
        """Live memory over forward and backward, one line for each variant; needs matplotlib."""
        from compact_fx.reading.plots import timeline

        moments = {name: row.timeline for name, row in self.memory.items()}
        return timeline(moments, path, title=self.described)


def explain(
    model: nn.Module,
    *args: Any,
    optimizer: str = "adamw",
    loss: Callable[[Any], Tensor] | None = None,
    like_eager: bool = False,
    config: CompactConfig | None = None,
    **kwargs: Any,
) -> Explanation:
    """What a backend with these settings would do to a model, and what a step would take.

    Nothing is run and nothing is allocated: the model may be on the "meta" device, of any size.

    Args:
        model: on any device; not changed.
        args: of the model's forward, as are keyword arguments that are no setting.
        optimizer: "adamw", "adam", "sgd" or "momentum".
        loss: makes a scalar of the model's output. By default `output.loss` if there is one,
            otherwise the sum of the first tensor in it.
        like_eager: cut graphs as eager autograd would, in place of torch.compile's choice, which
            recomputes much; to see the paper's picture (its Table 6, with `recompute=False`).
        config: all settings; every keyword then goes to the model, also one named as a setting.
        kwargs: fields of `CompactConfig`, such as `rank=0.25`; all others go to the model.

    Raises:
        ValueError, TypeError: a setting that cannot be, an optimizer that is not known, a model
            of which nothing is trained.
        CannotCompact: a graph that the backend would leave untouched.
    """
    if optimizer not in STATES:
        raise ValueError(f"optimizer={optimizer!r} must be one of {', '.join(map(repr, STATES))}")
    names = {field.name for field in fields(CompactConfig)} if config is None else set()
    config = config or config_from({k: v for k, v in kwargs.items() if k in names})
    inputs = {k: v for k, v in kwargs.items() if k not in names}
    _check_arguments(model, inputs, names, given=names & kwargs.keys())
    breaks = _torch.graph_breaks()
    with _torch.fake_mode(), torch.enable_grad():
        model, args, inputs = faked((_torch.uncompiled(model), args, inputs))
        given_tensors = _torch.tree_leaves((args, inputs))
        analyse = functools.partial(_analyse, config)
        analyser = Analyser(config, analyse, given_tensors, like_eager=like_eager)
        output = _torch.call_compiled(model, analyser, args, inputs)
        outside = _memory_of_loss(output, loss)
        eager, saved = _memory_of_eager(model, args, inputs, loss)
    described = _described(model, (args, inputs))
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    lasting = storage_bytes([*model.parameters(), *model.buffers()])
    given = storage_bytes(_torch.tree_leaves((args, inputs)))
    memory, trainings = {}, {}
    for way in VARIANTS:
        gradients, scratch = storage_bytes(weights), 0
        mode = MODES.get(way)
        planned = [(f.graphs[mode].plan, f.inputs) for f in analyser.found] if mode else []
        timeline: Sequence[Moment] = eager
        if way != "eager":
            graphs = [found.memory[way] for found in analyser.found]
            saved = sum(graph.saved for graph in graphs)
            timeline = step_timeline(graphs, outside)
        if way == SKETCHED:
            sizes, scratch = sketched_sizes(weights, planned)
            gradients = sum(elements * itemsize for elements, itemsize in sizes)
        states = STATES[optimizer] * gradients
        states += sum(plan.account.projection_bytes for plan, _ in planned)
        step = Moment("optimizer", "step", gradients + scratch)
        base = lasting + states + given
        moments = tuple(replace(m, bytes=base + m.bytes) for m in (*timeline, step))
        peak = max(moment.bytes for moment in moments)
        memory[way] = Breakdown(
            weights=lasting,
            gradients=gradients,
            optimizer=states,
            saved=saved,
            other=peak - lasting - states - max(saved, gradients),
            peak=peak,
            timeline=moments,
        )
        trainings[way] = Training(
            held=held_by(model, planned),
            inputs=given,
            buffers=storage_bytes(model.buffers()),
            states=STATES[optimizer],
            projections=tuple(p for plan, _ in planned for p in plan.projections),
            interval=replace(config, gradients=mode or "dense").interval,
            timeline=timeline,
        )
    graphs_of = [found.graphs[config.gradients] for found in analyser.found]
    sites = (site for graphs in graphs_of for site in graphs.plan.sites)
    for text in config.unmatched({site.weight for site in sites}):
        warn_at_caller(text)
    report = CompactionReport(
        plans=tuple(graphs.plan for graphs in graphs_of if graphs.plan.sites),
        graph_breaks=_torch.graph_breaks(breaks),
    )
    return Explanation(
        report=report,
        memory=memory,
        graphs=tuple(graphs_of),
        described=described,
        _trainings=trainings,
    )


def _described(model: nn.Module, given: Any) -> str:
    """Class, parameters, dtype of most of them, and the shape of the first input."""
    elements: dict[str, int] = {}
    for weight in model.parameters():
        name = str(weight.dtype).removeprefix("torch.")
        elements[name] = elements.get(name, 0) + weight.numel()
    dtype = max(elements, key=elements.__getitem__)
    count = sum(elements.values())
    number = f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"
    size = f"{number} parameters in {dtype}"
    tensors = [leaf for leaf in _torch.tree_leaves(given) if isinstance(leaf, Tensor)]
    shape = " x ".join(map(str, tensors[0].shape)) if tensors else "no tensor"
    return f"{type(model).__name__}, {size}, batch {shape}"


def _check_arguments(
    model: nn.Module, inputs: Mapping[str, Any], settings: set[str], given: set[str]
) -> None:
    """Name what is neither a setting nor an argument: a setting may be misspelt."""
    parameters = inspect.signature(model.forward).parameters
    both = sorted(given & parameters.keys())
    if both:
        raise TypeError(
            f"{', '.join(both)}: settings of the backend and arguments of the model's forward; "
            "give the settings as config=CompactConfig(...), and all keywords go to the model"
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in inputs:
        if name not in parameters:
            raise TypeError(
                f"{name!r} is neither an argument of the model's forward nor a setting; "
                f"settings: {', '.join(sorted(settings))}"
            )


# --- the compiled graphs -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Found:
    """One graph: its compactions by gradient mode, and its memory by variant."""

    graphs: Mapping[str, CompactedGraphs]
    memory: Mapping[str, GraphMemory]
    inputs: Sequence[Any]


T = TypeVar("T")


class Analyser(Generic[T]):
    """A backend that analyses graphs and runs them as they are.

    Args:
        analyse: called with a joint graph, the graph's inputs, and the indices of those that
            another graph makes.
        given: inputs of the whole model.

    Attributes:
        found: what `analyse` has made of each graph.
    """

    def __init__(
        self,
        config: CompactConfig,
        analyse: Callable[[JointGraph, Sequence[Any], set[int]], T],
        given: Iterable[Any],
        *,
        like_eager: bool = False,
    ) -> None:
        self._config = config
        self._analyse = analyse
        self._given = {_torch.storage_id(t) for t in given if _is_tensor(t)}
        self._like_eager = like_eager
        self._options = _torch.inductor_options(config.mode, config.options)
        self.found: list[T] = []
        self._earlier = Earlier()

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiler = GraphCompiler(self._config, self._options, module, inputs, self._earlier)
        # A graph without weights keeps tensors too.
        if compiler.trains() or any(_is_tensor(t) and t.requires_grad for t in inputs):
            found = compiler.visit(
                lambda joint: self._analyse(joint, inputs, self._intermediate(joint, inputs)),
                like_eager=self._like_eager,
            )
            self.found += [found] if found is not None else []
            self._earlier = compiler.earlier
        return module.forward

    def _intermediate(self, joint: JointGraph, inputs: Sequence[Any]) -> set[int]:
        return {
            index
            for index, value in enumerate(inputs)
            if _is_tensor(value)
            and not isinstance(value, nn.Parameter)
            and _torch.storage_id(value) not in self._given
            and index not in joint.buffers
        }


def _analyse(
    config: CompactConfig, joint: JointGraph, inputs: Sequence[Any], intermediate: set[int]
) -> _Found:
    joint = named(joint)
    plan = choose_sites(joint, config)
    other = replace(config, gradients="dense" if config.gradients == "sketched" else "sketched")
    plans = {config.gradients: plan, other.gradients: _treated_alike(joint, other, plan)}
    graphs: dict[str, CompactedGraphs] = {
        gradients: CompactedGraphs(joint, plan) for gradients, plan in plans.items()
    }
    cuts = {
        COMPILED: graphs["dense"].cut_before,
        DENSE: graphs["dense"].cut,
        SKETCHED: graphs["sketched"].cut,
    }
    memory = {
        way: graph_memory(cut, joint, intermediate, with_reuse=cut is cuts[COMPILED])
        for way, cut in cuts.items()
    }
    return _Found(graphs, memory, inputs)


def _treated_alike(joint: JointGraph, config: CompactConfig, plan: Plan) -> Plan:
    """The plan of other settings; a budget, which they may be unable to reach, was for this one."""
    if config.memory_budget is None:
        return choose_sites(joint, config)
    before = partition(joint.copy(), recompute=False)
    treatment = Treatment(plan.recompute, plan.saved, plan.saved_share)
    return choose_for(joint, config, None, before, treatment)[0]


def sketched_sizes(
    weights: Sequence[Tensor], planned: Iterable[tuple[Plan, Sequence[Any]]]
) -> tuple[list[tuple[int, int]], int]:
    """Elements of all gradients and their bytes each, and what a compact optimizer's step needs.

    planned: for each graph, its plan and its inputs.
    """
    sizes = {id(weight): (weight.numel(), weight.element_size()) for weight in weights}
    factors = projections = 0
    for plan, inputs in planned:
        for role in plan.factor_inputs:
            weight = inputs[role.index]
            sizes[id(weight)] = math.prod(role.shape), weight.element_size()
            factors += math.prod(role.shape) * weight.element_size()
            p = plan.projections[role.projection]
            projections = max(projections, p.features * p.rank * p.dtype.itemsize)
    return list(sizes.values()), factors + projections


# --- what runs eagerly ---------------------------------------------------------------------------


def faked(value: Any) -> Any:
    """A deep copy with fake tensors in place of all tensors; "meta" becomes the CPU."""
    memo: dict[int, Any] = {}

    def fake(tensor: Tensor) -> Tensor:
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        empty = torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(empty, requires_grad=tensor.requires_grad)
        return empty.requires_grad_(tensor.requires_grad)

    for module in _torch.tree_leaves(value):
        if isinstance(module, nn.Module):
            for own in module.modules():
                for tensor in filter(_is_tensor, _torch.tree_leaves(list(vars(own).values()))):
                    if id(tensor) not in memo:
                        memo[id(tensor)] = fake(tensor)
        elif isinstance(module, Tensor):
            memo[id(module)] = fake(module)
    return copy.deepcopy(value, memo)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _scalar(output: Any, loss: Callable[[Any], Tensor] | None) -> Tensor:
    if loss is not None:
        return _called(loss, output)
    own = getattr(output, "loss", None)
    if own is not None:
        return own  # type: ignore[no-any-return]
    for tensor in filter(_is_tensor, _torch.tree_leaves(output)):
        if tensor.requires_grad:
            return tensor.sum()  # type: ignore[no-any-return]
    raise ValueError("nothing in the model's output needs a gradient: is every weight frozen?")


def _called(loss: Callable[[Any], Tensor], output: Any) -> Tensor:
    try:
        scalar = loss(output)
    except Exception as error:
        devices = {str(t.device) for t in _torch.tree_leaves(output) if _is_tensor(t)}
        raise ValueError(
            f"loss={loss!r} failed: {error}. It is called with tensors without data on "
            f"{', '.join(sorted(devices))}: other tensors that it reads have to be there too"
        ) from error
    if not _is_tensor(scalar) or scalar.numel() != 1:
        raise ValueError(f"loss={loss!r} must return a tensor with one element, not {scalar!r}")
    return scalar


def _memory_of_loss(output: Any, loss: Callable[[Any], Tensor] | None) -> tuple[Moment, ...]:
    """Live memory of a loss that is computed outside of the model."""
    output = _torch.tree_map(
        lambda t: t.detach().requires_grad_(t.requires_grad) if _is_tensor(t) else t, output
    )
    leaves = [leaf for leaf in _torch.tree_leaves(output) if _is_tensor(leaf)]
    with LiveMemory() as live:
        scalar = _scalar(output, loss)
        live.phase = "backward"
        if scalar.grad_fn is not None:
            scalar.backward()  # type: ignore[no-untyped-call]
    here = storage_bytes(leaves)
    return tuple(replace(moment, bytes=here + moment.bytes) for moment in live.moments)


def _memory_of_eager(
    model: nn.Module, args: Any, inputs: Any, loss: Callable[[Any], Tensor] | None
) -> tuple[tuple[Moment, ...], int]:
    """Live memory of a step without a compiler, and the bytes that autograd keeps."""
    own = [*model.parameters(), *model.buffers()]
    lasting = [*own, *filter(_is_tensor, _torch.tree_leaves((args, inputs)))]
    free = {_torch.storage_id(tensor) for tensor in own}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (storage := _torch.storage_id(tensor)) not in free:
            saved[storage] = tensor.untyped_storage().nbytes()
        return tensor

    with LiveMemory(lasting) as live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            scalar = _scalar(model(*args, **inputs), loss)
        live.phase = "backward"
        scalar.backward()  # type: ignore[no-untyped-call]
    for weight in model.parameters():
        weight.grad = None
    return tuple(live.moments), sum(saved.values())


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Of their storages, each counted once."""
    storages = {_torch.storage_id(t): t for t in tensors if _is_tensor(t)}
    return sum(t.untyped_storage().nbytes() for t in storages.values())
