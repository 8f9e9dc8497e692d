"""`python -m compact_fx`: explain a model or fit it into a GPU, read graphs, describe a machine."""

import argparse
import contextlib
import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import SubprocessError
from textwrap import fill, shorten
from typing import Any, get_args

import torch
from tabulate import tabulate

from compact_fx.config import CompactConfig, Storage
from compact_fx.errors import CannotCompact
from compact_fx.projections import KINDS
from compact_fx.reading.explanation import STATES, Explanation, explain
from compact_fx.reading.fit import GPU, RANKS, fit
from compact_fx.reading.graphs import dot_of
from compact_fx.reading.memory import size_unit
from compact_fx.reading.ranks import Parallel


class _BadInput(Exception):
    """Something a person typed; one line, exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor at Python's end
    except (_BadInput, CannotCompact, ValueError, ImportError, OSError, SubprocessError) as error:
        print(f"compact_fx: {shorten(str(error), 300)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compact_fx", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    model = argparse.ArgumentParser(add_help=False)
    file_or_name = "a file, or the name of a model in the local cache of the Hugging Face hub"
    model.add_argument("--hf-config", required=True, metavar="FILE.json|NAME", help=file_or_name)
    model.add_argument(
        "--seq", type=int, help="tokens in a sequence (2048, or the most that the model takes)"
    )
    dtypes = ["bfloat16", "float16", "float32"]
    of_weights = "of weights (bfloat16; in `explain` and `graph` float32 with --autocast)"
    model.add_argument("--dtype", choices=dtypes, help=of_weights)
    model.add_argument("--layers", type=int, help="in place of num_hidden_layers")
    kinds = "(tracked for sketched gradients, countsketch for dense ones)"
    model.add_argument("--projection", choices=KINDS, help=kinds)
    excluded = "name patterns of weights to leave alone, such as 'lm_head*'"
    model.add_argument("--exclude", nargs="+", default=[], metavar="PATTERN", help=excluded)
    model.add_argument("--no-recompute", action="store_true", help="recompute=False")

    setting = argparse.ArgumentParser(add_help=False)
    rank_help = f"a fraction of in_features ({CompactConfig.rank}), or a number of columns"
    autocast = "under torch.autocast in bfloat16, with weights in float32"
    setting.add_argument("--autocast", action="store_true", help=autocast)
    checkpoint = "recompute each layer, as model.gradient_checkpointing_enable() does"
    setting.add_argument("--checkpoint", action="store_true", help=checkpoint)
    modes = ["dense", "sketched"]
    default = CompactConfig.gradients
    of_report = f"of the report ({default})"
    setting.add_argument("--gradients", default=default, choices=modes, help=of_report)
    saved = f"what crosses to the backward ({CompactConfig.saved})"
    choices = get_args(Storage)
    setting.add_argument("--saved", default=CompactConfig.saved, choices=choices, help=saved)

    command = commands.add_parser(
        "explain", parents=[model, setting], help="what a training step would take; nothing is run"
    )
    several = "; with several, one row for each"
    batch_help = f"sequences in a batch (8){several}"
    command.add_argument("--batch", type=int, nargs="+", default=[8], help=batch_help)
    default_rank = [CompactConfig.rank]
    command.add_argument(
        "--rank", type=_rank, nargs="+", default=default_rank, help=rank_help + several
    )
    command.add_argument("--optimizer", default="adamw", choices=STATES, help="(adamw)")
    ranks = "also what one of so many processes holds and sends; with --parallel"
    command.add_argument("--world-size", type=int, metavar="N", help=ranks)
    how = "DistributedDataParallel; fully_shard of blocks, with reshard_after_forward or without"
    command.add_argument("--parallel", choices=get_args(Parallel), help=how)
    command.add_argument("--plot", type=Path, metavar="OUT.png", help="stacked bars")
    line = "of a GPU: a line in --plot, such as 24GB"
    command.add_argument("--gpu", type=_size, metavar="SIZE", help=line)
    command.add_argument("--timeline", type=Path, metavar="OUT.png", help="memory over a step")
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--wide", action="store_true", help="more columns, nothing shortened")
    command.set_defaults(run=_explain)

    command = commands.add_parser(
        "graph",
        parents=[model, setting],
        help="write the graphs before and after, as text and as SVG",
    )
    command.add_argument("--batch", type=int, default=8, help="sequences in a batch (8)")
    command.add_argument("--rank", type=_rank, default=CompactConfig.rank, help=rank_help)
    command.add_argument(
        "--out", type=Path, default=Path("graphs"), metavar="FOLDER", help="(graphs)"
    )
    command.set_defaults(run=_graph)

    command = commands.add_parser(
        "fit",
        parents=[model],
        help="which settings fit into a GPU, and which is fastest, predicted",
    )
    size = "of its memory: 24GB, 80GiB"
    command.add_argument("--gpu", type=_size, required=True, metavar="SIZE", help=size)
    reserve = "of it, for what is no tensor: CUDA's context, libraries, fragments (1GB)"
    command.add_argument("--reserve", type=_size, default="1GB", metavar="SIZE", help=reserve)
    ranks = f"those to try ({' '.join(map(str, RANKS))})"
    command.add_argument("--rank", type=_rank, nargs="+", default=RANKS, help=ranks)
    command.add_argument("--batch", type=int, help="only this one (the largest that fits)")
    peak = "of matrix products in --dtype (989: bf16 of an H100 SXM, datasheet)"
    command.add_argument("--tflops", type=float, default=989.0, help=peak)
    command.add_argument("--gbps", type=float, default=3350.0, help="of memory, GB/s (3350: same)")
    command.add_argument("--json", action="store_true", help="print JSON, with all that fits")
    command.set_defaults(run=_fit)

    command = commands.add_parser("env", help="versions and devices, for a bug report")
    command.set_defaults(run=_env)
    return parser


def _rank(text: str) -> float | int:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction nor a number") from None


_UNITS = {f"{k}{b}B": (1024 if b else 1000) ** i for i, k in enumerate("MGT", 2) for b in ("", "i")}


def _size(text: str) -> int:
    """Bytes."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})", text)
    if found is None:
        units = ", ".join(_UNITS)
        raise argparse.ArgumentTypeError(f"{text!r} is no number with one of {units}, as in 24GB")
    return int(float(found[1]) * _UNITS[found[2]])


