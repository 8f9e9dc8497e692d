"""The graph inputs that receive sketched gradients, and how these reach `weight.grad`."""

import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from compact_fx import _torch
from compact_fx.plan import Plan, Proxy
from compact_fx.schedule import Drawn
from compact_fx.sketched_grad import Basis, ConsumedGrad, SketchedGrad

_Leaf = tuple[Basis, tuple[int, ...], torch.dtype, torch.device]
_proxies: MutableMapping[Tensor, dict[_Leaf, Tensor]] = WeakTensorKeyDictionary()
# What a checkpoint has recomputed in, until the gradient of the weight arrives.
_recomputed: MutableMapping[Tensor, Basis] = WeakTensorKeyDictionary()
_listeners: MutableMapping[Tensor, Callable[[Tensor], None]] = WeakTensorKeyDictionary()


def call_after_sketched_grad(weight: Tensor, listener: Callable[[Tensor], None]) -> None:
    """Call this with the weight whenever a backward pass has set or added to its sketched gradient.

    A weight's own accumulate hooks do not see these: autograd accumulates into the proxy.
    """
    _listeners[weight] = listener


def refuse_distributed() -> None:
    """Raise where other processes would exchange dense gradients that are not there."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        raise ValueError(
            'gradients="sketched" does not work with torch.distributed yet, which exchanges dense '
            'gradients: use gradients="dense"'
        )


class ProxyInputs:
    """The proxy inputs of one compiled graph."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._bases: MutableMapping[Drawn, list[Basis]] = weakref.WeakKeyDictionary()

    def proxies(self, arguments: Sequence[Any], drawn: Drawn) -> list[Tensor]:
        """One proxy for each weight whose gradient stays sketched, for the keys of this call."""
        proxies = self._plan.proxies
        if proxies:
            refuse_distributed()
        bases = self._bases.get(drawn)
        if bases is None:
            bases = self._bases[drawn] = [
                Basis(
                    projection=self._plan.projections[proxy.projection],
                    key=drawn.values[proxy.projection],
                    in_dim=proxy.in_dim,
                )
                for proxy in proxies
            ]
        recomputes = _torch.in_backward()
        leaves = []
        for proxy, basis in zip(proxies, bases, strict=True):
            weight = arguments[proxy.index]
            if recomputes:
                _recomputed[weight] = basis
            leaves.append(proxy_of(weight, proxy, basis))
        return leaves


def proxy_of(weight: Tensor, proxy: Proxy, basis: Basis) -> Tensor:
    """The weight's leaf for this basis: of the factor's shape, without memory of its own.

    A changed projection gets another leaf: a backward pass that comes late still delivers its
    gradient in the basis of its forward.
    """
    own = _proxies.setdefault(weight, {})
    kind = (basis, proxy.shape, weight.dtype, weight.device)
    if kind not in own:
        own.clear()  # leaves of old bases live on in the graphs that use them
        leaf = torch.zeros(1, dtype=weight.dtype, device=weight.device).expand(proxy.shape)
        leaf.requires_grad_()
        reference = weakref.ref(weight)
        leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda leaf: _deliver(leaf, reference(), basis)
        )
        own[kind] = leaf
    return own[kind]


def _deliver(leaf: Tensor, weight: Tensor | None, basis: Basis) -> None:
    factor, leaf.grad = leaf.grad, None
    if weight is None or factor is None:
        return
    if _recomputed.pop(weight, basis) != basis:
        raise RuntimeError(
            f"the projection of the weight of shape {tuple(weight.shape)} has changed between a "
            "checkpointed forward pass and its backward pass, and another forward pass came in "
            "between: call backward before optimizer.step()"
        )
    listener = _listeners.get(weight)
    if weight._backward_hooks or (listener is None and weight._post_accumulate_grad_hooks):
        raise RuntimeError(
            f"a hook of the weight of shape {tuple(weight.shape)} would not see its sketched "
            'gradient: exclude the weight, or use gradients="dense"'
        )
    gradient = SketchedGrad(factor, basis)
    if weight.grad is None:
        weight.grad = gradient
    elif isinstance(weight.grad, SketchedGrad | ConsumedGrad):
        weight.grad += gradient
    else:
        weight.grad = weight.grad + gradient.to_dense()
    if listener is not None:
        listener(weight)
