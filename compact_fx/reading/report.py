"""What was done to a model: as a table, as data, as a picture."""

import json
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tabulate import tabulate

from compact_fx.config import CompactConfig
from compact_fx.plan import SAVED_KINDS, Plan, Saved, Site, SiteCost, bytes_of_kind
from compact_fx.training.watch import STEPS_UNSEEN

_NOTHING = (
    "nothing was compiled for training yet: run a forward pass that needs gradients. If one has "
    "run, torch.compile did not ask this backend: a model that was compiled in place, by "
    "model.compile(), keeps its own backend within torch.compile(model, backend=...)"
)
_TOP = 8  # of what else crosses
_WIDTH = 100  # characters of a line
_OPERATOR, _SOURCE = 24, 28  # characters of what names an operator or a line of the model


@dataclass(frozen=True, kw_only=True)
class CompactionReport:
    """The plans of all graphs that a backend compiled for training; `print` it.

    Attributes:
        plans: one for each graph.
        graph_breaks: reason → how often Dynamo broke a graph for it since the backend was made.
        unsketched: reason → how many calls, or optimizer steps, went without sketches for it.
        steps_unseen: whether the weights change, and no optimizer was seen to step them.
        energies: first weight of each tracked projection → steps, and the share ‖G P‖² / ‖G‖² of
            its gradients that P held until then.
    """

    plans: tuple[Plan, ...]
    graph_breaks: Mapping[str, int]
    unsketched: Mapping[str, int] = field(default_factory=dict)
    steps_unseen: bool = False
    energies: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.table()

    def table(self, tablefmt: str = "simple", *, wide: bool = False) -> str:
        """Readable text: a verdict, then for each graph its totals, weights, and what else crosses.

        Args:
            tablefmt: of tabulate, such as "simple" or "github".
            wide: more columns, and nothing shortened; else lines have 100 characters, unless a name
                has more than 42.
        """
        warnings = [
            f"{count} calls or steps ran without sketches: {reason}"
            for reason, count in self.unsketched.items()
        ]
        warnings += [STEPS_UNSEEN] if self.steps_unseen else []
        if not self.plans:
            return "\n\n".join(map(_wrapped, warnings or [_NOTHING]))
        parts = [_verdict(self.plans), *warnings]
        for number, plan in enumerate(self.plans):
            parts.append(f"graph {number}: {_totals(plan)}")
            parts += _weights(plan, self.energies, tablefmt, wide)
            parts += _crossing(plan, tablefmt, wide)
        if self.graph_breaks:
            breaks = sorted(self.graph_breaks.items(), key=lambda entry: -entry[1])
            rows = [[count, reason.partition("\n")[0]] for reason, count in breaks]
            parts.append(tabulate(rows, ["graph breaks", "reason"], tablefmt=tablefmt))
        return "\n\n".join(part if "\n" in part else _wrapped(part) for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with stable names: bytes, and FLOPs of weight gradients, as integers."""
        graphs: list[dict[str, Any]] = [
            {
                "totals": _sums(plan),
                "sites": [
                    asdict(site) | asdict(cost)
                    for site, cost in zip(plan.sites, plan.account.sites, strict=True)
                ],
                "saved_before": [asdict(saved) for saved in plan.account.saved_before],
                "saved_after": [asdict(saved) for saved in plan.account.saved_after],
            }
            for plan in self.plans
        ]
        return {
            "version": 1,
            "totals": _total(self.plans),
            "graphs": graphs,
            "graph_breaks": dict(self.graph_breaks),
            "unsketched": dict(self.unsketched),
            "steps_unseen": self.steps_unseen,
            "energies": {name: [*map(list, run)] for name, run in self.energies.items()},
        }

    def to_json(self, indent: int | None = 1) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)

    def plot(self, path: str | Path) -> Path:
        """Stacked bars of what crosses the boundary, before and after; needs matplotlib."""
        from compact_fx.reading.plots import crossing  # matplotlib is an extra

        return crossing(self.plans, path)

    def plot_energies(self, path: str | Path) -> Path:
        """How much of each gradient its tracked projection holds, by weight and over time.

        Where it is little, more rank pays. Needs matplotlib.

        Raises:
            ValueError: no tracked projection has changed yet.
        """
        from compact_fx.reading.plots import energies

        return energies(self.energies, path)


# --- rows ----------------------------------------------------------------------------------------


def _sums(plan: Plan) -> dict[str, int]:
    return {
        "weights": len(plan.sites),
        "sketched": len(plan.sketched),
        "bytes_before": plan.account.bytes_before,
        "bytes_after": plan.account.bytes_after,
        "flops_before": sum(cost.flops_before for cost in plan.account.sites),
        "flops_after": sum(cost.flops_after for cost in plan.account.sites),
        "projection_bytes": plan.account.projection_bytes,
        "change_flops": plan.account.change_flops,
    }


def _total(plans: Sequence[Plan]) -> dict[str, int]:
    """`_sums` of all graphs."""
    sums = [_sums(plan) for plan in plans]
    return {name: sum(one[name] for one in sums) for name in _sums(Plan(sites=()))}


def _verdict(plans: Sequence[Plan]) -> str:
    """One sentence on what all graphs save, and one on what may be done better."""
    total = _total(plans)
    parts = [
        f"kept for the backward pass {_change(total['bytes_before'], total['bytes_after'])}",
        f"FLOPs of weight gradients {_change(total['flops_before'], total['flops_after'])}",
    ]
    factors = [(plan.projections[f.projection], f) for plan in plans for f in plan.factor_inputs]
    after = sum(math.prod(factor.shape) for _, factor in factors)
    before = sum(math.prod(f.shape) // p.rank * p.features for p, f in factors)
    if factors:
        parts.append(f"gradients and moments of {len(factors)} weights {_change(before, after)}")
    elif total["sketched"]:
        parts.append("gradients are dense, so that they and moments take what they did")
    text = f"{total['sketched']} of {total['weights']} weight gradients sketched: "
    text += ", ".join(parts)
    costs = [cost for plan in plans for cost in plan.account.sites]
    dearer = sum(cost.flops_after > cost.flops_before for cost in costs)
    if dearer:
        text += f". {dearer} take more FLOPs than before: `exclude` them where time counts"
        usual = CompactConfig.track_every
        tracked = (plan for plan in plans if any(p.is_tracked for p in plan.projections))
        if any(plan.track_every < usual for plan in tracked):
            text += f", or leave `track_every` at {usual}"
    return text + "."


def _change(before: int, after: int) -> str:
    return f"{round(100 * (after / before - 1)) if before else 0:+d}%"


def _totals(plan: Plan) -> str:
    sums = _sums(plan)
    held = sums["projection_bytes"]
    return (
        f"{sums['sketched']} of {sums['weights']} weight gradients sketched; kept for backward "
        f"{arrow(sums['bytes_before'], sums['bytes_after'], 1e6)} MB; weight gradients "
        f"{arrow(sums['flops_before'], sums['flops_after'], 1e9)} GFLOP"
        + (
            f"; tracked projections hold {digits(held / 1e6)} MB, to change them takes "
            f"{digits(sums['change_flops'] / 1e9)} GFLOP"
            if held
            else ""
        )
        + _budget(plan)
    )


def _budget(plan: Plan) -> str:
    """What `memory_budget` has chosen."""
    account = plan.account
    if not account.allowed:
        return ""
    chosen = ["recompute=True"] if plan.recompute else []
    chosen += [f"{plan.saved} for {plan.saved_share:.0%} of what crosses"] if plan.saved else []
    return (
        f"; memory_budget allows {digits(account.allowed / 1e6)} MB at the peak of the graph, "
        f"predicted are {digits(account.peak / 1e6)}, {' and '.join(chosen) or 'cut as by torch'}"
    )


def _weights(
    plan: Plan, energies: Mapping[str, Sequence[tuple[int, float]]], tablefmt: str, wide: bool
) -> list[str]:
    """The table of weights; below it, where it is not wide, why some are not as the others."""
    headers = ["weight", *(["count"] if wide else ()), "in → rank", "place", "kept MB", "GFLOP"]
    last = {name: run[-1][1] for name, run in energies.items() if run}
    leaders = {site.projection: site.weight for site in reversed(plan.sketched)}
    held = {s.weight: last[w] for s in plan.sketched if (w := leaders[s.projection]) in last}
    headers += ["energy"] if held else []
    headers += ["out", "gradient", "left alone because"] if wide else []
    groups: dict[tuple[Any, ...], list[tuple[Site, SiteCost]]] = {}
    sketched = {role.index for role in plan.factor_inputs}
    for site, cost in zip(plan.sites, plan.account.sites, strict=True):
        alike = (
            _NUMBER.sub(_SLOT, site.weight),
            site.use,
            site.in_features,
            site.out_features,
            site.side,
            site.rank,
            site.placement,
            site.reason,
            site.index in sketched,
        )
        groups.setdefault(alike, []).append((site, cost))
    rows, reasons = [], []
    for sites in groups.values():
        for pattern, names in merge_names([site.weight for site, _ in sites]):
            members = [(site, cost) for site, cost in sites if site.weight in names]
            own = [held[site.weight] for site, _ in members if site.weight in held]
            energy = [f"{sum(own) / len(own):.2f}" if own else ""] if held else []
            rows.append(_row(pattern, members, members[0][0].index in sketched, energy, wide))
            if members[0][0].reason and not wide:
                reasons.append(_wrapped(f"{rows[-1][0]}: {members[0][0].reason}"))
    table = tabulate(rows, headers=headers, tablefmt=tablefmt, disable_numparse=True)
    return [table, "\n".join(reasons)] if reasons else [table]


def _row(
    pattern: str,
    sites: Sequence[tuple[Site, SiteCost]],
    sketched: bool,
    energy: Sequence[str],
    wide: bool,
) -> list[str]:
    (first, _), costs = sites[0], [cost for _, cost in sites]
    rank = f" → {first.rank}" if first.rank else ""
    side = "out " if first.side == "output" else ""
    gradient = "" if first.placement is None else "sketched" if sketched else "dense"
    return [
        pattern + (f" (use {first.use + 1})" if first.use else ""),
        *((str(len(sites)),) if wide else ()),
        f"{side}{first.features}{rank}" if first.in_features else "",
        first.placement or "",
        arrow(sum(c.bytes_before for c in costs), sum(c.bytes_after for c in costs), 1e6),
        arrow(sum(c.flops_before for c in costs), sum(c.flops_after for c in costs), 1e9),
        *energy,
        *((str(first.out_features or ""), gradient, first.reason) if wide else ()),
    ]


def _crossing(plan: Plan, tablefmt: str, wide: bool) -> list[str]:
    """What crosses, per kind, then the largest tensors of the compacted graph and why."""
    kinds = [
        [
            kind,
            arrow(before, after, 1e6),
            f"{sum(s.kind == kind for s in plan.account.saved_before)} → "
            f"{sum(s.kind == kind for s in plan.account.saved_after)}",
        ]
        for kind in SAVED_KINDS
        if (before := bytes_of_kind(plan.account.saved_before, kind))
        + (after := bytes_of_kind(plan.account.saved_after, kind))
    ]
    table = tabulate(kinds, ["what crosses", "MB", "tensors"], tablefmt, disable_numparse=True)
    alike: dict[tuple[Any, ...], list[Saved]] = {}
    for saved in plan.account.saved_after:
        key = (saved.shape, saved.dtype, saved.op, saved.readers, saved.source)
        alike.setdefault(key, []).append(saved)
    largest = sorted(alike.values(), key=lambda group: -sum(saved.bytes for saved in group))
    rows = [
        [
            digits(sum(saved.bytes for saved in group) / 1e6),
            str(len(group)),
            f"{group[0].dtype} {group[0].shape}",
            group[0].op if wide else _shortened(group[0].op, _OPERATOR),
            *((", ".join(group[0].readers),) if wide else ()),
            group[0].source if wide else _shortened(group[0].source, _SOURCE),
        ]
        for group in (largest if wide else largest[:_TOP])
    ]
    headers = ["largest, MB", "count", "tensor", "made by"]
    headers += ["read by", "source"] if wide else ["source"]
    return [table, tabulate(rows, headers, tablefmt, disable_numparse=True)]


def arrow(before: int, after: int, unit: float) -> str:
    """`1.2 → 0.4`, in this unit; nothing where there was nothing."""
    if before == after == 0:
        return ""
    return f"{digits(before / unit)} → {digits(after / unit)}"


def digits(value: float) -> str:
    """Three significant digits, and no exponent for large numbers."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _wrapped(text: str) -> str:
    """In lines; all but the first are indented."""
    return textwrap.fill(text, _WIDTH, subsequent_indent="    ", break_on_hyphens=False)


# --- names ---------------------------------------------------------------------------------------


_NUMBER = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]*)(?![0-9])")  # no 007: it is a name, not a number
_SLOT = "\0"


