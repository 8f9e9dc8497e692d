"""Sketched optimizers: the paper's algorithms, memory, state, and any class of optimizer."""

import argparse
import ast
import copy
import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compact_fx import CompactAdamW, SketchedGrad, compact_backend, compact_optimizer
from compact_fx.projections import DrawnBasis, Projection
from compact_fx.training.gradients import ConsumedGrad
from compact_fx.training.weights import steps_of

SIZES = ((64, 96), (96, 32), (32, 8))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in SIZES]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2])


def batch(step: int = 0) -> Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(step))


def backend(**settings):
    defaults = {"rank": 0.25, "gradients": "sketched", "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


def train(model, compact, optimizer, steps, clip=None, first=0):
    """Losses of some steps."""
    step, losses = torch.compile(model, backend=compact), []
    for number in range(first, first + steps):
        optimizer.zero_grad()
        loss = (step(batch(number)) - 1).pow(2).mean()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


class ReferenceLinear(torch.autograd.Function):
    """Algorithms 1 and 2 as the paper writes them: y = x W, keep z = x P, Ĝ = zᵀ dy."""

    @staticmethod
    def forward(ctx, x, w, p, factors, name):
        ctx.save_for_backward(x @ p, w)
        ctx.factors, ctx.name = factors, name
        return x @ w

    @staticmethod
    def backward(ctx, dy):
        z, w = ctx.saved_tensors
        ctx.factors[ctx.name] = z.T @ dy
        return dy @ w.T, None, None, None, None


def test_equals_the_papers_algorithms():
    """20 steps over one change of projections, by hand and through the compiler, float32."""
    lr, scale, decay, interval, steps = 1e-2, 0.25, 0.1, 11, 20
    beta1, beta2, eps = 0.9, 0.999, 1e-8
    model, compact = mlp(), backend(update_interval=interval, seed=5)
    optimizer = CompactAdamW(model.parameters(), lr=lr, weight_decay=decay, scale=scale)

    reference = mlp()
    weights = {n: w.detach().T.clone() for n, w in reference.named_parameters() if w.dim() == 2}
    biases = [w for n, w in reference.named_parameters() if w.dim() == 1]
    bias_optimizer = torch.optim.AdamW(biases, lr=lr, weight_decay=decay)
    moments = {}

    train(model, compact, optimizer, steps)
    plan = compact.plans[0]
    sites = {site.weight: site for site in plan.sketched}
    assert set(sites) == set(weights)

    def projection(name, generation):
        return plan.projections[sites[name].projection](5, generation)

    for number in range(steps):
        factors: dict[str, Tensor] = {}
        h, activations = batch(number), [torch.relu, torch.tanh, lambda y: y]
        for (name, w), bias, act in zip(weights.items(), biases, activations, strict=True):
            p = projection(name, number // interval)
            h = act(ReferenceLinear.apply(h.requires_grad_(), w, p, factors, name) + bias)
        bias_optimizer.zero_grad()
        (h - 1).pow(2).mean().backward()
        bias_optimizer.step()
        for name, g in factors.items():  # Algorithm 3, with decoupled weight decay on W itself
            p = projection(name, number // interval)
            m, v = moments.get(name, (torch.zeros_like(g), torch.zeros_like(g)))
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            moments[name] = m, v
            m_hat, v_hat = m / (1 - beta1 ** (number + 1)), v / (1 - beta2 ** (number + 1))
            update = p @ (m_hat / (v_hat.sqrt() + eps))
            weights[name] = (1 - lr * decay) * weights[name] - lr * scale * update
    for name, w in weights.items():
        actual = model.get_parameter(name).detach().T
        assert (actual - w).norm() / w.norm() < 1e-4, name
        change = w - mlp().get_parameter(name).T
        assert (actual - w).norm() / change.norm() < 1e-3, name
    assert not torch.equal(projection("0.weight", 0), projection("0.weight", 1))


def test_dense_weights_get_exactly_adamw():
    """Without sketches it is torch's optimizer, bit for bit."""
    models = [mlp(), mlp()]
    optimizers = [
        CompactAdamW(models[0].parameters(), lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(models[1].parameters(), lr=1e-2, weight_decay=0.1),
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        for number in range(5):
            optimizer.zero_grad()
            model(batch(number)).pow(2).mean().backward()
            optimizer.step()
    for mine, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(mine, other)


def test_full_orthogonal_rank_without_decay_follows_sgd():
    """P Pᵀ = I: SGD with momentum on factors is SGD with momentum."""
    models, results = (mlp(), mlp()), []
    sketched = compact_optimizer(torch.optim.SGD, models[0].parameters(), lr=0.1, momentum=0.9)
    train(models[0], backend(rank=1.0, projection="orthogonal"), sketched, 8)
    exact = torch.optim.SGD(models[1].parameters(), lr=0.1, momentum=0.9)
    train(models[1], "eager", exact, 8)
    results = [[w.detach() for w in model.parameters()] for model in models]
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


def test_memory_is_that_of_factors():
    """Gradients Σ r·m, states 2 Σ r·m; nothing of size m·n beside the weights."""
    model, compact = mlp(), backend()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    train(model, compact, optimizer, 2)
    factors = {n: m * n // 4 for n, m in SIZES}
    for index, (n, m) in zip((0, 2, 4), SIZES, strict=True):
        weight = model[index].weight
        assert isinstance(weight.grad, SketchedGrad)
        assert weight.grad.factor.numel() == factors[n]
        assert weight.grad.factor.untyped_storage().nbytes() == factors[n] * 4
        moments = [optimizer.state[weight][name] for name in ("exp_avg", "exp_avg_sq")]
        assert [moment.shape for moment in moments] == [(m, n // 4)] * 2
    held = sum(
        v.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for k, v in state.items()
        if isinstance(v, Tensor) and k != "step" and not k.startswith("projection_")
    )
    biases = sum(m for _, m in SIZES)
    assert held == 2 * 4 * (sum(factors.values()) + biases)


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
        (torch.optim.Adam, {"lr": 1e-2}),
        (torch.optim.Adafactor, {"lr": 0.5}),
        (torch.optim.RMSprop, {"lr": 1e-3}),
    ],
)
def test_any_class_steps_the_factors(optimizer_class, settings):
    """One step equals the class's own step on zeros with the factor as gradient, expanded."""
    model = mlp()
    optimizer = compact_optimizer(optimizer_class, model.parameters(), scale=0.5, **settings)
    step = torch.compile(model, backend=backend())
    (step(batch()) - 1).pow(2).mean().backward()
    before = [w.detach().clone() for w in model.parameters()]
    gradients = [w.grad for w in model.parameters()]
    stand_ins = [g.factor if isinstance(g, SketchedGrad) else g for g in gradients]
    params = [
        nn.Parameter(torch.zeros_like(s) if isinstance(g, SketchedGrad) else w.clone())
        for s, g, w in zip(stand_ins, gradients, before, strict=True)
    ]
    for param, stand_in in zip(params, stand_ins, strict=True):
        param.grad = stand_in.clone()
    optimizer.step()
    optimizer_class(params, **settings).step()
    rows = zip(model.parameters(), before, params, gradients, strict=True)
    for weight, old, param, gradient in rows:
        if isinstance(gradient, SketchedGrad):
            update = param.detach()
            if optimizer_class is torch.optim.Adafactor:  # relative to the weight, at least 1e-3
                update = update * max(old.square().mean().sqrt().item(), 1e-3) / 1e-3
            expected = old + 0.5 * gradient.basis.expand(update)
        else:
            expected = param
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(weight, old)


class Lion(torch.optim.Optimizer):
    """An optimizer that torch does not have (Chen et al., 2023)."""

    def __init__(self, params, lr=1e-3, beta=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(group["lr"] * torch.sign(torch.lerp(p.grad, m, group["beta"])))
                    m.lerp_(p.grad, 1 - group["beta"])


def test_a_class_from_outside_of_torch():
    """It trains; weight decay of an unknown kind is asked about."""
    model = mlp()
    optimizer = compact_optimizer(Lion, model.parameters(), lr=3e-3)
    losses = train(model, backend(), optimizer, 40)
    assert losses[-1] < 0.5 * losses[0]
    with pytest.raises(ValueError, match=r"weight_decay=0\.1.*decoupled_weight_decay=True"):
        compact_optimizer(Lion, mlp().parameters(), weight_decay=0.1)
    model = mlp()
    optimizer = compact_optimizer(
        Lion, model.parameters(), lr=1e-2, weight_decay=0.5, decoupled_weight_decay=True
    )
    old = model[0].weight.detach().clone()
    train(model, backend(), optimizer, 1)
    gradient = model[0].weight.grad
    expected = (1 - 0.005) * old - 1e-2 * gradient.basis.expand(torch.sign(gradient.factor))
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_coupled_weight_decay_goes_through_the_sketch():
    """L2 on W is wd · W P in the space of the factor; at full orthogonal rank it is exact."""
    models = mlp(), mlp()
    mine = compact_optimizer(torch.optim.SGD, models[0].parameters(), lr=0.1, weight_decay=0.3)
    train(models[0], backend(rank=1.0, projection="orthogonal"), mine, 4)
    train(models[1], "eager", torch.optim.SGD(models[1].parameters(), lr=0.1, weight_decay=0.3), 4)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_group_options():
    """scale and dense_scale of a group; learning-rate schedulers act on it."""
    model = mlp()
    groups = [
        {"params": [model[0].weight], "scale": 2.0},
        {"params": [model[2].weight, model[2].bias], "dense_scale": 0.5},
    ]
    optimizer = CompactAdamW(groups, lr=1e-2, scale=0.25, weight_decay=0.0)
    assert [g["scale"] for g in optimizer.param_groups] == [2.0, 0.25]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    old = copy.deepcopy(model)
    train(model, backend(), optimizer, 1)
    # The first update of Adam is lr · g / (|g| + eps).
    gradient = model[0].weight.grad
    update = gradient.basis.expand(gradient.factor / (gradient.factor.abs() + 1e-8))
    change = model[0].weight - old[0].weight
    torch.testing.assert_close(change, -1e-2 * 2.0 * update, rtol=1e-3, atol=1e-6)
    update = model[2].bias.grad / (model[2].bias.grad.abs() + 1e-8)
    torch.testing.assert_close(model[2].bias - old[2].bias, -0.5e-2 * update, rtol=1e-3, atol=1e-6)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_groups_that_come_later():
    """add_param_group, and a state of groups that know nothing of scales."""
    model = mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, scale=0.5)
    train(model, backend(), optimizer, 2)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    assert optimizer.param_groups[-1]["scale"] == 0.5
    train(model, backend(), optimizer, 1)
    assert optimizer.state[model[0].weight]["step"].item() == 3
    with pytest.raises(ValueError, match="scale=-1 must be a finite number > 0"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "scale": -1})
    model = mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    optimizer.load_state_dict(torch.optim.AdamW(model.parameters(), lr=1e-2).state_dict())
    train(model, backend(), optimizer, 1)


def test_a_failing_inner_step_keeps_the_state(monkeypatch):
    """State and groups are as before, whatever the inner optimizer raises."""
    model = mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    train(model, backend(), optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())

    def fail(_):
        raise RuntimeError("planted")

    monkeypatch.setattr(CompactAdamW, "_inner_step", staticmethod(fail))
    with pytest.raises(RuntimeError, match="planted"):
        optimizer.step()
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][index][name])


@pytest.mark.parametrize("refresh", ["keep", "project", "reset"])
def test_refresh(refresh):
    """What happens to the moments when the projection changes."""
    model, compact = mlp(), backend(update_interval=3)
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, refresh=refresh, betas=(0.9, 0.99))
    train(model, compact, optimizer, 3)
    weight = model[0].weight
    state = {
        k: v.clone() if isinstance(v, Tensor) else v for k, v in optimizer.state[weight].items()
    }
    basis = weight.grad.basis
    train(model, compact, optimizer, 1, first=3)
    new, gradient = optimizer.state[weight], weight.grad
    assert gradient.basis.key != basis.key
    change = basis.matrix(weight.device, weight.dtype).T @ gradient.basis.matrix(
        weight.device, weight.dtype
    )
    kept = {
        "keep": state["exp_avg"],
        "project": state["exp_avg"] @ change,
        "reset": torch.zeros_like(state["exp_avg"]),
    }[refresh]
    expected = 0.9 * kept + 0.1 * gradient.factor
    torch.testing.assert_close(new["exp_avg"], expected, rtol=1e-4, atol=1e-7)
    assert new["step"].item() == (1 if refresh == "reset" else 4)


def test_resume_in_the_middle_of_an_interval_is_bit_equal():
    """Save with torch.save, load with weights_only=True, go on: the losses are the same."""
    model, settings = mlp(), {"update_interval": 5, "seed": 2}
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, scale=0.5)
    train(model, backend(**settings), optimizer, 7)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, backend(**settings), optimizer, 6, clip=1.0, first=7)

    torch._dynamo.reset()
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for state in saved["optimizer"]["state"].values():
        assert all(isinstance(value, Tensor | int | float) for value in state.values())
    resumed = mlp()
    resumed.load_state_dict(saved["model"])
    optimizer = CompactAdamW(resumed.parameters(), lr=1e-2, scale=0.5)
    optimizer.load_state_dict(saved["optimizer"])
    assert steps_of(resumed[0].weight) == 7
    assert train(resumed, backend(**settings), optimizer, 6, clip=1.0, first=7) == expected