# --- commands ------------------------------------------------------------------------------------


def _explain(args: argparse.Namespace) -> None:
    if (args.world_size is None) != (args.parallel is None):
        raise _BadInput("--world-size and --parallel go together: give both, or none")
    if len(args.batch) * len(args.rank) > 1:
        _compare(args)
        return
    (batch,), (rank,) = args.batch, args.rank
    found = _explained(args, batch, rank, optimizer=args.optimizer)
    ranks = None if args.parallel is None else found.ranks(args.world_size, args.parallel)
    plot = functools.partial(found.plot, gpu_memory=args.gpu)
    for path, draw in ((args.plot, plot), (args.timeline, found.timeline)):
        if path is not None:
            print(f"wrote {draw(path)}", file=sys.stderr)
    if args.json:
        of_ranks = {} if ranks is None else {"ranks": ranks.to_dict()}
        print(json.dumps(found.to_dict() | of_ranks, indent=1))
    else:
        note = (
            f"{found.described}. Predicted, not measured: on a GPU, peaks of LLaMA blocks were "
            "within 2 % of this, with checkpoints 2 to 6 % higher (docs/reports.md)."
        )
        tables = [found.table(), *([] if ranks is None else [ranks.table()])]
        print(fill(note, 100), *tables, found.report.table(wide=args.wide), sep="\n\n")


def _compare(args: argparse.Namespace) -> None:
    """Peaks of several batches and ranks."""
    for name in ("plot", "timeline", "world_size"):
        if getattr(args, name) is not None:
            option = name.replace("_", "-")
            raise _BadInput(f"--{option} is of one --batch and one --rank: give one of each")
    rows: list[dict[str, Any]] = []
    for batch, rank in itertools.product(args.batch, args.rank):
        memory = _explained(args, batch, rank, optimizer=args.optimizer).memory
        peaks = {variant: row.peak for variant, row in memory.items()}
        rows.append({"batch": batch, "rank": rank, "peaks": peaks})
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    unit, name_of_unit = size_unit(max(max(row["peaks"].values()) for row in rows))
    table = [
        [row["batch"], row["rank"], *(f"{peak / unit:.2f}" for peak in row["peaks"].values())]
        for row in rows
    ]
    headers = ["batch", "rank", *(f"{name}, {name_of_unit}" for name in rows[0]["peaks"])]
    print("Peaks, predicted:", tabulate(table, headers, disable_numparse=True), sep="\n\n")


