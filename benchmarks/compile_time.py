"""Cold compile time of a 4-layer LLaMA: plain Inductor against the compact backend.

python benchmarks/compile_time.py --out benchmarks/results/compile_time.json

Every measurement is a process of its own with an empty cache; the two alternate.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def compile_once(backend_name: str, device: str) -> None:
    """Print the seconds that the first forward and backward pass take: of the wall, and of CPUs."""
    import resource

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from compact_fx import compact_backend

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=256,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(device)
    tokens = torch.randint(0, 256, (4, 128), device=device)
    backend = "inductor"
    if backend_name != "inductor":
        kind = {"compact": {"gradients": "dense"}, "tracked": {}}
        backend = compact_backend(rank=0.25, strict=True, **kind[backend_name])
    compiled = torch.compile(model, backend=backend)

    def seconds_of_cpus() -> float:
        usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    start, before = time.perf_counter(), seconds_of_cpus()
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    print(time.perf_counter() - start, seconds_of_cpus() - before)


def in_fresh_process(backend_name: str, device: str) -> tuple[float, float]:
    """Seconds of the wall and of CPUs, with nothing cached."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--once", backend_name, "--device", device]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        output = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        )
    wall, cpus = map(float, output.stdout.split()[-2:])
    return wall, cpus


def main() -> None:
    """Alternate the two backends and print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--once", choices=["inductor", "compact", "tracked"], help=argparse.SUPPRESS
    )
    parser.add_argument("--out", type=Path, default=Path("out/compile_time.json"))
    args = parser.parse_args()
    if args.once:
        compile_once(args.once, args.device)
        return

    from provenance import provenance

    seconds: dict[str, list[tuple[float, float]]] = {"inductor": [], "compact": [], "tracked": []}
    for _ in range(args.repeats):
        for name, times in seconds.items():
            times.append(in_fresh_process(name, args.device))
            print(f"{name}: {times[-1][0]:.1f} s, {times[-1][1]:.1f} s of CPUs", flush=True)
    wall, cpus = (
        {name: statistics.median(pair[which] for pair in pairs) for name, pairs in seconds.items()}
        for which in (0, 1)
    )
    ratios = {
        name: {"wall": wall[name] / wall["inductor"], "cpus": cpus[name] / cpus["inductor"]}
        for name in ("compact", "tracked")
    }
    for name, ratio in ratios.items():
        print(f"{name} / inductor: {ratio['wall']:.2f}, of CPUs {ratio['cpus']:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **provenance(),
        "seconds": seconds,
        "ratios": ratios,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
