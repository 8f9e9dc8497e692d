"""Store what crosses the forward-backward boundary in 8 bits, and masks in single ones."""

import functools
import operator
from collections import Counter
from collections.abc import Callable, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor, fx

from compact_fx import _torch
from compact_fx.passes.nodes import (
    PRODUCT_NAMES,
    bytes_of,
    elements_of,
    finish,
    gradient_nodes,
    inline,
    insert,
    is_relabelling,
    is_tensor,
    is_view,
    operator_base,
    storage_of,
)
from compact_fx.passes.partition import Partition
from compact_fx.plan import LowBit, Saved

aten = torch.ops.aten

GROUPS = (128, 64, 32)  # how many neighbours in the last dimension share a scale
SMALLEST = 2**13  # elements; less is not worth a kernel
MANY = 32  # values that a statistic is at least made of
_TINY = torch.finfo(torch.float32).tiny  # in place of a largest value of 0
_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0**2, torch.float8_e4m3fn: 448.0}

# Operators whose result is a little off where their input is.
_BOUNDED = {"sigmoid", "tanh", "erf"}
_SMOOTH = {"mul", "add", "neg", "where"} | _BOUNDED
_CONSTANT = {"full", "full_like", "scalar_tensor", "ones_like"}
_MOVING = {"slice", "select", "cat", "split", "split_with_sizes", "_unsafe_index"}
_SUMMING = {"sum", "mean"} | PRODUCT_NAMES - {"convolution_backward"}
_OF_ATTENTION = {"query", "key", "value", "out", "output"}
_REDUCING = {"sum", "mean", "amax", "amin", "max", "min", "var_mean", "var", "logsumexp", "prod"}


def store_low_bit(halves: Partition, kind: LowBit, share: float = 1.0) -> Partition:
    """Let large values cross in 8 bits, with a scale for each group of neighbours.

    ::

        forward(...) -> loss, x               backward(x, dy) -> dx

        forward(...) -> loss, q, s            q = ± round(√|x / s|), s = max |x| / 127² of a group
        backward(q, s, dy) -> dx              of x' = q |q| s

    Inductor makes q in the kernel that makes x, and x' in those that read it. The loss is exact;
    x' is off by up to √|x m| / 127 beside a largest m (int8: levels lie closer where most values
    are, so that one large value leaves its neighbours theirs), or 1/16 of each (fp8: e4m3).

    Left as they are: statistics, what the forward gets or returns, what is small, and what the
    backward reads by an operator that makes more of a rounding: an exponential, a comparison, a
    division by it, a difference in which it may cancel, an index, one that is not known here; also
    where such an operator reads what a matmul makes of it.

    Args:
        halves: taken over.
        share: of the bytes of large values, how much crosses in 8 bits at least: the largest first.
    """
    _cross_once(halves)
    inputs = halves.forward.graph.find_nodes(op="placeholder")
    alive = {storage_of(node) for node in (*halves.results, *inputs) if is_tensor(node)}
    crossing = list(halves.crossing())
    shared = Counter(storage_of(kept) for _, kept, _ in crossing)
    gradients = gradient_nodes(halves.backward.graph)
    packings: dict[fx.Node, tuple[Pack, Unpack]] = {}
    for _, kept, received in crossing:
        storage = storage_of(kept)
        if storage in alive or shared[storage] > 1 or not received.users or not _is_large(kept):
            continue
        packing = _packing_of(kept, kind)
        if packing is not None and (
            _is_mask(kept) or (not _is_statistic(kept) and _stands_rounding(received, gradients))
        ):
            packings[kept] = packing
    left = _beyond([kept for kept in packings if not _is_mask(kept)], share)
    packed: dict[int, tuple[int, Saved]] = {}
    for at, kept, received in reversed(crossing):  # those before it keep their positions
        if kept not in packings or kept in left:
            continue
        storage, packing = storage_of(kept), packings[kept]
        whole = halves.saved_by_storage[storage]
        for part in _pack(halves, at, kept, received, *packing):
            shape, dtype = str(tuple(part.meta["val"].shape)), str(part.meta["val"].dtype)
            described = replace(
                whole, shape=shape, dtype=dtype.removeprefix("torch."), bytes=bytes_of(part)
            )
            packed[storage_of(part)] = (storage, described)
    finish(halves.forward)
    finish(halves.backward)
    return replace(halves, packed=packed)