def _fit(args: argparse.Namespace) -> None:
    if args.reserve >= args.gpu:
        raise _BadInput(f"--reserve {args.reserve} bytes must be less than --gpu {args.gpu} bytes")
    for name in ("tflops", "gbps"):
        if not 0 < getattr(args, name) < math.inf:
            raise _BadInput(f"--{name} {getattr(args, name)} must be a number above 0")
    whole, config = _model(args)
    inputs = _inputs(args, config)

    def build(layers: int, checkpointing: bool) -> torch.nn.Module:
        model, _ = _model(argparse.Namespace(**vars(args) | {"layers": layers}))
        return _checkpointed(model) if checkpointing else model

    settings = CompactConfig(
        projection=args.projection, exclude=args.exclude, recompute=not args.no_recompute
    )
    _say("tracing two and three layers ...")
    with _named(args, inputs(1 if args.batch is None else args.batch)):
        found = fit(
            build,
            inputs,
            layers=config.num_hidden_layers,
            gpu=GPU(
                memory=args.gpu - args.reserve, flops=1e12 * args.tflops, bandwidth=1e9 * args.gbps
            ),
            ranks=args.rank,
            checkpointing=(False, True) if whole.supports_gradient_checkpointing else (False,),
            batch=args.batch,
            config=settings,
        )
    if args.json:
        print(found.to_json())
        return
    length = inputs(1)["input_ids"].shape[1]
    weights = sum(weight.numel() for weight in whole.parameters())
    note = (
        f"Predicted, not measured: {args.hf_config}, {weights / 1e9:.3g} billion weights in "
        f"{args.dtype or 'bfloat16'}, sequences of {length} tokens. "
        f"Peaks are of tensors, below {args.gpu / 1e9:.2f} GB less "
        f"{args.reserve / 1e9:.2f} GB; times are a roofline of {args.tflops:g} TFLOP/s and "
        f"{args.gbps:g} GB/s. Rank `full` is torch.compile with AdamW. `time a token` is relative "
        "to the first row, `torch.compile = 1` to torch.compile's step at the row's batch, whether "
        "or not that fits. "
        "Less rank is faster and costs quality, see docs/quality.md."
    )
    print(found, fill(note, 100), sep="\n\n")


def _graph(args: argparse.Namespace) -> None:
    found = _explained(args, args.batch, args.rank)
    args.out.mkdir(parents=True, exist_ok=True)
    for number, graphs in enumerate(found.graphs):
        written = [
            _write(args.out / f"{number}_{name}.txt", text) for name, text in graphs.texts().items()
        ]
        if shutil.which("dot"):
            modules = graphs.modules().items()
            written += [
                _draw(module, args.out / f"{number}_{name}.svg") for name, module in modules
            ]
        print("\n".join(map(str, written)))
    if not shutil.which("dot"):
        print("no pictures: graphviz's `dot` is not installed", file=sys.stderr)


def _write(path: Path, text: str) -> Path:
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _draw(module: torch.fx.GraphModule, path: Path) -> Path:
    command = ["dot", "-Tsvg", "-o", str(path)]
    subprocess.run(command, input=dot_of(module).encode(), check=True)
    return path


