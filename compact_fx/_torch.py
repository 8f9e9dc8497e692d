"""Everything private in torch that this project touches, with the versions it was tried on.

Tried on torch 2.11 (CUDA) and 2.13 (CPU). Nothing is patched; settings change inside of a call.
"""

import contextlib
import copy
import gc
import inspect
import operator
import os
import re
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeGuard, TypeVar

import torch
import torch._functorch.config as functorch_config
from torch import fx, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.pgo import get_code_state
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import (
    DummyAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
)
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.compile_utils import fx_graph_cse
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch._inductor.decomposition import select_decomp_table
from torch._logging._internal import trace_structured
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph import _BoxedCodeGen
from torch.nn.parallel import DistributedDataParallel
from torch.utils._dtype_abbrs import dtype_abbrs
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map

if torch.distributed.is_available():  # some builds are without
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    _SHARDED: tuple[type, ...] = (DTensor,)
else:
    _SHARDED = ()

Partitioner = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]
CompiledFunction = Callable[..., Any]
Result = TypeVar("Result")
Traced = TypeVar("Traced", bound=Callable[..., Any])

# ---------------------------------------------------------------------------------------------
# Dynamo's graph
# ---------------------------------------------------------------------------------------------

# L['self']._modules['layers']._modules['0']._parameters['weight'] -> layers.0.weight; Dynamo also
# writes .__dict__['_modules']['layers'].
_SOURCE_PART = re.compile(r"_(?:modules|parameters|buffers)(?:'\])?\['([^']+)'\]")


def qualified_name(placeholder: fx.Node) -> str:
    """The parameter's name, by the path that the compiled code took to it."""
    text = _source(placeholder)
    return ".".join(_SOURCE_PART.findall(text)) or text or placeholder.name


def is_buffer(placeholder: fx.Node) -> bool:
    """Whether an input of Dynamo's graph is a buffer of the model."""
    return "._buffers['" in _source(placeholder)


def _source(placeholder: fx.Node) -> str:
    """The path that the compiled code took to an input; "" if unknown."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    return source.name if isinstance(source.name, str) else str(source.name())


def copy_graph_module(module: fx.GraphModule) -> fx.GraphModule:
    """A copy with a graph of its own and shared tensors: compilers take over what they get."""
    graph = copy.deepcopy(module.graph)
    duplicate = fx.GraphModule(module, graph)
    duplicate.meta = dict(module.meta)
    # Without it AOTAutograd takes parameters for inputs that are new in each step.
    if hasattr(module, "_param_name_to_source"):
        duplicate._param_name_to_source = module._param_name_to_source
    originals = module.graph.find_nodes(op="placeholder")
    for node, original in zip(graph.find_nodes(op="placeholder"), originals, strict=True):
        # AOTAutograd reads this attribute of every placeholder, and copying a node drops it.
        if hasattr(original, "_dynamo_source"):
            node._dynamo_source = original._dynamo_source
    return duplicate


def append_placeholder(module: fx.GraphModule, name: str, *, is_static: bool) -> fx.Node:
    """Give the graph one more input, behind those it has.

    is_static: it is in the same memory at every call; CUDA graphs copy what is not.
    """
    last = module.graph.find_nodes(op="placeholder")[-1]
    with module.graph.inserting_after(last):
        node = module.graph.placeholder(name)
    node._dynamo_source = None  # type: ignore[attr-defined]
    if is_static:  # as Dynamo says it of parameters
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    return node


# ---------------------------------------------------------------------------------------------
# The joint graph
# ---------------------------------------------------------------------------------------------


def input_index(placeholder: fx.Node) -> int | None:
    """Which input of Dynamo's graph a placeholder of the joint graph is, None for all others."""
    desc = placeholder.meta.get("desc")
    return desc.idx if isinstance(desc, PlainAOTInput) else None


def set_input_index(placeholder: fx.Node, index: int) -> None:
    """Describe a placeholder as an input of Dynamo's graph."""
    placeholder.meta["desc"] = PlainAOTInput(idx=index)


def gradient_index(desc: object) -> int | None:
    """For the descriptor of a joint graph's output: the input that it is the gradient of."""
    if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput):
        return int(desc.grad_of.idx)
    return None


