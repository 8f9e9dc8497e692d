"""Two processes against one, as the benchmark does it with NCCL, here with gloo."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(processes, *options):
    """What it prints."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--standalone", str(ROOT / "benchmarks" / "exactness.py")]
    done = subprocess.run(
        [*command, *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
def test_two_processes_are_one(tmp_path):
    out, saved = tmp_path / "exactness.json", str(tmp_path / "saved")
    run(2, "--out", str(out), "--steps", "4", "--more", "4", "--checkpoint", saved)
    record = json.loads(out.read_text())
    assert record["ddp_weights_equal_to_the_bit"]
    ways = [(row["parallel"], row["gradients"]) for row in record["rows"]]
    assert ways == [(p, g) for g in ("sketched", "dense") for p in ("ddp", "fsdp")]
    for row in record["rows"]:
        assert row["full_rank_gradients"] < 1e-5, row
        assert row["quarter_losses"] < 1e-6, row
        assert row["quarter_weights"] < 1e-5, row

    printed = run(1, "--go-on", saved)
    assert float(re.search(r"1 processes: (\S+) apart", printed)[1]) < 1e-6