def _env(args: argparse.Namespace) -> None:
    packages = ("compact_fx", "torch", "triton", "transformers", "numpy")
    rows: list[list[Any]] = [
        ["python", platform.python_version()],
        ["platform", platform.platform()],
        *[[name, _version(name)] for name in packages],
        ["CUDA", torch.version.cuda or "not in this build of torch"],
        ["HIP", torch.version.hip or "not in this build of torch"],
        ["CPU threads", torch.get_num_threads()],
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append([f"GPU {index}", f"{device.name}, {device.total_memory / 1e9:.1f} GB"])
    rows += [["Inductor", _inductor()], ["gradients", "dense, sketched (one process)"]]
    print(tabulate(rows, tablefmt="plain", disable_numparse=True))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _inductor() -> str:
    """Whether it can compile here: it needs a C++ compiler."""
    try:
        torch.compile(torch.sin, dynamic=False)(torch.zeros(8))
    except Exception as error:  # whatever is missing
        return f"does not work, use inner='aot_eager': {type(error).__name__}"
    return "works"


def _say(text: str) -> None:
    """To a person who waits, and to no script."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)


# --- models --------------------------------------------------------------------------------------


def _explained(
    args: argparse.Namespace, batch: int, rank: float | int, **settings: Any
) -> Explanation:
    """The model of a Hugging Face configuration, explained for a batch of token ids."""
    _say(f"tracing batch {batch}, rank {rank} ...")
    model, config = _model(args)
    if args.checkpoint:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise _BadInput(f"{type(model).__name__} has no gradient_checkpointing_enable")
        model = _checkpointed(model)
    inputs = _inputs(args, config)(batch)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.autocast)  # of fake tensors
    with _named(args, inputs), autocast:
        return explain(
            model,
            rank=rank,
            gradients=args.gradients,
            projection=args.projection,
            saved=args.saved,
            exclude=args.exclude,
            recompute=not args.no_recompute,
            **settings,
            **inputs,
        )


def _checkpointed(model: torch.nn.Module) -> torch.nn.Module:
    with warnings.catch_warnings():  # transformers 5 has another name for it
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return model


def _inputs(args: argparse.Namespace, config: Any) -> Callable[[int], dict[str, Any]]:
    """Makes token ids for a batch of so many sequences."""
    longest = getattr(config, "max_position_embeddings", None) or 2048
    length = min(2048, longest) if args.seq is None else args.seq
    if length > longest:
        raise _BadInput(f"--seq {length} is more than max_position_embeddings {longest}")

    def inputs(batch: int) -> dict[str, Any]:
        if batch < 1:
            raise _BadInput(f"--batch {batch} must be ≥ 1")
        tokens = torch.zeros(batch, length, dtype=torch.int64, device="meta")
        without_cache = hasattr(config, "use_cache") and not config.is_encoder_decoder
        cache = {"use_cache": False} if without_cache else {}
        return {"input_ids": tokens, "labels": tokens, **cache}

    return inputs


@contextlib.contextmanager
def _named(args: argparse.Namespace, inputs: dict[str, Any]) -> Iterator[None]:
    """Around what calls a model: an error says which one, and with how many tokens."""
    try:
        yield
    except (CannotCompact, ValueError):
        raise
    except Exception as error:  # whatever a model's forward makes of tokens
        shape = " x ".join(map(str, inputs["input_ids"].shape))
        message = f"{args.hf_config} does not train on {shape} tokens: {error}"
        raise _BadInput(message) from None


def _config_file(file_or_name: str) -> Path:
    """The file itself, or that of a model in the hub's local cache."""
    path = Path(file_or_name)
    if path.suffix == ".json" or path.exists():
        return path
    from huggingface_hub import try_to_load_from_cache  # comes with transformers

    try:
        found = try_to_load_from_cache(file_or_name, "config.json")
    except ValueError:  # no name of a model
        return path
    if not isinstance(found, str):
        raise _BadInput(
            f"{file_or_name} is no file, and not in the hub's local cache: get its config.json "
            f"(hf download {file_or_name} config.json), or give the file's path"
        )
    return Path(found)


def _model(args: argparse.Namespace) -> tuple[torch.nn.Module, Any]:
    """Built on the meta device: without memory."""
    for name in ("seq", "layers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise _BadInput(f"--{name} {getattr(args, name)} must be ≥ 1")
    try:
        import transformers
    except ImportError:
        raise _BadInput("--hf-config needs transformers: pip install transformers") from None
    try:
        content = json.loads(_config_file(args.hf_config).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _BadInput(f"cannot read {args.hf_config}: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise _BadInput(f"{args.hf_config} has no model_type: is it a Hugging Face config.json?")
    if args.layers is not None:
        content["num_hidden_layers"] = args.layers
    kind = content.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise _BadInput(f"model_type {kind!r} is not one that transformers knows")
    names = content.get("architectures") or [None]
    if not isinstance(names, list):
        raise _BadInput(f"architectures {names!r} must be a list")
    (name, *_) = names
    if not isinstance(name, str | None):
        raise _BadInput(f"architecture {name!r} must be the name of a class")
    maker: Any = getattr(transformers, name, None) if name else transformers.AutoModelForCausalLM
    if maker is None:
        raise _BadInput(f"architecture {name!r} is not one that transformers has")
    build = maker.from_config if hasattr(maker, "from_config") else maker
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    autocast = getattr(args, "autocast", False)
    dtype = args.dtype or ("float32" if autocast else "bfloat16")
    try:
        config = transformers.AutoConfig.for_model(kind, **content)
        with torch.device("meta"):
            return build(config).to(getattr(torch, dtype)).train(), config
    except Exception as error:  # whatever a model's constructor makes of its numbers
        raise _BadInput(f"{args.hf_config} makes no model: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
