"""A gradient that holds its factor and its projection, and is dense only where someone needs it."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from compact_fx import _torch
from compact_fx.projections import RANDOM_PROJECTION, Projection, draw

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The P that a factor is expressed in, as data.

    Attributes:
        projection: everything about P but its key.
        key: 63-bit number, see `fold_in`.
        in_dim: which dimension of the weight in_features is; the factor has the rank there.
    """

    projection: Projection
    key: int
    in_dim: int

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P (in_features, rank), rounded as the compiled graph rounds it, then in this dtype."""
        p = self.projection
        key = torch.full((), self.key, dtype=torch.int64, device=device)
        if device.type != "cuda":
            drawn = RANDOM_PROJECTION(key, p.in_features, p.rank, p.kind, p.dtype)
        else:
            drawn = _compiled_draw(device, p.in_features, p.rank, p.kind, p.dtype)(key)
        result: Tensor = drawn.to(dtype)
        return result

    def expand(self, factor: Tensor) -> Tensor:
        """The dense matrix of a factor: factor Pᵀ, or P factor where in_features come first."""
        p = self.matrix(factor.device, factor.dtype)
        return factor @ p.T if self.in_dim == 1 else p @ factor

    def compress(self, dense: Tensor) -> Tensor:
        """The factor of a dense matrix: dense P, or Pᵀ dense."""
        p = self.matrix(dense.device, dense.dtype)
        return dense @ p if self.in_dim == 1 else p.T @ dense

    def shape_of(self, factor: Tensor) -> tuple[int, int]:
        """The dense shape."""
        shape = [*factor.shape]
        shape[self.in_dim] = self.projection.in_features
        return shape[0], shape[1]


@functools.cache
def _compiled_draw(
    device: torch.device, n: int, rank: int, kind: str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """`draw` as one fused kernel: operator by operator it would be forty."""
    function = functools.partial(draw, n=n, rank=rank, kind=kind, dtype=dtype)
    return _torch.compile_function(function, torch.zeros((), dtype=torch.int64, device=device))


class SketchedGrad(Tensor):
    """The gradient of a weight as factor and basis: shape, dtype and device are the weight's.

    Scaling, copying, zeroing, the 2-norm, and adding a gradient in the same basis work on the
    factor. Every other operator sees the dense tensor; one that writes makes the gradient dense.

    Attributes:
        factor: the weight's shape with the rank in place of in_features, None once it is dense.
        basis: what the factor is expressed in.
    """

    factor: Tensor | None
    basis: Basis
    _dense: Tensor | None

    @staticmethod
    def __new__(cls, factor: Tensor, basis: Basis) -> "SketchedGrad":
        result: SketchedGrad = Tensor._make_wrapper_subclass(
            cls, basis.shape_of(factor), dtype=factor.dtype, device=factor.device
        )
        result.factor, result.basis, result._dense = factor, basis, None
        return result

    def to_dense(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        """The gradient as a plain tensor (G P Pᵀ); a new one each time while it is sketched."""
        if self._dense is not None:
            return self._dense
        assert self.factor is not None
        return self.basis.expand(self.factor)

    def __repr__(self) -> str:  # type: ignore[override]
        rank = self.basis.projection.rank
        state = f"rank={rank}" if self.factor is not None else "dense"
        return f"SketchedGrad(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def norm_of_dense(self) -> Tensor:
        """‖G P Pᵀ‖ without building it: tr(F PᵀP Fᵀ), in float32."""
        assert self.factor is not None
        factor = self.factor.float() if self.basis.in_dim == 1 else self.factor.float().T
        p = self.basis.matrix(factor.device, torch.float32)
        return ((factor @ (p.T @ p)) * factor).sum().clamp(min=0).sqrt().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _densely(func, args, kwargs)


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on dense tensors; what it writes into becomes dense for good."""
    written: dict[int, tuple[SketchedGrad, Tensor]] = {}
    names = [argument.name for argument in func._schema.arguments]
    writes = {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }

    def convert(value: Any, write: bool) -> Any:
        def dense(leaf: Any) -> Any:
            if not isinstance(leaf, SketchedGrad):
                return leaf
            tensor = leaf.to_dense()
            if write:
                written[id(tensor)] = (leaf, tensor)
            return tensor

        return pytree.tree_map(dense, value)

    new_args = [convert(v, names[i] in writes) for i, v in enumerate(args)]
    new_kwargs = {name: convert(value, name in writes) for name, value in kwargs.items()}
    result = func(*new_args, **new_kwargs)
    for gradient, tensor in written.values():
        gradient._dense, gradient.factor = tensor, None
    return pytree.tree_map(lambda t: written[id(t)][0] if id(t) in written else t, result)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, Tensor) and not isinstance(value, SketchedGrad) and value.dim() == 0
    )


