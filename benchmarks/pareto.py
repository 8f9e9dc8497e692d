"""Step time against peak memory on one GPU: this package, torch, and other methods.

    python benchmarks/pareto.py --shape 1b --out benchmarks/results/pareto_1b.json
    python benchmarks/pareto.py --plot benchmarks/results/pareto_1b.json
    python benchmarks/pareto.py --shape 1b --device cpu --inner aot_eager --layers 1 --hidden 64 \\
        --mlp 128 --heads 2 --kv-heads 2 --batch 2 --seq 64 --steps 2 --warmup 1    # a dry run

Called again, it goes on with the competitors that the results do not have yet, then with those that
failed. Wanted, where they are missing: pip install torchao liger-kernel peft, and with --no-deps
galore-torch and apollo-torch.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")  # nothing stale

import torch
from pareto_competitors import SHAPES, Case, Competitor, batch_of, competitors
from pareto_results import Row, plot, read, table, together, write
from provenance import provenance
from torch import nn
from torch._inductor.utils import fresh_cache
from training import gigabytes, measure_steps

SIZES = tuple(dict.fromkeys(size for shape in SHAPES.values() for size in shape))


def measure(competitor: Competitor, case: Case, args: argparse.Namespace) -> Row:
    """Train for a few steps, compiled from nothing; the numbers are of the last ones."""
    inputs, target = batch_of(case)
    model, optimizer = competitor(case)
    counts = {"steps": args.steps, "warmup": args.warmup}
    measured = measure_steps(model, optimizer, inputs, target, **counts)
    row = measured.row()
    return {
        **row,
        "tokens_per_s": round(case.shape["batch"] * case.shape["seq"] / row["ms"] * 1e3),
        "gradient_gb": gigabytes(measured.gradients),
        "state_gb": gigabytes(measured.lasting),
        "compile_s": max(0.0, row["first_step_s"] - row["ms"] / 1e3),
    }


def attempt(name: str, competitor: Competitor, shape: dict[str, int], args: Any) -> Row:
    """What was measured, or the error."""
    torch._dynamo.reset()
    gc.collect()
    row: Row = {"name": name}
    if args.device == "cuda":
        torch.cuda.empty_cache()
        row["left_over_gb"] = torch.cuda.memory_allocated() / 1e9  # by who went before
    with fresh_cache():
        try:
            with ExitStack() as during:
                case = Case(args.shape, shape, args.device, args.inner, during)
                row |= measure(competitor, case, args)
        except Exception as error:  # a package is missing, memory is short: the others go on
            lines = str(error).strip().splitlines() or [""]
            text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # Dynamo's
            row["error"] = f"{type(error).__name__}: {text}"[:200]
    return {**row, **provenance()}


def warm_up(device: str) -> None:
    """One product forward and backward: cuBLAS keeps its workspaces, and no competitor pays."""
    layer = nn.Linear(64, 64, device=device, dtype=torch.bfloat16)
    layer(torch.ones(64, 64, device=device, dtype=torch.bfloat16)).sum().backward()


def chosen(names: Iterable[str], args: argparse.Namespace) -> list[str]:
    """Those that patterns ask for, in the order of the patterns."""
    names = [name for name in names if not any(fnmatchcase(name, p) for p in args.skip)]
    return list(dict.fromkeys(n for p in args.only for n in names if fnmatchcase(n, p)))


def run(args: argparse.Namespace) -> None:
    """Measure who is missing, one after the other, as long as there is time."""
    end = time.monotonic() + args.seconds
    given = {size: getattr(args, size) for size in SIZES if getattr(args, size) is not None}
    shape = {**SHAPES[args.shape], **given}
    results: dict[str, Any] = {"name": args.shape, "shape": shape, "rows": []}
    if args.out.exists():
        results = read(args.out)
        if (results["name"], results["shape"]) != (args.shape, shape):
            raise SystemExit(f"{args.out} has results of another shape: choose another --out")
    here, rows = provenance()["device"], results["rows"]
    known = {row["name"]: row for row in rows if row["device"] == here}
    everybody = competitors(args.shape)
    todo = {name: everybody[name] for name in chosen(everybody, args)}
    if not todo:
        raise SystemExit(f"nobody is asked for; there are: {', '.join(everybody)}")
    order = [name for name in todo if name not in known]
    order += [name for name in todo if "error" in known.get(name, {})]
    warm_up(args.device)
    for name in order:
        if time.monotonic() > end:
            print(f"no time for {name} and what follows: call again", flush=True)
            break
        row = attempt(name, todo[name], shape, args)
        if name in known:
            rows.remove(known[name])
        rows.append(row)
        write(results, args.out)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        if "error" in row and args.device == "cuda":
            torch.cuda.synchronize()  # raises where the device is lost: the next would fail as well
    print(table(results))


def main() -> None:
    """Measure, or show results, as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="1b")
    for size in SIZES:
        add(f"--{size.replace('_', '-')}", type=int, help="in place of the shape's")
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help="names, as in the table")
    add("--skip", nargs="+", default=[], metavar="PATTERN")
    add("--seconds", type=float, default=float("inf"), help="nobody begins later")
    # Together with the first step, a change of tracked projections is among those measured.
    add("--steps", type=int, default=30)
    add("--warmup", type=int, default=12)
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--inner", choices=("inductor", "aot_eager"), default="inductor")
    add("--out", type=Path, help="default: out/pareto_SHAPE.json")
    add("--table", type=Path, metavar="RESULTS", help="print these and measure nothing")
    several = "draw these runs of one shape in one picture and measure nothing"
    add("--plot", type=Path, nargs="+", metavar="RESULTS", help=several)
    add("--images", type=Path, default=Path("docs/images"), help="folder for figures")
    args = parser.parse_args()
    args.out = args.out or Path(f"out/pareto_{args.shape}.json")
    if args.table:
        print(table(read(args.table)))
    if args.plot:
        print(*plot(together([read(path) for path in args.plot]), args.images))
    if args.table or args.plot:
        return
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this benchmark needs a CUDA GPU; --device cpu is a dry run")
    run(args)


if __name__ == "__main__":
    main()
