"""Two processes against one, as the benchmark does it with NCCL, here with gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_two_processes_are_one(tmp_path):
    out = tmp_path / "exactness.json"
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(ROOT / "benchmarks" / "exactness.py"), "--out", str(out)]
    done = subprocess.run(
        [*command, "--steps", "4", "--more", "4"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(out.read_text())
    assert record["ddp_weights_equal_to_the_bit"]
    ways = [(row["parallel"], row["gradients"]) for row in record["rows"]]
    assert ways == [(p, g) for g in ("sketched", "dense") for p in ("ddp", "fsdp")]
    for row in record["rows"]:
        assert row["full_rank_gradients"] < 1e-5, row
        assert row["quarter_losses"] < 1e-6, row
        assert row["quarter_weights"] < 1e-5, row
