"""Byte-level text that every Python installation has: the sources of the standard library."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
HELD_OUT = 20  # one file in so many is for validation
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_files(root: Path) -> list[Path]:
    """All Python files below `root` but tests and installed packages, in a fixed order."""
    files = (file.relative_to(root) for file in root.rglob("*.py"))
    kept = (file for file in files if not _SKIPPED.intersection(file.parts))
    return [root / file for file in sorted(kept, key=Path.as_posix)]


def load_text() -> tuple[Tensor, Tensor]:
    """Training and validation bytes as uint8 vectors; they are split by file, never within one."""
    files = source_files(Path(sysconfig.get_paths()["stdlib"]))
    training = [file for index, file in enumerate(files) if index % HELD_OUT]
    return _read(training), _read(files[::HELD_OUT])


def batches(text: Tensor, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Random windows of the text as (batch, length) int64 tensors, endless; a seed decides all."""
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(length)
    while True:
        starts = torch.randint(len(text) - length + 1, (batch, 1), generator=generator)
        yield text[starts + window].long()


def _read(files: list[Path]) -> Tensor:
    content = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
