"""Live memory: small cases counted by hand."""

import torch
from torch import nn

from compact_fx import explain
from compact_fx.passes.live_bytes import (
    GraphMemory,
    Kernel,
    Moment,
    _fused_side_by_side,
    _keep_for_reuse,
    graph_memory,
)
from compact_fx.reading.explanation import COMPILED, DENSE, SKETCHED
from compact_fx.reading.memory import LiveMemory, step_timeline

KB = 1024


def memory_of(model, x):
    graphs = explain(model, x, rank=0.25, inner="aot_eager").graphs[0]
    return graph_memory(graphs.cut_before, graphs._joint, with_reuse=True)


def of(moments, operator):
    return [moment.bytes for moment in moments if moment.operator.startswith(operator)]


def test_two_matrices_by_hand():
    """x (256, 64) → h = x A (256, 128) → y = h B (256, 64), without biases or activations.

    The forward makes h (128 KB) and y (64 KB) and keeps h; x is there anyway. The backward gets
    h and dy (64 KB), makes dB (32 KB), then dh (128 KB), and from dh and x dA (32 KB).
    """
    model = nn.Sequential(nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False))
    memory = memory_of(model, torch.zeros(256, 64))
    x, h, y, grad = 64 * KB, 128 * KB, 64 * KB, 32 * KB
    assert memory.saved == x + h
    assert [m.bytes for m in memory.forward] == [0, h, h + y, h + y]
    assert {m.phase for m in memory.backward} == {"backward"}
    assert memory.backward[0].bytes == h + y  # what it receives
    assert of(memory.backward, "mm") == [h + y + grad, y + grad + h, y + grad + h + grad]
    assert memory.gradients == 2 * grad


def test_pointwise_work_is_fused():
    """tanh, times two, plus one: one kernel writes one tensor over the matmul's result."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64, bias=False)

        def forward(self, x):
            return (self.linear(x).sin() * 2 + 1).abs().sum()

    memory = memory_of(Model(), torch.zeros(256, 64))
    h = 64 * KB
    assert max(m.bytes for m in memory.forward) == h + 4  # the product, and the scalar
    assert memory.saved == 2 * h  # x and the product


def test_one_kernel_makes_what_is_rebuilt_and_what_the_norm_passes_on():
    """Both read the norm's input x, so that the rebuilt input waits for what dx is made of."""
    x, rebuilt, factor, dy, dnorm, row, dx = range(7)
    sizes = {x: 256, rebuilt: 256, factor: 16, dy: 256, dnorm: 256, row: 4, dx: 256}

    def kernel(name: str, reads: set[int], writes: set[int], elements: int = 0) -> Kernel:
        return Kernel(name, frozenset(reads), frozenset(writes), elements)

    kernels = [
        kernel("norm", {x}, {rebuilt}, 64),
        kernel("sketch", {rebuilt}, {factor}),
        kernel("mm", {dy}, {dnorm}),
        kernel("sum", {x, dnorm}, {row}, 64),
        kernel("dx", {x, dnorm, row}, {dx}, 64),
        kernel("return", {factor, dx}, set()),
    ]
    fused = _fused_side_by_side(kernels, sizes)
    assert [k.operator for k in fused] == ["mm", "dx", "sketch", "return"]
    assert fused[1].reads == {x, dnorm}
    assert fused[1].writes == {rebuilt, dx}  # the sum over a row is never written


def test_dead_memory_waits_for_a_result_of_its_size():
    """Where the peak stays what it is: 3 of size 8 at step 1, then 4 bytes, then 8 again."""
    alive, written, freed = (
        [8, 24, 12, 4, 12],
        [[8], [8, 8], [4], [], [8]],
        [[], [8, 8], [8], [], []],
    )
    _keep_for_reuse(alive, written, freed)
    assert alive == [8, 24, 12, 12, 12]  # what step 2 has freed is there for step 4
    _keep_for_reuse(alive := [8, 8, 16, 8], [[8], [], [16], [8]], [[8], [], [16], []])
    assert alive == [8, 8, 16, 8]  # it would be 24 at step 2


