"""A whole LLaMA: exact where it must be, G P Pᵀ where it is sketched, never more bytes."""

import pytest
import torch

from compact_fx import compact_backend
from compact_fx.projections import KINDS

COUNTSKETCH = {"gradients": "dense", "projection": "countsketch", "sketch_heads": True}
BLOCK = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(
    ("projection", "place"),
    [*(("orthogonal", place) for place in ("auto", "early", "late")), ("countsketch", "auto")],
)
def test_full_rank_is_exact(
    make_llama, tokens, gradients_of, relative_error, projection, place, recompute
):
    """The sites are rewritten, and every gradient equals eager's."""
    loss, exact = gradients_of(make_llama(layers=1), tokens)
    backend = compact_backend(
        rank=1.0,
        gradients="dense",
        projection=projection,
        sketch_heads=True,
        recompute=recompute,
        place=place,
        inner="aot_eager",
        strict=True,
    )
    compact_loss, compact = gradients_of(make_llama(layers=1), tokens, backend)
    (plan,) = backend.plans
    assert {site.weight for site in plan.sketched} == {
        *(f"model.layers.0.{name}.weight" for name in BLOCK),
        "lm_head.weight",
    }
    assert all(site.rank == site.in_features for site in plan.sketched)
    assert compact_loss == pytest.approx(loss, rel=1e-6)
    assert set(compact) == set(exact)
    for name, gradient in exact.items():
        assert relative_error(compact[name], gradient) < 1e-4, name


@pytest.mark.parametrize(
    ("projection", "recompute"),
    [*((kind, True) for kind in KINDS), ("countsketch", False), ("tracked", False)],
)
def test_gradients_are_g_p_pt(
    make_llama, tokens, gradients_of, expected_gradients, relative_error, projection, recompute
):
    """Loss, biases, norms and embeddings are exact; sketched weights of all layers get G P Pᵀ."""
    loss, exact = gradients_of(make_llama(attention_bias=True), tokens)
    backend = compact_backend(
        rank=0.25,
        seed=3,
        gradients="dense",
        projection=projection,
        sketch_heads=True,
        recompute=recompute,
        inner="aot_eager",
        strict=True,
    )
    compact_loss, compact = gradients_of(make_llama(attention_bias=True), tokens, backend)
    (plan,) = backend.plans
    assert len(plan.sketched) == 15
    assert plan.account.bytes_after < plan.account.bytes_before
    assert compact_loss == pytest.approx(loss, rel=1e-6)
    expected = expected_gradients(exact, backend)
    sketched = {site.weight for site in plan.sketched}
    for name in exact:
        error = relative_error(compact[name], expected[name])
        # The bias of k moves all scores of a row alike: its gradient is rounding noise.
        small = exact[name].norm() < 1e-6
        assert small or error < 1e-4, name
        if name in sketched:
            assert relative_error(compact[name], exact[name]) > 0.1, name


def test_input_gradients_are_exact(make_llama, tokens, relative_error):
    """∂x of the whole model equals eager's at any rank."""

    def input_gradient(backend):
        model = make_llama(layers=1)
        x = model.model.embed_tokens(tokens).detach().requires_grad_()
        step = model if backend is None else torch.compile(model, backend=backend)
        step(inputs_embeds=x, labels=tokens).loss.backward()
        return x.grad

    backend = compact_backend(rank=0.125, **COUNTSKETCH, inner="aot_eager", strict=True)
    assert relative_error(input_gradient(backend), input_gradient(None)) < 1e-5
    assert len(backend.plans[0].sketched) == 8


def test_mean_over_seeds_approaches_the_gradient():
    """The mean of 256 gradients with 256 seeds errs as unbiased estimates do.

    One Gaussian estimate of G has relative error e ≈ √((n + 1) / r) (here 2.02), their mean
    e / 16; a bound of 1.25 × that is some 10 standard deviations of the mean's error away.
    """
    torch.manual_seed(0)
    n, m, rank, seeds = 64, 48, 16, 256
    x, target = torch.randn(128, n), torch.randn(128, m)
    weight = torch.nn.Parameter(torch.randn(m, n))

    def step(weight, x):
        return (torch.nn.functional.linear(x, weight) * target).sum()

    step(weight, x).backward()
    exact = weight.grad
    total = torch.zeros_like(exact)
    settings = {"update_interval": 1, "inner": "aot_eager", "strict": True}
    backend = compact_backend(rank=rank, **COUNTSKETCH, **settings)
    sketched_step = torch.compile(step, backend=backend)
    optimizer = torch.optim.SGD([weight], lr=0.0)  # each of its steps gives the next seed
    for _ in range(seeds):
        weight.grad = None
        sketched_step(weight, x).backward()
        total += weight.grad
        optimizer.step()
    single = ((n + 1) / rank) ** 0.5
    error = ((total / seeds - exact).norm() / exact.norm()).item()
    assert error < 1.25 * single / seeds**0.5
    assert error > 0.75 * single / seeds**0.5  # it is a sketch, and seeds do differ


