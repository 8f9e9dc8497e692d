"""What a person sees with `logging`, TORCH_LOGS and TORCH_TRACE."""

import json
import logging
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from compact_fx import compact_backend

SCRIPT = """
import torch
from compact_fx import compact_backend
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64))
backend = compact_backend(gradients="dense", inner="aot_eager", strict=True)
torch.compile(model, backend=backend)(torch.randn(32, 64))
"""


def test_one_line_for_each_graph_and_each_site(caplog):
    """INFO is short, DEBUG is complete; both below the logger "compact_fx"."""
    caplog.set_level(logging.DEBUG, logger="compact_fx")
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    backend = compact_backend(inner="aot_eager", strict=True)
    torch.compile(model, backend=backend)(torch.randn(32, 64))
    (plan,) = backend.plans
    records = [record for record in caplog.records if record.name == "compact_fx.backend"]
    (info,) = [r.getMessage() for r in records if r.levelno == logging.INFO]
    assert info == (
        f"graph 0: 2 of 2 weight gradients sketched, {plan.account.bytes_before} → "
        f"{plan.account.bytes_after} bytes kept for backward"
    )
    debug = [r.getMessage() for r in records if r.levelno == logging.DEBUG]
    assert [re.search("weight='(.*?)'", line).group(1) for line in debug] == [
        "0.weight",
        "2.weight",
    ]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """One process with both variables set: what it printed, and the structured trace."""
    folder = tmp_path_factory.mktemp("trace")
    environment = os.environ | {"TORCH_LOGS": "+compact_fx", "TORCH_TRACE": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    (file,) = folder.iterdir()
    return done.stderr, file.read_text().splitlines()


def test_torch_logs(traced):
    """Its setting turns them on, and torch prints them."""
    printed, _ = traced
    assert len(re.findall(r"graph 0: 2 of 2 weight gradients sketched", printed)) == 1
    assert len(re.findall(r"graph 0: Site\(weight=", printed)) == 2


def test_torch_trace(traced):
    """The plan as JSON, the diff and the graphs as text are artifacts that tlparse shows."""
    _, lines = traced
    artifacts = {}
    for number, line in enumerate(lines):
        found = re.search(r'"artifact": (\{"name": "compact_fx_.*?\})', line)
        if found:
            metadata = json.loads(found.group(1))
            payload = []
            for later in lines[number + 1 :]:
                if not later.startswith("\t"):
                    break
                payload.append(later[1:])
            artifacts[metadata["name"]] = metadata["encoding"], "\n".join(payload)
    graphs = {f"compact_fx_{n}_0" for n in ("joint_before", "joint_after", "forward", "backward")}
    assert set(artifacts) == {"compact_fx_plan_0", "compact_fx_diff_0", *graphs}
    encoding, plan = artifacts["compact_fx_plan_0"]
    assert encoding == "json"
    assert json.loads(plan)["totals"]["sketched"] == 2
    encoding, diff = artifacts["compact_fx_diff_0"]
    assert encoding == "string"
    assert "random_projection" in diff