def add_gradient_outputs(graph: fx.Graph, indices: Iterable[int]) -> None:
    """One more output for the gradient of each of these inputs of Dynamo's graph: None so far."""
    output = graph.output_node()
    indices = list(indices)
    output.args = ([*output.args[0], *(None for _ in indices)],)  # type: ignore[misc]
    added = [GradAOTOutput(grad_of=PlainAOTInput(idx=index)) for index in indices]
    output.meta["desc"] = [*output.meta["desc"], *added]


def is_mutation(desc: object) -> bool:
    """For the descriptor of a joint graph's output: whether it is an input's new value."""
    return isinstance(desc, InputMutationAOTOutput)


def output_descriptors(graph: fx.Graph) -> list[object]:
    """A descriptor for each output of a joint graph."""
    return list(graph.output_node().meta["desc"])


def eliminate_common_subexpressions(module: fx.GraphModule) -> None:
    """Make equal nodes one, as the partitioner does: q, k and v then read one view."""
    if functorch_config.cse:
        module.graph = fx_graph_cse(module.graph)


def operator_name(node: fx.Node) -> str:
    """`mm.default` of `aten.mm.default`; of a getitem, the operator it takes a result of."""
    if node.target is operator.getitem:
        return operator_name(node.args[0])  # type: ignore[arg-type]
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).split(".", 1)[1]
    return node.op if node.op != "call_function" else getattr(node.target, "__name__", "?")


def makes_view(target: object) -> bool:
    """Whether an operator's result is a view of its first argument, or may be."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    results = [returned.alias_info for returned in target._schema.returns]
    return len(results) == 1 and results[0] is not None and not results[0].is_write


def storage_id(tensor: torch.Tensor) -> int:
    """An identity of a tensor's storage, for as long as the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


def type_of(node: fx.Node) -> str:
    """`f32[4, 64]`; a symbolic or plain number as it is."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return f"{dtype_abbrs[value.dtype]}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return "(...)"
    return str(value)


def rename(node: fx.Node, name: str) -> None:
    """Another name for a node, with a number where it is taken."""
    node._rename(name)
    if node.op == "placeholder":
        node.target = node.name


def in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread."""
    return bool(torch._C._current_graph_task_id() != -1)


def graph_breaks(since: Mapping[str, int] | None = None) -> dict[str, int]:
    """Reason → how often Dynamo broke a graph for it in this process, or since then."""
    return dict(Counter(counters["graph_break"]) - Counter(since))


def untraced(function: Traced) -> Traced:
    """Within compiled functions Dynamo runs it as it is, and takes nothing in it for fixed."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]


def recompile_limit_hits() -> int:
    """How often Dynamo gave up a function in this process for its limit of recompilations."""
    return sum(n for reason, n in counters["unimplemented"].items() if "recompile limit" in reason)


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is made of others, as FSDP's DTensors are."""
    return is_traceable_wrapper_subclass(tensor)


class Sharding:
    """How `fully_shard` shards a weight that it gathers; as it is now, and no reason to keep it.

    Attributes:
        name: of the weight, from the root of the model.
        dim: that processes have parts of.
        group: of the processes that have them.
        is_replicated: whether other processes have the same parts (HSDP).
    """

    def __init__(self, parameter: Any, group: Any) -> None:
        self._parameter, self._group = weakref.ref(parameter), weakref.ref(group)
        mesh = group.mesh_info
        self.name = str(parameter._param_fqn)
        self.dim = int(parameter.fsdp_placement.dim)
        self.is_replicated = mesh.replicate_mesh_dim is not None
        if mesh.shard_mesh_dim is not None:
            self.group: torch.distributed.ProcessGroup = mesh.shard_process_group

    @property
    def parameter(self) -> torch.Tensor:
        """The sharded parameter, which optimizers hold."""
        return self._known(self._parameter).sharded_param  # type: ignore[no-any-return]

    @property
    def weight(self) -> torch.Tensor:
        """What is gathered of it."""
        return self._known(self._parameter)._unsharded_param  # type: ignore[no-any-return]

    @property
    def root(self) -> Any:
        """An object that all weights of one model have, and no others."""
        return self._known(self._group).comm_ctx

    @property
    def is_reduced(self) -> bool:
        """Whether gradients are sent now; False after `set_requires_gradient_sync(False)`."""
        return bool(self._known(self._group).reduce_grads)

    @property
    def reduce_dtype(self) -> torch.dtype | None:
        """What gradients are sent in, None for their own."""
        return self._known(self._parameter).reduce_dtype  # type: ignore[no-any-return]

    @property
    def divisor(self) -> float:
        """What the sum over processes is divided by."""
        factor = self._known(self._group).gradient_divide_factor
        return float(self.group.size() if factor is None else factor)

    @staticmethod
    def _known(reference: "weakref.ref[Any]") -> Any:
        found = reference()
        if found is None:
            raise RuntimeError("a module that fully_shard was called for is gone")
        return found