def test_what_crosses_with_torchs_own_choice(make_llama, tokens, gradients_of):
    """Inputs of q/k/v, gate/up and down stop crossing; one z a group crosses; o_proj is late."""
    settings = {"recompute": False, "inner": "aot_eager", "strict": True}
    backend = compact_backend(rank=0.25, **COUNTSKETCH, **settings)
    gradients_of(make_llama(), tokens, backend)
    (plan,) = backend.plans
    sites = {site.weight.removeprefix("model.layers.0."): site for site in plan.sites}
    rows = tokens.numel()
    for group, features in (("self_attn.qkv", 64), ("mlp.gate up", 64), ("mlp.down", 176)):
        module, names = group.split(".")
        names = {"qkv": ("q", "k", "v"), "gate up": ("gate", "up"), "down": ("down",)}[names]
        members = [sites[f"{module}.{name}_proj.weight"] for name in names]
        assert {site.placement for site in members} == {"early"}
        assert len({site.sketch for site in members}) == 1
        assert sum(plan.cost_of(site).bytes_before for site in members) == rows * features * 4
        assert sum(plan.cost_of(site).bytes_after for site in members) == rows * features
    output = sites["self_attn.o_proj.weight"]
    assert output.placement == "late"
    assert plan.cost_of(output).bytes_before == plan.cost_of(output).bytes_after == rows * 64 * 4
    before = [(saved.shape, saved.dtype) for saved in plan.account.saved_before]
    after = [(saved.shape, saved.dtype) for saved in plan.account.saved_after]
    assert after.count((f"({rows}, 44)", "float32")) == 2  # z of down, in two layers
    assert after.count((f"({rows}, 16)", "float32")) == 5  # z of qkv and gate/up, and of lm_head
    assert len(after) == len(before)


@pytest.mark.parametrize(
    "rank", [0.5, 3, {"*q_proj*": 0.75, "*k_proj*": 0.5, "*v_proj*": 0.25, "*mlp*": 8}, 0.99]
)
@pytest.mark.parametrize("recompute", [True, False])
def test_never_more_bytes(
    make_llama, tokens, gradients_of, expected_gradients, relative_error, rank, recompute
):
    """Also with three ranks on one activation."""
    _, exact = gradients_of(make_llama(layers=1), tokens)
    settings = {"recompute": recompute, "inner": "aot_eager", "strict": True}
    backend = compact_backend(rank=rank, **COUNTSKETCH, **settings)
    _, compact = gradients_of(make_llama(layers=1), tokens, backend)
    (plan,) = backend.plans
    assert plan.sketched
    assert plan.account.bytes_after <= plan.account.bytes_before
    for name, gradient in expected_gradients(exact, backend).items():
        assert relative_error(compact[name], gradient) < 1e-4, name


def test_through_inductor(make_llama, tokens, gradients_of, expected_gradients, relative_error):
    """The generated code computes what the graphs say."""
    loss, exact = gradients_of(make_llama(layers=1), tokens)
    backend = compact_backend(rank=0.25, **COUNTSKETCH, strict=True)
    compact_loss, compact = gradients_of(make_llama(layers=1), tokens, backend)
    assert len(backend.plans[0].sketched) == 8
    assert compact_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected_gradients(exact, backend).items():
        assert relative_error(compact[name], gradient) < 1e-4, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("projection", ["gaussian", "countsketch"])
def test_on_cuda(
    make_llama, tokens, gradients_of, expected_gradients, relative_error, mode, projection
):
    """The same on a GPU, with CUDA graphs too, and over a change of projections."""
    tokens = tokens.cuda()
    reference, model = make_llama(layers=1).cuda(), make_llama(layers=1).cuda()
    settings = {"projection": projection, "update_interval": 2, "mode": mode}
    backend = compact_backend(rank=0.25, gradients="dense", strict=True, **settings)
    step = torch.compile(model, backend=backend)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, exact = gradients_of(reference, tokens)
    for steps in range(6):
        optimizer.zero_grad()
        output = step(input_ids=tokens, labels=tokens).loss
        output.backward()
        assert output.item() == pytest.approx(loss, rel=1e-4)
        for name, gradient in expected_gradients(
            {n: g.cpu() for n, g in exact.items()}, backend, steps // 2
        ).items():
            actual = model.get_parameter(name).grad.cpu()
            assert relative_error(actual, gradient) < 1e-2, name  # tf32 may be on
        optimizer.step()
