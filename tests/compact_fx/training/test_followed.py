"""Tracked projections from step to step: what they see, when they change, what goes along."""

import copy
import gc
import io
import math
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from compact_fx import (
    CompactAdamW,
    _torch,
    compact_backend,
    compact_optimizer,
    count_step,
    set_steps,
)
from compact_fx.compiler import GraphCompiler
from compact_fx.training.followed import _warn_of_none, change_those_due, changes
from compact_fx.training.gradients import SketchedGrad
from compact_fx.training.inputs import GraphInputs
from compact_fx.training.moments import _warn_of_unknown
from compact_fx.training.weights import known_record

N, RANK = 48, 12


class Model(nn.Module):
    """One weight on its input side, one on its output side."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(N, 96, bias=False), nn.Linear(96, N, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.up(x.sin())))


def make(seed=0):
    torch.manual_seed(seed)
    return Model()


def data(step, tokens=64):
    return torch.randn(tokens, N, generator=torch.Generator().manual_seed(step))


def backend(**settings):
    settings = {"projection": "tracked", "gradients": "sketched", "inner": "aot_eager", **settings}
    return compact_backend(**{"rank": 0.25, "update_interval": 4, "strict": True, **settings})


def compiled(model, **settings):
    torch._dynamo.reset()
    return torch.compile(model, backend=backend(**settings))


def loss_of(step, x):
    return step(x).square().mean() + step(x).mean()


def train(model, step, optimizer, steps, first=0):
    losses = []
    for i in range(first, first + steps):
        loss = loss_of(step, data(i))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def followed_of(weight):
    ((_, followed),) = known_record(weight).group.root().followed.items()
    return followed


def generations(model):
    return [followed_of(weight).version.generation for weight in model.parameters()]


# --- what is seen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("track_every", [1, 8])
def test_y_is_the_gradient_of_half_g_p_squared_over_all_passes(track_every):
    """Also with the weight's own gradients as reference, on the tracked tokens, both sides."""
    model = make().double()
    step = compiled(model, track_every=track_every)
    expected = dict.fromkeys(model.parameters(), 0.0)
    for i in range(3):
        x = data(i).double()
        step(x).square().sum().backward()
        inputs = {}
        h = model.up(x.sin())
        outputs = [h, model.down(F.silu(h))]
        inputs = [x.sin(), F.silu(h)]
        deltas = torch.autograd.grad(outputs[1].square().sum(), outputs)
        for weight, a, dy in zip(model.parameters(), inputs, deltas, strict=True):
            p = followed_of(weight).version.matrix.double()
            a, dy = (t.detach() for t in ((a, dy) if weight.shape[0] > N else (dy, a)))
            factor = dy.T @ a @ p
            seen = a[::track_every].T @ (dy[::track_every] @ factor)
            expected[weight] = expected[weight] + seen / factor.norm()
    for weight, y in expected.items():
        torch.testing.assert_close(followed_of(weight).gradient.double(), y, rtol=1e-4, atol=1e-4)


def test_gradients_are_g_p_pt_on_both_sides():
    model, reference = make().double(), make().double()
    step = compiled(model)
    for i in range(2):
        step(data(i).double()).square().sum().backward()
        reference(data(i).double()).square().sum().backward()
    up, down = model.up.weight, model.down.weight
    p, q = (followed_of(weight).version.matrix.double() for weight in (up, down))
    assert (up.grad.factor.shape, down.grad.factor.shape) == ((96, RANK), (RANK, 96))
    torch.testing.assert_close(up.grad.to_dense(), reference.up.weight.grad @ p @ p.T)
    torch.testing.assert_close(down.grad.to_dense(), q @ q.T @ reference.down.weight.grad)


