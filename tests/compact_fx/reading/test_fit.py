"""`fit`: from graphs of few layers, what `explain` says of many; and the largest batch."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import explain
from compact_fx.reading.explanation import SKETCHED
from compact_fx.reading.fit import GPU, fit
from compact_fx.training import low_bit
from compact_fx.training.moments import SIGNS

SIZE, LENGTH, RATE = 64, 128, 1e12
LARGE = GPU(memory=10**12, flops=RATE, bandwidth=1e30)


class Output(NamedTuple):
    loss: Tensor


class Blocks(nn.Module):
    """MLPs one after the other, and a head."""

    def __init__(self, layers: int, checkpointing: bool, widths: tuple[int, ...] = (128,)):
        super().__init__()
        widths = tuple(widths[i % len(widths)] for i in range(layers))
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(SIZE), nn.Linear(SIZE, m), nn.GELU(), nn.Linear(m, SIZE, bias=False)
            )
            for m in widths
        )
        self.head, self.checkpointing = nn.Linear(SIZE, 512), checkpointing

    def forward(self, x: Tensor) -> Output:
        for block in self.blocks:
            x = x + (checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x))
        return Output(self.head(x).tanh().sum())


def build(layers: int, checkpointing: bool) -> nn.Module:
    with torch.device("meta"):
        return Blocks(layers, checkpointing)


def inputs(batch: int) -> dict[str, Tensor]:
    return {"x": torch.zeros(batch, LENGTH, SIZE, device="meta")}


def explained(found, model: nn.Module, arguments: dict[str, Tensor]) -> int:
    """Predicted from the whole graph."""
    settings = {"rank": found.rank, "saved": found.saved}
    return explain(model, **arguments, **settings).memory[SKETCHED].peak


@pytest.mark.long
def test_peaks_are_those_of_the_whole_graph():
    """Four layers from two and three, a batch of three from another."""
    settings = {"ranks": (0.5,), "checkpointing": (False,), "batch": 3}
    found = fit(build, inputs, layers=4, gpu=LARGE, **settings)
    assert len(found.candidates) == 4
    for candidate in found.candidates:
        if candidate.state_dtype is None:
            expected = explained(candidate, build(4, candidate.checkpointing), inputs(3))
            assert candidate.bytes == pytest.approx(expected, rel=0.02), candidate


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peaks_of_a_llama(checkpointing):
    """The same for attention, words and a head over them."""

    def make(layers: int, checkpointing: bool) -> nn.Module:
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=layers,
            num_attention_heads=4,
            vocab_size=256,
            use_cache=False,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config).to(torch.bfloat16).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def tokens(batch: int) -> dict[str, Tensor]:
        ids = torch.zeros(batch, 64, dtype=torch.int64, device="meta")
        return {"input_ids": ids, "labels": ids}

    settings = {"ranks": (0.25,), "checkpointing": (checkpointing,), "batch": 3}
    found = fit(make, tokens, layers=4, gpu=LARGE, **settings)
    # Of what crosses to checkpoints nothing is in 8 bits.
    assert len(found.candidates) == (2 if checkpointing else 4)
    for candidate in found.candidates:
        if candidate.state_dtype is None:
            expected = explained(candidate, make(4, checkpointing), tokens(3))
            assert candidate.bytes == pytest.approx(expected, rel=0.02), candidate


@pytest.mark.long
def test_largest_batch_is_the_last_that_fits():
    """One sequence more does not, says `explain`; the fastest comes first."""
    gpu = GPU(memory=8_000_000, flops=RATE, bandwidth=RATE)
    found = fit(build, inputs, layers=4, gpu=gpu, ranks=(0.25,), checkpointing=(False,))
    times = [candidate.seconds for candidate in found.candidates]
    assert times == sorted(times)
    for candidate in found.candidates:
        if candidate.state_dtype is None and candidate.saved == "keep":
            n, model = candidate.batch, build(4, False)
            assert explained(candidate, model, inputs(n)) <= gpu.memory
            assert explained(candidate, model, inputs(n + 1)) > gpu.memory
    best = found.candidates[0]
    line, *rest = str(found).splitlines()
    assert line.startswith("compact_backend(rank=0.25")
    assert f"# batch {best.batch}" in line
    assert ("state_dtype='fp8'" in line) is (best.state_dtype == "fp8")
    assert max(map(len, rest)) <= 100
    assert found.to_dict()["candidates"][0]["bytes"] == best.bytes
    (plain,) = found.compiled
    n = plain.batch
    assert rest[-1].split()[:2] == [str(n), "full"]
    assert (plain.rank, plain.of_compiled) == (None, 1)
    assert f"AdamW takes {plain.seconds / best.seconds:.2f} times as long (batch {n})" in line
    memory = explain(build(4, False), **inputs(n), loss=lambda out: out.loss).memory
    assert memory["torch.compile"].peak == pytest.approx(plain.bytes, rel=1e-6)
    memory = explain(build(4, False), **inputs(n + 1), loss=lambda out: out.loss).memory
    assert memory["torch.compile"].peak > gpu.memory


def test_what_torch_compile_needs_and_has_not():
    """Just enough for the smallest of ours: the answer says that AdamW's moments do not fit."""
    settings = {"layers": 4, "ranks": (0.25,), "checkpointing": (False,), "batch": 1}
    large = fit(build, inputs, gpu=LARGE, **settings)
    least = min(candidate.bytes for candidate in large.candidates)
    assert least < large.compiled[0].bytes
    found = fit(build, inputs, gpu=GPU(memory=least, flops=RATE, bandwidth=RATE), **settings)
    assert {candidate.bytes for candidate in found.candidates} == {least}
    assert found.compiled == ()
    assert found.recommendation().endswith("; torch.compile with AdamW does not fit")