def quantize(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """Values in 8 bits (..., groups, group), and a float32 scale for each group (..., groups, 1).

    What is not finite makes its group NaN.
    """
    groups = torch.unflatten(x, -1, (-1, group)).float()
    scale = groups.abs().amax(-1, keepdim=True) / _LARGEST[dtype]
    # A division and a root for each value would take longer than reading and writing it.
    scaled = groups * scale.clamp_min(_TINY).reciprocal()
    if dtype is torch.int8:
        scaled = (scaled * (scaled.abs() + _TINY).rsqrt()).round()
    return scaled.to(dtype), scale


def dequantize(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantize` was given, rounded."""
    scaled = values.float()
    if values.dtype is torch.int8:
        scaled = scaled * scaled.abs()
    return (scaled * scale).to(dtype).flatten(-2)


def to_bits(mask: Tensor) -> Tensor:
    """Eight booleans of the last dimension in a byte (..., n / 8), uint8."""
    places = torch.arange(8, device=mask.device, dtype=torch.int32)
    bits: Tensor = torch.unflatten(mask, -1, (-1, 8)).to(torch.int32) << places
    return bits.sum(-1, dtype=torch.int32).to(torch.uint8)


def from_bits(packed: Tensor) -> Tensor:
    """What `to_bits` was given."""
    places = torch.arange(8, device=packed.device, dtype=torch.int32)
    return ((packed.to(torch.int32)[..., None] >> places) & 1).to(torch.bool).flatten(-2)


# --- writing it into the graphs ------------------------------------------------------------------


def _is_large(kept: fx.Node) -> bool:
    value, elements = kept.meta["val"], elements_of(kept)
    has_own_memory = bytes_of(kept) >= elements * value.element_size()  # is not expanded
    return elements >= SMALLEST and isinstance(value.shape[-1], int) and has_own_memory


def _is_mask(kept: fx.Node) -> bool:
    return kept.meta["val"].dtype is torch.bool


def _beyond(values: Sequence[fx.Node], share: float) -> set[fx.Node]:
    """Those that are not needed to reach this share of their bytes.

    The largest are, and of equal ones the first: they are there longest.
    """
    allowed = (1.0 - share) * sum(map(bytes_of, values))
    left = set()
    for value in sorted(sorted(values, reverse=True), key=bytes_of):
        allowed -= bytes_of(value)
        if allowed < 0:
            break
        left.add(value)
    return left


def _has_long_rows(kept: fx.Node) -> bool:
    last = kept.meta["val"].shape[-1]
    return isinstance(last, int) and last >= GROUPS[-1]


Pack = Callable[[Tensor], object]
Unpack = Callable[..., Tensor]


def _packing_of(kept: fx.Node, kind: LowBit) -> tuple[Pack, Unpack] | None:
    """How to store a value, and how to get it back."""
    value = kept.meta["val"]
    last = value.shape[-1]
    if _is_mask(kept):
        return (to_bits, from_bits) if last % 8 == 0 else None
    is_float = value.dtype in (torch.bfloat16, torch.float16, torch.float32)
    if not (is_float and _has_long_rows(kept)):
        return None
    group = next((g for g in GROUPS if last % g == 0), last)
    pack = functools.partial(quantize, dtype=_DTYPES[kind], group=group)
    return pack, functools.partial(dequantize, dtype=value.dtype)


def _pack(
    halves: Partition,
    at: int,
    kept: fx.Node,
    received: fx.Node,
    pack: Pack,
    unpack: Unpack,
) -> list[fx.Node]:
    """Put packed parts in place of output `at` of the forward and of what the backward receives."""
    forward, backward = halves.forward.graph, halves.backward.graph
    with forward.inserting_before(kept.next):
        parts = inline(forward, pack, kept)
    _torch.replace_saved(forward, at, parts)
    arriving = _torch.replace_received(received, parts)
    with backward.inserting_before(min(received.users)):
        (restored,) = inline(backward, unpack, *arriving)
    received.replace_all_uses_with(restored)
    backward.erase_node(received)
    return parts


def _cross_once(halves: Partition) -> None:
    """Where views of a tensor cross, let the tensor itself, and the backward make the views.

    A kernel that packs rows then reads them as they are in memory.
    """
    groups: dict[fx.Node, list[tuple[int, fx.Node, list[fx.Node]]]] = {}
    for at, kept, received in halves.crossing():
        whole, views = kept, []
        while is_view(whole):
            views += [whole] if whole.target is not aten.alias.default else []
            whole = whole.args[0]  # type: ignore[assignment]
        groups.setdefault(whole, []).append((at, received, views[::-1]))
    dropped = []
    graph = halves.backward.graph
    for whole, members in groups.items():
        base = next((received for _, received, views in members if not views), None)
        used = [member for member in members if member[1].users]
        place = None  # of the tensor, where only views of it have crossed
        if base is None and used and whole.op == "call_function" and _has_long_rows(whole):
            place, received, _ = used[0]
            _torch.replace_saved(halves.forward.graph, place, [whole])
            (base,) = _torch.replace_received(received, [whole])
        for at, received, views in used:
            if base is None or received is base:
                continue
            view = base
            with graph.inserting_before(min(received.users)):
                for node in views:
                    args = (view, *node.args[1:])
                    view = insert(graph, node.target, args, like=node, name=node.name)  # type: ignore[arg-type]
            received.replace_all_uses_with(view)
            graph.erase_node(received)
            dropped += [at] if at != place else []
    for at in sorted(dropped, reverse=True):
        _torch.replace_saved(halves.forward.graph, at, [])


# --- what stands a rounding ----------------------------------------------------------------------


def _stands_rounding(node: fx.Node, gradients: Set[fx.Node], is_derived: bool = False) -> bool:
    """Whether all that a backward graph makes of a value is about right where the value is.

    is_derived: it is not what was stored, but made of it.
    """
    return all(_reads_smoothly(user, node, gradients, is_derived) for user in node.users)


def _reads_smoothly(
    user: fx.Node, node: fx.Node, gradients: Set[fx.Node], is_derived: bool
) -> bool:
    if user.op != "call_function":
        return is_derived
    if node in user.kwargs.values():  # such as an attention mask
        return False
    name, first = operator_base(user), user.args[0] if user.args else None
    if is_relabelling(user) or (name in _MOVING and _is_data_of(node, user)):
        is_cast = is_tensor(user) and not user.meta["val"].dtype.is_floating_point
        return not is_cast and _stands_rounding(user, gradients, is_derived)
    if name in _SUMMING:
        stands = True
    elif "attention" in name:
        schema = getattr(user.target, "_schema", None)  # FlexAttention has none
        arguments = zip(schema.arguments, user.args, strict=False) if schema else ()
        read = [argument.name for argument, value in arguments if value is node]
        stands = bool(read) and _OF_ATTENTION.issuperset(read)
    elif name in ("sub", "rsub"):
        stands = _does_not_cancel(user, node)
    elif name == "exp":
        stands = _is_of_sigmoid(user) or _is_bell(user)
    elif name == "pow":
        stands = first is node and user.args[1] in (1, 2, 3)
    elif name in ("div", "reciprocal"):
        stands = (first is node and name == "div") or _is_of_sigmoid(node)
    else:
        is_condition = name == "where" and first is node
        stands = name in _SMOOTH and not (is_condition or user.kwargs)  # alpha=-1 is a difference
    return stands and (user in gradients or _stands_rounding(user, gradients, True))


def _does_not_cancel(difference: fx.Node, node: fx.Node) -> bool:
    """Whether a difference is about right where one of its sides, this node, is.

    That from a mean is, unless it is far smaller than the mean; 1 - tanh(x) is of an x that is
    about right, and not of a tanh(x) that is.
    """
    others = [side for side in difference.args[:2] if side is not node]
    if len(others) != 1 or difference.kwargs:
        return False
    (other,) = others
    if not isinstance(other, fx.Node) or operator_base(other) in _CONSTANT:
        return _is_of_bounded(node)
    return is_tensor(other) and elements_of(node) >= MANY * elements_of(other)


def _is_of_bounded(node: object) -> bool:
    """Whether a value is made of a sigmoid, tanh or erf that the backward makes itself."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    name, arguments = operator_base(node), node.args
    if name in ("reciprocal", "div"):
        return isinstance(arguments[-1], fx.Node) and _is_of_sigmoid(arguments[-1])
    if name == "pow" or is_relabelling(node):
        return _is_of_bounded(arguments[0])
    if name == "mul":
        factors = [side for side in arguments[:2] if isinstance(side, fx.Node)]
        return all(map(_is_of_bounded, factors))
    return name in _BOUNDED


def _is_data_of(node: fx.Node, user: fx.Node) -> bool:
    """Whether an operator that moves values moves those of this node: it is no index."""
    first = user.args[0]
    return first is node or (isinstance(first, list | tuple) and node in first)


def _is_of_sigmoid(node: fx.Node) -> bool:
    """Whether a node is exp(x) or 1 + exp(x), of which only 1 / (1 + exp(x)) is made."""
    if operator_base(node) == "add":
        exponential, one = node.args[:2]
        is_sum = isinstance(exponential, fx.Node) and _is_of_sigmoid(exponential)
        return is_sum and bool(one == 1)
    if operator_base(node) != "exp":
        return False
    return all(operator_base(user) == "add" and user.args[1] == 1 for user in node.users)


def _is_bell(node: fx.Node) -> bool:
    """Whether a node is exp(-c x²), as in GELU's derivative."""
    argument = node.args[0]
    if not isinstance(argument, fx.Node) or operator_base(argument) != "mul":
        return False
    square, factor = argument.args[:2]
    if not isinstance(factor, int | float) or factor > 0 or not isinstance(square, fx.Node):
        return False
    if operator_base(square) == "pow":
        return bool(square.args[1] == 2)
    return operator_base(square) == "mul" and square.args[0] is square.args[1]


def _is_statistic(node: fx.Node) -> bool:
    """Whether a value is made, entry for entry, of sums over many others: a mean, a log-sum-exp."""
    size = elements_of(node)
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        name = operator_base(node)
        if node.op != "call_function" or name in PRODUCT_NAMES:
            continue
        if node.target is operator.getitem and not name.startswith("split"):
            if node.args[1] != 0 or name in _REDUCING:
                return True
            continue
        sources = {n for n in node.all_input_nodes if is_tensor(n)} - seen
        if name in _REDUCING:
            if any(elements_of(n) >= MANY * size for n in sources):
                return True
            continue
        alike = {n for n in sources if elements_of(n) == size}
        seen |= alike
        pending += alike
    return False