def test_distributed_checkpoint_round_trip(tmp_path):
    """torch.distributed.checkpoint saves and loads the state."""
    import torch.distributed.checkpoint as dcp

    model = mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    train(model, backend(), optimizer, 3)
    state = {"optimizer": optimizer.state_dict()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    other_model = mlp()
    other = CompactAdamW(other_model.parameters(), lr=1e-2)
    train(other_model, backend(), other, 1)
    loaded = {"optimizer": other.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(loaded["optimizer"])
    weights = zip(model.parameters(), other_model.parameters(), strict=True)
    for mine, theirs in weights:
        for name, value in optimizer.state[mine].items():
            assert torch.equal(value, other.state[theirs][name])
    assert steps_of(other_model[0].weight) == 3


@pytest.mark.parametrize("draw", [1, 2])
def test_no_state_is_lost_where_memory_runs_out(monkeypatch, draw):
    """While moments are carried to a new projection."""
    model = mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, refresh="project")
    train(model, backend(update_interval=2), optimizer, 2)
    before = {w: optimizer.state[w]["exp_avg"].clone() for w in model.parameters()}
    bases = dict(optimizer._bases)
    original, calls = DrawnBasis.change_to, []

    def change_to(basis, other, factor):
        calls.append(basis)
        if len(calls) == draw:
            raise torch.OutOfMemoryError
        return original(basis, other, factor)

    with monkeypatch.context() as patch:
        patch.setattr(DrawnBasis, "change_to", change_to)
        with pytest.raises(torch.OutOfMemoryError):
            train(model, backend(update_interval=2), optimizer, 1)
    for weight in model.parameters():  # each moment is in the basis that its state has
        expected = before[weight]
        if weight in bases and optimizer._bases[weight] != bases[weight]:
            expected = bases[weight].change_to(optimizer._bases[weight], expected)
        assert torch.equal(optimizer.state[weight]["exp_avg"], expected)
    assert sum(optimizer._bases[w] != bases[w] for w in bases) == draw - 1
    train(model, backend(update_interval=2), optimizer, 1)


@pytest.mark.parametrize("optimizer_class", ["adam", torch.nn.Linear, None])
def test_what_is_no_class_of_optimizers_is_refused(optimizer_class):
    with pytest.raises(TypeError, match=r"optimizer_class=.* must be a class of optimizers"):
        compact_optimizer(optimizer_class, mlp().parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0.5}, r"\(\d\.weight\) has rank=16, its gradient has rank=32"),
        ({"projection": "sparse"}, r"has kind=countsketch, its gradient has kind=sparse"),
        ({"gradients": "dense"}, None),
    ],
)
def test_state_of_other_settings(settings, message):
    """Another rank or kind says what differs, and nothing has been changed."""
    model = mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    train(model, backend(), optimizer, 2)
    torch._dynamo.reset()
    weights = [w.detach().clone() for w in model.parameters()]
    if message is None:
        with pytest.raises(ValueError, match="its state is sketched"):
            train(model, backend(**settings), optimizer, 1)
    else:
        with pytest.raises(ValueError, match=message):
            train(model, backend(**settings), optimizer, 1)
    for weight, old in zip(model.parameters(), weights, strict=True):
        assert torch.equal(weight, old)


