"""One record for each weight: its steps, its projection, and who wants to hear of its gradient."""

import functools
import weakref
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakTensorKeyDictionary

from compact_fx import _torch
from compact_fx.errors import warn_at_caller
from compact_fx.plan import Side
from compact_fx.projections import Basis, Projection, Version
from compact_fx.training.exchange import Exchange
from compact_fx.training.followed import Followed, first_version, note_change
from compact_fx.training.gradients import SketchedGrad, accumulate, sketched_part
from compact_fx.training.watch import Watch


class Group:
    """Weights that are sketched with one projection, in whatever graph: q, k and v of a block.

    Attributes:
        salt: of their projection.
        followed: by features, rank and seed, where it is a tracked one.
    """

    def __init__(self, salt: int) -> None:
        self.salt = salt
        self.followed: dict[tuple[int, int, int], Followed] = {}
        self._members: list[weakref.ref[WeightRecord]] = []
        self._merged_into: Group | None = None

    @property
    def steps(self) -> int:
        """The most that one of the weights has seen; says which version the projection has."""
        most = 0
        for reference in self._members:
            record = reference()
            if record is not None and record.steps > most:
                most = record.steps
        return most

    def steps_so_far(self) -> int:
        """`steps`, as what depends on them asks."""
        return self.root().steps

    def follow(self, projection: Projection, seed: int, device: torch.device) -> Followed:
        """Its tracked projection of this shape; a new one begins at random."""
        key = (projection.features, projection.rank, seed)
        if key not in self.followed:
            version = first_version(projection, seed, device)
            self.followed[key] = Followed(projection, seed, self.steps_so_far, version)
        return self.followed[key]

    def root(self) -> "Group":
        """The group that this one has become."""
        group = self
        while group._merged_into is not None:
            group = group._merged_into
        return group

    def add(self, record: "WeightRecord") -> None:
        """From now on the weight, and all that it shared one with, have this projection."""
        here = self.root()
        before = here.steps
        other = here if record.group is None else record.group.root()
        if other is not here:
            other._merged_into = here
            here._members += other._members
            for key, theirs in other.followed.items():
                followed = here.followed.setdefault(key, theirs)
                if followed.version is theirs.version:  # by the weight that has seen more steps
                    followed.changed_at = max(followed.changed_at, theirs.changed_at)
            for followed in here.followed.values():
                followed.count_by(here.steps_so_far)
        elif record.group is None:
            here._members.append(weakref.ref(record))
        record.group = here
        if other is not here or here.steps != before:
            note_change()


class WeightRecord:
    """What is known of one weight from step to step.

    A step of a weight: an optimizer has used a gradient of it that no other optimizer has used
    before. A wrapper around an optimizer, and a second optimizer, do not count again; a weight
    without a gradient, or a step that GradScaler skips, does not count at all.

    Attributes:
        number: how many there were when it was made.
        steps: since the weight was first asked for, or as resumed.
        is_stepped: whether any was seen.
        group: with which weights it shares a projection; None before its first graph.
        side: that a graph sketches it on; None before its first.
        basis: the last that a graph has used for it.
        is_factor: whether its gradient is a factor.
        in_graph: whether a sketched graph has run with it since its last step, and
        in_dense_graph: whether one that makes its gradient dense, G P Pᵀ, has.
        recomputed: what a checkpoint has recomputed in, until the gradient arrives.
        listener: called with the weight when a sketched gradient has arrived.
        watch: of the backend that compiled its graph, and settings: of that as text.
        sharding: of what `fully_shard` gathers; None elsewhere.
        exchange: averages its gradient over processes, under its name; None elsewhere.
        name: in the model or, where nobody has said that, in its graph; empty before.
    """

    made = 0  # how many there have been

    def __init__(self) -> None:
        WeightRecord.made += 1
        self.number = WeightRecord.made
        self.steps = 0
        self.is_stepped = False
        self.group: Group | None = None
        self.side: Side | None = None
        self.basis: Basis | None = None
        self.is_factor = False
        self.in_graph = False
        self.in_dense_graph = False
        self.recomputed: Basis | None = None
        self.listener: Callable[[Tensor], None] | None = None
        self.watch: Watch | None = None
        self.settings = ""
        self.sharding: _torch.Sharding | None = None
        self.exchange: Exchange | None = None
        self.name = ""
        self._used: tuple[weakref.ref[Tensor], int] | None = None
        self._user: weakref.ref[Optimizer] | None = None

    def use(self, gradient: Tensor, optimizer: Optimizer) -> bool:
        """An optimizer has made a step with this gradient; whether a sketched graph has made it."""
        used, user = self._used, self._user
        is_old = used is not None and used[0]() is gradient and used[1] == gradient._version
        if is_old and user is not None and user() is not optimizer:
            return True
        self._used = (weakref.ref(gradient), gradient._version)
        self._user = weakref.ref(optimizer)
        was_in_graph = self.in_graph or is_old
        self.count()
        return was_in_graph

    @property
    def is_counted(self) -> bool:
        """Whether an optimizer that is seen has stepped the weight since its last graph."""
        return not self.in_graph and self._user is not None and self._user() is not None

    def count(self) -> None:
        """One step more."""
        self.in_graph = self.in_dense_graph = False
        self.is_stepped = True
        self.steps += 1

    def deliver(self, weight: Tensor, factor: Tensor, basis: Basis) -> None:
        """A factor has arrived for the weight."""
        if self.exchange is None:
            accumulate(weight, SketchedGrad(factor, basis))
        else:
            self.exchange.receive(weight, factor, basis, self.name, self.settings)

    def exchange_gradient(self, weight: Tensor) -> None:
        """Something has arrived in `weight.grad`, which other processes want to have."""
        if self.exchange is not None:
            self.exchange.arrive(weight, self.name, self.settings)

    def followed(self, basis: Basis) -> Followed | None:
        """The tracked projection that this basis is a version of."""
        if self.group is None or not basis.projection.is_tracked:
            return None
        key = (basis.projection.features, basis.projection.rank, basis.seed)
        return self.group.root().followed.get(key)

    def restore_followed(
        self, basis: Basis, version: Version, gradient: Tensor | None, changed_at: int
    ) -> None:
        """A tracked projection goes on where a saved run has left it."""
        assert self.group is not None
        group, projection = self.group.root(), basis.projection
        gradient = None if gradient is None else gradient.clone()  # others have the same
        group.followed[projection.features, projection.rank, basis.seed] = Followed(
            projection, basis.seed, group.steps_so_far, version, gradient, changed_at
        )

    def restore_salt(self, salt: int) -> Group:
        """The projection is that of a saved run."""
        if self.group is None:
            Group(salt).add(self)
        assert self.group is not None
        group = self.group.root()
        group.salt = salt
        return group


