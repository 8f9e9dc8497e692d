"""Text to train on that is there offline: the Python sources of this machine, as tokens."""

import hashlib
import json
import os
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

BYTES = 256
HELD_OUT = 20  # one name in so many is for validation
SEED = 0  # of the files' order, and so of what is beyond the limit
SEPARATOR = "\0"  # between files
BLOCK = 2_000_000  # bytes that are encoded at once


def roots() -> list[Path]:
    """Folders of Python sources: of the running Python, and of the system's."""
    paths = sysconfig.get_paths()
    found = [Path(paths[name]) for name in ("stdlib", "purelib", "platlib")]
    found += [
        folder for base in ("/usr/lib", "/usr/local/lib") for folder in Path(base).glob("python3*")
    ]
    return sorted({folder.resolve() for folder in found if folder.is_dir()})


def source_files() -> list[Path]:
    """All Python files below the roots, each once, in a fixed order."""
    return sorted({file for root in roots() for file in root.rglob("*.py") if file.is_file()})


def is_held_out(file: Path) -> bool:
    """By its last two names: copies of a file, vendored or of another version, go together."""
    name = "/".join(file.parts[-2:]).encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") % HELD_OUT == 0


def contents(files: list[Path], limit: int) -> tuple[list[bytes], list[bytes]]:
    """Training and validation files, shuffled, without duplicates, `limit` bytes together."""
    files = list(files)
    random.Random(SEED).shuffle(files)
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    seen, size = set(), 0
    for file in files:
        content = file.read_bytes()
        digest = hashlib.sha256(content).digest()
        if not content or digest in seen:
            continue
        seen.add(digest)
        parts[is_held_out(file)].append(content)
        size += len(content)
        if size > limit:
            break
    return parts


def blocks(files: list[bytes], limit: float = float("inf")) -> Iterator[list[str]]:
    """Texts of some MB at a time, up to `limit` bytes."""
    block, size, total = [], 0, 0
    for file in files:
        block.append(file.decode(errors="replace"))
        size, total = size + len(file), total + len(file)
        if size > BLOCK or total > limit:
            yield block
            block, size = [], 0
        if total > limit:
            return
    if block:
        yield block


def train_tokenizer(files: list[bytes], vocabulary: int, limit: int) -> Tokenizer:
    """A byte-level BPE of the first files; token 0 stands between files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(blocks(files, limit), trainer)
    return tokenizer


def encode(files: list[bytes], tokenizer: Tokenizer | None) -> numpy.ndarray:
    """All files in one row, as bytes or as tokens, a separator behind each."""
    if tokenizer is None:
        return numpy.frombuffer(b"".join(file + SEPARATOR.encode() for file in files), "uint8")
    rows = (
        [*encoding.ids, 0]
        for block in blocks(files)
        for encoding in tokenizer.encode_batch_fast(block, add_special_tokens=False)
    )
    return numpy.concatenate([numpy.array(row, "int16") for row in rows])


def load(
    vocabulary: int, cache: Path, limit: int = 250_000_000, bpe_limit: int = 30_000_000
) -> tuple[str, list[Tensor]]:
    """Training and validation tokens, from the cache where they are there.

    Args:
        vocabulary: 256 for bytes, otherwise of a BPE, at most 2**15.
        cache: a folder that processes may share.
        limit: bytes of text.
        bpe_limit: bytes that the BPE is made from.

    Returns:
        A name for the text, which is another one where files or settings are, and two vectors.
    """
    files = source_files()
    listed = [(str(file), file.stat().st_size) for file in files]
    settings = (listed, vocabulary, limit, bpe_limit, HELD_OUT, SEED)
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    paths = [cache / f"{key}_{part}.npy" for part in ("training", "validation")]
    if not all(path.exists() for path in paths):
        cache.mkdir(parents=True, exist_ok=True)
        parts = contents(files, limit)
        sizes = [sum(map(len, part)) / 1e6 for part in parts]
        print(f"{sizes[0]:.0f} + {sizes[1]:.0f} MB of Python sources, {key}", flush=True)
        tokenizer = None
        if vocabulary != BYTES:
            tokenizer = train_tokenizer(parts[0], vocabulary, bpe_limit)
            tokenizer.save(str(cache / f"{key}_bpe.json"))
        for part, path in zip(parts, paths, strict=True):
            partial = path.with_name(f"{path.stem}_{os.getpid()}.npy")
            numpy.save(partial, encode(part, tokenizer))
            partial.replace(path)  # whole or not at all, for the other processes
    return key, [torch.from_numpy(numpy.load(path)) for path in paths]
