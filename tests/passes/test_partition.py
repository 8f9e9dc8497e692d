"""The cut: what crosses the boundary, and that both sides together compute the joint graph."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from compact_fx.config import CompactConfig
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.nodes import bytes_of, storage_of
from compact_fx.passes.partition import partition
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.projections import RANDOM_PROJECTION

TOKENS = 34


DEFAULTS = {"gradients": "dense", "projection": "countsketch"}


def batch(features=64):
    return torch.randn(2, TOKENS // 2, features)


def attention(m, x):
    h = m.norm(x)
    q, k, v = (getattr(m, name)(h) for name in "qkv")
    return x + m.o(F.gelu((q @ k.transpose(-1, -2)).softmax(-1) @ v))


@pytest.fixture(scope="module")
def attention_joint(calls, joint_of):
    """Traced once: copies of it are rewritten and cut."""
    linear = {name: nn.Linear(64, 64) for name in "qkvo"}
    return joint_of(calls(attention, norm=nn.LayerNorm(64), **linear), batch())


def cut_of(joint, **settings):
    """The rewritten joint graph, its plan, and its cut."""
    config = CompactConfig(**DEFAULTS | settings)
    plan = choose_sites(joint, config)
    changed = joint.with_inputs(plan)
    rewrite_weight_grads(changed, plan)
    return changed, plan, partition(changed.copy(), recompute=config.recompute)


def saved_shapes(saved):
    return sorted(item.shape for item in saved)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    "settings", [{}, {"place": "early"}, {"place": "late"}, {"exclude": ("*",)}]
)
def test_both_sides_compute_what_the_joint_graph_does(
    attention_joint, values_of, evaluate, evaluate_cut, recompute, settings
):
    joint, plan, cut = cut_of(attention_joint, recompute=recompute, **settings)
    assert len(plan.sketched) == (0 if "exclude" in settings else 4)
    values = values_of(joint)
    expected = evaluate(joint.module, values)
    got = evaluate_cut(cut, joint.num_fwd_outputs, values)
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["auto", "early", "late"])
@pytest.mark.parametrize("rank", [1, 16, 64])
def test_projections_never_cross(attention_joint, ops_of, place, rank):
    _, _, cut = cut_of(attention_joint, place=place, rank=rank)
    shapes = {item.shape for item in cut.saved}
    assert not {item.op for item in cut.saved} & {str(RANDOM_PROJECTION)}
    assert str((64, rank)) not in shapes
    assert str((rank, 64)) not in shapes
    assert ops_of(cut.backward)[RANDOM_PROJECTION] == 2


def test_an_early_sketch_crosses_in_place_of_its_activation(joint_of):
    untouched = partition(joint_of(nn.Linear(64, 48), batch()), recompute=False)
    joint, _, cut = cut_of(joint_of(nn.Linear(64, 48), batch()), rank=16)
    assert saved_shapes(untouched.saved) == [str((TOKENS, 64))]
    assert saved_shapes(cut.saved) == [str((TOKENS, 16))]
    assert [item.op for item in cut.saved] == ["mm.default"]
    assert joint.num_fwd_outputs == 1


@pytest.mark.parametrize(("place", "drawn"), [("early", 1), ("late", 0)])
def test_late_sketches_are_made_in_the_backward_graph(joint_of, ops_of, place, drawn):
    _, _, cut = cut_of(joint_of(nn.Linear(64, 48), batch()), place=place)
    crosses = (TOKENS, 16) if place == "early" else (TOKENS, 64)
    assert ops_of(cut.forward)[RANDOM_PROJECTION] == drawn
    assert ops_of(cut.backward)[RANDOM_PROJECTION] == 1
    (saved,) = cut.saved
    assert saved.bytes == crosses[0] * crosses[1] * 4


def test_one_sketch_crosses_for_all_that_share_it(attention_joint):
    _, _, cut = cut_of(attention_joint, rank=16, place="early", recompute=False)
    assert saved_shapes(cut.saved).count(str((TOKENS, 16))) == 2  # of q, k and v, and of o


def test_the_plan_says_what_crosses(attention_joint):
    _, plan, cut = cut_of(attention_joint)
    assert plan.account.saved_after == cut.saved
    assert plan.account.bytes_after == cut.bytes < plan.account.bytes_before


def test_parameters_their_views_and_keys_are_not_counted(attention_joint):
    joint, _, cut = cut_of(attention_joint)
    lasting = {storage_of(node) for node in joint.weight_inputs().values()}
    lasting |= {storage_of(joint.inputs()[index]) for index in joint.added}
    assert not lasting & cut.storages
    outputs = cut.forward.graph.output_node().args[0][joint.num_fwd_outputs :]
    crossing = {storage_of(node) for node in outputs if isinstance(node.meta["val"], FakeTensor)}
    assert crossing & lasting  # or this test would say nothing
    assert crossing - lasting == cut.storages


def test_a_rounded_weight_counts(joint_of, calls):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.second(m.first(x))

    module = calls(forward, first=nn.Linear(64, 48), second=nn.Linear(48, 32))
    cut = partition(joint_of(module, batch()), recompute=False)
    assert ("bfloat16", 48 * 32 * 2) in {(item.dtype, item.bytes) for item in cut.saved}


def test_views_of_one_storage_count_once(joint_of, calls):
    def forward(m, x):
        return m.first(x) * m.second(x.transpose(0, 1)).transpose(0, 1)

    module = calls(forward, first=nn.Linear(64, 64), second=nn.Linear(64, 64))
    joint = joint_of(module, batch())
    cut = partition(joint.copy(), recompute=False)
    outputs = cut.forward.graph.output_node().args[0][joint.num_fwd_outputs :]
    distinct = {storage_of(node): bytes_of(node) for node in outputs}
    weights = {storage_of(node) for node in joint.weight_inputs().values()}
    assert cut.bytes == sum(size for storage, size in distinct.items() if storage not in weights)


@pytest.mark.parametrize("dims", [(0,), (0, 1)])
def test_symbolic_sizes_count_with_their_hints(joint_of, dims):
    x = torch.randn(6, 9, 64)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    _, plan, cut = cut_of(joint_of(nn.Linear(64, 48), x), rank=16)
    (saved,) = cut.saved
    assert saved.bytes == 6 * 9 * 16 * 4
    assert type(saved.bytes) is int
    assert "s" in saved.shape
    assert plan.account.bytes_before == 6 * 9 * 64 * 4


def test_recomputing_keeps_no_more(joint_of, attention_joint):
    joint = attention_joint
    kept = [partition(joint.copy(), recompute=recompute).bytes for recompute in (True, False)]
    assert kept[0] <= kept[1]
    mlp = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64))
    joint = joint_of(mlp, batch())
    kept = [partition(joint.copy(), recompute=recompute).bytes for recompute in (True, False)]
    assert kept[0] < kept[1]


def test_parameters_are_free_to_keep(joint_of, calls):
    """Torch knows which inputs last: a rounded weight is made again, although it is smaller."""
    module = calls(
        lambda m, x: torch.mm(x.sin(), (m.w * 0.1).to(torch.float8_e4m3fn).float()),
        w=torch.nn.Parameter(torch.randn(64, 48)),
    )
    joint = joint_of(module, torch.randn(16, 64, requires_grad=True))
    assert [joint.inputs()[index] for index in joint.weights] == [
        joint.module.graph.find_nodes(op="placeholder")[position]
        for position in joint.static_inputs
    ]
    halves = partition(joint, recompute=True)
    assert not any("float8" in saved.dtype for saved in halves.saved)
