"""Decay, copies, loading and saving of optimizers that step factors, and whom they refuse."""

import copy
import gc
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from compact_fx import CompactAdamW, SketchedGrad, compact_backend, compact_optimizer
from compact_fx.training import low_bit

SIZES = ((64, 96), (96, 32), (32, 8))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(n, m) for n, m in SIZES]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Tanh(), layers[2])


def batch(step: int = 0, dtype=torch.float32) -> Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(step)).to(dtype)


def backend(**settings):
    defaults = {"rank": 0.25, "gradients": "sketched", "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


def train(model, optimizer, steps, first=0, **settings):
    """Losses of some steps, with code compiled anew."""
    torch._dynamo.reset()
    step, losses = torch.compile(model, backend=backend(**settings)), []
    dtype = next(model.parameters()).dtype
    for number in range(first, first + steps):
        optimizer.zero_grad()
        loss = (step(batch(number, dtype)).float() - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def adamw(params, **settings):
    return CompactAdamW(params, **{"lr": 1e-2, "scale": 0.5} | settings)


def momentum(params, **settings):
    return compact_optimizer(torch.optim.SGD, params, lr=0.05, momentum=0.9, **settings)


def equal(a, b) -> bool:
    """Of nested state dicts, to the bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


# --- decay ---------------------------------------------------------------------------------------


def scaled_run(optimizer_class, fused, unscale, **settings):
    """A model after 5 steps with a loss scale."""
    torch._dynamo.reset()
    model = mlp()
    step = torch.compile(model, backend=backend())
    optimizer = compact_optimizer(
        optimizer_class, model.parameters(), weight_decay=0.3, fused=fused, **settings
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number in range(5):
        optimizer.zero_grad()
        scaler.scale((step(batch(number)) - 1).pow(2).mean()).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return model


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [(torch.optim.Adam, {"lr": 1e-2}), (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})],
)
def test_decay_is_not_divided_by_the_loss_scale(optimizer_class, settings, unscale):
    """A fused optimizer unscales what it gets, and decay was never scaled."""
    expected = scaled_run(optimizer_class, False, unscale, **settings)
    actual = scaled_run(optimizer_class, True, unscale, **settings)
    for mine, other in zip(actual.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)
    assert (actual[0].weight - mlp()[0].weight).norm() > 0.1


DECAYING = [torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adam]


def one_step_by_hand(model, optimizer_class, lr, decay, decoupled):
    """The class's own step of each weight: of zeros of the factor's shape, expanded by P."""
    expected = []
    for weight in model.parameters():
        gradient, value = weight.grad, weight.detach().clone()
        if isinstance(gradient, SketchedGrad):
            rank = gradient.factor.shape[1]
            p = SketchedGrad(torch.eye(rank), gradient.basis).to_dense().T
            stand_in = nn.Parameter(torch.zeros_like(gradient.factor))
            stand_in.grad = gradient.factor + (0.0 if decoupled else decay * value @ p)
            optimizer_class([stand_in], lr=lr).step()
            kept = 1 - lr * decay if decoupled else 1.0
            expected.append(kept * value + stand_in.detach() @ p.T)
        else:
            copied = nn.Parameter(value)
            copied.grad = gradient.clone()
            settings = {"weight_decay": decay, "decoupled_weight_decay": decoupled}
            optimizer_class([copied], lr=lr, **settings).step()
            expected.append(copied.detach())
    return expected


@pytest.mark.parametrize("decoupled", [True, False, None])
@pytest.mark.parametrize("optimizer_class", DECAYING)
def test_decay_is_decoupled_where_a_person_says_so(optimizer_class, decoupled):
    """torch's own keyword does what it does in torch, and without it decay is coupled."""
    lr, decay = 1e-2, 0.3
    model = mlp()
    keyword = {} if decoupled is None else {"decoupled_weight_decay": decoupled}
    optimizer = compact_optimizer(
        optimizer_class, model.parameters(), lr=lr, weight_decay=decay, **keyword
    )
    step = torch.compile(model, backend=backend())
    (step(batch()) - 1).pow(2).mean().backward()
    expected = one_step_by_hand(model, optimizer_class, lr, decay, bool(decoupled))
    optimizer.step()
    for weight, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.detach(), value, rtol=1e-5, atol=1e-6)


# --- copies --------------------------------------------------------------------------------------


def deepcopied(both):
    return copy.deepcopy(both)


def pickled(both):
    return pickle.loads(pickle.dumps(both))


@pytest.mark.parametrize(
    ("make", "copied", "in_backward"),
    [
        (adamw, deepcopied, False),
        (adamw, pickled, True),
        (momentum, deepcopied, True),
        (momentum, pickled, False),
    ],
)
def test_a_copy_goes_on_alike(make, copied, in_backward):
    """Model and optimizer, in the middle of an interval: the same losses, each on its own."""
    model = mlp()
    optimizer = make(model.parameters(), step_in_backward=in_backward)
    train(model, optimizer, 3, update_interval=2)
    twin, twins_optimizer = copied((model, optimizer))
    assert type(twins_optimizer) is type(optimizer)
    start = copy.deepcopy(twin.state_dict())
    expected = train(model, optimizer, 4, first=3, update_interval=2)
    assert equal(twin.state_dict(), start)
    assert train(twin, twins_optimizer, 4, first=3, update_interval=2) == expected
    assert len(set(expected)) == 4


def test_a_copy_has_its_own_state():
    """Stepping the copy leaves the state of the original as it is."""
    model = mlp()
    optimizer = adamw(model.parameters())
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    twin, twins_optimizer = copy.deepcopy((model, optimizer))
    train(twin, twins_optimizer, 2, first=2)
    assert equal(optimizer.state_dict(), before)
    assert not equal(twins_optimizer.state_dict(), before)


# --- saving and loading --------------------------------------------------------------------------


@pytest.mark.parametrize("make", [adamw, momentum])
def test_a_state_of_before_the_first_step_starts_again(make):
    """As a learning-rate finder restores it: also the position in the interval is the first."""
    model = mlp()
    optimizer = make(model.parameters())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    first = train(model, optimizer, 3, update_interval=2)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(model, optimizer, 3, update_interval=2) == first


@pytest.mark.parametrize("projection", ["countsketch", "tracked"])
def test_another_seed_is_refused(projection):
    """The moments are in projections of the first seed; nothing has been changed then."""
    settings = {"projection": projection, "update_interval": 2, "place": "late"}
    model = mlp()
    optimizer = adamw(model.parameters())
    train(model, optimizer, 3, seed=1, **settings)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = mlp()
    resumed.load_state_dict(saved[0])
    optimizer = adamw(resumed.parameters())
    optimizer.load_state_dict(saved[1])
    with pytest.raises(ValueError, match="seed"):
        train(resumed, optimizer, 1, first=3, seed=2, **settings)
    assert equal(resumed.state_dict(), saved[0])
    assert equal(optimizer.state_dict(), saved[1])


@pytest.mark.parametrize(("flat", "state_dtype"), [(False, None), (True, "fp8")])
def test_a_distributed_checkpoint_goes_on_to_the_bit(tmp_path, monkeypatch, flat, state_dtype):
    """get_state_dict, save, load and set_state_dict of torch.distributed.checkpoint."""
    monkeypatch.setattr(low_bit, "SMALLEST", 64)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    settings = {"update_interval": 2}
    model = mlp()
    optimizer = adamw(model.parameters(), state_dtype=state_dtype)
    train(model, optimizer, 3, **settings)
    states = get_state_dict(model, optimizer, options=options)
    dcp.save(
        dict(zip(("model", "optimizer"), states, strict=True)),
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    expected = train(model, optimizer, 4, first=3, **settings)

    torch._dynamo.reset()
    resumed = mlp()
    nn.init.zeros_(resumed[0].weight)
    optimizer = adamw(resumed.parameters(), state_dtype=state_dtype)
    step = torch.compile(resumed, backend=backend(**settings))
    step(batch()).mean().backward()  # states are made in the shapes that gradients have
    optimizer.zero_grad()
    states = dict(
        zip(
            ("model", "optimizer"), get_state_dict(resumed, optimizer, options=options), strict=True
        )
    )
    dcp.load(states, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        resumed,
        optimizer,
        model_state_dict=states["model"],
        optim_state_dict=states["optimizer"],
        options=options,
    )
    assert train(resumed, optimizer, 4, first=3, **settings) == expected


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float64, 1e-3)])
@pytest.mark.parametrize(("make", "moment"), [(adamw, "exp_avg"), (momentum, "momentum_buffer")])
def test_a_state_of_another_dtype(make, moment, dtype, tolerance):
    """Moments take the weight's dtype, as in torch's optimizers, and the run goes on."""
    model = mlp()
    optimizer = make(model.parameters())
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, optimizer, 4, first=3)
    other = mlp().to(dtype)
    other.load_state_dict(saved[0])
    optimizer = make(other.parameters())
    optimizer.load_state_dict(saved[1])
    for index, weight in enumerate(other.parameters()):
        found = optimizer.state[weight][moment]
        assert torch.equal(found, saved[1]["state"][index][moment].to(dtype))
    losses = train(other, optimizer, 4, first=3)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert all(optimizer.state[weight][moment].dtype is dtype for weight in other.parameters())


