"""Formulas for many layers, from graphs of two and of three."""

import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import explain
from compact_fx.reading.explanation import COMPILED, SKETCHED

ROOT = Path(__file__).parents[2]
LAYERS = 5

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def module():
    """The script as a module."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import predicted_scaling

    sys.path.remove(str(ROOT / "benchmarks"))
    return predicted_scaling


@pytest.fixture(scope="module")
def config():
    return LlamaConfig(
        hidden_size=64,
        intermediate_size=176,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        use_cache=False,
        num_hidden_layers=LAYERS,
    )


@pytest.fixture(scope="module")
def found(module, config):
    """Stretched, and traced in full."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        tokens = torch.zeros(1, 256, dtype=torch.int64)
    whole = explain(model, input_ids=tokens, labels=tokens)
    return module.Model(config, LAYERS, tokens=256), whole


@pytest.mark.parametrize("way", [COMPILED, SKETCHED])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_layers_that_are_not_traced(found, parallel, way):
    """All but the peak is what a graph of all layers gives; what is sent, to rounding."""
    model, whole = found
    few = asdict(model.rank(6, parallel, way))
    many = asdict(whole.ranks(6, parallel).each[way])
    assert many.pop("peak") > few.pop("peak") == 0
    assert few == {name: pytest.approx(value, abs=10) for name, value in many.items()}
    assert (few["projections"] > 0) == (way == SKETCHED)


def test_flops(found, config, module):
    """Those of a real forward pass without attention, which the counter does not know on a CPU."""
    model, whole = found
    config.num_hidden_layers = LAYERS
    tokens = torch.zeros(1, 256, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        LlamaForCausalLM(config)(input_ids=tokens, labels=tokens)
    attention = 2 * LAYERS * 256**2 * 64
    work, sketched = model.work(COMPILED), model.work(SKETCHED)
    assert work.forward == sketched.forward == counter.get_total_flops() + attention
    assert work.backward == 2 * counter.get_total_flops() + 2.5 * attention
    after = sum(cost.flops_after for graphs in whole.graphs for cost in graphs.plan.account.sites)
    assert counter.get_total_flops() + after < sketched.backward < work.backward


def test_tokens_that_hide(found, module):
    """With as many, exchange takes as long as a pass; with half, twice as long."""
    model, _ = found
    rank, work = model.rank(512, "ddp", COMPILED), model.work(COMPILED)
    tokens = module.tokens_that_hide(rank, work, 1e9)
    t = module.times(rank, work, 1e9, tokens)
    assert t.exchange == pytest.approx(t.backward)
    t = module.times(rank, work, 1e9, tokens / 2)
    assert t.step == pytest.approx(t.forward + 2 * t.backward)
