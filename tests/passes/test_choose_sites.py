"""The choice alone: which gradients are sketched, at what rank, on which side of the boundary."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from compact_fx.config import CompactConfig
from compact_fx.passes.choose_sites import choose_sites
from compact_fx.passes.partition import partition
from compact_fx.projections import KINDS, salt_of


def batch(*shape):
    return torch.randn(shape or (2, 64, 64))


def mlp(features=64):
    # Inputs of both layers cross for the weight gradients; GELU keeps its own input.
    return nn.Sequential(nn.GELU(), nn.Linear(features, 64), nn.GELU(), nn.Linear(64, 64))


def attention(m, x):
    h = m.norm(x)
    q, k, v = m.q(h), m.k(h), m.v(h)
    q, k, v = (t.unflatten(-1, (4, 16)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2)).softmax(-1)
    return x + m.o((scores @ v).transpose(1, 2).flatten(2))


@pytest.fixture(scope="module")
def attention_of(calls):
    def make():
        linear = {name: nn.Linear(64, 64) for name in "qkvo"}
        return calls(attention, norm=nn.LayerNorm(64), **linear)

    return make


@pytest.fixture(scope="module")
def traced(joint_of):
    """The joint graph of what a function makes, traced once: choices do not change it."""

    @functools.cache
    def trace(make, *shape):
        return joint_of(make(), batch(*shape))

    return trace


def config_of(**settings):
    """Dense gradients with a countsketch, where nothing else is said."""
    return CompactConfig(**{"gradients": "dense", "projection": "countsketch"} | settings)


def sites_of(plan):
    return {site.weight: site for site in plan.sites}


# ---------------------------------------------------------------------------------------------
# Ranks and reasons
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "columns"), [(0.25, 16), (7, 7), (1.0, 64), (64, 64)])
def test_a_rank_becomes_columns(joint_of, rank, columns):
    plan = choose_sites(joint_of(nn.Linear(64, 48), batch()), config_of(rank=rank))
    (site,) = plan.sites
    (projection,) = plan.projections
    assert (site.in_features, site.out_features) == (64, 48)
    assert (projection.features, projection.rank) == (64, columns)
    assert site.rank == columns
    assert site.reason == ""


SETTINGS = {
    "rank > in_features": ({"rank": 65}, "rank 65 > in_features 64"),
    "excluded": ({"exclude": ("w*",)}, "in exclude"),
    "excluded and included": ({"include": ("weight",), "exclude": ("weight",)}, "in exclude"),
    "not included": ({"include": ("layers.*",)}, "not in include"),
    "nothing included": ({"include": ()}, "not in include"),
    "no rank": ({"rank": {"layers.*": 8}}, "no pattern of rank matches"),
    "narrow": ({"min_features": 65}, "in_features 64 < min_features 65"),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("layer", [lambda: nn.Linear(64, 48), lambda: Conv1D(48, 64)])
def test_what_the_settings_leave_alone_has_a_reason(joint_of, case, layer):
    settings, reason = SETTINGS[case]
    plan = choose_sites(joint_of(layer(), batch()), config_of(**settings))
    (site,) = plan.sites
    assert (site.reason, site.rank, site.placement) == (reason, 0, None)
    assert (site.sketch, site.projection) == (None, None)
    assert plan.cost_of(site).flops_before == plan.cost_of(site).flops_after > 0
    assert plan.projections == plan.inputs == plan.sketched == ()
    assert plan.account.saved_before == plan.account.saved_after


HEADS = {  # words, features, out_features of the last layer; whether this is a head
    "a head": ((96, 64, 96), True),
    "bytes": ((48, 64, 48), False),  # fewer words than features
    "other words": ((96, 64, 97), False),
}


@pytest.mark.parametrize("case", HEADS)
def test_a_head_over_a_vocabulary_is_left_in_full(joint_of, calls, case):
    (words, features, outputs), is_head = HEADS[case]
    model = calls(
        lambda m, i: m.head(m.fc(m.table(i) + m.places.weight)),
        table=nn.Embedding(words, features),
        places=nn.Embedding(12, features),
        fc=nn.Linear(features, features, bias=False),
        head=nn.Linear(features, outputs, bias=False),
    )
    joint = joint_of(model, torch.randint(words, (4, 12)))
    reasons = {site.weight: site.reason for site in choose_sites(joint, config_of()).sites}
    assert reasons["fc.weight"] == ""
    assert reasons["head.weight"] == (
        f"a head over {words} words: sketch_heads=False" if is_head else ""
    )
    plan = choose_sites(joint, config_of(sketch_heads=True))
    assert {site.weight for site in plan.sketched} == {"fc.weight", "head.weight"}


def test_a_table_of_positions_makes_no_head(joint_of, calls):
    """As many positions as the layer has outputs: the largest table is that of words."""
    model = calls(
        lambda m, i, p: m.fc(m.table(i) + m.places(p)),
        table=nn.Embedding(200, 64),
        places=nn.Embedding(96, 64),
        fc=nn.Linear(64, 96, bias=False),
    )
    joint = joint_of(model, torch.randint(200, (4, 12)), torch.arange(12))
    (fc,) = choose_sites(joint, config_of()).sketched
    assert fc.weight == "fc.weight"


def test_min_features_is_inclusive(joint_of):
    plan = choose_sites(joint_of(nn.Linear(64, 48), batch()), config_of(min_features=64))
    assert len(plan.sketched) == 1


def test_reasons_of_the_finder_are_kept(joint_of, calls):
    module = calls(
        lambda m, i: m.fc(F.linear(m.e(i), m.frozen)),
        e=nn.Embedding(50, 64),
        frozen=nn.Parameter(torch.randn(64, 64), requires_grad=False),
        fc=nn.Linear(64, 64),
    )
    sites = sites_of(choose_sites(joint_of(module, torch.randint(0, 50, (2, 8))), config_of()))
    assert sites["frozen"].reason == "frozen, or no gradient reaches it"
    assert "no matmul" in sites["e.weight"].reason
    assert sites["fc.weight"].placement is not None


def test_every_rank_of_a_mapping_goes_to_its_weights(traced):
    config = config_of(rank={"1.*": 8, "*": 0.5})
    sites = sites_of(choose_sites(traced(mlp), config))
    assert (sites["1.weight"].rank, sites["3.weight"].rank) == (8, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_projections_are_of_the_kind_and_of_the_activations_dtype(joint_of, calls, kind):
    def forward(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.fc(x)

    joint = joint_of(calls(forward, fc=nn.Linear(64, 48)), batch())
    (projection,) = choose_sites(joint, config_of(projection=kind)).projections
    assert (projection.kind, projection.dtype) == (kind, torch.bfloat16)
    assert projection.salt == salt_of("fc.weight")


# ---------------------------------------------------------------------------------------------
# What is shared
# ---------------------------------------------------------------------------------------------


def test_query_key_and_value_share_one_sketch(traced, attention_of):
    plan = choose_sites(traced(attention_of), config_of())
    sites = sites_of(plan)
    shared = [sites[f"{name}.weight"] for name in "qkv"]
    assert len({site.sketch for site in shared}) == len({site.projection for site in shared}) == 1
    assert sites["o.weight"].sketch != shared[0].sketch
    assert len(plan.projections) == 2
    assert plan.projections[shared[0].projection].salt == salt_of("k.weight")
    assert set(plan.projection_inputs[shared[0].projection].owners) == {s.index for s in shared}


def test_different_ranks_on_one_activation_are_different_sketches(traced, attention_of):
    config = config_of(rank={"q*": 8, "*": 16}, place="early")
    sites = sites_of(choose_sites(traced(attention_of), config))
    assert sites["q.weight"].sketch != sites["k.weight"].sketch
    assert sites["k.weight"].sketch == sites["v.weight"].sketch
    assert (sites["q.weight"].rank, sites["k.weight"].rank) == (8, 16)


def test_a_weight_used_twice_has_two_sketches_of_one_projection(joint_of, calls):
    module = calls(lambda m, x: m.fc(m.fc(x.sin()).tanh()), fc=nn.Linear(64, 64))
    plan = choose_sites(joint_of(module, batch()), config_of())
    first, second = plan.sites
    assert (first.use, second.use) == (0, 1)
    assert first.sketch != second.sketch
    assert first.projection == second.projection
    assert len(plan.projections) == 1


def test_weights_that_share_nothing_have_their_own_projections(traced):
    plan = choose_sites(traced(mlp), config_of())
    assert {projection.salt for projection in plan.projections} == {
        salt_of("1.weight"),
        salt_of("3.weight"),
    }


def test_sketching_one_weight_less_does_not_change_the_other_projections(traced):
    joint = traced(mlp)
    both = choose_sites(joint, config_of()).projections
    assert choose_sites(joint, config_of(exclude=("1.*",))).projections == both[1:]


# ---------------------------------------------------------------------------------------------
# Early and late
# ---------------------------------------------------------------------------------------------


def test_an_activation_that_crosses_for_its_weights_alone_is_sketched_early(joint_of):
    plan = choose_sites(joint_of(nn.Linear(64, 48), batch()), config_of())
    (site,) = plan.sites
    assert site.placement == "early"
    cost, account = plan.cost_of(site), plan.account
    assert (cost.bytes_before, cost.bytes_after) == (128 * 64 * 4, 128 * 16 * 4)
    assert (account.bytes_before, account.bytes_after) == (cost.bytes_before, cost.bytes_after)


def test_an_activation_that_something_else_keeps_is_sketched_late(joint_of, calls):
    def forward(m, x):
        h = torch.softmax(m.first(x), -1)  # its backward keeps its output
        return m.second(h)

    module = calls(forward, first=nn.Linear(64, 64), second=nn.Linear(64, 64))
    joint = joint_of(module, batch())
    plan = choose_sites(joint, config_of(recompute=False))
    site = sites_of(plan)["second.weight"]
    assert site.placement == "late"
    assert plan.cost_of(site).bytes_after == plan.cost_of(site).bytes_before == 128 * 64 * 4
    assert sites_of(choose_sites(joint, config_of()))["second.weight"].placement == "late"


@pytest.mark.parametrize("place", ["early", "late"])
def test_a_place_that_is_asked_for_is_taken(traced, attention_of, place):
    plan = choose_sites(traced(attention_of), config_of(place=place))
    assert len(plan.sketched) == 4
    assert {site.placement for site in plan.sketched} == {place}


def test_early_sketches_cross(traced):
    plan = choose_sites(traced(mlp), config_of(place="early"))
    assert {site.placement for site in plan.sites} == {"early"}
    assert [cost.bytes_after for cost in plan.account.sites] == [128 * 16 * 4] * 2


def test_early_sketches_cross_where_nothing_is_rebuilt(traced):
    config = config_of(place="early", recompute=False)
    plan = choose_sites(traced(mlp), config)
    assert [cost.bytes_after for cost in plan.account.sites] == [128 * 16 * 4] * 2


def test_sites_on_one_activation_have_one_placement_and_count_it_once(traced, attention_of):
    plan = choose_sites(traced(attention_of), config_of())
    sites = [sites_of(plan)[f"{name}.weight"] for name in "qkv"]
    assert len({site.placement for site in sites}) == 1
    assert sum(plan.cost_of(site).bytes_before > 0 for site in sites) <= 1
    assert sum(plan.cost_of(site).bytes_after > 0 for site in sites) <= 1


RANKS = [
    0.25,
    1,
    63,
    64,
    1.0,
    {"q*": 8, "*": 16},
    {"q*": 48, "k*": 32, "v*": 24, "o*": 1},
    {"q*": 63, "k*": 62, "v*": 61, "o*": 60},
    {"q*": 64, "k*": 63, "*": 1.0},
    {"k*": 0.75},
    {"norm*": 4},
]
SOME_RANKS = [0.25, 64, {"q*": 63, "k*": 62, "v*": 61, "o*": 60}, {"k*": 0.75}]


def test_bytes_never_grow_on_attention(traced, attention_of):
    joint = traced(attention_of)
    before = partition(joint.copy(), recompute=False).saved
    for rank in RANKS:
        plan = choose_sites(joint, config_of(rank=rank))
        assert plan.account.saved_before == before
        assert plan.account.bytes_after <= plan.account.bytes_before, rank


@pytest.mark.parametrize("recompute", [True, False])
def test_bytes_never_grow_on_shared_inputs(joint_of, calls, recompute):
    def forward(m, x):
        h = F.silu(x) * x
        return m.o(torch.tanh(m.q(h) * m.k(h)) + m.v(x)), h.sum(-1)

    joint = joint_of(calls(forward, **{name: nn.Linear(64, 64) for name in "qkvo"}), batch())
    for rank in SOME_RANKS:
        plan = choose_sites(joint, config_of(rank=rank, recompute=recompute))
        assert plan.account.bytes_after <= plan.account.bytes_before, rank


def test_nothing_is_sketched_where_that_keeps_more(traced, monkeypatch):
    def costly(joint, *, recompute, early=()):
        cut = partition(joint, recompute=recompute, early=early)
        if not joint.added:
            return cut
        more = replace(next(iter(cut.saved)), name="more", bytes=10**6)
        cut.saved_by_storage[-1] = more
        return cut

    monkeypatch.setattr("compact_fx.passes.apply_plan.partition", costly)
    plan = choose_sites(traced(mlp), config_of())
    assert plan.sketched == plan.projections == plan.inputs == ()
    assert plan.account.saved_after == plan.account.saved_before
    for site in plan.sites:
        assert site.reason.startswith("sketching keeps ")
        assert (site.rank, site.sketch, site.projection) == (0, None, None)
        assert plan.cost_of(site).flops_after == plan.cost_of(site).flops_before


def test_a_short_sequence_of_wide_sketches_does_not_grow(traced, attention_of):
    plan = choose_sites(traced(attention_of, 1, 2, 64), config_of(rank=63))
    assert plan.account.bytes_after <= plan.account.bytes_before


def test_sketching_saves_floating_point_operations(traced, attention_of):
    plan = choose_sites(traced(attention_of, 8, 64, 64), config_of(rank=8))
    assert len(plan.sketched) == 4
    for site in plan.sketched:
        assert plan.cost_of(site).flops_before == 2 * 512 * 64 * 64
        assert 0 < plan.cost_of(site).flops_after < plan.cost_of(site).flops_before / 2


def test_a_shared_sketch_is_cheaper_than_its_own(traced, attention_of):
    config = config_of(projection="gaussian")
    plan = choose_sites(traced(attention_of), config)
    sites = sites_of(plan)
    t, n, r, m = 128, 64, 16, 64
    assert plan.cost_of(sites["o.weight"]).flops_after == 2 * (t * n * r + t * r * m + n * r * m)
    assert (
        plan.cost_of(sites["q.weight"]).flops_after
        == 2 * (t * r * m + n * r * m) + 2 * t * n * r // 3
    )


def test_products_with_a_countsketch_take_one_operation_for_each_row(traced, attention_of):
    plan = choose_sites(traced(attention_of), config_of())
    sites = sites_of(plan)
    t, n, r, m = 128, 64, 16, 64
    assert plan.cost_of(sites["o.weight"]).flops_after == 2 * (t * n + t * r * m + n * m)


# ---------------------------------------------------------------------------------------------
# Tracked projections
# ---------------------------------------------------------------------------------------------


def tracked(**settings):
    return config_of(projection="tracked", **settings)


def narrowing():
    """The second layer has less out_features than in_features; GELU keeps its own input."""
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 32))


def test_a_weight_that_narrows_is_sketched_on_its_output_side(traced):
    plan = choose_sites(traced(narrowing, 2, 512, 64), tracked())
    sites = sites_of(plan)
    up, down = sites["0.weight"], sites["2.weight"]
    assert (up.side, up.features, up.rank) == ("input", 64, 16)
    assert (down.side, down.features, down.rank, down.placement) == ("output", 32, 8, "late")
    assert [(p.features, p.rank) for p in plan.projections] == [(64, 16), (32, 8)]
    assert plan.track_every == 8


def test_an_activation_that_would_cross_for_the_output_side_is_sketched_on_the_input_side(traced):
    joint = traced(narrowing, 2, 512, 64)
    site = sites_of(choose_sites(joint, tracked(recompute=False)))["2.weight"]
    assert (site.side, site.rank, site.placement) == ("input", 32, "early")


def test_the_input_side_is_not_taken_where_its_projection_is_larger_than_what_it_saves(joint_of):
    # A down projection alone in its graph, as where Dynamo cuts at buckets: 1024 to 64.
    down = nn.Linear(1024, 64, bias=False)
    plan = choose_sites(joint_of(down, batch(256, 1024)), CompactConfig())
    (site,) = plan.sites
    assert (site.side, site.placement, site.reason) == ("output", "late", "")


@pytest.mark.parametrize(
    ("settings", "side"),
    [({"rank": 33}, "input"), ({"rank": 32}, "output"), ({"min_features": 33}, "input")],
)
def test_the_output_side_needs_room_for_the_rank(traced, settings, side):
    config = tracked(**{"rank": 16, "place": "late"} | settings)
    plan = choose_sites(traced(narrowing, 2, 512, 64), config)
    assert sites_of(plan)["2.weight"].side == side


@pytest.mark.parametrize(
    ("dimension", "side", "reason"),
    [
        (0, "input", "on its input side, sharded in dimension 0: see compact_fx.shard_placement"),
        (1, "output", ""),
    ],
)
@pytest.mark.parametrize("recompute", [True, False])
def test_a_factor_keeps_the_dimension_that_is_sharded(traced, dimension, side, reason, recompute):
    """Also where the other side would keep less (without recomputing)."""
    joint = traced(narrowing, 2, 512, 64)
    index = next(i for i, name in joint.weights.items() if name == "2.weight")
    config = tracked(recompute=recompute)
    site = sites_of(choose_sites(replace(joint, shards={index: dimension}), config))["2.weight"]
    if side == "output" and not recompute:  # x would cross for it alone
        assert site.sketch is None or site.side == "output"
    else:
        assert (site.side, site.reason) == (side, reason)


def test_a_weight_whose_factor_cannot_be_sharded_is_left_alone(traced):
    """Dimension 1 is what the sketch of a widening layer takes away."""
    joint = traced(narrowing, 2, 512, 64)
    shards = dict.fromkeys(joint.weights, 1)
    for config in (tracked(), config_of(gradients="sketched")):
        sites = sites_of(choose_sites(replace(joint, shards=shards), config))
        assert sites["0.weight"].reason == "sharded in dimension 1: see compact_fx.shard_placement"
        assert sites["0.weight"].sketch is None


def test_an_equally_large_side_is_taken_where_it_can_be_sharded(joint_of):
    """GPT-2's weights have in_features first: of a square one dimension 0 is sharded."""
    joint = joint_of(nn.Sequential(nn.GELU(), Conv1D(64, 64)), batch(2, 512, 64))
    config = tracked(place="late")
    sides = [
        sites_of(choose_sites(replace(joint, shards=shards), config))["1.weight"].side
        for shards in ({}, dict.fromkeys(joint.weights, 0), dict.fromkeys(joint.weights, 1))
    ]
    assert sides == ["input", "output", "input"]


