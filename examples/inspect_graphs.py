"""What the backend does to a graph: of one linear layer, then of one LLaMA block.

python examples/inspect_graphs.py
"""

import argparse

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from compact_fx import CompactedGraphs, explain
from compact_fx.reading.graphs import text_of


class Block(nn.Module):
    """One block of a LLaMA, with the rotary embedding that Hugging Face makes once for all."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.rotary, self.block = LlamaRotaryEmbedding(config), LlamaDecoderLayer(config, 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1])[None]
        return self.block(x, position_embeddings=self.rotary(x, positions))


def linear_layer() -> tuple[nn.Module, torch.Tensor]:
    """y = x Wᵀ + b for 128 tokens."""
    return nn.Linear(64, 48), torch.zeros(128, 64)


def llama_block() -> tuple[nn.Module, torch.Tensor]:
    """64 features, an MLP of 176, 2 × 64 tokens."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=4,
        vocab_size=32,
        attn_implementation="sdpa",
    )
    return Block(config), torch.zeros(2, 64, 64)


def show(title: str, graphs: CompactedGraphs) -> None:
    """Before, what changes, and both sides of the boundary."""
    parts = {
        "joint graph before": text_of(graphs.joint_before),
        "diff": graphs.diff().splitlines(),
        "forward": text_of(graphs.forward),
        "backward": text_of(graphs.backward),
    }
    for name, lines in parts.items():
        print(f"\n=== {title}: {name}\n")
        print("\n".join(lines))


def main() -> None:
    """Analyse both; nothing is run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--recompute", action="store_true", help="rebuild matmul inputs, too")
    args = parser.parse_args()
    for title, (model, x) in {"linear": linear_layer(), "block": llama_block()}.items():
        found = explain(model, x, rank=args.rank, gradients="dense", recompute=args.recompute)
        show(title, found.graphs[0])


if __name__ == "__main__":
    main()
