"""A budget of memory: the cheapest treatment that reaches it, or an error that says what can be."""

import pytest
import torch

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
    smallest = int(str(error.value).split(" is ")[1].split(":")[0])
    plan = choose_sites(joint, CompactConfig(memory_budget=smallest))
    assert peak_of(joint, plan) <= smallest


def test_it_is_raised_whatever_strict_says(make_llama, tokens):
    model = make_llama(layers=1)
    step = torch.compile(model, backend=compact_backend(memory_budget=100, inner="aot_eager"))
    with pytest.raises(Exception, match="the smallest that can be reached is"):
        step(input_ids=tokens, labels=tokens)


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
