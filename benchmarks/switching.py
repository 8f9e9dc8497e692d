"""Loss of a byte-level LLaMA that goes on with another optimizer: AdamW, CompactAdamW, and back.

python benchmarks/switching.py --out benchmarks/results/switching.json
"""

import argparse
import copy
import json
import statistics
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tabulate import tabulate
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from pretrain_llama import load_config, loss_of, make_model, validate
from text import batches, load_text
from torch.optim.lr_scheduler import LinearLR

from compact_fx import CompactAdamW, compact_backend

WARM_UP = 50  # steps, where there is one
WINDOW = 20  # steps that a loss is the mean of
# By what has trained until then: what goes on, whether with the state of before, and a warm-up.
RUNS = {
    "AdamW": [("AdamW", True, 0), ("CompactAdamW", True, 0), ("CompactAdamW", False, 0)],
    "CompactAdamW": [("CompactAdamW", True, 0), ("AdamW", False, 0), ("AdamW", False, WARM_UP)],
}


def train(model: Any, optimizer: Any, data: list[Tensor], rank: float, warm_up: int) -> list[float]:
    """Losses of one step for each batch."""
    torch._dynamo.reset()
    sketched = isinstance(optimizer, CompactAdamW)
    step = torch.compile(model, backend=compact_backend(rank=rank) if sketched else "inductor")
    schedule = LinearLR(optimizer, 1 / warm_up, total_iters=warm_up) if warm_up else None
    losses = []
    for tokens in data:
        loss = loss_of(step, tokens, None)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train with one optimizer, then go on with each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--rank", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=400, help="of the first optimizer")
    parser.add_argument("--more", type=int, default=200, help="steps after that")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("out/switching.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # small tensors are slower on several

    config = load_config(args.config, args.seq)
    training, validation = (batches(t, args.batch, args.seq, args.seed) for t in load_text())
    data = list(islice(training, args.steps + args.more))
    held_out = list(islice(validation, 32))
    classes = {"AdamW": torch.optim.AdamW, "CompactAdamW": CompactAdamW}
    done: list[dict[str, Any]] = []
    for first, then in RUNS.items():
        model = make_model(config, args.seed, torch.device("cpu"))
        optimizer = classes[first](model.parameters(), lr=args.lr)
        before = train(model, optimizer, data[: args.steps], args.rank, WARM_UP)
        weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        for name, with_state, warm_up in then:
            model = make_model(config, args.seed, torch.device("cpu"))
            model.load_state_dict(weights)
            optimizer = classes[name](model.parameters(), lr=args.lr)
            if with_state:
                optimizer.load_state_dict(copy.deepcopy(state))
            losses = train(model, optimizer, data[args.steps :], args.rank, warm_up)
            means = [statistics.fmean(w) for w in zip(*[iter(losses)] * WINDOW, strict=False)]
            row = {"first": first, "then": name, "state": with_state, "warm_up": warm_up}
            row |= {"before": statistics.fmean(before[-WINDOW:]), "losses": means}
            row["validation"] = validate(model, held_out, None)
            done.append(row)
            print(row, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({**provenance(), "runs": done}, indent=1) + "\n")
    rows = [{**row, "losses": " ".join(f"{x:.3f}" for x in row["losses"])} for row in done]
    print(tabulate(rows, headers="keys", floatfmt=".4f"))


if __name__ == "__main__":
    main()
