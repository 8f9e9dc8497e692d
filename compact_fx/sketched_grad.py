"""A gradient that holds its factor and its projection, and is dense only where someone needs it."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.projections import RANDOM_PROJECTION, Projection, draw, source

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class Basis:
    """The P that a factor is expressed in, as data.

    Attributes:
        projection: everything about P but its key.
        key: 63-bit number, see `fold_in`.
        in_dim: which of the weight's last two dimensions in_features is; the factor has the rank
            there. All matrices of a batch, as of experts, share P.
    """

    projection: Projection
    key: int
    in_dim: int

    def matrix(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """P (in_features, rank), rounded as the compiled graph rounds it, then in this dtype."""
        p = self.projection
        given = p.source_of(self.key, device)
        if device.type != "cuda":
            drawn = RANDOM_PROJECTION(given, p.in_features, p.rank, p.kind, p.dtype)
        else:
            drawn = _compiled_draw(device, p.in_features, p.rank, p.kind, p.dtype)(given)
        result: Tensor = drawn.to(dtype)
        return result

    def is_last(self, tensor: Tensor) -> bool:
        """Whether in_features are the last dimension of a weight or factor."""
        return self.in_dim == tensor.dim() - 1

    def expand(self, factor: Tensor) -> Tensor:
        """The dense matrix of a factor: factor Pᵀ, or P factor where in_features come first."""
        p = self.matrix(factor.device, factor.dtype)
        with torch.autocast(factor.device.type, enabled=False):
            return factor @ p.T if self.is_last(factor) else p @ factor

    def compress(self, dense: Tensor) -> Tensor:
        """The factor of a dense matrix: dense P, or Pᵀ dense."""
        p = self.matrix(dense.device, dense.dtype)
        with torch.autocast(dense.device.type, enabled=False):
            return dense @ p if self.is_last(dense) else p.T @ dense

    def shape_of(self, factor: Tensor) -> tuple[int, ...]:
        """The dense shape."""
        shape = [*factor.shape]
        shape[self.in_dim] = self.projection.in_features
        return tuple(shape)


@functools.cache
def _compiled_draw(
    device: torch.device, n: int, rank: int, kind: str, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """`draw` as one fused kernel: operator by operator it would be forty."""
    function = functools.partial(draw, n=n, rank=rank, kind=kind, dtype=dtype)
    example = source(torch.zeros((), dtype=torch.int64, device=device), n, rank, kind)
    return _torch.compile_function(function, example)


class SketchedGrad(Tensor):
    """The gradient of a weight as factor and basis: shape, dtype and device are the weight's.

    Scaling, copying, zeroing, the 2-norm, and adding a gradient in the same basis work on the
    factor. Every other operator sees the dense tensor; one that writes, or gives a view that could
    be written through, makes the gradient dense for good.

    Attributes:
        basis: what the factor is expressed in.
    """

    basis: Basis
    _contents: "_Contents"

    @staticmethod
    def __new__(cls, factor: Tensor, basis: Basis) -> "SketchedGrad":
        return _wrap(_Contents(factor, None), basis, factor)

    @property
    def factor(self) -> Tensor | None:
        """The weight's shape with the rank in place of in_features, None once it is dense."""
        return self._contents.factor

    @property
    def data(self) -> "SketchedGrad":  # type: ignore[override]
        """An alias, as of any tensor."""
        return _wrap(self._contents, self.basis, self)

    @data.setter
    def data(self, value: Tensor) -> None:
        dense = value.to_dense() if isinstance(value, SketchedGrad) else value
        self._contents.factor, self._contents.dense = None, dense

    def to_dense(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        """The gradient as a plain tensor (G P Pᵀ); a new one each time while it is sketched."""
        if self._contents.dense is not None:
            return self._contents.dense
        assert self.factor is not None
        return self.basis.expand(self.factor)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a plain dense tensor, which `torch.load` takes with `weights_only=True`."""
        return self.to_dense().__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        rank = self.basis.projection.rank
        state = f"rank={rank}" if self.factor is not None else "dense"
        return f"SketchedGrad(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def norm_of_dense(self) -> Tensor:
        """‖G P Pᵀ‖ without building it: tr(F PᵀP Fᵀ), in float32 or float64."""
        assert self.factor is not None
        dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        factor = self.factor.to(dtype)
        factor = factor if self.basis.is_last(factor) else factor.mT
        largest = factor.abs().amax()
        factor = factor / torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
        p = self.basis.matrix(factor.device, dtype)
        with torch.autocast(factor.device.type, enabled=False):
            square = ((factor @ (p.T @ p)) * factor).sum()
        norm = square.clamp(min=0).sqrt() * largest
        return torch.where(largest.isinf(), largest, norm).to(self.dtype)

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


@dataclass
class _Contents:
    """What a gradient and its aliases share: a factor, or the dense tensor it has become."""

    factor: Tensor | None
    dense: Tensor | None


def _wrap(values: _Contents, basis: Basis, like: Tensor) -> SketchedGrad:
    shape = like.shape if isinstance(like, SketchedGrad) else basis.shape_of(like)
    result: SketchedGrad = Tensor._make_wrapper_subclass(
        SketchedGrad, shape, dtype=like.dtype, device=like.device
    )
    result._contents, result.basis = values, basis
    return result


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on dense tensors; what it can write into becomes dense for good."""
    if func.namespace not in ("aten", "prims"):
        raise RuntimeError(
            f"{func} does not know sketched gradients: give it gradient.to_dense(), or train with "
            'gradients="dense"'
        )
    aliased = {a.name for a in func._schema.arguments if a.alias_info is not None}
    names = [argument.name for argument in func._schema.arguments]
    replaced: dict[int, Tensor] = {}
    owners: dict[int, SketchedGrad] = {}

    def convert(value: Any, aliases: bool) -> Any:
        def dense(leaf: Any) -> Any:
            if not isinstance(leaf, SketchedGrad):
                return leaf
            tensor = replaced.setdefault(id(leaf), leaf.to_dense())
            if aliases:
                leaf._contents.factor, leaf._contents.dense = None, tensor
                owners[id(tensor)] = leaf
            return tensor

        return _torch.tree_map(dense, value)

    new_args = [convert(v, names[i] in aliased) for i, v in enumerate(args)]
    new_kwargs = {name: convert(value, name in aliased) for name, value in kwargs.items()}
    result = func(*new_args, **new_kwargs)
    return _torch.tree_map(lambda t: owners.get(id(t), t), result)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, Tensor) and not isinstance(value, SketchedGrad) and value.dim() == 0
    )