def test_state_dtype():
    """Moments in another type survive a round trip in it."""
    model = mlp().bfloat16()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, state_dtype=torch.float32)
    step = torch.compile(model, backend=backend())
    step(batch().bfloat16()).pow(2).mean().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg"].dtype is torch.float32
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.state[model[0].weight]["exp_avg"].dtype is torch.float32


def test_step_in_backward():
    """The same weights as stepping afterwards; factors are gone; misuse raises."""
    models = mlp(), mlp()
    after = CompactAdamW(models[0].parameters(), lr=1e-2, scale=0.5)
    during = CompactAdamW(models[1].parameters(), lr=1e-2, scale=0.5, step_in_backward=True)
    train(models[0], backend(), after, 5)
    torch._dynamo.reset()
    train(models[1], backend(), during, 5)
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

    model, step = models[1], torch.compile(models[1], backend=backend())
    step(batch()).pow(2).mean().backward()
    assert all(isinstance(w.grad, ConsumedGrad) for w in model.parameters())
    with pytest.raises(RuntimeError, match="step_in_backward"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with pytest.raises(RuntimeError, match="step_in_backward"):
        step(batch()).pow(2).mean().backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": "flip"}, "refresh='flip' must be one of 'keep', 'project', 'reset'"),
        ({"scale": 0.0}, "scale=0.0 must be a finite number > 0"),
        ({"scale": math.inf}, "scale=inf must be a finite number > 0"),
        ({"dense_scale": True}, "dense_scale=True must be a finite number > 0"),
        ({"scale": "1"}, "scale='1' must be a finite number > 0"),
        ({"state_dtype": torch.int32}, "state_dtype=torch.int32 must be a floating-point type"),
        ({"state_dtype": torch.float8_e4m3fn}, 'of 16 bits or more, None, or "fp8" for 8 bits'),
    ],
)
def test_bad_settings(settings, message):
    """Errors name the setting, the value and what is allowed."""
    with pytest.raises(ValueError, match=message):
        CompactAdamW(mlp().parameters(), **settings)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_step_in_backward_is_a_bool(value):
    with pytest.raises(TypeError, match=f"step_in_backward={value!r} must be a bool"):
        CompactAdamW(mlp().parameters(), step_in_backward=value)


