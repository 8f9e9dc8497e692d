"""The first thing that is imported: nothing else can be trusted to import on an older torch."""

import torch

OLDEST = "2.11"


def check_torch() -> None:
    """Raise where this package would fail later, in the middle of a compilation.

    Raises:
        ImportError: torch is older than what is supported.
    """
    if torch.__version__ < OLDEST:  # a TorchVersion compares as a version
        raise ImportError(
            f"compact_fx needs torch {OLDEST} or newer, this is {torch.__version__}: "
            "pip install --upgrade torch"
        )


check_torch()
