"""What ranks hold and send on 8 to 4096 GPUs, and whether backward hides it; nothing is run.

python benchmarks/predicted_scaling.py --out benchmarks/results/predicted_scaling.json

LLaMAs of 8B, 70B and 405B in bf16, AdamW. Two and three layers are traced; every further one brings
what the third does. Prints the tables of docs/scaling.md, and draws its picture.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from tabulate import tabulate
from transformers import AutoConfig, LlamaForCausalLM

from compact_fx import Explanation, explain
from compact_fx.reading.explanation import COMPILED, SKETCHED
from compact_fx.reading.ranks import Parallel, PerRank

CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
SHAPES = ("8b", "70b", "405b")
GPUS = (8, 64, 512, 4096)
WAYS = (COMPILED, SKETCHED)
TOKENS = 8192
"""One sequence for each rank."""
FEW_AND_MANY = 512, TOKENS
FLOPS = 400e12
"""A second: 0.4 of the peak of an H100; LLaMA-1B's blocks reach 0.45 (results/step.json)."""
IN_NODE, ACROSS, ALONE = 450e9, 400e9, 50e9
"""Bytes a second of a rank: NVLink one way; rings over nodes of 8 GPUs, each with a link of
400 Gb/s, so that a node is entered 8 times; one such link for each rank's whole ring."""


def bandwidth(gpus: int) -> float:
    """Of what a rank sends."""
    return IN_NODE if gpus <= 8 else ACROSS


@dataclass(frozen=True)
class Work:
    """FLOPs of a step of one rank.

    Attributes:
        backward: what a change of all projections takes is in it, spread over the interval.
    """

    forward: float
    backward: float


class Model:
    """A LLaMA of any depth, from graphs of two and of three layers."""

    def __init__(self, config: Any, layers: int, tokens: int = TOKENS, **settings: Any) -> None:
        self._more = layers - 2
        self._hidden, self._tokens = config.hidden_size, tokens
        self._few, self._many = (self._traced(config, depth, settings) for depth in (2, 3))

    def _traced(self, config: Any, layers: int, settings: dict[str, Any]) -> Explanation:
        config.num_hidden_layers = layers
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            ids = torch.zeros(1, self._tokens, dtype=torch.int64)
        return explain(model, input_ids=ids, labels=ids, **settings)

    def rank(self, gpus: int, parallel: Parallel, way: str) -> PerRank:
        """One of so many; without its peak, which is not linear in the number of layers."""
        few, many = (f.ranks(gpus, parallel).each[way] for f in (self._few, self._many))
        grown = {
            f.name: getattr(few, f.name)
            + self._more * (getattr(many, f.name) - getattr(few, f.name))
            for f in fields(PerRank)
        }
        return PerRank(**grown | {"peak": 0})

    def work(self, way: str, interval: int = 40) -> Work:
        """Products with weights as their sites count them, and causal attention."""
        totals = []
        for found, layers in ((self._few, 2), (self._many, 3)):
            accounts = [graphs.plan.account for graphs in found.graphs]
            costs = [cost for account in accounts for cost in account.sites]
            before = sum(cost.flops_before for cost in costs)
            after = sum(cost.flops_after for cost in costs) if way == SKETCHED else before
            change = sum(a.change_flops for a in accounts) / interval if way == SKETCHED else 0
            attention = 2 * layers * self._tokens**2 * self._hidden
            totals.append((before + attention, before + after + change + 2.5 * attention))
        (forward, backward), (forward_3, backward_3) = totals
        return Work(
            forward + self._more * (forward_3 - forward),
            backward + self._more * (backward_3 - backward),
        )


@dataclass(frozen=True)
class Times:
    """Seconds of a rank, with this many tokens.

    Attributes:
        forward, backward: what is computed; `gathering`, `exchange`: what is sent beside each.
    """

    forward: float
    backward: float
    gathering: float
    exchange: float

    @property
    def step(self) -> float:
        """Where as much as possible is hidden."""
        return max(self.forward, self.gathering) + max(self.backward, self.exchange)


def times(rank: PerRank, work: Work, speed: float, tokens: float) -> Times:
    """FSDP2 gathers half of its weights beside the forward pass; all else goes beside backward."""
    gathering = rank.sent_weights / 2
    share = tokens / TOKENS
    return Times(
        share * work.forward / FLOPS,
        share * work.backward / FLOPS,
        gathering / speed,
        (rank.sent - gathering) / speed,
    )


def tokens_that_hide(rank: PerRank, work: Work, speed: float) -> float:
    """The fewest tokens of a rank whose passes take as long as what is sent beside them."""
    t = times(rank, work, speed, TOKENS)
    return TOKENS * max(t.gathering / t.forward, t.exchange / t.backward)