_records: MutableMapping[Tensor, WeightRecord] = WeakTensorKeyDictionary()


def known_record(weight: Tensor) -> WeightRecord | None:
    """The weight's record, None if nobody has asked for one."""
    return _records.get(weight)


def described(weight: Tensor) -> str:
    """For messages: the shape and, where it is known, the name."""
    record = known_record(weight)
    name = "" if record is None else record.name
    return f"{tuple(weight.shape)} ({name})" if name else f"{tuple(weight.shape)}"


def any_sketched() -> bool:
    """Whether a graph has asked for a projection of any weight, of whatever model."""
    return any(record.group is not None for record in _records.values())


def sharded_shapes() -> set[torch.Size]:
    """The shapes of all weights that `fully_shard` gathers for a sketched graph."""
    return {weight.shape for weight, record in _records.items() if record.sharding is not None}


def record_of(weight: Tensor) -> WeightRecord:
    """The weight's record; a sharded weight and what FSDP gathers of it have one."""
    record = _records.get(weight)
    if record is None:
        _watch_optimizers()
        sharding = _torch.sharding_of(weight)
        twin = None if sharding is None else sharding.parameter
        record = (_records.get(twin) if twin is not None else None) or WeightRecord()
        record.sharding = sharding
        for tensor in (weight, twin):
            if tensor is not None:
                _records[tensor] = record
    return record


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_on_step)


_Known = list[tuple[Tensor, WeightRecord | None]]


class _Began:
    """A step of an optimizer that has begun.

    Attributes:
        known: its weights and their records.
        steps: that each had seen, by record.
        had_gradients: the records of those that had a gradient; of none where a closure makes it.
    """

    def __init__(self, optimizer: Optimizer, has_closure: bool) -> None:
        self.known, self._made = _known(optimizer), WeightRecord.made
        self.steps = {record: record.steps for _, record in self.known if record is not None}
        self.had_gradients = {
            record
            for weight, record in self.known
            if record is not None and weight.grad is not None and not has_closure
        }

    def known_now(self, optimizer: Optimizer) -> _Known:
        """The same at the end of the step, without weights that another one within it stepped."""
        is_same = [*map(id, _weights_of(optimizer))] == [id(weight) for weight, _ in self.known]
        known = self.known if is_same and self._made == WeightRecord.made else _known(optimizer)
        return [(w, r) for w, r in known if r is None or r.steps <= self._steps_before(r)]

    def _steps_before(self, record: WeightRecord) -> int:
        is_new = record.number > self._made
        return self.steps.get(record, 0 if is_new else record.steps)