def cut_short(state):
    del state["projection_rank"]


def emptied(state):
    state["projection_seed"] = state["projection_seed"].new_empty(0)


def of_another_rank(state):
    assert state["projection_rank"] == 8
    state["projection_rank"] = torch.tensor(7)


def with_a_smaller_moment(state):
    state["exp_avg"] = state["exp_avg"][:, :-1]


def without_dimensions(state):
    state["exp_avg"] = torch.zeros(3)


def with_negative_steps(state):
    state["projection_steps"] = torch.tensor(-5)


def with_a_fraction(state):
    state["projection_salt"] = torch.tensor(1.5)


DAMAGES = [cut_short, emptied, of_another_rank, with_a_smaller_moment, without_dimensions]
DAMAGES += [with_negative_steps, with_a_fraction]


@pytest.fixture(scope="module")
def gone_on():
    """An optimizer, a state of it, and what it is after two more steps."""
    model = mlp()
    optimizer = adamw(model.parameters())
    train(model, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2, first=2)
    return optimizer, saved, copy.deepcopy(optimizer.state_dict())


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_changes_nothing(gone_on, damage):
    """It is checked whole before the first tensor is taken over."""
    optimizer, saved, before = gone_on
    saved = copy.deepcopy(saved)
    saved["param_groups"][0]["lr"] = 0.5
    damage(saved["state"][4])
    with pytest.raises(ValueError, match=r"state|basis"):
        optimizer.load_state_dict(saved)
    assert equal(optimizer.state_dict(), before)


