"""Training with what crosses in 8 bits: losses are exact, gradients nearly, on real models."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from compact_fx import CompactAdamW, SketchedGrad, compact_backend

EXACT = {"rank": 1.0, "projection": "orthogonal", "gradients": "dense", "strict": True}
DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn"}


def gradients_of(model, tokens, backend=None):
    """Loss, the gradient of the embedded tokens, and those of all weights."""
    step = model if backend is None else torch.compile(model, backend=backend)
    model.zero_grad()
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    loss = step(inputs_embeds=embedded, labels=tokens).loss
    loss.backward()
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    dense = {n: g.to_dense() if isinstance(g, SketchedGrad) else g for n, g in named.items()}
    return loss.item(), {"embedded": embedded.grad, **dense}


@pytest.fixture
def wide_llama(make_llama):
    """Two layers whose tensors are large enough to be packed."""
    return make_llama(layers=2, hidden_size=128, intermediate_size=352)


@pytest.mark.parametrize(
    ("kind", "inner"),
    [
        ("int8", "aot_eager"),
        pytest.param("fp8", "aot_eager", marks=pytest.mark.long),
        pytest.param("int8", "inductor", marks=pytest.mark.long),
    ],
)
def test_gradients_are_within_five_percent_in_every_layer(wide_llama, tokens, kind, inner):
    loss, expected = gradients_of(wide_llama, tokens)
    backend = compact_backend(**EXACT, saved=kind, inner=inner)
    found, actual = gradients_of(wide_llama, tokens, backend)
    assert found == pytest.approx(loss, rel=1e-5)
    (plan,) = backend.plans
    assert plan.account.bytes_after < 0.45 * plan.account.bytes_before
    for name, gradient in expected.items():
        if kind == "fp8" and "proj" in name:  # of q and k: a small difference of large terms
            continue
        assert (actual[name] - gradient).norm() < 0.05 * gradient.norm(), name
    assert (actual["embedded"] - expected["embedded"]).norm() > 0
    assert f"{DTYPES[kind]} (" in str(backend.report())


def layers(*biases: float) -> list[nn.Linear]:
    """Of 128 features, with these added to their biases."""
    torch.manual_seed(0)
    made = [nn.Linear(128, 128) for _ in biases]
    for layer, bias in zip(made, biases, strict=True):
        layer.bias.data += bias
    return made


def sample() -> torch.Tensor:
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(1))


def near_target(prepare=lambda x: x):
    """Of a prediction that something else reads as well: in the loss its rounding would stay."""
    a, b = layers(0, 0)
    predict = lambda h: b(torch.tanh(a(h)))  # noqa: E731
    target = predict(prepare(sample())).detach()
    target = target + 0.01 * torch.randn(128, 128, generator=torch.Generator().manual_seed(2))

    def function(h):
        y = predict(h)
        return F.mse_loss(y, target) + 1e-5 * y.square().mean()

    return function


def near_target_in_a_checkpoint():
    (z,) = layers(0)
    return in_a_checkpoint(z, near_target(lambda x: z(x) + x))


def sine_behind_a_matmul():
    z, a = layers(0, 0)
    return in_a_checkpoint(z, lambda h: torch.sin(100 * a(h)).square().mean())


def in_a_checkpoint(z, inner):
    return lambda x: checkpoint(inner, z(x) + x, use_reentrant=False)


def saturated(activation):
    a, b = layers(5, 0)
    return lambda x: b(activation(a(x))).square().mean()


def truncated():
    a, b, c = layers(0, 0, 0)

    def function(x):
        y = (3 * a(x)).round()
        return c(y.detach().long() * torch.tanh(b(x)) + b(y)).square().mean()

    return function


def routed():
    z, e, u = layers(0, 0, 0)
    weights = torch.randn(128, 128, 16, generator=torch.Generator().manual_seed(2))

    def experts(h):
        value, chosen = e(h).softmax(-1).max(-1)
        gates = F.one_hot(chosen, 128) * value[:, None]
        return torch.einsum("te,tf,efd->td", gates, F.silu(u(h)), weights).square().mean()

    return in_a_checkpoint(z, experts)


AMPLIFIED = {  # what would make much more of a rounding
    "a loss near its target": near_target,
    "the same in a checkpoint": near_target_in_a_checkpoint,
    "a saturated tanh": lambda: saturated(torch.tanh),
    "a saturated sigmoid": lambda: saturated(torch.sigmoid),
    "a cast to integers": truncated,
    "a sine behind a matmul": sine_behind_a_matmul,
    "a choice of experts": routed,
}


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", AMPLIFIED)
def test_what_makes_more_of_a_rounding_is_kept(case, kind):
    def gradient(**settings):
        torch._dynamo.reset()
        x = sample().requires_grad_()
        function = AMPLIFIED[case]()
        if settings:
            backend = compact_backend(**EXACT, **settings, inner="aot_eager")
            function = torch.compile(function, backend=backend)
        function(x).backward()
        return x.grad

    expected = gradient()
    assert (gradient(saved=kind) - expected).norm() < 0.05 * expected.norm()


def test_it_trains_alike(wide_llama, make_llama, tokens):
    def train(**settings):
        torch._dynamo.reset()
        model = make_llama(layers=1, hidden_size=128, intermediate_size=352)
        backend = compact_backend(**settings, inner="aot_eager", strict=True, update_interval=8)
        step = torch.compile(model, backend=backend)
        optimizer = CompactAdamW(model.parameters(), lr=2e-3)
        losses = []
        for _ in range(24):
            loss = step(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    kept, packed = train(), train(saved="int8")
    assert kept[-1] < 0.8 * kept[0]
    assert packed[0] == pytest.approx(kept[0], rel=1e-5)
    assert packed[-1] == pytest.approx(kept[-1], rel=0.02)
    assert packed != kept
