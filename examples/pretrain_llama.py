"""Train a small LLaMA from scratch with several backends and compare them.

    python examples/pretrain_llama.py
    python examples/pretrain_llama.py --config 130m --rank 0.125 --batch 32 --seq 256
    torchrun --nproc-per-node 2 examples/pretrain_llama.py --parallel ddp
    torchrun --nproc-per-node 2 examples/pretrain_llama.py --parallel fsdp

The model is the one in transformers, unmodified. The optimizer is torch.optim.AdamW, with the same
settings in CompactAdamW where gradients are sketched. Every backend starts from the same weights
and sees the same batches. The text is the source code of the Python standard library, byte by byte,
so nothing is downloaded.
"""

import argparse
import functools
import gc
import json
import math
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from tabulate import tabulate
from text import VOCABULARY, batches, load_text
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import (
    CompactAdamW,
    CompactBackend,
    CompactConfig,
    compact_backend,
    exchange_factors,
    shard_placement,
)
from compact_fx.projections import KINDS

CONFIGS = Path(__file__).parent / "configs"
BACKENDS = ("eager", "inductor", "compact")
DTYPES = {"bf16": torch.bfloat16, "float32": None}
COLORS = {"eager": "tab:gray", "inductor": "tab:blue", "compact": "tab:orange"}
UNTIMED_STEPS = 2  # the first compiles, both allocate
LAST_STEPS = 20
VALIDATION_BATCHES = 16
VALIDATIONS = 8


@dataclass
class Result:
    """What one backend did."""

    backend: str
    losses: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    report: str | None = None

    @property
    def train_loss(self) -> float:
        """Mean over the last steps, since single batches are noisy."""
        return statistics.fmean(self.losses[-LAST_STEPS:])

    @property
    def step_seconds(self) -> float:
        """The usual time of a step; a median, so that a busy machine disturbs it little."""
        return statistics.median(self.seconds[UNTIMED_STEPS:])

    @property
    def compile_seconds(self) -> float | None:
        """What the first step took longer than the others."""
        return None if self.backend == "eager" else self.seconds[0] - self.step_seconds


class Parser(argparse.ArgumentParser):
    """Answers bad arguments with one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type for whole numbers that are not too small."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < smallest:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number ≥ {smallest}")
        return int(text)

    return parse


def positive(text: str) -> float:
    """An argparse type for finite numbers above zero."""
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number > 0")
    return number


def rank(text: str) -> float | int:
    """0.25 is a fraction of each weight's in_features, 64 an absolute rank."""
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction nor an int") from None


def make_parser() -> Parser:
    """All arguments."""
    parser = Parser(
        description="Train a small LLaMA from scratch with several backends and compare them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="tiny", help=f"{', '.join(config_names())}, or a path to a JSON file")
    add("--backend", nargs="+", choices=BACKENDS, default=BACKENDS, help="which to compare")
    add("--rank", type=rank, default=0.25, help="of the sketches: a fraction, or an int")
    modes = ("sketched", "dense")
    add("--gradients", default=CompactConfig.gradients, choices=modes, help="of sketched weights")
    add("--projection", choices=KINDS, help="of the sketches (tracked; countsketch where dense)")
    add("--update-interval", type=int, help="steps after which projections change (by their kind)")
    add("--steps", type=at_least(UNTIMED_STEPS + 1), default=300, help="optimizer steps")
    add("--batch", type=at_least(1), default=8, help="sequences in a batch")
    add("--seq", type=at_least(2), default=128, help="bytes in a sequence")
    add("--lr", type=positive, default=1e-3, help="peak learning rate")
    add("--seed", type=at_least(0), default=0, help="of weights, batches and projections")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="such as cuda:1")
    each = "under torchrun: each process has a part of the batch; with fsdp of the weights as well"
    add("--parallel", choices=("ddp", "fsdp"), help=each)
    add("--dtype", choices=DTYPES, help="bf16 is autocast (default: bf16 on CUDA, else float32)")
    add("--out", type=Path, default=Path("out"), help="folder for the figure and the JSON file")
    add("--report", action="store_true", help="print compact's whole report, not its verdict")
    add("--warm", action="store_true", help="use torch's compile caches: compile s means little")
    return parser


def config_names() -> list[str]:
    """The configurations that come with this example."""
    return sorted(file.stem.removeprefix("llama_") for file in CONFIGS.glob("llama_*.json"))


def load_config(name: str, length: int) -> LlamaConfig:
    """A configuration by name or path, with its vocabulary replaced: this example reads bytes."""
    file = CONFIGS / f"llama_{name}.json" if name in config_names() else Path(name)
    if not file.is_file():
        raise ValueError(f"unknown config {name!r}: a path, or one of {', '.join(config_names())}")
    try:
        settings = json.loads(file.read_text())
        config = LlamaConfig(**{**settings, "vocab_size": VOCABULARY, "use_cache": False})
    except Exception as error:  # transformers has kinds of its own for what it does not accept
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(f"{file} is no LlamaConfig: {reason}") from error
    if length > config.max_position_embeddings:
        raise ValueError(f"--seq {length} is above {config.max_position_embeddings} of {name!r}")
    return config