def test_live_memory_by_hand():
    """Results count while they live, views and what was there before do not."""
    given = torch.zeros(256)
    with LiveMemory([given]) as live:
        a = given + 1
        b = a.view(16, 16)
        c = b * 2
        del a, b
        live.phase = "backward"
        d = c + c
        del c
        e = d + d
    operators = [(m.phase, m.operator, m.bytes) for m in live.moments]
    assert operators == [
        ("forward", "add.Tensor", KB),
        ("forward", "view.default", KB),
        ("forward", "mul.Tensor", 2 * KB),
        ("backward", "add.Tensor", 2 * KB),
        ("backward", "add.Tensor", 2 * KB),
    ]
    del d, e


def test_live_memory_of_fake_tensors_is_that_of_real_ones():
    """A peak without a byte."""

    def run():
        with LiveMemory() as live:
            x = torch.ones(64, 64)
            for _ in range(3):
                x = torch.nn.functional.gelu(x @ x)
        return [moment.bytes for moment in live.moments]

    real = run()
    with torch._subclasses.FakeTensorMode():
        fake = run()
    assert fake == real
    assert max(real) == 3 * 64 * 64 * 4  # x, the product, and its gelu


def test_step_of_two_graphs():
    """Forward in order, backward in reverse; what is kept lies under what runs in between."""

    def memory(name: str, saved: int, gradients: int) -> GraphMemory:
        return GraphMemory(
            (Moment("forward", name, 10),),
            (Moment("backward", name, 20), Moment("backward", "return", gradients, gradients)),
            saved + 5,  # of which 5 bytes are an input's
            saved,
        )

    moments = step_timeline(
        [memory("a", 100, 3), memory("b", 1000, 4)], [Moment("backward", "loss", 7)]
    )
    assert [(m.phase, m.operator, m.bytes) for m in moments] == [
        ("forward", "a", 10),
        ("forward", "b", 100 + 10),
        ("backward", "loss", 1100 + 7),
        ("backward", "b", 100 + 20),
        ("backward", "return", 100 + 4),
        ("backward", "a", 4 + 20),
        ("backward", "return", 4 + 3),
    ]
    assert [m.gradients for m in moments] == [0, 0, 0, 0, 4, 4, 4 + 3]


def test_a_backward_ends_with_the_gradients():
    """Factors of sketched weights are small, whatever views lie between them and the output."""
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
    x = torch.zeros(64, 256)
    settings = {"projection": "countsketch", "inner": "aot_eager"}
    memory = explain(model, x, rank=0.25, gradients="sketched", **settings).memory
    assert memory[SKETCHED].gradients < memory[DENSE].gradients / 3
    for way in (COMPILED, DENSE, SKETCHED):
        row = memory[way]
        last = [moment for moment in row.timeline if moment.phase == "backward"][-1]
        assert last.bytes == row.weights + row.optimizer + row.gradients + 4 * x.numel(), way
        assert last.gradients == row.gradients, way


def test_what_a_step_ends_with():
    """Weights, states, inputs, and the gradients; the sketch shows in what is alive between."""
    model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512))
    found = explain(model, torch.zeros(4096, 512), optimizer="sgd", rank=0.25, recompute=False)
    weights, x = 4 * 2 * (512 * 512 + 512), 4 * 4096 * 512
    for row in found.memory.values():
        assert row.timeline[-1].phase == "optimizer"
        assert row.timeline[-1].bytes >= weights + x + row.gradients
        assert [m.phase for m in row.timeline] == sorted(
            (m.phase for m in row.timeline), key=["forward", "backward", "optimizer"].index
        )
    before, after = found.memory[COMPILED], found.memory[DENSE]
    assert before.saved - after.saved == x - x // 4  # x for the first weight; tanh needs its own
