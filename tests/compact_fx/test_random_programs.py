"""Random programs over linear algebra on weights: gradients are eager's, or the G P Pᵀ of the plan.

A seed makes a program as Python source, its parameters, inputs and the backend's settings. The
judge runs it eagerly and compiled: at full rank with orthogonal projections all gradients are
equal; below it those of sketched weights are what eager autograd gives where P Pᵀ is multiplied
into the gradient of each matmul's weight operand (`use` in the source) that the plan says is
sketched.

`python tests/compact_fx/test_random_programs.py --programs 2000 --first 0` judges many more, and
`--show 17` prints a program; its seed is all that is needed to see a failure again.
"""

import argparse
import contextlib
import itertools
import math
import random
import re
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compact_fx import SketchedGrad, compact_backend

FEATURES = (32, 40, 48, 64, 96)
LARGEST = 16_000  # elements of an activation
CASES, SEEDS = 8, 3  # of the suite: pytest cases, and seeds in each


# --- programs ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Value:
    """An activation in the source; its last dimension is features."""

    name: str
    shape: tuple[int, ...]
    half: bool = False


@dataclass(frozen=True)
class Use:
    """A matmul's weight operand: which of its dimensions meet the activation's features."""

    shape: tuple[int, ...]
    in_dims: tuple[int, ...]

    @property
    def in_features(self) -> int:
        return math.prod(self.shape[dim] for dim in self.in_dims)

    def sides(self, side: str) -> Iterator[tuple[int, ...]]:
        """Dimensions that may be projected: in_features, or some of the others."""
        if side == "input":
            yield self.in_dims
            return
        others = [dim for dim in range(len(self.shape)) if dim not in self.in_dims]
        for count in range(1, len(others) + 1):
            yield from itertools.combinations(others, count)


@dataclass
class Program:
    """What a seed stands for: source of a forward, shapes, and how outputs enter the loss."""

    seed: int
    lines: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # input → size of its vocabulary
    leaves: set[str] = field(default_factory=set)  # inputs that need a gradient
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    frozen: set[str] = field(default_factory=set)
    aliases: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    losses: dict[int, str] = field(default_factory=dict)  # output → how it enters the loss
    penalties: list[str] = field(default_factory=list)  # parameters that enter it directly
    passes: int = 1
    dynamic: bool | None = None
    casts: bool = False

    @property
    def source(self) -> str:
        """The forward, in which `use(number, weight)` is the weight."""
        return "\n".join(self.lines) + "\n"


