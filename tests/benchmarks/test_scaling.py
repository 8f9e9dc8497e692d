"""The benchmark on several GPUs: a dry run of two processes, and what they send."""

import json
import os
import subprocess
import sys
from argparse import Namespace
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
    options = ("--gpus", "2", "--parallel", "ddp of blocks")
    rows = run(out, *options)
    assert [(row["step"], row["gpus"]) for row in rows] == [("torch.compile", 2), (TRACKED, 2)]
    for row in rows:
        assert 0 <= row["sent_mb"] - row["predicted_mb"] < 100e-6, row
        assert row["ms"] > 0
        assert row["exchange_ms"] > 0
    assert rows[0]["sent_to_change_mb"] == 0
    assert rows[1]["sent_to_change_mb"] > 0
    assert rows[1]["sent_mb"] < 0.3 * rows[0]["sent_mb"]

    more = run(out, *options, "fsdp", "zero2")
    assert more[:2] == rows
    assert [row["parallel"] for row in more[2:]] == ["fsdp", "fsdp", "zero2", "zero2"]
    for row in more[2:]:
        assert row["sent_mb"] == pytest.approx(row["predicted_mb"], abs=100e-6)
    assert more[3]["sent_mb"] < more[2]["sent_mb"]
    assert more[5]["sent_mb"] < more[3]["sent_mb"]
    assert out.with_suffix(".png").stat().st_size > 10_000


@pytest.fixture
def scaling(monkeypatch, tmp_path):
    """The benchmark as a module."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # it sets this: undone at the end
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import scaling

    return scaling


def test_an_error_is_a_row(scaling, monkeypatch, tmp_path):
    """What a process raises, or that nothing has come; no process is left."""
    monkeypatch.setattr(scaling, "predicted", lambda *_: {})
    row = {"parallel": "ddp", "shape": "tiny", "step": "no such variant", "gpus": 1}
    args = Namespace(device="cpu", steps=1, warmup=0, timeout=100)
    assert scaling.measure(row, args, tmp_path) == {**row, "error": "KeyError: 'no such variant'"}
    args.timeout = 0.01
    assert scaling.measure(row, args, tmp_path)["error"] == "no result in 0.01 s"
    assert [path.name for path in tmp_path.iterdir()] == []


def test_ratios(scaling):
    """To torch.compile with as many GPUs, to one GPU in the same way, to what was predicted."""

    def row(step, gpus, ms, tokens):
        key = {"parallel": "ddp", "shape": "1b", "step": step, "gpus": gpus, "hardware": "H100"}
        own = {"ms": ms, "tokens_per_second": tokens, "peak_gb": ms / 10}
        return key | own | {"sent_mb": 3.0 * gpus, "predicted_mb": 4.0 * (gpus - 1)}

    rows = [
        row("torch.compile", 1, 100.0, 1000.0),
        row("torch.compile", 2, 120.0, 1500.0),
        row(TRACKED, 2, 60.0, 3000.0),
        {**row(TRACKED, 4, 1.0, 1.0), "hardware": "another"},
    ]
    scaling.with_ratios(rows)
    names = ("ms_ratio", "peak_ratio", "efficiency", "sent_of_predicted")
    assert [[row.get(name) for name in names] for row in rows] == [
        [1, 1, 1, None],
        [1, 1, 0.75, 1.5],
        [0.5, 0.5, None, 1.5],
        [None, None, None, 1],
    ]
