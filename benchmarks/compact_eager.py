"""The paper's method without a compiler, layer by layer, to compare with.

Shamshoum et al., CompAct, NAACL 2025, section 3: a linear layer keeps z = x P and a seed for its
backward pass; gradient and moments stay in the space of P, which is drawn again where it is needed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Attention keeps the input of its output projection for itself: nothing would be saved there.
OUTPUTS = ("o_proj", "attention.output.dense")


class Sketch:
    """What a weight (out_features, in_features) has instead of a gradient.

    Attributes:
        rank: columns of P.
        seed: of P; another one each `interval` optimizer steps.
        factor: G P, (out_features, rank), summed since the optimizer has cleared it; None before.
    """

    def __init__(self, features: int, rank: int, number: int, interval: int) -> None:
        self.features, self.rank, self.interval = features, rank, interval
        self.seed = number << 32  # so that no two layers share one
        self.steps = 0
        self.factor: Tensor | None = None

    def draw(self, like: Tensor) -> Tensor:
        """P, (in_features, rank), entries N(0, 1 / rank), of the dtype and device of like."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        kind = {"dtype": like.dtype, "device": like.device}
        drawn = torch.randn(self.features, self.rank, generator=generator, **kind)
        return drawn.mul_(self.rank**-0.5)

    def add(self, factor: Tensor) -> None:
        """Accumulate a gradient."""
        self.factor = factor if self.factor is None else self.factor.add_(factor)

    def count_step(self) -> None:
        """An optimizer step was made: P changes when its interval is over."""
        self.steps += 1
        self.seed += self.steps % self.interval == 0


class _CompactLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch) -> Tensor:
        ctx.sketch = sketch
        ctx.save_for_backward(x @ sketch.draw(x), weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, weight = ctx.saved_tensors
        dy = gradients[0]
        rows = dy.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            ctx.sketch.add(rows.T @ z.flatten(0, -2))
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, None, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class CompactLinear(nn.Linear):
    """A linear layer that keeps z = x P; exact but for its weight's gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return _CompactLinear.apply(x, self.weight, self.bias, self.weight.sketch)


def to_compact(
    linears: dict[str, nn.Linear], rank_of: Callable[[int], int], interval: int = 200
) -> None:
    """Change the layers in place, those of OUTPUTS excepted.

    Args:
        linears: by their qualified names.
        rank_of: the number of columns for in_features.
        interval: optimizer steps for which P stays (T in the paper).
    """
    changed = [linear for name, linear in linears.items() if not name.endswith(OUTPUTS)]
    for number, linear in enumerate(changed):
        features = linear.in_features
        linear.weight.sketch = Sketch(features, rank_of(features), number, interval)
        linear.__class__ = CompactLinear


class EagerCompactAdamW(torch.optim.AdamW):
    """AdamW for all weights; of sketched ones the moments are (out_features, rank).

    Args:
        scale: α of the paper, of sketched weights.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, scale: float = 0.25) -> None:
        super().__init__(params, lr=lr, weight_decay=0.0, fused=True)
        self.scale = scale

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear factors as well."""
        super().zero_grad(set_to_none)
        for weight in self._sketched():
            weight.sketch.factor = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """W ← W − η α N Pᵀ, where N is what AdamW makes of the factors; dense weights as ever."""
        super().step(closure)
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        for weight in self._sketched():
            sketch = weight.sketch
            if sketch.factor is None:
                continue
            state = self.state[weight]
            if not state:
                state["step"] = torch.zeros((), device=weight.device)
                state["exp_avg"] = torch.zeros_like(sketch.factor)
                state["exp_avg_sq"] = torch.zeros_like(sketch.factor)
            update = torch.zeros_like(sketch.factor)  # as a weight that was 0, it becomes −η N
            adamw(
                [update],
                [sketch.factor],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [state["step"]],
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=0.0,
                eps=group["eps"],
                maximize=False,
            )
            weight.addmm_(update, sketch.draw(update).T, alpha=self.scale)
            sketch.count_step()

    def _sketched(self) -> list[Any]:
        weights = self.param_groups[0]["params"]
        return [weight for weight in weights if hasattr(weight, "sketch")]
