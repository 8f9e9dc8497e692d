"""Loss of small LLaMAs on Python sources, trained in full rank, sketched, and by other methods.

    python benchmarks/quality.py --prepare 25m 60m
    python benchmarks/quality.py --runs benchmarks/runs/quick.json --out out/quality.jsonl
    python benchmarks/quality.py --table out/quality.jsonl --plot out/quality.jsonl

A run is a JSON object: the settings in DEFAULTS, any of `CompactConfig`, and those in OPTIONAL.
Called again, it goes on with the runs that the results do not have yet.
"""

import argparse
import gc
import importlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")  # nothing stale

import sources
import torch
from provenance import provenance
from quality_results import DEFAULTS, Run, key_of, label, plot, plot_ranks, read, table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import CompactAdamW, CompactConfig, compact_backend, compact_optimizer

SHAPES = {  # hidden, layers, MLP, heads, vocabulary, sequences, tokens in each
    "tiny": (128, 4, 344, 4, sources.BYTES, 16, 128),
    "25m": (512, 8, 1376, 8, sources.BYTES, 64, 512),
    "60m": (512, 8, 1376, 8, 2**14, 64, 512),
    "130m": (768, 12, 2048, 12, 2**14, 64, 512),
}
METHODS = ("adamw", "compact", "muon", "compact muon", "galore", "apollo")
STEPPING = ("scale", "refresh")  # of sketched weights: goes to CompactAdamW
OPTIONAL = (*(f.name for f in fields(CompactConfig) if f.name not in DEFAULTS), *STEPPING)
CHUNKS = 40  # parts of a run; the first, which compiles, is not timed
VALIDATIONS = 4
VALIDATION_BATCHES = 20
VALIDATION_SEED = 7


def settings_of(run: Run, args: argparse.Namespace) -> Run:
    """A run with all its settings, checked."""
    given = {k: v for k, v in (("steps", args.steps), ("inner", args.inner)) if v is not None}
    settings = {**DEFAULTS, **given, **{k: v for k, v in run.items() if k != "name"}}
    unknown = settings.keys() - DEFAULTS.keys() - set(OPTIONAL)
    if unknown:
        raise ValueError(f"{run}: unknown {', '.join(sorted(unknown))}")
    if settings["model"] not in SHAPES or settings["method"] not in METHODS:
        raise ValueError(f"{run}: models {', '.join(SHAPES)}; methods {', '.join(METHODS)}")
    if settings["method"] not in ("adamw", "muon") and settings["rank"] is None:
        raise ValueError(f"{run}: no rank")
    return settings


def make_model(settings: Run, device: torch.device) -> LlamaForCausalLM:
    """The LLaMA of transformers, with the same weights for the same seed on every device."""
    hidden, layers, mlp, heads, vocabulary, _, length = SHAPES[settings["model"]]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(settings["seed"])
    return LlamaForCausalLM(config).to(device)


