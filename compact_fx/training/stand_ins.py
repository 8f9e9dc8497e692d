"""One step of any optimizer on factors: stand-ins take the weights' place (paper, Algorithm 3)."""

import math
import numbers
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.errors import warn_at_caller
from compact_fx.projections import Basis, Version
from compact_fx.training import low_bit, moments
from compact_fx.training.followed import share_gradients, versions_in_use
from compact_fx.training.gradients import ConsumedGrad, sketched_part
from compact_fx.training.moments import REFRESHES, Refresh
from compact_fx.training.weights import (
    any_sketched,
    described,
    is_skipped,
    known_record,
    record_of,
    restore_steps,
    sharded_shapes,
    use_gradient,
)

StateDtype = torch.dtype | Literal["fp8"] | None


@dataclass(frozen=True)
class Rule:
    """How a class of optimizers updates a tensor.

    Attributes:
        decoupled: whether its weight decay is; None if nobody knows.
        is_relative: whether its updates are relative to the tensor's size (Adafactor).
        is_elementwise: whether each number's update depends on its own gradients alone.
        is_normalized: whether its updates stay as they are where all gradients grow alike.
    """

    decoupled: bool | None
    is_relative: bool = False
    is_elementwise: bool = False
    is_normalized: bool = True


@dataclass(frozen=True)
class _Settings:
    """Of one compact optimizer."""

    refresh: Refresh
    state_dtype: StateDtype
    step_in_backward: bool

    @property
    def in_8_bits(self) -> bool:
        return self.state_dtype == "fp8"


class _Step(NamedTuple):
    """One weight in one step that a stand-in takes the place of.

    Attributes:
        stand_in: of the factor's shape; without a basis the weight itself, at least in float32.
        before: the moments of a sharded weight whose part here is stepped as a plain tensor.
    """

    weight: Tensor
    stand_in: Tensor
    basis: Basis | None
    group: dict[str, Any]
    before: Mapping[str, Any] | None = None


def _lay_out(state: dict[str, Any], weight: Tensor) -> None:
    """Let moments of a dense weight lie in memory as it does: fused kernels take it for granted."""
    for name, moment in state.items():
        is_moment = name in moments.SIGNS and isinstance(moment, Tensor)
        if not (is_moment and moment.is_floating_point()):
            continue
        if moment.shape == weight.shape and moment.stride() != weight.stride():
            state[name] = torch.empty_like(weight, dtype=moment.dtype).copy_(moment)