def merge_names(names: Sequence[str]) -> list[tuple[str, set[str]]]:
    """Names that differ in numbers only, as patterns: `layers.{0-23}.mlp.down_proj.weight`.

    Returns:
        Each pattern with the names that it stands for; together all names, each once.
    """
    groups: dict[str, list[tuple[int, ...]]] = {}
    for name in names:
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups.setdefault(_NUMBER.sub(_SLOT, name), []).append(numbers)
    return [part for template, rows in groups.items() for part in _merged(template, rows)]


def _merged(template: str, rows: Sequence[tuple[int, ...]]) -> list[tuple[str, set[str]]]:
    choices = [sorted(set(column)) for column in zip(*rows, strict=True)]
    if math.prod(map(len, choices)) == len(set(rows)):
        filled = _fill(template, [_ranges(values) for values in choices])
        return [(filled, {_fill(template, map(str, row)) for row in rows})]
    # Not every combination is there: one pattern for each number in the first place.
    parts: list[tuple[str, set[str]]] = []
    for first in choices[0]:
        rest = [row[1:] for row in rows if row[0] == first]
        parts += _merged(_fill(template, [str(first)]), rest)
    return parts


def _fill(template: str, values: Iterable[str]) -> str:
    for value in values:
        template = template.replace(_SLOT, value, 1)
    return template


def _ranges(numbers: Sequence[int]) -> str:
    """`{0-3,7}` of 0, 1, 2, 3, 7."""
    if len(numbers) == 1:
        return str(numbers[0])
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) + "}"