def test_time_of_torch_compile_is_its_flops():
    """Where memory takes no time: as many as torch counts in a run."""
    found = fit(build, inputs, layers=5, gpu=LARGE, ranks=(0.25,), checkpointing=(False,), batch=2)
    model = Blocks(5, False)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, LENGTH, SIZE, requires_grad=True)).loss.backward()
    unread = 2 * 2 * LENGTH * SIZE * 128  # the first layer's gradient goes on to the input
    fastest = found.candidates[0]
    flops = RATE * 2 * fastest.seconds / fastest.of_compiled
    assert counter.get_total_flops() - flops == pytest.approx(0, abs=unread)
    assert fastest.of_compiled < 1


def test_nothing_fits():
    """What would at least be needed."""
    gpu = GPU(memory=100_000, flops=RATE, bandwidth=RATE)
    with pytest.raises(ValueError, match=r"smallest prediction is \d.*batch 1, rank=0.25"):
        fit(build, inputs, layers=2, gpu=gpu, ranks=(0.25,), checkpointing=(False,))


def test_layers_that_are_not_alike():
    """Few say nothing of many."""

    def uneven(layers: int, checkpointing: bool) -> nn.Module:
        with torch.device("meta"):
            return Blocks(layers, checkpointing, widths=(128, 128, 128, 256))

    with pytest.raises(ValueError, match="layers that are not alike"):
        fit(uneven, inputs, layers=4, gpu=LARGE, ranks=(0.25,), checkpointing=(False,))


def test_a_few_bytes_of_a_later_layer():
    """Gemma 3's sixth layer is the first with a rotary table of its own."""

    def with_table(layers: int, checkpointing: bool) -> nn.Module:
        model = build(layers, checkpointing)
        if layers > 3:
            model.register_buffer("table", torch.zeros(16, device="meta"))
        return model

    settings = {"layers": 4, "gpu": LARGE, "ranks": (0.25,), "checkpointing": (False,), "batch": 1}
    found, expected = fit(with_table, inputs, **settings), fit(build, inputs, **settings)
    assert found.candidates == expected.candidates


def test_a_model_without_a_loss():
    """Says what it was given."""

    class Silent(Blocks):
        def forward(self, x):
            return (super().forward(x).loss,)

    def silent(layers: int, checkpointing: bool) -> nn.Module:
        with torch.device("meta"):
            return Silent(layers, checkpointing)

    with pytest.raises(ValueError, match=r"no loss for x\b"):
        fit(silent, inputs, layers=2, gpu=LARGE, ranks=(0.25,), checkpointing=(False,))


def test_bytes_of_moments_in_8_bits():
    """As they are stored."""
    for elements in (100, low_bit.SMALLEST, low_bit.SMALLEST + 1):
        state = {"exp_avg": torch.zeros(elements), "exp_avg_sq": torch.zeros(elements)}
        low_bit.encode([state], SIGNS)
        stored = sum(t.nbytes for name, t in state.items() if name != low_bit.ROUNDINGS)
        assert stored == 2 * low_bit.stored_bytes(elements)
