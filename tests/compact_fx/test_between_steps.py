"""What happens between backward passes: who steps, which projection comes next, what a gradient is.

Gradients of 64 input features with rank 4 show their projection: two in one basis span 4 dimensions
together, two in different ones span 8. No private name is needed for that.
"""

import contextlib
import functools
import itertools
import linecache
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakTensorKeyDictionary

import compact_fx
from compact_fx import CompactAdamW, SketchedGrad, compact_backend, compact_optimizer
from compact_fx.training import weights as weights_of_all
from compact_fx.training.weights import steps_of

RANK = 4
WITHOUT = "without sketches"
NO_STEP = "no optimizer step"


class Mlp(nn.Module):
    """Not an nn.Sequential: Dynamo does not compile torch's own containers in place."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (
            nn.Linear(n, m) for n, m in ((64, 96), (96, 32), (32, 8))
        )

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.relu(self.first(x)))))

    @property
    def sketched(self):
        return [self.first.weight, self.second.weight, self.third.weight]


def batch(step=0, rows=128, dtype=torch.float32):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(step)).to(dtype)


def loss_of(output):
    return (output - 1).pow(2).mean()


def backend(**settings):
    defaults = {"rank": RANK, "gradients": "dense", "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


def sketching(**settings):
    return backend(**{"gradients": "sketched", "rank": 0.25} | settings)


@contextlib.contextmanager
def warned(text, times):
    """So many UserWarnings with this text, no more and no fewer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught
    found = [w for w in caught if issubclass(w.category, UserWarning) and text in str(w.message)]
    assert len(found) == times, [str(w.message) for w in caught]


def rank_of(matrix, tolerance=1e-9):
    return torch.linalg.matrix_rank(matrix.double(), rtol=tolerance).item()


def generations(gradients):
    """[0, 0, 1, ...]: how often the projection of these dense gradients has changed."""
    numbers = [0]
    for old, new in itertools.pairwise(gradients):
        both = rank_of(torch.cat([old, new]))
        assert both in (RANK, 2 * RANK)
        numbers.append(numbers[-1] + (both > RANK))
    return numbers


def projection_of(basis, rank, dtype=torch.float32):
    """P: what a factor of ones on the diagonal stands for."""
    return SketchedGrad(torch.eye(rank, dtype=dtype), basis).to_dense().T


