"""What an optimizer's state is expressed in: check it, carry it into another basis, save it."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from compact_fx.projections import KINDS, Basis, Projection, salt_of

Refresh = Literal["keep", "project", "reset"]
REFRESHES: tuple[Refresh, ...] = ("keep", "project", "reset")

_LINEAR = ("exp_avg", "momentum_buffer")  # what is linear in the gradient

# In a saved state each is a 0-d int64 tensor: distributed checkpoints load tensors in place, and
# torch.load takes them with weights_only=True.
_PREFIX = "projection_"
STEPS = f"{_PREFIX}steps"
"""Steps that the weight has seen; also of a weight whose state is dense."""
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
    if old == new or refresh == "keep":
        return
    if refresh == "reset":
        state.clear()
        return
    for name in _LINEAR:
        moment = state.get(name)
        if moment is not None:
            moment.copy_(old.change_to(new, moment))


def saved(state: Mapping[str, Any], basis: Basis | None, steps: int | None) -> dict[str, Any]:
    """A state as it is saved: with the names of what it is expressed in."""
    named: dict[str, int] = {} if steps is None else {STEPS: steps}
    if basis is not None:
        p = basis.projection
        values = (
            p.salt,
            basis.seed,
            basis.generation,
            p.in_features,
            p.rank,
            salt_of(p.kind),
            salt_of(str(p.dtype)),
            basis.dim,
        )
        named |= {_PREFIX + name: value for name, value in zip(_NAMES, values, strict=True)}
    return {**state, **{k: torch.tensor(v, dtype=torch.int64) for k, v in named.items()}}


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """A saved state without those names, and what they say.

    Raises:
        ValueError: one of them is no number.
    """
    plain = {k: v for k, v in state.items() if not k.startswith(_PREFIX)}
    named = {k: v for k, v in state.items() if k.startswith(_PREFIX)}
    for name, value in named.items():
        if not isinstance(value, int) and not (isinstance(value, Tensor) and value.numel() == 1):
            raise ValueError(f"a saved state is damaged: {name}={value!r} must be one number")
    return plain, {name: int(value) for name, value in named.items()}


def restored(named: Mapping[str, int], plain: Mapping[str, Any], weight: Tensor) -> Basis | None:
    """The basis of a saved state, None of a dense one; checked against the weight and the moments.

    Raises:
        ValueError: what the state says does not fit together.
    """
    if not named.keys() - {STEPS}:
        return None
    shape = tuple(weight.shape)
    missing = [name for name in _NAMES if _PREFIX + name not in named]
    if missing:
        raise ValueError(
            f"the saved state of a weight of shape {shape} is damaged: {_PREFIX}{missing[0]} is "
            "missing"
        )
    get = {name: named[_PREFIX + name] for name in _NAMES}
    rank, n, dim = get["rank"], get["in_features"], get["dim"]
    if get["kind"] not in _KIND_IDS or get["dtype"] not in _DTYPE_IDS:
        raise ValueError(
            f"the saved state of a weight of shape {shape} has a kind of projection that this "
            f"version does not know; it knows {', '.join(KINDS)}"
        )
    if not (0 <= dim < weight.dim() and shape[dim] == n and 1 <= rank <= n):
        raise ValueError(
            f"the saved state of a weight of shape {shape} is of {n} features in dimension {dim} "
            f"with rank {rank}: it belongs to another weight, or is damaged"
        )
    factor = tuple(rank if i == dim else size for i, size in enumerate(shape))
    for name, moment in plain.items():
        if isinstance(moment, Tensor) and moment.numel() == math.prod(factor) != 1:
            continue
        if isinstance(moment, Tensor) and moment.dim() == len(factor) and moment.shape == shape:
            raise ValueError(
                f"{name} in the saved state of a weight of shape {shape} is dense, its projection "
                f"has rank {rank}: the state is damaged"
            )
    projection = Projection(
        salt=get["salt"],
        in_features=n,
        rank=rank,
        kind=_KIND_IDS[get["kind"]],
        dtype=_DTYPE_IDS[get["dtype"]],
    )
    return Basis(projection=projection, seed=get["seed"], generation=get["generation"], dim=dim)
