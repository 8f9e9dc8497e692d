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
    """Print the seconds that the first forward and backward pass take."""
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
    backend = compact_backend(rank=0.25, strict=True) if backend_name == "compact" else "inductor"
    compiled = torch.compile(model, backend=backend)
    start = time.perf_counter()
    compiled(input_ids=tokens, labels=tokens).loss.backward()
    print(time.perf_counter() - start)


def in_fresh_process(backend_name: str, device: str) -> float:
    """Seconds, with nothing cached."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--once", backend_name, "--device", device]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        output = subprocess.run(
            command, env=environment, check=True, capture_output=True, text=True
        )
    return float(output.stdout.split()[-1])


def main() -> None:
    """Alternate the two backends and print the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--once", choices=["inductor", "compact"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("out/compile_time.json"))
    args = parser.parse_args()
    if args.once:
        compile_once(args.once, args.device)
        return

    from provenance import provenance

    seconds: dict[str, list[float]] = {"inductor": [], "compact": []}
    for _ in range(args.repeats):
        for name, times in seconds.items():
            times.append(in_fresh_process(name, args.device))
            print(f"{name}: {times[-1]:.1f} s", flush=True)
    ratio = statistics.median(seconds["compact"]) / statistics.median(seconds["inductor"])
    print(f"compact / inductor: {ratio:.2f}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **provenance(),
        "seconds": seconds,
        "ratio": ratio,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
