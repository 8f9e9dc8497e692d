"""Optimizers that step sketched gradients in the space of their factors (paper, Algorithm 3)."""

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from compact_fx.projections import KINDS, Projection
from compact_fx.proxies import call_after_sketched_grad
from compact_fx.schedule import count_step, counted_steps, set_steps, steps_of
from compact_fx.sketched_grad import Basis, ConsumedGrad, SketchedGrad

Refresh = Literal["keep", "project", "reset"]
REFRESHES: tuple[Refresh, ...] = ("keep", "project", "reset")

# One int64 tensor in a weight's state says what its moments are expressed in, and how many steps
# the weight has seen. A tensor, since distributed checkpoints load plain numbers to another place.
_BASIS = "basis"
_STEPS = "projection_steps"  # of a weight whose state is that of a dense one
_NUMBERS = ("key", "salt", "in_features", "rank", "kind", "in_dim", "steps")


class CompactOptimizer(torch.optim.Optimizer):
    """What turns an optimizer class into one that steps factors; use it through a subclass.

    Each weight with a `SketchedGrad` is replaced, for the inner step, by a stand-in: zeros of the
    factor's shape whose gradient is the factor. The inner optimizer keeps its state for it and
    writes its update into it; the weight then becomes
    `(1 - lr · weight_decay) · W + scale · update Pᵀ`, in one matmul. Dense weights are stepped as
    they are.
    """

    _inner_step: Callable[[torch.optim.Optimizer], Any]
    _decoupled: bool | None
    _refresh: Refresh
    _state_dtype: torch.dtype | None
    _step_in_backward: bool

    def _set_up(
        self,
        scale: float,
        dense_scale: float,
        refresh: Refresh,
        state_dtype: torch.dtype | None,
        step_in_backward: bool,
    ) -> None:
        if refresh not in REFRESHES:
            raise ValueError(
                f"refresh={refresh!r} must be one of {', '.join(map(repr, REFRESHES))}"
            )
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype={state_dtype} must be a floating-point type")
        self._refresh, self._state_dtype = refresh, state_dtype
        self._step_in_backward = step_in_backward
        self.defaults.update(scale=scale, dense_scale=dense_scale)
        for group in self.param_groups:
            self._set_up_group(group)

    def _set_up_group(self, group: dict[str, Any]) -> None:
        for name in ("scale", "dense_scale"):
            if not group.setdefault(name, self.defaults[name]) > 0:
                raise ValueError(f"{name}={group[name]!r} must be > 0")
        if self._decoupled is None and group.get("weight_decay"):
            raise ValueError(
                f"weight_decay={group['weight_decay']}: it is not known whether that of "
                f"{type(self).__name__} is decoupled; pass decoupled_weight_decay=True or False"
            )
        if self._step_in_backward:
            for weight in group["params"]:
                self._step_after_backward(weight)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer; a group may have its own `scale` and `dense_scale`."""
        super().add_param_group(param_group)
        if "scale" in self.defaults:  # torch also calls this before there are defaults of ours
            self._set_up_group(self.param_groups[-1])

    # --- one step --------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; see the class.

        Raises:
            ValueError: a weight's state is of another rank or kind than its gradient. Nothing has
                been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._step_in_backward:
            for group in self.param_groups:
                for weight in group["params"]:
                    if isinstance(weight.grad, ConsumedGrad):
                        weight.grad = None
        self._step(self.param_groups)
        return loss

    @torch.no_grad()
    def _step(self, groups: Sequence[dict[str, Any]]) -> None:
        sketched = {
            weight: weight.grad
            for group in groups
            for weight in group["params"]
            if self._is_sketched(weight)
        }
        for weight, gradient in sketched.items():
            self._check_state(weight, gradient.basis)
        inner_groups: list[dict[str, Any]] = []
        steps: list[tuple[Tensor, Tensor, SketchedGrad, dict[str, Any]]] = []
        outer_groups = self.param_groups
        try:
            self._fill(groups, sketched, inner_groups, steps)
            self.param_groups = inner_groups
            self._inner_step(self)
        finally:
            self.param_groups = outer_groups
            for weight, stand_in, gradient, _ in steps:
                self._take_back_state(weight, stand_in, gradient.basis)
        drawn: tuple[Basis, torch.dtype, Tensor] | None = None
        for weight, stand_in, gradient, group in steps:
            wanted = (gradient.basis, weight.dtype)
            if drawn is None or drawn[:2] != wanted:  # q, k and v come one after the other
                drawn = (*wanted, gradient.basis.matrix(weight.device, weight.dtype))
            self._update(weight, stand_in, gradient.basis, drawn[2], group)

    def _fill(
        self,
        groups: Sequence[dict[str, Any]],
        sketched: dict[Tensor, SketchedGrad],
        inner_groups: list[dict[str, Any]],
        steps: list[tuple[Tensor, Tensor, SketchedGrad, dict[str, Any]]],
    ) -> None:
        """The inner optimizer's groups: stand-ins of sketched weights, and dense weights."""
        for group in groups:
            stand_ins = []
            for weight in group["params"]:
                gradient = sketched.get(weight)
                if gradient is not None:
                    stand_ins.append(self._stand_in(weight, gradient, group))
                    steps.append((weight, stand_ins[-1], gradient, group))
            if stand_ins:
                torch._foreach_zero_(stand_ins)  # a few launches, not one for each weight
            dense = [weight for weight in group["params"] if weight not in sketched]
            lr = {"lr": group["lr"] * group["dense_scale"]} if "lr" in group else {}
            inner_groups.append({**group, "params": stand_ins, "weight_decay": 0.0})
            inner_groups.append({**group, "params": dense, **lr})

    def _is_sketched(self, weight: Tensor) -> bool:
        if isinstance(weight.grad, SketchedGrad) and weight.grad.factor is not None:
            return True
        if weight.grad is not None and _BASIS in self.state.get(weight, {}):
            raise ValueError(
                f"the gradient of a weight of shape {tuple(weight.shape)} is dense, its state is "
                'sketched: train with gradients="sketched" as before, and do to gradients nothing '
                "that makes them dense (scaling, clipping by norm and adding do not)"
            )
        if isinstance(weight.grad, SketchedGrad):
            weight.grad = weight.grad.to_dense()
        return False

    def _stand_in(self, weight: Tensor, gradient: SketchedGrad, group: dict[str, Any]) -> Tensor:
        assert gradient.factor is not None
        factor = gradient.factor
        decay = group.get("weight_decay", 0.0)
        if decay and not self._is_decoupled(group):
            sign = -1 if group.get("maximize") else 1  # the inner optimizer negates what it gets
            factor = factor + sign * decay * gradient.basis.compress(weight)
        dtype = self._state_dtype or factor.dtype
        stand_in = torch.empty_like(factor, dtype=dtype)
        stand_in.grad = factor.to(dtype)
        state = self.state.get(weight, {})
        self._refresh_state(state, gradient.basis, factor.device)  # may fail for want of memory
        self.state.pop(weight, None)
        state.pop(_BASIS, None)
        if state:
            self.state[stand_in] = state
        return stand_in

    def _take_back_state(self, weight: Tensor, stand_in: Tensor, basis: Basis) -> None:
        p = basis.projection
        kind = KINDS.index(p.kind)
        numbers = [basis.key, p.salt, p.in_features, p.rank, kind, basis.in_dim, steps_of(weight)]
        state = self.state.pop(stand_in, {})
        self.state[weight] = {**state, _BASIS: torch.tensor(numbers, dtype=torch.int64)}

    def _update(
        self, weight: Tensor, stand_in: Tensor, basis: Basis, p: Tensor, group: dict[str, Any]
    ) -> None:
        keep = 1.0
        if group.get("weight_decay") and self._is_decoupled(group):
            keep = 1.0 - float(group["lr"]) * group["weight_decay"]
            found_inf = getattr(self, "found_inf", None)
            if found_inf is not None and found_inf.item():
                keep = 1.0  # a fused step that the scaler skips
        update = stand_in.to(weight.dtype)
        if isinstance(self, torch.optim.Adafactor):  # its steps are relative to the weight's size
            smallest = group["eps"][1]
            rms = weight.square().mean().sqrt()
            update = update * (rms.clamp(min=smallest) / smallest)
        left, right = (update, p.T) if basis.is_last(weight) else (p, update)
        if weight.dim() == 2:
            weight.addmm_(left, right, beta=keep, alpha=group["scale"])
        else:  # a batch of experts
            left, right = (part.expand(len(weight), -1, -1) for part in (left, right))
            weight.baddbmm_(left, right, beta=keep, alpha=group["scale"])

    def _is_decoupled(self, group: dict[str, Any]) -> bool:
        return bool(group.get("decoupled_weight_decay", self._decoupled))

    # --- a change of projection ------------------------------------------------------------------

    def _check_state(self, weight: Tensor, basis: Basis) -> None:
        state, p = self.state.get(weight, {}), basis.projection
        if not state:
            return
        if _BASIS not in state:
            raise ValueError(
                f"the state of a weight of shape {tuple(weight.shape)} is dense, its gradient is "
                f"sketched (rank {p.rank}): start with a fresh optimizer, or train with dense ones"
            )
        expected = {
            "rank": p.rank,
            "in_features": p.in_features,
            "kind": KINDS.index(p.kind),
            "in_dim": basis.in_dim,
        }
        numbers = _numbers(state)
        for name, value in expected.items():
            if numbers[name] != value:
                named = KINDS if name == "kind" else range(2**62)
                had, has = named[numbers[name]], named[value]
                raise ValueError(
                    f"the state of a weight of shape {tuple(weight.shape)} has {name}={had}, its "
                    f"gradient has {name}={has}: use the settings that the state was saved with"
                )

    def _refresh_state(self, state: dict[str, Any], basis: Basis, device: torch.device) -> None:
        """Carry the moments into a new basis: as they are, projected, or not at all."""
        if _BASIS not in state or self._refresh == "keep":
            return
        numbers = _numbers(state)
        if numbers["key"] == basis.key:
            return
        if self._refresh == "reset":
            state.clear()
            return
        projection = Projection(
            salt=numbers["salt"],
            in_features=numbers["in_features"],
            rank=numbers["rank"],
            kind=KINDS[numbers["kind"]],
            dtype=basis.projection.dtype,
        )
        old = Basis(projection=projection, key=numbers["key"], in_dim=numbers["in_dim"])
        change = old.matrix(device, torch.float32).T @ basis.matrix(device, torch.float32)
        for name in ("exp_avg", "momentum_buffer"):  # what is linear in the gradient
            moment = state.get(name)
            if moment is not None:
                full = moment.float()
                carried = full @ change if basis.is_last(full) else change.T @ full
                moment.copy_(carried)

    # --- stepping while backward runs ------------------------------------------------------------

    def _step_after_backward(self, weight: Tensor) -> None:
        reference = weakref.ref(self)  # the weight must not keep the optimizer alive

        def step(weight: Tensor) -> None:
            optimizer = reference()
            if optimizer is None:
                return
            for group in optimizer.param_groups:
                if any(weight is own for own in group["params"]):
                    optimizer._step([{**group, "params": [weight]}])
                    count_step([weight])
            weight.grad = ConsumedGrad(weight)

        def step_dense(weight: Tensor) -> None:
            # Autograd also calls this where a graph gives the weight itself no gradient.
            if not isinstance(weight.grad, SketchedGrad | ConsumedGrad | None):
                step(weight)

        weight.register_post_accumulate_grad_hook(step_dense)  # type: ignore[no-untyped-call]
        call_after_sketched_grad(weight, step)

    # --- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only; with each sketched weight's position in its interval."""
        for weight, state in self.state.items():
            steps = counted_steps(weight)
            if _BASIS in state:
                state[_BASIS][_NUMBERS.index("steps")] = steps_of(weight)
            elif steps is not None:  # sketched in the graph, dense for its optimizer
                state[_STEPS] = torch.tensor(steps, dtype=torch.int64)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; moments keep the dtype they were saved with."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name in ("scale", "dense_scale"):
                group.setdefault(name, self.defaults[name])
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for name, weight in zip(names, weights, strict=True):
            saved = state_dict["state"].get(name, {})
            if _STEPS in saved:
                set_steps([weight], int(saved[_STEPS]))
                self.state[weight][_STEPS] = saved[_STEPS].detach().cpu().clone()
            if _BASIS not in saved:
                continue
            for entry, value in saved.items():
                if isinstance(value, Tensor) and entry != "step":
                    device = "cpu" if entry == _BASIS else weight.device
                    self.state[weight][entry] = value.detach().to(device, copy=True)
            set_steps([weight], _numbers(saved)["steps"])


