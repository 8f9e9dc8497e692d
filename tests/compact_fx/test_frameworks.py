"""Two gloo processes under a framework against one that accumulates: `frameworks.py` runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHARDED = ["trainer, fsdp", "accelerate, fsdp", "accelerate, placed"]


def run(processes, *arguments):
    """Of each process: losses of steps, the model's state, how often P has changed, and P."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *(launch if processes > 1 else []), *arguments],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    files = [Path(arguments[-1]) / f"{processes}-{rank}.pt" for rank in range(processes)]
    return [torch.load(file) for file in files]


@pytest.mark.long
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("framework", ["trainer", "accelerate", "lightning", *SHARDED])
def test_two_processes_are_one(framework, accumulation, tmp_path):
    """Sketched gradients, tracked projections that change, clipping: the same losses."""
    assert check(framework, accumulation, tmp_path, 1e-4) == 3


@pytest.mark.long
@pytest.mark.parametrize("framework", ["trainer, fsdp", "accelerate, fsdp"])
def test_full_rank_is_one_process(framework, tmp_path):
    """Sharded by FSDP2: nothing but the way gradients travel could differ."""
    check(f"{framework}, full", 1, tmp_path, 1e-5)


def check(framework, accumulation, folder, tolerance):
    """Losses are those of one process, and all ranks have the same; how often P has changed."""
    pytest.importorskip("pytorch_lightning" if framework == "lightning" else "accelerate")
    script = str(Path(__file__).with_name("frameworks.py"))
    [(expected, _, generation, _)] = run(1, script, framework, str(2 * accumulation), str(folder))
    (first, weights, own, matrix), (second, others, other, other_matrix) = run(
        2, script, framework, str(accumulation), str(folder)
    )
    torch.testing.assert_close((first + second) / 2, expected, rtol=tolerance, atol=0.0)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert own == other == generation
    assert torch.equal(matrix, other_matrix)
    return generation
