"""torchao's float8 training: weight gradients that are matmuls in bf16 or float32 are sketched."""

import dataclasses
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compact_fx import CompactAdamW, SketchedGrad, compact_backend, explain
from compact_fx.training.weights import known_record

logging.getLogger("torchao").setLevel(logging.ERROR)  # its extensions want a CUDA GPU
float8 = pytest.importorskip("torchao.float8")

HIGH_PRECISION = "rowwise_with_gw_hp"  # weight gradients in the model's own dtype
TENSORWISE = "tensorwise, weight gradients in the model's own dtype"  # docs/compatibility.md
EXACT = {"rank": 1.0, "projection": "orthogonal", "gradients": "dense"}
WEIGHTS = {"gate.weight", "up.weight", "down.weight"}


class Block(nn.Module):
    """A gated MLP: two weights on one activation, and one that is sketched on its output side."""

    def __init__(self, features=64, hidden=96):
        super().__init__()
        self.norm = nn.RMSNorm(features)
        self.gate = nn.Linear(features, hidden, bias=False)
        self.up = nn.Linear(features, hidden, bias=False)
        self.down = nn.Linear(hidden, features)

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def config_of(recipe):
    if recipe != TENSORWISE:
        return float8.Float8LinearConfig.from_recipe_name(recipe)
    off = float8.ScalingType.DISABLED
    return float8.Float8LinearConfig(
        cast_config_input_for_grad_weight=float8.CastConfig(scaling_type=off),
        cast_config_grad_output_for_grad_weight=float8.CastConfig(scaling_type=off),
    )


def make(recipe, dtype=torch.float32, emulate=True, **sizes):
    torch.manual_seed(0)
    model = Block(**sizes).to(dtype)
    config = config_of(recipe)
    config = dataclasses.replace(config, emulate=emulate)
    return float8.convert_to_float8_training(model, config=config)


def gradients_of(model, backend):
    """Loss, and the gradients of the input and of all weights."""
    shape = 4, 32, model.down.out_features
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x = x.to(model.gate.weight.dtype).requires_grad_()
    model.compile(backend=backend)
    loss = model(x).float().square().mean()
    loss.backward()
    named = {name: weight.grad for name, weight in model.named_parameters()}
    dense = {n: g.to_dense() if isinstance(g, SketchedGrad) else g for n, g in named.items()}
    return loss.item(), {"x": x.grad, **dense}


PLAIN = "aot_eager_decomp_partition"
"""Without this project: the same operators, cut by torch's own min-cut."""


def backend(**settings):
    return compact_backend(**{"inner": "aot_eager", "strict": True} | settings)


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (HIGH_PRECISION, torch.float32),
        (TENSORWISE, torch.float32),
        pytest.param(HIGH_PRECISION, torch.bfloat16, marks=pytest.mark.long),
        pytest.param("rowwise", torch.float32, marks=pytest.mark.long),
        pytest.param("tensorwise", torch.bfloat16, marks=pytest.mark.long),
    ],
)
def test_full_rank_gradients_are_those_of_the_float8_model(recipe, dtype, relative_error):
    """Emulated, every weight gradient is a product of what float8 made of its operands."""
    loss, expected = gradients_of(make(recipe, dtype), PLAIN)
    exact = backend(**EXACT)
    found, actual = gradients_of(make(recipe, dtype), exact)
    assert {site.weight for site in exact.plans[0].sketched} == WEIGHTS
    assert found == loss
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    for name, gradient in expected.items():
        if name in WEIGHTS:
            assert relative_error(actual[name].float(), gradient.float()) < tolerance, name
        else:
            assert torch.equal(actual[name], gradient), name


@pytest.mark.long
def test_drawn_projections_give_the_float8_models_gradient_projected(
    expected_gradients, relative_error
):
    _, exact = gradients_of(make(HIGH_PRECISION), PLAIN)
    quarter = backend(rank=0.25, gradients="dense", projection="gaussian")
    _, actual = gradients_of(make(HIGH_PRECISION), quarter)
    expected = expected_gradients(exact, quarter)
    for name, gradient in exact.items():
        if name in WEIGHTS:
            assert relative_error(actual[name], expected[name]) < 1e-5, name
        else:
            assert torch.equal(actual[name], gradient), name


@pytest.mark.parametrize(
    ("recipe", "dtype", "emulate"),
    [(HIGH_PRECISION, torch.float32, True), (TENSORWISE, torch.bfloat16, False)],
)
def test_tracked_projections_on_both_sides(relative_error, recipe, dtype, emulate):
    """And again after a step, with the weights' new float8 values and a changed projection."""
    model, reference = (make(recipe, dtype, emulate) for _ in range(2))
    tolerance = 1e-5 if dtype == torch.float32 else 0.01
    quarter = backend(rank=0.25, update_interval=1)
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(2):
        reference.load_state_dict(model.state_dict())
        reference.zero_grad()
        _, exact = gradients_of(reference, PLAIN)
        loss, actual = gradients_of(model, quarter)
        for name, gradient in exact.items():
            if name not in WEIGHTS:
                assert torch.equal(actual[name], gradient), name
                continue
            weight = model.get_parameter(name)
            (followed,) = known_record(weight).group.root().followed.values()
            p = followed.version.matrix
            p, gradient = p.float(), gradient.float()
            projected = p @ p.T @ gradient if name == "down.weight" else gradient @ p @ p.T
            assert relative_error(actual[name].float(), projected) < tolerance, name
        losses.append(loss)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert followed.version.generation == 1
    sides = {site.weight: site.side for site in quarter.plans[0].sketched}
    assert sides == {"gate.weight": "input", "up.weight": "input", "down.weight": "output"}


@pytest.mark.long
def test_what_crosses_in_8_bits(relative_error):
    sizes = {"features": 128, "hidden": 256}
    loss, expected = gradients_of(make(HIGH_PRECISION, **sizes), PLAIN)
    packed = backend(**EXACT, saved="int8")
    found, actual = gradients_of(make(HIGH_PRECISION, **sizes), packed)
    assert found == loss
    account = packed.plans[0].account
    assert account.bytes_after < 0.5 * account.bytes_before
    assert 0 < max(relative_error(actual[name], expected[name]) for name in expected) < 0.05


@pytest.mark.long
@pytest.mark.parametrize("recipe", [HIGH_PRECISION, TENSORWISE, "rowwise", "tensorwise"])
def test_products_in_float8_are_left_alone(recipe):
    """Not emulated: shapes alone, since not every torch has these kernels for a CPU."""
    model = make(recipe, torch.bfloat16, emulate=False)
    x = torch.randn(4, 32, 64, dtype=torch.bfloat16)
    report = explain(model, x, rank=0.25).report
    (plan,) = report.plans
    if recipe in (HIGH_PRECISION, TENSORWISE):
        assert {site.weight for site in plan.sketched} == WEIGHTS
        return
    assert not plan.sketched
    for site in plan.sites:
        assert site.reason.startswith("its matmul is in float8_e")
        assert site.reason.endswith(": aten._scaled_mm.default")


@pytest.mark.long
def test_inductor_compiles_it(relative_error):
    """Other fused sums round some values to the next one of float8."""
    loss, expected = gradients_of(make(HIGH_PRECISION), PLAIN)
    exact = backend(**EXACT, inner="inductor")
    found, actual = gradients_of(make(HIGH_PRECISION), exact)
    assert found == pytest.approx(loss, rel=1e-3)
    for name, gradient in expected.items():
        assert relative_error(actual[name], gradient) < 0.02, name