def _elementwise(func: Any) -> Callable[..., Any]:
    """A linear operator of one gradient and numbers: applied to the factor."""

    def run(gradient: Any, *numbers: Any, **kwargs: Any) -> Any:
        if not isinstance(gradient, SketchedGrad) or gradient.factor is None:
            return NotImplemented
        if not all(_is_number(number) for number in numbers):
            return NotImplemented
        factor = func(gradient.factor, *numbers, **kwargs)
        return SketchedGrad(factor, gradient.basis)

    return run


def _elementwise_in_place(func: Any) -> Callable[..., Any]:
    def run(gradient: Any, *numbers: Any, **kwargs: Any) -> Any:
        if not isinstance(gradient, SketchedGrad) or gradient.factor is None:
            return NotImplemented
        if not all(_is_number(number) for number in numbers):
            return NotImplemented
        func(gradient.factor, *numbers, **kwargs)
        return gradient

    return run


def _same_basis(left: Any, right: Any) -> bool:
    sketched = isinstance(left, SketchedGrad) and isinstance(right, SketchedGrad)
    if not sketched or left.factor is None or right.factor is None:
        return False
    if left.basis == right.basis:
        return True
    _warn_of_two_bases()
    return False


@functools.cache
def _warn_of_two_bases() -> None:
    warnings.warn(
        "gradients with two projections are added: the sum is dense. Keep update_interval steps of "
        "the optimizer apart from accumulation, or use one compiled graph for a weight",
        stacklevel=2,
    )


def _add(left: Any, right: Any, alpha: float = 1) -> Any:
    if not _same_basis(left, right):
        return NotImplemented
    return SketchedGrad(aten.add.Tensor(left.factor, right.factor, alpha=alpha), left.basis)


def _add_in_place(left: Any, right: Any, alpha: float = 1) -> Any:
    if not _same_basis(left, right):
        return NotImplemented
    left.factor.add_(right.factor, alpha=alpha)
    return left


def _norm(
    gradient: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    if not isinstance(gradient, SketchedGrad) or gradient.factor is None:
        return NotImplemented
    if ord != 2 or dim is not None or keepdim or kwargs.get("dtype") is not None:
        return NotImplemented
    return gradient.norm_of_dense()


def _foreach_norm(gradients: Any, ord: Any = 2, dtype: Any = None) -> Any:
    return [torch.linalg.vector_norm(gradient, ord, dtype=dtype) for gradient in gradients]


def _foreach_scale(func: Any) -> Callable[..., Any]:
    def run(gradients: Any, numbers: Any) -> Any:
        if isinstance(numbers, list | tuple):
            for gradient, number in zip(gradients, numbers, strict=True):
                getattr(gradient, func)(number)
        else:
            for gradient in gradients:
                getattr(gradient, func)(numbers)

    return run


def _foreach_zero(gradients: Any) -> None:
    for gradient in gradients:
        gradient.zero_()


def _unscale(gradients: Any, found_inf: Tensor, inverse_scale: Tensor) -> Any:
    """GradScaler: a factor is finite where the gradient is, and scales with it."""
    plain = [
        g.factor if isinstance(g, SketchedGrad) and g.factor is not None else g for g in gradients
    ]
    if any(isinstance(g, SketchedGrad) for g in plain):
        return NotImplemented
    aten._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse_scale)
    return None


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_in_place,
    aten.linalg_vector_norm.default: _norm,
    aten.norm.Scalar: lambda gradient, p=2: _norm(gradient, p),
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._foreach_mul_.Tensor: _foreach_scale("mul_"),
    aten._foreach_mul_.Scalar: _foreach_scale("mul_"),
    aten._foreach_mul_.ScalarList: _foreach_scale("mul_"),
    aten._foreach_div_.Tensor: _foreach_scale("div_"),
    aten._foreach_div_.Scalar: _foreach_scale("div_"),
    aten._foreach_zero_.default: _foreach_zero,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
    **{
        func: _elementwise(func)
        for func in (
            aten.detach.default,
            aten.alias.default,
            aten.clone.default,
            aten.neg.default,
            aten.mul.Tensor,
            aten.mul.Scalar,
            aten.div.Tensor,
            aten.div.Scalar,
        )
    },
    **{
        func: _elementwise_in_place(func)
        for func in (
            aten.zero_.default,
            aten.neg_.default,
            aten.mul_.Tensor,
            aten.mul_.Scalar,
            aten.div_.Tensor,
            aten.div_.Scalar,
        )
    },
}


class ConsumedGrad(Tensor):
    """Stands in `.grad` of a weight that was stepped while backward ran: no memory, no use."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> "ConsumedGrad":
        result: ConsumedGrad = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        return result

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ConsumedGrad(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        raise RuntimeError(
            f"{func} on a gradient that step_in_backward=True has already used and freed: "
            "accumulation, clipping and scaling need step_in_backward=False; otherwise call "
            "optimizer.step() or zero_grad() after each backward pass"
        )
