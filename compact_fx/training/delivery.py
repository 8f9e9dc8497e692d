"""How a factor reaches `weight.grad`: a leaf receives it, a hook moves it on."""

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.projections import Basis
from compact_fx.training.weights import WeightRecord, described


def is_own_hook(hook: object) -> bool:
    """Whether a hook is one of this package's own optimizers."""
    return getattr(hook, "is_compact", False)


def refuse_hooks(weights: Iterable[Tensor]) -> None:
    """Raise, before anything runs, where a hook would be called without its gradient."""
    for weight in weights:
        own = weight._post_accumulate_grad_hooks
        if weight._backward_hooks or (own and not all(map(is_own_hook, own.values()))):
            raise RuntimeError(
                f"a hook of the weight of shape {described(weight)} would not see its sketched "
                'gradient: exclude the weight, or use gradients="dense"'
            )


def empty_leaf(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A leaf of this shape, with one element."""
    return weight.detach().new_zeros(1).expand(shape).requires_grad_()


def leaf_of(
    weight: Tensor,
    record: WeightRecord,
    shape: tuple[int, ...],
    basis: Basis,
    place: Tensor | None = None,
) -> Tensor:
    """A leaf of the factor's shape, without memory of its own, that delivers in this basis.

    A changed projection gets another leaf: a backward pass that comes late still delivers its
    gradient in the basis of its forward.

    Args:
        record: the weight's.
        place: where its element is.
    """
    leaf = empty_leaf(weight, shape) if place is None else place.requires_grad_()
    reference = weakref.ref(weight)
    leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        lambda leaf: _deliver(leaf, reference(), record, basis)
    )
    return leaf


@_torch.untraced  # a compiled function may call backward()
def _deliver(leaf: Tensor, weight: Tensor | None, record: WeightRecord, basis: Basis) -> None:
    factor, leaf.grad = leaf.grad, None
    if weight is None or factor is None or not weight.requires_grad:
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True with sketched gradients: what depends on the gradient of a weight, "
            f"of shape {described(weight)}, would drop out of the loss. Exclude the weight, or "
            'use gradients="dense"'
        )
    recomputed, record.recomputed = record.recomputed, None
    if recomputed is not None and recomputed != basis:
        raise RuntimeError(
            f"the projection of the weight of shape {described(weight)} has changed between a "
            "checkpointed forward pass and its backward pass, and another forward pass came in "
            "between: call backward before optimizer.step()"
        )
    refuse_hooks([weight])
    record.deliver(weight, factor, basis)
    if record.listener is not None:
        record.listener(weight)