def cast(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Each in its type: as it is, or copied, all in a few launches."""
    pairs = list(zip(tensors, dtypes, strict=True))
    result = [t if t.dtype is dtype else torch.empty_like(t, dtype=dtype) for t, dtype in pairs]
    copied = [(new, old) for new, old in zip(result, tensors, strict=True) if new is not old]
    if copied:
        torch._foreach_copy_([new for new, _ in copied], [old for _, old in copied])
    return result


# Elements of stand-ins with moments in 8 bits that are stepped at once: with all that is in float32
# then, some 16 to 24 bytes for each are alive. A larger weight is stepped alone.
_MOST_ELEMENTS = 2**25
_MOST_BYTES = 24


def step_bytes(elements: int, largest: int) -> int:
    """What a step needs at most where moments are in 8 bits: of all gradients, and the largest."""
    return _MOST_BYTES * min(elements, max(_MOST_ELEMENTS, largest))


class CompactOptimizer(torch.optim.Optimizer):
    """What turns an optimizer class into one that steps factors; use it through a subclass.

    Each weight with a `SketchedGrad` is replaced, for the inner step, by a stand-in: zeros of the
    factor's shape whose gradient is the factor. The inner optimizer keeps its state for it and
    writes its update into it; the weight then becomes
    `(1 - lr · weight_decay) · W + scale · update Pᵀ`, in one pass. Dense weights are stepped as
    they are. A dense gradient of a weight whose state is sketched is used as G P. Moments of full
    size, of a weight whose gradient is sketched, begin anew.

    With moments in 8 bits dense weights have stand-ins too, a few weights are stepped at once, and
    their moments are numbers in float32 only while they are.
    """

    _inner_step: Callable[[torch.optim.Optimizer], Any]
    _rule: Rule
    _settings: _Settings

    def _set_up(self, scale: float, dense_scale: float, refresh: Refresh, **settings: Any) -> None:
        if refresh not in REFRESHES:
            raise ValueError(
                f"refresh={refresh!r} must be one of {', '.join(map(repr, REFRESHES))}"
            )
        self._settings = _Settings(refresh=refresh, **settings)
        if not isinstance(self._settings.step_in_backward, bool):
            raise TypeError(f"step_in_backward={self._settings.step_in_backward!r} must be a bool")
        dtype = self._settings.state_dtype
        is_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1
        if not (dtype is None or is_float or self._settings.in_8_bits):
            raise ValueError(
                f"state_dtype={dtype!r} must be a floating-point type of 16 bits or more, None, or "
                '"fp8" for 8 bits with a scale for 256 neighbours'
            )
        self._bases: dict[Tensor, Basis] = {}  # of the sketched weights' states
        self._names: dict[Tensor, dict[str, Tensor]] = {}  # what they are called in saved ones
        self._warned: set[str] = set()
        self._is_checked = False
        self.defaults.update(scale=scale, dense_scale=dense_scale)
        for group in self.param_groups:
            self._set_up_group(group)

    def _set_up_group(self, group: dict[str, Any]) -> None:
        for name in ("scale", "dense_scale"):
            group.setdefault(name, self.defaults[name])
        self._check_group(group)
        for weight in group["params"]:
            if self._settings.in_8_bits and _torch.is_wrapper(weight):
                raise ValueError(
                    f'state_dtype="fp8" cannot be used with a weight of type '
                    f"{type(weight.data).__name__}, shape {tuple(weight.shape)}, as fully_shard "
                    "makes them: leave it away, or use torch.bfloat16"
                )
        if self._step_in_backward:
            for weight in group["params"]:
                self._step_after_backward(weight)

    def _check_group(self, group: Mapping[str, Any]) -> None:
        for name in ("scale", "dense_scale"):
            value = group.get(name, 1.0)
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not (is_number and 0 < value < math.inf):
                raise ValueError(f"{name}={value!r} must be a finite number > 0")
        if group.get("weight_decay") and self._is_decoupled(group) is None:
            raise ValueError(
                f"weight_decay={group['weight_decay']}: it is not known whether that of "
                f"{type(self).__name__} is decoupled; pass decoupled_weight_decay=True or False"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As any optimizer; a group may have its own `scale` and `dense_scale`."""
        super().add_param_group(param_group)
        if "scale" in self.defaults:  # torch also calls this before there are defaults of ours
            self._set_up_group(self.param_groups[-1])

    def _is_decoupled(self, group: Mapping[str, Any]) -> bool | None:
        own: bool | None = group.get("decoupled_weight_decay", self._rule.decoupled)
        return own

    @property
    def _step_in_backward(self) -> bool:
        return self._settings.step_in_backward

    # --- one step --------------------------------------------------------------------------------

    @_torch.untraced  # Dynamo takes what it reads in the first step for what stays
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimizer step; see the class.

        Raises:
            ValueError: a weight's state is of another rank, kind or seed than its gradient.
                Nothing has been changed then.
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

    @_torch.untraced  # and what steps in backward comes here
    @torch.no_grad()
    def _step(self, groups: Sequence[dict[str, Any]]) -> None:
        if is_skipped(self):
            return
        factors: dict[Tensor, tuple[Tensor, Basis]] = {}
        for group in groups:
            for weight in group["params"]:
                found = self._factor_of(weight)
                if found is not None:
                    self._check_state(weight, found[1])
                    factors[weight] = found
        if not (factors or self._is_checked):
            self._check_gradients(groups)
        batches = self._batches(groups, factors)
        for batch in batches:
            self._step_at_once([part for _, part in batch], factors)
        for group, part in (pair for batch in batches for pair in batch):
            group.update({k: v for k, v in part.items() if k != "params"})

    def _check_gradients(self, groups: Sequence[dict[str, Any]]) -> None:
        """Warn, once, where a run cannot have any sketched gradient."""
        weights = [w for g in groups for w in g["params"] if w.grad is not None and w.dim() > 1]
        if not any(group.get("lr", 1.0) for group in groups):
            return  # so it is also where a checkpoint makes a state to load into
        if not weights:
            self._check_weights([weight for group in groups for weight in group["params"]])
            return
        self._is_checked = True
        records = [record for weight in weights if (record := known_record(weight)) is not None]
        if any(record.in_dense_graph for record in records):
            what = "the backend makes gradients dense: give it gradients='sketched'"
        elif not any_sketched():
            what = (
                "no weight is sketched: the backend's report says why; if it is empty, compile the "
                "model with backend=compact_backend(...), and not by model.compile() as well, "
                "which wins"
            )
        else:
            return
        warn_at_caller(
            f"{type(self).__name__} steps dense gradients, and so saves no memory of gradients and "
            f"moments: {what}, or use torch's own optimizer"
        )

    def _check_weights(self, weights: Sequence[Tensor]) -> None:
        """Warn, once, where weights without gradients look like some that `fully_shard` has."""
        if "replaced" in self._warned or any(
            w.grad is not None or known_record(w) for w in weights
        ):
            return
        if sharded_shapes().intersection(weight.shape for weight in weights):
            self._warned.add("replaced")
            warn_at_caller(
                f"{type(self).__name__} steps weights that have no gradient and are in no compiled "
                "graph: fully_shard(model) puts others in their place. Make the optimizer after it"
            )

    def _batches(
        self, groups: Sequence[dict[str, Any]], factors: Mapping[Tensor, tuple[Tensor, Basis]]
    ) -> list[list[tuple[dict[str, Any], dict[str, Any]]]]:
        """What is stepped at once: groups, each with itself or with a copy for some of its weights.

        All copies are of before the step: what a class counts in its groups it counts once.
        """
        if not self._settings.in_8_bits:
            return [[(group, group) for group in groups]]
        batches: list[list[tuple[dict[str, Any], dict[str, Any]]]] = []
        size = 0
        for group in groups:
            part: dict[str, Any] | None = None
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                elements = (factors[weight][0] if weight in factors else weight).numel()
                if not batches or size + elements > _MOST_ELEMENTS:
                    batches.append([])
                    part, size = None, 0
                if part is None:
                    part = {**group, "params": []}
                    batches[-1].append((group, part))
                part["params"].append(weight)
                size += elements
        return batches

    def _step_at_once(
        self, groups: Sequence[dict[str, Any]], factors: Mapping[Tensor, tuple[Tensor, Basis]]
    ) -> None:
        steps: list[_Step] = []
        try:
            self._run_inner_step(self._inner_groups(groups, factors, steps))
        finally:
            for step in steps:
                self._take_back_state(step)
            if self._settings.in_8_bits:
                low_bit.encode((self.state[step.weight] for step in steps), moments.SIGNS)
        dense = [step for step in steps if step.basis is None and step.stand_in is not step.weight]
        if dense:
            torch._foreach_copy_([s.weight for s in dense], [s.stand_in for s in dense])
        sketched = [step for step in steps if step.basis is not None]
        updates = [_torch.local_part(step.stand_in) for step in sketched]
        updates = cast(updates, [step.weight.dtype for step in sketched])
        for step, update in zip(sketched, updates, strict=True):
            self._update(step, update)

    def _inner_groups(
        self,
        groups: Sequence[dict[str, Any]],
        factors: Mapping[Tensor, tuple[Tensor, Basis]],
        steps: list[_Step],
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Groups, each with one of the inner optimizer's: of stand-ins, or of dense weights."""
        inner: list[tuple[dict[str, Any], dict[str, Any]]] = []
        sketched_of: list[list[Tensor]] = [[] for _ in groups]
        dense_of: list[list[Tensor]] = [[] for _ in groups]
        for group, sketched, dense in zip(groups, sketched_of, dense_of, strict=True):
            for weight in group["params"]:
                (sketched if weight in factors else dense).append(weight)
        weights = [weight for sketched in sketched_of for weight in sketched]
        parts = [factors[weight][0] for weight in weights]
        parts = cast(parts, [self._dtype_of_moments(part.dtype) for part in parts])
        factor_of = dict(zip(weights, parts, strict=True))
        if self._settings.in_8_bits:  # decoded in the order in which they are encoded
            pairs = zip(sketched_of, dense_of, strict=True)
            weights = [weight for pair in pairs for some in pair for weight in some]
        states = self._states_of_numbers(weights)
        for group, sketched, dense in zip(groups, sketched_of, dense_of, strict=True):
            stand_ins = []
            for weight in sketched:
                basis = factors[weight][1]
                step = self._begin(weight, factor_of[weight], basis, group, states[weight])
                stand_ins.append(step.stand_in)
                steps.append(step)
            if stand_ins:
                # A few launches, not one for each weight.
                torch._foreach_zero_([_torch.local_part(stand_in) for stand_in in stand_ins])
            if self._settings.in_8_bits:
                in_place_of = self._dense_stand_ins(dense, states)
                steps += [_Step(w, s, None, group) for w, s in zip(dense, in_place_of, strict=True)]
                dense = in_place_of
            lr = {"lr": group["lr"] * group["dense_scale"]} if "lr" in group else {}
            if stand_ins:
                inner.append((group, {**group, "params": stand_ins, "weight_decay": 0.0}))
            if dense or not stand_ins:
                inner.append((group, {**group, "params": dense, **lr}))
        return inner

    def _run_inner_step(self, groups: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        outer, self.param_groups = self.param_groups, [inner for _, inner in groups]
        try:
            self._inner_step(self)
        finally:
            self.param_groups = outer
            for group, inner in groups:  # some classes count steps in their groups
                kept = {k: v for k, v in inner.items() if k not in ("params", "lr", "weight_decay")}
                group.update(kept)

    def _take_back_state(self, step: _Step) -> None:
        weight, basis = step.weight, step.basis
        state = self.state.pop(step.stand_in, {})
        if step.before is not None:
            for name, value in state.items():
                before = step.before.get(name)
                if before is not None and _torch.local_part(before) is value:
                    state[name] = before
                elif isinstance(value, Tensor) and value.shape == step.stand_in.shape:
                    state[name] = _torch.with_part(weight, value)
        if basis is not None:
            if self._bases.get(weight) is not basis or weight not in self._names:
                self._bases[weight], self._names[weight] = basis, moments.names_of(basis)
            state |= self._names[weight]
        self.state[weight] = state

    def _begin(
        self,
        weight: Tensor,
        factor: Tensor,
        basis: Basis,
        group: dict[str, Any],
        state: dict[str, Any],
    ) -> _Step:
        """A stand-in takes the weight's place."""
        decay = group.get("weight_decay", 0.0)
        if decay and not self._is_decoupled(group):
            sign = -1 if group.get("maximize") else 1  # the inner optimizer negates what it gets
            scale = getattr(self, "grad_scale", None)  # a fused one divides by it
            coupled = basis.compress(_torch.local_part(weight)).mul_(sign * decay)
            factor = factor + (coupled if scale is None else coupled * scale)
            factor = factor.to(self._dtype_of_moments(factor.dtype))
        # Fused kernels take for granted that gradients and moments are laid out alike.
        factor = factor.contiguous()
        stand_in = torch.empty_like(factor)
        own = self._bases.get(weight)
        if own is not None:  # may fail for want of memory
            moments.carry(state, own, basis, self._settings.refresh)
        else:  # there is none, or one of full size: `_check_state` has warned
            state = {}
        before = None
        if self._is_local(weight, state):
            before = state
            state = {name: _torch.local_part(value) for name, value in state.items()}
        else:
            stand_in, factor = (_torch.with_part(weight, part) for part in (stand_in, factor))
        stand_in.grad = factor
        self.state.pop(weight, None)  # nothing fails from here on
        if state:
            self.state[stand_in] = state
        return _Step(weight, stand_in, basis, group, before)

    def _is_local(self, weight: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether a sharded weight's part here is stepped as it is: DTensors take the host longer.

        Where a moment is not sharded as the weight, torch's own operators say so.
        """
        return (
            self._rule.is_elementwise
            and _torch.is_sharded(weight)
            and all(
                _torch.is_sharded(value) and value.placements == weight.placements
                for value in state.values()
                if isinstance(value, Tensor) and value.dim()
            )
        )

    def _dense_stand_ins(
        self, weights: Sequence[Tensor], states: Mapping[Tensor, dict[str, Any]]
    ) -> list[Tensor]:
        """The weights, or their values in float32, with moments that are numbers."""
        dtypes = [self._dtype_of_moments(weight.dtype) for weight in weights]
        stand_ins = cast(weights, dtypes)
        cast_ones = [
            pair for pair in zip(weights, stand_ins, strict=True) if pair[0] is not pair[1]
        ]
        gradients = cast(
            [weight.grad for weight, _ in cast_ones if weight.grad is not None],
            [stand_in.dtype for _, stand_in in cast_ones],
        )
        for (_, stand_in), gradient in zip(cast_ones, gradients, strict=True):
            stand_in.grad = gradient
        for weight, stand_in in zip(weights, stand_ins, strict=True):
            _lay_out(states[weight], stand_in)
        for weight, stand_in in zip(weights, stand_ins, strict=True):  # nothing fails from here on
            self.state.pop(weight, None)
            if states[weight]:
                self.state[stand_in] = states[weight]
        return stand_ins

    def _states_of_numbers(self, weights: Sequence[Tensor]) -> dict[Tensor, dict[str, Any]]:
        """By weight what the inner optimizer knows, with moments that are numbers."""
        states = [moments.without_names(self.state.get(weight, {})) for weight in weights]
        if self._settings.in_8_bits:
            states = low_bit.decode(states, moments.SIGNS)
            for weight, state in zip(weights, states, strict=True):
                dtype = self._dtype_of_moments(weight.dtype)
                for name, moment in state.items():
                    if name in moments.SIGNS and moment.dtype is not dtype:
                        state[name] = moment.to(dtype)
        return dict(zip(weights, states, strict=True))

    def _dtype_of_moments(self, dtype: torch.dtype) -> torch.dtype:
        """What a weight or gradient of this type has moments in, while they are stepped."""
        if self._settings.in_8_bits:
            return torch.promote_types(dtype, torch.float32)
        own = self._settings.state_dtype
        return own if isinstance(own, torch.dtype) else dtype

    def _update(self, step: _Step, update: Tensor) -> None:
        weight, group = step.weight, step.group
        assert step.basis is not None
        keep = 1.0
        if group.get("weight_decay") and self._is_decoupled(group):
            keep = 1.0 - float(group["lr"]) * group["weight_decay"]
        if self._rule.is_relative:
            smallest = group["eps"][1]
            rms = _torch.whole(weight.square().mean()).sqrt()
            update = update * (rms.clamp(min=smallest) / smallest)
        scale = group["scale"] * (step.basis.gain if self._rule.is_normalized else 1.0)
        step.basis.update_(_torch.local_part(weight), update, keep=keep, scale=scale)

    # --- which gradients are stepped as factors --------------------------------------------------

    def _factor_of(self, weight: Tensor) -> tuple[Tensor, Basis] | None:
        """The factor of a weight's gradient, None where it is stepped as it is.

        Of a sharded weight, the part of it that is here.
        """
        if weight.grad is None:
            return None
        gradient = sketched_part(weight.grad)
        if gradient is not None:
            is_dense = gradient.factor is None
            if is_dense and self._basis_for(weight) is None and self.state.get(weight):
                weight.grad = _torch.with_part(weight, gradient.to_dense())
                return None
            if is_dense and not gradient.is_written:
                self._refuse_projected(weight)
            if gradient.is_written:
                self._warn(weight, "is dense since something wrote into it (clip_grad_value_, say)")
            elif is_dense:
                self._warn(weight, "has a dense part")
            return gradient.to_factor(), gradient.basis
        known = self._basis_for(weight)
        if known is None:
            return None
        self._refuse_projected(weight)
        if self.state.get(weight):  # else it is how checkpoints make a state to load into
            self._warn(weight, "is dense: no sketch made it")
        return known.compress(_torch.local_part(weight.grad)), known

    def _refuse_projected(self, weight: Tensor) -> None:
        """Raise where a dense gradient is G P Pᵀ already: it cannot be told from a G."""
        record = known_record(weight)
        if record is not None and record.in_dense_graph:
            raise ValueError(
                f"the gradient of a weight of shape {described(weight)} is dense, its state is "
                "sketched: a graph was compiled so that the gradient is dense (the report says "
                "why); use the settings that the state was made with, or exclude the weight"
            )

    def _basis_for(self, weight: Tensor) -> Basis | None:
        """What a dense gradient of a sketched weight is brought into."""
        own = self._bases.get(weight)
        if own is None and self.state.get(weight):
            return None
        record = known_record(weight)
        return record.basis if record is not None and record.is_factor else own

    def _warn(self, weight: Tensor, what: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn_at_caller(
                f"the gradient of a weight of shape {described(weight)} {what}: it is brought "
                "into the space of the sketch and stepped there. "
                "Clipping by norm, scaling, adding and reading leave gradients sketched",
            )

    def _check_state(self, weight: Tensor, basis: Basis) -> None:
        own = self._bases.get(weight)
        if own is basis or not self.state.get(weight):
            return
        if own is not None:
            moments.check(own, basis, described(weight))
        elif "dense moments" not in self._warned:
            self._warned.add("dense moments")
            warn_at_caller(
                f"the state of a weight of shape {described(weight)} is dense, its gradient is "
                f"sketched (rank {basis.projection.rank}): the moments of such weights begin anew, "
                "those of all others go on"
            )

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
                    use_gradient(optimizer, weight)
            weight.grad = ConsumedGrad(weight)

        @_torch.untraced
        def step_dense(weight: Tensor) -> None:
            # Autograd also calls this where a graph gives the weight itself no gradient.
            is_dense = weight.grad is not None and sketched_part(weight.grad) is None
            if is_dense and not isinstance(weight.grad, ConsumedGrad):
                step(weight)

        step_dense.is_compact = True  # type: ignore[attr-defined]
        weight.register_post_accumulate_grad_hook(step_dense)  # type: ignore[no-untyped-call]
        record_of(weight).listener = step

    # --- state -----------------------------------------------------------------------------------

    def _numbered(self) -> Iterator[tuple[int, Tensor]]:
        """All weights with their numbers in a saved state."""
        return enumerate(w for group in self.param_groups for w in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers only; with each weight's projection and steps by name.

        With weights that `fully_shard` shards all processes call it: what tracked projections have
        seen is averaged.
        """
        share_gradients(
            followed
            for weight, basis in self._bases.items()
            if _torch.is_sharded(weight)
            and (record := known_record(weight)) is not None
            and (followed := record.followed(basis)) is not None
        )
        bare: dict[int, dict[str, Any]] = {}  # of weights that have no state: no entry here either
        for number, weight in self._numbered():
            record = known_record(weight)
            if record is not None and (record.group is not None or record.steps):
                names = moments.names_of(None, record.steps)
                basis = self._bases.get(weight)
                if basis is not None and (followed := record.followed(basis)) is not None:
                    names |= moments.names_of_followed(followed)
                if self.state.get(weight):
                    self.state[weight].update(names)
                else:
                    bare[number] = names
        whole = super().state_dict()
        return {**whole, "state": {**bare, **whole["state"]}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; moments are cast or rounded to `state_dtype`, or the weight's dtype.

        Raises:
            ValueError: something in it cannot be; nothing has been changed then.
        """
        for group in state_dict["param_groups"]:
            self._check_group(group)
        # By number and not by name: that is how torch matches them.
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        weights = [weight for _, weight in self._numbered()]
        if len(names) != len(weights):
            super().load_state_dict(state_dict)  # raises
        steps: dict[Tensor, int] = {}
        bases: dict[Tensor, Basis] = {}
        now: dict[Tensor, tuple[Version, Tensor, int]] = {}
        versions = versions_in_use()  # another optimizer may have loaded one that its weights share
        own: dict[Tensor, dict[str, Any]] = {}
        plain: dict[Any, Any] = {k: v for k, v in state_dict["state"].items() if k not in names}
        for name, weight in zip(names, weights, strict=True):
            if name in state_dict["state"]:
                saved = state_dict["state"][name]
                found = moments.restored(saved, weight, versions)
                steps[weight] = found.steps
                if found.basis is not None:
                    bases[weight] = found.basis
                if found.now is not None:
                    now[weight] = found.now
                own[weight] = moments.without_names(saved)
                if not self._settings.in_8_bits:
                    (own[weight],) = low_bit.decode([own[weight]], moments.SIGNS)
                    own[weight].pop(low_bit.ROUNDINGS, None)
                # torch casts what it gets to the weight's type.
                as_is = low_bit.coded(own[weight], moments.SIGNS)
                plain[name] = {k: v for k, v in own[weight].items() if k not in as_is}
            else:
                steps[weight] = 0
        before = self.state, self.param_groups
        try:
            super().load_state_dict({**state_dict, "state": plain})
        except Exception:  # some classes look at what they have taken over already
            self.state, self.param_groups = before
            raise
        for group in self.param_groups:
            for key in ("scale", "dense_scale"):
                group.setdefault(key, self.defaults[key])
        self._bases, self._names = bases, {}
        for weight in weights:
            if weight in bases or (self._settings.in_8_bits and own.get(weight)):
                self._copy_moments(weight, own[weight])
            if weight in bases:
                self.state[weight].update(moments.names_of(bases[weight], steps[weight]))
            elif not self.state.get(weight, True):
                del self.state[weight]  # it held no more than the steps of the weight
        for weight in weights:
            if weight not in bases:
                _lay_out(self.state.get(weight, {}), weight)
        self._restore_records(
            {w: n for w, n in steps.items() if known_record(w) or (n and w.dim() > 1)}, now
        )

    def _restore_records(
        self, steps: dict[Tensor, int], now: Mapping[Tensor, tuple[Version, Tensor, int]]
    ) -> None:
        """Weights go on where these steps and the bases of their states say."""
        groups = {
            weight: record_of(weight).restore_salt(basis.projection.salt)
            for weight, basis in self._bases.items()
        }
        restore_steps(steps)
        most: dict[Version, int] = {}  # weights that share a projection may meet later
        for weight, (version, _, _) in now.items():
            most[version] = max(most.get(version, 0), groups[weight].root().steps)
        for weight, (version, gradient, since) in now.items():
            changed_at = max(0, most[version] - since)
            record_of(weight).restore_followed(self._bases[weight], version, gradient, changed_at)

    def _copy_moments(self, weight: Tensor, saved: Mapping[str, Any]) -> None:
        """Tensors of its own, on the weight's device, rounded once."""
        dtype, state = self._dtype_of_moments(weight.dtype), self.state[weight]
        as_is = low_bit.coded(saved, moments.SIGNS)
        for entry, value in saved.items():
            if isinstance(value, Tensor) and (value.dim() or entry in as_is):
                is_number = value.is_floating_point() and entry not in as_is
                wanted = dtype if is_number else value.dtype
                device = weight.device if value.dim() else "cpu"
                state[entry] = value.detach().to(device, wanted, copy=True)
        if self._settings.in_8_bits:
            low_bit.encode([state], moments.SIGNS)

    def __getstate__(self) -> dict[str, Any]:
        records = {weight: known_record(weight) for _, weight in self._numbered()}
        steps = {w: record.steps for w, record in records.items() if record is not None}
        now = {
            weight: (followed.version, followed.gradient, followed.since)
            for weight, basis in self._bases.items()
            if (followed := record_of(weight).followed(basis)) is not None
        }
        own = {"settings": self._settings, "bases": self._bases, "steps": steps, "now": now}
        return {**super().__getstate__(), "compact": own}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("compact", None)
        super().__setstate__(state)
        if own is not None:  # a copy; torch also calls this to load a state
            self._settings, self._bases = own["settings"], own["bases"]
            self._names, self._warned, self._is_checked = {}, set(), False
            self._restore_records(own["steps"], own["now"])
            if self._step_in_backward:
                for _, weight in self._numbered():
                    self._step_after_backward(weight)
