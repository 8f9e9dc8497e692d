"""What an optimizer's state is expressed in: check it, carry it into another basis, save it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compact_fx import _torch
from compact_fx.errors import warn_at_caller
from compact_fx.projections import (
    KINDS,
    Basis,
    DrawnBasis,
    Projection,
    TrackedBasis,
    Version,
    salt_of,
)
from compact_fx.training import low_bit
from compact_fx.training.followed import Followed
from compact_fx.training.weights import described

Refresh = Literal["keep", "project", "reset"]
REFRESHES: tuple[Refresh, ...] = ("keep", "project", "reset")

_LINEAR = ("exp_avg", "momentum_buffer", "grad_avg")  # what is linear in the gradient
# What sums its squares; Adafactor's are those of rows or columns.
_SQUARED = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "acc_delta", "row_var", "col_var")
# Of what may be in 8 bits, whether it has a sign. RMSprop subtracts the square of grad_avg from a
# moment: rounded, that may be below 0.
SIGNS = {n: True for n in _LINEAR if n != "grad_avg"} | dict.fromkeys(_SQUARED, False)
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}  # which a state has whole or not at all

# In a saved state each is a 0-d int64 tensor: distributed checkpoints load tensors in place, and
# torch.load takes them with weights_only=True.
_PREFIX = "projection_"
_NAMES = ("salt", "seed", "generation", "features", "rank", "kind", "dtype", "dim")
# Of a tracked projection: P that the moments are in; P, Y and the position in the interval, now.
_TRACKED = ("matrix", "now", "now_generation", "gradient", "since")
_KIND_IDS = {salt_of(kind): kind for kind in KINDS}
_DTYPE_IDS = {
    salt_of(str(dtype)): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def check(state: Basis, gradient: Basis, weight: str) -> None:
    """Raise where a gradient cannot be used with a state.

    Args:
        weight: its shape and name.

    Raises:
        ValueError: they have different settings; names the first that differs.
    """
    had, has = state.projection, gradient.projection
    pairs = {
        "rank": (had.rank, has.rank),
        "features": (had.features, has.features),
        "kind": (had.kind, has.kind),
        "seed": (state.seed, gradient.seed),
        "dim": (state.dim, gradient.dim),
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"the state of a weight of shape {weight} has {name}={old}, its gradient has "
                f"{name}={new}: use the settings that the state was saved with"
            )


def carry(state: dict[str, Any], old: Basis, new: Basis, refresh: Refresh) -> None:
    """Bring a state into another basis.

    From one random projection to another as `refresh` says: as it is, projected, or not at all. In
    tracked ones moments are rotated: with R = P₁ᵀP₂, M becomes M R and V becomes V (R ∘ R), as if
    the entries of a row were independent.
    """
    is_tracked = isinstance(old, TrackedBasis) and isinstance(new, TrackedBasis)
    if old is new or old.is_same(new) or (refresh == "keep" and not is_tracked):
        return
    if refresh == "reset":
        state.clear()
        return
    turn: Tensor | None = None
    for name, moment in state.items():
        if not isinstance(moment, Tensor) or moment.dim() <= old.dim:
            continue
        if moment.shape[old.dim] != old.projection.rank:  # Adafactor's of the other side
            continue
        moment = _torch.local_part(moment)
        if is_tracked and name in (*_LINEAR, *_SQUARED):
            turn = old.turn_to(new, moment) if turn is None else turn
            # In the moment's own dtype: of 16 bits are as many right as it can hold.
            by = (turn if name in _LINEAR else turn.square()).to(moment.dtype)
            moment.copy_(old.turned(moment, by))
        elif is_tracked:
            _warn_of_unknown(name)
        elif name in _LINEAR:
            moment.copy_(old.change_to(new, moment))


@functools.cache
def _warn_of_unknown(name: str) -> None:
    warn_at_caller(
        f"{name!r} of an optimizer's state stays as it is where a tracked projection changes: it "
        f"is not known whether it is linear ({', '.join(_LINEAR)}) or squared "
        f"({', '.join(_SQUARED)}) in the gradient",
    )


def names_of(basis: Basis | None, steps: int | None = None) -> dict[str, Tensor]:
    """What a state is expressed in and the weight's steps, as saved beside the moments."""
    values = {} if steps is None else {"steps": steps}
    if basis is not None:
        values |= _numbers_of(basis)
    names = {k: torch.tensor(v, dtype=torch.int64) for k, v in values.items()}
    if isinstance(basis, TrackedBasis):
        names["matrix"] = basis.version.matrix
    return {_PREFIX + name: value for name, value in names.items()}


def names_of_followed(followed: Followed) -> dict[str, Tensor]:
    """Where a tracked projection is: in which version, with what it has seen, since when."""
    version, gradient = followed.version, followed.gradient
    if gradient is None:
        gradient = torch.zeros_like(version.matrix, dtype=torch.float32)
    names = {
        "now": version.matrix,
        "now_generation": torch.tensor(version.generation, dtype=torch.int64),
        "gradient": gradient,
        "since": torch.tensor(followed.since, dtype=torch.int64),
    }
    return {_PREFIX + name: value for name, value in names.items()}