def row_of(name: str, model: Model, gpus: int, parallel: Parallel, way: str) -> dict[str, Any]:
    """Everything of one way to train on so many GPUs, in bytes and seconds."""
    rank, work, speed = model.rank(gpus, parallel, way), model.work(way), bandwidth(gpus)
    return {
        "model": name,
        "gpus": gpus,
        "parallel": parallel,
        "step": way,
        **{f.name: getattr(rank, f.name) for f in fields(PerRank) if f.name != "peak"},
        "sent": rank.sent,
        "tokens_that_hide": tokens_that_hide(rank, work, speed),
        "tokens_that_hide_on_one_link": tokens_that_hide(rank, work, ALONE),
        **{f"seconds_{n}": times(rank, work, speed, n).step for n in FEW_AND_MANY},
    }


def gb(size: float) -> str:
    """10⁹ bytes, with three digits."""
    return f"{size / 1e9:.3g}"


def tables(rows: Sequence[dict[str, Any]]) -> list[str]:
    """As docs/scaling.md has them."""
    by_key = {(r["model"], r["gpus"], r["parallel"], r["step"]): r for r in rows}
    sent, memory, hidden = [], [], []
    for name in SHAPES:
        for gpus in GPUS:
            found = {(p, w): by_key[name, gpus, p, w] for p in ("ddp", "fsdp") for w in WAYS}
            dense, sketched = ([found[p, w] for p in ("ddp", "fsdp")] for w in WAYS)
            line: list[Any] = [name, gpus]
            for d, s in zip(dense, sketched, strict=True):
                line += [gb(d["sent"]), gb(s["sent"]), f"{s['sent'] / d['sent']:.2f}"]
            sent.append(line)
            line = [name, gpus]
            for row in (dense[1], sketched[1]):
                parts = row["weights"] + row["gradients"] + row["moments"]
                line += [
                    gb(parts),
                    gb(row["whole"]),
                    *([gb(row["projections"])] if row["projections"] else []),
                ]
            memory.append(line)
            if gpus in (8, 512):
                line = [name, gpus]
                for d, s in zip(dense, sketched, strict=True):
                    line += [f"{row['tokens_that_hide']:.0f}" for row in (d, s)]
                    line += [f"{s[f'seconds_{n}'] / d[f'seconds_{n}']:.2f}" for n in FEW_AND_MANY]
                hidden.append(line)
    ratio = "ratio"
    of_hidden = ["dense", "sketched", "time at 512", "at 8192"]
    return [
        tabulate(rows_, headers, tablefmt="github", disable_numparse=True)
        for rows_, headers in (
            (sent, ["", "GPUs", *2 * ["dense", "sketched", ratio]]),
            (memory, ["", "GPUs", "parts", "whole", "parts", "whole", "P and Y"]),
            (hidden, ["", "GPUs", *2 * of_hidden]),
        )
    ]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory of a rank over the number of GPUs, a panel for each model; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SHAPES), figsize=(11, 3.6), layout="constrained")
    for name, axes in zip(SHAPES, panels, strict=True):
        of_model = [r for r in rows if r["model"] == name and r["parallel"] == "fsdp"]
        dense, sketched = ([r for r in of_model if r["step"] == way] for way in WAYS)
        gpus = [r["gpus"] for r in dense]

        def parts(row: dict[str, Any]) -> float:
            return (row["weights"] + row["gradients"] + row["moments"]) / 1e9

        axes.plot(gpus, [parts(r) for r in dense], "o-", color="C7", label="dense: its parts")
        axes.plot(gpus, [parts(r) for r in sketched], "o-", color="C0", label="sketched: its parts")
        projections = [r["projections"] / 1e9 for r in sketched]
        axes.plot(gpus, projections, "s-", color="C3", label="sketched: P and Y, whole")
        axes.axhline(80, color="0.6", linewidth=0.8, linestyle="--", label="80 GB")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(gpus, [str(n) for n in gpus])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.set_title(f"LLaMA {name.upper()}", loc="left")
        axes.set_xlabel("GPUs")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("GB of a rank, FSDP2")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Trace, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path("benchmarks/results/predicted_scaling.json")
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--plot", type=Path, default=Path("docs/images/scaling.png"))
    args = parser.parse_args()
    rows, layers = [], {}
    for name in SHAPES:
        config = AutoConfig.from_pretrained(CONFIGS / f"llama_{name}.json")
        layers[name] = config.num_hidden_layers
        model = Model(config, config.num_hidden_layers)
        for gpus in GPUS:
            for parallel in ("ddp", "fsdp"):
                rows += [row_of(name, model, gpus, parallel, way) for way in WAYS]
    record = {**provenance(), "layers": layers, "tokens": TOKENS, "rows": rows}
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    plot(rows, args.plot)
    print(*tables(rows), sep="\n\n")


if __name__ == "__main__":
    main()