def low_rank_class(package: str, module: str) -> Any:
    """The AdamW of a package whose __init__ wants bitsandbytes, which its other classes need."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise ModuleNotFoundError(f"pip install --no-deps {package.replace('_', '-')}")
    sys.modules.setdefault(package, importlib.util.module_from_spec(spec))
    return importlib.import_module(f"{package}.{module}").AdamW


def make_optimizers(model: nn.Module, settings: Run) -> list[Optimizer]:
    """What steps the model; attention and MLP matrices are what other methods treat apart."""
    method, lr = settings["method"], settings["lr"]
    common = {"lr": lr, "betas": settings["betas"], "weight_decay": settings["weight_decay"]}
    own = {k: settings[k] for k in STEPPING if k in settings}
    linear = [m.weight for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if all(p is not weight for weight in linear)]
    rest = {"params": others, "lr": lr * settings["rest_lr"]}
    adamw: Any = torch.optim.AdamW
    if method.startswith("compact") and settings.get("gradients") != "dense":
        adamw = partial(CompactAdamW, **own)
    if method in ("adamw", "compact"):
        return [adamw([{"params": linear}, rest], fused=True, **common)]
    if method in ("muon", "compact muon"):
        muon: Any = torch.optim.Muon
        if method == "compact muon":
            muon = partial(compact_optimizer, muon, decoupled_weight_decay=True, **own)
        decay = settings["weight_decay"]
        first = muon(linear, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
        return [first, adamw([rest], fused=True, **common)]
    groups: dict[int, list[nn.Parameter]] = defaultdict(list)
    for weight in linear:
        rank, least = settings["rank"], min(weight.shape)
        groups[rank if isinstance(rank, int) else round(rank * least)].append(weight)
    own = {"update_proj_gap": settings.get("update_interval") or 200, "proj_type": "std"}
    if method == "galore":  # as its README
        own |= {"scale": settings.get("scale", 0.25)}
        optimizer_class = low_rank_class("galore_torch", "adamw")
    else:
        own |= {"scale": settings.get("scale", 1.0), "proj": "random", "scale_type": "channel"}
        optimizer_class = low_rank_class("apollo_torch", "apollo")
    low_rank = [{"params": weights, "rank": rank, **own} for rank, weights in groups.items()]
    return [optimizer_class([rest, *low_rank], no_deprecation_warning=True, **common)]


def make_schedules(optimizers: list[Optimizer], settings: Run) -> list[LambdaLR]:
    """A line up, then a cosine down."""
    steps, floor = settings["steps"], settings["floor"]
    warm_up = max(1, round(settings["warm_up"] * steps))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        turn = math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
        return floor + (1 - floor) * (1 + turn) / 2

    return [LambdaLR(optimizer, factor) for optimizer in optimizers]


def windows(text: Tensor, model: str, count: int, seed: int) -> Any:
    """Random windows of the text, (sequences, length) int64, where the text is; a seed decides."""
    *_, sequences, length = SHAPES[model]
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - length + 1, (count, sequences, 1), generator=generator)
    window = torch.arange(length, device=text.device)
    return (text[some + window].long() for some in starts.to(text.device))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Mean cross-entropy of the next token, in nats: bf16 autocast on CUDA, float32 on a CPU."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
        return model(input_ids=tokens, labels=tokens).loss


@torch.no_grad()
def validate(model: nn.Module, text: Tensor, name: str) -> float:
    """Mean loss on held-out files, without any compiler, a quarter of a batch at a time."""
    model.eval()
    losses = [
        loss_of(model, part)
        for tokens in windows(text, name, VALIDATION_BATCHES, VALIDATION_SEED)
        for part in tokens.chunk(4)
    ]
    model.train()
    return torch.stack(losses).mean().item()


def clock(device: torch.device) -> float:
    """Now, when all is done that the device was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(settings: Run, text: list[Tensor], device: torch.device, *, is_timed: bool) -> Run:
    """Train one model; returns what was measured."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    name, steps = settings["model"], settings["steps"]
    model = make_model(settings, device)
    backend: Any = settings["inner"]
    sketched = settings["method"].startswith("compact")
    if sketched:
        known = {f.name for f in fields(CompactConfig)} & settings.keys()
        backend = compact_backend(**{k: settings[k] for k in known})
    compiled = torch.compile(model, backend=backend)
    optimizers = make_optimizers(model, settings)
    schedules = make_schedules(optimizers, settings)
    cuda = device.type == "cuda"
    chunk = max(2, math.ceil(steps / CHUNKS))
    row: Run = {"loss": None, "training": [], "validation": []}
    losses: list[Tensor] = []
    peak, seconds, first, began = 0, 0.0, 0.0, clock(device)
    for step, tokens in enumerate(windows(text[0], name, steps, settings["seed"]), start=1):
        loss = loss_of(compiled, tokens)
        loss.backward()
        if settings["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.detach())
        due = step == steps or step * VALIDATIONS // steps > (step - 1) * VALIDATIONS // steps
        if step % chunk and not due:
            continue
        took = clock(device) - began
        if step <= chunk:
            first += took
        else:
            seconds += took
        if step % chunk == 0 or step == steps:
            row["training"].append((step, torch.stack(losses).mean().item()))
            losses.clear()
            if not math.isfinite(row["training"][-1][1]):
                row["training"][-1] = (step, None)
                row["diverged"] = step
                break
        if due:
            peak = max(peak, torch.cuda.max_memory_allocated(device) if cuda else 0)
            row["validation"].append((step, validate(model, text[1], name)))
        if cuda and (due or step <= chunk):  # of training alone, and not of compiling
            torch.cuda.reset_peak_memory_stats(device)
        began = clock(device)
    else:
        loss_at_end = row["validation"][-1][1]
        row["loss"] = loss_at_end if math.isfinite(loss_at_end) else None
        row["perplexity"] = row["loss"] and math.exp(row["loss"])
    if step > chunk and is_timed:
        row["step_ms"] = 1e3 * seconds / (step - chunk)
        row["seconds"] = seconds / (step - chunk) * step
        row["tokens_per_s"] = tokens.numel() / seconds * (step - chunk)
        row["compile_s"] = first - chunk * row["step_ms"] / 1e3
    row["peak_gb"] = peak / 1e9 or None
    if sketched:
        energies = backend.report().energies
        row["energies"] = {weight: held[-1][1] for weight, held in energies.items() if held}
    return row


def run_all(args: argparse.Namespace) -> None:
    """The runs of the list that are not done, as long as there is time."""
    end = time.monotonic() + args.seconds
    runs = [(run.get("name"), settings_of(run, args)) for run in json.loads(args.runs.read_text())]
    before = read(args.out) if args.out.exists() else []
    done = {key_of(row["settings"]) for row in before}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    here = provenance()["device"]
    last = {  # seconds for each step, all in all
        row["settings"]["model"]: row["wall_s"] / row["settings"]["steps"]
        for row in before
        if row["device"] == here
    }
    text_of: dict[int, tuple[str, list[Tensor]]] = {}
    for name, settings in runs:
        if key_of(settings) in done:
            continue
        left = end - time.monotonic()
        model, steps = settings["model"], settings["steps"]
        if left < last.get(model, 0.0) * steps:
            print(f"{left:.0f} s are too few for {json.dumps(settings)}", flush=True)
            break
        vocabulary = SHAPES[model][4]
        if vocabulary not in text_of:
            data, text = sources.load(vocabulary, args.cache)
            text_of = {vocabulary: (data, [part.to(device) for part in text])}
        data, text = text_of[vocabulary]
        start = time.monotonic()
        try:
            result = train(settings, text, device, is_timed=not args.shared)
        except Exception as error:  # the other runs need not suffer; this one is tried again
            print(f"{json.dumps(settings)}: {type(error).__name__}: {error}", flush=True)
            continue
        wall = time.monotonic() - start
        last[model] = wall / steps
        named = {"name": name} if name else {}
        row = {**named, "settings": settings, **result, "wall_s": wall, "data": data}
        with args.out.open("a") as file:
            file.write(json.dumps({**row, **provenance()}) + "\n")
        done.add(key_of(settings))
        print(f"{label(settings)}: {result['loss']} in {wall:.0f} s", flush=True)


def main() -> None:
    """Prepare text, train, and show results, as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--prepare", nargs="*", choices=SHAPES, help="make the text of these models")
    add("--runs", type=Path, help="a JSON list of runs")
    add("--out", type=Path, default=Path("out/quality.jsonl"), help="one line for each run")
    add("--seconds", type=float, default=540.0, help="no run begins that would end later")
    add("--steps", type=int, help="of runs that do not say")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--inner", choices=("inductor", "aot_eager"), help="aot_eager compiles faster")
    add("--cache", type=Path, default=Path("out/quality_cache"), help="folder for tokens")
    add("--shared", action="store_true", help="others use the GPU as well: no times")
    add("--table", type=Path, help="print these results")
    add("--plot", type=Path, help="draw these results")
    add("--plot-ranks", type=Path, help="draw AdamW and the ranks of these results alone")
    add("--times", type=Path, help="results of the same kinds of runs, each alone on its GPU")
    add("--images", type=Path, default=Path("docs/images"), help="folder for figures")
    args = parser.parse_args()
    for model in args.prepare or ():
        sources.load(SHAPES[model][4], args.cache)
    if args.runs:
        run_all(args)
    if args.table:
        print(table(read(args.table)))
    if args.plot:
        plot(read(args.plot), args.images, read(args.times) if args.times else [])
    if args.plot_ranks:
        plot_ranks(read(args.plot_ranks), args.images)


if __name__ == "__main__":
    main()
