"""A gradient that holds its factor and its projection, and is dense only where someone needs it."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.errors import warn_at_caller
from compact_fx.projections import Basis

aten = torch.ops.aten


@dataclass
class _Contents:
    """What a gradient, its aliases and its views share.

    Attributes:
        factor: None once the gradient is dense for good.
        rest: a dense gradient that was added to the factor: of a graph without sketches.
        dense: in the factor's place once something else has written into the gradient.
        is_blank: whether it was set to zero, and nothing was added since.
    """

    basis: Basis
    factor: Tensor | None
    rest: Tensor | None = None
    dense: Tensor | None = None
    is_blank: bool = False

    def to_dense(self) -> Tensor:
        if self.dense is not None:
            return self.dense
        assert self.factor is not None
        expanded = self.basis.expand(self.factor)
        return expanded if self.rest is None else expanded.add_(self.rest)

    def densify(self) -> Tensor:
        """Dense for good: the tensor that may be written into."""
        if self.dense is None:
            self.factor, self.rest, self.dense = None, None, self.to_dense()
        return self.dense

    def parts(self) -> list[Tensor]:
        """What linear operators act on."""
        return [part for part in (self.factor, self.rest, self.dense) if part is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> "_Contents":
        """The contents with a linear function applied to all parts."""
        factor, rest, dense = (
            None if part is None else function(part)
            for part in (self.factor, self.rest, self.dense)
        )
        return _Contents(self.basis, factor, rest, dense, self.is_blank)


class _Wrapper(Tensor):
    """Without memory of its own: a sketched gradient, or a view of one.

    Attributes:
        _path: the operators that make it of the gradient's dense tensor.
    """

    _contents: _Contents
    _path: tuple[Callable[[Tensor], Tensor], ...] = ()

    def _plain(self, *, to_write: bool) -> Tensor:
        """A plain tensor with its values; what is written into it arrives if that is asked."""
        values = self._contents.densify() if to_write else self._contents.to_dense()
        for function in self._path:
            values = function(values)
        return values

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a plain dense tensor, which `torch.load` takes with `weights_only=True`."""
        return self._plain(to_write=False).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        """A dense copy; read-only, since nothing written into it would arrive."""
        array = self._plain(to_write=False).clone().numpy(*args, **kwargs)
        array.flags.writeable = False
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        array = self.numpy()
        if dtype is not None:
            return array.astype(dtype)
        return array.copy() if copy else array

    def tolist(self) -> Any:
        """As of the dense tensor."""
        return self._plain(to_write=False).tolist()

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


