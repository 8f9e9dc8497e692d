"""The expansion alone: no projection node is left, and the values are those of the operator."""

import pytest
import torch
from torch import nn

from compact_fx.config import CompactConfig
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.expand_projections import expand_projections
from compact_fx.passes.partition import partition
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.projections import DRAWN, RANDOM_PROJECTION

aten = torch.ops.aten


DEFAULTS = {"gradients": "dense", "projection": "countsketch"}


def batch():
    return torch.randn(2, 8, 48)


def mlp():
    return nn.Sequential(
        nn.Linear(48, 40), nn.SiLU(), nn.Linear(40, 48), nn.SiLU(), nn.Linear(48, 8)
    )


@pytest.fixture(scope="module")
def mlp_joint(joint_of):
    """Traced once: copies of it are rewritten and expanded."""
    return joint_of(mlp(), batch())


def rewritten(joint, **settings):
    plan = choose_sites(joint, CompactConfig(**DEFAULTS | settings))
    changed = joint.with_inputs(plan)
    rewrite_weight_grads(changed, plan)
    return changed


@pytest.mark.parametrize("kind", DRAWN)
def test_no_projection_is_left(mlp_joint, ops_of, kind):
    module = rewritten(mlp_joint, projection=kind).module
    count = ops_of(module)[RANDOM_PROJECTION]
    assert count == 3
    assert expand_projections(module) == count
    namespaces = {op.namespace for op in ops_of(module) if isinstance(op, torch._ops.OpOverload)}
    assert namespaces <= {"aten", "prims"}
    module.graph.lint()
    assert expand_projections(module) == 0


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("seed", [0, 1])
def test_values_are_those_of_the_operator(mlp_joint, values_of, evaluate, kind, seed):
    joint = rewritten(mlp_joint, projection=kind, rank=0.5)
    values = values_of(joint, seed)
    expected = evaluate(joint.module, values)
    expand_projections(joint.module)
    for a, b in zip(evaluate(joint.module, values), expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("kind", DRAWN)
def test_rounded_projections_keep_their_values(joint_of, calls, values_of, evaluate, kind):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.fc(x)

    joint = rewritten(joint_of(calls(forward, fc=nn.Linear(48, 40)), batch()), projection=kind)
    values = values_of(joint)
    expected = evaluate(joint.module, values)
    expand_projections(joint.module)
    for a, b in zip(evaluate(joint.module, values), expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_products_with_a_countsketch_become_gathers(mlp_joint, ops_of, gradients):
    """No matmul with P and no P: what is left are the forward's, ∂x's and the factors'."""
    module = rewritten(mlp_joint, projection="countsketch", gradients=gradients).module
    before = ops_of(module)
    expand_projections(module)
    after = ops_of(module)
    both = 3 if gradients == "sketched" else 6  # z = x P, and dW = F Pᵀ
    assert after[aten.mm.default] == before[aten.mm.default] - both
    assert after[aten._unsafe_index.Tensor] == both
    largest = max(node.meta["val"].numel() for node in module.graph.nodes if node.op != "output")
    assert largest < 48 * 12 * 8  # P in full would be compared as (48, 12) words


def test_batched_products_with_a_countsketch_become_gathers(
    joint_of, calls, ops_of, values_of, evaluate
):
    """Of experts, which share P, with in_features first and last."""
    module = calls(
        lambda m, x: torch.bmm(torch.bmm(x.sin(), m.w).tanh(), m.v.mT),
        w=nn.Parameter(torch.randn(2, 48, 40)),
        v=nn.Parameter(torch.randn(2, 48, 40)),
    )
    joint = rewritten(joint_of(module, batch()), projection="countsketch", rank=8, place="late")
    values = values_of(joint)
    expected = evaluate(joint.module, values)
    products = ops_of(joint.module)[aten.bmm.default]
    expand_projections(joint.module)
    assert ops_of(joint.module)[aten.bmm.default] == products - 4
    assert ops_of(joint.module)[aten._unsafe_index.Tensor] == 4
    torch.testing.assert_close(evaluate(joint.module, values), expected)


def test_thin_countsketches_stay_matmuls(mlp_joint, ops_of):
    """One column in 24."""
    module = rewritten(mlp_joint, projection="countsketch", rank=2).module
    matmuls = ops_of(module)[aten.mm.default]
    expand_projections(module)
    assert ops_of(module)[aten.mm.default] == matmuls
    assert ops_of(module)[aten._unsafe_index.Tensor] == 0


def test_both_sides_are_expanded_alike(mlp_joint, values_of, evaluate_cut, ops_of):
    joint = rewritten(mlp_joint, place="early", recompute=False)
    values = values_of(joint)
    cut = partition(joint, recompute=False)
    expected = evaluate_cut(cut, joint.num_fwd_outputs, values)
    assert expand_projections(cut.forward) == expand_projections(cut.backward) == 3
    got = evaluate_cut(cut, joint.num_fwd_outputs, values)
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


def test_a_graph_without_projections_stays_as_it_is(joint_of):
    module = joint_of(mlp(), batch()).module
    nodes = [(node.name, node.target) for node in module.graph.nodes]
    assert expand_projections(module) == 0
    assert [(node.name, node.target) for node in module.graph.nodes] == nodes


def test_every_new_node_has_a_value(mlp_joint):
    module = rewritten(mlp_joint).module
    expand_projections(module)
    assert all("val" in node.meta for node in module.graph.nodes if node.op != "output")
