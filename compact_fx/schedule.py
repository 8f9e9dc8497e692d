"""When projections change: each weight counts the optimizer steps that it has seen."""

import functools
import weakref
from collections.abc import Iterable, MutableMapping, Sequence
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
    global _changes
    _changes += 1
    for group in optimizer.param_groups:
        for weight in group["params"]:
            if weight in _steps:
                _steps[weight] += 1


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


def are_alive(references: Sequence["weakref.ref[Tensor]"], tensors: Sequence[Tensor]) -> bool:
    """Whether the references are to these very tensors."""
    return all(reference() is tensor for reference, tensor in zip(references, tensors, strict=True))


class KeySchedule:
    """The key inputs of one compiled graph: one 0-d int64 tensor for each of its projections.

    New tensors, never new values in old ones: a backward pass that is still to come keeps the keys
    of its own forward pass.

    Attributes:
        values: the keys as numbers, as of the last call of `keys`.
    """

    def __init__(self, plan: Plan, seed: int, update_interval: int) -> None:
        self._salts = tuple(projection.salt for projection in plan.projections)
        self._seed = seed
        self._update_interval = update_interval
        self._seen: tuple[int, list[weakref.ref[Tensor]]] = (-1, [])
        self._generations: tuple[int, ...] | None = None
        self._keys: tuple[Tensor, ...] = ()
        self.values: list[int] = []

    def keys(self, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The keys for this step, given for each projection a weight that uses it."""
        if self._keys and _torch.in_backward():
            return self._keys  # a checkpoint recomputes: it needs the keys of its forward
        if self._seen[0] == _changes and are_alive(self._seen[1], weights):
            return self._keys
        self._seen = (_changes, [weakref.ref(weight) for weight in weights])
        generations = tuple(steps_of(weight) // self._update_interval for weight in weights)
        if generations != self._generations:
            device = weights[0].device
            self.values = [
                fold_in(self._seed, salt, generation)
                for salt, generation in zip(self._salts, generations, strict=True)
            ]
            # One copy to the device; clones, since a view of a vector is not 16-byte aligned.
            stacked = torch.tensor(self.values, dtype=torch.int64).to(device)
            self._keys = tuple(key.clone() for key in stacked.unbind())
            self._generations = generations
        return self._keys
