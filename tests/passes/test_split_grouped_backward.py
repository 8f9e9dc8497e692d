"""The two gradients of transformers' grouped matmul, apart: the same values, bit for bit."""

import pytest
import torch
import transformers.integrations.moe  # noqa: F401  (registers the operators)
from torch import nn

from compact_fx.passes.split_grouped_backward import GROUPED_PRODUCT, split_grouped_backward

PAIR = torch.ops.transformers.grouped_mm_fallback_backward.default
FORWARD = torch.ops.transformers.grouped_mm_fallback.default


def grouped(m, x):
    ends = torch.tensor([5, 5, 12, 14])  # one expert without tokens, two tokens without expert
    return torch.ops.transformers.grouped_mm_fallback(x.sin(), m.w, ends)


@pytest.fixture
def experts(calls):
    def make(requires_grad=True):
        return calls(grouped, w=nn.Parameter(torch.randn(4, 64, 48), requires_grad))

    return make


def test_operators_and_values_before_and_after(joint_of, experts, ops_of, values_of, evaluate):
    x = torch.randn(16, 64, requires_grad=True)
    joint = joint_of(experts(), x, split=False)
    split = joint.copy()
    assert split_grouped_backward(split.module) == 1
    split.module.recompile()
    before, after = ops_of(joint.module), ops_of(split.module)
    assert (before[PAIR], before[FORWARD], before[GROUPED_PRODUCT]) == (1, 1, 0)
    assert (after[PAIR], after[FORWARD], after[GROUPED_PRODUCT]) == (0, 2, 1)
    split.module.graph.lint()
    values = values_of(joint)
    old, new = evaluate(joint.module, values), evaluate(split.module, values)
    assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))
    assert sum(value is not None for value in new) == 3


def test_only_the_gradient_that_is_asked_for_is_left(joint_of, experts, ops_of):
    joint = joint_of(experts(), torch.randn(16, 64))
    assert ops_of(joint.module)[FORWARD] == 1
    assert ops_of(joint.module)[GROUPED_PRODUCT] == 1


def test_other_graphs_stay_as_they_are(joint_of):
    joint = joint_of(nn.Linear(64, 48), torch.randn(16, 64), split=False)
    joint.module.recompile()
    code = joint.module.code
    assert split_grouped_backward(joint.module) == 0
    joint.module.recompile()
    assert joint.module.code == code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grouped_product_is_expert_by_expert(dtype):
    left, right = torch.randn(64, 16).to(dtype), torch.randn(16, 48).to(dtype)
    ends = torch.tensor([5, 5, 12, 14], dtype=torch.int32)
    parts = [(0, 5), (5, 5), (5, 12), (12, 14)]
    expected = torch.stack([left[:, i:j] @ right[i:j] for i, j in parts])
    assert torch.equal(GROUPED_PRODUCT(left, right, ends), expected)
    torch.library.opcheck(GROUPED_PRODUCT, (left, right, ends))
