"""Two processes, for tests of what they exchange."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def run_two(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Runs scenarios of a script beside this file in two processes: their results on each rank.

    What they keep for a later run lies in `checkpoints`, beside their own folders.
    """

    def run(script: str, *names: str) -> dict[str, Any]:
        folder, here = tmp_path_factory.mktemp("two"), Path(__file__).parent
        command = [sys.executable, "-W", "ignore", str(here / script)]
        path = os.pathsep.join(filter(None, [str(here.parents[2]), os.environ.get("PYTHONPATH")]))
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(folder), *names],
                env={**os.environ, "PYTHONPATH": path},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        errors = [process.communicate(timeout=500)[1] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(errors)
        first, second = (torch.load(folder / f"{r}.pt", weights_only=False) for r in (0, 1))
        return {name: (first[name], second.get(name)) for name in first}

    run.checkpoints = tmp_path_factory.getbasetemp() / "checkpoints"  # type: ignore[attr-defined]
    return run
