"""Where a result comes from: every benchmark writes this beside its figures."""

import os
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

import torch


def provenance() -> dict[str, str]:
    """Hardware, versions, command, date and commit: of git, or the variable COMMIT."""
    cuda = torch.cuda.is_available()
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        commit = done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = os.environ.get("COMMIT", "unknown")
    return {
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
        "commit": commit,
        "command": shlex.join(["python", *sys.argv]),
    }