def sharding_of(weight: torch.Tensor) -> Sharding | None:
    """For what `fully_shard` gathers for a forward: how it is sharded. Looks at all weights."""
    if not is_distributed():
        return None
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    for reference in list(_module_state_mapping.values()):
        state = reference() if callable(reference) else reference
        if not isinstance(state, FSDPState):
            continue
        groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one at the most
        groups = [state._fsdp_param_group] if groups is None else groups
        for group in (group for group in groups if group is not None):
            for parameter in group.fsdp_params:
                if getattr(parameter, "_unsharded_param", None) is weight:
                    return Sharding(parameter, group)
    return None


def is_of_flat_parameter(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a weight that FullyShardedDataParallel (FSDP1) has put among others."""
    return bool(getattr(tensor._base, "_is_flat_param", False))


def is_sharded(tensor: torch.Tensor | None) -> "TypeGuard[DTensor]":
    """Whether a tensor is a DTensor: processes have parts of it."""
    return isinstance(tensor, _SHARDED)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a DTensor; any other tensor itself."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def with_part(like: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """A DTensor sharded as `like`, with this part here; the part itself where `like` is none.

    In dimensions that are not sharded it may have another size.
    """
    if not is_sharded(like):
        return part
    key = (id(like.device_mesh), like.placements, like.shape, part.shape, part.dtype)
    spec = _specs.get(key)
    if spec is None:
        shape = list(part.shape)
        for placement in like.placements:
            if isinstance(placement, Shard):
                shape[placement.dim] = like.shape[placement.dim]
        stride = torch.empty(shape, device="meta").stride()
        meta = TensorMeta(torch.Size(shape), stride, part.dtype)
        spec = _specs[key] = DTensorSpec(like.device_mesh, like.placements, tensor_meta=meta)
    # `from_local` would make a view of the part.
    return DTensor(part, spec, requires_grad=False)  # type: ignore[no-untyped-call]


# It takes longer to make one than to look it up; each keeps its mesh, whose id is its own then.
_specs: "dict[tuple[Any, ...], DTensorSpec]" = {}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a DTensor, on each process; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


# ---------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------


def is_distributed() -> bool:
    """Whether torch.distributed is there and initialized."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def timeout_of(group: "torch.distributed.ProcessGroup | None") -> timedelta | None:
    """How long its messages wait for other ranks (all ranks by default); None if nobody knows."""
    group = group or torch.distributed.group.WORLD
    try:
        backend = group._get_backend(group._device_types[0])  # type: ignore[union-attr]
        return backend.options._timeout  # type: ignore[no-any-return]
    except (AttributeError, IndexError, RuntimeError):  # not every backend has it
        return None


def reduce_scatter(
    own: torch.Tensor, parts: torch.Tensor, group: "torch.distributed.ProcessGroup"
) -> Any:
    """Start to sum each process's part over processes; a work to wait for."""
    # Torch 2.13 has another name for it, and warns of the one that 2.11 knows.
    known = getattr(torch.distributed, "reduce_scatter_single", None)
    function = known or torch.distributed.reduce_scatter_tensor
    return function(own, parts, group=group, async_op=True)


def backward_pass() -> int:
    """A number for the backward pass that is running in this thread."""
    return int(torch._C._current_graph_task_id())


def after_backward(function: Callable[[], None]) -> None:
    """Call this, on the stream that asked for it, when the backward pass that is running ends."""
    torch.autograd.Variable._execution_engine.queue_callback(function)  # type: ignore[attr-defined]


def active_ddp() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward pass is running."""
    return DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call,no-any-return]


def ignore_in_ddp(model: nn.Module, weights: Iterable[torch.Tensor]) -> None:
    """A DistributedDataParallel that will be made of the model leaves these weights alone.

    Not by `_set_params_and_buffers_to_ignore_for_model`, which marks the weights too: Dynamo's
    DDPOptimizer would then cut no graphs at them.
    """
    own = set(map(id, weights))
    names = {n for n, w in model.named_parameters(remove_duplicate=False) if id(w) in own}
    # DistributedDataParallel asks for ".weight" too, and a compiled module has names of its own.
    names |= {f".{name}" for name in names} | {f"_orig_mod.{name}" for name in names}
    known = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
    model._ddp_params_and_buffers_to_ignore = [*known, *sorted(names)]  # type: ignore[assignment]


def parameters_of_ddp(ddp: DistributedDataParallel) -> list[torch.Tensor]:
    """Whose gradients it exchanges."""
    return list(ddp._module_parameters)


def is_in_ddp(weights: Iterable[torch.Tensor]) -> bool:
    """Whether a DistributedDataParallel that is there exchanges one of these; torch has no list."""
    own = set(map(id, weights))

    def found() -> bool:
        return any(
            not own.isdisjoint(map(id, getattr(ddp, "_module_parameters", ())))
            for ddp in gc.get_objects()
            if issubclass(type(ddp), DistributedDataParallel)
        )

    if found():
        gc.collect()  # one that nobody holds any more
        return found()
    return False


def sends_gradients(ddp: DistributedDataParallel) -> bool:
    """Whether its last forward pass was one that is exchanged, not under `no_sync()`."""
    return bool(ddp.require_forward_param_sync)


def joins(ddp: DistributedDataParallel) -> bool:
    """Whether it runs under `join()`."""
    return bool(ddp._join_config.enable)


# ---------------------------------------------------------------------------------------------


def is_traced() -> bool:
    """Whether structured artifacts are written, for tlparse."""
    return bool(os.environ.get("TORCH_TRACE"))


def trace_artifact(name: str, encoding: str, content: str) -> None:
    """An artifact for tlparse, if TORCH_TRACE is set."""
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=lambda: content,
    )


def fake_mode_of(value: object) -> contextlib.AbstractContextManager[Any]:
    """The fake tensor mode of a node's `meta["val"]`, to compute the values of new nodes in."""
    return detect_fake_mode([value]) or contextlib.nullcontext()


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that is run under it; see `__torch_dispatch__`."""


def is_fake(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no data."""
    return isinstance(tensor, FakeTensor)


def fake_mode() -> contextlib.AbstractContextManager[Any]:
    """Tensors made under this have a shape and no data."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def with_fixed_sizes(tensor: torch.Tensor) -> torch.Tensor:
    """For tracing in place of a tensor whose sizes never change, also with `dynamic=True`."""
    mode = detect_fake_mode()
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def size_hint(size: int | torch.SymInt) -> int:
    """A number for a size that may be symbolic."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 4096 if hint is None else int(hint)


def min_cut(
    module: fx.GraphModule,
    num_fwd_outputs: int,
    static_inputs: Sequence[int],
    *,
    recompute_matmul_inputs: bool,
    in_forward: Sequence[fx.Node] = (),
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """torch's min-cut partition; takes over the joint graph.

    Args:
        recompute_matmul_inputs: matmul inputs may be rebuilt in the backward pass although that
            writes them to memory once more.
        in_forward: nodes that only the backward reads and that the forward has to compute. They
            are outputs of the forward for as long as the cut is made.
    """
    end = num_fwd_outputs + len(in_forward)
    _splice_outputs(module.graph, num_fwd_outputs, num_fwd_outputs, in_forward)
    banned = functorch_config.ban_recompute_materialized_backward and not recompute_matmul_inputs
    with functorch_config.patch(ban_recompute_materialized_backward=banned):
        forward, backward = min_cut_rematerialization_partition(
            module,
            None,
            compiler="inductor",
            num_fwd_outputs=end,
            static_lifetime_input_indices=list(static_inputs),
        )
    _splice_outputs(forward.graph, num_fwd_outputs, end, ())
    forward.recompile()
    return forward, backward


def _splice_outputs(graph: fx.Graph, start: int, stop: int, nodes: Sequence[fx.Node]) -> None:
    """Put these nodes in place of the outputs start:stop."""
    output = graph.output_node()
    values = list(output.args[0])  # type: ignore[arg-type]
    output.args = ([*values[:start], *nodes, *values[stop:]],)
    if "desc" in output.meta:
        descriptors = list(output.meta["desc"])
        dummies = [DummyAOTOutput(idx=i) for i in range(len(nodes))]
        output.meta["desc"] = [*descriptors[:start], *dummies, *descriptors[stop:]]


def replace_saved(graph: fx.Graph, at: int, nodes: Sequence[fx.Node]) -> None:
    """In a forward graph, put these nodes in place of output `at`, which it saves."""
    saved = graph.output_node().args[0][at]  # type: ignore[index,union-attr]
    for node in nodes:
        _copy_check(saved, node)  # type: ignore[arg-type]
    _splice_outputs(graph, at, at + 1, nodes)


def replace_received(placeholder: fx.Node, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """In a backward graph, placeholders for these nodes of the forward, in front of this one."""
    received = []
    for number, node in enumerate(nodes):
        with placeholder.graph.inserting_before(placeholder):
            new = placeholder.graph.placeholder(f"{placeholder.name}_part_{number}")
        new.meta["val"] = node.meta["val"]
        _copy_check(placeholder, new)
        received.append(new)
    return received


def _copy_check(old: fx.Node, new: fx.Node) -> None:
    """Tensors that AOTAutograd saves without a check of their version come last: these as well."""
    unchecked = "saved_tensor_with_no_vc_check"
    if unchecked in old.meta:
        new.meta[unchecked] = old.meta[unchecked]


def trace(function: Callable[..., Any], *args: torch.Tensor) -> fx.GraphModule:
    """The function's aten graph on fake tensors, decomposed as Inductor wants it."""
    with fake_mode_of(args[0]):
        return make_fx(function, decomposition_table=select_decomp_table())(*args)


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------


def uncompiled(model: torch.nn.Module) -> torch.nn.Module:
    """The module that `torch.compile` wrapped, or the module itself."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def call_compiled(
    model: Callable[..., Any],
    backend: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """One call of a model through torch.compile; what the backend raises comes out as it is.

    Dynamo counts what it compiled per function, whatever the backend, and gives up at its limit.
    torch 2.13 can count this call apart; where that is missing, it counts for later ones.
    """
    apart: dict[str, Any] = {"isolate_recompiles": True}
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        apart = {}
    compiled = torch.compile(model, backend=backend, dynamic=False, **apart)
    no_limit = sys.maxsize
    shapes = copy.deepcopy(dict(get_code_state()))
    with torch._dynamo.config.patch(recompile_limit=no_limit, accumulated_recompile_limit=no_limit):
        try:
            return compiled(*args, **kwargs)
        except BackendCompilerFailed as error:
            raise error.inner_exception from None
        finally:  # Dynamo makes sizes dynamic that it has seen to change: these do not count
            get_code_state().clear()
            get_code_state().update(shapes)


class _Partitioner(CustomPartitionerFn):  # type: ignore[misc]
    def __init__(self, partition: Partitioner | None, cache_id: str) -> None:
        self._partition = partition
        self._cache_id = cache_id

    def __call__(
        self, gm: fx.GraphModule, joint_inputs: Sequence[object], **kwargs: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        assert self._partition is not None
        return self._partition(
            gm, kwargs["num_fwd_outputs"], kwargs.get("static_lifetime_input_indices") or ()
        )

    def uuid(self) -> str:
        # Never None: AOTAutogradCache takes that for "no partitioner", and misses changed passes.
        return self._cache_id

    def __reduce__(self) -> tuple[Any, ...]:
        # Inductor pickles its settings into cache keys: the closure would bring every weight along.
        return (_Partitioner, (None, self._cache_id))

    def forget(self) -> None:
        """Let go of the closure."""
        self._partition = None


def inductor_options(mode: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's settings for a mode of torch.compile and options on top of it."""
    if mode is not None and mode not in (modes := list_mode_options()):
        raise ValueError(f"mode={mode!r} must be one of {', '.join(map(repr, modes))}")
    merged = {**(list_mode_options(mode) if mode else {}), **options}
    known = torch._inductor.config.get_config_copy()
    for name in merged:
        if not isinstance(name, str) or name.replace("-", "_") not in known:
            raise ValueError(f"options[{name!r}] is not an option of Inductor")
    if merged.get("custom_partitioner_fn") is not None:
        raise ValueError("options['custom_partitioner_fn'] is taken by the compact backend")
    return merged


def _any_on_cuda(values: Iterable[Any]) -> bool:
    return any(isinstance(value, torch.Tensor) and value.is_cuda for value in values)


def records_cuda_graphs(options: Mapping[str, Any], example_inputs: Iterable[Any]) -> bool:
    """Whether Inductor, with these options, records what it compiles for these inputs."""
    is_on = options.get("triton.cudagraphs", torch._inductor.config.triton.cudagraphs)
    return bool(is_on) and _any_on_cuda(example_inputs)


def compile_graph(
    module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    inner: str,
    options: Mapping[str, Any],
    partition: Partitioner | None = None,
    cache_id: str = "",
    decompose: bool = True,
) -> CompiledFunction:
    """Compile Dynamo's graph, which this takes over.

    partition: called with (joint graph, num_fwd_outputs, static input indices) in place of
        torch's own, after Inductor's passes over the joint graph.
    cache_id: stands for the partition in the keys of Inductor's and AOTAutograd's caches.
    decompose: break operators up as Inductor wants them; without, only for `inner="aot_eager"`.
    """
    partitioner = None if partition is None else _Partitioner(partition, cache_id)
    try:
        if inner == "inductor":
            patches = dict(options)
            if partitioner is not None:
                patches["custom_partitioner_fn"] = partitioner
                if _any_on_cuda(example_inputs):
                    # A buffer kept for the next layer's is there while this one's attention runs;
                    # to ask CUDA's caching allocator again costs nothing.
                    patches.setdefault("allow_buffer_reuse", False)
                    # Below the peak Inductor runs what is small first: it rebuilt q, k and v of
                    # all layers at the beginning, before a peak that it did not foresee.
                    patches.setdefault("reorder_for_peak_memory", False)
            return compile_fx(module, example_inputs, config_patches=patches)  # type: ignore[no-any-return,return-value]

        def run_as_is(graph_module: fx.GraphModule, _: Sequence[Any]) -> CompiledFunction:
            graph_module.graph.set_codegen(_BoxedCodeGen())  # frees each input after its last use
            graph_module.recompile()

            def run(args: list[Any]) -> Any:
                return graph_module.forward(args)

            run._boxed_call = True  # type: ignore[attr-defined]
            return run

        # Dynamo's DDPOptimizer looks at this to know that the graph goes through AOTAutograd.
        counters["aot_autograd"]["total"] += 1
        return aot_module_simplified(  # type: ignore[no-any-return]
            module,
            example_inputs,
            fw_compiler=run_as_is,  # type: ignore[arg-type]
            bw_compiler=run_as_is,  # type: ignore[arg-type]
            partition_fn=partitioner or min_cut_rematerialization_partition,
            decompositions=select_decomp_table() if decompose else {},
            keep_inference_input_mutations=True,
        )
    finally:  # torch 2.11 keeps it with the compiled code, and its closure all weights and a batch
        if partitioner is not None:
            partitioner.forget()


def compile_function(
    function: Callable[..., Result], *examples: torch.Tensor
) -> Callable[..., Result]:
    """A function of tensors through Inductor, without Dynamo and its limit of recompilations."""
    with torch.no_grad():
        graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")
        compiled = compile_fx(graph(*examples), list(examples))

    def run(*values: torch.Tensor) -> Result:
        with torch.no_grad():
            return compiled(*values)  # type: ignore[operator,arg-type,return-value]

    return run


@contextlib.contextmanager
def cold_joint_graph() -> Iterator[None]:
    """AOTAutograd traces the joint graph and calls the partitioner even if its cache is warm."""
    with functorch_config.patch(enable_autograd_cache=False):
        yield
