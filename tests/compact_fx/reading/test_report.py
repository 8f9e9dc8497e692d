"""Reports: names merged, totals that add up and that autograd's own hooks count, stable data."""

import json

import pytest
import torch
from torch import nn

from compact_fx import (
    Account,
    CompactAdamW,
    CompactionReport,
    Plan,
    Saved,
    Site,
    compact_backend,
)
from compact_fx.plan import SiteCost
from compact_fx.reading.report import arrow, merge_names

COUNTSKETCH = {"gradients": "dense", "projection": "countsketch"}


class Scaled(nn.Module):
    """Two linear layers, buffers that the backward reads, and perhaps a graph break."""

    def __init__(self, graph_break: bool = False):
        super().__init__()
        self.graph_break = graph_break
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 64)
        self.register_buffer("scale", torch.rand(96))
        self.register_buffer("shift", torch.rand(64), persistent=False)

    def forward(self, x):
        x = (self.first(x) * self.scale).tanh()
        if self.graph_break:
            torch._dynamo.graph_break()
        return self.second(x) * self.shift


def report_of(model, *args, **kwargs):
    backend = compact_backend(rank=0.25, **COUNTSKETCH, inner="aot_eager", strict=True)
    torch.compile(model, backend=backend)(*args, **kwargs)
    return backend.report()


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        (["lm_head.weight"], ["lm_head.weight"]),
        (["h.0.w", "h.1.w", "h.2.w"], ["h.{0-2}.w"]),
        (["h.7.w", "h.0.w", "h.2.w", "h.1.w"], ["h.{0-2,7}.w"]),
        (["h.3.w"], ["h.3.w"]),
        (["h.9.w", "h.10.w"], ["h.{9-10}.w"]),
        ([f"h.{i}.e.{j}.w" for i in (0, 1) for j in (0, 1, 2)], ["h.{0-1}.e.{0-2}.w"]),
        # layer 1 has no expert 1: h.{0-1}.e.{0-1} would claim one that is not there
        (["h.0.e.0.w", "h.0.e.1.w", "h.1.e.0.w"], ["h.0.e.{0-1}.w", "h.1.e.0.w"]),
        (["conv1.w", "conv2.w", "head.w"], ["conv{1-2}.w", "head.w"]),
        (["block01.w", "block02.w", "block1.w"], ["block01.w", "block02.w", "block1.w"]),
        (["a#.1.w", "a#.2.w"], ["a#.{1-2}.w"]),
        ([], []),
    ],
)
def test_names_are_merged(names, patterns):
    """Each pattern stands for exactly the names that are there."""
    merged = merge_names(names)
    assert [pattern for pattern, _ in merged] == patterns
    stood_for = [name for _, members in merged for name in members]
    assert sorted(stood_for) == sorted(names)


def test_repeated_layers_are_one_row(make_llama, tokens):
    """A row has its weights' number and their sums."""
    settings = {"inner": "aot_eager", "strict": True, "exclude": ("*.1.*gate*",)}
    backend = compact_backend(rank=0.25, **COUNTSKETCH, **settings)
    torch.compile(make_llama(layers=3), backend=backend)(input_ids=tokens, labels=tokens)
    report = backend.report()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in report.table("github", wide=True).splitlines()
    ]
    rows = {row[0]: row for row in cells}
    down = rows["model.layers.{0-2}.mlp.down_proj.weight"]
    assert down[1:4] == ["3", "176 → 44", "late"]
    flops = 2 * 256 * 176 * 64  # one weight gradient: tokens × in × out
    (site, *_) = [s for s in report.plans[0].sites if "down_proj" in s.weight]
    assert report.plans[0].cost_of(site).flops_before == flops
    assert down[5] == arrow(3 * flops, 3 * report.plans[0].cost_of(site).flops_after, 1e9)
    assert down[6:8] == ["64", "dense"]
    assert rows["model.layers.{0,2}.mlp.gate_proj.weight"][1] == "2"
    assert "in exclude" in rows["model.layers.1.mlp.gate_proj.weight"][-1]
    assert "no matmul" in rows["model.embed_tokens.weight"][-1]