@pytest.mark.parametrize("foreach", [None, False, True])
def test_clipping_by_norm_is_that_of_the_dense_gradients(foreach):
    model = make()
    step = compiled(model, exclude=("down.weight",))  # one sketched gradient and one dense
    loss_of(step, data(0)).backward()
    dense = [torch.nn.Parameter(p.detach().clone()) for p in model.parameters()]
    for parameter, p in zip(dense, model.parameters(), strict=True):
        parameter.grad = p.grad.to_dense().clone()
    norms = [
        torch.nn.utils.clip_grad_norm_(parameters, 1e-2, foreach=foreach)
        for parameters in (list(model.parameters()), dense)
    ]
    torch.testing.assert_close(*norms)
    assert isinstance(model.up.weight.grad, SketchedGrad)
    for p, parameter in zip(model.parameters(), dense, strict=True):
        torch.testing.assert_close(p.grad.to_dense(), parameter.grad)


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_at_full_rank_gradients_are_exact_after_changes_too(gradients):
    model, reference = make().double(), make().double()
    step = compiled(model, rank=1.0, gradients=gradients, update_interval=2, place="late")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    other = torch.optim.SGD(reference.parameters(), lr=1e-2)
    for i in range(6):
        step(data(i).double()).square().mean().backward()
        reference(data(i).double()).square().mean().backward()
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            grad = mine.grad.to_dense() if gradients == "sketched" else mine.grad
            torch.testing.assert_close(grad, theirs.grad, rtol=1e-5, atol=1e-8)
        for one in (optimizer, other):
            one.step()
            one.zero_grad()
    assert generations(model) == [3, 3]


# --- when it changes ------------------------------------------------------------------------------


def test_it_changes_after_the_first_step_and_then_every_interval():
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-3)
    seen = []
    for i in range(11):
        train(model, step, optimizer, 1, i)
        seen.append(generations(model))
    assert [up for up, _ in seen] == [0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    assert [up for up, _ in seen] == [down for _, down in seen]


def test_columns_that_follow_hold_more_of_the_gradient_than_chance():
    model = make()
    step, optimizer = compiled(model, follow=0.5), CompactAdamW(model.parameters(), lr=1e-3)
    train(model, step, optimizer, 6)
    for weight in model.parameters():
        followed = followed_of(weight)
        (_, first), (_, second) = followed.energies
        assert 0 < first <= 1
        assert second > max(first, RANK / N)


def test_a_change_takes_the_flops_that_the_report_says():
    model, settings = make(), backend()
    step, optimizer = torch.compile(model, backend=settings), CompactAdamW(model.parameters())
    train(model, step, optimizer, 1)
    flops = []
    for i in range(2):
        with FlopCounterMode(display=False) as change:
            change_those_due()
        loss_of(step, data(i)).backward()
        with FlopCounterMode(display=False) as rotation:
            optimizer.step()
        flops.append(change.get_total_flops() + rotation.get_total_flops())
    assert generations(model) == [1, 1]
    (plan,) = settings.report().plans
    assert flops[0] - flops[1] == plan.account.change_flops > 0


def test_steps_that_are_set_back_begin_anew():
    """A learning-rate finder restores the model and the state of before the first step."""
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-3)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    losses = train(model, step, optimizer, 6)
    assert generations(model) == [2, 2]
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert train(model, step, optimizer, 6) == losses
    assert generations(model) == [2, 2]


def test_it_waits_for_a_step_with_a_gradient_of_its_own():
    """It does not change between two passes whose gradients are added."""
    model = make()
    step = compiled(model)
    set_steps(model.parameters(), 9)
    for i in range(2):
        loss_of(step, data(i)).backward()
        one = torch.compile(model.up, backend=backend())  # another graph looks at what is due
        one(data(i)).sum().backward()
    assert generations(model) == [0, 0]
    count_step(model.parameters())
    loss_of(step, data(2)).backward()
    assert generations(model) == [1, 1]


@pytest.mark.usefixtures("sees_requires_grad")
def test_weights_that_do_not_step_keep_their_projection():
    model = make()
    model.down.weight.requires_grad_(False)
    step = compiled(model)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    train(model, step, optimizer, 3)
    model.down.weight.requires_grad_(True)
    train(model, step, optimizer, 3, 3)
    assert followed_of(model.up.weight).version.generation == 2
    assert followed_of(model.down.weight).version.generation == 1