def test_a_state_that_the_class_cannot_take_changes_nothing():
    """AdamW itself looks for `step` when it has the state already."""
    model = mlp()
    optimizer = CompactAdamW(model.parameters())
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(saved)
    del damaged["state"][1]["step"]
    with pytest.raises(KeyError, match="step"):
        optimizer.load_state_dict(damaged)
    after = optimizer.state_dict()
    assert after["param_groups"] == saved["param_groups"]
    for number, state in saved["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][number][name]), value), name
    optimizer.step()


@pytest.mark.long
def test_trains_a_llama_like_the_dense_baseline(make_llama):
    """300 steps of a LLaMA on Python sources: within 10 % of dense training's loss drop."""
    text = b"".join(Path(m.__file__).read_bytes() for m in (argparse, ast, copy, pytest, shutil))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def losses(compiled_with, make_optimizer):
        torch._dynamo.reset()
        model = make_llama()
        optimizer = make_optimizer(model.parameters())
        step = model if compiled_with is None else torch.compile(model, backend=compiled_with)
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(300):
            start = torch.randint(0, len(data) - 32, (8, 1), generator=generator)
            tokens = data[start + torch.arange(32)]
            optimizer.zero_grad()
            loss = step(input_ids=tokens, labels=tokens).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return sum(found[:5]) / 5, sum(found[-20:]) / 20

    first, dense = losses(None, lambda w: torch.optim.AdamW(w, lr=3e-3))
    _, sketched = losses(backend(), lambda w: CompactAdamW(w, lr=3e-3, scale=0.5))
    assert dense < 0.6 * first  # it learns at all
    assert first - sketched > 0.9 * (first - dense)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("fused", [False, True])
def test_on_cuda(fused):
    """Through Inductor in bf16, with the allocator as the judge of what is held."""
    torch.manual_seed(0)
    n = 1024
    model = nn.Sequential(*(nn.Linear(n, n, bias=False) for _ in range(4))).cuda().bfloat16()
    settings = {"gradients": "sketched", "projection": "countsketch", "update_interval": 3}
    compact = compact_backend(rank=0.25, strict=True, **settings)
    step = torch.compile(model, backend=compact)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3, fused=fused)
    x = torch.randn(512, n, device="cuda", dtype=torch.bfloat16)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (step(x) - x).float().pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    held = torch.cuda.memory_allocated()
    optimizer.zero_grad()
    optimizer.state.clear()
    del loss
    freed = held - torch.cuda.memory_allocated()
    factors = 4 * n * n // 4 * 2
    assert 3 * factors <= freed <= 3 * factors + 2**20


