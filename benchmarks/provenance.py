"""Where a result comes from: every benchmark writes this beside its figures."""

import os
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Hardware, versions, command, date and commit: the variable COMMIT, or that of git."""
    cuda = torch.cuda.is_available()
    commit = os.environ.get("COMMIT", "")  # where a copy of the files has no history, or another
    if not commit:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
    }