def _elementwise(func: Any, *, in_place: bool) -> Callable[..., Any]:
    """A linear operator of one gradient and numbers: applied to the factor."""

    def run(gradient: Any, *numbers: Any, **kwargs: Any) -> Any:
        if not isinstance(gradient, SketchedGrad) or gradient.factor is None:
            return NotImplemented
        if not all(_is_number(number) for number in numbers):
            return NotImplemented
        factor = func(gradient.factor, *numbers, **kwargs)
        return gradient if in_place else SketchedGrad(factor, gradient.basis)

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


def _alias(gradient: Any) -> Any:
    return _wrap(gradient._contents, gradient.basis, gradient)


def _clone(gradient: Any, **kwargs: Any) -> Any:
    values = gradient._contents
    copies = (None if t is None else t.clone() for t in (values.factor, values.dense))
    return _wrap(_Contents(*copies), gradient.basis, gradient)


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


def _unscale(gradients: Any, found_inf: Tensor, inverse_scale: Tensor) -> None:
    """GradScaler: a factor is finite where the gradient is, and scales with it."""
    plain = [
        (g.to_dense() if g.factor is None else g.factor) if isinstance(g, SketchedGrad) else g
        for g in gradients
    ]
    aten._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse_scale)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
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
        func: _elementwise(func, in_place=False)
        for func in (
            aten.neg.default,
            aten.mul.Tensor,
            aten.mul.Scalar,
            aten.div.Tensor,
            aten.div.Scalar,
        )
    },
    **{
        func: _elementwise(func, in_place=True)
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