def test_wide_and_narrow(make_llama, tokens):
    """Narrow lines are shorter; wide ones say everything."""
    report = report_of(make_llama(layers=1), input_ids=tokens, labels=tokens)
    narrow, wide = report.table(), report.table(wide=True)
    assert str(report) == narrow
    assert "…" in narrow
    assert "…" not in wide
    assert max(map(len, narrow.splitlines())) <= 100
    reason = "its gradient is no matmul: aten."  # whole, if in two lines
    assert reason in " ".join(narrow.split())
    assert len(wide.splitlines()) > len(narrow.splitlines())  # all tensors, not the largest eight
    assert "what crosses" in narrow
    assert "modeling_llama.py" in narrow
    assert "|---" in report.table("github")


def test_large_numbers_have_no_exponent():
    """Three digits that mean something, and a reader who need not count zeros."""
    assert arrow(17_600_000_000, 123_456, 1e6) == "17600 → 0.123"
    assert arrow(999_600, 999_400, 1e3) == "1000 → 999"
    assert arrow(0, 0, 1.0) == ""


def test_data_has_stable_names(make_llama, tokens):
    """Other programs read these; the totals are sums, and JSON holds the same."""
    report = report_of(make_llama(layers=1), input_ids=tokens, labels=tokens)
    data = report.to_dict()
    assert list(data) == [
        "version",
        "totals",
        "graphs",
        "graph_breaks",
        "unsketched",
        "steps_unseen",
        "energies",
    ]
    totals = ["weights", "sketched", "bytes_before", "bytes_after", "flops_before", "flops_after"]
    assert list(data["totals"]) == [*totals, "projection_bytes", "change_flops"]
    (graph,) = data["graphs"]
    assert list(graph) == ["totals", "sites", "saved_before", "saved_after"]
    assert list(graph["sites"][0]) == [
        "weight",
        "index",
        "use",
        "in_features",
        "out_features",
        "side",
        "rank",
        "placement",
        "reason",
        "sketch",
        "projection",
        "bytes_before",
        "bytes_after",
        "flops_before",
        "flops_after",
    ]
    names = ["name", "op", "shape", "dtype", "bytes", "kind", "readers", "source"]
    assert list(graph["saved_before"][0]) == list(graph["saved_after"][0]) == names
    for when in ("before", "after"):
        crossing = sum(saved["bytes"] for saved in graph[f"saved_{when}"])
        assert data["totals"][f"bytes_{when}"] == crossing > 0
        flops = sum(site[f"flops_{when}"] for site in graph["sites"])
        assert data["totals"][f"flops_{when}"] == flops > 0
    as_lists = json.loads(json.dumps(data))
    assert json.loads(report.to_json()) == as_lists
    assert data["version"] == 1


def test_it_begins_with_a_verdict(make_llama, tokens):
    """What is saved of what, and what to do about weights that take more."""
    factors = {"gradients": "sketched", "projection": "gaussian", "inner": "aot_eager"}
    dense = compact_backend(rank=0.5, **COUNTSKETCH, inner="aot_eager")
    sketched = compact_backend(rank=0.5, **factors)
    for backend in (dense, sketched):
        torch._dynamo.reset()
        torch.compile(make_llama(layers=1), backend=backend)(input_ids=tokens, labels=tokens)
    first = " ".join(str(dense.report()).partition("\n\n")[0].split())
    assert "gradients are dense, so that they and moments take what they did" in first
    totals = sketched.report().to_dict()["totals"]
    share = round(100 - 100 * totals["bytes_after"] / totals["bytes_before"])
    first = " ".join(str(sketched.report()).partition("\n\n")[0].split())
    assert f"kept for the backward pass -{share}%" in first
    assert "gradients and moments of 7 weights -50%" in first
    dearer = [c for c in sketched.plans[0].account.sites if c.flops_after > c.flops_before]
    assert dearer
    assert f"{len(dearer)} take more FLOPs than before: `exclude` them" in first


def test_totals_are_of_all_graphs():
    """Two graphs of known sizes."""

    def plan(size: int) -> Plan:
        saved = Saved(
            name="x",
            op="mm.default",
            shape="(1,)",
            dtype="float32",
            bytes=size,
            kind="matmul input",
            readers=("mm.default",),
            source="",
        )
        account = Account(
            saved_before=(saved, saved),
            saved_after=(saved,),
            sites=(SiteCost(flops_before=10 * size, flops_after=size),),
        )
        return Plan(sites=(Site(weight="w", index=0),), account=account)

    report = CompactionReport(plans=(plan(4), plan(6)), graph_breaks={})
    assert report.to_dict()["totals"] == {
        "weights": 2,
        "sketched": 0,
        "bytes_before": 20,
        "bytes_after": 10,
        "flops_before": 100,
        "flops_after": 10,
        "projection_bytes": 0,
        "change_flops": 0,
    }