def test_a_late_backward_pass_sees_the_p_of_its_forward():
    model, reference = make().double(), make().double()
    step = compiled(model, update_interval=1)
    x = data(0).double()
    step(x).sum().backward()
    late = step(x).square().sum()
    before = followed_of(model.up.weight).version.matrix
    count_step(model.parameters())
    model.zero_grad()
    step(x).sum()  # the projection has changed
    assert followed_of(model.up.weight).version.matrix is not before
    late.backward()
    reference(x).square().sum().backward()
    p = before.double()
    torch.testing.assert_close(model.up.weight.grad.to_dense(), reference.up.weight.grad @ p @ p.T)
    assert followed_of(model.up.weight).gradient is None  # it says nothing of the new one


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_recompute_with_the_p_of_their_forward(use_reentrant):
    results = []
    for checkpointed in (False, True):
        model = make()
        step, optimizer = compiled(model, update_interval=1), None
        optimizer = CompactAdamW(model.parameters(), lr=1e-2)
        for i in range(4):
            x = data(i).requires_grad_()
            y = checkpoint(step, x, use_reentrant=use_reentrant) if checkpointed else step(x)
            y.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(plain, again)


def test_weights_in_two_graphs_share_one_projection():
    model, head = make(), nn.Linear(N, N)
    both = nn.ModuleList([model, head])
    torch._dynamo.reset()
    shared = backend(place="late")
    one = torch.compile(model, backend=shared)
    two = torch.compile(lambda x: head(model(x)), backend=shared)
    optimizer = CompactAdamW(both.parameters(), lr=1e-3)
    for i in range(6):
        (one if i % 2 else two)(data(i)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    one(data(9)).square().mean().backward()
    two(data(9)).square().mean().backward()
    assert isinstance(model.up.weight.grad, SketchedGrad)
    assert model.up.weight.grad.factor is not None  # two bases would have made it dense


def test_a_graph_hears_of_what_another_one_has_changed():
    """Before it is due by the interval that the first graph had been told."""
    model, head = make(), nn.Linear(N, N)
    both = nn.ModuleList([model, head])
    torch._dynamo.reset()
    slow = torch.compile(model, backend=backend(update_interval=40))
    fast = torch.compile(lambda x: head(model(x)), backend=backend(update_interval=2))
    optimizer = CompactAdamW(both.parameters(), lr=1e-3)
    seen = []
    for i in range(12):
        (slow if i % 4 else fast)(data(i)).square().mean().backward()
        followed = followed_of(model.up.weight)
        assert model.up.weight.grad.basis.version is followed.version
        seen.append(followed.version.generation)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


def test_graphs_hear_that_a_projection_is_on_another_device():
    model = make()
    loss_of(compiled(model), data(0)).backward()
    followed, before = followed_of(model.up.weight), changes()
    followed.take_up(torch.float32, torch.device("cpu"))
    assert changes() == before
    followed.take_up(torch.float32, torch.device("meta"))
    assert changes() > before


def test_it_goes_on_without_a_weight_that_had_more_steps():
    model = make()
    step = compiled(model)
    loss_of(step, data(0)).backward()
    followed = followed_of(model.up.weight)
    followed.changed_at = 1000  # of a weight that is gone
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    optimizer.step()
    optimizer.zero_grad()
    train(model, step, optimizer, 9, 1)
    assert followed.version.generation == 2


@pytest.mark.parametrize("projection", ["tracked", "gaussian"])
def test_nothing_is_looked_at_while_projections_stay(projection, monkeypatch):
    looked, entry = [], GraphInputs._entry

    def watched(self, *args):
        looked.append(at)
        return entry(self, *args)

    monkeypatch.setattr(GraphInputs, "_entry", watched)
    model = make()
    step, optimizer = compiled(model, projection=projection), torch.optim.SGD(model.parameters())
    for at in range(10):  # noqa: B007
        train(model, step, optimizer, 1)
    assert looked == ([0, 1, 5, 9] if projection == "tracked" else [0, 4, 8])


# --- what has no gradient -------------------------------------------------------------------------


def test_an_overflow_loses_nothing():
    """Steps that GradScaler skips say nothing, and what was seen before is still there."""
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-3)
    train(model, step, optimizer, 2)
    y = followed_of(model.up.weight).gradient.clone()
    (step(data(5)) * math.inf).sum().backward()
    assert torch.equal(followed_of(model.up.weight).gradient, y)


