"""What an optimizer's state is expressed in: check it, carry it into another basis, save it."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from compact_fx.projections import KINDS, Basis, Projection, salt_of

Refresh = Literal["keep", "project", "reset"]
REFRESHES: tuple[Refresh, ...] = ("keep", "project", "reset")

_LINEAR = ("exp_avg", "momentum_buffer")  # what is linear in the gradient
_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}  # which a state has whole or not at all

# In a saved state each is a 0-d int64 tensor: distributed checkpoints load tensors in place, and
# torch.load takes them with weights_only=True.
_PREFIX = "projection_"
_NAMES = ("salt", "seed", "generation", "in_features", "rank", "kind", "dtype", "dim")
_KIND_IDS = {salt_of(kind): kind for kind in KINDS}
_DTYPE_IDS = {
    salt_of(str(dtype)): dtype
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}


def check(state: Basis, gradient: Basis, shape: tuple[int, ...]) -> None:
    """Raise where a gradient cannot be used with a state.

    Raises:
        ValueError: they have different settings; names the first that differs.
    """
    had, has = state.projection, gradient.projection
    pairs = {
        "rank": (had.rank, has.rank),
        "in_features": (had.in_features, has.in_features),
        "kind": (had.kind, has.kind),
        "seed": (state.seed, gradient.seed),
        "dim": (state.dim, gradient.dim),
    }
    for name, (old, new) in pairs.items():
        if old != new:
            raise ValueError(
                f"the state of a weight of shape {shape} has {name}={old}, its gradient has "
                f"{name}={new}: use the settings that the state was saved with"
            )


def carry(state: dict[str, Any], old: Basis, new: Basis, refresh: Refresh) -> None:
    """Bring a state into another basis: as it is, projected, or not at all."""
    if old is new or old.is_same_draw(new) or refresh == "keep":
        return
    if refresh == "reset":
        state.clear()
        return
    for name in _LINEAR:
        moment = state.get(name)
        if moment is not None:
            moment.copy_(old.change_to(new, moment))


def names_of(basis: Basis | None, steps: int | None = None) -> dict[str, Tensor]:
    """What a state is expressed in and the weight's steps, as saved beside the moments."""
    values = {} if steps is None else {"steps": steps}
    if basis is not None:
        values |= _numbers_of(basis)
    return {_PREFIX + k: torch.tensor(v, dtype=torch.int64) for k, v in values.items()}


def _numbers_of(basis: Basis) -> dict[str, int]:
    p = basis.projection
    return {
        "salt": p.salt,
        "seed": basis.seed,
        "generation": basis.generation,
        "in_features": p.in_features,
        "rank": p.rank,
        "kind": salt_of(p.kind),
        "dtype": salt_of(str(p.dtype)),
        "dim": basis.dim,
    }


def without_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state as the inner optimizer knows it."""
    return {name: value for name, value in state.items() if not name.startswith(_PREFIX)}


def restored(state: Mapping[str, Any], weight: Tensor) -> tuple[Basis | None, int]:
    """What a saved state of this weight is expressed in (None: it is dense), and its steps.

    Raises:
        ValueError: what the state says does not fit together, or not to the weight.
    """
    whose = f"the saved state of a weight of shape {tuple(weight.shape)}"
    numbers: dict[str, int] = {}
    for name, value in state.items():
        if name.startswith(_PREFIX):
            whole = isinstance(value, Tensor) and not value.is_floating_point()
            if not whole or value.numel() != 1 or value < 0:
                raise ValueError(f"{whose} is damaged: {name}={value!r} must be one int ≥ 0")
            numbers[name.removeprefix(_PREFIX)] = int(value)
    # torch's own optimizers have counted as well, if not for projections.
    steps = numbers.pop("steps", int(state.get("step", 0)))
    basis = _basis_of(numbers, weight, whose) if numbers else None
    factor = tuple(weight.shape) if basis is None else basis.factor_shape(weight.shape)
    for name, moment in without_names(state).items():
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
    return basis, steps


def _basis_of(numbers: Mapping[str, int], weight: Tensor, whose: str) -> Basis:
    missing = [name for name in _NAMES if name not in numbers]
    if missing:
        raise ValueError(f"{whose} is damaged: {_PREFIX}{missing[0]} is missing")
    kind, dtype = _KIND_IDS.get(numbers["kind"]), _DTYPE_IDS.get(numbers["dtype"])
    if kind is None or dtype is None:
        raise ValueError(
            f"{whose} has a kind of projection that is not known here; known: {', '.join(KINDS)}"
        )
    rank, n, dim = numbers["rank"], numbers["in_features"], numbers["dim"]
    if not (0 <= dim < weight.dim() and weight.shape[dim] == n and 1 <= rank <= n):
        raise ValueError(
            f"{whose} is of {n} features in dimension {dim} with rank {rank}: it belongs to "
            "another weight, or is damaged"
        )
    projection = Projection(salt=numbers["salt"], in_features=n, rank=rank, kind=kind, dtype=dtype)
    return Basis(
        projection=projection, seed=numbers["seed"], generation=numbers["generation"], dim=dim
    )
