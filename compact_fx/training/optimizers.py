"""Optimizers that step sketched gradients in the space of their factors."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from compact_fx.training.moments import SIGNS, Refresh
from compact_fx.training.stand_ins import CompactOptimizer, Rule, StateDtype

_RULES: dict[type[torch.optim.Optimizer], Rule] = {
    torch.optim.AdamW: Rule(decoupled=True, is_elementwise=True),
    torch.optim.Adafactor: Rule(decoupled=True, is_relative=True),
    torch.optim.Adam: Rule(decoupled=False, is_elementwise=True),
    torch.optim.SGD: Rule(decoupled=False, is_elementwise=True, is_normalized=False),
    torch.optim.RMSprop: Rule(decoupled=False, is_elementwise=True),
}


class CompactAdamW(CompactOptimizer, torch.optim.AdamW):
    """AdamW whose moments live in the space of the factors (paper, Algorithm 3).

    Weights with dense gradients get exactly torch.optim.AdamW. `scale`, `dense_scale`, `refresh`,
    `state_dtype` and `step_in_backward` are those of `compact_optimizer`; all other arguments are
    those of torch.optim.AdamW.
    """

    _rule = _RULES[torch.optim.AdamW]

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        scale: float = 1.0,
        dense_scale: float = 1.0,
        refresh: Refresh = "keep",
        state_dtype: StateDtype = None,
        step_in_backward: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, **kwargs)
        settings = {"state_dtype": state_dtype, "step_in_backward": step_in_backward}
        self._set_up(scale, dense_scale, refresh, **settings)


def _unhooked_step(optimizer_class: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The class's step without its hooks: the compact optimizer's own step runs them."""
    step: Callable[..., Any] = optimizer_class.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


CompactAdamW._inner_step = staticmethod(_unhooked_step(torch.optim.AdamW))  # type: ignore[assignment]


