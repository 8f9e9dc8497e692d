"""One of the processes that `scaling.py` starts: python scaling_worker.py RANK TASK."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from step import VARIANTS
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training import build, inputs_of, loss_of, measure_steps

from compact_fx import CompactAdamW, compact_backend, exchange_factors, shard_placement
from compact_fx.reading.ranks import Collective, sent

COLLECTIVES: dict[str, Collective] = {
    "all_reduce": "all_reduce",
    "broadcast": "broadcast",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
}
"""Of torch.distributed, and what they do; the names ending in `single` are those of torch 2.13."""


class Traffic:
    """Every message of tensors that this process takes part in, while it is entered.

    Attributes:
        messages: (what it does, dtype, elements of what all ranks get or give).
    """

    def __init__(self) -> None:
        self.messages: list[tuple[Collective, torch.dtype, int]] = []
        self._own: dict[str, Any] = {}

    def __enter__(self) -> "Traffic":
        for name in filter(partial(hasattr, dist), COLLECTIVES):
            self._own[name] = getattr(dist, name)
            setattr(dist, name, self._noted(name, self._own[name]))
        return self

    def __exit__(self, *_: object) -> None:
        for name, own in self._own.items():
            setattr(dist, name, own)

    def _noted(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            largest = max(tensors, key=Tensor.numel)
            self.messages.append((COLLECTIVES[name], largest.dtype, largest.numel()))
            return collective(*args, **kwargs)

        return run

    def sent(self) -> int:
        """Bytes that this rank sends."""
        return sum(
            sent(collective, elements * dtype.itemsize, dist.get_world_size())
            for collective, dtype, elements in self.messages
        )


Wrapped = tuple[nn.Module, Callable[[], Any]]


def ddp(model: nn.Module, backend: Any, sketched: bool) -> Wrapped:
    """Compiled around DistributedDataParallel; Dynamo cuts at its buckets."""
    wrapper = _ddp(model, sketched)
    return torch.compile(wrapper, backend=backend), wrapper.no_sync


def ddp_of_blocks(model: nn.Module, backend: Any, sketched: bool) -> Wrapped:
    """Each block compiled, in DistributedDataParallel; Dynamo would cut them at its buckets too."""
    torch._dynamo.config.optimize_ddp = False
    for layer in model.layers:
        layer.compile(backend=backend)
    wrapper = _ddp(model, sketched)
    return wrapper, wrapper.no_sync


def _ddp(model: nn.Module, sketched: bool) -> DistributedDataParallel:
    settings = {}
    if sketched:
        exchange_factors(model)
        # Dynamo then cuts once in each block, and not between weights that share a projection.
        of_a_block = sum(weight.nbytes for weight in model.layers[0].parameters())
        settings["bucket_cap_mb"] = max(1, of_a_block // 2**20)
    wrapper = DistributedDataParallel(model, **settings)
    wrapper.register_comm_hook(None, allreduce_hook)  # what it does anyway, where it can be seen
    return wrapper


def fsdp(model: nn.Module, backend: Any, sketched: bool, *, reshards: bool = True) -> Wrapped:
    """Each block compiled and sharded, and the rest sharded.

    reshards: whether blocks are gathered a second time, in the backward pass.
    """
    placement: dict[str, Any] = {"shard_placement_fn": shard_placement} if sketched else {}
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.layers:
        layer.compile(backend=backend)
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshards, **placement)
    fully_shard(model, mesh=mesh, **placement)

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)

    return model, no_sync


PARALLEL: dict[str, Callable[[nn.Module, Any, bool], Wrapped]] = {
    "ddp": ddp,
    "ddp of blocks": ddp_of_blocks,
    "fsdp": fsdp,
    "zero2": partial(fsdp, reshards=False),
}


def measure(task: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train for a few steps; times are those of the slowest process.

    The second step changes tracked projections for the first time, the third does not: what the
    second one sends beyond that comes once in each interval.
    """
    shape, counts = task["shape"], {"steps": task["steps"], "warmup": task["warmup"]}
    variant = VARIANTS[task["step"]]
    sketched = variant.settings.get("gradients") == "sketched"
    model = build(shape, str(device))
    model.embed_tokens.requires_grad_(False)  # the blocks get what it would give
    on_cpu = {} if device.type == "cuda" else {"inner": "aot_eager"}  # a dry run
    backend: Any = on_cpu.get("inner", variant.backend)
    interval = 1
    if variant.backend == "compact":
        backend = compact_backend(strict=True, **variant.settings, **on_cpu)
        interval = backend.config.interval
    step, no_sync = PARALLEL[task["parallel"]](model, backend, sketched)
    optimizer_class: Any = CompactAdamW if sketched else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(dist.get_rank())
    inputs = inputs_of(shape, str(device))
    target = torch.randn_like(inputs["inputs_embeds"])

    def train() -> Traffic:
        with Traffic() as traffic:
            optimizer.zero_grad()
            loss_of(step(**inputs), target).backward()
            optimizer.step()
        return traffic

    _, with_change, plain = (train() for _ in range(3))
    changing = with_change.sent() - plain.sent()
    measured = measure_steps(step, optimizer, inputs, target, **counts)
    with no_sync():
        alone = measure_steps(step, optimizer, inputs, target, **counts)
    row = measured.row()
    passes, without = (slowest(m.row()["ms"] - m.row()["optimizer_ms"]) for m in (measured, alone))
    exchange = time_of(plain, "all_reduce" if "ddp" in task["parallel"] else "reduce_scatter")
    ms = slowest(row["ms"])
    peaks = [None] * dist.get_world_size()
    dist.all_gather_object(peaks, row["peak_gb"])
    return {
        "ms": ms,
        "ms_fastest": slowest(row["ms_fastest"]),
        "ms_slowest": slowest(row["ms_slowest"]),
        "ms_mean": slowest(row["ms_mean"]),
        "host_ms": slowest(row["host_ms"]),
        "optimizer_ms": row["optimizer_ms"],
        "tokens_per_second": task["gpus"] * shape["batch"] * shape["seq"] / ms * 1e3,
        "sent_mb": (plain.sent() + changing / interval) / 1e6,
        "sent_to_change_mb": changing / 1e6,
        "exchange_ms": exchange,
        "passes_ms": passes,
        "passes_without_exchange_ms": without,
        "share_hidden": 1 - (passes - without) / exchange if exchange else None,
        "peak_gb": max(peaks) if device.type == "cuda" else None,
        "peaks_gb": peaks,
    }


def slowest(value: float) -> float:
    """The largest of all ranks."""
    values = [0.0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return max(values)


def time_of(traffic: Traffic, collective: Collective) -> float | None:
    """Milliseconds that these messages take by themselves; None with one process."""
    messages = [message for message in traffic.messages if message[0] == collective]
    ranks = dist.get_world_size()
    if ranks == 1 or not messages:
        return None
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    times = []
    for _ in range(5):
        tensors = [torch.zeros(n, dtype=dtype, device=device) for _, dtype, n in messages]
        parts = [t.new_empty(t.numel() // ranks) for t in tensors]
        dist.barrier()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for tensor, part in zip(tensors, parts, strict=True):
            if collective == "all_reduce":
                dist.all_reduce(tensor)
            else:
                dist.reduce_scatter_tensor(part, tensor)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return slowest(min(times[1:]))


def main() -> None:
    """Run the task; the first rank writes what was measured."""
    rank, task = int(sys.argv[1]), json.loads(sys.argv[2])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = task["cache"]
    on_cuda = task["device"] == "cuda"
    device = torch.device("cuda", rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    folder = Path(task["folder"])
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=task["gpus"],
    )
    row = measure(task, device)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(row))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
