"""What crosses in 8 bits: which tensors, how far off, and that both halves still fit together."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._higher_order_ops.flex_attention import flex_attention_backward

from compact_fx.config import CompactConfig
from compact_fx.passes import store_low_bit as module
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.partition import partition
from compact_fx.passes.store_low_bit import (
    dequantize,
    from_bits,
    quantize,
    store_low_bit,
    to_bits,
)

KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# RMS error of a normal value: int8 half a step of a group's largest, fp8 half of three bits.
ERRORS = {"int8": 0.01, "fp8": 0.03}


@pytest.fixture(autouse=True)
def small_tensors_count(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 2**9)


@pytest.fixture
def halves_of(joint_of):
    """The cut of a joint graph, before and after."""

    def make(function, *inputs, kind="int8", **members):
        joint = joint_of(function, *inputs)
        before = partition(joint.copy(), recompute=True)
        return joint, before, store_low_bit(partition(joint.copy(), recompute=True), kind)

    return make


def dtypes(cut):
    return sorted(saved.dtype for saved in cut.saved)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.sampled_from([8, 32, 128]),
    size=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_values_come_back_as_near_as_8_bits_allow(kind, dtype, rows, groups, group, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, groups * group, generator=generator) * size).to(dtype)
    values, scale = quantize(x, KINDS[kind], group)
    back = dequantize(values, scale, dtype)
    assert (values.dtype, back.dtype, back.shape) == (KINDS[kind], dtype, x.shape)
    assert values.element_size() == 1
    assert scale.shape == (rows, groups, 1)
    largest = x.unflatten(-1, (-1, group)).abs().amax(-1, keepdim=True).float()
    error = (back.float() - x.float()).abs().unflatten(-1, (-1, group))
    rounding = x.float().abs().unflatten(-1, (-1, group)) * torch.finfo(dtype).eps
    step = (
        (x.float().abs().unflatten(-1, (-1, group)) * largest).sqrt() / 127 + largest / 4 / 127**2
        if kind == "int8"
        else (x.float().abs().unflatten(-1, (-1, group)) / 16 + largest / 448 * 2**-10)
    )
    assert (error <= 1.01 * step + rounding + 1e-7 * largest + 1e-7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros_and_what_is_not_finite_shows(kind):
    x = torch.zeros(3, 64)
    x[1, 3], x[2, 40] = torch.inf, torch.nan
    back = dequantize(*quantize(x, KINDS[kind], 32), x.dtype)
    assert back[0].eq(0).all()
    assert not back[1, :32].isfinite().all()
    assert back[1, 32:].eq(0).all()
    assert not back[2, 32:].isfinite().all()


@pytest.mark.parametrize(("times", "least"), [(1, 0.008), (30, 0.024), (300, 0.08)])
def test_a_large_value_leaves_its_neighbours_theirs(times, least):
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    x[:, ::128] *= times
    others = torch.arange(1024) % 128 != 0
    error = dequantize(*quantize(x, torch.int8, 128), x.dtype) - x
    assert error[:, others].norm() < least * x[:, others].norm()
    assert error.norm() < 0.008 * x.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_values_come_back(kind):
    x = 1e-30 * torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    error = dequantize(*quantize(x, KINDS[kind], 128), x.dtype) - x
    assert (1e30 * error).norm() < ERRORS[kind] * (1e30 * x).norm()


def test_attention_without_a_schema_is_not_known():
    graph = torch.fx.Graph()
    q = graph.placeholder("q")
    backward = graph.call_function(flex_attention_backward, (q, q, q))
    assert not module._reads_smoothly(backward, q, {backward}, False)


@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 5, 64)])
def test_masks_are_exact(shape):
    mask = torch.rand(shape) < 0.3
    packed = to_bits(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == mask.numel()
    assert from_bits(packed).equal(mask)


def test_a_layout_stays():
    x = torch.randn(2, 16, 4, 32).transpose(1, 2)
    assert dequantize(*quantize(x, torch.int8, 32), x.dtype).stride() == x.stride()


# --- graphs --------------------------------------------------------------------------------------


def gated(m, x):
    h = m.norm(x)
    return x + m.down(F.silu(m.gate(h)) * m.up(h))


def gated_block(calls, norm=nn.LayerNorm):
    return calls(
        gated,
        norm=norm(64),
        gate=nn.Linear(64, 96, bias=False),
        up=nn.Linear(64, 96, bias=False),
        down=nn.Linear(96, 64, bias=False),
    )


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "square": torch.square,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_both_halves_compute_nearly_what_the_joint_graph_does(
    halves_of, calls, values_of, evaluate_cut, kind, norm
):
    x = torch.randn(2, 32, 64, requires_grad=True)
    joint, before, after = halves_of(gated_block(calls, norm), x, kind=kind)
    values = values_of(joint)
    expected = evaluate_cut(before, joint.num_fwd_outputs, values)
    got = evaluate_cut(after, joint.num_fwd_outputs, values)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        if i < joint.num_fwd_outputs:
            assert torch.equal(a, b)
        elif b is not None:
            assert 0 < (a - b).norm() < 5 * ERRORS[kind] * b.norm()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_packed(halves_of, calls, name):
    function = lambda m, x: m.b(ACTIVATIONS[name](m.a(x)))  # noqa: E731
    block = calls(function, a=nn.Linear(64, 96), b=nn.Linear(96, 64))
    _, before, after = halves_of(block, torch.randn(48, 64, requires_grad=True))
    assert any(saved.dtype == "int8" for saved in after.saved), after.saved
    assert after.bytes < 0.6 * before.bytes


def test_each_kind_of_tensor(halves_of, calls):
    """Norm inputs, gate and up are packed; statistics, what comes in and what is small are not."""
    block = gated_block(calls)
    both = calls(lambda m, x: m.b(m.a(x)), a=block, b=gated_block(calls))
    *_, after = halves_of(both, torch.randn(2, 32, 64, requires_grad=True))
    whole = {(s.shape, s.dtype) for s in after.saved if s.dtype == "float32"}
    assert ("(2, 32, 64)", "float32") in whole  # the input itself
    assert ("(2, 32, 1)", "float32") in whole  # means and deviations
    assert sum(saved.dtype == "int8" for saved in after.saved) == 5  # 2 gates, 2 ups, 1 sum


def test_a_share_takes_the_largest_and_no_more_than_it_needs(halves_of, calls, joint_of):
    """Of 2 gates and 2 ups of 24 KiB and a sum of 16 KiB."""
    both = calls(lambda m, x: m.b(m.a(x)), a=gated_block(calls), b=gated_block(calls))
    joint, before, _ = halves_of(both, torch.randn(2, 32, 64, requires_grad=True))
    numbers = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        after = store_low_bit(partition(joint.copy(), recompute=True), "int8", share)
        numbers.append(sum(saved.dtype == "int8" for saved in after.saved))
        whole = sum(saved.bytes for saved in after.saved if saved.dtype != "int8")
        assert whole <= before.bytes - share * (4 * 24576 + 16384) + 4096  # scales
    assert numbers == [0, 2, 3, 4, 5]
    plan = choose_sites(joint, CompactConfig(saved="int8", rank=0.25))
    assert replace(plan, saved_share=0.5).digest() != plan.digest()


def loss_of_logits(m, x, y):
    return F.cross_entropy(m.head(m.norm(x)), y)


def test_logits_stay(halves_of, calls):
    block = calls(loss_of_logits, head=nn.Linear(64, 96), norm=nn.LayerNorm(64))
    y = torch.randint(96, (64,))
    *_, after = halves_of(block, torch.randn(64, 64, requires_grad=True), y)
    assert ("(64, 96)", "float32") in {(s.shape, s.dtype) for s in after.saved}


LEFT_ALONE = {
    "exp": lambda m, x: m.a(x).exp(),
    "log": lambda m, x: m.a(x).abs().log(),
    "division": lambda m, x: 1 / m.a(x),
    "comparison": lambda m, x: m.a(x).clamp(min=0.1),
    "sqrt": lambda m, x: m.a(x).abs().sqrt(),
    "a statistic": lambda m, x: (m.a(x).pow(2).sum(0) ** 2 * m.s) ** 3,
    "softmax of scores": lambda m, x: (m.a(x) @ x.T).mul(m.s.sum()).softmax(-1),
    "an output": lambda m, x: (lambda y: (y, y**2))(m.a(x)),
    "1 - tanh²": lambda m, x: m.a(m.a(x).tanh()),
    "s (1 - s)": lambda m, x: m.a(m.a(x).sigmoid()),
    "a difference": lambda m, x: (lambda y: (y - x).square() + m.s * y)(m.a(x)),
    "a sum that is one": lambda m, x: (lambda y: torch.add(y, x, alpha=-1).square() + m.s * y)(
        m.a(x)
    ),
    "an integer": lambda m, x: (lambda y: m.s * y + y.long() * x)(m.a(x)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(halves_of, calls, name, monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 2**5)
    block = calls(LEFT_ALONE[name], a=nn.Linear(64, 64), s=nn.Parameter(torch.ones(64)))
    _, before, after = halves_of(block, torch.randn(64, 64, requires_grad=True))
    named = {saved.name: saved for saved in before.saved if saved.op != "placeholder"}
    packed = {saved.name for saved in after.saved if saved.dtype == "int8"}
    exact = [name for name, saved in named.items() if name not in packed]
    assert exact, (named, packed)


def test_masks_cross_in_bits(halves_of, calls):
    dropped = calls(
        lambda m, x: F.dropout(m.a(x), 0.5) * F.relu(m.b(x)),
        a=nn.Linear(64, 64),
        b=nn.Linear(64, 64),
    )
    _, before, after = halves_of(dropped, torch.randn(64, 64, requires_grad=True))
    assert "bool" in dtypes(before)
    assert "bool" not in dtypes(after)
    assert "uint8" in dtypes(after)


def test_a_tensor_and_its_views_cross_once(halves_of, calls):
    def attention(m, x):
        q, k, v = (getattr(m, name)(x).view(2, 32, 2, 32).transpose(1, 2) for name in "qkv")
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return m.o(o.transpose(1, 2).reshape(2, 32, 64))

    block = calls(attention, **{name: nn.Linear(64, 64) for name in "qkvo"})
    *_, after = halves_of(block, torch.randn(2, 32, 64, requires_grad=True))
    assert [saved.dtype for saved in after.saved if saved.kind == "attention"].count("int8") == 4
    packed = [saved.shape for saved in after.saved if saved.dtype == "int8"]
    assert packed.count("(64, 1, 64)") == 3  # q, k and v as their products have made them
    statistics = [saved for saved in after.saved if saved.shape == "(2, 2, 32)"]
    assert [saved.dtype for saved in statistics] == ["float32"]  # log-sum-exp


def test_a_plan_says_it(joint_of, calls):
    joint = joint_of(gated_block(calls), torch.randn(2, 32, 64, requires_grad=True))
    plans = [
        choose_sites(joint, CompactConfig(saved=saved, rank=0.25))
        for saved in ("keep", "int8", "fp8")
    ]
    assert [plan.saved for plan in plans] == [None, "int8", "fp8"]
    assert len({plan.digest() for plan in plans}) == 3
    assert plans[1].account.bytes_after < plans[0].account.bytes_after