def compact_optimizer(
    optimizer_class: type[torch.optim.Optimizer],
    params: Iterable[Any],
    *,
    scale: float = 1.0,
    dense_scale: float = 1.0,
    refresh: Refresh = "keep",
    state_dtype: StateDtype = None,
    step_in_backward: bool = False,
    decoupled_weight_decay: bool | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Any optimizer, stepping the factors of sketched gradients.

    Args:
        optimizer_class: its update of a tensor may depend on its gradients and state, and on the
            tensor itself only through weight decay; this is tried out.
        params: parameters, or groups; a group may have its own `scale` and `dense_scale`.
        scale: α of the paper, multiplies the update of sketched weights.
        dense_scale: multiplies the learning rate of weights with dense gradients (α_out).
        refresh: moments when a projection changes: "keep" (paper), "project" (what is linear in
            the gradient goes through both projections), "reset".
        state_dtype: of the moments of sketched weights; the gradient's by default. "fp8" keeps the
            moments of all weights in 8 bits, if they have 4096 elements or more, and else in
            float32: floats with a scale for 256 neighbours, rounded up or down at random. A small
            transformer had a loss of 2.140 after 400 steps (float32: 2.139, two seeds).
        step_in_backward: update each weight as soon as its gradient is there and free the gradient;
            accumulation, clipping and scaling raise then.
        decoupled_weight_decay: goes to the class where it has this setting; otherwise says what
            its weight decay is, for others than AdamW, Adafactor, Adam, SGD and RMSprop.
        kwargs: of the class.

    Raises:
        TypeError, ValueError: a class or a setting that cannot be.
    """
    if not (
        isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)
    ):
        raise TypeError(
            f"optimizer_class={optimizer_class!r} must be a class of optimizers, such as "
            "torch.optim.SGD"
        )
    rule = _RULES.get(optimizer_class, Rule(decoupled=decoupled_weight_decay))
    if "decoupled_weight_decay" in inspect.signature(optimizer_class).parameters:
        if decoupled_weight_decay is not None:
            kwargs["decoupled_weight_decay"] = decoupled_weight_decay
    elif decoupled_weight_decay is not None:
        rule = replace(rule, decoupled=decoupled_weight_decay)
    if state_dtype == "fp8":
        _check_moments(optimizer_class, kwargs)
    if not rule.is_relative:
        rule = replace(rule, is_normalized=_check_updates(optimizer_class, kwargs))
    optimizer: CompactOptimizer = _compact_class(optimizer_class, rule)(params, **kwargs)  # type: ignore[arg-type]
    settings = {"state_dtype": state_dtype, "step_in_backward": step_in_backward}
    optimizer._set_up(scale, dense_scale, refresh, **settings)
    return optimizer


@functools.cache
def _compact_class(optimizer_class: type[torch.optim.Optimizer], rule: Rule) -> Any:
    def __reduce_ex__(self: CompactOptimizer, protocol: Any) -> Any:
        return _bare, (optimizer_class, rule), self.__getstate__()

    members = {
        "_inner_step": staticmethod(_unhooked_step(optimizer_class)),
        "_rule": rule,
        "__reduce_ex__": __reduce_ex__,  # no module has the class by its name
    }
    name = f"Compact{optimizer_class.__name__}"
    return type(name, (CompactOptimizer, optimizer_class), members)


def _bare(optimizer_class: type[torch.optim.Optimizer], rule: Rule) -> Any:
    """For copies and pickles: an optimizer that gets its state next."""
    compact_class = _compact_class(optimizer_class, rule)  # type: ignore[arg-type]
    return compact_class.__new__(compact_class)


def _check_updates(optimizer_class: type[torch.optim.Optimizer], kwargs: Mapping[str, Any]) -> bool:
    """Step two small weights of different values with the same gradients, and one with larger ones.

    Returns:
        Whether the larger ones make no larger updates.

    Raises:
        TypeError: their updates differ, so that a stand-in would get a wrong one; or the state
            does not begin empty.
    """
    name = optimizer_class.__name__
    changes = []
    for value, size in ((0.0, 1.0), (1.0, 1.0), (0.0, 16.0)):
        weight, _ = _steps_of_trial(optimizer_class, kwargs, value, size)
        changes.append(weight.detach() - value)
    if not torch.allclose(changes[0], changes[1], rtol=1e-6, atol=1e-12):
        raise TypeError(
            f"{name} cannot step factors: its update depends on the weight itself, which a factor "
            "does not have"
        )
    return torch.allclose(changes[0], changes[2], rtol=1e-3)


def _check_moments(optimizer_class: type[torch.optim.Optimizer], kwargs: Mapping[str, Any]) -> None:
    """Raise where a class keeps what nobody knows how to store in 8 bits."""
    _, state = _steps_of_trial(optimizer_class, kwargs, 1.0, 1.0)
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dim() and name not in SIGNS:
            raise TypeError(
                f'{optimizer_class.__name__} cannot be used with state_dtype="fp8": it keeps '
                f"{name!r}, of which 8 bits may be too few; known are {', '.join(SIGNS)}"
            )


def _steps_of_trial(
    optimizer_class: type[torch.optim.Optimizer],
    kwargs: Mapping[str, Any],
    value: float,
    size: float,
) -> tuple[Tensor, dict[str, Any]]:
    """A small weight of this value after three steps with gradients of this size, and its state."""
    name = optimizer_class.__name__
    settings = {k: v for k, v in kwargs.items() if k not in ("fused", "foreach", "capturable")}
    weight = torch.nn.Parameter(torch.full((8, 8), value, dtype=torch.float64))
    optimizer = optimizer_class([weight], **settings)
    if optimizer.state:
        raise TypeError(f"{name} has a state before its first step, which no factor would get")
    for group in optimizer.param_groups:
        group.update({"weight_decay": 0.0} if "weight_decay" in group else {})
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        weight.grad = size * torch.randn(8, 8, dtype=torch.float64, generator=generator)
        try:
            optimizer.step()
        except TypeError as error:
            raise TypeError(f"{name} cannot step a weight by its gradient: {error}") from error
    return weight, optimizer.state[weight]
