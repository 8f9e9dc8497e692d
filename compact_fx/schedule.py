"""When projections change: each weight counts the optimizer steps that it has seen."""

import functools
import weakref
from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from compact_fx import _torch
from compact_fx.plan import Plan
from compact_fx.projections import fold_in

_steps: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
_changes = 0  # how often any of these numbers has changed


@functools.cache
def _count_optimizer_steps() -> None:
    register_optimizer_step_post_hook(_on_step)


def _on_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not getattr(optimizer, "_step_in_backward", False):  # those count each weight themselves
        count_step(weight for group in optimizer.param_groups for weight in group["params"])


def count_step(weights: Iterable[Tensor]) -> None:
    """An optimizer has stepped these weights."""
    global _changes
    _changes += 1
    for weight in weights:
        if weight in _steps:
            _steps[weight] += 1


def counted_steps(weight: Tensor) -> int | None:
    """As `steps_of`, None for a weight that was never asked for."""
    return _steps.get(weight)


def steps_of(weight: Tensor) -> int:
    """Optimizer steps that this weight has seen since it was first asked for."""
    _count_optimizer_steps()
    return _steps.setdefault(weight, 0)


def set_steps(weights: Iterable[Tensor], steps: int) -> None:
    """Resume a run with dense gradients: the weights have seen this many optimizer steps.

    Which projection a weight has depends on that number. `CompactAdamW` keeps it in its state;
    other optimizers do not know of it, so say it after loading a checkpoint.

    Args:
        weights: such as `model.parameters()`.
        steps: of the optimizer, ≥ 0.

    Raises:
        ValueError: steps below 0.
    """
    global _changes
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r} must be an int ≥ 0")
    _changes += 1
    _count_optimizer_steps()
    for weight in weights:
        _steps[weight] = steps


@dataclass(frozen=True, eq=False)
class Drawn:
    """What one call of a compiled graph draws its projections from.

    Attributes:
        sources: for each projection its key, a 0-d int64 tensor, or its table.
        values: the keys as numbers.
    """

    sources: tuple[Tensor, ...]
    values: tuple[int, ...]


class KeySchedule:
    """The keys of one compiled graph's projections, or what they are drawn to beforehand.

    New tensors, never new values in old ones: a backward pass that is still to come keeps the keys
    of its own forward pass. Equal blocks share a graph, so each set of weights has its own.
    """

    def __init__(self, plan: Plan, seed: int, update_interval: int) -> None:
        self._projections = plan.projections
        self._seed = seed
        self._update_interval = update_interval
        # By ids of weights: the weights, when they were last looked at, their generations, keys.
        self._last: dict[tuple[int, ...], _Entry] = {}

    def keys(self, weights: Sequence[Tensor]) -> Drawn:
        """The keys for this step, given for each projection a weight that uses it."""
        ids = tuple(map(id, weights))
        entry = self._last.get(ids)
        if entry is not None and not entry.is_of(weights):
            entry = None
        # In a backward pass a checkpoint recomputes: it needs the keys of its forward.
        if entry is not None and (entry.changes == _changes or _torch.in_backward()):
            return entry.drawn
        changes = _changes
        generations = tuple(steps_of(weight) // self._update_interval for weight in weights)
        if entry is not None and entry.generations == generations:
            drawn = entry.drawn
        else:
            drawn = self._draw(generations, weights[0].device)
        if entry is None:  # a new set of weights: forget those that are gone
            self._last = {k: e for k, e in self._last.items() if e.is_alive()}
        references = [weakref.ref(weight) for weight in weights]
        if not _torch.in_backward():  # a reentrant checkpoint has no other forward
            self._last[ids] = _Entry(references, changes, generations, drawn)
        return drawn

    def _draw(self, generations: Sequence[int], device: torch.device) -> Drawn:
        values = tuple(
            fold_in(self._seed, projection.salt, generation)
            for projection, generation in zip(self._projections, generations, strict=True)
        )
        pairs = zip(self._projections, values, strict=True)
        return Drawn(tuple(p.source_of(key, device) for p, key in pairs), values)


@dataclass(frozen=True)
class _Entry:
    references: list["weakref.ref[Tensor]"]
    changes: int
    generations: tuple[int, ...]
    drawn: Drawn

    def is_alive(self) -> bool:
        return all(reference() is not None for reference in self.references)

    def is_of(self, weights: Sequence[Tensor]) -> bool:
        return all(r() is w for r, w in zip(self.references, weights, strict=True))
