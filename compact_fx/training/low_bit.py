"""Moments in 8 bits: small floats, relative to the largest of their block."""

import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compact_fx import _torch
from compact_fx.projections import fold_in, salt_of
from compact_fx.projections.hashed import column_words

BLOCK = 256  # neighbours that share a scale, and
SMALLEST = 4096  # elements that less than stay in float32: both as in bitsandbytes and torchao
ROUNDINGS = "roundings"  # how often a state was rounded: noise is drawn from it

_SCALE = "_scale"
_DROPPED = 20  # bits of float32's mantissa; 3 stay
_ROWS = 256  # of noise
_ONE = 127 << 3  # the bits of 1.0 without them
_TINY = torch.finfo(torch.float32).tiny  # in place of a largest value of 0


def quantize(moment: Tensor, noise: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """A moment in 8 bits, rounded up or down at random so that the mean is right.

    A code has 3 bits of mantissa and, of what is linear in gradients, a sign and 4 bits of
    exponent, of squares 5 bits: each is off by up to 1/8, and less than 2⁻¹⁶ (squares: 2⁻³²) of the
    largest in its block is 0. A square above 0 stays above 0, since updates are divided by it.
    What is not finite makes its block so.

    Args:
        moment: of any shape and floating-point type.
        noise: int32 below 2²⁰ (rows, 256), for as many blocks, then again from its beginning.

    Returns:
        codes, uint8 (elements), and scales, float32 (blocks of 256).
    """
    count, top = moment.numel(), _top(signed)
    values = F.pad(moment.flatten().float(), (0, -count % BLOCK)).view(-1, BLOCK)
    scale = values.abs().amax(1)
    relative = values.abs() / scale.clamp_min(_TINY)[:, None]
    noise = noise.repeat(-(-len(values) // len(noise)), 1)[: len(values)]
    # Mantissas are linear between powers of 2, so that this is right in the mean across them too.
    rounded = (relative.view(torch.int32) + noise) >> _DROPPED
    codes = (rounded - (_ONE - top)).clamp(0, top)
    if signed:
        codes = torch.where(values < 0, codes | 128, codes)
    else:
        codes = torch.where(values > 0, codes.clamp_min(1), codes)
    return codes.to(torch.uint8).flatten()[:count], scale


def dequantize(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """What `quantize` was given, rounded: float32 (elements)."""
    count, top = codes.numel(), _top(signed)
    padded = F.pad(codes, (0, -count % BLOCK)).view(-1, BLOCK).to(torch.int32)
    size = padded & top
    values = ((size + (_ONE - top)) << _DROPPED).view(torch.float32)
    values = torch.where(size > 0, values, 0.0) * scale[:, None]
    return torch.where(padded > size, -values, values).flatten()[:count]


def _top(signed: bool) -> int:
    """The code of 1.0."""
    return 127 if signed else 255


def stored_bytes(elements: int) -> int:
    """What a moment with so many elements takes where moments are in 8 bits."""
    return elements + 4 * -(-elements // BLOCK) if elements >= SMALLEST else 4 * elements


# --- states --------------------------------------------------------------------------------------


def encode(states: Iterable[dict[str, Any]], signs: Mapping[str, bool]) -> None:
    """Put codes and scales in the place of moments, where these are large; of all states at once.

    Args:
        signs: by the names of moments, whether they have one.
    """
    alike: dict[tuple[Any, ...], list[tuple[int, dict[str, Any]]]] = {}
    for state in states:
        large = [name for name in state if name in signs and _is_large(state[name])]
        if not large:
            continue
        count = int(state.get(ROUNDINGS, 0))
        state[ROUNDINGS] = torch.tensor(count + 1, dtype=torch.int64)
        for name in large:
            key = (name, state[name].device, state[name].dtype)
            alike.setdefault(key, []).append((count, state))
    for (name, device, _), members in alike.items():
        values = [state[name] for _, state in members]
        noise = noise_of(max(count for count, _ in members), name, device)
        codes, scale = _run(quantize, _joined(values), noise, signed=signs[name])
        # Of their own: one weight that is not stepped again would keep all of them alive.
        codes_of, scale_of = _owned(_parts(values, codes)), _owned(_parts(values, scale, 1))
        for (_, state), value, own, own_scale in zip(
            members, values, codes_of, scale_of, strict=True
        ):
            state[name], state[name + _SCALE] = own.view(value.shape), own_scale


def decode(states: Iterable[Mapping[str, Any]], signs: Mapping[str, bool]) -> list[dict[str, Any]]:
    """The states with moments in float32, and as they are where these are numbers already."""
    decoded = [dict(state) for state in states]
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for state in decoded:
        for name in state:
            if name in signs and name + _SCALE in state:
                alike.setdefault((name, state[name].device), []).append(state)
    for (name, _), members in alike.items():
        values = [state[name] for state in members]
        scales = [state.pop(name + _SCALE) for state in members]
        flat = _run(dequantize, _joined(values), _joined(scales, 1), signed=signs[name])
        for state, value, own in zip(members, values, _parts(values, flat), strict=True):
            state[name] = own.view(value.shape)
    return decoded


def _joined(values: Sequence[Tensor], block: int = BLOCK) -> Tensor:
    """All in a row, each from a block of its own, and blocks of anything up to one of few lengths.

    Each length is a kernel to compile; eight for a power of two take an eighth more at the most.
    Nothing is copied where they lie so, as what `decode` has made does if it fills its blocks.
    """
    first, blocks = values[0], sum(-(-value.numel() // block) for value in values)
    missing = -blocks % (1 << max(0, blocks.bit_length() - 4))
    length = (blocks + missing) * block
    is_there = first.untyped_storage().nbytes() >= length * first.element_size()
    if is_there and _is_in_a_row(values, block):
        return first.as_strided((length,), (1,))
    rows = [value.flatten() for value in values]
    rows = [F.pad(row, (0, -len(row) % block)) if len(row) % block else row for row in rows]
    return torch.cat([*rows, rows[0].new_zeros(missing * block)]) if missing else torch.cat(rows)


def _is_in_a_row(values: Sequence[Tensor], block: int) -> bool:
    """Whether each begins where the one before it ends, from the beginning of one storage."""
    end, storage = 0, _torch.storage_id(values[0])
    for value in values:
        is_next = value.storage_offset() == end and _torch.storage_id(value) == storage
        if not (is_next and value.is_contiguous() and value.numel() % block == 0):
            return False
        end += value.numel()
    return True


def _parts(values: Sequence[Tensor], flat: Tensor, block: int = BLOCK) -> list[Tensor]:
    """What belongs to each of some tensors, of what was made of all in a row.

    block: of its elements, for one of 256 elements of a tensor.
    """
    blocks = [-(-value.numel() // BLOCK) for value in values]
    starts = itertools.accumulate(blocks, initial=0)
    parts = (flat[block * i : block * (i + n)] for i, n in zip(starts, blocks, strict=False))
    if block == 1:
        return list(parts)
    return [part[: value.numel()] for part, value in zip(parts, values, strict=True)]


def _owned(parts: list[Tensor]) -> list[Tensor]:
    """Copies with memory of their own, in one launch."""
    copies = [torch.empty_like(part) for part in parts]
    torch._foreach_copy_(copies, parts)
    return copies


def check(state: Mapping[str, Any], signs: Mapping[str, bool], whose: str) -> dict[str, Any]:
    """A saved state without what belongs to 8 bits.

    Raises:
        ValueError: codes without their scales, or the reverse, or of shapes that do not fit.
    """
    plain = dict(state)
    count: Any = plain.pop(ROUNDINGS, None)
    for name in signs:
        codes: Any = state.get(name)
        scale: Any = plain.pop(name + _SCALE, None)
        is_coded = isinstance(codes, Tensor) and codes.dtype is torch.uint8
        if not is_coded and scale is None:
            continue
        is_scale = isinstance(scale, Tensor) and scale.dtype is torch.float32
        if not (is_coded and is_scale and scale.shape == (-(-codes.numel() // BLOCK),)):
            raise ValueError(
                f"{whose} is damaged: {name} in 8 bits needs {name + _SCALE}, a float32 tensor "
                f"with one number for {BLOCK} elements"
            )
        is_whole = isinstance(count, Tensor) and not count.is_floating_point()
        if not is_whole or count.numel() != 1 or count < 0:
            raise ValueError(f"{whose} is damaged: {ROUNDINGS}={count!r} must be one int ≥ 0")
    return plain


def coded(state: Mapping[str, Any], signs: Mapping[str, bool]) -> dict[str, Any]:
    """The entries of a state that are in 8 bits, with what belongs to them."""
    names = [name for name in signs if name + _SCALE in state]
    wanted = {ROUNDINGS, *names, *(name + _SCALE for name in names)}
    return {name: value for name, value in state.items() if name in wanted}


@functools.lru_cache(maxsize=8)  # all weights of a step round alike
def noise_of(count: int, name: str, device: torch.device) -> Tensor:
    """What a moment's values are rounded with, as a function of how often they were: see above."""
    key = torch.full((), fold_in(count, salt_of(name)), dtype=torch.int64, device=device)
    noise: Tensor = _run(_noise, key)
    return noise


def _noise(key: Tensor) -> Tensor:
    index = torch.arange(_ROWS * BLOCK, dtype=torch.int64, device=key.device)
    words = column_words(key, index) & ((1 << _DROPPED) - 1)
    return words.to(torch.int32).view(_ROWS, BLOCK)


def _is_large(moment: Any) -> bool:
    is_number = isinstance(moment, Tensor) and moment.is_floating_point()
    return is_number and moment.numel() >= SMALLEST


# --- on a GPU one fused kernel for all weights; operator by operator they would be twenty ---------


def _run(function: Callable[..., Any], *tensors: Tensor, **settings: bool) -> Any:
    if tensors[0].device.type != "cuda":
        return function(*tensors, **settings)
    like = tuple((t.shape, t.dtype, t.device) for t in tensors)
    return _compiled(function, tuple(settings.items()), like)(*tensors)


@functools.cache
def _compiled(
    function: Callable[..., Any], settings: tuple[tuple[str, bool], ...], like: tuple[Any, ...]
) -> Any:
    examples = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in like]
    return _torch.compile_function(functools.partial(function, **dict(settings)), *examples)