class SketchedGrad(_Wrapper):
    """The gradient of a weight as factor and basis: shape, dtype and device are the weight's.

    Scaling, copying, zeroing, the 2-norm, and adding a gradient in the same basis work on the
    factor. A dense gradient that is added in place is kept beside the factor. Every other operator
    sees the dense tensor. One that writes, also through a view, makes the gradient dense for good;
    reading changes nothing.
    """

    @staticmethod
    def __new__(cls, factor: Tensor, basis: Basis) -> "SketchedGrad":
        return _wrap(_Contents(basis, factor), factor)

    @property
    def basis(self) -> Basis:
        """What the factor is expressed in."""
        return self._contents.basis

    @property
    def factor(self) -> Tensor | None:
        """The weight's shape with the rank in place of in_features.

        None where the gradient is more than its factor: something dense was added or written.
        """
        return None if self._contents.rest is not None else self._contents.factor

    def to_factor(self) -> Tensor:
        """The gradient in its basis: F; F + G P with a dense gradient G beside it; else nearest."""
        contents = self._contents
        if contents.factor is None:
            return contents.basis.fit(contents.to_dense())
        if contents.rest is None:
            return contents.factor
        return contents.factor + contents.basis.compress(contents.rest)

    def parts(self) -> dict[str, Tensor]:
        """The tensors that it is the sum of, by name; it is linear in each."""
        contents = self._contents
        named = {"factor": contents.factor, "rest": contents.rest, "dense": contents.dense}
        return {name: part for name, part in named.items() if part is not None}

    def replace(self, part: str, value: Tensor) -> None:
        """Another tensor of the same shape for a part."""
        setattr(self._contents, part, value)

    @property
    def is_isometric(self) -> bool:
        """Whether the factor is all of it, and has its norm."""
        return self.factor is not None and self.basis.is_orthonormal

    @property
    def is_written(self) -> bool:
        """Whether something has written dense values into it."""
        return self._contents.factor is None

    @property
    def data(self) -> "SketchedGrad":  # type: ignore[override]
        """An alias, as of any tensor."""
        return _wrap(self._contents, self)

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, SketchedGrad):
            self._contents = value._contents
        else:
            self._contents = _Contents(self.basis, None, dense=value)

    def to_dense(self, *_: Any, **__: Any) -> Tensor:  # type: ignore[override]
        """The gradient as a plain tensor (G P Pᵀ); a new one each time while it is sketched."""
        return self._contents.to_dense()

    def __repr__(self) -> str:  # type: ignore[override]
        rank = self.basis.projection.rank
        state = f"rank={rank}" if self.factor is not None else "dense"
        return f"SketchedGrad(shape={tuple(self.shape)}, dtype={self.dtype}, {state})"

    def norm_of_dense(self) -> Tensor:
        """‖G P Pᵀ‖ without building it, in float32 or float64."""
        contents = self._contents
        if contents.factor is None or contents.rest is not None:
            dense: Tensor = torch.linalg.vector_norm(self.to_dense())
            return dense
        dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        if self.basis.is_orthonormal:
            norm: Tensor = torch.linalg.vector_norm(contents.factor, dtype=dtype)
            return norm.to(self.dtype)
        factor = contents.factor.to(dtype)
        if not factor.numel():  # a part of a sharded one that has no rows
            return factor.new_zeros((), dtype=self.dtype)
        largest = factor.abs().amax()
        unit = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
        norm = self.basis.norm(factor / unit) * largest
        return torch.where(largest.isinf(), largest, norm).to(self.dtype)


class _View(_Wrapper):
    """A view of a sketched gradient, made of its dense tensor only when something reads it."""

    def __repr__(self) -> str:  # type: ignore[override]
        return repr(self._plain(to_write=False))


def _wrap(contents: _Contents, like: Tensor) -> SketchedGrad:
    shape = like.shape if isinstance(like, SketchedGrad) else contents.basis.shape_of(like)
    result: SketchedGrad = Tensor._make_wrapper_subclass(
        SketchedGrad, shape, dtype=like.dtype, device=like.device
    )
    result._contents = contents
    return result


def _view(of: _Wrapper, shaped: Tensor, function: Callable[[Tensor], Tensor]) -> _View:
    """shaped: a tensor without values that has the view's shape and strides."""
    result: _View = Tensor._make_wrapper_subclass(
        _View,
        shaped.shape,
        strides=shaped.stride(),
        storage_offset=shaped.storage_offset(),
        dtype=of.dtype,
        device=of.device,
    )
    result._contents = of._contents
    result._path = (*of._path, function)
    return result


# --- any operator ---------------------------------------------------------------------------------


