"""The rewriting alone: what is put into the joint graph, and what it leaves as it was."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy
from transformers.integrations import moe  # noqa: F401  (registers its grouped matmul)
from transformers.pytorch_utils import Conv1D

from compact_fx.config import CompactConfig
from compact_fx.errors import CannotCompact
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.find_weight_grads import find_weight_grads
from compact_fx.passes.nodes import finish, is_transposition
from compact_fx.passes.rewrite_weight_grads import rewrite_weight_grads
from compact_fx.projections import RANDOM_PROJECTION, fold_in, random_projection, source

mm = torch.ops.aten.mm.default
E5M2 = torch.float8_e5m2


DEFAULTS = {"gradients": "dense", "projection": "countsketch"}
TRACKED_LATE = {"gradients": "sketched", "projection": "tracked", "rank": 16, "place": "late"}


def batch(*shape):
    return torch.randn(shape or (2, 16, 64))


def rewritten(joint, **settings):
    """The joint graph, the plan, the rewritten graph and its sketches."""
    plan = choose_sites(joint, CompactConfig(**DEFAULTS | settings))
    changed = joint.with_inputs(plan)
    return joint, plan, changed, rewrite_weight_grads(changed, plan)


@pytest.fixture(scope="module")
def traced(joint_of, calls):
    """The joint graph of one of `layers`, traced once: a copy of it is rewritten."""

    @functools.cache
    def trace(case, *shape):
        return joint_of(layers(calls)[case], batch(*shape))

    return trace


def layers(calls):
    """A module for each way in which a weight may be used."""

    def qkv(m, x):
        h = torch.tanh(x)
        return m.q(h).sin() * m.k(h).cos() + m.v(h).tanh()

    def autocast(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.fc(torch.tanh(x))

    return {
        "linear": nn.Linear(64, 48),
        "conv1d": Conv1D(48, 64),
        "twice": calls(lambda m, x: m.fc(m.fc(x.sin()).tanh()), fc=nn.Linear(64, 64)),
        "qkv": calls(qkv, **{name: nn.Linear(64, 64) for name in "qkv"}),
        "autocast": calls(autocast, fc=nn.Linear(64, 48)),
        "left": calls(lambda m, x: m.w @ x.sin(), w=nn.Parameter(torch.randn(48, 16))),
        "experts": calls(
            lambda m, x: torch.bmm(torch.bmm(x.sin(), m.w).tanh(), m.v.mT),
            w=nn.Parameter(torch.randn(2, 64, 48)),
            v=nn.Parameter(torch.randn(2, 64, 48)),
        ),
        "einsum": calls(
            lambda m, x: torch.einsum("etn,emn->etm", x.sin(), m.w),
            w=nn.Parameter(torch.randn(2, 48, 64)),
        ),
        "grouped": calls(grouped, w=nn.Parameter(torch.randn(4, 48, 64))),
        "grouped in float32": calls(
            lambda m, x: torch.ops.transformers.grouped_mm_fallback(
                x.flatten(0, 1).sin(), m.w, torch.tensor([8, 8, 20, 32])
            ),
            w=nn.Parameter(torch.randn(4, 64, 48)),
        ),
    }


def grouped(m, x):
    ends = torch.tensor([8, 8, 20, 32], dtype=torch.int32)
    x = x.flatten(0, 1).sin().bfloat16()
    return F.grouped_mm(x, m.w.bfloat16().mT, offs=ends).float()


EXPERTS = ["experts", "einsum", "grouped", "grouped in float32"]
CASES = ["linear", "conv1d", "twice", "qkv", "autocast", *EXPERTS]


@pytest.mark.parametrize(
    ("case", "sites", "sketches", "projections"),
    [("linear", 1, 1, 1), ("conv1d", 1, 1, 1), ("twice", 2, 2, 2), ("qkv", 3, 1, 1)],
)
def test_operators_before_and_after(traced, ops_of, case, sites, sketches, projections):
    joint, plan, changed, found = rewritten(traced(case), rank=16)
    before, after = ops_of(joint.module), ops_of(changed.module)
    assert len(plan.sketched) == sites
    assert len(found) == sketches
    assert before[RANDOM_PROJECTION] == 0
    assert after[RANDOM_PROJECTION] == projections
    # One product becomes two, and each sketch is one more.
    assert after[mm] == before[mm] + sites + sketches
    changed.module.graph.lint()


def test_the_plan_of_nothing_changes_nothing(traced, ops_of):
    joint, plan, changed, found = rewritten(traced("qkv"), exclude=("*",))
    assert plan.sketched == ()
    assert found == {}
    assert (
        changed.module.code.split("tangents_1):")[1] == joint.module.code.split("tangents_1):")[1]
    )


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_dtypes_stay(traced, case):
    joint, _, changed, found = rewritten(traced(case), rank=16)

    def outputs(graph):
        nodes = graph.module.graph.output_node().args[0]
        return [None if n is None else (n.meta["val"].shape, n.meta["val"].dtype) for n in nodes]

    assert outputs(changed) == outputs(joint)
    for (sketch,) in found.values():
        *tokens, columns = sketch.meta["val"].shape
        assert (math.prod(tokens), columns) == (32, 16)


@pytest.mark.parametrize("place", ["early", "late"])
def test_only_late_sketches_are_marked_and_projections_always(traced, place):
    _, _, changed, found = rewritten(traced("qkv"), place=place)
    drawn = changed.module.graph.find_nodes(op="call_function", target=RANDOM_PROJECTION)
    assert {node.meta["recompute"] for node in drawn} == {CheckpointPolicy.MUST_RECOMPUTE}
    marks = {node.meta.get("recompute") for (node,) in found.values()}
    assert marks == {CheckpointPolicy.MUST_RECOMPUTE if place == "late" else None}


# ---------------------------------------------------------------------------------------------
# Numerics
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projection", ["countsketch", "tracked"])
@pytest.mark.parametrize("case", CASES)
def test_only_planned_gradients_change(traced, values_of, evaluate, case, projection):
    settings = {"rank": 16, "projection": projection, "place": "late"}
    joint, plan, changed, _ = rewritten(traced(case), **settings)
    values = values_of(changed)
    old, new = evaluate(joint.module, values), evaluate(changed.module, values)
    outputs = list(joint.module.graph.output_node().args[0])
    gradients = joint.gradients()
    planned = {outputs.index(gradients[site.index]) for site in plan.sketched}
    for position, (a, b) in enumerate(zip(old, new[: len(old)], strict=True)):
        if position in planned:
            assert not torch.allclose(a, b, rtol=0.1)
        else:
            assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("projection", ["orthogonal", "tracked"])
@pytest.mark.parametrize("case", CASES)
def test_orthogonal_at_full_rank_is_exact(traced, values_of, evaluate, case, projection):
    settings = {"rank": 1.0, "projection": projection, "place": "late"}
    joint, plan, changed, _ = rewritten(traced(case), **settings)
    values = values_of(changed)
    is_left_alone = (case, projection) == ("grouped in float32", "tracked")
    assert len(plan.sketched) == len(plan.sites) * (not is_left_alone)
    # x, P, z, dy·z and the result are rounded to bfloat16.
    rtol, atol = (2e-2, 1.5e-1) if case in ("autocast", "grouped") else (1e-4, 1e-4)
    outputs = evaluate(changed.module, values)[: len(joint.module.graph.output_node().args[0])]
    for a, b in zip(evaluate(joint.module, values), outputs, strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("case", EXPERTS)
def test_experts_share_a_projection_and_keep_their_matmul(traced, ops_of, case):
    joint, plan, changed, found = rewritten(traced(case), rank=16)
    (matmul,) = {use.matmul.target for grad in find_weight_grads(joint) for use in grad.uses}
    sites = len(plan.sketched)
    assert sites == len(found) == ops_of(changed.module)[RANDOM_PROJECTION]
    names = ("_factor", "_from_factor")
    factors = [n for n in changed.module.graph.nodes if n.name.endswith(names[0])]
    factors = [node for node in factors if not node.name.endswith(names[1])]
    assert [node.target for node in factors] == [matmul] * sites
    assert all(16 in node.meta["val"].shape for node in factors)


def test_a_rank_that_rows_of_a_grouped_matmul_cannot_have_is_left_alone(traced):
    joint = traced("grouped")
    (site,) = choose_sites(joint, CompactConfig(**DEFAULTS, rank=12)).sites
    assert site.reason == "rank 12 is not a multiple of 8 in a grouped matmul"


@pytest.mark.parametrize("layer", ["linear", "conv1d", "experts", "einsum", "grouped in float32"])
def test_the_gradient_is_that_of_the_formula(traced, values_of, evaluate, layer):
    joint, plan, changed, _ = rewritten(traced(layer), rank=16)
    values = values_of(changed)
    site, dense = plan.sites[0], find_weight_grads(joint)[0]
    projection = plan.projections[0]
    key = values[changed.inputs()[min(changed.added)].name]
    p = RANDOM_PROJECTION(key, 64, 16, projection.kind, projection.dtype)
    position = list(joint.module.graph.output_node().args[0]).index(joint.gradients()[site.index])
    exact = evaluate(joint.module, values)[position]
    got = evaluate(changed.module, values)[position]
    # (dyᵀ x) P Pᵀ, and P Pᵀ (xᵀ dy).
    on_right = dense.uses[0].dim == exact.dim() - 1 or layer == "einsum"
    expected = exact @ p @ p.T if on_right else p @ p.T @ exact
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", ["linear", "conv1d", "twice", "qkv", "experts"])
def test_the_mean_over_keys_is_the_gradient(traced, values_of, evaluate, case):
    joint, plan, changed, _ = rewritten(traced(case, 2, 8, 64), rank=32, projection="rademacher")
    exact = evaluate(joint.module, values_of(joint))
    outputs = list(joint.module.graph.output_node().args[0])
    position = outputs.index(joint.gradients()[plan.sites[0].index])
    samples = torch.stack(
        [evaluate(changed.module, values_of(changed, seed))[position] for seed in range(150)]
    ).double()
    error = (samples.mean(0) - exact[position]).pow(2).sum()
    spread = samples.var(0).sum() / len(samples)
    # error / spread has mean 1 and varies like χ² with at least n = 64 degrees of freedom: its σ is
    # at most √(2/64) = 0.18, and 2.5 is 8 σ, a false alarm below 1e-7.
    assert error / spread < 2.5


def test_a_square_activation_and_its_transpose_have_sketches_of_their_own(
    joint_of, calls, values_of, evaluate
):
    """xᵀ is no node of its own where two transpositions in a row have been folded."""
    module = calls(
        lambda m, x: (x.sin().mT @ m.a).tanh() + F.linear(x.sin(), m.b).sin(),
        a=nn.Parameter(torch.randn(64, 48)),
        b=nn.Parameter(torch.randn(48, 64)),
    )
    joint = joint_of(module, batch(64, 64))
    for node in joint.module.graph.nodes:
        if is_transposition(node) and is_transposition(node.args[0]):
            node.replace_all_uses_with(node.args[0].args[0])
    finish(joint.module)
    settings = {"rank": 1.0, "projection": "orthogonal", "place": "late"}
    plan = choose_sites(joint, CompactConfig(**DEFAULTS | settings))
    left, right = (grad.uses[0] for grad in find_weight_grads(joint))
    assert left.activation is right.activation
    assert [use.features_first for use in (left, right)] == [True, False]
    changed = joint.with_inputs(plan)
    assert len(rewrite_weight_grads(changed, plan)) == 2
    values = values_of(changed)
    for a, b in zip(evaluate(joint.module, values), evaluate(changed.module, values), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------
# Tracked projections
# ---------------------------------------------------------------------------------------------

SIDES = {"qkv": {"input"}, "twice": {"input"}, "experts": {"input", "output"}}
SIDES |= {case: {"output"} for case in ("linear", "conv1d", "autocast", "einsum", "grouped")}


def operands_of(joint, values):
    """The value of every node."""
    interpreter = torch.fx.Interpreter(joint.module, garbage_collect_values=False)
    names = [node.name for node in joint.module.graph.find_nodes(op="placeholder")]
    interpreter.run(*(values[name] for name in names))
    return interpreter.env


def direction_of(use, env, p, step):
    """Σ a_sᵀ (b_s F) / ‖F‖ with F = bᵀ a P, over experts; s is every so many tokens."""
    left, right = (env[operand] for operand in use.matmul.args[:2])
    a, b = (right, left.mT) if use.projected_position == 1 else (left.mT, right)
    seen = torch.arange(a.shape[-2]) % step == 0
    if len(use.matmul.args) > 2:
        ends = env[use.matmul.args[2]].tolist()
        parts = [(a[i:j], b[i:j], seen[i:j]) for i, j in zip([0, *ends], ends)]  # noqa: B905
    elif a.dim() == 3:
        parts = [(*pair, seen) for pair in zip(a, b, strict=True)]
    else:
        parts = [(a, b, seen)]
    factors = [b.mT @ a @ p for a, b, _ in parts]
    norm = torch.stack([factor.float().square().sum() for factor in factors]).sum().sqrt()
    return sum(
        a[rows].mT.float() @ (b[rows].float() @ (factor.float() / norm))
        for (a, b, rows), factor in zip(parts, factors, strict=True)
    )


@pytest.mark.parametrize("place", ["early", "late"])
@pytest.mark.parametrize("case", SIDES)
def test_a_tracked_projection_hears_where_the_gradient_is(traced, values_of, evaluate, case, place):
    settings = {"rank": 16, "projection": "tracked", "track_every": 3, "place": place}
    joint, plan, changed, _ = rewritten(traced(case), **settings)
    assert {site.side for site in plan.sketched} == ({"input"} if place == "early" else SIDES[case])
    values = values_of(changed)
    env = operands_of(joint, values)
    grads = {grad.index: grad for grad in find_weight_grads(joint)}
    expected = {}
    for site in plan.sketched:
        input_index = min(changed.added) + site.projection
        p = values[changed.inputs()[input_index].name]
        assert p.shape == (site.features, 16)
        use = grads[site.index].uses[site.use].on(site.side)
        expected[input_index] = expected.get(input_index, 0) + direction_of(use, env, p, 3)
    outputs = evaluate(changed.module, values)
    rtol, atol = (3e-2, 3e-1) if case in ("grouped", "autocast") else (1e-4, 1e-4)
    assert len(expected) == len(plan.projections)
    for input_index, direction in expected.items():
        got = outputs[changed.gradient_positions()[input_index]]
        torch.testing.assert_close(got.float(), direction, rtol=rtol, atol=atol)


def test_what_is_not_finite_says_nothing_of_where_to_go(joint_of, values_of, evaluate):
    settings = {"rank": 16, "projection": "tracked", "place": "late"}
    _, _, changed, _ = rewritten(joint_of(nn.Linear(64, 48), batch()), **settings)
    values = values_of(changed)
    tangent = next(name for name in values if "tangents" in name)
    for value in (math.inf, math.nan, 0.0):
        position = changed.gradient_positions()[min(changed.added)]
        spoilt = {**values, tangent: torch.full_like(values[tangent], value)}
        assert torch.equal(evaluate(changed.module, spoilt)[position], torch.zeros(48, 16))


def test_the_size_of_a_loss_does_not_matter_to_where_a_projection_goes(
    joint_of, values_of, evaluate
):
    settings = {"rank": 16, "projection": "tracked", "place": "late"}
    _, _, changed, _ = rewritten(joint_of(nn.Linear(64, 48), batch()), **settings)
    values = values_of(changed)
    tangent = next(name for name in values if "tangents" in name)
    position = changed.gradient_positions()[min(changed.added)]
    one, scaled = (
        evaluate(changed.module, {**values, tangent: scale * values[tangent]})[position]
        for scale in (1.0, 2.0**16)
    )
    torch.testing.assert_close(scaled, one * 2.0**16)


def test_grouped_products_without_a_kernel_are_not_tracked(traced):
    joint = traced("grouped in float32")
    (site,) = choose_sites(joint, CompactConfig(gradients="dense", projection="tracked")).sites
    assert site.reason == "a grouped matmul of this dtype is not tracked"


def test_early_tracked_tokens_have_memory_of_their_own(traced):
    settings = {"rank": 16, "projection": "tracked", "place": "early", "track_every": 8}
    *_, found = rewritten(traced("qkv"), **settings)
    ((sketch, seen),) = found.values()
    assert seen.meta["val"].shape == (4, 64)
    assert seen.meta["val"].untyped_storage().nbytes() == 4 * 64 * 4
    assert sketch.meta["val"].shape == (32, 16)


# ---------------------------------------------------------------------------------------------
# Plans that do not fit
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{"use": 3}, {"index": 77}, {"in_features": 63}, {"out_features": 9}]
)
def test_a_site_that_is_not_there_cannot_be_compacted(joint_of, change):
    joint = joint_of(nn.Linear(64, 48), batch())
    plan = choose_sites(joint, CompactConfig(**DEFAULTS))
    wrong = replace(plan, sites=tuple(replace(site, **change) for site in plan.sites))
    with pytest.raises(CannotCompact, match="gradient of weight is not the one"):
        rewrite_weight_grads(joint.with_inputs(plan), wrong)


def test_a_copy_is_rewritten_and_the_original_stays(traced, ops_of):
    joint, _, changed, _ = rewritten(traced("qkv"))
    assert ops_of(joint.module)[RANDOM_PROJECTION] == 0
    assert len(joint.inputs()) + 1 == len(changed.inputs())
    assert ops_of(changed.module)[RANDOM_PROJECTION] == 1


@pytest.mark.parametrize("layer", [lambda: nn.Linear(64, 48), lambda: Conv1D(48, 64)])
def test_an_activation_that_is_an_input_is_rewritten(joint_of, values_of, evaluate, layer):
    settings = {"rank": 64, "projection": "orthogonal", "place": "early"}
    joint, plan, changed, _ = rewritten(joint_of(layer(), batch(32, 64)), **settings)
    assert len(plan.sketched) == 1
    changed.module.graph.lint()
    values = values_of(changed)
    for a, b in zip(evaluate(joint.module, values), evaluate(changed.module, values), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_key_of_the_graph_is_that_of_the_seed(joint_of, values_of, evaluate):
    """The projection in the graph is the one that `random_projection` gives outside."""
    _, _, changed, _ = rewritten(joint_of(nn.Linear(64, 48), batch()), rank=8)
    (node,) = changed.module.graph.find_nodes(op="call_function", target=RANDOM_PROJECTION)
    given = source(torch.tensor(fold_in(3, 4, 5)), *node.args[1:4])
    drawn = node.target(given, *node.args[1:])
    assert torch.equal(drawn, random_projection(3, 64, 8, salt=4, generation=5))


def test_a_frozen_neighbour_stays_as_it_is(joint_of, calls, ops_of):
    frozen = nn.Parameter(torch.randn(64, 64), requires_grad=False)
    module = calls(lambda m, x: m.fc(F.linear(x, m.w).tanh()), w=frozen, fc=nn.Linear(64, 64))
    _, plan, changed, found = rewritten(joint_of(module, batch()))
    assert [site.weight for site in plan.sketched] == ["fc.weight"]
    assert len(found) == ops_of(changed.module)[RANDOM_PROJECTION] == 1


@pytest.mark.parametrize("conv1d", [False, True])
def test_the_first_activation_of_a_backward_is_let_go_before_its_gradient_is_made(
    joint_of, calls, ops_of, values_of, evaluate, conv1d
):
    def down():
        return Conv1D(64, 96) if conv1d else nn.Linear(96, 64, bias=False)

    mlps = calls(
        lambda m, x: m.second(F.silu(m.b(m.first(F.silu(m.a(x)))))),
        a=nn.Linear(64, 96, bias=False),
        first=down(),
        b=nn.Linear(64, 96, bias=False),
        second=down(),
    )
    joint, plan, changed, _ = rewritten(joint_of(mlps, batch(8, 16, 64)), **TRACKED_LATE)
    assert [site.side for site in plan.sketched].count("output") == 2
    nodes = list(changed.module.graph.nodes)
    waiting = [node for node in nodes if node.kwargs.get("beta") == 0]
    assert len(waiting) == 1
    # Inductor may multiply what beta=0 leaves out, so that it has to be finite.
    finite = waiting[0].args[0]
    assert finite.target is torch.ops.aten.where.self
    row = finite.args[1]
    assert row.target is torch.ops.aten.select.int
    factor = row.args[0]
    index = next(i for i, name in joint.weights.items() if name == "second.weight")
    where = next(i for i, r in changed.added.items() if getattr(r, "index", None) == index)
    gradient = changed.module.graph.output_node().args[0][changed.gradient_positions()[where]]
    while gradient.target is torch.ops.aten.permute.default:
        gradient = gradient.args[0]
    assert gradient is factor
    # The same values as without the order.
    plain = rewritten(joint, **TRACKED_LATE, recompute=False)[2]
    assert not any(node.kwargs.get("beta") == 0 for node in plain.module.graph.nodes)
    values = values_of(changed)
    for a, b in zip(evaluate(changed.module, values), evaluate(plain.module, values), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)


class Scaled(torch.autograd.Function):
    """A linear layer whose dx is a product in float8, as torchao's: it comes before dW.

    scales: one for a tensor, one for each row, or for each 32 elements a power of 2 ("mx").
    """

    @staticmethod
    def forward(ctx, x, weight, scales):
        ctx.save_for_backward(x, weight)
        ctx.scales = scales
        return x @ weight.t()

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        by_row, one = ctx.scales == "row", torch.ones((), device=dy.device)
        largest = dy.abs().amax(1, keepdim=True) if by_row else dy.abs().amax()
        scale = 57344.0 / largest.float()
        q = (dy.float() * scale).clamp(-57344.0, 57344.0).to(E5M2)
        w = weight.to(torch.float8_e4m3fn).t().contiguous().t()
        scale = scale.reciprocal()
        other = one.expand(1, w.shape[1]).contiguous() if by_row else one
        if ctx.scales == "mx":
            scale, other = (
                one.expand(t.numel() // 32).to(torch.float8_e8m0fnu).contiguous() for t in (q, w)
            )
        dx = torch._scaled_mm(q, w, scale, other, out_dtype=dy.dtype)
        return dx, dy.t() @ x, None


def scaled_mlps(calls, scales="tensor"):
    def mlp(m, x):
        h = F.silu(Scaled.apply(x, m.up.weight, scales))
        return Scaled.apply(h, m.down.weight, scales)

    return calls(
        mlp,
        up=nn.Linear(128, 256, bias=False),
        down=nn.Linear(256, 128, bias=False),
    ).bfloat16()


def test_a_factor_comes_before_what_else_reads_its_gradient(joint_of, calls):
    """So that Inductor has memory for dy, and casts do not compute it once more."""
    x = batch(128, 128).bfloat16().requires_grad_()
    joint, plan, changed, _ = rewritten(joint_of(scaled_mlps(calls), x), **TRACKED_LATE)
    sides = {site.weight: site.side for site in plan.sketched}
    assert sides == {"up.weight": "input", "down.weight": "output"}

    def casts(graph):
        return [n for n in graph.nodes if getattr(n.meta.get("val"), "dtype", 0) is E5M2]

    down, up = casts(joint.module.graph)
    uses = {grad.name: grad.uses[0].matmul for grad in find_weight_grads(joint)}
    assert uses["down.weight"] > down
    assert uses["up.weight"] > up
    nodes = {node.name: node for node in changed.module.graph.nodes}
    down, up = casts(changed.module.graph)
    assert nodes[f"{uses['down.weight'].name}_factor"] < down
    assert down < nodes[f"{uses['up.weight'].name}_factor"] < up


def test_a_factor_stays_where_only_matmuls_read_its_gradient(joint_of, calls):
    """The operators that are left keep their order."""
    module = calls(
        lambda m, x: m.down(F.silu(m.gate(x)) * m.up(x)),
        gate=nn.Linear(64, 96, bias=False),
        up=nn.Linear(64, 96, bias=False),
        down=nn.Linear(96, 64, bias=False),
    )
    joint, _, changed, _ = rewritten(joint_of(module, batch().requires_grad_()), rank=16)
    left = {node.name for node in joint.module.graph.nodes}
    left &= {node.name for node in changed.module.graph.nodes}
    before, after = (
        [node.name for node in graph.module.graph.nodes if node.name in left]
        for graph in (joint, changed)
    )
    assert before == after


@pytest.mark.parametrize("scales", ["tensor", "row", "mx"])
def test_a_product_in_float8_waits_for_the_factor_as_others_do(
    joint_of, calls, values_of, evaluate, scales
):
    """Of the first layer's scale, to which 0 times the factor is added, if it can be."""
    x = batch(128, 128).bfloat16().requires_grad_()
    joint, _, changed, _ = rewritten(joint_of(scaled_mlps(calls, scales), x), **TRACKED_LATE)
    plain = rewritten(joint, **TRACKED_LATE, recompute=False)[2]

    def waiting(graph):
        products = graph.find_nodes(op="call_function", target=torch.ops.aten._scaled_mm.default)
        return [n for n in products if n.args[2].target is torch.ops.aten.add.Tensor]

    if scales == "mx":
        assert not waiting(changed.module.graph)
        return
    (product,) = waiting(changed.module.graph)
    assert product.args[0].meta["val"].shape == (128, 128)
    finite, zero = product.args[2].args[1].args  # 0 · NaN is NaN
    assert (finite.target, zero) == (torch.ops.aten.where.self, 0.0)
    assert not waiting(plain.module.graph)
    if scales == "row":  # not every torch has this kernel for a CPU
        return
    values = values_of(changed)
    for a, b in zip(evaluate(changed.module, values), evaluate(plain.module, values), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_sizes_that_change_are_not_compared(joint_of, calls):
    """With in_features, of another product of dy: it would be a guard."""
    module = calls(lambda m, x, a, b: a @ b + m.down(F.silu(x)), down=nn.Linear(96, 64))
    a, b = batch(128, 96).requires_grad_(), batch(96, 64).requires_grad_()
    torch._dynamo.mark_dynamic(a, 1)
    torch._dynamo.mark_dynamic(b, 0)
    joint = joint_of(module, batch(128, 96).requires_grad_(), a, b)
    symbolic = [
        size
        for node in joint.module.graph.find_nodes(op="placeholder")
        for size in getattr(node.meta["val"], "shape", ())
        if isinstance(size, torch.SymInt)
    ]
    environment = symbolic[0].node.shape_env
    before = len(environment.guards)
    _, plan, changed, _ = rewritten(joint, **TRACKED_LATE)
    assert [site.side for site in plan.sketched] == ["output"]
    assert any(node.kwargs.get("beta") == 0 for node in changed.module.graph.nodes)
    assert len(environment.guards) == before


def test_a_gradient_that_leaves_the_graph_as_it_came_is_no_obstacle(
    joint_of, calls, values_of, evaluate
):
    """Tokens in one dimension, and a residual that is an input: its gradient is dy itself."""
    module = calls(lambda m, x, residual: residual + m.down(F.silu(x)), down=nn.Linear(96, 64))
    inputs = batch(128, 96).requires_grad_(), batch(128, 64).requires_grad_()
    joint, plan, changed, _ = rewritten(joint_of(module, *inputs), **TRACKED_LATE)
    assert [site.side for site in plan.sketched] == ["output"]
    assert any(node.kwargs.get("beta") == 0 for node in changed.module.graph.nodes)
    plain = rewritten(joint, **TRACKED_LATE, recompute=False)[2]
    values = values_of(changed)
    for a, b in zip(evaluate(changed.module, values), evaluate(plain.module, values), strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-5, atol=1e-6)
