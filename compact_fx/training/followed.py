"""Tracked projections from step to step: what each has seen, and when it changes."""

import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.errors import warn_at_caller
from compact_fx.projections import (
    Projection,
    TrackedBasis,
    Version,
    fold_in,
    follow,
    matrix_of,
)
from compact_fx.training.exchange import Exchange
from compact_fx.training.watch import Energies


def first_version(projection: Projection, seed: int, device: torch.device) -> Version:
    """P for the first step."""
    return Version(projection(seed, device=device), 0)


class Followed:
    """One tracked projection that weights share, in whatever graph.

    Attributes:
        version: of P, now.
        gradient: Y, summed since P has changed, float32; None where nothing has arrived.
        changed_at: steps of its weights when it changed last.
        dtype: of its next version: the widest that a graph has asked for.
        interval: steps until it changes again (None before a graph has used it), `columns`: how
            many then follow, and `energies`: what is reported; as the graph that has looked at it
            last says.
        exchange: between the processes that have it in common.
    """

    def __init__(
        self,
        projection: Projection,
        seed: int,
        steps: Callable[[], int],
        version: Version,
        gradient: Tensor | None = None,
        changed_at: int = 0,
    ) -> None:
        self.projection = projection
        self.seed = seed
        self.count_by(steps)
        self.version = version
        self.gradient = gradient
        self.changed_at = changed_at
        self.dtype = version.matrix.dtype
        self.interval: int | None = None
        self.columns = 0
        self.energies: Energies = []
        self.exchange: Exchange | None = None
        self._room: Tensor | None = None  # where Y is: lasting tensors stay where they are
        self._leaves: dict[torch.dtype, Tensor] = {}
        _all.append(weakref.ref(self))

    def count_by(self, steps: Callable[[], int]) -> None:
        """A method of those whom it belongs to, without which it goes at once."""
        self._steps = weakref.WeakMethod(steps)

    def steps(self) -> int:
        """Of its weights."""
        steps = self._steps()
        return self.changed_at if steps is None else steps()

    def basis(self, projection: Projection, seed: int) -> TrackedBasis:
        """P as it is now, in this dtype, of a run with this seed."""
        return TrackedBasis(projection=projection, seed=seed, version=self.version, dim=1)

    def take_up(self, dtype: torch.dtype, device: torch.device) -> None:
        """A graph uses it in this dtype, on this device."""
        self.dtype = torch.promote_types(self.dtype, dtype)
        if self.version.matrix.device != device:
            self.version = Version(self.version.matrix.to(device), self.version.generation)
            self.gradient = None if self.gradient is None else self.gradient.to(device)
            self._room = None
            self._leaves.clear()
            note_change()
        # A weight that is gone may have had more steps than those that go on.
        self.changed_at = min(self.changed_at, self.steps())

    def leaf(self, dtype: torch.dtype, place: Tensor | None = None) -> Tensor:
        """P as a graph gets it: a leaf whose gradient is Y.

        A changed P gets another leaf: a backward pass that comes late says nothing of the new one.

        Args:
            place: memory of the leaf, which P is written into; by default P's own.
        """
        if place is not None:
            return self._leaf_of(place.copy_(self.version.matrix))
        if dtype not in self._leaves:
            self._leaves[dtype] = self._leaf_of(self.version.matrix.to(dtype))
        return self._leaves[dtype]

    def _leaf_of(self, matrix: Tensor) -> Tensor:
        with torch.inference_mode(False):
            leaf = matrix.detach().view(matrix.shape).requires_grad_()
        reference, version = weakref.ref(self), self.version
        leaf.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda leaf: _receive(leaf, reference(), version)
        )
        return leaf

    def receive(self, gradient: Tensor) -> None:
        """Add what a backward pass says to Y."""
        if self.gradient is not None:
            self.gradient.add_(gradient)
            return
        if self._room is None:
            self._room = torch.empty_like(self.version.matrix, dtype=torch.float32)
        self.gradient = self._room.copy_(gradient)

    @property
    def due_at(self) -> int:
        """With how many steps P changes before its next use: with one, then every interval."""
        assert self.interval is not None
        return self.changed_at + (self.interval if self.version.generation else 1)

    @property
    def is_due(self) -> bool:
        """Whether P changes before its next use."""
        return self.interval is not None and self.steps() >= self.due_at

    @property
    def since(self) -> int:
        """Steps since P has changed; 0 where the weights that had more are not here."""
        return max(0, self.steps() - self.changed_at)

    def set_back(self) -> None:
        """Its weights have seen fewer steps: what it has become since is forgotten."""
        steps, self.gradient = self.steps(), None
        if self.changed_at > steps:
            device = self.version.matrix.device
            self.version, self.changed_at = first_version(self.projection, self.seed, device), 0
            self.energies[:] = [(at, share) for at, share in self.energies if at <= steps]
            self._leaves.clear()

    def change(self, matrix: Tensor | None, energy: float) -> None:
        """P is another from now on, or stays for want of a gradient (None)."""
        steps = self.steps()
        if not math.isnan(energy):
            self.energies.append((steps, energy))
        self.gradient, self.changed_at = None, steps
        if matrix is None:
            _warn_of_none()
            return
        self.version = Version(matrix, self.version.generation + 1)
        self._leaves.clear()
        note_change()


