"""Several processes: what DistributedDataParallel exchanges, and what is exchanged here."""

import functools
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from compact_fx import _torch
from compact_fx.training.exchange import Exchange
from compact_fx.training.followed import note_change
from compact_fx.training.gradients import SketchedGrad
from compact_fx.training.sharded import ShardedExchange
from compact_fx.training.weights import WeightRecord, record_of


def exchange_factors(model: nn.Module, process_group: "dist.ProcessGroup | None" = None) -> None:
    """Exchange sketched gradients under DistributedDataParallel; call it before that is made.

    From then on DistributedDataParallel leaves weights of two and more dimensions alone, but those
    of embeddings. They get the first rank's values here, and their gradients are averaged over
    ranks as they arrive: as factors where sketched, dense elsewhere. Without torch.distributed
    nothing is done. A call for each DistributedDataParallel that is made of the model is in order.

    Args:
        model: what DistributedDataParallel is given, on all ranks.
        process_group: what it will use; all processes by default.

    Raises:
        ValueError: DistributedDataParallel has the weights already, or would have none left; ranks
            have other weights; or a call before this one was for other weights or processes.
    """
    if not _torch.is_distributed():
        return
    model = _torch.uncompiled(model)
    weights, others = _weights_of(model)
    if isinstance(model, nn.parallel.DistributedDataParallel) or _torch.is_in_ddp(weights.values()):
        raise ValueError(
            "exchange_factors(model) comes before DistributedDataParallel(model): it decides then "
            "whose gradients it exchanges"
        )
    if any(map(_torch.is_sharded, weights.values())):
        raise ValueError(
            "exchange_factors is for DistributedDataParallel: with fully_shard no call is needed"
        )
    records = [record_of(weight) for weight in weights.values()]
    before = {record.exchange for record in records} - {None}
    if any(e is not None and not e.is_of(weights, process_group) for e in before):
        raise ValueError(
            "exchange_factors was called for weights of this model before, with another module, "
            "other weights that require a gradient, or another process_group: call it once "
            "for all, with the module that DistributedDataParallel is given"
        )
    if not others:
        raise ValueError(
            "DistributedDataParallel needs a parameter that requires a gradient besides those that "
            'exchange_factors takes, such as a bias or a norm: use gradients="dense" without '
            "exchange_factors, or leave one more parameter unfrozen"
        )
    exchange = next(iter(before), None) or Exchange(
        weights, process_group, lambda: [record.steps for record in records]
    )
    exchange.check_weights()
    _torch.ignore_in_ddp(model, weights.values())
    exchange.send_weights()
    exchange.listen_to(others)
    for (name, weight), record in zip(weights.items(), records, strict=True):
        if record.exchange is not None:
            continue
        record.exchange, record.name = exchange, name
        weight.register_post_accumulate_grad_hook(_on_dense)  # type: ignore[no-untyped-call]
    note_change()


def _weights_of(model: nn.Module) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The weights to exchange by name, and other parameters with a gradient."""
    own = {
        weight
        for module in model.modules()
        if not isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for weight in module.parameters(recurse=False)
        if weight.dim() > 1
    }
    named = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    weights: dict[str, Tensor] = {n: weight for n, weight in named.items() if weight in own}
    return weights, [parameter for name, parameter in named.items() if name not in weights]


def exchange_shards(
    records: Mapping[int, WeightRecord], dims: Mapping[int, int], settings: Mapping[int, str]
) -> None:
    """From now on the weights among these that `fully_shard` gathers exchange over its processes.

    Args:
        records: of one graph, by the graph's input; all ranks ask for the same.
        dims: which dimension of the weight a factor has not, where the gradient is one.
        settings: what all ranks need to have alike, as `fully_shard` sends what these leave.

    Raises:
        ValueError: they are sharded as no factor can be, or ranks have different settings; weights
            exchange nothing then.
    """
    sharded = {i: r.sharding for i, r in records.items() if r.sharding is not None}
    new: dict[ShardedExchange, dict[str, str]] = {}
    for index, sharding in sharded.items():
        if sharding.is_replicated:
            raise ValueError(
                f"{sharding.name} is replicated over processes besides being sharded (HSDP): "
                "sketched gradients and tracked projections need fully_shard over a mesh of one "
                "dimension; or use gradients='dense' with another projection"
            )
        if dims.get(index) == sharding.dim:
            raise ValueError(
                f"{sharding.name} is sharded in dimension {sharding.dim}, which its sketch takes "
                "away: call fully_shard before the first compiled forward pass, and shard equal "
                "blocks alike"
            )
        if records[index].exchange is None:
            new.setdefault(_exchange_of(sharding), {})[sharding.name] = settings[index]
    for exchange, own in new.items():
        exchange.check_settings(own)
    for index, sharding in sharded.items():
        record = records[index]
        if record.exchange is None:
            record.exchange, record.name = _exchange_of(sharding), sharding.name
            record.exchange.add(sharding, functools.partial(getattr, record, "steps"))


def _exchange_of(sharding: _torch.Sharding) -> ShardedExchange:
    """One for all weights of a model that the same processes have parts of."""
    by_ranks = _exchanges.setdefault(sharding.root, {})
    ranks = tuple(dist.get_process_group_ranks(sharding.group))
    if ranks not in by_ranks:
        by_ranks[ranks] = ShardedExchange(sharding.group)
    return by_ranks[ranks]


_exchanges: MutableMapping[Any, dict[tuple[int, ...], ShardedExchange]]
_exchanges = weakref.WeakKeyDictionary()


def before_forward(records: Sequence[WeightRecord], *, is_shared: bool) -> None:
    """Before a graph runs with these weights: their gradients will be exchanged, or not.

    is_shared: whether ranks have to exchange more than dense gradients.

    Raises:
        ValueError: there are several processes, and something that they would have to exchange
            would not be.
    """
    if not _torch.is_distributed():
        return
    ddp = _torch.active_ddp()
    is_alone = ddp is None and dist.get_world_size() == 1
    for record in records:
        if is_alone and record.sharding is None:
            continue
        if record.listener is not None:
            raise ValueError(
                "step_in_backward=True steps before gradients are averaged over processes: set it "
                "to False"
            )
        if is_shared and record.exchange is None:
            if any(r.exchange is not None and r.sharding is None for r in records):
                raise ValueError(
                    "a weight that was frozen, or not in the model yet, when "
                    "exchange_factors(model) was called is not exchanged, nor does "
                    "DistributedDataParallel exchange it: unfreeze it before the call"
                )
            raise ValueError(
                "with torch.distributed sketched gradients and tracked projections need "
                "compact_fx.exchange_factors(model), after init_process_group and before "
                "DistributedDataParallel(model), or fully_shard(model) (FSDP2) before the first "
                "compiled forward pass; or use gradients='dense' with another projection"
            )
    for exchange in {record.exchange for record in records if record.exchange is not None}:
        exchange.begin_forward(ddp)


@_torch.untraced  # a compiled function may call backward()
def _on_dense(weight: Tensor) -> None:
    """A gradient of the weight itself; autograd also calls this where it gives none."""
    gradient = weight.grad
    if gradient is not None and not (
        isinstance(gradient, SketchedGrad) and gradient.factor is not None
    ):
        record_of(weight).exchange_gradient(weight)


_on_dense.is_compact = True  # type: ignore[attr-defined]
