"""The benchmark of time against memory: dry runs on a CPU, its file and picture, and the paper."""

import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[2]
TINY = {"layers": 1, "hidden": 64, "mlp": 128, "heads": 2, "batch": 2, "seq": 64}
ERROR = "RuntimeError: no such kernel"

Run = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder's modules can be imported."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # they set this: undone at the end
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def pareto(benchmarks: None) -> ModuleType:
    """The benchmark as a module."""
    import pareto

    return pareto


@pytest.fixture
def run(pareto: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A dry run of the command line; the rows of its results by name."""

    def call(shape: str, *more: str, **sizes: int) -> dict[str, dict[str, Any]]:
        out = tmp_path / "results.json"
        argv = ["pareto.py", "--shape", shape, "--out", str(out), "--device", "cpu"]
        argv += ["--inner", "aot_eager", "--steps", "2", "--warmup", "0", *more]
        for size, value in {**TINY, **sizes}.items():
            argv += [f"--{size.replace('_', '-')}", str(value)]
        monkeypatch.setattr(sys, "argv", argv)
        pareto.main()
        return {row["name"]: row for row in pareto.read(out)["rows"]}

    return call


@pytest.mark.long
def test_a_failure_is_listed_and_the_next_call_goes_on(
    pareto: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(case: object) -> None:
        raise RuntimeError("no such kernel\nof many lines")

    everybody = pareto.competitors("1b")
    names = ("torch.compile", "compact n/4", "paper in eager, n/4")
    few = {"broken": fail, **{name: everybody[name] for name in names}}
    monkeypatch.setattr(pareto, "competitors", lambda shape: few)

    first = run("1b", "--skip", "paper*", kv_heads=2)
    assert first.keys() == {"broken", "torch.compile", "compact n/4"}
    assert first["broken"]["error"] == ERROR
    base, ours = first["torch.compile"], first["compact n/4"]
    assert base["ms_ratio"] == 1
    assert ours["ms_ratio"] == pytest.approx(ours["ms"] / base["ms"])
    assert ours["tokens_per_s"] == pytest.approx(2 * 64 / ours["ms"] * 1e3, abs=1)
    assert ours["peak_gb"] is None  # of a CPU

    few["broken"] = everybody["eager"]
    second = run("1b", kv_heads=2)
    assert second.keys() == {"broken", *names}
    assert all(second[name] == first[name] for name in ("torch.compile", "compact n/4"))
    assert "error" not in second["broken"]
    with pytest.raises(SystemExit, match="results of another shape"):
        run("1b", kv_heads=1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("shape", "patterns", "sizes"),
    [
        ("1b", "--skip *AdamW8bit *n/8* *0.[4678] torchao*wise *moments", {"kv_heads": 2}),
        ("8b", "--only compact?n/4", {"kv_heads": 1}),
        ("350m", "--only compact?n/8 LoRA* paper*", {"kv_heads": 2, "vocabulary": 128}),
        ("roberta", "--only compact?rank?8 LoRA* paper*", {"vocabulary": 128}),
    ],
)
def test_everybody(run: Run, shape: str, patterns: str, sizes: dict[str, int]) -> None:
    """One of each kind, but AdamW8bit: a CPU compiles it for half a minute."""
    for name in ("torchao", "peft"):
        pytest.importorskip(name)
    rows = run(shape, *patterns.split(), **sizes)
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    wanted = ("GaLore", "APOLLO", "Liger")  # packages that the tests do not need
    assert not {name: error for name, error in failed.items() if not name.startswith(wanted)}
    assert len(rows) > len(failed)


def test_ratios_are_of_one_device(benchmarks: None, tmp_path: Path) -> None:
    import pareto_results as results

    rows = [
        {"name": name, "device": device, "ms": ms, "peak_gb": peak}
        for name, device, ms, peak in (
            ("torch.compile", "A", 10.0, 4.0),
            ("eager", "A", 15.0, 5.0),
            ("torch.compile", "B", 20.0, 4.0),
            ("eager", "B", 25.0, 4.0),
            ("eager", "C", 25.0, 4.0),
        )
    ]
    results.write({"name": "1b", "shape": {}, "rows": rows}, tmp_path / "results.json")
    rows = results.read(tmp_path / "results.json")["rows"]
    assert [row.get("ms_ratio") for row in rows] == [1, 1.5, 1, 1.25, None]
    assert [row.get("peak_ratio") for row in rows] == [1, 1.25, 1, 1, None]
    other = {"name": "1b", "shape": {}, "rows": [{**rows[1], "ms_ratio": 2.0}, {**rows[1]}]}
    other["rows"][1]["name"] = "compact"
    both = results.together([{"name": "1b", "shape": {}, "rows": rows}, other])["rows"]
    found = {(row["device"], row["name"]): row.get("ms_ratio") for row in both}
    assert len(both) == len(found) == 6
    assert found["A", "eager"] == found["A", "compact"] == 1.5
    with pytest.raises(SystemExit, match="different shapes"):
        results.together([other, {**other, "name": "8b"}])
    assert results.frontier([(3, 1), (1, 3), (2, 2), (2, 4), (3, 2)]) == [(1, 3), (2, 2), (3, 1)]


def test_names_in_the_picture_do_not_overlap(benchmarks: None) -> None:
    pytest.importorskip("matplotlib")
    import pareto_results as results

    rows = [
        {
            "name": f"{'compact' if number % 2 else 'another'} method with a name, {number}",
            "ms_ratio": 1 + number % 5 / 50,
            "peak_ratio": 0.5 + number % 7 / 70,
        }
        for number in range(24)
    ]
    figure = results.picture("crowded", rows)
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == len(rows)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_the_paper_in_eager(benchmarks: None) -> None:
    """Factors are G P, all else is exact, and a step is W − η α N Pᵀ; then P changes."""
    from compact_eager import EagerCompactAdamW, to_compact

    def make() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8, bias=False))

    x = torch.randn(3, 5, 12, requires_grad=True)
    exact, model = make(), make()
    to_compact({name: model[int(name)] for name in "02"}, lambda features: features // 4, 1)
    optimizer = EagerCompactAdamW(model.parameters(), lr=0.1, scale=0.5)
    (wanted,) = torch.autograd.grad(exact(x).square().sum(), x)
    exact(x).square().sum().backward()
    x.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(x.grad, wanted)
    torch.testing.assert_close(model[0].bias.grad, exact[0].bias.grad)

    drawn = {index: model[index].weight.sketch.draw(x) for index in (0, 2)}
    assert drawn[0].shape == (12, 3)
    for index, p in drawn.items():
        weight = model[index].weight
        assert weight.grad is None
        torch.testing.assert_close(weight.sketch.factor, exact[index].weight.grad @ p)
    optimizer.step()
    for index, p in drawn.items():
        factor = exact[index].weight.grad @ p  # Adam's first step is the sign
        after = exact[index].weight - 0.1 * 0.5 * factor.sign() @ p.T
        torch.testing.assert_close(model[index].weight, after, rtol=1e-3, atol=1e-4)
        sketch = model[index].weight.sketch
        assert optimizer.state[model[index].weight]["exp_avg"].shape == factor.shape
        assert not torch.equal(sketch.draw(x), p)
    optimizer.zero_grad()
    assert model[0].weight.sketch.factor is None