def make_model(config: LlamaConfig, seed: int, device: torch.device) -> LlamaForCausalLM:
    """The same weights for the same seed, on every device."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(device)


def shard(model: LlamaForCausalLM, backend: Any, sketched: bool) -> None:
    """Compile and shard block by block, as torchtitan does; the head is not compiled."""
    placement = shard_placement if sketched else None
    for block in model.model.layers:
        if backend is not None:
            block.compile(backend=backend)
        fully_shard(block, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)


def make_schedule(optimizer: Optimizer, steps: int) -> LambdaLR:
    """A tenth of the steps warms up, the others follow a cosine down to a tenth of the rate."""
    warm_up = max(1, steps // 10)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))

    return LambdaLR(optimizer, factor)


def loss_of(model: Any, tokens: Tensor, autocast: torch.dtype | None) -> Tensor:
    """Mean cross-entropy of the next byte, in nats."""
    with torch.autocast(tokens.device.type, autocast, enabled=autocast is not None):
        return model(input_ids=tokens, labels=tokens).loss


@torch.no_grad()
def validate(
    model: LlamaForCausalLM, held_out: list[Tensor], autocast: torch.dtype | None
) -> float:
    """Mean loss on held-out files; the model itself runs, so nothing is compiled for it."""
    model.eval()
    loss = statistics.fmean(loss_of(model, tokens, autocast).item() for tokens in held_out)
    model.train()
    return loss


def bytes_saved_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass keeps for the backward pass, apart from parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return saved.detach()  # an output kept by its own node would keep the graph for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        loss = forward()
    # Alive until here: a storage that was freed could lend its address to another one.
    del loss
    return sum(size for address, size in kept.items() if address not in own)


def mean_over_processes(loss: Tensor) -> float:
    """Of a loss that each has for its part of the batch."""
    if dist.is_initialized():
        loss = loss.clone()
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss.item()


def train(name: str, config: LlamaConfig, text: tuple[Tensor, Tensor], args: Any) -> Result:
    """Train one model from scratch with one backend."""
    autocast, device = DTYPES[args.dtype], args.device
    model = make_model(config, args.seed, device)
    backend = compact_backend(**args.settings) if name == "compact" else name
    sketched = name == "compact" and args.gradients == "sketched"
    called: nn.Module = model
    if args.parallel == "ddp":
        if sketched:
            exchange_factors(model)
        called = DistributedDataParallel(model)
    elif args.parallel == "fsdp":
        shard(model, None if name == "eager" else backend, sketched)
    by_blocks = args.parallel == "fsdp"
    compiled = called if name == "eager" or by_blocks else torch.compile(called, backend=backend)
    adamw = CompactAdamW if sketched else torch.optim.AdamW
    optimizer = adamw(model.parameters(), lr=args.lr)
    schedule = make_schedule(optimizer, args.steps)
    training, validation = (batches(part, args.batch, args.seq, args.seed) for part in text)
    held_out = [tokens.to(device) for tokens in islice(validation, VALIDATION_BATCHES)]

    result = Result(name, validation=[(0, validate(model, held_out, autocast))])
    progress = tqdm(
        islice(training, args.steps), f"{name:8}", args.steps, unit="step", disable=args.process > 0
    )
    for step, tokens in enumerate(progress, start=1):
        start = time.perf_counter()
        own = tokens[args.process :: args.processes].to(device)
        loss = loss_of(compiled, own, autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        result.losses.append(mean_over_processes(loss.detach()))  # waits for the device
        result.seconds.append(time.perf_counter() - start)
        speed = tokens.numel() / result.seconds[-1]
        progress.set_postfix_str(f"loss {result.losses[-1]:.3f}, {speed:,.0f} tokens/s")
        if step == UNTIMED_STEPS and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if step % math.ceil(args.steps / VALIDATIONS) == 0 or step == args.steps:
            result.validation.append((step, validate(model, held_out, autocast)))
    if device.type == "cuda":
        result.peak_bytes = torch.cuda.max_memory_allocated(device)
    if not by_blocks:  # there weights that were gathered would count
        forward = functools.partial(loss_of, compiled, own, autocast)
        result.saved_bytes = bytes_saved_for_backward(model, forward)
    if isinstance(backend, CompactBackend):
        result.report = str(backend.report())
    return result


def start_inductor(device: torch.device, keep_caches: bool) -> None:
    """Let the first compiled backend not pay for what all of them use, nor the others profit."""
    warnings.filterwarnings("ignore", message="dynamo_pgo force disabled")
    torch.compiler.config.force_disable_caches = not keep_caches
    module = torch.nn.Linear(8, 8, device=device)
    torch.compile(module)(torch.ones(4, 8, device=device)).sum().backward()


def cell(value: float | None, unit: float = 1.0) -> str:
    """A number for the table, or a dash for what was not measured."""
    return "-" if value is None else f"{value / unit:,.1f}"


def table(results: list[Result], tokens: int) -> str:
    """The comparison; `tokens` in a step."""
    rows = [
        {
            "backend": result.backend,
            "train loss": f"{result.train_loss:.3f}",
            "validation loss": f"{result.validation[-1][1]:.3f}",
            "tokens/s": f"{tokens / result.step_seconds:,.0f}",
            "compile s": cell(result.compile_seconds),
            "peak memory MB": cell(result.peak_bytes, 1e6),
            "saved for backward MB": cell(result.saved_bytes, 1e6),
        }
        for result in results
    ]
    align = ("left", *["right"] * 6)
    return tabulate(rows, headers="keys", colalign=align, disable_numparse=True)


def smooth(losses: list[float], decay: float = 0.95) -> list[float]:
    """Exponential moving average, without the pull of the first value."""
    average, weight, smoothed = 0.0, 0.0, []
    for loss in losses:
        average = decay * average + (1 - decay) * loss
        weight = decay * weight + 1 - decay
        smoothed.append(average / weight)
    return smoothed


def plot(results: list[Result], title: str, file: Path) -> None:
    """Training and validation loss over steps, side by side on one scale."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    training, validation = figure.subplots(1, 2, sharex=True, sharey=True)
    for number, result in enumerate(results):
        # Eager and inductor should agree: the earlier line is wider, so that it shows below.
        color = COLORS.get(result.backend)  # others: one of matplotlib's own
        style = {"color": color, "linewidth": 2 * (len(results) - number)}
        steps, losses = zip(*result.validation, strict=True)
        training.plot(range(1, len(result.losses) + 1), smooth(result.losses), **style)
        validation.plot(steps, losses, **style, label=f"{result.backend}: {losses[-1]:.3f}")
    # The first steps fall steeply; what tells the backends apart comes after them.
    later = [loss for r in results for loss in smooth(r.losses)[len(r.losses) // 10 :]]
    later += [loss for r in results for _, loss in r.validation[1:]]
    margin = 0.05 * (max(later) - min(later))
    training.set_ylim(min(later) - margin, max(later) + margin)
    training.set(title="training, smoothed", xlabel="optimizer step", ylabel="nats per byte")
    validation.set(title="held-out files", xlabel="optimizer step")
    for axes in (training, validation):
        axes.grid(alpha=0.3)
    validation.legend(title="loss at the end")
    figure.suptitle(title)
    figure.savefig(file, dpi=150)


def write_json(results: list[Result], args: argparse.Namespace, file: Path) -> None:
    """Everything that was measured, and with which arguments."""
    arguments = {name: value for name, value in vars(args).items() if name != "settings"}
    content = {
        "arguments": arguments,
        "torch": torch.__version__,
        "results": [asdict(result) for result in results],
    }
    file.write_text(json.dumps(content, indent=1, default=str) + "\n")


def start_processes(args: argparse.Namespace) -> tuple[int, int]:
    """This process and how many there are; with CUDA each has a device."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if not args.parallel:
        if processes > 1:
            raise ValueError(
                "several processes: say how they share the work (--parallel ddp, fsdp)"
            )
        return 0, 1
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(f"--parallel {args.parallel} needs torchrun --nproc-per-node N")
    if args.batch % processes:
        raise ValueError(f"--batch {args.batch} is not a multiple of {processes} processes")
    if torch.device(args.device).type == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    return dist.get_rank(), processes


def parse_arguments(
    arguments: Sequence[str] | None = None,
) -> tuple[argparse.Namespace, LlamaConfig]:
    """The arguments, the command line's or these, checked before anything runs."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    args.settings = {
        "rank": args.rank,
        "gradients": args.gradients,
        "projection": args.projection,
        "update_interval": args.update_interval,
        "seed": args.seed,
    }
    try:
        config = load_config(args.config, args.seq)
        compact_backend(**args.settings)
        args.process, args.processes = start_processes(args)
        args.device = torch.device(args.device)
        torch.empty(0, device=args.device)
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError, AssertionError, TypeError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    args.backend = list(dict.fromkeys(args.backend))
    args.dtype = args.dtype or ("bf16" if args.device.type == "cuda" else "float32")
    return args, config


def main() -> None:
    """Train with each backend and print, draw and write how they compare."""
    args, config = parse_arguments()
    text = load_text()
    if args.backend != ["eager"]:
        start_inductor(args.device, args.warm)
    results = []
    for name in args.backend:
        results.append(train(name, config, text, args))
        torch._dynamo.reset()
        gc.collect()
    if args.parallel:
        dist.destroy_process_group()
    if args.process:  # the first one writes
        return
    model = f"LLaMA {Path(args.config).stem}, {args.batch} x {args.seq} bytes a step, {args.dtype}"
    plot(results, f"{model}, {args.device.type}, rank {args.rank}", args.out / "loss.png")
    write_json(results, args, args.out / "results.json")

    print("\n" + table(results, args.batch * args.seq))
    for result in results:
        if result.report is not None:
            print("\n" + (result.report if args.report else result.report.split("\n\n")[0]))
    print(f"\nwritten: {args.out / 'loss.png'}, {args.out / 'results.json'}")


if __name__ == "__main__":
    main()