def test_random_projections_stay_on_the_input_side(traced):
    plan = choose_sites(traced(narrowing, 2, 512, 64), config_of())
    assert {site.side for site in plan.sites} == {"input"}


def test_the_tokens_that_are_tracked_cross_beside_an_early_sketch(joint_of):
    plan = choose_sites(joint_of(nn.Linear(64, 64), batch(2, 512, 64)), tracked(track_every=4))
    (site,) = plan.sites
    assert site.placement == "early"
    assert plan.account.bytes_after == 1024 * 16 * 4 + 256 * 64 * 4


@pytest.mark.parametrize(
    ("gradients", "tokens"), [("dense", 128), ("sketched", 32), ("sketched", 512)]
)
def test_no_more_bytes_with_projections_and_what_they_have_seen(
    traced, attention_of, tokens, gradients
):
    """P and Y (float32) count against what crosses less, and against gradients that are factors."""
    joint = traced(attention_of, 2, tokens // 2, 64)
    for rank in SOME_RANKS:
        plan = choose_sites(joint, tracked(rank=rank, gradients=gradients))
        account = plan.account
        held = sum(p.features * p.rank * (4 + 4) for p in plan.projections)
        assert account.projection_bytes == held
        saved = sum(4 * (64 * 64 - f.shape[0] * f.shape[1]) for f in plan.factor_inputs)
        assert account.bytes_after + max(0, held - saved) <= account.bytes_before, rank


def test_few_tokens_are_not_worth_a_projection(traced, attention_of):
    joint = traced(attention_of, 2, 8, 64)
    plan = choose_sites(joint, tracked())
    assert not plan.sketched
    assert all("bytes more than without" in site.reason for site in plan.sites)
    assert len(choose_sites(joint, tracked(gradients="sketched")).sketched) == 4


def test_what_tracking_takes_is_counted(traced, attention_of):
    config = tracked(place="late", gradients="sketched")
    plan = choose_sites(traced(attention_of), config)
    t, n, r, m = 128, 64, 16, 64
    (o,) = [plan.cost_of(site) for site in plan.sites if site.weight == "o.weight"]
    assert o.flops_after == 2 * (t * n * r + t * r * m) * 9 // 8


# ---------------------------------------------------------------------------------------------
# Contract
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["auto", "early", "late"])
def test_it_changes_nothing(joint_of, attention_of, place):
    joint = joint_of(attention_of(), batch())
    nodes = [(node.name, node.target, str(node.args)) for node in joint.module.graph.nodes]
    meta = [set(node.meta) for node in joint.module.graph.nodes]
    plan = choose_sites(joint, config_of(place=place))
    assert len(plan.sketched) == 4
    after = [(node.name, node.target, str(node.args)) for node in joint.module.graph.nodes]
    assert after == nodes
    assert [set(node.meta) for node in joint.module.graph.nodes] == meta
    assert not any("recompute" in node.meta for node in joint.module.graph.nodes)