def _densely(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Run an operator on dense tensors; what it writes into becomes dense for good."""
    # Functional collectives read: a DTensor's `full_tensor()`.
    if func.namespace not in ("aten", "prims", "_c10d_functional"):
        raise RuntimeError(
            f"{func} does not know sketched gradients: give it gradient.to_dense(), or train with "
            'gradients="dense"'
        )
    schema = func._schema.arguments
    written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
    viewed = {a.name for a in schema if a.alias_info is not None} - written
    if viewed and args and isinstance(args[0], _Wrapper) and schema[0].name in viewed:
        return _views(func, args, kwargs)
    replaced: dict[int, Tensor] = {}
    owners: dict[int, _Wrapper] = {}

    def convert(value: Any, to_write: bool) -> Any:
        def dense(leaf: Any) -> Any:
            if not isinstance(leaf, _Wrapper):
                return leaf
            if id(leaf) not in replaced:
                replaced[id(leaf)] = leaf._plain(to_write=to_write)
            tensor = replaced[id(leaf)]
            if to_write:
                owners[id(tensor)] = leaf
            return tensor

        return _torch.tree_map(dense, value)

    # What is written into comes first: it has to be the tensor that others read as well.
    named = [(schema[i].name, value) for i, value in enumerate(args)]
    for name, value in [*named, *kwargs.items()]:
        if name in written:
            convert(value, to_write=True)
    new_args = [convert(value, name in written) for name, value in named]
    new_kwargs = {name: convert(value, name in written) for name, value in kwargs.items()}
    result = func(*new_args, **new_kwargs)
    if "_fused_" not in func.__name__:  # that an optimizer unscales them makes no new gradient
        torch.autograd.graph.increment_version(owners.values())  # autograd does not, in lists
    return _torch.tree_map(lambda t: owners.get(id(t), t), result)


def _views(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The views that an operator gives, and how each is made of a dense tensor."""
    of, *others = args
    shape = torch.empty_strided(of.size(), of.stride(), dtype=of.dtype, device="meta")
    shaped = func(shape, *others, **kwargs)
    if isinstance(shaped, Tensor):
        return _view(of, shaped, lambda values: func(values, *others, **kwargs))

    def part(number: int) -> Callable[[Tensor], Tensor]:
        return lambda values: func(values, *others, **kwargs)[number]  # type: ignore[no-any-return]

    return [_view(of, one, part(number)) for number, one in enumerate(shaped)]


# --- operators that work on the factor ------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (
        isinstance(value, Tensor) and not isinstance(value, _Wrapper) and value.dim() == 0
    )


def _is_sketched(value: Any) -> bool:
    return isinstance(value, SketchedGrad) and value._contents.factor is not None


def _elementwise(func: Any, *, in_place: bool) -> Callable[..., Any]:
    """A linear operator of one gradient and numbers: applied to its parts."""

    def run(gradient: Any, *numbers: Any, **kwargs: Any) -> Any:
        if not _is_sketched(gradient) or not all(map(_is_number, numbers)):
            return NotImplemented
        if in_place:
            for part in gradient._contents.parts():
                func(part, *numbers, **kwargs)
            return gradient
        return _wrap(gradient._contents.map(lambda t: func(t, *numbers, **kwargs)), gradient)

    return run


def _zero_in_place(gradient: Any) -> Any:
    if not isinstance(gradient, SketchedGrad):
        return NotImplemented
    contents = gradient._contents
    if contents.factor is None:  # zeros need not be dense
        shape = contents.basis.factor_shape(gradient.shape)
        contents.factor = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device)
    contents.factor.zero_()
    contents.rest, contents.dense, contents.is_blank = None, None, True
    return gradient


@functools.cache
def _warn_of_two_bases() -> None:
    warn_at_caller(
        "gradients with two projections are added: the second counts as a dense one. Keep "
        "update_interval steps of the optimizer apart from accumulation, and use one rank and kind "
        "for a weight",
    )


def _add(left: Any, right: Any, alpha: float = 1) -> Any:
    if not (_is_sketched(left) and _is_sketched(right)):
        return NotImplemented
    if left.basis != right.basis:
        _warn_of_two_bases()
        return NotImplemented
    result = _wrap(left._contents.map(torch.clone), left)
    return _add_in_place(result, right, alpha)


def _add_in_place(left: Any, right: Any, alpha: float = 1) -> Any:
    """In the same basis factors are added; anything else of the same shape is kept beside it."""
    if not (_is_sketched(left) and isinstance(right, Tensor) and right.shape == left.shape):
        return NotImplemented
    contents = left._contents
    rest: Tensor | None = right
    if isinstance(right, SketchedGrad) and _is_sketched(right):
        other = right._contents
        assert other.factor is not None
        if contents.is_blank and contents.basis != other.basis:
            contents.basis, contents.factor = other.basis, torch.zeros_like(other.factor)
        if contents.basis == other.basis:
            contents.factor.add_(other.factor, alpha=alpha)
            rest = other.rest
        else:
            _warn_of_two_bases()
    contents.is_blank = False
    if rest is not None:
        if isinstance(rest, _Wrapper):
            rest = rest._plain(to_write=False)
        if contents.rest is None:
            contents.rest = torch.zeros(left.shape, dtype=left.dtype, device=left.device)
        contents.rest.add_(rest, alpha=alpha)
    return left