def _numbers_of(basis: Basis) -> dict[str, int]:
    p = basis.projection
    return {
        "salt": p.salt,
        "seed": basis.seed,
        "generation": basis.generation,
        "features": p.features,
        "rank": p.rank,
        "kind": salt_of(p.kind),
        "dtype": salt_of(str(p.dtype)),
        "dim": basis.dim,
    }


def without_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as the inner optimizer knows it."""
    return {name: value for name, value in state.items() if not name.startswith(_PREFIX)}


@dataclass
class Restored:
    """What a saved state says beside the moments.

    Attributes:
        basis: what it is expressed in, None for a dense one.
        steps: of the weight.
        now: of a tracked projection the version, Y, and the steps since P has changed.
    """

    basis: Basis | None
    steps: int
    now: tuple[Version, Tensor, int] | None = None


def restored(state: Mapping[str, Any], weight: Tensor, known: list[Version]) -> Restored:
    """What a saved state of this weight says beside the moments.

    Args:
        known: versions of other weights, and from then on this state's: equal ones are one.

    Raises:
        ValueError: what the state says does not fit together, or not to the weight.
    """
    whose = f"the saved state of a weight of shape {described(weight)}"
    if "projector" in state:
        raise ValueError(
            f"{whose} has moments in a projection of another method (GaLore and APOLLO keep "
            "'projector' beside them): load the model, and start with a fresh optimizer"
        )
    numbers: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith(_PREFIX):
            continue
        bare = name.removeprefix(_PREFIX)
        if bare in ("matrix", "now", "gradient"):
            tensors[bare] = value
            continue
        whole = isinstance(value, Tensor) and not value.is_floating_point()
        if not whole or value.numel() != 1 or value < 0:
            raise ValueError(f"{whose} is damaged: {name}={value!r} must be one int ≥ 0")
        numbers[bare] = int(value)
    # torch's own optimizers have counted as well, if not for projections.
    steps = numbers.pop("steps", int(state.get("step", 0)))
    result = Restored(None, steps)
    if numbers:
        result = _basis_of(numbers, tensors, weight, whose, known)
        result.steps = steps
    basis = result.basis
    factor = tuple(weight.shape) if basis is None else basis.factor_shape(weight.shape)
    for name, moment in low_bit.check(without_names(state), SIGNS, whose).items():
        if name in _MOMENTS and (not isinstance(moment, Tensor) or moment.dim() != weight.dim()):
            raise ValueError(
                f"{whose} is damaged: {name} must be a tensor of {len(factor)} dimensions"
            )
        if not isinstance(moment, Tensor) or moment.dim() != weight.dim():
            continue
        if any(size not in (1, own) for size, own in zip(moment.shape, factor, strict=True)):
            raise ValueError(
                f"{whose} is damaged: {name} has shape {tuple(moment.shape)}, not {factor}"
            )
    return result


def _basis_of(
    numbers: Mapping[str, int],
    tensors: Mapping[str, Tensor],
    weight: Tensor,
    whose: str,
    known: list[Version],
) -> Restored:
    missing = [name for name in _NAMES if name not in numbers]
    if missing:
        raise ValueError(f"{whose} is damaged: {_PREFIX}{missing[0]} is missing")
    kind, dtype = _KIND_IDS.get(numbers["kind"]), _DTYPE_IDS.get(numbers["dtype"])
    if kind is None or dtype is None:
        raise ValueError(
            f"{whose} has a kind of projection that is not known here; known: {', '.join(KINDS)}"
        )
    rank, n, dim = numbers["rank"], numbers["features"], numbers["dim"]
    if not (0 <= dim < weight.dim() and weight.shape[dim] == n and 1 <= rank <= n):
        raise ValueError(
            f"{whose} is of {n} features in dimension {dim} with rank {rank}: it belongs to "
            "another weight, or is damaged"
        )
    projection = Projection(salt=numbers["salt"], features=n, rank=rank, kind=kind, dtype=dtype)
    seed, generation = numbers["seed"], numbers["generation"]
    if not projection.is_tracked:
        drawn = DrawnBasis(projection=projection, seed=seed, generation=generation, dim=dim)
        return Restored(drawn, 0)
    for name in _TRACKED:
        value = tensors.get(name)
        if name not in {**numbers, **tensors}:
            raise ValueError(f"{whose} is damaged: {_PREFIX}{name} is missing")
        if name in tensors and not (isinstance(value, Tensor) and value.shape == (n, rank)):
            raise ValueError(f"{whose} is damaged: {_PREFIX}{name} must be of shape {(n, rank)}")

    def version(name: str, generation: int) -> Version:
        matrix = tensors[name].detach().to(weight.device, copy=True)
        for other in known:
            is_here = other.generation == generation and other.matrix.device == matrix.device
            if is_here and torch.equal(other.matrix, matrix):
                return other
        known.append(Version(matrix, generation))
        return known[-1]

    own = version("matrix", generation)
    now = version("now", numbers["now_generation"])
    gradient = tensors["gradient"].detach().to(weight.device, torch.float32, copy=True)
    basis = TrackedBasis(projection=projection, seed=seed, version=own, dim=dim)
    return Restored(basis, 0, (now, gradient, numbers["since"]))
