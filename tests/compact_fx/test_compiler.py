"""One graph's way: what fails for one weight leaves the others as they are."""

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

from compact_fx import CannotCompact, compact_backend
from compact_fx.passes import expand_projections, find_weight_grads, list_sites
from compact_fx.passes import rewrite_weight_grads as rewriting


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Tanh(), nn.Linear(32, 8)
    )


def batch() -> torch.Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(2))


def backend(**settings):
    exact = {"rank": 1.0, "gradients": "dense", "projection": "orthogonal"}
    return compact_backend(**exact | {"inner": "aot_eager"} | settings)


def failing(original, fails):
    """The function, failing for some of its calls."""

    def run(*args, **kwargs):
        if fails(*args, **kwargs):
            raise KeyError("planted")
        return original(*args, **kwargs)

    return run


# Where a pass fails for the second weight, (32, 96).
FAULTS = {
    "find_weight_grads": (
        find_weight_grads._Finder,
        "uses",
        lambda _, gradient: tuple(gradient.meta["val"].shape) == (32, 96),
    ),
    "list_sites": (list_sites, "_site", lambda bare, *_: bare.weight == "2.weight"),
    "rewrite_weight_grads": (
        rewriting,
        "_sketch",
        lambda graph, use, site, *_: site.weight == "2.weight",
    ),
    "expand_projections": (
        expand_projections._Inliner,
        "__call__",
        lambda _, function, projection, *__: projection.meta["compact_fx.weight"] == "2.weight",
    ),
}


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_weight_that_a_pass_fails_for_is_left_alone(monkeypatch, caplog, name, gradients):
    """The warning names pass and weight, the log has the traceback, and gradients are right."""
    owner, function, fails = FAULTS[name]
    monkeypatch.setattr(owner, function, failing(getattr(owner, function), fails))
    caplog.set_level(logging.INFO, logger="compact_fx.errors")
    model, reference, compact = mlp(), mlp(), backend(gradients=gradients)
    with pytest.warns(UserWarning, match=f"2.weight is left without a sketch: KeyError in {name}"):
        torch.compile(model, backend=compact)(batch()).pow(2).mean().backward()
    reference(batch()).pow(2).mean().backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        actual = mine.grad.to_dense() if hasattr(mine.grad, "basis") else mine.grad
        torch.testing.assert_close(actual, other.grad, rtol=1e-4, atol=1e-6)
    (plan,) = compact.plans
    assert {site.weight for site in plan.sketched} == {"0.weight", "4.weight"}
    (reason,) = [site.reason for site in plan.sites if site.weight == "2.weight"]
    assert reason == f"KeyError in {name}: 'planted'"
    assert any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("name", FAULTS)
def test_strict_hears_of_it(monkeypatch, name):
    """With strict=True nothing is left alone in silence."""
    owner, function, fails = FAULTS[name]
    monkeypatch.setattr(owner, function, failing(getattr(owner, function), fails))
    with pytest.raises(Exception, match=f"KeyError in {name}") as caught:
        torch.compile(mlp(), backend=backend(strict=True))(batch())
    assert isinstance(caught.value.inner_exception, CannotCompact)


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_compiled_code_keeps_neither_weights_nor_a_batch(inner):
    model, inputs = mlp(), batch()
    compiled = torch.compile(model, backend=backend(inner=inner))
    compiled(inputs).sum().backward()
    compiled(batch()).sum().backward()
    gone = weakref.ref(inputs)
    del inputs
    gc.collect()
    assert gone() is None
    gone = weakref.ref(model[0].weight)
    model[0] = nn.Linear(64, 96)
    gc.collect()
    assert gone() is None
    assert compiled(batch()).shape == (128, 8)


def test_digests_stand_for_what_a_plan_does():
    """Names, salts, reasons and costs are not part of it; ranks, kinds and placements are."""

    def digest(model=None, x=None, **settings):
        torch._dynamo.reset()
        compact = backend(**settings)
        torch.compile(model or mlp(), backend=compact)(batch() if x is None else x).sum()
        return compact.plans[0].digest()

    class Renamed(nn.Module):
        def __init__(self):
            super().__init__()
            self.other = mlp()

        def forward(self, x):
            return self.other(x)

    plain = digest()
    assert digest() == plain
    assert digest(Renamed()) == plain
    assert digest(seed=3, update_interval=7, strict=True, keep_graphs=True) == plain
    assert digest(rank={"*": 1.0}) == plain
    others = [{"rank": 0.5}, {"projection": "gaussian"}, {"gradients": "sketched"}]
    others += [{"place": "early"}, {"recompute": False}, {"exclude": ("0.*",)}]
    digests = [digest(**settings) for settings in others]
    assert len({plain, *digests}) == 1 + len(others)