def test_tracked_projections_are_told_with_what_they_hold(tmp_path):
    """Sides, bytes, and the energy of the last change; of all in the data and the picture."""
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))
    backend = compact_backend(
        rank=0.25, projection="tracked", gradients="sketched", update_interval=2, inner="aot_eager"
    )
    step, optimizer = torch.compile(model, backend=backend), CompactAdamW(model.parameters())
    with pytest.raises(ValueError, match="no tracked projection has changed yet"):
        backend.report().plot_energies(tmp_path / "energies.png")
    for _ in range(6):
        step(torch.randn(256, 64)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    report = backend.report()
    assert {name: [s for s, _ in run] for name, run in report.energies.items()} == {
        "0.weight": [1, 3, 5],
        "2.weight": [1, 3, 5],
    }
    text = report.table()
    held = report.plans[0].account.projection_bytes
    assert held == (64 * 16 + 32 * 8) * 8
    assert f"tracked projections hold {held / 1e6:.3g} MB, to change them takes" in text
    assert "out 32 → 8" in text
    for run in report.energies.values():
        assert f"{run[-1][1]:.2f}" in text
    assert report.to_dict()["energies"]["0.weight"][0][0] == 1
    assert report.plot_energies(tmp_path / "energies.png").stat().st_size > 1000


def test_graph_breaks_are_shown_and_counted_once():
    """Those of earlier models are not this backend's."""
    x = torch.randn(32, 64)
    report = report_of(Scaled(graph_break=True), x)
    assert len(report.plans) == 2
    assert list(report.graph_breaks.values()) == [1]
    assert "graph_break()" in report.table().splitlines()[-1]
    assert report_of(Scaled(), x).graph_breaks == {}


def test_nothing_compiled():
    """A sentence, and data all the same."""
    report = compact_backend().report()
    assert "nothing was compiled" in str(report)
    assert report.to_dict()["totals"]["weights"] == 0


def bytes_of_sources(plan: Plan) -> int:
    """Keys and tables: inputs that are there for many steps."""
    return sum(p.empty_source(torch.zeros(())).nbytes for p in plan.projections)


@pytest.mark.parametrize(("inner", "recompute"), [("aot_eager", False), ("inductor", True)])
def test_totals_are_what_autograd_keeps(make_llama, tokens, kept_bytes, inner, recompute):
    """To the byte: torch.compile's own partition before, ours after, on a real run."""
    model = make_llama(layers=1)
    settings = {"inner": inner, "recompute": recompute, "strict": True}
    backend = compact_backend(rank=0.25, **COUNTSKETCH, **settings)
    lasting = [*model.parameters(), *model.buffers()]

    def run(compiled):
        return kept_bytes(lambda: compiled(input_ids=tokens, labels=tokens).loss, lasting)

    kept = run(torch.compile(model, backend=backend))
    (plan,) = backend.plans
    assert plan.account.bytes_after == kept - bytes_of_sources(plan)
    torch._dynamo.reset()
    plain = "inductor" if inner == "inductor" else "aot_eager_decomp_partition"
    assert plan.account.bytes_before == run(torch.compile(model, backend=plain))
    assert plan.account.bytes_after < plan.account.bytes_before


def test_buffers_do_not_cross(kept_bytes):
    """The backward reads them, and they are there anyway."""
    model, x = Scaled(), torch.randn(32, 64)
    backend = compact_backend(rank=0.25, **COUNTSKETCH, inner="aot_eager", strict=True)
    compiled = torch.compile(model, backend=backend)
    kept = kept_bytes(lambda: compiled(x), [*model.parameters(), *model.buffers()])
    (plan,) = backend.plans
    assert plan.account.bytes_after == kept - bytes_of_sources(plan)
    assert "(96,)" not in [saved.shape for saved in plan.account.saved_before]


def test_names_with_many_numbers_are_merged_at_once():
    """The layer's number may stand in a name several times; combinations are not tried."""
    names = [f"a{i}.b{i}.c{i}.d{i}.e{i}" for i in range(64)]
    assert {name for _, members in merge_names(names) for name in members} == set(names)
