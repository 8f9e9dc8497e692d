"""Inductor's and AOTAutograd's caches: the same settings hit, any other misses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from compact_fx import compact_backend

settings = {"gradients": "dense", "projection": "countsketch", **json.loads(sys.argv[1])}
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
backend = compact_backend(strict=True, **settings)
torch.compile(model, backend=backend)(torch.randn(32, 64)).sum().backward()
print(json.dumps({
    "aot": [counters["aot_autograd"][f"autograd_cache_{x}"] for x in ("hit", "miss")],
    "fx": [counters["inductor"][f"fxgraph_cache_{x}"] for x in ("hit", "miss")],
    "report": backend.report().to_json(),
    "text": backend.report().table(wide=True),
    "gradient": model[0].weight.grad.double().sum().item(),
}))
"""


@pytest.fixture
def run(tmp_path: Path):
    """Run the script in a process of its own, all on one cache."""

    def in_process(path: Path | None = None, **settings: object) -> dict[str, object]:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
        if path is not None:
            environment["PYTHONPATH"] = str(path)
        command = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
        return result

    return in_process


@pytest.mark.long
def test_caches_hit_and_miss_when_they_must(run, tmp_path: Path):
    """Another rank, kind, or source of a pass never gets an old entry; a second process does."""
    cold = run(rank=0.25)
    assert cold["aot"] == [0, 1]
    warm = run(rank=0.25)
    assert warm["aot"] == [1, 0]
    assert warm["fx"][1] == 0
    assert warm["report"] == cold["report"]
    assert warm["text"] == cold["text"]
    assert "0.weight" in cold["text"]
    assert warm["gradient"] == cold["gradient"]
    assert run(rank=0.5)["aot"] == [0, 1]
    assert run(rank=0.25, projection="rademacher")["aot"] == [0, 1]
    # What no plan depends on: hits, with the right gradients.
    other_seed = run(rank=0.25, seed=1, update_interval=7)
    assert other_seed["aot"] == [1, 0]
    assert other_seed["gradient"] != cold["gradient"]
    assert run(rank=16)["aot"] == [1, 0]  # the same columns as 0.25 of 64

    # A pass edited in a copy of the package: the same graph, settings and torch, other source.
    import compact_fx

    root = Path(compact_fx.__file__).parent
    copy = tmp_path / "edited" / "compact_fx"
    for file in root.rglob("*.py"):
        target = copy / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    (copy / "passes").mkdir()
    for file in Path(compact_fx.passes.__path__[0]).glob("*.py"):
        (copy / "passes" / file.name).write_text(file.read_text() + "\n# edited\n")
    assert run(path=tmp_path / "edited", rank=0.25)["aot"] == [0, 1]