def _norm(
    gradient: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, **kwargs: Any
) -> Any:
    if not _is_sketched(gradient):
        return NotImplemented
    if ord != 2 or dim is not None or keepdim or kwargs.get("dtype") is not None:
        return NotImplemented
    return gradient.norm_of_dense()


def _alias(gradient: Any) -> Any:
    if not isinstance(gradient, SketchedGrad):
        return NotImplemented
    return _wrap(gradient._contents, gradient)


def _clone(gradient: Any, **kwargs: Any) -> Any:
    if not isinstance(gradient, SketchedGrad):
        return NotImplemented
    return _wrap(gradient._contents.map(torch.clone), gradient)


def _foreach_norm(gradients: Any, ord: Any = 2, dtype: Any = None) -> Any:
    """Of factors in orthonormal bases, which have the norms of what they stand for, in one call."""
    plain = [
        gradient._contents.factor
        if ord == 2
        and dtype is None
        and isinstance(gradient, SketchedGrad)
        and gradient.is_isometric
        else gradient
        for gradient in gradients
    ]
    if not any(isinstance(gradient, _Wrapper) for gradient in plain):
        return aten._foreach_norm.Scalar(plain, ord)
    return [torch.linalg.vector_norm(gradient, ord, dtype=dtype) for gradient in gradients]


def _foreach_scale(func: Any) -> Callable[..., Any]:
    """A linear operator in place: on all parts of all gradients in one call."""

    def run(gradients: Any, numbers: Any) -> Any:
        parts = [
            gradient._contents.parts() if isinstance(gradient, SketchedGrad) else [gradient]
            for gradient in gradients
        ]
        if isinstance(numbers, list | tuple):
            numbers = [n for n, own in zip(numbers, parts, strict=True) for _ in own]
        func([part for own in parts for part in own], numbers)
        torch.autograd.graph.increment_version(gradients)

    return run


def _foreach_zero(gradients: Any) -> None:
    for gradient in gradients:
        gradient.zero_()
    torch.autograd.graph.increment_version(gradients)


def _unscale(gradients: Any, found_inf: Tensor, inverse_scale: Tensor) -> None:
    """GradScaler: a factor is finite where the gradient is, and scales with it."""
    plain = [
        part
        for gradient in gradients
        for part in (
            gradient._contents.parts() if isinstance(gradient, SketchedGrad) else [gradient]
        )
    ]
    aten._amp_foreach_non_finite_check_and_unscale_(plain, found_inf, inverse_scale)
    torch.autograd.graph.increment_version(g for g in gradients if isinstance(g, SketchedGrad))


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_in_place,
    aten.zero_.default: _zero_in_place,
    aten.linalg_vector_norm.default: _norm,
    aten.norm.Scalar: lambda gradient, p=2: _norm(gradient, p),
    aten._foreach_norm.Scalar: _foreach_norm,
    **{
        func: _foreach_scale(func)
        for func in (
            aten._foreach_mul_.Tensor,
            aten._foreach_mul_.Scalar,
            aten._foreach_mul_.ScalarList,
            aten._foreach_div_.Tensor,
            aten._foreach_div_.Scalar,
        )
    },
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
            aten.neg_.default,
            aten.mul_.Tensor,
            aten.mul_.Scalar,
            aten.div_.Tensor,
            aten.div_.Scalar,
        )
    },
}


def sketched_part(gradient: Tensor | None) -> SketchedGrad | None:
    """The sketched gradient that this is, or that this process has of a sharded one."""
    part = None if gradient is None else _torch.local_part(gradient)
    return part if isinstance(part, SketchedGrad) else None


def accumulate(weight: Tensor, gradient: Tensor) -> None:
    """Add a gradient to `weight.grad`, as autograd does; either may be sketched."""
    if weight.grad is None:
        weight.grad = gradient
    elif sketched_part(gradient) is not None and not (
        isinstance(weight.grad, ConsumedGrad) or sketched_part(weight.grad) is not None
    ):  # from a graph without sketches
        weight.grad = gradient.add_(weight.grad)
    else:
        weight.grad += gradient


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
            "optimizer.step() or zero_grad(set_to_none=True) after each backward pass"
        )