def same_parameters(models, **tolerance):
    for (name, a), b in zip(
        models[0].named_parameters(), models[1].named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b[1], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# --- who steps -----------------------------------------------------------------------------------


def by_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer.step, model.first.weight


def by_hand(model):
    def step():
        for weight in model.parameters():
            weight.data -= 0.1 * weight.grad

    return step, model.first.weight


def by_master_copies(model):
    """The model is bfloat16, its optimizer steps float32 copies."""
    masters = [nn.Parameter(weight.detach().float()) for weight in model.parameters()]
    model.bfloat16()
    optimizer = torch.optim.SGD(masters, lr=0.1)

    def step():
        for master, weight in zip(masters, model.parameters(), strict=True):
            master.grad = weight.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, weight in zip(masters, model.parameters(), strict=True):
                weight.copy_(master)

    return step, masters[0]


def by_flat_parameter(model):
    """The weights are views of one parameter, which the optimizer steps."""
    weights = list(model.parameters())
    flat = nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    parts = flat.data.split([weight.numel() for weight in weights])
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.view_as(weight)
    optimizer = torch.optim.SGD([flat], lr=0.1)

    def step():
        flat.grad = torch.cat([weight.grad.flatten() for weight in weights])
        optimizer.step()

    return step, model.first.weight


UNSEEN = [by_hand, by_master_copies, by_flat_parameter]


def change_of(way, compact, steps=12, count=False):
    """ΔW of the first layer."""
    model = Mlp().double()
    step, weight = way(model)
    start, dtype = weight.detach().double().clone(), model.first.weight.dtype
    compiled = torch.compile(model, backend=compact)
    for number in range(steps):
        model.zero_grad()
        loss_of(compiled(batch(number, dtype=dtype))).backward()
        step()
        if count:
            compact_fx.count_step(model.parameters())
    return weight.detach().double() - start


def test_a_torch_optimizer_is_seen():
    """12 projections of rank 4; no warning, and none with an optimizer's own closure either."""
    compact = backend(update_interval=1)
    with warned("", 0):
        assert rank_of(change_of(by_optimizer, compact)) == 48
    assert NO_STEP not in str(compact.report())


@pytest.mark.parametrize("way", UNSEEN)
def test_whom_nobody_sees_calls_count_step(way):
    """One documented call for each step: 12 projections, and nothing to warn of."""
    compact = backend(update_interval=1)
    with warned("", 0):
        change = change_of(way, compact, count=True)
    assert rank_of(change, 1e-5) == 48
    assert NO_STEP not in str(compact.report())


@pytest.mark.parametrize("interval", [1, 200])
@pytest.mark.parametrize("way", UNSEEN)
def test_a_run_that_nobody_counts_says_so(way, interval):
    """Once, within 8 steps, with what to do; the report says it too."""
    compact = backend(update_interval=interval)
    with warned(NO_STEP, 1) as caught:
        change_of(way, compact, steps=8)
    (text,) = [str(w.message) for w in caught if NO_STEP in str(w.message)]
    assert "count_step" in text
    assert NO_STEP in str(compact.report())


def test_it_says_so_once():
    """20 more steps repeat nothing."""
    with warned(NO_STEP, 1):
        change_of(by_hand, backend(update_interval=1), steps=28)


def test_accumulation_is_no_missing_step():
    """Many backward passes for one step, over one projection, without a warning."""
    model, compact = Mlp().double(), backend(update_interval=1)
    step = torch.compile(model, backend=compact)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    totals = []
    with warned("", 0):
        for number in range(2):
            for micro in range(20):
                loss_of(step(batch(20 * number + micro, dtype=torch.float64))).backward()
            totals.append(model.first.weight.grad)
            optimizer.step()
            optimizer.zero_grad()
    assert [rank_of(total) for total in totals] == [RANK, RANK]
    assert generations(totals) == [0, 1]
    assert NO_STEP not in str(compact.report())


def test_accumulation_without_a_step_yet_is_none_either():
    """As long as gradients are added up, someone may still step."""
    model, compact = Mlp(), backend(update_interval=1)
    step = torch.compile(model, backend=compact)
    with warned("", 0):
        for number in range(20):
            loss_of(step(batch(number))).backward()
    assert NO_STEP not in str(compact.report())


@pytest.mark.parametrize("compiled", ["block", "model"])
def test_fully_sharded(process_group, compiled):
    """FSDP2: the optimizer steps DTensors, the graph sees what is gathered of them."""
    model, compact = Mlp().double(), backend(update_interval=1)
    if compiled == "block":
        model.compile(backend=compact)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    step = model if compiled == "block" else torch.compile(model, backend=compact)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = model.first.weight.full_tensor().detach().clone()
    with warned(NO_STEP, 0):
        for number in range(12):
            optimizer.zero_grad()
            loss_of(step(batch(number, dtype=torch.float64))).backward()
            optimizer.step()
    assert len(compact.plans[0].sketched) == 3
    assert rank_of(model.first.weight.full_tensor().detach() - start) == 48


# --- what a step is ------------------------------------------------------------------------------


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and now and then goes half of the way back (Zhang et al., 2019)."""

    def __init__(self, inner, every=3):
        super().__init__(inner.param_groups, {})
        self.inner, self.every, self.count = inner, every, 0
        self.param_groups = inner.param_groups
        self.slow = [w.detach().clone() for g in self.param_groups for w in g["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.every == 0:
            weights = [w for group in self.param_groups for w in group["params"]]
            for weight, slow in zip(weights, self.slow, strict=True):
                slow.lerp_(weight, 0.5)
                weight.copy_(slow)
        return loss


class Sam(torch.optim.Optimizer):
    """Steps another optimizer with the gradient of a place nearby (Foret et al., 2021)."""

    def __init__(self, inner, radius=0.01):
        super().__init__(inner.param_groups, {"radius": radius})
        self.inner, self.radius = inner, radius
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        weights = [w for group in self.param_groups for w in group["params"]]
        moves = [self.radius * w.grad / (w.grad.norm() + 1e-12) for w in weights]
        torch._foreach_add_(weights, moves)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(weights, moves)
        self.inner.step()
        return loss


def sgd(weights):
    return torch.optim.SGD(weights, lr=0.05)


def plain(weights):
    return sgd(weights).step


def lookahead(weights):
    return Lookahead(sgd(weights)).step


def sam(weights):
    return Sam(sgd(weights)).step


def two_lookaheads(weights):
    return Lookahead(Lookahead(sgd(weights))).step


def two_optimizers(weights):
    first, second = sgd(weights), torch.optim.Adam(weights, lr=1e-3)

    def step(closure=None):
        first.step(closure)
        second.step()

    return step


def same_twice(weights):
    optimizer = sgd(weights)

    def step(closure=None):
        optimizer.step(closure)
        optimizer.step()

    return step


def generations_of(make, steps=6, closure_inside=True, set_to_none=True):
    """Of the first layer's gradient, with `update_interval=2`."""
    model, gradients = Mlp().double(), []
    compiled = torch.compile(model, backend=backend(update_interval=2))
    weights = list(model.parameters())
    step = make(weights)
    for number in range(steps):

        def closure(number=number):
            if set_to_none:
                model.zero_grad()
            else:
                model.zero_grad(set_to_none=False)
            loss = loss_of(compiled(batch(number, dtype=torch.float64)))
            loss.backward()
            return loss

        if closure_inside:
            step(closure)
        else:
            closure()
            step()
        gradients.append(model.first.weight.grad.clone())
    return generations(gradients)


@pytest.mark.parametrize(
    ("closure_inside", "set_to_none"), [(False, True), (True, True), (False, False)]
)
@pytest.mark.parametrize("make", [plain, lookahead, two_lookaheads, two_optimizers])
def test_one_gradient_is_one_step(make, closure_inside, set_to_none):
    """Whoever steps whom: the projection changes every 2 iterations."""
    found = generations_of(make, closure_inside=closure_inside, set_to_none=set_to_none)
    assert found == [0, 0, 1, 1, 2, 2]


def test_sam_is_one_step():
    """Two gradients, of which the inner optimizer uses one."""
    assert generations_of(sam) == [0, 0, 1, 1, 2, 2]


def test_one_optimizer_that_steps_twice_counts_twice():
    """Two updates of the weight with one gradient."""
    assert generations_of(same_twice, steps=4) == [0, 1, 2, 3]


def test_a_compact_optimizer_within_another():
    """The same with sketched gradients."""
    model = Mlp()
    compiled = torch.compile(model, backend=sketching(update_interval=2))
    optimizer = Lookahead(CompactAdamW(model.parameters(), lr=1e-3))
    bases = []
    for number in range(6):
        optimizer.zero_grad()
        loss_of(compiled(batch(number))).backward()
        bases.append(model.first.weight.grad.basis)
        optimizer.step()
    assert [a == b for a, b in itertools.pairwise(bases)] == [True, False, True, False, True]


class Clearing(Lookahead):
    """An optimizer that clears the gradients which the one inside of it has stepped."""

    set_to_none = True

    def step(self, closure=None):
        super().step(closure)
        self.inner.zero_grad(set_to_none=self.set_to_none)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("make", [CompactAdamW, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:AdamW makes sketched gradients dense")
def test_gradients_that_are_cleared_within_a_step_count_once(make, set_to_none):
    model = Mlp()
    compiled = torch.compile(model, backend=sketching())
    optimizer = Clearing(make(model.parameters(), lr=1e-3))
    optimizer.set_to_none = set_to_none
    for number in range(3):
        loss_of(compiled(batch(number))).backward()
        optimizer.step()
    assert steps_of(model.first.weight) == 3


def test_a_step_that_calls_that_of_its_class_counts_once():
    """torch calls the hooks of both where an optimizer of the class was there before."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model = Mlp()
    torch.optim.SGD(model.parameters(), lr=1e-3)
    compiled = torch.compile(model, backend=sketching(gradients="dense"))
    optimizer = Own(model.parameters(), lr=1e-3)
    for number in range(3):
        optimizer.zero_grad()
        loss_of(compiled(batch(number))).backward()
        optimizer.step()
    assert steps_of(model.first.weight) == 3


def test_a_dense_step_that_clears_its_gradients_is_told():
    model = Mlp()
    compiled = torch.compile(model, backend=sketching())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    loss_of(compiled(batch(0))).backward()
    with pytest.warns(UserWarning, match="AdamW makes sketched gradients dense"):
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_a_skipped_step_does_not_count(make, fused):
    """GradScaler calls a fused optimizer that then does nothing, and does not call another."""
    model, gradients = Mlp().double(), []
    compiled = torch.compile(model, backend=backend(update_interval=2))
    optimizer = make(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for number in range(5):
        optimizer.zero_grad()
        loss = loss_of(compiled(batch(number, dtype=torch.float64)))
        scaler.scale(loss * float("inf") if number == 1 else loss).backward()
        gradients.append(model.first.weight.grad.clone())
        before = model.first.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(before, model.first.weight) == (number == 1)
    del gradients[1]  # it shows no subspace
    assert generations(gradients) == [0, 0, 1, 1]


# --- one projection for each weight --------------------------------------------------------------


class TwoHeads(nn.Module):
    """The second head reads three weights of one input; the encoder is the second by its name."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blend, self.encoder, self.shift = (nn.Linear(64, 96) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(96, 8) for _ in range(2))

    def plain(self, x):
        return self.heads[0](torch.tanh(self.encoder(x)))

    def mixed(self, x):
        share = torch.sigmoid(self.blend(x))
        return self.heads[1](share * torch.tanh(self.encoder(x)) + torch.tanh(self.shift(x)))

    def blend_alone(self, x):
        return self.heads[0](torch.sigmoid(self.blend(x)))


def compiled_functions(model, functions, one_backend, **settings):
    compact = sketching(**settings)
    return [
        torch.compile(function, backend=compact if one_backend else sketching(**settings))
        for function in functions
    ]


def exact_gradient(function, weight, x):
    (gradient,) = torch.autograd.grad(loss_of(function(x)), weight)
    return gradient


@pytest.mark.parametrize("one_backend", [True, False])
@pytest.mark.parametrize("mixed_first", [False, True])
def test_a_weight_has_one_projection_in_all_graphs(one_backend, mixed_first):
    """By turns, over a change of projections: equal bases, and the values of G P Pᵀ."""
    model, bases = TwoHeads(), []
    functions = [model.plain, model.mixed]
    if mixed_first:
        functions.reverse()
    compiled = compiled_functions(model, functions, one_backend, update_interval=4)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    weight = model.encoder.weight
    for number in range(8):
        optimizer.zero_grad()
        exact = exact_gradient(functions[number % 2], weight, batch(number))
        loss_of(compiled[number % 2](batch(number))).backward()
        assert weight.grad.factor is not None
        bases.append(weight.grad.basis)
        p = projection_of(weight.grad.basis, 16)
        torch.testing.assert_close(weight.grad.to_dense(), exact @ p @ p.T, rtol=1e-4, atol=1e-6)
        optimizer.step()
    assert all(basis == bases[0] for basis in bases[:4])
    assert all(basis == bases[4] for basis in bases[4:])
    assert bases[0] != bases[4]


@pytest.mark.parametrize("one_backend", [True, False])
def test_accumulation_over_graphs_stays_sketched(one_backend):
    """The sum of both gradients, in one basis."""
    model = TwoHeads()
    functions = [model.plain, model.mixed]
    compiled = compiled_functions(model, functions, one_backend)
    weight = model.encoder.weight
    exact = sum(exact_gradient(function, weight, batch(1)) for function in functions)
    with warned("two projections", 0):
        for function in compiled:
            loss_of(function(batch(1))).backward()
    assert weight.grad.factor is not None
    p = projection_of(weight.grad.basis, 16)
    torch.testing.assert_close(weight.grad.to_dense(), exact @ p @ p.T, rtol=1e-4, atol=1e-6)


def test_weights_that_met_alone_stay_apart_together():
    """Each had a projection of its own before a third graph sketched both at once."""
    model = TwoHeads()
    functions = [model.plain, model.blend_alone, model.mixed]
    plain, alone, mixed = compiled_functions(model, functions, one_backend=True)
    loss_of(plain(batch(0))).backward()
    loss_of(alone(batch(0))).backward()
    weights = model.encoder.weight, model.blend.weight
    before = [weight.grad.basis for weight in weights]
    model.zero_grad()
    exact = [exact_gradient(model.mixed, weight, batch(1)) for weight in weights]
    loss_of(mixed(batch(1))).backward()
    assert [weight.grad.basis for weight in weights] == before
    for weight, gradient in zip(weights, exact, strict=True):
        p = projection_of(weight.grad.basis, 16)
        actual = weight.grad.to_dense()
        torch.testing.assert_close(actual, gradient @ p @ p.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("one_backend", [True, False])
def test_dense_gradients_have_one_projection_too(one_backend):
    """What both graphs add up spans no more dimensions than one projection has."""
    model = TwoHeads().double()
    make = [backend()] * 2 if one_backend else [backend(), backend()]
    for function, compact in zip((model.plain, model.mixed), make, strict=True):
        loss_of(torch.compile(function, backend=compact)(batch(0, dtype=torch.float64))).backward()
    assert rank_of(model.encoder.weight.grad) == RANK


# --- dense gradients among sketched ones ---------------------------------------------------------


def train(
    between=lambda model: None,
    make=lambda weights: CompactAdamW(weights, lr=1e-2),
    rows=(128,) * 4,
    set_to_none=True,
    dynamic=None,
    **settings,
):
    """A model after some steps; `between` backward pass and step it is shown to someone."""
    torch._dynamo.reset()
    model = Mlp()
    step = torch.compile(model, backend=sketching(**settings), dynamic=dynamic)
    optimizer = make(model.parameters())
    for number, count in enumerate(rows):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss_of(step(batch(number, count))).backward()
        between(model)
        optimizer.step()
    return model


@functools.cache
def undisturbed():
    return train()


def test_zeros_are_zeros_in_any_basis():
    """zero_grad(set_to_none=False) over two changes of the projection."""
    settings = {"rows": (128,) * 6, "update_interval": 2}

    def stays_sketched(model):
        assert all(weight.grad.factor is not None for weight in model.sketched)

    with warned("", 0):
        models = [train(stays_sketched, set_to_none=form, **settings) for form in (True, False)]
    same_parameters(models, rtol=0, atol=0)


READINGS = {
    "view": lambda g: g.view(-1),
    "flatten": lambda g: g.flatten(),
    "reshape": lambda g: g.reshape(-1),
    "row": lambda g: g[0],
    "element": lambda g: g[2, 3],
    "slice": lambda g: g[1:3, ::2],
    "transposed": lambda g: g.T,
    "mT": lambda g: g.mT.abs().max(dim=0).values,
    "split": lambda g: g.split(2)[0],
    "iterated": lambda g: torch.stack(list(g)),
    "diagonal": lambda g: g.diagonal(),
    "vector": lambda g: nn.utils.parameters_to_vector([g, g]),
    "flattened": lambda g: torch._utils._flatten_dense_tensors([g, g]),
    "histogram": lambda g: torch.histc(g.flatten(), 10),
}


def test_reading_changes_nothing():
    """Views that nobody writes through leave a gradient sketched, and the step is the same."""

    def read(model):
        for weight, (name, reading) in itertools.product(model.sketched, READINGS.items()):
            dense = weight.grad.to_dense().clone()
            seen = reading(weight.grad)
            torch.testing.assert_close(
                seen.to_dense() if isinstance(seen, SketchedGrad) else seen,
                reading(dense),
                msg=lambda m, n=name: f"{n}: {m}",
            )
            del seen
            assert weight.grad.factor is not None, name

    with warned("", 0):
        same_parameters([train(read), undisturbed()], rtol=0, atol=0)


def test_what_was_read_may_be_kept():
    """A logger's list of views is no reason to go on densely."""
    kept = []

    def read(model):
        kept.extend(weight.grad.view(-1) for weight in model.sketched)
        assert all(weight.grad.factor is not None for weight in model.sketched)

    with warned("", 0):
        same_parameters([train(read), undisturbed()], rtol=0, atol=0)


OUTSIDE = {
    "numpy": lambda g: g.numpy(),
    "detach.cpu.numpy": lambda g: g.detach().cpu().numpy(),
    "asarray": np.asarray,
    "array": lambda g: np.array(g),
    "tolist": lambda g: g.tolist(),
}


def test_values_leave_torch():
    """What leaves torch is the dense matrix, and the gradient stays sketched."""

    def read(model):
        for weight, (name, leave) in itertools.product(model.sketched, OUTSIDE.items()):
            dense = weight.grad.to_dense().numpy()
            values = np.asarray(leave(weight.grad))
            np.testing.assert_allclose(values, dense, rtol=1e-6, err_msg=name)
            assert weight.grad.factor is not None, name

    same_parameters([train(read), undisturbed()], rtol=0, atol=0)


def scale_row(gradient):
    gradient[0].mul_(2)


def zero_view(gradient):
    gradient.view(-1).zero_()


def add_to_transposed(gradient):
    gradient.T.add_(1.0)


def scale_kept_view(gradient):
    view = gradient.view(-1)
    gradient.mul_(3)
    view.mul_(2)


def write_numpy(gradient):
    gradient.numpy()[...] = 1.0


@pytest.mark.parametrize(
    "write", [scale_row, zero_view, add_to_transposed, scale_kept_view, write_numpy]
)
def test_writing_through_a_view_arrives(write):
    """Or it raises; it is never lost."""
    model = Mlp()
    loss_of(torch.compile(model, backend=sketching())(batch())).backward()
    gradient = model.first.weight.grad
    assert gradient.factor is not None
    expected = gradient.to_dense().clone()
    write(expected)
    try:
        write(gradient)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return
    torch.testing.assert_close(gradient.to_dense(), expected)


def test_a_view_sees_what_is_written_later():
    """A view of a gradient is no copy of it: it follows, or it says that it can not."""
    model = Mlp()
    loss_of(torch.compile(model, backend=sketching())(batch())).backward()
    gradient = model.first.weight.grad
    expected = 2 * gradient.to_dense()
    view = gradient.view(-1)
    gradient.mul_(2)
    try:
        seen = view + 0
    except RuntimeError:
        return
    torch.testing.assert_close(seen, expected.view(-1))


CLIPS = {
    "clip_grad_value_": lambda model: nn.utils.clip_grad_value_(model.parameters(), 1e6),
    "clamp_": lambda model: [w.grad.clamp_(-1e6, 1e6) for w in model.parameters()],
    "nan_to_num_": lambda model: [torch.nan_to_num_(w.grad) for w in model.parameters()],
}


@pytest.mark.parametrize("name", CLIPS)
def test_clipping_that_clips_nothing(name):
    """A gradient that was made dense has a factor all the same: that of its own basis."""
    with warned("dense", 1):
        clipped = train(CLIPS[name])
    same_parameters([clipped, undisturbed()], rtol=1e-4, atol=1e-6)


def test_clipping_by_value_is_stepped_in_the_basis():
    """What was clipped moves the weight along P and nowhere else, and less far than without."""
    changes = []
    for share in (1e6, 0.3):
        torch._dynamo.reset()
        model = Mlp()
        step = torch.compile(model, backend=sketching(projection="gaussian"))
        optimizer = compact_optimizer(torch.optim.SGD, model.parameters(), lr=0.1, momentum=0.9)
        for number in range(2):
            optimizer.zero_grad()
            loss_of(step(batch(number))).backward()
            basis = model.first.weight.grad.basis
            if number == 1:
                largest = model.first.weight.grad.to_dense().abs().max().item()
                nn.utils.clip_grad_value_(model.parameters(), share * largest)
                old = model.first.weight.detach().clone()
            optimizer.step()
        changes.append(model.first.weight.detach() - old)
    p = projection_of(basis, 16)
    along = [change @ p @ torch.linalg.pinv(p) for change in changes]
    for change, expected in zip(changes, along, strict=True):
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-6)
    assert changes[1].norm() < 0.99 * changes[0].norm()


def recompile_limit():
    """Dynamo gives up on a second shape: what it has not compiled then runs eagerly."""
    return torch._dynamo.config.patch(recompile_limit=1)


def test_the_recompile_limit_does_not_stop_a_run():
    """Other batch sizes run without sketches, in the basis that the state has: one warning."""
    with recompile_limit(), warned(WITHOUT, 1):
        model = train(rows=(128, 128, 64, 32, 128, 16), dynamic=False)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert not torch.equal(model.first.weight, train(rows=(128, 128)).first.weight)


@functools.cache
def losses_of(compiled, make=CompactAdamW, steps=12, **own):
    """Of a run with three projections, of which this much is in the compiled function."""
    torch._dynamo.reset()
    model = Mlp()
    optimizer = make(model.parameters(), lr=1e-2, **own)

    def train(x):
        loss = loss_of(model(x))
        if "backward" in compiled:
            loss.backward()
        if "step" in compiled:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    settings = {"gradients": "sketched", "projection": "tracked", "update_interval": 5}
    run, losses = torch.compile(train, backend=backend(**settings)), []
    step = torch.compile(optimizer.step, backend="eager") if "alone" in compiled else optimizer.step
    for number in range(steps):
        loss = run(batch(number))
        if "backward" not in compiled:
            loss.backward()
        if "step" not in compiled:
            step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("compiled", ["backward", "backward and step", "alone"])
@pytest.mark.parametrize("step_in_backward", [False, True])
def test_a_compiled_training_step(compiled, step_in_backward):
    """Dynamo runs hooks and optimizers as they are: what it traces there it takes for fixed."""
    own = {"step_in_backward": step_in_backward}
    assert losses_of(compiled, **own) == losses_of("", **own)


@pytest.mark.filterwarnings("ignore:AdamW makes sketched gradients dense")
@pytest.mark.parametrize("compiled", ["backward and step", "alone"])
def test_a_compiled_training_step_of_torch(compiled):
    losses = losses_of(compiled, torch.optim.AdamW), losses_of("", torch.optim.AdamW)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("how", ["recompile limit", "eager call"])
def test_a_dense_gradient_steps_as_its_factor(how):
    """SGD with a gradient G that was never sketched: W - lr (G P) Pᵀ, by hand."""
    model, lr = Mlp(), 0.1
    optimizer = compact_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    with recompile_limit():
        step = torch.compile(model, backend=sketching(), dynamic=False)
        loss_of(step(batch())).backward()
        bases = [weight.grad.basis for weight in model.sketched]
        optimizer.step()
        optimizer.zero_grad()
        if how == "eager call":
            step = model
        for number in (1, 2):
            loss_of(step(batch(number, 64))).backward()
            old = {name: weight.detach().clone() for name, weight in model.named_parameters()}
            gradients = [weight.grad for weight in model.sketched]
            assert all(type(gradient) is Tensor for gradient in gradients)
            optimizer.step()
            names = [name for name in old if name.endswith("weight")]
            for name, basis, g in zip(names, bases, gradients, strict=True):
                p = projection_of(basis, g.shape[1] // 4)
                expected = old[name] - lr * (g @ p) @ p.T
                actual = model.get_parameter(name).detach()
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
            optimizer.zero_grad()


@pytest.mark.parametrize("sketched_first", [True, False])
def test_a_sketched_and_a_dense_gradient_add_up(sketched_first):
    """Whoever reads sees F Pᵀ + G; the step takes F + G P."""
    model, lr = Mlp(), 0.1
    step = torch.compile(model, backend=sketching())
    optimizer = compact_optimizer(torch.optim.SGD, model.parameters(), lr=lr)
    loss_of(step(batch(0))).backward()
    sketched = [weight.grad for weight in model.sketched]
    model.zero_grad()
    loss_of(model(batch(1))).backward()
    dense = [weight.grad.clone() for weight in model.sketched]
    model.zero_grad()
    runs = [(step, 0), (model, 1)]
    for run, number in runs if sketched_first else runs[::-1]:
        loss_of(run(batch(number))).backward()
    expected = []
    for weight, f, g in zip(model.sketched, sketched, dense, strict=True):
        grad = weight.grad.to_dense() if isinstance(weight.grad, SketchedGrad) else weight.grad
        torch.testing.assert_close(grad, f.to_dense() + g)
        p = projection_of(f.basis, g.shape[1] // 4)
        expected.append(weight.detach() - lr * (f.factor + g @ p) @ p.T)
    optimizer.step()
    for weight, value in zip(model.sketched, expected, strict=True):
        torch.testing.assert_close(weight.detach(), value, rtol=1e-4, atol=1e-6)


class Normed(nn.Module):
    """Of no rows, the norm makes the first weight's gradient something else than a product."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 8)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_an_empty_last_batch(inner):
    """Gradients of zero, of whatever kind, and the run goes on as if it had not been."""
    models = []
    for rows in ((32, 32), (32, 0, 32), (32, 32, 0)):
        torch._dynamo.reset()
        model = Normed()
        step = torch.compile(model, backend=sketching(inner=inner))
        optimizer = compact_optimizer(torch.optim.SGD, model.parameters(), lr=1e-2)
        for count in rows:
            optimizer.zero_grad()
            (step(batch(rows=count)) - 1).pow(2).sum().backward()
            optimizer.step()
        models.append(model)
    same_parameters(models[:2], rtol=1e-5, atol=1e-6)
    same_parameters(models[::2], rtol=1e-5, atol=1e-6)


# --- calls without sketches are seen -------------------------------------------------------------


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_calls_beyond_the_recompile_limit_are_counted(gradients):
    """4 of 5 steps: one warning, and the report has the number and why."""
    model, compact = Mlp(), backend(gradients=gradients, rank=0.25)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    with recompile_limit(), warned(WITHOUT, 1):
        step = torch.compile(model, backend=compact, dynamic=False)
        for number, rows in enumerate((128, 64, 32, 64, 16)):
            optimizer.zero_grad()
            loss_of(step(batch(number, rows))).backward()
            optimizer.step()
    report = compact.report()
    assert sum(report.unsketched.values()) == 4
    assert all(isinstance(reason, str) and reason for reason in report.unsketched)
    assert re.search(rf"\b4\b.*{WITHOUT}|{WITHOUT}(.|\n)*\b4\b", str(report))


def test_calls_beyond_the_recompile_limit_are_counted_by_hand_as_well():
    model, compact = Mlp(), backend(rank=0.25)
    with recompile_limit(), warned(WITHOUT, 1):
        step = torch.compile(model, backend=compact, dynamic=False)
        for number, rows in enumerate((128, 64, 32, 128, 16)):
            loss_of(step(batch(number, rows))).backward()
            with torch.no_grad():
                for weight in model.parameters():
                    weight -= 1e-3 * weight.grad
                    weight.grad = None
            compact_fx.count_step(model.parameters())
    assert sum(compact.report().unsketched.values()) == 3


class Tuple(nn.Module):
    """Graphs return tuples."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return (self.model(x),)


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_calls_of_an_untouched_graph_are_counted(gradients):
    """A graph that cannot be compacted, its weights being attributes: why, and how often it ran."""
    model, compact = Mlp(), backend(gradients=gradients, rank=0.25, strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with warned(WITHOUT, 1):
        run = compact(torch.fx.symbolic_trace(Tuple(model)), [batch()])
        for number in range(3):
            optimizer.zero_grad()
            loss_of(run(batch(number))[0]).backward()
            optimizer.step()
    unsketched = compact.report().unsketched
    assert list(unsketched.values()) == [3]
    assert "attributes" in next(iter(unsketched))
    assert WITHOUT in str(compact.report())


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_a_healthy_run_has_none(gradients):
    """With other shapes, accumulation and evaluation in between."""
    model, compact = Mlp(), backend(gradients=gradients, rank=0.25)
    step = torch.compile(model, backend=compact)
    make = CompactAdamW if gradients == "sketched" else torch.optim.AdamW
    optimizer = make(model.parameters(), lr=1e-3)
    with warned("", 0):
        for number, rows in enumerate((128, 64, 96, 64)):
            loss_of(step(batch(number, rows))).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                step(batch(number, rows))
                model(batch(number, rows))
    assert dict(compact.report().unsketched) == {}
    assert WITHOUT not in str(compact.report())


# --- who makes sketched gradients dense ----------------------------------------------------------

MAKES_DENSE = "makes sketched gradients dense"


def run(make, compact, steps=3):
    """What `make` gives for the weights takes a closure and makes a step."""
    model = Mlp()
    compiled = torch.compile(model, backend=compact)
    step = make(model.parameters())
    for number in range(steps):

        def closure(number=number):
            model.zero_grad()
            loss = loss_of(compiled(batch(number)))
            loss.backward()
            return loss

        step(closure)


def adamw(weights):
    return torch.optim.AdamW(weights, lr=1e-3)


def scheduled(weights):
    """A scheduler wraps the step of its optimizer."""
    optimizer = adamw(weights)
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return lambda closure: optimizer.step(closure)


def scaled(weights):
    optimizer, scaler = adamw(weights), torch.amp.GradScaler("cpu", init_scale=1.0)

    def step(closure):
        scaler.scale(closure())
        scaler.step(optimizer)
        scaler.update()

    return step


BY_ADAMW = {
    "plain": lambda weights: adamw(weights).step,
    "scheduled": scheduled,
    "scaled": scaled,
    "within another": lambda weights: Lookahead(adamw(weights)).step,
}


@pytest.mark.parametrize("way", BY_ADAMW)
def test_an_optimizer_that_does_not_know_factors_is_named_once(way):
    """With what to do instead, at the line that calls its step."""
    with warned(MAKES_DENSE, 1) as caught:
        run(BY_ADAMW[way], sketching(projection=None))
    (found,) = [w for w in caught if MAKES_DENSE in str(w.message)]
    text = str(found.message)
    assert text.startswith(f"AdamW {MAKES_DENSE}")
    for advice in ("CompactAdamW", "compact_optimizer(AdamW, ...)", "gradients='dense'"):
        assert advice in text
    assert found.filename == __file__
    assert "step(" in linecache.getline(found.filename, found.lineno)


KNOW_FACTORS = {
    "CompactAdamW": lambda weights: CompactAdamW(weights, lr=1e-3),
    "compact_optimizer": lambda weights: compact_optimizer(torch.optim.AdamW, weights, lr=1e-3),
    "Lookahead": lambda weights: Lookahead(CompactAdamW(weights, lr=1e-3)),
    "two": lambda weights: Lookahead(Lookahead(CompactAdamW(weights, lr=1e-3))),
    "Sam": lambda weights: Sam(CompactAdamW(weights, lr=1e-3)),
}


@pytest.mark.parametrize("name", KNOW_FACTORS)
def test_those_that_know_factors_are_not(name):
    """Nor those around them."""
    with warned(MAKES_DENSE, 0):
        run(lambda weights: KNOW_FACTORS[name](weights).step, sketching(projection=None))


STEPS_DENSE = "steps dense gradients, and so saves no memory"


@pytest.mark.parametrize(
    ("settings", "advice"),
    [({"gradients": "dense"}, "give it gradients='sketched'"), (None, "compile the model")],
)
def test_a_compact_optimizer_without_a_sketched_gradient(monkeypatch, settings, advice):
    """Said once, at the line that calls its step."""
    monkeypatch.setattr(weights_of_all, "_records", WeakTensorKeyDictionary())  # of other tests
    model = Mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    step = model if settings is None else torch.compile(model, backend=backend(**settings))
    with warned(STEPS_DENSE, 1) as caught:
        for number in range(3):
            loss_of(step(batch(number))).backward()
            optimizer.step()
    (found,) = [w for w in caught if STEPS_DENSE in str(w.message)]
    assert advice in str(found.message)
    assert linecache.getline(found.filename, found.lineno).strip() == "optimizer.step()"


def test_a_compact_optimizer_of_what_is_never_sketched(monkeypatch):
    """An optimizer of its own for embeddings, or a state that a checkpoint is loaded into."""
    monkeypatch.setattr(weights_of_all, "_records", WeakTensorKeyDictionary())
    model = Mlp()
    with warned(STEPS_DENSE, 0):
        empty = CompactAdamW(model.parameters(), lr=0.0)
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        empty.step()
        compact = backend(gradients="sketched", exclude=("third.*",))
        first = CompactAdamW([*model.first.parameters(), *model.second.parameters()], lr=1e-3)
        third = CompactAdamW(model.third.parameters(), lr=1e-3)
        loss_of(torch.compile(model, backend=compact)(batch())).backward()
        first.step()
        third.step()


@pytest.mark.parametrize("is_late", [True, False])
def test_a_compact_optimizer_that_was_made_before_fully_shard(process_group, is_late):
    """It holds weights that nobody trains; one that is made after it is in order."""
    model = Mlp()
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    model.compile(backend=backend(gradients="sketched"))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    if not is_late:
        optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    with warned("Make the optimizer after it", int(is_late)) as caught:
        for number in range(3):
            loss_of(model(batch(number))).backward()
            optimizer.step()
            optimizer.zero_grad()
            optimizer.step()
    for found in (w for w in caught if "Make the optimizer after it" in str(w.message)):
        assert linecache.getline(found.filename, found.lineno).strip() == "optimizer.step()"


def test_a_compact_optimizer_of_what_is_not_used_yet(process_group):
    """It may be later, also beside a model that fully_shard has."""
    model, other = Mlp(), nn.Linear(5, 7)
    model.compile(backend=backend(gradients="sketched"))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    loss_of(model(batch())).backward()
    with warned("Make the optimizer after it", 0):
        CompactAdamW(other.parameters(), lr=1e-3).step()
        CompactAdamW([{"params": []}], lr=1e-3).step()


@pytest.mark.parametrize("way", BY_ADAMW)
def test_dense_gradients_are_for_any_optimizer(way):
    with warned(MAKES_DENSE, 0):
        run(BY_ADAMW[way], backend())


# --- hooks, buckets, double backward -------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_is_refused_before_it_runs(kind, warm):
    """Not even with None."""
    model, calls = Mlp(), []
    step = torch.compile(model, backend=sketching())
    if warm:
        loss_of(step(batch())).backward()
        model.zero_grad()
    getattr(model.second.weight, kind)(lambda value: calls.append(value))
    with pytest.raises(RuntimeError, match="hook of the weight"):
        loss_of(step(batch())).backward()
    assert calls == []


class Wide(nn.Module):
    """Two weights of 2 MB: more than one bucket of DistributedDataParallel."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(512, 1024), nn.Linear(1024, 512)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def test_several_buckets(process_group):
    """inner="aot_eager" under DistributedDataParallel, where Dynamo cuts the graph at buckets."""
    reference, model = Wide(), Wide()
    x = torch.randn(32, 512)
    loss_of(reference(x)).backward()
    compact = backend(rank=1.0, projection="orthogonal")
    step = torch.compile(DistributedDataParallel(model, bucket_cap_mb=1), backend=compact)
    for _ in range(2):
        model.zero_grad()
        loss_of(step(x)).backward()
    assert len(compact.plans) > 1
    assert all(plan.sketched for plan in compact.plans)
    for expected, actual in zip(reference.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_penalty_on_a_gradient_is_refused(name):
    """A sketched gradient is no function of the weights for autograd: it must not drop out."""
    model = Mlp()
    step = torch.compile(model, backend=sketching())

    def penalised():
        loss = loss_of(step(batch()))
        loss.backward(create_graph=True)
        (loss + 10 * model.get_parameter(name).grad.pow(2).sum()).backward()

    with pytest.raises(RuntimeError, match="create_graph"):
        penalised()


def test_an_alias_has_its_own_data():
    """As of any tensor: alias.data = t leaves the gradient as it is."""
    model = Mlp()
    loss_of(torch.compile(model, backend=sketching())(batch())).backward()
    gradient = model.first.weight.grad
    expected = gradient.to_dense().clone()
    alias = gradient.detach()
    alias.data = torch.ones(gradient.shape)
    torch.testing.assert_close(gradient.to_dense(), expected, rtol=0, atol=0)
    assert gradient.factor is not None
    values = alias.to_dense() if isinstance(alias, SketchedGrad) else alias
    torch.testing.assert_close(values, torch.ones(gradient.shape))


class PenalisedHead(nn.Module):
    """One weight in two graphs; in the second its gradient has another part, and stays dense."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared = nn.Linear(64, 48)

    def plain(self, x):
        return self.shared(x).tanh()

    def penalised(self, x):
        return self.shared(x).tanh() + self.shared.weight.square().mean()


@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("dense_first", [False, True])
def test_a_projected_gradient_is_not_projected_again(accumulated, dense_first):
    """G P Pᵀ of a graph that makes it dense cannot be told from G: refused, nothing changed."""
    model, compact = PenalisedHead(), sketching()
    heads = [torch.compile(head, backend=compact) for head in (model.plain, model.penalised)]
    for head in reversed(heads) if dense_first else heads:  # compiled in this order
        loss_of(head(batch())).backward()
        model.zero_grad()
    optimizer = CompactAdamW(model.parameters(), lr=1e-2)
    loss_of(heads[0](batch())).backward()
    optimizer.step()
    optimizer.zero_grad()
    if accumulated:
        loss_of(heads[0](batch())).backward()
    loss_of(heads[1](batch())).backward()
    before = model.shared.weight.detach().clone()
    with pytest.raises(ValueError, match="its state is sketched"):
        optimizer.step()
    assert torch.equal(model.shared.weight, before)


@pytest.mark.parametrize("projection", ["countsketch", "gaussian"])
def test_moments_stay_where_only_the_dtype_of_a_projection_changes(projection):
    """With and without autocast by turns: the projection is one, and so is what it carries."""
    model = Mlp()
    step = torch.compile(model, backend=sketching(projection=projection))
    optimizer = CompactAdamW(model.parameters(), lr=0.0, refresh="project")
    norms = []
    for number in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=number % 2 == 1):
            loss = loss_of(step(batch()).float())
        loss.backward()
        optimizer.step()
        norms.append(optimizer.state[model.first.weight]["exp_avg"].norm().item())
    # Gradients are the same but for rounding: m = (1 - β₁ᵗ) g.
    expected = [norms[0] * (1 - 0.9**t) / 0.1 for t in range(1, 9)]
    assert norms == pytest.approx(expected, rel=0.02)


def test_both_dtypes_of_a_countsketch_accumulate_as_one():
    """±1 is exact in every dtype."""
    model = Mlp()
    step = torch.compile(model, backend=sketching())
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = loss_of(step(batch()).float())
        loss.backward()
    assert all(weight.grad.factor is not None for weight in model.sketched)