def test_a_scaled_loss_gives_the_same_projections():
    matrices = []
    for scale in (1.0, 2.0**12):
        model = make()
        step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for i in range(6):
            scaler.scale(step(data(i)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        matrices.append(followed_of(model.up.weight).version.matrix)
    torch.testing.assert_close(*matrices, rtol=1e-3, atol=1e-4)


def test_a_weight_without_gradient_keeps_its_projection_and_says_so_once():
    _warn_of_none.cache_clear()
    model = make()
    step, optimizer = compiled(model, update_interval=1), CompactAdamW(model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(4):
            (step(data(i)) * 0.0).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert sum("a tracked projection stays" in str(w.message) for w in caught) == 1
    assert generations(model) == [0, 0]
    train(model, step, optimizer, 2, 4)
    assert generations(model) == [1, 1]


class Fork(nn.Module):
    """Two weights on one activation."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(N, N, bias=False), nn.Linear(N, N, bias=False)

    def forward(self, x):
        x = x.sin()
        return self.a(x), self.b(x)


@pytest.mark.parametrize("how", ["not in the loss", "times 0"])
def test_a_weight_without_gradient_does_not_silence_its_neighbour(how):
    torch.manual_seed(0)
    model = Fork()
    step, optimizer = compiled(model, place="late"), CompactAdamW(model.parameters(), lr=1e-3)
    for i in range(3):
        a, b = step(data(i))
        (a.square().mean() + (0.0 * b.sum() if how == "times 0" else 0.0)).backward()
        assert followed_of(model.a.weight).gradient.norm() > 0
        optimizer.step()
        optimizer.zero_grad()
    assert followed_of(model.a.weight).version.generation == 1


@pytest.mark.parametrize(("rank", "follow", "columns"), [(1, 0.25, 1), (2, 0.25, 1), (2, 0, 0)])
def test_one_column_follows_at_least(rank, follow, columns):
    model = make()
    loss_of(compiled(model, rank=rank, follow=follow), data(0)).backward()
    assert followed_of(model.up.weight).columns == columns


def test_a_wider_dtype_makes_the_next_version_wide():
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        loss_of(step, data(0)).backward()
    optimizer.zero_grad()
    train(model, step, optimizer, 2)
    p = followed_of(model.up.weight).version.matrix
    assert p.dtype == torch.float32
    assert (p.T @ p - torch.eye(RANK)).abs().max() < 1e-5


def test_equal_blocks_that_are_compiled_together_later_keep_their_own_projections():
    torch.manual_seed(0)
    blocks = nn.ModuleList(Model() for _ in range(3))
    torch._dynamo.reset()
    shared = backend(place="late")
    alone = [torch.compile(block, backend=shared) for block in blocks]

    def chain(x, parts=tuple(blocks)):
        for part in parts:
            x = part(x)
        return x

    chain(data(0), alone).square().mean().backward()
    before = [followed_of(block.up.weight) for block in blocks]
    assert len({id(followed) for followed in before}) == 3
    torch.compile(chain, backend=shared)(data(1)).square().mean().backward()
    assert [followed_of(block.up.weight) for block in blocks] == before


@pytest.mark.parametrize("first", [256, 1])
def test_a_weight_keeps_its_side_whatever_the_batch(first):
    """Few tokens would be sketched on the other side, or not at all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, N, bias=False))
    torch._dynamo.reset()
    step = torch.compile(model, backend=backend(strict=False), dynamic=False)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    for tokens in (first, 1, 256, 16, 1):
        step(torch.randn(tokens, 96)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(known_record(model[0].weight).group.root().followed) == 1


# --- optimizers -----------------------------------------------------------------------------------


class Keeps(torch.optim.Optimizer):
    """Keeps the moments of its first step."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = p.grad.clone(), p.grad.square()
                p.add_(p.grad, alpha=-group["lr"])


def test_moments_are_rotated_with_the_projection():
    model = make()
    step, optimizer = compiled(model), compact_optimizer(Keeps, model.parameters())
    train(model, step, optimizer, 1)
    weights = list(model.parameters())
    before = {w: {k: v.clone() for k, v in optimizer.state[w].items()} for w in weights}
    old = {w: optimizer._bases[w] for w in weights}
    train(model, step, optimizer, 1, 1)
    for w in weights:
        new, state = optimizer._bases[w], optimizer.state[w]
        change = old[w].version.matrix.T @ new.version.matrix
        assert (change - torch.eye(RANK)).abs().max() > 0.1
        for name, r in (("exp_avg", change), ("exp_avg_sq", change.square())):
            m = before[w][name]
            expected = m @ r if old[w].is_last(m) else r.T @ m
            torch.testing.assert_close(state[name], expected)
    train(model, step, optimizer, 1, 2)  # the same version: nothing happens
    for w in weights:
        assert (
            old[w]
            .change_to(optimizer._bases[w], before[w]["exp_avg"])
            .allclose(optimizer.state[w]["exp_avg"], atol=1e-6)
        )


def test_updates_are_as_large_as_those_of_adamw():
    """In the first step each entry of Adam's update is ±lr: of the weight, and of the factor."""
    model, reference = make(), make()
    step = compiled(model)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    other = torch.optim.AdamW(reference.parameters(), lr=1e-3, weight_decay=0.0)
    start = [p.detach().clone() for p in model.parameters()]
    train(model, step, optimizer, 1)
    train(reference, reference, other, 1)
    for first, mine, theirs in zip(start, model.parameters(), reference.parameters(), strict=True):
        sizes = [(p.detach() - first).norm() for p in (mine, theirs)]
        torch.testing.assert_close(*sizes, rtol=1e-3, atol=0)


def test_sgd_makes_the_projected_step():
    model, reference = make(), make()
    step = compiled(model)
    optimizer = compact_optimizer(torch.optim.SGD, model.parameters(), lr=0.1)
    p = None
    start = model.up.weight.detach().clone()
    loss_of(step, data(0)).backward()
    p = followed_of(model.up.weight).version.matrix
    optimizer.step()
    loss_of(reference, data(0)).backward()
    expected = start - 0.1 * reference.up.weight.grad @ p @ p.T
    torch.testing.assert_close(model.up.weight.detach(), expected)


OPTIMIZERS = {
    "AdamW": lambda params: CompactAdamW(params, lr=1e-2),
    "amsgrad": lambda params: CompactAdamW(params, lr=1e-2, amsgrad=True),
    "SGD": lambda params: compact_optimizer(torch.optim.SGD, params, lr=3.0, momentum=0.9),
    "RMSprop": lambda params: compact_optimizer(torch.optim.RMSprop, params, lr=1e-3),
    "Muon": lambda params: compact_optimizer(
        torch.optim.Muon, params, lr=1e-2, decoupled_weight_decay=True
    ),
    "Adafactor": lambda params: compact_optimizer(torch.optim.Adafactor, params, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_trains(name):
    model = make()
    step, optimizer = compiled(model, update_interval=3), OPTIMIZERS[name](model.parameters())
    x = data(0)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(step(x), x.roll(1, 1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    assert math.isfinite(losses[-1])


def test_a_state_that_is_not_known_is_named_once():
    _warn_of_unknown.cache_clear()
    model = make()
    step = compiled(model, update_interval=1)
    optimizer = compact_optimizer(torch.optim.Adamax, model.parameters(), lr=1e-3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, step, optimizer, 4)
    assert sum("'exp_inf' of an optimizer's state" in str(w.message) for w in caught) == 1


def test_stepping_in_backward_is_the_same_run():
    results = []
    for in_backward in (False, True):
        model = make()
        step = compiled(model)
        optimizer = CompactAdamW(model.parameters(), lr=1e-2, step_in_backward=in_backward)
        for i in range(7):
            step(data(i)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_cuda_it_is_the_run_of_the_cpu(mode):
    """Inductor's kernels and CUDA graphs; projections are orthonormal in float32."""
    runs = []
    for device in ("cpu", "cuda"):
        model = make().to(device)
        inner = {"inner": "inductor", "mode": mode} if device == "cuda" else {}
        step = compiled(model, update_interval=2, **inner)
        optimizer = CompactAdamW(model.parameters(), lr=1e-3, fused=True)
        losses = []
        for i in range(7):
            torch.compiler.cudagraph_mark_step_begin()
            loss = loss_of(step, data(i).to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        p = followed_of(model.up.weight).version.matrix.double()
        assert (p.T @ p - torch.eye(RANK).to(p)).abs().max() < 1e-5
        assert generations(model) == [3, 3]
        runs.append((losses, p.cpu()))
    (cpu, p), (cuda, q) = runs
    torch.testing.assert_close(torch.tensor(cuda), torch.tensor(cpu), rtol=1e-3, atol=1e-4)
    # Columns of equal size may change places, spaces may not.
    assert (p.T @ q).norm() > 0.99 * p.norm()


# --- CUDA graphs: what is recorded stays where it is --------------------------------------------


@pytest.mark.parametrize("projection", ["tracked", "countsketch", "gaussian"])
def test_recorded_graphs_get_new_inputs_in_the_old_memory(projection, monkeypatch):
    runs = []
    for is_recorded in (False, True):
        monkeypatch.setattr(_torch, "records_cuda_graphs", lambda *_, on=is_recorded: on)
        places = []
        place_of = GraphInputs.__call__

        def call(self, arguments, place_of=place_of, places=places):
            inputs = place_of(self, arguments)
            places.append([t.data_ptr() for t in inputs])
            return inputs

        with monkeypatch.context() as patch:
            patch.setattr(GraphInputs, "__call__", call)
            model = make()
            step = compiled(model, projection=projection)
            optimizer = CompactAdamW(model.parameters(), lr=1e-2)
            losses = train(model, step, optimizer, 10)
        runs.append(losses)
        assert all(place == places[0] for place in places) or not is_recorded
    assert runs[0] == runs[1]


@pytest.mark.parametrize("is_recorded", [False, True])
def test_inputs_that_stay_in_their_memory_are_said_to(is_recorded, monkeypatch):
    """Else CUDA graphs copy each of them in each step."""
    monkeypatch.setattr(_torch, "records_cuda_graphs", lambda *_: is_recorded)
    captured, capture = [], GraphCompiler._capture

    def watched(self, module, num_fwd_outputs, static_inputs):
        captured.append((len(self._example_inputs), set(static_inputs)))
        return capture(self, module, num_fwd_outputs, static_inputs)

    monkeypatch.setattr(GraphCompiler, "_capture", watched)
    model = make()
    compact = backend()
    loss_of(torch.compile(model, backend=compact), data(0)).backward()
    own, static = captured[-1]
    added = set(range(own, own + len(compact.plans[0].inputs)))
    assert len(added) == 4
    assert static & added == (added if is_recorded else set())


def test_a_recorded_backward_pass_raises_where_its_projection_is_another(monkeypatch):
    """Elsewhere it has the one of its forward pass, see the test of late backward passes."""
    monkeypatch.setattr(_torch, "records_cuda_graphs", lambda *_: True)
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 4)
    late = loss_of(step, data(4))
    train(model, step, optimizer, 1, first=4)
    loss_of(step, data(5))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("projection", ["tracked", "countsketch"])
def test_cuda_graphs_are_recorded_once(projection, monkeypatch):
    from torch._inductor.cudagraph_trees import get_manager

    model = make().to("cuda")
    mode = {"inner": "inductor", "mode": "reduce-overhead"}
    step = compiled(model, projection=projection, **mode)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3, fused=True)

    copied, copy_all = [], torch._foreach_copy_

    def watched(to, *args):
        copied.append(len(to))
        return copy_all(to, *args)

    def recordings(steps):
        for i in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            with monkeypatch.context() as patch:
                patch.setattr(torch, "_foreach_copy_", watched)
                step(data(i).to("cuda")).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return repr(get_manager(0, create_if_none_exists=False).graph_counter)

    few, many = recordings(4), recordings(12)
    assert few == many != "count(0)"
    assert set(copied[-12:]) == {1}  # the batch, and nothing that was added to the graph


# --- saved, loaded, copied ------------------------------------------------------------------------


@pytest.mark.parametrize("saved_at", [0, 1, 3, 5, 6])
def test_a_resumed_run_goes_on_bit_for_bit(saved_at):
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, saved_at)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    expected = train(model, step, optimizer, 6, saved_at)

    again = make(seed=1)
    step, optimizer = compiled(again), CompactAdamW(again.parameters(), lr=1e-2)
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert train(again, step, optimizer, 6, saved_at) == expected
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_saved_between_forward_and_step_holds_both_projections():
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 5)
    loss_of(
        step, data(5)
    ).backward()  # the projection has changed, the moments are still in the old
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    optimizer.step()
    optimizer.zero_grad()
    expected = train(model, step, optimizer, 3, 6)

    again = make(seed=1)
    again.load_state_dict(weights)
    step, optimizer = compiled(again), CompactAdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(state)
    # What the interrupted pass has seen is in Y already: its tokens count once.
    for weight in again.parameters():
        followed_of(weight).gradient.zero_()
    loss_of(step, data(5)).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert train(again, step, optimizer, 3, 6) == expected


def test_restoring_in_the_same_process_goes_back():
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    expected = train(model, step, optimizer, 5, 3)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert train(model, step, optimizer, 5, 3) == expected


@pytest.mark.parametrize("how", ["loaded", "copied"])
def test_what_is_restored_within_an_interval_sees_what_comes(how):
    """P is the same before and after: its graphs get leaves of the restored one all the same."""
    seen = []
    for restored in (False, True):
        model = make()
        step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
        train(model, step, optimizer, 3)
        if restored and how == "loaded":
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif restored:
            optimizer = copy.copy(optimizer)
        train(model, step, optimizer, 1, 3)
        seen.append(followed_of(model.up.weight).gradient)
    assert torch.equal(*seen)


def test_a_copy_goes_on_by_itself():
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 3)
    other, other_optimizer = copy.deepcopy((model, optimizer))
    expected = train(model, step, optimizer, 5, 3)
    assert train(other, compiled(other), other_optimizer, 5, 3) == expected


class Siblings(nn.Module):
    """Two weights with one projection; one of them may run alone."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(N, N, bias=False), nn.Linear(N, N, bias=False)

    def forward(self, x):
        return self.one(x).sin() * self.two(x)


def resumed(model, optimizer, how):
    if how == "copied":
        return copy.deepcopy((model, optimizer))
    again = Siblings()
    other = CompactAdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return again, other


@pytest.mark.usefixtures("sees_requires_grad")
@pytest.mark.parametrize("how", ["copied", "loaded"])
@pytest.mark.parametrize("frozen", ["one", "two"])
def test_weights_with_different_steps_resume_in_the_same_place(frozen, how):
    torch.manual_seed(0)
    model = Siblings()
    step, optimizer = compiled(model, update_interval=4), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 2)
    getattr(model, frozen).requires_grad_(False)
    train(model, step, optimizer, 4, 2)
    getattr(model, frozen).requires_grad_(True)
    again, other = resumed(model, optimizer, how)
    expected = train(model, step, optimizer, 6, 6)
    assert train(again, compiled(again), other, 6, 6) == expected


@pytest.mark.parametrize("how", ["copied", "loaded"])
def test_resumed_weights_that_run_alone_see_their_own_gradients(how):
    torch.manual_seed(0)
    model = Siblings()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    train(model, compiled(model), optimizer, 2)
    again, _ = resumed(model, optimizer, how)
    before = followed_of(again.two.weight).gradient.clone()
    again.two.requires_grad_(False)
    loss_of(compiled(again), data(2)).backward()
    assert torch.equal(followed_of(again.two.weight).gradient, before)
    assert not torch.equal(followed_of(again.one.weight).gradient, before)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("saved_at", [2, 3, 6])
def test_two_optimizers_of_one_projection_resume_bit_for_bit(saved_at, every):
    def run(model, step, optimizers, first, steps):
        losses = []
        for i in range(first, first + steps):
            loss = loss_of(step, data(i))
            loss.backward()
            for optimizer, rate in zip(optimizers, (1, every), strict=True):
                if i % rate == 0:
                    optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def fresh(seed):
        torch.manual_seed(seed)
        model = Siblings()
        layers = model.two, model.one  # the one whose group the other joins is loaded last
        return model, [CompactAdamW(layer.parameters(), lr=1e-2) for layer in layers]

    model, optimizers = fresh(0)
    step = compiled(model)
    run(model, step, optimizers, 0, saved_at)
    saved = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))
    expected = run(model, step, optimizers, saved_at, 6)

    model, optimizers = fresh(1)
    model.load_state_dict(saved[0])
    for optimizer, state in zip(optimizers, saved[1], strict=True):
        optimizer.load_state_dict(state)
    assert run(model, compiled(model), optimizers, saved_at, 6) == expected


DAMAGE = {
    "projection_matrix": lambda t: t[:-1],
    "projection_gradient": lambda t: None,
    "projection_since": lambda t: torch.tensor(-1),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_state_is_refused_whole(name):
    model = make()
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1][name] = DAMAGE[name](state["state"][1][name])
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=f"damaged: {name}"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()["state"]
    assert torch.equal(before[0]["exp_avg"], after[0]["exp_avg"])


def test_another_seed_or_kind_is_refused():
    model = make()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    train(model, compiled(model), optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    for settings, named in (({"seed": 3}, "seed"), ({"projection": "gaussian"}, "kind")):
        again = make()
        optimizer = CompactAdamW(again.parameters(), lr=1e-2)
        optimizer.load_state_dict(state)
        loss_of(compiled(again, **settings), data(0)).backward()
        with pytest.raises(ValueError, match=f"has {named}="):
            optimizer.step()


def test_a_projection_goes_with_its_weights_and_not_with_the_graph():
    def product(x, weight):
        return torch.tanh(x @ weight.T)

    step = torch.compile(product, backend=backend(), dynamic=False)
    weight = nn.Parameter(torch.randn(96, N))
    step(data(0), weight).sum().backward()
    gone = weakref.ref(followed_of(weight))
    del weight
    gc.collect()
    assert gone() is None
    other = nn.Parameter(torch.randn(96, N))
    step(data(0), other).sum().backward()
    assert followed_of(other) is not None


def test_what_is_gone_is_forgotten():
    model = make()
    model.own = [model]  # as models of transformers do: a collection finds it, and nothing after
    step, optimizer = compiled(model), CompactAdamW(model.parameters(), lr=1e-2)
    train(model, step, optimizer, 2)
    gone = weakref.ref(followed_of(model.up.weight))
    del model, step, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