def _numbers(state: dict[str, Any]) -> dict[str, int]:
    return dict(zip(_NUMBERS, state[_BASIS].tolist(), strict=True))


def compact_optimizer(
    optimizer_class: type[torch.optim.Optimizer],
    params: Iterable[Any],
    *,
    scale: float = 1.0,
    dense_scale: float = 1.0,
    refresh: Refresh = "keep",
    state_dtype: torch.dtype | None = None,
    step_in_backward: bool = False,
    decoupled_weight_decay: bool | None = None,
    **kwargs: Any,
) -> torch.optim.Optimizer:
    """Any optimizer, stepping the factors of sketched gradients.

    Args:
        optimizer_class: its update of a tensor may depend on its gradients and state, and on the
            tensor itself only through weight decay.
        params: parameters, or groups; a group may have its own `scale` and `dense_scale`.
        scale: α of the paper, multiplies the update of sketched weights.
        dense_scale: multiplies the learning rate of weights with dense gradients (α_out).
        refresh: moments when a projection changes: "keep" (paper), "project" (what is linear in
            the gradient goes through both projections), "reset".
        state_dtype: of the moments of sketched weights; the gradient's by default.
        step_in_backward: update each weight as soon as its gradient is there and free the gradient;
            accumulation, clipping and scaling raise then.
        decoupled_weight_decay: for other classes than AdamW, Adafactor, Adam, SGD and RMSprop that
            have weight decay.
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
    compact_class = type(
        f"Compact{optimizer_class.__name__}",
        (CompactOptimizer, optimizer_class),
        {
            "_inner_step": staticmethod(_unhooked_step(optimizer_class)),
            "_decoupled": decoupled_weight_decay,
        },
    )
    if decoupled_weight_decay is None and optimizer_class in _DECOUPLED:
        compact_class._decoupled = _DECOUPLED[optimizer_class]  # type: ignore[attr-defined]
    optimizer: CompactOptimizer = compact_class(params, **kwargs)
    optimizer._set_up(scale, dense_scale, refresh, state_dtype, step_in_backward)
    return optimizer


def _unhooked_step(optimizer_class: type[torch.optim.Optimizer]) -> Callable[..., Any]:
    """The class's step without its hooks: the compact optimizer's own step runs them."""
    step: Callable[..., Any] = optimizer_class.step
    while getattr(step, "hooked", False):
        step = step.__wrapped__  # type: ignore[attr-defined]
    return step


_DECOUPLED: dict[type[torch.optim.Optimizer], bool] = {
    torch.optim.AdamW: True,
    torch.optim.Adafactor: True,
    torch.optim.Adam: False,
    torch.optim.SGD: False,
    torch.optim.RMSprop: False,
}


class CompactAdamW(CompactOptimizer, torch.optim.AdamW):
    """AdamW whose moments live in the space of the factors (paper, Algorithm 3).

    Weights with dense gradients get exactly torch.optim.AdamW.

    Args:
        params, lr, betas, eps, weight_decay, kwargs: as torch.optim.AdamW.
        scale, dense_scale, refresh, state_dtype, step_in_backward: as `compact_optimizer`.
    """

    _inner_step = staticmethod(_unhooked_step(torch.optim.AdamW))  # type: ignore[assignment]
    _decoupled = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        scale: float = 1.0,
        dense_scale: float = 1.0,
        refresh: Refresh = "keep",
        state_dtype: torch.dtype | None = None,
        step_in_backward: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, lr, **kwargs)
        self._set_up(scale, dense_scale, refresh, state_dtype, step_in_backward)
