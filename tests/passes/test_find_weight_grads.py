"""The finder alone: which matmuls make a weight's gradient, and the reason where none do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations import moe  # noqa: F401  (registers its grouped matmul)
from transformers.pytorch_utils import Conv1D

from compact_fx.passes.find_weight_grads import find_weight_grads
from compact_fx.passes.split_grouped_backward import GROUPED_PRODUCT

aten = torch.ops.aten


def parameter(*shape, requires_grad=True):
    return nn.Parameter(torch.randn(shape), requires_grad)


def batch(*shape):
    return torch.randn(shape or (2, 8, 64))


def found_in(joint):
    return {grad.name: grad for grad in find_weight_grads(joint)}


def shapes(use):
    return use.tokens, use.in_features, use.out_features


# ---------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------


def test_linear_has_its_activation_on_the_right(joint_of):
    joint = joint_of(nn.Linear(64, 48), batch())
    (grad,) = find_weight_grads(joint)
    (use,) = grad.uses
    assert (grad.name, grad.reason) == ("weight", "")
    assert use.position == 1
    assert use.matmul.target is aten.mm.default
    assert shapes(use) == (16, 64, 48)
    assert use.activation is use.matmul.args[1]


def test_conv1d_has_its_activation_on_the_left(joint_of):
    (grad,) = find_weight_grads(joint_of(Conv1D(48, 64), batch()))
    (use,) = grad.uses
    assert (grad.name, grad.reason) == ("weight", "")
    assert use.position == 0
    assert shapes(use) == (16, 64, 48)
    assert use.activation is use.matmul.args[0].args[0]
    assert tuple(use.activation.meta["val"].shape) == (16, 64)


def test_the_activation_may_be_an_input_of_the_graph(joint_of):
    (grad,) = find_weight_grads(joint_of(nn.Linear(64, 48), batch(16, 64)))
    (use,) = grad.uses
    assert use.activation.op == "placeholder"


def test_one_token_is_a_matrix_of_one_row(joint_of, calls):
    module = calls(lambda m, x: m.fc(x.sin()), fc=nn.Linear(64, 48))
    (grad,) = find_weight_grads(joint_of(module, batch(64)))
    assert shapes(grad.uses[0]) == (1, 64, 48)


def test_vectors_are_no_candidates(joint_of):
    module = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 48, bias=True))
    assert set(found_in(joint_of(module, batch()))) == {"1.weight"}


@pytest.mark.parametrize("bias", [True, False])
def test_autocast_rounds_between_the_matmul_and_the_gradient(joint_of, calls, bias):
    def forward(module, x):
        with torch.autocast("cpu", torch.bfloat16):
            return module.fc(x)

    joint = joint_of(calls(forward, fc=nn.Linear(64, 48, bias=bias)), batch())
    (grad,) = find_weight_grads(joint)
    (use,) = grad.uses
    assert grad.reason == ""
    assert use.activation.meta["val"].dtype == torch.bfloat16
    assert joint.gradients()[grad.index].meta["val"].dtype == torch.float32


def test_a_weight_used_twice_has_two_uses_in_graph_order(joint_of, calls):
    module = calls(lambda m, x: m.fc(m.fc(x).tanh()), fc=nn.Linear(64, 64))
    joint = joint_of(module, batch())
    (grad,) = find_weight_grads(joint)
    first, second = grad.uses
    assert first.matmul is not second.matmul
    assert first.activation is not second.activation
    order = list(joint.module.graph.nodes)
    assert order.index(first.matmul) < order.index(second.matmul)


def test_query_key_and_value_read_one_activation(joint_of, calls):
    def forward(m, x):
        return m.q(x).sin() * m.k(x).cos() + m.v(x).tanh()

    module = calls(forward, q=nn.Linear(64, 64), k=nn.Linear(64, 64), v=nn.Linear(64, 64))
    grads = find_weight_grads(joint_of(module, batch()))
    assert [grad.name for grad in grads] == ["q.weight", "k.weight", "v.weight"]
    assert len({use.activation for grad in grads for use in grad.uses}) == 1
    assert len({use.matmul for grad in grads for use in grad.uses}) == 3


def test_a_product_from_the_left_is_found(joint_of, calls):
    joint = joint_of(calls(lambda m, x: m.w @ x.sin(), w=parameter(48, 16)), batch(16, 64))
    (grad,) = find_weight_grads(joint)
    assert shapes(grad.uses[0]) == (64, 16, 48)


def test_weights_of_an_adapter_are_found(joint_of, calls):
    module = calls(
        lambda m, x: F.linear(x, m.w) + F.linear(F.linear(x, m.a), m.b),
        w=parameter(48, 64, requires_grad=False),
        a=parameter(8, 64),
        b=parameter(48, 8),
    )
    grads = found_in(joint_of(module, batch()))
    assert [len(grads[name].uses) for name in "wab"] == [0, 1, 1]


def test_a_tied_embedding_is_found_for_its_matmul_with_what_else_there_is(joint_of, calls):
    module = calls(lambda m, i: F.linear(m.e(i).tanh(), m.e.weight), e=nn.Embedding(100, 64))
    (grad,) = find_weight_grads(joint_of(module, torch.randint(0, 100, (2, 8))))
    assert len(grad.uses) == 1
    assert "no matmul" in grad.reason


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_symbolic_batches_are_found(joint_of, dims):
    x = batch(6, 8, 64)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    (grad,) = find_weight_grads(joint_of(nn.Linear(64, 48), x))
    (use,) = grad.uses
    assert (use.in_features, use.out_features) == (64, 48)
    assert isinstance(use.tokens, torch.SymInt)


def ends():
    return torch.tensor([4, 4, 12, 16], dtype=torch.int32)


def grouped(x, w):
    return F.grouped_mm(x.flatten(0, 1).sin().bfloat16(), w, offs=ends())


def grouped_elsewhere(x, w):
    return torch.ops.transformers.grouped_mm_fallback(x.flatten(0, 1).sin(), w, ends())


# The weight's shape; then of its use: the operator, which operand is the activation, tokens,
# in_features, out_features, matrices; and which dimension of the weight in_features is.
EXPERTS = {
    "bmm": (
        lambda m, x: torch.bmm(x.sin(), m.w),
        ((2, 64, 48), aten.bmm.default, 0, 16, 64, 48, 2, 1),
    ),
    "bmm, transposed": (
        lambda m, x: torch.bmm(x.sin(), m.w.transpose(-1, -2)),
        ((2, 48, 64), aten.bmm.default, 0, 16, 64, 48, 2, 2),
    ),
    "bmm from the left": (
        lambda m, x: torch.bmm(m.w, x.mT.sin()),
        ((2, 48, 64), aten.bmm.default, 1, 16, 64, 48, 2, 2),
    ),
    "baddbmm": (
        lambda m, x: torch.baddbmm(x[:, :, :48], x.sin(), m.w),
        ((2, 64, 48), aten.bmm.default, 0, 16, 64, 48, 2, 1),
    ),
    "einsum": (
        lambda m, x: torch.einsum("etn,emn->etm", x.sin(), m.w),
        ((2, 48, 64), aten.bmm.default, 0, 16, 64, 48, 2, None),
    ),
    "all tokens to all experts": (
        lambda m, x: torch.einsum("btn,emn->ebtm", x.sin(), m.w),
        ((4, 48, 64), aten.bmm.default, 0, 16, 64, 192, 1, None),
    ),
    "a matrix as one of a batch": (
        lambda m, x: torch.einsum("btn,mn->btm", x.sin(), m.w),
        ((48, 64), aten.bmm.default, 0, 16, 64, 48, 1, None),
    ),
    "grouped": (
        lambda m, x: grouped(x, m.w.bfloat16()),
        ((4, 64, 48), aten._grouped_mm.default, 0, 16, 64, 48, 4, 1),
    ),
    "grouped, transposed": (
        lambda m, x: grouped(x, m.w.bfloat16().mT),
        ((4, 48, 64), aten._grouped_mm.default, 1, 16, 64, 48, 4, 2),
    ),
    "grouped in float32": (
        lambda m, x: grouped_elsewhere(x, m.w.mT),
        ((4, 48, 64), GROUPED_PRODUCT, 0, 16, 64, 48, 4, 2),
    ),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_weights_of_experts_are_found(joint_of, calls, case):
    function, (shape, target, position, *sizes, in_dim) = EXPERTS[case]
    (grad,) = find_weight_grads(joint_of(calls(function, w=parameter(*shape)), batch()))
    (use,) = grad.uses
    assert grad.reason == ""
    assert (use.matmul.target, use.position, use.dim) == (target, position, in_dim)
    assert [use.tokens, use.in_features, use.out_features, use.experts] == sizes
    assert use.activation.meta["val"].shape[-1] == 64


# ---------------------------------------------------------------------------------------------
# What is not, and why
# ---------------------------------------------------------------------------------------------


def merged(m, x):
    return F.linear(x, m.w + m.b @ m.a)


NOT_FOUND = {
    "embedding": (lambda m, x: F.embedding(x.long().clamp(0, 3), m.w), (4, 64), "no matmul"),
    "conv2d": (lambda m, x: F.conv2d(x[None], m.w), (4, 2, 1, 1), "no matmul"),
    "one matrix for a batch": (
        lambda m, x: torch.bmm(x, m.w.expand(2, 64, 48)),
        (64, 48),
        "no matmul: aten.sum",
    ),
    "gathered": (lambda m, x: torch.bmm(x, m.w[[2, 0]]), (3, 64, 48), "no matmul: aten.index_put"),
    "scaled": (lambda m, x: F.linear(x, m.w * 2), (48, 64), "no matmul: aten.mul"),
    "normalized": (lambda m, x: F.linear(x, m.w / m.w.norm()), (48, 64), "no matmul: aten"),
    "squared": (lambda m, x: F.linear(x, m.w @ m.w), (64, 64), "product of no activation"),
    "stacked": (lambda m, x: F.linear(x, torch.cat((m.w, m.w))), (48, 64), "no matmul: aten.slice"),
    "doubled": (lambda m, x: F.linear(x, m.w + m.w), (48, 64), "doubled"),
}


@pytest.mark.parametrize("case", NOT_FOUND)
def test_other_gradients_are_preserved_with_a_reason(joint_of, calls, case):
    function, shape, reason = NOT_FOUND[case]
    (grad,) = find_weight_grads(joint_of(calls(function, w=parameter(*shape)), batch()))
    assert grad.uses == ()
    assert reason in grad.reason


def test_a_frozen_weight_is_preserved(joint_of, calls):
    w = parameter(64, 64, requires_grad=False)
    module = calls(lambda m, x: m.fc(F.linear(x, m.w)), w=w, fc=nn.Linear(64, 64))
    grads = found_in(joint_of(module, batch()))
    assert grads["w"].uses == ()
    assert grads["w"].reason == "frozen, or no gradient reaches it"
    assert len(grads["fc.weight"].uses) == 1


def test_what_else_a_gradient_holds_is_said(joint_of, calls):
    module = calls(lambda m, x: F.linear(x, m.w) + m.w.sum(), w=parameter(48, 64))
    (grad,) = find_weight_grads(joint_of(module, batch()))
    assert len(grad.uses) == 1
    assert grad.reason == "its gradient is no matmul: aten.expand.default"


class Float8Product(torch.autograd.Function):
    """x Wᵀ, with a weight gradient of operands in float8 and scales of rows and columns."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, scale)
        return x @ weight.T

    @staticmethod
    def backward(ctx, dy):
        x, scale = ctx.saved_tensors
        left, right = dy.T.contiguous(), x.T.contiguous().T
        operands = [t.to(torch.float8_e4m3fn) for t in (left, right)]
        one = torch.ones((), device=x.device)
        grad = torch._scaled_mm(*operands, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        return None, grad if scale is None else (grad * scale).bfloat16(), None


@pytest.mark.parametrize("scale", [None, torch.rand(48, 1)])
def test_a_product_in_float8_is_preserved(joint_of, calls, scale):
    module = calls(lambda m, x: Float8Product.apply(x, m.w, scale), w=parameter(48, 64))
    (grad,) = find_weight_grads(joint_of(module.bfloat16(), batch(16, 64).bfloat16()))
    assert grad.uses == ()
    assert grad.reason == "its matmul is in float8_e4m3fn: aten._scaled_mm.default"


def test_a_gradient_of_two_weights_is_preserved(joint_of, calls):
    module = calls(lambda m, x: F.linear(x, m.a + m.b), a=parameter(48, 64), b=parameter(48, 64))
    grads = found_in(joint_of(module, batch()))
    assert {grad.reason for grad in grads.values()} == {"its gradient is also returned elsewhere"}
    assert not any(grad.uses for grad in grads.values())


@pytest.mark.parametrize("trained", [True, False])
def test_a_merged_adapter_is_preserved(joint_of, calls, trained):
    members = {"w": parameter(48, 64, requires_grad=trained)}
    module = calls(merged, **members, a=parameter(8, 64), b=parameter(48, 8))
    grads = found_in(joint_of(module, batch()))
    assert not any(grad.uses for grad in grads.values())
    assert grads["w"].reason.startswith("its gradient is also used" if trained else "frozen")
    assert {grads[name].reason for name in "ab"} == {"its gradient is a product of no activation"}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_on_the_activation_side_is_preserved(joint_of, calls, autocast, frozen):
    """The gradient of learned queries is dy·W, and that of their weight dyᵀ·queries."""

    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return F.linear(m.queries, m.w) @ m.values(x).transpose(-1, -2)

    weight = parameter(64, 64, requires_grad=not frozen)
    members = {"queries": parameter(8, 64), "w": weight, "values": nn.Linear(64, 64)}
    grads = found_in(joint_of(calls(forward, **members), batch()))
    assert grads["queries"].uses == ()
    assert grads["queries"].reason == "its gradient is a product of no activation"
    assert grads["w"].uses == ()
    assert len(grads["values.weight"].uses) == 1


def test_queries_that_take_part_in_attention_are_preserved_where_a_sum_makes_them(joint_of, calls):
    def forward(m, x):
        return F.linear(m.queries.expand(2, 8, 64), m.w) * x

    grads = found_in(
        joint_of(calls(forward, queries=parameter(8, 64), w=parameter(64, 64)), batch())
    )
    assert not any(grad.uses for grad in grads.values())


def test_a_gradient_that_reaches_no_weight_has_a_reason(joint_of, calls):
    module = calls(
        lambda m, x: m.fc(x) + m.w.detach().sum(), fc=nn.Linear(64, 48), w=parameter(4, 4)
    )
    grads = found_in(joint_of(module, batch()))
    assert grads["w"].reason == "frozen, or no gradient reaches it"
    assert len(grads["fc.weight"].uses) == 1


# ---------------------------------------------------------------------------------------------
# Contract
# ---------------------------------------------------------------------------------------------


def block(m, x):
    h = m.norm(x)
    return m.out(F.gelu(m.q(h)) * m.k(h)) + m.q(x)


def block_of(calls):
    return calls(
        block,
        norm=nn.LayerNorm(64),
        q=nn.Linear(64, 64),
        k=nn.Linear(64, 64),
        out=Conv1D(64, 64),
    )


def test_it_changes_nothing(joint_of, calls):
    joint = joint_of(block_of(calls), batch())
    code = joint.module.code
    meta = [dict(node.meta) for node in joint.module.graph.nodes]
    assert find_weight_grads(joint) == find_weight_grads(joint)
    joint.module.recompile()
    assert joint.module.code == code
    assert [dict(node.meta).keys() for node in joint.module.graph.nodes] == [m.keys() for m in meta]


def test_a_matmul_is_in_one_use_only(joint_of, calls):
    grads = find_weight_grads(joint_of(block_of(calls), batch()))
    matmuls = [use.matmul for grad in grads for use in grad.uses]
    assert len(matmuls) == len(set(matmuls)) == 4


def test_another_estimate_of_a_use_changes_that_gradient_alone(
    joint_of, calls, values_of, evaluate
):
    joint = joint_of(block_of(calls), batch())
    values = values_of(joint)
    expected = evaluate(joint.module, values)
    outputs = list(joint.module.graph.output_node().args[0])
    for number, grad in enumerate(find_weight_grads(joint)):
        changed = joint.copy()
        grad = find_weight_grads(changed)[number]
        position = outputs.index(joint.gradients()[grad.index])
        for use in grad.uses:
            with changed.module.graph.inserting_after(use.matmul):
                other = changed.module.graph.call_function(aten.neg.default, (use.matmul,))
            use.matmul.replace_all_uses_with(
                other, delete_user_cb=lambda node, o=other: node is not o
            )
        changed.module.recompile()
        for i, (old, new) in enumerate(
            zip(expected, evaluate(changed.module, values), strict=True)
        ):
            if i == position:
                torch.testing.assert_close(new, -old)
            else:
                assert old is new is None or torch.equal(old, new)
