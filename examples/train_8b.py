"""Train a model of LLaMA-3-8B's shape, all of it, on a GPU of 24 GB without paging.

    python examples/train_8b.py --memory 24             # on a GPU
    python examples/train_8b.py --memory 80 --no-checkpoints --rank 0.125 --batch 6 --at-once 2048
    python examples/train_8b.py --tiny                  # the same code on a CPU, in a minute

The model is the one in transformers, unmodified, with random weights, and reads the sources of
Python's standard library byte by byte: this shows memory and time, not what such a model learns.

- Each layer is a compiled graph of its own, in a checkpoint. One layer's activations are alive at a
  time, its gradients are factors, and they are stepped (`step_in_backward`) before the layer below
  begins. In one graph of the whole model all gradients would be there at its end.
- The loss is made a few tokens at a time, each part in a checkpoint: logits of 128256 words never
  exist in full.
- Weights are made on the device, in bf16, and there is no copy in float32. torch rounds an update
  to the nearest bf16: what is less than 1/512 to 1/256 of a weight is lost. Of weights as large as
  0.02 that is most of what AdamW changes at rates below 4e-5; there use weights in float32.

- The head is sketched like the layers: its gradient and moments would take as much as those of two.

`--count` prints what has to be there, from shapes alone.
"""

import argparse
import time
from itertools import islice
from typing import Any

import torch
from tabulate import tabulate
from text import batches, load_text
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import CompactAdamW, compact_backend

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
STATES = {"bf16": (torch.bfloat16, 2), "fp8": ("fp8", 1)}
"""By name: what `CompactAdamW` is given, and bytes of a moment."""


def make_model(
    config: LlamaConfig, device: torch.device, *, checkpoints: bool = True
) -> LlamaForCausalLM:
    """Random weights in bf16, made where they stay."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    if checkpoints:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def compile_parts(model: LlamaForCausalLM, backend: Any) -> Any:
    """Every layer by itself; returns the compiled loss of some tokens, summed."""
    for layer in model.model.layers:
        layer.compile(backend=backend)

    def loss_of(hidden: Tensor, labels: Tensor) -> Tensor:
        logits = model.lm_head(hidden).float()
        return nn.functional.cross_entropy(logits, labels, reduction="sum")

    return torch.compile(loss_of, backend=backend)


def mean_loss(model: LlamaForCausalLM, part: Any, tokens: Tensor, at_once: int) -> Tensor:
    """Of the next token, `at_once` tokens at a time."""
    hidden = model.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    parts = hidden.flatten(0, 1).split(at_once), tokens[:, 1:].flatten().split(at_once)
    losses = [checkpoint(part, *pair, use_reentrant=False) for pair in zip(*parts, strict=True)]
    return torch.stack(losses).sum() / tokens[:, 1:].numel()


def counted(config: LlamaConfig, rank: float, moment: int, batch: int, seq: int) -> dict[str, int]:
    """Bytes of what has to be there; P is of each weight's smaller side.

    Args:
        moment: bytes of each element of a moment.
    """
    n, m, words = config.hidden_size, config.intermediate_size, config.vocab_size
    kv = n * config.num_key_value_heads // config.num_attention_heads
    layers, r, r_kv = config.num_hidden_layers, int(rank * n), int(rank * kv)
    weights = layers * (2 * n * n + 2 * n * kv + 3 * n * m + 2 * n) + 2 * words * n + n
    factors = layers * ((2 * n + 3 * m) * r + 2 * n * r_kv) + words * r
    # q, o, gate and up together, down; k and v; the head
    projections = layers * (4 * n * r + 2 * kv * r_kv) + n * r
    tokens = batch * seq
    return {
        "weights": 2 * weights,
        "P in bf16, and its gradient in float32": 6 * projections,
        "moments of factors": 2 * moment * factors,
        "moments of the embedding": 2 * moment * words * n,
        "the embedding's gradient": 2 * words * n,
        "inputs of layers": 2 * layers * tokens * n,
        "one layer's work": 2 * tokens * (5 * m + 8 * n),
    }


def train(args: argparse.Namespace, config: LlamaConfig, device: torch.device) -> None:
    """A few steps; prints loss, seconds and peak memory of each."""
    if device.type == "cuda" and args.memory is not None:
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 1e9 / whole))
    model = make_model(config, device, checkpoints=not args.no_checkpoints)
    model.model.embed_tokens.requires_grad_(not args.freeze_embedding)
    backend = compact_backend(rank=args.rank, sketch_heads=True, strict=True)
    part = compile_parts(model, backend)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    state_dtype, _ = STATES[args.state_dtype]
    optimizer = CompactAdamW(
        trained, lr=args.lr, state_dtype=state_dtype, step_in_backward=True, fused=True
    )
    text, _ = load_text()
    for step, tokens in enumerate(islice(batches(text, args.batch, args.seq + 1, 0), args.steps)):
        start = time.perf_counter()
        loss = mean_loss(model, part, tokens.to(device), args.at_once)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value, seconds = loss.item(), time.perf_counter() - start
        rate = tokens[:, 1:].numel() / seconds
        line = f"step {step}: loss {value:.4f}, {seconds:.2f} s, {rate:.0f} tokens/s"
        if device.type == "cuda":
            line += f", peak {torch.cuda.max_memory_allocated(device) / 1e9:.2f} GB"
        print(line, flush=True)
    print(backend.report())


def main() -> None:
    """Count or train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tiny", action="store_true", help="two layers of width 64")
    add("--count", action="store_true", help="print what has to be there, and stop")
    add("--memory", type=float, metavar="GB", help="no more than this of the GPU (10⁹ bytes)")
    add("--rank", type=float, default=1 / 16, help="of hidden_size (1/16)")
    add("--state-dtype", choices=STATES, default="bf16", help="of moments (bf16)")
    add("--freeze-embedding", action="store_true", help="all but the embedding are trained")
    add("--batch", type=int, default=1, help="sequences (1)")
    add("--seq", type=int, help="tokens in one (2048; tiny: 64)")
    add("--at-once", type=int, default=256, help="tokens of which logits are there (256)")
    add("--no-checkpoints", action="store_true", help="layers keep their activations")
    add("--lr", type=float, default=1e-4, help="(1e-4)")
    add("--steps", type=int, default=8, help="(8)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.seq = args.seq or (64 if args.tiny else 2048)
    config = LlamaConfig(**(TINY if args.tiny else SHAPE), use_cache=False)
    if args.count:
        if args.no_checkpoints:
            parser.error("--count is of a run with checkpoints: leave --no-checkpoints away")
        _, moment = STATES[args.state_dtype]
        parts = counted(config, args.rank, moment, args.batch, args.seq)
        rows = [[name, f"{size / 1e9:.2f}"] for name, size in parts.items()]
        print(tabulate([*rows, ["all", f"{sum(parts.values()) / 1e9:.2f}"]], ["", "GB"]))
        return
    train(args, config, torch.device(args.device))


if __name__ == "__main__":
    main()