class Writer:
    """Writes one program: statements drawn at random over the values that there are."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.program = Program(seed)
        self.values: list[Value] = []
        self.scalars: list[str] = []
        self.indent = "    "
        self.names = itertools.count()

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def fresh(self, prefix: str) -> str:
        return f"{prefix}{next(self.names)}"

    def line(self, text: str) -> None:
        self.program.lines.append(self.indent + text)

    def emit(self, expression: str, shape: tuple[int, ...], half: bool = False) -> bool:
        """A new value, unless it would be too large."""
        if math.prod(shape) > LARGEST or len(shape) > 5 or 0 in shape:
            return False
        name = self.fresh("v")
        self.line(f"{name} = {expression}")
        self.values.append(Value(name, tuple(shape), half))
        return True

    def pick(self) -> Value:
        """Mostly one of the last values."""
        recent = self.random.choice((1, 1, 1, 3, len(self.values)))
        return self.random.choice(self.values[-recent:])

    # --- weights ---

    def parameter(self, shape: tuple[int, ...], reuse: float = 0.3) -> str:
        """An expression for a parameter of this shape: a new one, or a matrix that is there."""
        known = self.program.parameters
        same = [name for name, other in known.items() if other == shape]
        flipped = [
            name for name, other in known.items() if other == shape[::-1] and len(shape) == 2
        ]
        if (same or flipped) and self.chance(reuse):
            name = self.random.choice(same + flipped)
            if self.chance(0.2):
                self.program.aliases[alias := self.fresh("tied")] = name
                return f"self.{alias}" + ("" if known[name] == shape else ".T")
            return f"self.{name}" + ("" if known[name] == shape else ".mT")
        name = self.fresh("w")
        name = f"inner.{name}" if self.chance(0.3) else name
        known[name] = shape
        if self.chance(0.08):
            self.program.frozen.add(name)
        return f"self.{name}"

    def weight(self, shape: tuple[int, ...], depth: int = 2) -> str:
        """An expression over parameters, of this shape."""
        if depth == 0 or self.chance(0.7):
            return self.parameter(shape)
        extra = self.random.choice((4, 8, 32))
        dim = self.random.randrange(len(shape))
        size = shape[dim]

        def resized(size: int) -> tuple[int, ...]:
            return (*shape[:dim], size, *shape[dim + 1 :])

        def of(shape: tuple[int, ...]) -> str:
            return self.weight(shape, depth - 1)

        ways: list[Callable[[], str]] = [
            lambda: f"{of((math.prod(shape),))}.view{shape}",
            lambda: f"{of((*shape[:-1], 2, shape[-1] // 2))}.flatten(-2)",
            lambda: f"{of((shape[0] // 2, 2, *shape[1:]))}.reshape{shape}",
            lambda: f"{of((1, *shape))}.squeeze(0)",
            lambda: f"{of(resized(size + extra))}.narrow({dim}, {extra // 2}, {size})",
            lambda: f"{of(resized(3 * size))}.chunk(3, dim={dim})[{self.random.randrange(3)}]",
            lambda: f"{of((shape[0] * 2, *shape[1:]))}[::2]",
            lambda: f"{of((3, *shape))}[{self.random.randrange(3)}]",
            lambda: f"{of((2, *shape))}.unbind(0)[1]",
            lambda: f"torch.cat([{of(resized(size // 2))}, {of(resized(size // 2))}], dim={dim})",
            lambda: f"torch.cat([{of(resized(1))}, {of(resized(size - 1))}], dim={dim})",
            lambda: f"torch.stack([{of(shape[1:])} for _ in range({shape[0]})])",
            lambda: f"({of(shape)} * 0.5)",
            lambda: f"({of(shape)} * {self.parameter(resized(1))})",
            lambda: f"F.normalize({of(shape)}, dim={dim})",
            lambda: f"(-{of(shape)})",
            lambda: f"({of(shape)} + {of(shape)})",
            lambda: f"({of(shape)} + {of((*shape[:-1], 8))} @ {of((*shape[:-2], 8, shape[-1]))})",
            lambda: f"{of(shape)}.tanh()",
            lambda: f"{of(shape)}.detach()",
            lambda: f"{of(shape)}.clone()",
            lambda: f"{of(shape)}.flip({dim})",
            lambda: f"{of(resized(1))}.expand{shape}",
        ]
        if self.program.casts:
            ways += [lambda: f"{of(shape)}.to(HALF).to(FULL)"] * 3
        if len(shape) > 1:
            turned = (*shape[:-2], shape[-1], shape[-2])
            ways += [
                lambda: f"{of(turned)}.mT",
                lambda: f"{of(turned)}.transpose(-1, -2).contiguous()",
                lambda: f"{of(shape)}.triu(-16)",
            ]
        if len(shape) == 2:
            ways.append(lambda: f"{of(shape[::-1])}.permute(1, 0)")
        if any(size % 2 or size < 16 for size in shape[-2:]) or shape[0] % 2:
            return self.parameter(shape)
        return self.random.choice(ways)()

    def use(self, shape: tuple[int, ...], in_dims: tuple[int, ...], x: Value) -> str:
        """An expression for a matmul's weight operand, in the activation's dtype."""
        expression = self.weight(shape)
        number = len(self.program.uses)
        self.program.uses.append(Use(shape, in_dims))
        return f"use({number}, {expression})" + (".to(HALF)" if x.half else "")

    def vector(self, size: int, x: Value) -> str:
        return self.parameter((size,)) + (".to(HALF)" if x.half else "")

    # --- statements ---

    def linear(self) -> bool:
        """A matmul of an activation and a weight, in one of the ways people write it."""
        x = self.pick()
        *lead, n = x.shape
        m = self.random.choice(FEATURES)
        if self.chance(0.3):  # such that a weight can be used again
            known = [s for s in self.program.parameters.values() if len(s) == 2 and n in s]
            m = math.prod(self.random.choice(known)) // n if known else m
        tokens = math.prod(lead)
        wide, tall = (m, n), (n, m)

        def of(shape: tuple[int, ...], *in_dims: int) -> str:
            return self.use(shape, in_dims, x)

        flat, out = f"{x.name}.reshape({tokens}, {n})", (*lead, m)
        ways: list[tuple[tuple[int, ...], Callable[[], str]]] = [
            (out, lambda: f"F.linear({x.name}, {of(wide, 1)})"),
            (out, lambda: f"F.linear({x.name}, {of(wide, 1)}, {self.vector(m, x)})"),
            (out, lambda: f"F.linear({x.name}, {of(wide, 1)}, {self.vector(m, x)})"),
            (out, lambda: f"{x.name} @ {of(tall, 0)}"),
            (out, lambda: f"{x.name} @ {of(wide, 1)}.T + {self.vector(m, x)}"),
            (out, lambda: f"torch.einsum('...n,mn->...m', {x.name}, {of(wide, 1)})"),
            (out, lambda: f"torch.einsum('nm,...n->...m', {of(tall, 0)}, {x.name})"),
            (out, lambda: f"torch.tensordot({x.name}, {of(tall, 0)}, dims=1)"),
            (out, lambda: f"torch.inner({x.name}, {of(wide, 1)})"),
            (out, lambda: f"torch.mm({flat}, {of(tall, 0)}).view{out}"),
            (
                out,
                lambda: f"torch.addmm({self.vector(m, x)}, {flat}, {of(tall, 0)}).view{out}",
            ),
            (
                out,
                lambda: (
                    f"torch.addmm({self.vector(m, x)}, {flat}, {of(tall, 0)}, alpha=0.5).view{out}"
                ),
            ),
            (out, lambda: f"({x.name}.unsqueeze(-2) * {of(wide, 1)}).sum(-1)"),
        ]
        if len(lead) > 0:
            turned = (*lead[:-1], m, lead[-1])
            left = f"@ {x.name}.transpose(-1, -2)"
            ways += [
                (out, lambda: f"({of(wide, 1)} {left}).transpose(-1, -2)"),
                (out, lambda: f"({of(tall, 0)}.T {left}).mT"),
                (turned, lambda: f"{of(wide, 1)} {left}"),
            ]
        else:
            ways += [(out, lambda: f"{of(wide, 1)} @ {x.name}")] * 3
            ways += [(out, lambda: f"torch.mv({of(wide, 1)}, {x.name})")]
        heads = self.random.choice((2, 4))
        split = (heads, m // heads)
        ways.append(
            (
                (*lead, *split),
                lambda: f"torch.einsum('...n,nhd->...hd', {x.name}, {of((n, *split), 0)})",
            )
        )
        if n % heads == 0:
            inner = (heads, n // heads)
            parts = f"{x.name}.unflatten(-1, {inner})"
            ways += [
                (out, lambda: f"torch.einsum('...hd,hdm->...m', {parts}, {of((*inner, m), 0, 1)})"),
                (out, lambda: f"torch.einsum('...hd,mhd->...m', {parts}, {of((m, *inner), 1, 2)})"),
                (
                    (*lead, heads, m),
                    lambda: f"torch.einsum('...hd,hdm->...hm', {parts}, {of((*inner, m), 1)})",
                ),
            ]
        if lead:
            batch, rest = lead[0], tokens // lead[0]
            rows, cube = f"{x.name}.reshape({batch}, {rest}, {n})", (batch, rest, m)
            ways += [
                (
                    cube,
                    lambda: f"torch.bmm({rows}, {of(tall, 0)}.expand({batch}, {n}, {m}))",
                ),
                (cube, lambda: f"torch.bmm({rows}, {of((batch, n, m), 1)})"),
                (cube, lambda: f"{rows} @ {of((batch, m, n), 2)}.mT"),
                (cube, lambda: f"torch.einsum('etn,emn->etm', {rows}, {of((batch, m, n), 2)})"),
                (
                    (2, tokens, m),
                    lambda: f"torch.einsum('tn,enm->etm', {flat}, {of((2, n, m), 1)})",
                ),
                ((2, tokens, m), lambda: f"{flat} @ {of((2, n, m), 1)}"),
            ]
        shape, way = self.random.choice(ways[:5] if self.chance(0.4) else ways)
        if math.prod(shape) > LARGEST or len(shape) > 5:
            return False
        return self.emit(way(), shape, x.half)

    def pointwise(self) -> bool:
        x = self.pick()
        n = x.shape[-1]
        half = ".to(HALF)" if x.half else ""
        masked = self.fresh("mask")

        def mask() -> str:
            self.program.buffers[masked] = x.shape
            return f"{x.name} * (self.{masked} > 0){half} / 0.5"

        ways: list[Callable[[], str]] = [
            lambda: f"F.relu({x.name})",
            lambda: f"F.gelu({x.name})",
            lambda: f"F.silu({x.name})",
            lambda: f"torch.tanh({x.name})",
            lambda: f"torch.sigmoid({x.name})",
            lambda: f"F.softmax({x.name}, dim=-1)",
            lambda: f"{x.name} * 0.7 + 0.1",
            lambda: f"{x.name} * {self.vector(n, x)}",
            lambda: f"{x.name} * {self.vector(1, x)}",
            lambda: f"F.dropout({x.name}, p=0.0, training=True)",
            lambda: f"F.dropout({x.name}, p=0.5, training=False)",
            mask,
            lambda: f"{x.name}.flip(-1)",
            lambda: f"{x.name}.roll(1, -1)",
            lambda: f"{x.name}.clamp(-1, 1)",
            lambda: f"torch.where({x.name} > 0, {x.name}, 0.1 * {x.name})",
            lambda: f"({x.name} * 1.5).add_(1.0)",
        ]
        return self.emit(self.random.choice(ways)(), x.shape, x.half)

    def norm(self) -> bool:
        x = self.pick()
        n = x.shape[-1]
        if n < 8:
            return False
        ways: list[Callable[[], str]] = [
            lambda: f"F.layer_norm({x.name}, ({n},))",
            lambda: f"F.layer_norm({x.name}, ({n},), {self.vector(n, x)}, {self.vector(n, x)})",
            lambda: f"F.rms_norm({x.name}, ({n},))",
            lambda: f"F.rms_norm({x.name}, ({n},), {self.vector(n, x)}, 1e-5)",
            lambda: f"{x.name} * torch.rsqrt({x.name}.pow(2).mean(-1, keepdim=True) + 1e-5)",
        ]
        return self.emit(self.random.choice(ways)(), x.shape, x.half)

    def combine(self) -> bool:
        """Residuals, gates, concatenations and products of two activations."""
        x = self.pick()
        same = [v for v in self.values if v.shape == x.shape and v is not x and v.half == x.half]
        y = self.random.choice(same) if same else x
        *lead, n = x.shape
        ways = [
            (f"{x.name} + {y.name}", x.shape),
            (f"{x.name} * torch.sigmoid({y.name})", x.shape),
            (f"torch.cat([{x.name}, {y.name}], dim=-1)", (*lead, 2 * n)),
            (f"torch.stack([{x.name}, {y.name}])", (2, *x.shape)),
            (f"torch.maximum({x.name}, {y.name})", x.shape),
        ]
        if len(x.shape) > 1:
            ways.append((f"torch.cat([{x.name}, {y.name}], dim=-2)", (*lead[:-1], lead[-1] * 2, n)))
            scores = f"F.softmax({x.name} @ {y.name}.mT / {n**0.5:.3f}, dim=-1)"
            ways.append((f"{scores} @ {y.name}", x.shape))
        if len(x.shape) in (3, 4):
            ways.append((f"F.scaled_dot_product_attention({x.name}, {y.name}, {x.name})", x.shape))
        expression, shape = self.random.choice(ways[:2] if self.chance(0.5) else ways)
        return self.emit(expression, shape, x.half)

    def reshape(self) -> bool:
        """Views, slices, splits and means."""
        x = self.pick()
        *lead, n = x.shape
        ways: list[tuple[str, tuple[int, ...]]] = [
            (f"{x.name}.unsqueeze(0)", (1, *x.shape)),
            (f"{x.name}.expand(2, {str(x.shape).strip('(),')})", (2, *x.shape)),
            (f"{x.name}.detach()", x.shape),
            (f"{x.name}.clone()", x.shape),
        ]
        if n >= 64:
            gated = f"F.silu({x.name}[..., : {n // 2}]) * {x.name}.chunk(2, dim=-1)[1]"
            ways += [
                (f"{x.name}[..., {n // 4} : {n // 4 + 32}]", (*lead, 32)),
                (f"{x.name}[..., ::2]", (*lead, n // 2)),
                (f"{x.name}.split({n // 2}, dim=-1)[1]", (*lead, n // 2)),
                (gated, (*lead, n // 2)),
                (f"{x.name}.unflatten(-1, (2, {n // 2}))", (*lead, 2, n // 2)),
            ]
        if n < 32 and lead:
            ways += [(f"{x.name}.flatten(-2)", (*lead[:-1], lead[-1] * n))] * 4
        if lead:
            some = lead[0] // 2 or 1
            ways += [
                (f"{x.name}.mean(0)", x.shape[1:]),
                (f"{x.name}.sum(0, keepdim=True)", (1, *x.shape[1:])),
                (f"{x.name}[0]", x.shape[1:]),
                (f"{x.name}[:{some}]", (some, *x.shape[1:])),
                (f"{x.name}.reshape(-1, {n})", (math.prod(lead), n)),
            ]
        if len(lead) > 1:
            turned = (*lead[:-2], lead[-1], lead[-2], n)
            ways += [
                (f"{x.name}.transpose(-2, -3)", turned),
                (f"{x.name}.transpose(-2, -3).contiguous()", turned),
                (f"{x.name}.flatten(0, 1)", (lead[0] * lead[1], *x.shape[2:])),
                (f"{x.name}.amax(dim=1)", (lead[0], *x.shape[2:])),
                (f"{x.name}.flatten(-2)", (*lead[:-1], lead[-1] * n)),
            ]
        expression, shape = self.random.choice(ways)
        return self.emit(expression, shape, x.half)

    def cast(self) -> bool:
        x = self.pick()
        if not self.program.casts:
            return False
        return self.emit(f"{x.name}.to({'FULL' if x.half else 'HALF'})", x.shape, not x.half)

    def repeat(self) -> bool:
        """One weight in several steps, as recurrent models and shared layers have it."""
        x = self.pick()
        n = x.shape[-1]
        if n not in FEATURES or x.half:
            return False
        matrix = self.weight((n, n), depth=1)
        for _ in range(self.random.choice((2, 3))):
            number = len(self.program.uses)
            self.program.uses.append(Use((n, n), (1,)))
            if not self.emit(f"torch.tanh(F.linear({x.name}, use({number}, {matrix})))", x.shape):
                return False
            x = self.values[-1]
        return True

    def share(self) -> bool:
        """One activation for several weights, split and joined again."""
        x = self.pick()
        *lead, n = x.shape
        m = self.random.choice((32, 48))
        before = len(self.values)
        for _ in range(self.random.choice((2, 3))):
            expression = f"F.linear({x.name}, {self.use((m, n), (1,), x)})"
            if not self.emit(expression, (*lead, m), x.half):
                return False
        names = [value.name for value in self.values[before:]]
        if self.chance(0.5):
            return self.emit(" * ".join(names), (*lead, m), x.half)
        return self.emit(
            f"torch.cat([{', '.join(names)}], dim=-1)", (*lead, m * len(names)), x.half
        )

    def state(self) -> bool:
        """A buffer that the forward reads and then changes."""
        x = self.pick()
        if x.half:
            return False
        name = self.fresh("state")
        self.program.buffers[name] = (x.shape[-1],)
        done = self.emit(f"{x.name} + self.{name}", x.shape)
        if done:
            mean = f"{x.name}.detach().reshape(-1, {x.shape[-1]}).mean(0)"
            self.line(f"self.{name}.mul_(0.9).add_(0.1 * {mean})")
        return done

    def no_grad(self) -> bool:
        x = self.pick()
        self.line("with torch.no_grad():")
        self.indent += "    "
        name = self.fresh("v")
        self.line(f"{name} = torch.sigmoid({x.name})")
        self.indent = self.indent[:-4]
        return self.emit(f"{x.name} * {name}", x.shape, x.half)

    def scalar(self) -> bool:
        """A penalty on a weight, which becomes an output or scales an activation."""
        names = [n for n, shape in self.program.parameters.items() if len(shape) > 1]
        if not names:
            return False
        weight = "self." + self.random.choice(names)
        size = math.prod(self.program.parameters[weight[5:]]) ** 0.5
        name = self.fresh("s")
        ways = [
            f"{weight}.pow(2).mean()",
            f"{weight}.abs().sum() / {size:.1f}",
            f"({weight} @ {weight}.mT).pow(2).mean()",
            f"{weight}.norm() / {size:.1f}",
        ]
        self.line(f"{name} = {self.random.choice(ways)}")
        if self.chance(0.5):
            x = self.pick()
            return self.emit(f"{x.name} * {name}{'.to(HALF)' if x.half else ''}", x.shape, x.half)
        self.scalars.append(name)
        return True

    def checkpointed(self) -> bool:
        """Some statements in a function that the backward pass runs again."""
        if len(self.indent) > 4:
            return False
        arguments = [self.pick()]
        outer, self.values = self.values, list(arguments)
        scalars, self.scalars = self.scalars, []
        if self.chance(0.3):  # one that the function finds around it
            self.values.insert(0, self.random.choice(outer))
        block = self.fresh("block")
        names = ", ".join(value.name for value in arguments)
        self.line(f"def {block}({names}):")
        self.indent += "    "
        count = len(self.values)
        self.statements(self.random.choice((1, 2, 3)))
        if len(self.values) == count:
            self.emit(
                f"torch.tanh({self.values[-1].name})", self.values[-1].shape, self.values[-1].half
            )
        result = self.values[-1]
        self.line(f"return {result.name}")
        self.indent = self.indent[:-4]
        self.values, self.scalars = outer, scalars
        call = f"checkpoint({block}, {names}, use_reentrant=False)"
        return self.emit(call, result.shape, result.half)

    def statements(self, count: int) -> None:
        kinds = {
            self.linear: 10,
            self.pointwise: 4,
            self.norm: 2,
            self.combine: 3,
            self.reshape: 3,
            self.cast: 2,
            self.repeat: 1,
            self.share: 1,
            self.state: 0.4,
            self.no_grad: 0.2,
            self.scalar: 0.7,
            self.checkpointed: 1,
        }
        written = 0
        for _ in range(4 * count):
            if written < count:
                (statement,) = self.random.choices(list(kinds), list(kinds.values()))
                written += statement()

    # --- the whole ---

    def write(self) -> Program:
        program = self.program
        program.casts = self.chance(0.2)
        program.passes = 2 if self.chance(0.15) else 1
        program.dynamic = True if self.chance(0.07) else None
        for _ in range(self.random.choice((1, 1, 2))):
            name = self.fresh("x")
            dims = self.random.choice((0, 1, 2, 2, 2, 3, 4))
            lead = [
                self.random.choice((2, 3, 4, 6) if dims < 3 else (1, 2, 3)) for _ in range(dims)
            ]
            shape = (*lead, self.random.choice((8, *FEATURES, *FEATURES)))
            program.inputs[name] = shape
            self.values.append(Value(name, shape))
            if self.chance(0.5):
                program.leaves.add(name)
        ids = self.fresh("ids") if self.chance(0.25) else None
        if ids is not None:
            program.inputs[ids] = (self.random.choice((2, 4)), self.random.choice((3, 8)))
        program.lines.append(f"def forward(self, {', '.join(program.inputs)}):")
        if ids is not None:
            rows, n = self.random.choice((*FEATURES, 100)), self.random.choice(FEATURES)
            program.tokens[ids] = rows
            table = self.parameter((rows, n))
            self.emit(f"F.embedding({ids}, {table})", (*program.inputs[ids], n))
        self.statements(self.random.choice((2, 3, 4, 5, 6, 8)))
        for _ in range(20):
            if not program.uses:
                self.linear()
        if all(value.name in program.inputs for value in self.values):
            self.emit(f"{self.values[0].name} * {self.parameter((1,))}", self.values[0].shape)
        self.outputs()
        return program

    def outputs(self) -> None:
        program = self.program
        made = [value.name for value in self.values if value.name not in program.inputs]
        # What nothing else reads is often an output, or the program would be shorter than it looks.
        ends = [n for n in made[:-1] if not re.search(rf"\b{n}\b.*\b{n}\b", program.source, re.S)]
        outputs = [made[-1], *(name for name in ends if self.chance(0.7))]
        others = [name for name in made[:-1] + self.scalars if name not in outputs]
        outputs += self.random.sample(others, min(len(others), self.random.choice((0, 0, 1, 2, 3))))
        if self.chance(0.05):
            outputs.append(f"self.{self.random.choice(list(program.parameters))}.clone()")
        kinds = ("square", "probe", "probe", "sum", "logsumexp")
        for index in range(len(outputs)):
            if index == 0 or self.chance(0.75):
                program.losses[index] = self.random.choice(kinds)
        if self.chance(0.25):
            own = [f"{name}.to(FULL).pow(2).mean()" for name in outputs]
            outputs.insert(0, " + ".join(own[: self.random.choice((1, 2))]))
            program.losses = {0: "itself"} | {
                index + 1: kind
                for index, kind in program.losses.items()
                if index and self.chance(0.5)
            }
        self.line(f"return {', '.join(outputs)},")
        if self.chance(0.15):
            program.penalties.append(self.random.choice(list(program.parameters)))


# --- running them --------------------------------------------------------------------------------


Sketched = tuple[Tensor, str]
"""P, and the side of the weight that it is on."""


class Projected(torch.autograd.Function):
    """The identity, whose gradient is multiplied by P Pᵀ on the side of some dimensions."""

    @staticmethod
    def forward(ctx, weight, p, in_dims):
        ctx.p, ctx.in_dims = p, in_dims
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient):
        last = tuple(range(-len(ctx.in_dims), 0))
        moved = gradient.movedim(ctx.in_dims, last)
        p = ctx.p.to(gradient.dtype)
        projected = (moved.flatten(last[0]) @ p) @ p.T
        return projected.view(moved.shape).movedim(last, ctx.in_dims), None, None


def same_weight(number: int, weight: Tensor) -> Tensor:
    return weight


def module_of(
    program: Program,
    use: Callable[[int, Tensor], Tensor] = same_weight,
    full: torch.dtype = torch.float32,
    half: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """The program as a module, with the same parameters each time."""
    names = {
        "torch": torch,
        "F": F,
        "checkpoint": checkpoint,
        "use": use,
        "FULL": full,
        "HALF": half,
    }
    exec(compile(program.source, f"<program {program.seed}>", "exec"), names)
    module = type("RandomProgram", (nn.Module,), {"forward": names["forward"]})()
    module.inner = nn.Module()
    generator = torch.Generator().manual_seed(program.seed)
    for name, shape in program.parameters.items():
        scale = max(shape[-2:]) ** -0.5 if len(shape) > 1 else 0.5
        values = torch.randn(shape, generator=generator) * scale + (len(shape) == 1) * 0.5
        owner, _, last = name.rpartition(".")
        parameter = nn.Parameter(values.to(full), requires_grad=name not in program.frozen)
        setattr(module.get_submodule(owner), last, parameter)
    for alias, name in program.aliases.items():
        setattr(module, alias, module.get_parameter(name))
    for name, shape in program.buffers.items():
        module.register_buffer(name, torch.randn(shape, generator=generator).to(full))
    return module


def loss_of(program: Program, module: nn.Module, outputs: tuple[Tensor, ...]) -> Tensor:
    loss = torch.zeros((), dtype=torch.float64)
    for index, kind in program.losses.items():
        output = outputs[index].double()
        probe = torch.Generator().manual_seed(index)
        loss = loss + {
            "itself": lambda o: o,
            "square": lambda o: o.pow(2).mean(),
            "probe": lambda o: (o * torch.randn(o.shape, generator=probe)).mean(),  # noqa: B023
            "sum": lambda o: o.sum() / o.numel() ** 0.5,
            "logsumexp": lambda o: o.flatten().logsumexp(0),
        }[kind](output)
    for name in program.penalties:
        loss = loss + module.get_parameter(name).double().pow(2).mean()
    return loss


@dataclass
class Result:
    """What a run gives: losses, and the gradients of inputs and parameters."""

    losses: list[float]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]

    def in_one_memory(self) -> set[tuple[str, ...]]:
        """Names of gradients that share it: what is written into one is in the others too."""
        names = defaultdict(list)
        for name, gradient in self.gradients.items():
            if gradient.numel():
                names[gradient.untyped_storage().data_ptr()].append(name)
        return {tuple(sorted(some)) for some in names.values() if len(some) > 1}


def run(
    program: Program,
    module: nn.Module,
    step: Callable[..., tuple[Tensor, ...]] | None = None,
    full: torch.dtype = torch.float32,
) -> Result:
    """Some forward and backward passes, whose gradients add up."""
    losses, gradients = [], {}
    for number in range(program.passes):
        generator = torch.Generator().manual_seed(1000 + number)
        inputs = []
        for name, shape in program.inputs.items():
            if name in program.tokens:
                inputs.append(torch.randint(program.tokens[name], shape, generator=generator))
                continue
            value = torch.randn(shape, generator=generator).to(full)
            inputs.append(value.requires_grad_(name in program.leaves))
        loss = loss_of(program, module, (module if step is None else step)(*inputs))
        if loss.requires_grad:
            loss.backward()
        losses.append(loss.item())
        for name, value in zip(program.inputs, inputs, strict=True):
            if value.grad is not None:
                gradients[f"{name} of pass {number}"] = value.grad
    for name in program.parameters:
        grad = module.get_parameter(name).grad
        if grad is not None:
            gradients[name] = grad.to_dense() if isinstance(grad, SketchedGrad) else grad
    return Result(losses, gradients, dict(module.named_buffers()))


# --- the judge -----------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What was seen of one program, and what was wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Judge:
    """Holds a program's compiled gradients against what autograd and the plan say."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.verdict = Verdict(Counter(programs=1))
        self.exact = run(program, module_of(program))
        fine = self.fine = self.in_float64()
        self.scale = max([g.norm().item() for g in self.exact.gradients.values()], default=1.0)
        # As far from the truth as rounding itself takes eager, but not less than these.
        least = 3e-2 if program.casts else 1e-4
        self.noise = {
            name: max(least, 8 * self.error(gradient, fine.gradients[name]))
            for name, gradient in self.exact.gradients.items()
        }
        self.tolerance = max(least, 8 * max(map(self.relative, self.exact.losses, fine.losses)))

    def in_float64(self, backend: object = None) -> Result:
        """A run without rounding to speak of."""
        module = module_of(self.program, full=torch.float64, half=torch.float64)
        if backend is None:
            return run(self.program, module, full=torch.float64)
        torch._dynamo.reset()
        step = torch.compile(module, backend=backend, dynamic=self.program.dynamic)
        return run(self.program, module, step, full=torch.float64)

    def rounding_alone(self, settings: dict[str, object]) -> set[str]:
        """Gradients that are right at full rank in float64, where rounding explains nothing."""
        exact = settings | {"rank": 1.0, "projection": "orthogonal"}
        found = self.in_float64(compact_backend(**exact, inner="aot_eager")).gradients
        return {n for n, g in found.items() if self.error(g, self.fine.gradients[n]) < 1e-5}

    def relative(self, a: float, b: float) -> float:
        return abs(a - b) / (abs(b) + 1e-3)

    def error(self, actual: Tensor, expected: Tensor, size: float = 0.0) -> float:
        """Relative, and for a gradient that is next to nothing, to the largest one."""
        size = max(size, expected.norm().item(), 1e-3 * self.scale, 1e-12)
        error = (actual.double() - expected.double()).norm().item() / size
        return error if math.isfinite(error) else math.inf

    def judge(self) -> Verdict:
        draw = random.Random(f"settings of {self.program.seed}")
        modes = ["dense", "sketched"]
        draw.shuffle(modes)
        shared = {
            "place": draw.choice(("auto", "auto", "early", "late")),
            "recompute": draw.choice((True, False)),
            "min_features": draw.choice((32, 32, 1)),
            "sketch_heads": draw.choice((True, True, False)),
            "exclude": draw.choice(((), (), ("inner.*",))),
        }
        below = {
            "rank": draw.choice((0.25, 0.5)),
            "projection": draw.choice(("orthogonal", "countsketch", "tracked")),
        }
        full = {"rank": 1.0, "projection": draw.choice(("orthogonal", "tracked"))}
        for mode, own in zip(modes, (full, below), strict=True):
            settings = {**shared, **own, "gradients": mode}
            if own["projection"] == "tracked":  # programs are too small for it to save memory
                settings["place"] = draw.choice(("early", "late"))
            for gradient in self.failures_with(settings):
                self.verdict.failures.append(f"seed {self.program.seed}, {settings}: {gradient}")
        self.verdict.counts["failures"] += len(self.verdict.failures)
        return self.verdict

    def compiled(self, backend: object) -> Result:
        torch._dynamo.reset()
        module = module_of(self.program)
        step = torch.compile(module, backend=backend, fullgraph=True, dynamic=self.program.dynamic)
        return run(self.program, module, step)

    def runs(self, backend: object) -> bool:
        try:
            self.compiled(backend)
        except Exception:
            return False
        return True

    def failures_with(self, settings: dict[str, object]) -> Iterator[str]:
        counts, backend = self.verdict.counts, compact_backend(inner="aot_eager", **settings)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                result = self.compiled(backend)
            except Exception as error:
                if not all(self.runs(backend) for backend in ("aot_eager", "inductor")):
                    counts["not compiled by torch either"] += 1
                    return
                where = traceback.extract_tb(error.__traceback__)[-1]
                yield f"{type(error).__name__} in {where.name}: {str(error)[:300]}"
                return
        for warning in {str(w.message) for w in seen}:
            if "without sketches" in warning:
                counts["left untouched"] += 1
                counts[f"  {warning[:150]}"] += 1
        counts["compiled"] += 1
        sites = [(plan, site) for plan in backend.plans for site in plan.sketched]
        counts["sites"] += sum(len(plan.sites) for plan in backend.plans)
        counts["sketched sites"] += len(sites)
        below = settings["rank"] != 1.0
        counts["sketched sites below full rank"] += len(sites) if below else 0
        module = module_of(self.program)
        name_of = {id(module.get_parameter(name)): name for name in self.program.parameters}
        by_weight: dict[str, list[Sketched]] = {}
        for plan, site in sites:
            p = plan.projections[site.projection](backend.config.seed, 0)
            weight = module.get_parameter(site.weight)
            by_weight.setdefault(name_of[id(weight)], []).append((p.float(), site.side))
        wrong = list(self.wrong(result, by_weight, below))
        if wrong:  # torch's partitioner rebuilds from buffers that the forward has changed (2.13)
            with contextlib.suppress(Exception):
                counted, plain = counts.copy(), self.compiled("inductor")
                theirs = {name for name, _ in self.wrong(plain, {}, False)}
                counts.clear()
                counts.update(counted)
                counts["wrong in torch.compile too"] += sum(name in theirs for name, _ in wrong)
                wrong = [(name, text) for name, text in wrong if name not in theirs]
        if wrong:
            rounded = self.rounding_alone(settings)
            counts["right in float64"] += sum(name in rounded for name, _ in wrong)
            wrong = [(name, text) for name, text in wrong if name not in rounded]
        yield from (f"{name}: {text}" for name, text in wrong)

    def wrong(
        self, result: Result, projections: dict[str, list[Sketched]], below: bool
    ) -> Iterator[tuple[str, str]]:
        """What is not as it should be, with how far it is off."""
        counts = self.verdict.counts
        for number, pair in enumerate(zip(result.losses, self.exact.losses, strict=True)):
            if not self.relative(*pair) < self.tolerance:
                yield f"loss {number}", f"{pair[0]} and not {pair[1]}"
        for name, buffer in result.buffers.items():
            error = self.error(buffer, self.exact.buffers[name], size=1.0)
            if not error < self.tolerance:
                yield name, f"buffer is off by {error:.1e}"
        for names in result.in_one_memory() - self.exact.in_one_memory():
            yield " and ".join(names), "gradients share memory"
        for name in sorted(result.gradients.keys() | self.exact.gradients.keys()):
            actual, exact = result.gradients.get(name), self.exact.gradients.get(name)
            if exact is None and not actual.any():
                continue  # torch.compile gives zeros for what no output in the loss depends on
            if exact is None or actual is None:
                if exact is not None and not exact.any():
                    continue
                yield name, f"gradient is {'not ' if exact is None else ''}None"
                continue
            if actual.shape != exact.shape or actual.dtype != exact.dtype:
                yield name, f"{actual.shape}, {actual.dtype} and not {exact.shape}, {exact.dtype}"
                continue
            tolerance = self.noise[name]
            if tolerance > 0.2:
                counts["gradients that are rounding alone"] += 1
                continue
            counts["gradients"] += 1
            if not below or name not in projections:
                error = self.error(actual, exact)
                if not error < tolerance:
                    yield name, f"gradient is off by {error:.1e}"
                continue
            sketches = projections[name]
            errors = []
            for expected in itertools.islice(self.expected(name, sketches), 64):
                size = exact.norm().item()
                errors.append(self.error(actual, expected, size))
                if errors[-1] < tolerance:
                    break
            if not errors:
                yield name, f"{len(sketches)} sketched sites, more than matmuls of such a weight"
            elif not errors[-1] < tolerance:
                yield name, f"sketched gradient is off by {min(errors):.1e}"
            if self.error(self.exact.gradients[name], actual) > tolerance:
                counts["sketched sites checked below full rank"] += len(sketches)
                counts["  of these told apart from other uses by trying"] += (
                    len(sketches) if len(errors) > 1 else 0
                )
            else:
                counts["sketched sites that do not show"] += len(sketches)

    def expected(self, name: str, sketches: list[Sketched]) -> Iterator[Tensor]:
        """The weight's gradient for each way in which its sites can be uses of the source."""
        mine = [u for u in range(len(self.program.uses)) if self.reads(u, name)]
        distinct: list[Sketched] = []

        def number_of(sketch: Sketched) -> int | None:
            p, side = sketch
            same = (q.shape == p.shape and side == other for q, other in distinct)
            found = (i for i, is_same in enumerate(same) if is_same)
            return next((i for i in found if torch.equal(p, distinct[i][0])), None)

        for sketch in sketches:
            if number_of(sketch) is None:
                distinct.append(sketch)
        wanted = Counter(map(number_of, sketches))
        options: list[list[tuple[int, tuple[int, ...]] | None]] = [
            [
                None,
                *(  # a matmul may flatten several dimensions in any order
                    (i, order)
                    for i, (p, side) in enumerate(distinct)
                    for dims in self.program.uses[u].sides(side)
                    if len(p) == math.prod(self.program.uses[u].shape[d] for d in dims)
                    for order in itertools.permutations(dims)
                ),
            ]
            for u in mine
        ]
        for choice in itertools.islice(itertools.product(*map(reversed, options)), 20_000):
            if Counter(way[0] for way in choice if way is not None) != wanted:
                continue
            by_use = dict(zip(mine, choice, strict=True))

            def use(number: int, weight: Tensor, by_use: dict[int, Any] = by_use) -> Tensor:
                if (way := by_use.get(number)) is None:
                    return weight
                return Projected.apply(weight, distinct[way[0]][0], way[1])

            yield run(self.program, module_of(self.program, use)).gradients[name]

    def reads(self, number: int, name: str) -> bool:
        """Whether a use in the source mentions the weight."""
        names = {name, *(a for a, target in self.program.aliases.items() if target == name)}
        text = self.program.source.partition(f"use({number}, ")[2]
        depth = 1
        for end, character in enumerate(text):
            depth += (character == "(") - (character == ")")
            if not depth:
                text = text[:end]
                break
        words = "".join(c if c.isalnum() or c in "._" else " " for c in text).split()
        return any(
            word == f"self.{own}" or word.startswith(f"self.{own}.")
            for word in words
            for own in names
        )


