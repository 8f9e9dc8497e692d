"""What `fully_shard` spreads over processes: its sketched gradients, each process its rows."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from compact_fx import _torch
from compact_fx.config import CompactConfig
from compact_fx.projections import Basis
from compact_fx.training.exchange import Exchange, _Backward, _Slot, different_settings
from compact_fx.training.gradients import SketchedGrad, accumulate

if TYPE_CHECKING:
    from torch.distributed.tensor import Shard


class _ShardedArrival:
    """Parts of a gradient of a whole weight, which become this process's share of them."""

    def __init__(self, sharding: _torch.Sharding, basis: Basis, parts: dict[str, Tensor]) -> None:
        self.basis = basis
        self._parameter, self._parts = sharding.parameter, parts

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    def replace(self, part: str, averaged: Tensor) -> None:
        self._parts[part] = averaged

    def put_back(self) -> None:
        like = _torch.local_part(self._parameter)
        parts = {name: part.to(like) for name, part in self._parts.items()}
        gradient = SketchedGrad(parts.pop("factor"), self.basis)
        for name, part in parts.items():
            gradient.replace(name, part)
        accumulate(self._parameter, _torch.with_part(self._parameter, gradient))


class ShardedExchange(Exchange):
    """Averages the factors of one model's sharded weights: each rank gets its part of them.

    Dense gradients are not sent here: `fully_shard` does that. A factor has its weight's size in
    the dimension that is sharded, and is sent as `fully_shard` sends gradients: in the same dtype,
    with the same divisor. While it sends none (`set_requires_gradient_sync(False)`), factors are
    kept here, and go with the next pass in which it does.
    """

    def __init__(self, group: "dist.ProcessGroup") -> None:
        self._shardings: dict[str, _torch.Sharding] = {}
        self._counts: list[Callable[[], int]] = []
        self._kept: dict[str, tuple[SketchedGrad, str]] = {}
        super().__init__({}, group, lambda: [count() for count in self._counts])

    def add(self, sharding: _torch.Sharding, steps: Callable[[], int]) -> None:
        """One more weight, on all ranks, and how many steps it has seen."""
        self._shardings[sharding.name] = sharding
        self._weights[sharding.name] = weakref.ref(sharding.weight)
        self._counts.append(steps)

    def check_settings(self, mine: Mapping[str, str]) -> None:
        """Raise where ranks have others: `fully_shard` would send what does not fit together."""
        if (found := self.difference(mine)) is not None:
            name, rank, theirs = found
            raise different_settings(name, {rank: theirs, dist.get_rank(): mine.get(name)})

    def receive(
        self, weight: Tensor, factor: Tensor, basis: Basis, name: str, settings: str
    ) -> None:
        """A factor has arrived for a weight, without autograd; `fully_shard` does not see it."""
        sharding = self._shardings[name]
        factor = factor.to(sharding.reduce_dtype or factor.dtype)
        parts = {"factor": factor}
        if name in self._kept or not sharding.is_reduced:
            gradient = SketchedGrad(factor, basis)
            if name in self._kept:
                kept, _ = self._kept.pop(name)
                kept.add_(gradient)
                gradient = kept
            if not sharding.is_reduced:
                self._kept[name] = gradient, settings
                return
            basis, parts = gradient.basis, gradient.parts()
        self._take_parts(self._backward(), sharding, basis, parts, settings)

    def _take_parts(
        self,
        backward: _Backward,
        sharding: _torch.Sharding,
        basis: Basis,
        parts: dict[str, Tensor],
        settings: str,
    ) -> None:
        """Send what a weight's gradient is the sum of."""
        arrival = _ShardedArrival(sharding, basis, parts)
        self._take(backward, arrival, sharding.name, settings, sharding.divisor)

    def _take_kept(self, backward: _Backward) -> None:
        """What was kept goes now, also of weights that this pass has given nothing."""
        for name, (gradient, settings) in list(self._kept.items()):
            sharding = self._shardings[name]
            if sharding.is_reduced:
                del self._kept[name]
                self._take_parts(backward, sharding, gradient.basis, gradient.parts(), settings)

    def _launch(self, backward: _Backward) -> None:
        if backward.works:  # as fully_shard does: whole factors of one bucket are there at once
            backward.works.pop().wait()
        super()._launch(backward)

    def _send(
        self, bucket: Sequence[_Slot], tensors: Sequence[Tensor], shares: Tensor
    ) -> tuple[Any, Sequence[Tensor], Tensor]:
        ranks, me = len(self.ranks), self.ranks.index(dist.get_rank())
        dims = [self._shardings[slot.weight].dim for slot in bucket]
        rows = [_rows(tensor, dim, ranks) for tensor, dim in zip(tensors, dims, strict=True)]
        flat = torch.cat([*rows, shares.expand(ranks, -1)], 1)
        flat.div_(self._forms[bucket[0]].divisor)
        mine = flat.new_empty(flat.shape[1])
        work = _torch.reduce_scatter(mine, flat.view(-1), self._group)
        *averaged, shares = torch.split(mine, [*(row.shape[1] for row in rows), len(bucket)])
        own = [
            _own_part(mean, tensor.shape, dim, ranks, me)
            for mean, tensor, dim in zip(averaged, tensors, dims, strict=True)
        ]
        return work, own, shares


def shard_placement(parameter: nn.Parameter) -> "Shard | None":
    """For `fully_shard(..., shard_placement_fn=shard_placement)`: shard the larger dimension.

    Tracked projections, the default, take the smaller dimension of a weight away, so that its
    factor can be sharded as it is. With others leave it out.

    Args:
        parameter: what `fully_shard` asks for.

    Returns:
        The second dimension of a matrix with fewer rows than columns; None, which is the first, for
        all else: where processes could not have equal parts of it, and below `min_features` rows.
    """
    from torch.distributed.tensor import Shard

    if parameter.dim() != 2:
        return None
    rows, columns = parameter.shape
    is_wide = CompactConfig.min_features <= rows < columns
    return Shard(1) if is_wide and columns % dist.get_world_size() == 0 else None


def _chunk(size: int, ranks: int) -> int:
    """How much each rank gets, as of `torch.chunk`; the last ones less or nothing."""
    return -(-size // ranks)


def _rows(tensor: Tensor, dim: int, ranks: int) -> Tensor:
    """(ranks, the part of each): chunks of `dim` as of `torch.chunk`, zeros up to their size."""
    chunk = _chunk(tensor.shape[dim], ranks)
    missing = chunk * ranks - tensor.shape[dim]
    if missing:
        tensor = F.pad(tensor.movedim(dim, -1), (0, missing)).movedim(-1, dim)
    if not dim:
        return tensor.reshape(ranks, -1)
    shape = (*tensor.shape[:dim], ranks, chunk, *tensor.shape[dim + 1 :])
    return tensor.reshape(shape).movedim(dim, 0).flatten(1)


def _own_part(row: Tensor, shape: torch.Size, dim: int, ranks: int, me: int) -> Tensor:
    """What a row of `_rows` holds of a tensor of this shape, for the rank whose row it is."""
    chunk = _chunk(shape[dim], ranks)
    here = max(0, min(chunk, shape[dim] - me * chunk))
    part = row.view(*shape[:dim], chunk, *shape[dim + 1 :])
    return part if here == chunk else part.narrow(dim, 0, here)
