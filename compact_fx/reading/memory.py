"""How many bytes are alive in a training step: of all its graphs together, and of an eager run."""

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from compact_fx import _torch
from compact_fx.passes.live_bytes import GraphMemory, Moment, Phase


@dataclass(frozen=True, kw_only=True)
class Breakdown:
    """The memory of one way to train, in bytes.

    Attributes:
        weights: parameters and buffers.
        gradients: of all parameters, as they are when backward is over.
        optimizer: its states.
        saved: what the forward keeps for the backward.
        other: what the peak has beyond weights, states and the larger of saved and gradients:
            inputs, and what operators are working on.
        peak: the most that is alive at one time.
        timeline: live bytes over one step, weights and states included.
    """

    weights: int
    gradients: int
    optimizer: int
    saved: int
    other: int
    peak: int
    timeline: tuple[Moment, ...]


def size_unit(most: float) -> tuple[float, str]:
    """GB (10⁹ bytes), or MB where the largest of all sizes is less than one."""
    return (1e9, "GB") if most >= 1e9 else (1e6, "MB")


def step_timeline(graphs: Sequence[GraphMemory], between: Sequence[Moment] = ()) -> list[Moment]:
    """The forward passes of all graphs in order, then their backward passes in reverse.

    between: what runs between the two: the loss, if it is not part of a graph.
    """
    moments: list[Moment] = []
    base = gradients = 0
    for graph in graphs:
        moments += _above(base, graph.forward)
        base += graph.held
    moments += _above(base, between)
    for graph in reversed(graphs):
        base -= graph.held
        moments += _above(base + gradients, graph.backward, gradients)
        gradients += graph.gradients
    return moments


def _above(base: int, moments: Iterable[Moment], gradients: int = 0) -> list[Moment]:
    return [replace(m, bytes=base + m.bytes, gradients=gradients + m.gradients) for m in moments]


class LiveMemory(_torch.DispatchMode):
    """Records the live bytes at each operator that is run eagerly under it, fake tensors too.

    Attributes:
        moments: so far; `phase` is that of the next.
    """

    def __init__(self, lasting: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase: Phase = "forward"
        self.moments: list[Moment] = []
        self._live = 0
        self._known = WeakIdKeyDictionary()
        for tensor in lasting:
            self._known[tensor.untyped_storage()] = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in _torch.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        self.moments.append(Moment(self.phase, str(func).split(".", 1)[1], self._live))
        return result

    def _track(self, storage: Any) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            self._live += size
            weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self._live -= size
