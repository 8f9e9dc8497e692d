"""Two gloo processes under a framework against one that accumulates: `frameworks.py` runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(processes, *arguments):
    """Of each process: losses of steps, the model's state, and how often P has changed."""
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
@pytest.mark.parametrize("framework", ["trainer", "accelerate", "lightning"])
def test_two_processes_are_one(framework, accumulation, tmp_path):
    """Sketched gradients, tracked projections that change, clipping: the same losses."""
    pytest.importorskip("pytorch_lightning" if framework == "lightning" else "accelerate")
    script = str(Path(__file__).with_name("frameworks.py"))
    [(expected, _, generation)] = run(1, script, framework, str(2 * accumulation), str(tmp_path))
    (first, weights, _), (second, others, _) = run(
        2, script, framework, str(accumulation), str(tmp_path)
    )
    torch.testing.assert_close((first + second) / 2, expected, rtol=1e-4, atol=0.0)
    assert generation == 3
    assert all(torch.equal(weights[name], others[name]) for name in weights)
