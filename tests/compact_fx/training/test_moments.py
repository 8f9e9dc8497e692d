"""States that come from optimizers of full size, and that go back to them."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from compact_fx import CompactAdamW, compact_backend
from compact_fx.training import low_bit

SIZES = ((64, 96), (96, 32), (32, 8))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in SIZES]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2])


def batch(step: int = 0) -> Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps, first=0, **settings):
    """Losses of some steps, eager where there are no settings of a backend."""
    step, losses = model, []
    if settings:
        torch._dynamo.reset()
        compact = compact_backend(inner="aot_eager", strict=True, **settings)
        step = torch.compile(model, backend=compact)
    for number in range(first, first + steps):
        optimizer.zero_grad()
        loss = (step(batch(number)) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def dense_run(optimizer_class=torch.optim.AdamW, steps=5, **settings):
    """A model that torch's optimizer has trained, and the state of that."""
    model = mlp()
    optimizer = optimizer_class(model.parameters(), **{"lr": 1e-2} | settings)
    train(model, optimizer, steps)
    return model, copy.deepcopy(optimizer.state_dict())


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# --- from an optimizer of full size --------------------------------------------------------------

ANEW = r"the state of a weight of shape \(\d+, \d+\) \(\S+\) is dense.*sketched.*begin anew"


@pytest.mark.parametrize(
    ("projection", "settings"),
    [
        ("countsketch", {}),
        ("tracked", {}),
        ("tracked", {"step_in_backward": True}),
        ("tracked", {"state_dtype": "fp8"}),
    ],
)
def test_moments_of_sketched_weights_begin_anew(monkeypatch, projection, settings):
    """These are stepped as by a fresh optimizer, and all others as if nothing had happened."""
    monkeypatch.setattr(low_bit, "SMALLEST", 512)
    model, saved = dense_run()
    fresh, resumed = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = CompactAdamW(fresh.parameters(), lr=1e-2, **settings)
    train(fresh, optimizer, 1, first=5, projection=projection)
    mine = CompactAdamW(resumed.parameters(), **settings)
    mine.load_state_dict(copy.deepcopy(saved))
    with pytest.warns(UserWarning, match=ANEW) as caught:
        train(resumed, mine, 1, first=5, projection=projection)
    assert sum("begin anew" in str(warning.message) for warning in caught) == 1
    dense = torch.optim.AdamW(model.parameters())
    dense.load_state_dict(saved)
    train(model, dense, 1, first=5)
    for weight, other, kept in zip(
        resumed.parameters(), fresh.parameters(), model.parameters(), strict=True
    ):
        if weight.dim() == 1:
            torch.testing.assert_close(weight, kept)
            assert mine.state[weight]["step"] == 6
        else:
            assert_same(weight, other)
            assert mine.state[weight]["step"] == 1
            if "state_dtype" not in settings:  # how 8 bits are rounded depends on all states
                assert_same(mine.state[weight]["exp_avg"], optimizer.state[other]["exp_avg"])


def test_a_resumed_run_goes_on_to_the_bit():
    """Saved and loaded once more, in the middle of the first interval."""
    sketch = {"rank": 0.25, "update_interval": 3}
    model, saved = dense_run()
    optimizer = CompactAdamW(model.parameters())
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match=ANEW):
        train(model, optimizer, 2, first=5, **sketch)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 4, first=7, **sketch)
    resumed = mlp()
    optimizer = CompactAdamW(resumed.parameters())
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(resumed, optimizer, 4, first=7, **sketch) == expected


def test_an_error_in_place_of_the_warning_changes_nothing():
    """Who wants to keep moments turns the warning into an error."""
    model, saved = dense_run()
    optimizer = CompactAdamW(model.parameters())
    optimizer.load_state_dict(saved)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the state of a weight")
        with pytest.raises(UserWarning, match=ANEW):
            train(model, optimizer, 1, rank=0.25)
    assert_same(model.state_dict(), before[0])
    for weight, state in before[1]["state"].items():
        found = optimizer.state_dict()["state"][weight]
        assert_same({name: found[name] for name in state}, state)


class Projector:
    """What GaLore and APOLLO keep beside their moments; no tensor."""


@pytest.mark.parametrize("rank", [8, 64])
def test_a_state_of_galore_is_refused(rank):
    """Its moments are in projections of its own, also where they have the weight's shape."""
    model, saved = dense_run()
    own = saved["state"][0]
    own |= {name: own[name][:, :rank] for name in ("exp_avg", "exp_avg_sq")}
    own["projector"] = Projector()
    optimizer = CompactAdamW(model.parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"shape \(96, 64\) .*GaLore.*fresh optimizer"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)