# A step may be within another of the same optimizer: a subclass calls that of its base.
_began: MutableMapping[Optimizer, list[_Began]] = weakref.WeakKeyDictionary()


def _weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def _known(optimizer: Optimizer) -> _Known:
    return [(weight, _records.get(weight)) for weight in _weights_of(optimizer)]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    has_closure = any(map(callable, (*args[1:], *kwargs.values())))  # it makes other gradients
    _began.setdefault(optimizer, []).append(_Began(optimizer, has_closure))


def _on_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    # Without a beginning where the first record was made within the step.
    began = _began[optimizer].pop() if _began.get(optimizer) else _Began(optimizer, True)
    if getattr(optimizer, "_step_in_backward", False):  # it counts each weight itself
        return
    if is_skipped(optimizer):
        return
    weights = began.known_now(optimizer)
    _use_gradients(optimizer, weights)
    if weights and all(weight.grad is None for weight, _ in weights):  # cleared within the step
        for record in began.had_gradients:
            if record.steps == began.steps[record]:
                _warn_of_dense_step(optimizer, [record] if record.is_factor else [])
                record.count()


def is_skipped(optimizer: Optimizer) -> bool:
    """Whether this step is a fused one that GradScaler skips."""
    return bool(getattr(optimizer, "found_inf", None))  # a tensor; the number 0 without gradients


def use_gradient(optimizer: Optimizer, weight: Tensor) -> None:
    """An optimizer has made a step with the gradient of this weight."""
    _use_gradients(optimizer, [(weight, _records.get(weight))])


def _use_gradients(optimizer: Optimizer, weights: _Known) -> None:
    unsketched: set[Watch] = set()
    counted: list[tuple[Tensor, WeightRecord]] = []
    for weight, record in weights:
        gradient = weight.grad
        if gradient is None or record is None:
            continue
        before = record.steps
        sketched = record.use(gradient, optimizer)
        if not sketched and record.watch is not None:
            unsketched.add(record.watch)
        elif record.steps > before:
            counted.append((gradient, record))
    for watch in unsketched:
        watch.stepped_unsketched()
    _warn_of_dense_step(optimizer, (r for g, r in counted if sketched_part(g) is not None))


def _warn_of_dense_step(optimizer: Optimizer, records: Iterable[WeightRecord]) -> None:
    if hasattr(optimizer, "_step_in_backward"):  # it knows factors
        return
    for watch in {record.watch for record in records if record.watch is not None}:
        watch.stepped_densely(type(optimizer).__name__)


@functools.cache
def _warn_of_second_count() -> None:
    warn_at_caller(
        "count_step counts a step that an optimizer has counted already: leave the call away where "
        "an optimizer holds the model's own weights"
    )


def count_step(weights: Iterable[Tensor]) -> None:
    """Say that these weights were stepped, where no torch.optim.Optimizer holds them.

    Projections change every `update_interval` steps of a weight. Steps of optimizers that hold the
    model's own parameters, or those that FSDP shards, are seen; call this once after each step
    where something else updates the weights: fp32 master copies, one flat parameter, a loop by
    hand. Where an optimizer was seen to step them it counts a second step, and a warning says so.

    Args:
        weights: such as `model.parameters()`.
    """
    records = [record_of(weight) for weight in weights]
    if any(record.is_counted for record in records):
        _warn_of_second_count()
    watches = {record.watch for record in records if record.watch is not None}
    for watch in watches - {r.watch for r in records if r.in_graph or r.is_counted}:
        watch.stepped_unsketched()
    for record in records:
        record.count()


def steps_of(weight: Tensor) -> int:
    """Steps that this weight has seen since it was first asked for."""
    return record_of(weight).steps


def set_steps(weights: Iterable[Tensor], steps: int) -> None:
    """Resume a run with dense gradients: the weights have seen this many optimizer steps.

    Which projection a weight has depends on that number. `CompactAdamW` keeps it in its state;
    other optimizers do not know of it, so say it after loading a checkpoint.

    Args:
        weights: such as `model.parameters()`.
        steps: of the optimizer, ≥ 0.

    Raises:
        ValueError: steps below 0.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps={steps!r} must be an int ≥ 0")
    restore_steps(dict.fromkeys(weights, steps))


def restore_steps(steps: dict[Tensor, int]) -> None:
    """Weights have seen these many steps, whatever was known before.

    Tracked projections that have changed after that begin anew.
    """
    note_change()
    groups = [record_of(weight).group for weight in steps]
    before = {group.root(): group.root().steps for group in groups if group is not None}
    for weight, number in steps.items():
        record = record_of(weight)
        record.steps = number
        record.in_graph = record.in_dense_graph = False
    for root, most in before.items():
        if root.steps < most:
            for followed in root.followed.values():
                followed.set_back()
