"""The benchmark on several GPUs: a dry run of two processes, and what they send."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = "compact n/4, tracked"


def run(out, *options):
    """One call of the command line on the CPU."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / "scaling.py")]
    command += ["--device", "cpu", "--shape", "tiny", "--steps", "1", "--warmup", "0"]
    done = subprocess.run(
        [*command, "--out", str(out), *options],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text())["rows"]


@pytest.mark.long
def test_two_processes_send_what_is_predicted(tmp_path):
    """Every byte but flags and counters; what is there is not measured again."""
    out = tmp_path / "scaling.json"
    rows = run(out, "--gpus", "2", "--parallel", "ddp of blocks")
    assert [(row["step"], row["gpus"]) for row in rows] == [("torch.compile", 2), (TRACKED, 2)]
    for row in rows:
        assert 0 <= row["sent_mb"] - row["predicted_mb"] < 100e-6, row
        assert row["ms"] > 0
        assert row["exchange_ms"] > 0
    assert rows[0]["sent_to_change_mb"] == 0
    assert rows[1]["sent_to_change_mb"] > 0
    assert rows[1]["sent_mb"] < 0.3 * rows[0]["sent_mb"]

    more = run(
        out,
        "--gpus",
        "1",
        "2",
        "--parallel",
        "ddp of blocks",
        "fsdp",
        "--variants",
        "torch.compile",
    )
    assert more[:2] == [{**row, **changed_since(row, more)} for row in rows]
    sharded = next(row for row in more if (row["parallel"], row["gpus"]) == ("fsdp", 2))
    assert sharded["sent_mb"] == pytest.approx(sharded["predicted_mb"], abs=100e-6)
    alone = next(row for row in more if (row["parallel"], row["gpus"]) == ("fsdp", 1))
    assert alone["sent_mb"] == 0
    assert alone["efficiency"] == 1
    assert out.with_suffix(".png").stat().st_size > 10_000


def changed_since(row, rows):
    """The one figure that a later row adds to an earlier one."""
    found = next(
        r
        for r in rows
        if (r["step"], r["gpus"], r["parallel"]) == (row["step"], row["gpus"], row["parallel"])
    )
    return {"efficiency": found["efficiency"]} if "efficiency" in found else {}


def test_an_error_is_a_row(tmp_path):
    """One that a process raises; the next call tries again."""
    out = tmp_path / "scaling.json"
    options = ["--gpus", "2", "--parallel", "fsdp", "--variants", "torch.compile"]
    rows = run(out, *options, "--timeout", "0.01")
    assert rows[0]["error"] == "no result in 0.01 s"