@pytest.mark.parametrize("name", ["scale", "dense_scale"])
@pytest.mark.parametrize("value", [-1, 0.0])
def test_a_loaded_group_is_checked_as_a_new_one(gone_on, name, value):
    """What a constructor refuses a state does not bring in."""
    optimizer, saved, before = gone_on
    saved = copy.deepcopy(saved)
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=f"{name}={value}"):
        optimizer.load_state_dict(saved)
    assert equal(optimizer.state_dict(), before)


# --- classes that cannot step a factor -----------------------------------------------------------


class Lars(torch.optim.Optimizer):
    """Its update is as long as the weight (You et al., 2017), which a stand-in does not know."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    trust = (weight.norm() + 1e-3) / (weight.grad.norm() + 1e-12)
                    weight.sub_(group["lr"] * trust * weight.grad)


@pytest.mark.parametrize(
    "optimizer_class",
    [torch.optim.ASGD, torch.optim.Adagrad, torch.optim.LBFGS, Lars],
)
def test_a_class_that_reads_the_weight_is_refused(optimizer_class):
    """By its name, before a weight has changed; with dense gradients torch's own would be right."""
    model = mlp()

    def run():
        optimizer = compact_optimizer(optimizer_class, model.parameters(), lr=1e-2)
        train(model, optimizer, 1)

    with pytest.raises((TypeError, ValueError), match=optimizer_class.__name__):
        run()
    assert equal(model.state_dict(), mlp().state_dict())


# --- memory --------------------------------------------------------------------------------------


def tables():
    """Projections are drawn into tensors of int32, and nothing else is in these tests."""
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is Tensor and x.dtype is torch.int32]


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_no_table_outlives_its_model(gradients):
    """After 5 changes of the projection, and when model, optimizer and backend are gone."""
    others = tables()
    known = set(map(id, others))
    model = mlp()
    optimizer = adamw(model.parameters(), refresh="project")
    compact = backend(update_interval=1, seed=4321, gradients=gradients)
    step = torch.compile(model, backend=compact)
    for number in range(6):
        optimizer.zero_grad()
        (step(batch(number)) - 1).pow(2).mean().backward()
        optimizer.step()
    held = [table for table in tables() if id(table) not in known]
    assert 0 < len(held) <= 6  # of three weights, at most the present and the last one
    del held, model, optimizer, compact, step
    torch._dynamo.reset()
    assert [table.shape for table in tables() if id(table) not in known] == []