# ---------------------------------------------------------------------------------------------
# Experts: a batch of matrices with one projection
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refresh", ["keep", "project", "reset"])
@pytest.mark.parametrize("last", [True, False])
def test_a_batch_of_experts_is_stepped_matrix_by_matrix(refresh, last):
    """Over a change of the projection, with weight decay: each expert as if it were alone."""
    torch.manual_seed(0)
    start = torch.randn(3, 6, 16) if last else torch.randn(3, 16, 6)
    together = nn.Parameter(start.clone())
    alone = [nn.Parameter(matrix.clone()) for matrix in start]
    settings = {"lr": 1e-2, "weight_decay": 0.1, "scale": 0.5, "refresh": refresh}
    optimizers = CompactAdamW([together], **settings), CompactAdamW(alone, **settings)
    projection = Projection(salt=1, features=16, rank=4, kind="gaussian", dtype=torch.float32)
    for step in range(5):
        factor = torch.randn((3, 6, 4) if last else (3, 4, 6))
        basis = DrawnBasis(projection=projection, seed=0, generation=step // 3, dim=1 + last)
        together.grad = SketchedGrad(factor.clone(), basis)
        for weight, own in zip(alone, factor, strict=True):
            weight.grad = SketchedGrad(own.clone(), replace(basis, dim=int(last)))
        for optimizer in optimizers:
            optimizer.step()
    for weight, own in zip(together, alone, strict=True):
        torch.testing.assert_close(weight, own)
    assert optimizers[0].state[together]["exp_avg"].shape == factor.shape


@pytest.mark.parametrize("maximize", [False, True])
def test_coupled_weight_decay_has_its_sign(maximize):
    """At full orthogonal rank: what torch.optim.SGD does."""
    settings = {"lr": 0.1, "weight_decay": 0.5, "maximize": maximize}
    models = mlp(), mlp()
    full = backend(rank=1.0, projection="orthogonal")
    steps = models[0], torch.compile(models[1], backend=full)
    optimizers = (
        torch.optim.SGD(models[0].parameters(), **settings),
        compact_optimizer(torch.optim.SGD, models[1].parameters(), **settings),
    )
    for _ in range(3):
        for step, optimizer in zip(steps, optimizers, strict=True):
            optimizer.zero_grad()
            step(batch()).pow(2).mean().backward()
            optimizer.step()
    for expected, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_resuming_keeps_the_position_of_dense_weights():
    """A weight whose gradient is dense is sketched in the graph all the same."""

    def start():
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(48, 64))

        def function(x):  # its transpose is reshaped on the way: a dense gradient
            return x @ weight.t().reshape(64, 48)

        step = torch.compile(function, backend=backend(update_interval=2, strict=False))
        return weight, step, CompactAdamW([weight], lr=0.1)

    def train(weight, step, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            step(batch()).pow(2).mean().backward()
            optimizer.step()

    weight, step, optimizer = start()
    train(weight, step, optimizer, 3)
    saved, kept = optimizer.state_dict(), weight.detach().clone()
    saved = copy.deepcopy(saved)
    train(weight, step, optimizer, 3)
    torch._dynamo.reset()
    other, step, optimizer = start()
    with torch.no_grad():
        other.copy_(kept)
    optimizer.load_state_dict(saved)
    train(other, step, optimizer, 3)
    assert torch.equal(other, weight)


def test_step_in_backward_counts_steps_without_step():
    """`zero_grad` alone is allowed after each backward: projections change then too."""
    model = mlp()
    step = torch.compile(model, backend=backend(update_interval=2))
    optimizer = CompactAdamW(model.parameters(), lr=1e-2, step_in_backward=True)
    for _ in range(3):
        step(batch()).pow(2).mean().backward()
        optimizer.zero_grad()
    assert steps_of(model[0].weight) == 3
    step(batch()).pow(2).mean().backward()
    optimizer.step()
    assert steps_of(model[0].weight) == 4


class CountingInGroups(torch.optim.Optimizer):
    """Keeps its step count in the group, as some fused optimizers do."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            assert group["params"][0].device.type == "cpu"
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.lerp_(p.grad, 0.1)
                    p.sub_(m / (1 - 0.9 ** group["step"]), alpha=group["lr"])


def test_what_a_class_writes_into_its_groups_is_kept():
    """Its update is linear, so that at full orthogonal rank it is the class's own."""
    models = mlp(), mlp()
    mine = compact_optimizer(CountingInGroups, models[0].parameters())
    train(models[0], backend(rank=1.0, projection="orthogonal"), mine, 5)
    train(models[1], "eager", CountingInGroups(models[1].parameters()), 5)
    assert mine.param_groups[0]["step"] == 5
    for a, b in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.SGD])
def test_factors_of_any_layout_are_stepped_alike(optimizer_class):
    """Fused kernels read gradients and moments as they lie in memory."""
    projection = Projection(salt=1, features=16, rank=4, kind="gaussian", dtype=torch.float32)
    basis = DrawnBasis(projection=projection, seed=0, generation=0, dim=1)
    settings = {"momentum": 0.9} if optimizer_class is torch.optim.SGD else {}
    weights = []
    for fused in (False, True):
        weight = nn.Parameter(torch.zeros(6, 16))
        optimizer = compact_optimizer(optimizer_class, [weight], lr=0.1, fused=fused, **settings)
        generator = torch.Generator().manual_seed(0)
        for step in range(4):
            factor = torch.randn(4, 6, generator=generator).T
            weight.grad = SketchedGrad(factor if step % 2 else factor.contiguous(), basis)
            optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(weights[0], weights[1])
