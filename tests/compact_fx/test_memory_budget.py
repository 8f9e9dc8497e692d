"""A budget of memory: the cheapest treatment that reaches it, or an error that says what can be."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compact_fx import CompactConfig, compact_backend
from compact_fx.compiler import GraphCompiler
from compact_fx.errors import BudgetTooSmall
from compact_fx.passes import choose_sites as module
from compact_fx.passes.apply_plan import apply_plan
from compact_fx.passes.choose_sites import LADDER, choose_sites
from compact_fx.passes.live_bytes import graph_memory
from compact_fx.passes.partition import partition


@pytest.fixture(scope="module")
def joint(make_llama, tokens):
    """The joint graph of a LLaMA with tensors that are large enough to be packed."""
    model, found = make_llama(layers=1, hidden_size=128, intermediate_size=352), []

    def backend(graph_module, inputs):
        compiler = GraphCompiler(CompactConfig(inner="aot_eager"), {}, graph_module, inputs)
        found.append(compiler.visit(lambda joint: joint))
        return graph_module.forward

    torch.compile(model, backend=backend)(input_ids=tokens, labels=tokens)
    return found[0]


def peak_of(joint, plan):
    return graph_memory(apply_plan(joint.copy(), plan), joint).peak


def test_a_smaller_budget_never_gives_a_larger_peak(joint):
    whole = graph_memory(partition(joint.copy(), recompute=False), joint, with_reuse=True).peak
    shares, peaks = (1.0, 0.85), []
    for share in shares:
        plan = choose_sites(joint, CompactConfig(memory_budget=share))
        assert share < 1 or (plan.recompute, plan.saved) == (False, None)  # the cheapest
        peaks.append(peak_of(joint, plan))
        assert peaks[-1] <= share * whole
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) > 1


def test_what_cannot_be_reached_says_what_can(joint):
    with pytest.raises(BudgetTooSmall, match=r"memory_budget=0\.01 .* smallest .* is \d+") as error:
        choose_sites(joint, CompactConfig(memory_budget=0.01))
    smallest, share = error.value.smallest, error.value.share
    assert f"is {smallest}: memory_budget={share}. " in str(error.value)
    for budget in (smallest, share):
        plan = choose_sites(joint, CompactConfig(memory_budget=budget))
        assert peak_of(joint, plan) == plan.account.peak <= smallest <= plan.account.allowed
    with pytest.raises(BudgetTooSmall):
        choose_sites(joint, CompactConfig(memory_budget=share - 0.002))


def test_the_report_says_what_a_budget_has_chosen(make_llama, tokens):
    model = make_llama(layers=1, hidden_size=128, intermediate_size=352)
    backend = compact_backend(memory_budget=0.85, inner="aot_eager")
    torch.compile(model, backend=backend)(input_ids=tokens, labels=tokens)
    (plan,) = backend.plans
    assert plan.saved == "int8"
    text = " ".join(str(backend.report()).split())
    assert re.search(
        r"memory_budget allows [\d.]+ MB .* predicted are [\d.]+, recompute=True", text
    )
    assert f"and int8 for {plan.saved_share:.0%} of what crosses" in text


class Gated(nn.Module):
    """Blocks whose activations take most of all with many rows, and sketches with few."""

    def __init__(self, size: int, outputs: int, blocks: int) -> None:
        super().__init__()
        names = {"a": (size, 4 * size), "b": (size, 4 * size), "c": (4 * size, size)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict({n: nn.Linear(*sizes) for n, sizes in names.items()})
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = self.norm(x)
            x = x + block["c"](F.silu(block["a"](h)) * block["b"](h))
        return self.head(x).logsumexp(-1).mean()


def test_a_smaller_last_batch_may_take_what_the_others_do():
    """Alone it cannot reach the share: what is small does not cross in 8 bits."""
    settings = {"rank": 0.25, "gradients": "dense", "memory_budget": 0.6, "inner": "aot_eager"}
    with pytest.raises(Exception, match=r"memory_budget=0\.6 allows"):
        torch.compile(Gated(128, 10, 3), backend=compact_backend(**settings))(torch.randn(300, 128))
    torch._dynamo.reset()
    backend = compact_backend(**settings)
    step = torch.compile(Gated(128, 10, 3), backend=backend)
    for rows in (512, 300):
        step(torch.randn(rows, 128)).backward()
    first, last = backend.plans
    assert last.account.peak <= last.account.allowed == first.account.allowed


def test_all_of_what_torch_takes_can_always_be_reached():
    """Sketches of few rows take more: there are none then, and the report says why."""
    settings = {"rank": 0.5, "gradients": "dense", "memory_budget": 1.0, "inner": "aot_eager"}
    backend = compact_backend(**settings)
    step = torch.compile(Gated(64, 100, 1), backend=backend)
    with pytest.warns(UserWarning, match="nothing is sketched in a graph"):
        step(torch.randn(32, 64)).backward()
    (plan,) = backend.plans
    reasons = {site.reason for site in plan.sites}
    assert "memory_budget=1.0 allows no sketch" in reasons, reasons


def test_it_is_raised_whatever_strict_says(make_llama, tokens):
    model = make_llama(layers=1)
    step = torch.compile(model, backend=compact_backend(memory_budget=100, inner="aot_eager"))
    with pytest.raises(Exception, match="the smallest that can be reached is") as error:
        step(input_ids=tokens, labels=tokens)
    assert isinstance(error.value.inner_exception, BudgetTooSmall)


@pytest.mark.parametrize("treatment", LADDER[1:], ids=str)
def test_every_treatment_computes_the_gradients(
    make_llama, tokens, gradients_of, monkeypatch, treatment
):
    """Exactly, or nearly where something crosses in 8 bits; also where nothing is sketched."""
    monkeypatch.setattr(module, "LADDER", (treatment,))
    size = {"layers": 1, "hidden_size": 128, "intermediate_size": 352}
    loss, expected = gradients_of(make_llama(**size), tokens)
    for settings in ({"rank": 1.0, "projection": "orthogonal"}, {"exclude": ("*",)}):
        backend = compact_backend(
            **settings, gradients="dense", memory_budget=10**9, inner="aot_eager", strict=True
        )
        found, actual = gradients_of(make_llama(**size), tokens, backend)
        assert found == pytest.approx(loss, rel=1e-5)
        near = 0.05 if treatment.saved else 1e-4
        for name, gradient in expected.items():
            assert (actual[name] - gradient).norm() <= near * gradient.norm() + 1e-7, name
        (plan,) = backend.plans
        assert (plan.saved, plan.saved_share) == (treatment.saved, treatment.share)