_MOST_ELEMENTS = 2**24  # of P's that change at once: some ten times as much is alive in float64

_all: "list[weakref.ref[Followed]]" = []
_changes = 0


def changes() -> int:
    """How often projections, or what they depend on, have changed; one step more does not count."""
    return _changes


def note_change() -> None:
    """What graphs are given may be another than before."""
    global _changes
    _changes += 1


def versions_in_use() -> list[Version]:
    """Of all tracked projections of this process."""
    return [followed.version for reference in _all if (followed := reference()) is not None]


@_torch.untraced  # a compiled function may call backward()
@torch.no_grad()
def _receive(leaf: Tensor, followed: Followed | None, version: Version) -> None:
    gradient, leaf.grad = leaf.grad, None
    if gradient is None or followed is None or followed.version is not version:
        return
    followed.receive(gradient)


@functools.cache
def _warn_of_none() -> None:
    warn_at_caller(
        "a tracked projection stays as it is: its weights had no finite gradient other than 0 "
        "since it changed last",
    )


@torch.no_grad()
def change_those_due() -> None:
    """Every tracked projection that is due, those of one shape in one batch."""
    everything = [(reference, followed) for reference in _all if (followed := reference())]
    _all[:] = [reference for reference, _ in everything]
    due = [followed for _, followed in everything if followed.is_due]
    share_gradients(due)
    alike: dict[tuple[object, ...], list[Followed]] = {}
    for followed in due:
        p = followed.version.matrix
        key = (p.shape, followed.dtype, p.device, followed.columns, followed.exchange)
        alike.setdefault(key, []).append(followed)
    for members in alike.values():
        seen = [m for m in members if m.gradient is not None]
        for member in members:
            if member.gradient is None and member.version.generation:
                member.change(None, math.nan)
            elif member.gradient is None:  # it changes after the first step with one
                member.changed_at = member.steps()
        size = max(1, _MOST_ELEMENTS // members[0].version.matrix.numel())
        for i in range(0, len(seen), size):
            _change_at_once(seen[i : i + size])


@torch.no_grad()
def share_gradients(some: Iterable[Followed]) -> None:
    """Every rank has the mean of what all ranks have seen: later means are the same for that.

    Raises:
        RuntimeError: others are to be shared on another rank.
    """
    some = dict.fromkeys(some)
    for exchange in dict.fromkeys(f.exchange for f in some if f.exchange is not None):
        _average([f for f in some if f.exchange is exchange], exchange)


def _average(some: Sequence[Followed], exchange: Exchange) -> None:
    mine = [(f.projection, f.seed, f.version.generation, f.columns) for f in some]
    everyone = exchange.gather((mine, [f.gradient is not None for f in some]))
    if any(theirs != mine for theirs, _ in everyone):
        raise RuntimeError(
            "ranks change different tracked projections: use the same settings, weights and steps "
            "on all of them"
        )
    heard = [any(has) for has in zip(*(has for _, has in everyone), strict=True)]
    seen = [f for f, any_has in zip(some, heard, strict=True) if any_has]
    for f in seen:
        if f.gradient is None:
            f.receive(torch.zeros((), device=f.version.matrix.device))
    if seen:
        exchange.average([f.gradient for f in seen if f.gradient is not None])


def _change_at_once(alike: "list[Followed]") -> None:
    """Those of one shape, dtype, device and number of columns."""
    device, dtype = alike[0].version.matrix.device, alike[0].dtype
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
        new, kept, held = follow(
            torch.stack([m.version.matrix for m in alike]).to(dtype),
            torch.stack([m.gradient for m in alike if m.gradient is not None]),
            torch.stack([_explored(m) for m in alike]),
            alike[0].columns,
        )
    exchange = alike[0].exchange
    if exchange is not None:  # another kind of device may round in its own way
        exchange.send([new, kept, held])
    changed = zip(alike, new.unbind(), kept.tolist(), held.tolist(), strict=True)
    for member, matrix, stays, energy in changed:
        member.change(None if stays else matrix.clone(), math.nan if stays else energy)


def _explored(followed: Followed) -> Tensor:
    """Random directions for its next version, (features, columns that do not follow)."""
    p, version = followed.projection, followed.version
    columns = p.rank - followed.columns
    if not columns:
        return version.matrix.new_empty(p.features, 0, dtype=torch.float32)
    key = fold_in(followed.seed, p.salt, version.generation + 1)
    source = torch.full((), key, dtype=torch.int64, device=version.matrix.device)
    return matrix_of(source, p.features, columns, "gaussian", torch.float32)
