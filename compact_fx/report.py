"""What was done to a model, as text."""

from collections.abc import Sequence

from tabulate import tabulate

from compact_fx.plan import Plan, Site


def report(plans: Sequence[Plan]) -> str:
    """A table of every candidate weight of every compiled graph, with totals."""
    if not plans:
        return "nothing was compiled for training yet: run a forward pass that needs gradients"
    return "\n\n".join(_graph(number, plan) for number, plan in enumerate(plans))


def _graph(number: int, plan: Plan) -> str:
    headers = [
        "weight",
        "in → rank",
        "out",
        "placement",
        "kept MB",
        "weight-grad GFLOP",
        "left alone because",
    ]
    before = sum(site.flops_before for site in plan.sites)
    after = sum(site.flops_after for site in plan.sites)
    total = (
        f"graph {number}: {len(plan.sketched)} of {len(plan.sites)} weight gradients sketched; "
        f"kept for backward {_arrow(plan.bytes_before, plan.bytes_after, 1e6)} MB; "
        f"weight gradients {_arrow(before, after, 1e9)} GFLOP"
    )
    return total + "\n" + tabulate([_row(site) for site in plan.sites], headers=headers)


def _row(site: Site) -> list[str]:
    again = f" (use {site.use + 1})" if site.use else ""
    rank = f" → {site.rank}" if site.rank else ""
    return [
        site.weight + again,
        f"{site.in_features}{rank}" if site.in_features else "",
        str(site.out_features or ""),
        site.placement or "",
        _arrow(site.bytes_before, site.bytes_after, 1e6),
        _arrow(site.flops_before, site.flops_after, 1e9),
        site.reason,
    ]


def _arrow(before: int, after: int, unit: float) -> str:
    if before == after == 0:
        return ""
    return f"{before / unit:.3g} → {after / unit:.3g}"
