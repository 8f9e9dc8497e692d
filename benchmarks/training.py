"""Models, batches and the measured loop that several benchmarks share."""

import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


def build(shape: dict[str, int], device: str) -> nn.Module:
    """A LLaMA in bf16; without a vocabulary only its blocks."""
    heads = shape.get("heads", shape["hidden"] // 128)
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["mlp"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=heads,
        num_key_value_heads=shape.get("kv_heads", heads),
        vocab_size=shape["vocabulary"] or 8,
        max_position_embeddings=shape["seq"],
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config) if shape["vocabulary"] else LlamaModel(config)
    return model.to(torch.bfloat16)


TENSORWISE = "tensorwise_with_gw_hp"
"""torchao's fastest recipe, but for weight gradients, which stay in bf16 and can be sketched."""


def to_float8(model: nn.Module, recipe: str) -> nn.Module:
    """The model with products in float8 in all linear layers but heads; a CPU emulates them.

    recipe: one of torchao's, or TENSORWISE.
    """
    from torchao.float8 import (
        CastConfig,
        Float8LinearConfig,
        ScalingType,
        convert_to_float8_training,
    )

    if recipe == TENSORWISE:
        as_it_is = [CastConfig(scaling_type=ScalingType.DISABLED) for _ in range(2)]
        config = Float8LinearConfig(
            cast_config_input_for_grad_weight=as_it_is[0],
            cast_config_grad_output_for_grad_weight=as_it_is[1],
        )
    else:
        config = Float8LinearConfig.from_recipe_name(recipe)
    if next(model.parameters()).device.type == "cpu":
        config = replace(config, emulate=True)
    return convert_to_float8_training(
        model,
        config=config,
        module_filter_fn=lambda _, name: not name.startswith(("lm_head", "classifier")),
    )


def inputs_of(shape: dict[str, int], device: str) -> dict[str, Tensor]:
    """A batch: token ids and labels, or what the blocks get from an embedding."""
    size = (shape["batch"], shape["seq"])
    if shape["vocabulary"]:
        tokens = torch.randint(shape["vocabulary"], size, device=device)
        return {"input_ids": tokens, "labels": tokens}
    kind = {"dtype": torch.bfloat16, "device": device}
    return {"inputs_embeds": torch.empty(*size, shape["hidden"], **kind).normal_()}


def loss_of(output: Any, target: Tensor | None) -> Tensor:
    """The model's own loss; a distance for blocks."""
    if target is None:
        return output.loss
    return nn.functional.mse_loss(output.last_hidden_state.float(), target.float())


@dataclass(frozen=True)
class Measured:
    """What `measure_steps` saw; bytes are those of CUDA's allocator, None on a CPU.

    Attributes:
        first: seconds of the first step, which compiles.
        seconds: of each later step.
        host: seconds of each in which all of it was launched; what is near to the whole step makes
            a GPU wait.
        optimizer_ms: of each of their optimizer steps.
        peak: bytes in use at the peak of all steps but the first: what CUDA graphs use is seen
            while they are recorded.
        reserved: the most that the allocator had from CUDA in them, gaps included.
        kept: bytes more after a forward pass than before it; None within CUDA graphs, and
        gradients: bytes more after the backward pass than before the forward pass; likewise.
        lasting: bytes more after all steps than before the first: states, and what belongs to them.
    """

    first: float
    seconds: list[float]
    host: list[float]
    optimizer_ms: list[float]
    peak: int | None
    reserved: int | None
    kept: int | None
    gradients: int | None
    lasting: int | None

    def row(self) -> dict[str, Any]:
        """Times in ms, memory in GB, as results have them."""
        return {
            "ms": 1e3 * statistics.median(self.seconds),
            "ms_fastest": 1e3 * min(self.seconds),
            "ms_slowest": 1e3 * max(self.seconds),
            "ms_mean": 1e3 * statistics.mean(self.seconds),
            "host_ms": 1e3 * statistics.median(self.host),
            "peak_gb": gigabytes(self.peak),
            "reserved_gb": gigabytes(self.reserved),
            "kept_gb": gigabytes(self.kept),
            "optimizer_ms": statistics.median(self.optimizer_ms),
            "first_step_s": self.first,
        }


def gigabytes(count: int | None) -> float | None:
    """10⁹ bytes, where they were counted."""
    return None if count is None else count / 1e9


def measure_steps(
    model: nn.Module,
    optimizer: Optimizer,
    inputs: dict[str, Tensor],
    target: Tensor | None,
    *,
    steps: int,
    warmup: int,
    passes: int = 1,
) -> Measured:
    """Train for a few steps; the numbers are of the last ones.

    Args:
        target: see `loss_of`.
        steps: that are measured, after the first and the warm-up.
        passes: forward and backward passes for each optimizer step.
    """
    on_cuda = next(model.parameters()).device.type == "cuda"

    def allocated() -> int:
        return torch.cuda.memory_allocated() if on_cuda else 0

    def now() -> float:
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def step() -> tuple[float, float, float, int, int]:
        optimizer.zero_grad()
        at_rest = allocated()
        start = now()
        for _ in range(passes):
            before = allocated()
            output = model(**inputs)
            kept = allocated() - before
            loss = loss_of(output, target)
            del output
            loss.backward()
        gradients = allocated() - at_rest
        if on_cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            optimizer.step()
            events[1].record()
            launched = time.perf_counter() - start
            whole = now() - start
            return whole, launched, events[0].elapsed_time(events[1]), kept, gradients
        before_optimizer = now()
        optimizer.step()
        end = now()
        return end - start, end - start, 1e3 * (end - before_optimizer), kept, gradients

    fresh = allocated()
    first, *_ = step()
    if on_cuda:
        torch.cuda.empty_cache()  # of compiling
        torch.cuda.reset_peak_memory_stats()
    for _ in range(warmup):
        step()
    results = [step() for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated() if on_cuda else None
    reserved = torch.cuda.max_memory_reserved() if on_cuda else None
    optimizer.zero_grad()
    seconds, host, optimizer_ms, kept, gradients = zip(*results, strict=True)
    is_counted = on_cuda and kept[-1] > 0  # what CUDA graphs keep was there before
    return Measured(
        first=first,
        seconds=list(seconds),
        host=list(host),
        optimizer_ms=list(optimizer_ms),
        peak=peak,
        reserved=reserved,
        kept=kept[-1] if is_counted else None,
        gradients=gradients[-1] if is_counted else None,
        lasting=allocated() - fresh if on_cuda else None,
    )
