"""What people do first, where nothing is installed but the wheel; run from another folder."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

import compact_fx
from compact_fx import CompactAdamW, SketchedGrad, compact_backend


def train(backend: object, **settings: object) -> None:
    """A few steps: gradients are sketched, and the loss goes down."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64))
    compiled = torch.compile(model, backend=backend, **settings)
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    x = torch.randn(256, 64)
    losses = []
    for _ in range(10):
        loss = (compiled(x) - x).square().mean()
        loss.backward()
        assert all(isinstance(model[i].weight.grad, SketchedGrad) for i in (0, 2))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses


assert Path(compact_fx.__file__).is_relative_to(sys.prefix), compact_fx.__file__
train(compact_backend(rank=0.5, inner="aot_eager"))
train("compact", options={"rank": 0.5, "inner": "aot_eager"})
print(compact_fx.explain(torch.nn.Linear(64, 64), torch.zeros(256, 64), rank=0.5))
subprocess.run([sys.executable, "-m", "compact_fx", "explain", "--help"], check=True)
print("compact_fx", importlib.metadata.version("compact_fx"), "works from its wheel")