def judge(seed: int) -> Verdict:
    return Judge(Writer(seed).write()).judge()


@pytest.mark.parametrize(
    "case", [*range(5), *(pytest.param(case, marks=pytest.mark.long) for case in range(5, CASES))]
)
def test_random_programs(case):
    """Gradients are eager's or the plan's, and enough of them are sketched to say something."""
    counts, failures = Counter(), []
    for seed in range(case * SEEDS, (case + 1) * SEEDS):
        verdict = judge(seed)
        counts += verdict.counts
        failures += verdict.failures
    assert not failures, "\n".join(failures)
    below, checked = (
        counts[f"sketched sites {which}below full rank"] for which in ("", "checked ")
    )
    assert checked >= max(2, 0.6 * below), counts


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge many random programs.")
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--show", type=int, help="print the program of a seed and judge it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seeds = range(arguments.first, arguments.first + arguments.programs)
    if arguments.show is not None:
        seeds = range(arguments.show, arguments.show + 1)
        program = Writer(arguments.show).write()
        print(program.source, program, sep="\n")
    counts, start = Counter(), time.perf_counter()
    for seed in seeds:
        verdict = judge(seed)
        counts += verdict.counts
        for failure in verdict.failures:
            print(failure, flush=True)
    for name, count in counts.items():
        print(f"{count:8} {name}")
    print(f"{time.perf_counter() - start:8.0f} seconds")


if __name__ == "__main__":
    main()