def test_it_decides_the_same_again(joint_of, attention_of):
    module, config = attention_of(), config_of()
    joint = joint_of(module, batch())
    assert choose_sites(joint, config) == choose_sites(joint, config)
    assert choose_sites(joint_of(module, batch()), config) == choose_sites(joint, config)


def test_a_graph_input_is_sketched(joint_of):
    plan = choose_sites(joint_of(nn.Linear(64, 48), batch(128, 64)), config_of())
    assert [site.placement for site in plan.sites] == ["early"]


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_symbolic_batches_are_sketched(joint_of, dims):
    x = batch(6, 8, 64)
    for dim in dims:
        torch._dynamo.mark_dynamic(x, dim)
    plan = choose_sites(joint_of(mlp(), x), config_of())
    assert len(plan.sketched) == 2
    assert plan.account.bytes_after < plan.account.bytes_before
    assert all(
        type(saved.bytes) is int for saved in plan.account.saved_before + plan.account.saved_after
    )
    assert all(type(cost.flops_after) is int for cost in plan.account.sites)


def test_parameters_do_not_count_as_kept(traced, attention_of):
    plan = choose_sites(traced(attention_of, 1, 3, 64), config_of())
    weight = 64 * 64 * 4
    assert all(
        saved.bytes != weight for saved in plan.account.saved_before + plan.account.saved_after
    )


def test_where_nothing_is_sketched_the_plan_is_torchs_own(traced):
    """What `explain` then shows is the graph as it is compiled: nothing is rebuilt."""
    plan = choose_sites(traced(mlp), config_of(exclude=("*",)))
    assert not plan.sketched
    assert not plan.recompute
