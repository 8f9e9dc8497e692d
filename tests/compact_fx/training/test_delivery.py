"""gradients="sketched" through torch.compile, against gradients="dense" with the same seed."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from compact_fx import CompactAdamW, compact_backend, count_step
from compact_fx.training import inputs
from compact_fx.training.gradients import SketchedGrad
from compact_fx.training.weights import known_record


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Tanh(), nn.Linear(32, 8)
    )


def batch(rows=64):
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(2))


def backend(gradients="sketched", **settings):
    defaults = {"rank": 0.25, "gradients": gradients, "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


def is_sketched(gradient):
    return isinstance(gradient, SketchedGrad) and gradient.factor is not None


def dense_of(gradient):
    return gradient.to_dense() if isinstance(gradient, SketchedGrad) else gradient


def compare(run, make=mlp, rel=1e-5, **settings):
    """Run with dense and with sketched gradients, compare all `.grad`; the latter model."""
    models = []
    for gradients in ("dense", "sketched"):
        torch._dynamo.reset()
        model = make()
        run(model, backend(gradients, **settings))
        models.append(model)
    for (name, expected), actual in zip(
        models[0].named_parameters(), models[1].parameters(), strict=True
    ):
        assert (actual.grad is None) == (expected.grad is None), name
        if expected.grad is not None:
            assert actual.grad.dtype == expected.grad.dtype
            error = (dense_of(actual.grad) - expected.grad).float().norm()
            assert error <= rel * expected.grad.float().norm(), name
    return models[1]


def once(model, compact):
    torch.compile(model, backend=compact)(batch()).pow(2).mean().backward()


@pytest.mark.parametrize("projection", ["sparse", "orthogonal"])
def test_one_backward(projection):
    """Weights get sketched gradients, biases plain ones."""
    model = compare(once, projection=projection, exclude=("4.*",))
    assert [is_sketched(model[i].weight.grad) for i in (0, 2, 4)] == [True, True, False]
    assert all(type(model[i].bias.grad) is torch.Tensor for i in (0, 2, 4))
    assert type(model[4].weight.grad) is torch.Tensor


def test_full_orthogonal_rank_is_exact():
    """Rank 1.0 gives eager's gradients."""
    model, reference = mlp(), mlp()
    once(model, backend(rank=1.0, projection="orthogonal"))
    reference(batch()).pow(2).mean().backward()
    for actual, expected in zip(model.parameters(), reference.parameters(), strict=True):
        assert isinstance(actual.grad, SketchedGrad) == (actual.dim() == 2)
        torch.testing.assert_close(dense_of(actual.grad), expected.grad, rtol=1e-4, atol=1e-6)


def test_accumulation_new_shapes_and_memory(monkeypatch):
    """One SketchedGrad, one leaf without memory for a graph, over backwards of several shapes."""
    gradients, leaves = [], []
    original = inputs.leaf_of

    def watched(*args):
        leaves.append(original(*args))
        return leaves[-1]

    monkeypatch.setattr(inputs, "leaf_of", watched)

    def run(model, compact):
        step = torch.compile(model, backend=compact)
        for rows in (64, 48, 64):
            step(batch(rows)).pow(2).mean().backward()
            gradients.append(model[0].weight.grad)
        assert len(leaves) == sum(len(plan.factor_inputs) for plan in compact.plans)

    compare(run)
    assert len({id(gradient) for gradient in gradients[3:]}) == 1
    assert leaves[0].shape == (96, 16)
    for leaf in leaves:
        assert leaf.stride() == (0, 0)
        assert leaf.untyped_storage().nbytes() == 4
        assert leaf.grad is None


def two_calls(model, compact):
    step = torch.compile(model, backend=compact)
    (step(batch()).pow(2).mean() + step(2 * batch()).pow(2).mean()).backward()


def retained(model, compact):
    loss = torch.compile(model, backend=compact)(batch()).pow(2).mean()
    loss.backward(retain_graph=True)
    loss.backward()


def zeroed(model, compact):
    once(model, compact)
    model.zero_grad(set_to_none=False)
    once(model, compact)


def checkpointed(model, compact):
    step = torch.compile(model, backend=compact)
    checkpoint(step, batch(), use_reentrant=False).pow(2).mean().backward()


def reentrant(model, compact):
    step = torch.compile(model, backend=compact)
    inputs = batch().requires_grad_()
    checkpoint(step, inputs, use_reentrant=True).pow(2).mean().backward()


@pytest.mark.parametrize("run", [two_calls, retained, zeroed, checkpointed, reentrant])
def test_stays_sketched(run):
    """Ways to reach a gradient twice, in one basis."""
    assert is_sketched(compare(run)[0].weight.grad)


def penalty(model):
    return sum(weight.pow(2).sum() for weight in model.parameters())


def penalty_last(model, compact):
    step = torch.compile(model, backend=compact)
    for _ in range(2):
        (step(batch()).pow(2).mean() + penalty(model)).backward()


def penalty_first(model, compact):
    step = torch.compile(model, backend=compact)
    (penalty(model) + step(batch()).pow(2).mean()).backward()


def eager_between(model, compact):
    once(model, compact)
    model(batch()).pow(2).mean().backward()
    once(model, compact)


def dense_before(model, compact):
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    once(model, compact)


def penalty_inside(model, compact):
    @torch.compile(backend=compact)
    def loss(x):
        return model(x).pow(2).mean() + model[0].weight.pow(2).sum()

    loss(batch()).backward()


@pytest.mark.parametrize(
    "run", [penalty_last, penalty_first, eager_between, dense_before, penalty_inside]
)
def test_with_dense_parts(run):
    """What else flows into a weight's gradient is added, in any order."""
    assert not is_sketched(compare(run)[0].weight.grad)


@pytest.mark.filterwarnings("ignore:gradients with two projections")
@pytest.mark.parametrize("both", [False, True])
def test_late_backward_delivers_in_the_old_basis(both):
    """The optimizer stepped, and the projection changed, between forward and backward."""

    def run(model, compact):
        step = torch.compile(model, backend=compact)
        first = step(batch()).pow(2).mean()
        count_step(model.parameters())
        second = step(batch()).pow(2).mean()
        first.backward()
        if both:
            second.backward()

    assert is_sketched(compare(run, update_interval=1)[0].weight.grad) is not both


def test_late_backward_of_a_checkpoint():
    """The recomputation must not draw another projection than the gradient is delivered in."""

    def run(model, compact):
        step = torch.compile(model, backend=compact)
        loss = checkpoint(step, batch(), use_reentrant=False).pow(2).mean()
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        loss.backward()

    compare(run, update_interval=1)


class Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Conv1D(96, 64), Conv1D(64, 96)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_conv1d():
    """in_features come first."""
    model = compare(once, Convolved)
    assert model.first.weight.grad.factor.shape == (16, 96)
    assert model.second.weight.grad.factor.shape == (24, 64)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Broken(Twice):
    def forward(self, x):
        x = torch.tanh(self.inner(x))
        torch._dynamo.graph_break()
        return self.outer(x)


class Shared(Twice):
    def forward(self, x):
        x = torch.tanh(self.inner(x))
        torch._dynamo.graph_break()
        return self.outer(torch.tanh(self.inner(x)))


@pytest.mark.filterwarnings("ignore:gradients with two projections")
@pytest.mark.parametrize("make", [Twice, Broken, Shared])
def test_uses_and_graphs(make):
    """A weight used twice, two graphs, and a weight in both."""
    model = compare(once, make)
    assert is_sketched(model.outer.weight.grad)
    assert is_sketched(model.inner.weight.grad)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(50, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.embed(x.argmax(-1) % 50))))


def test_tied_embedding():
    """Stays dense, and the plan says why."""
    plans = []

    def run(model, compact):
        once(model, compact)
        plans.append(compact.plans[0])

    model = compare(run, Tied)
    assert type(model.embed.weight.grad) is torch.Tensor
    assert is_sketched(model.mix.weight.grad)
    assert any(site.weight == "embed.weight" and site.reason for site in plans[1].sites)


def test_frozen():
    """No gradient, no proxy."""

    def make():
        model = mlp()
        model[2].weight.requires_grad_(False)
        return model

    model = compare(once, make)
    assert model[2].weight.grad is None
    record = known_record(model[2].weight)
    assert record is None or not record.is_factor


def test_autocast():
    """Factors come in the weight's dtype."""

    def run(model, compact):
        step = torch.compile(model, backend=compact)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step(batch()).float().pow(2).mean()
        loss.backward()

    assert is_sketched(compare(run, rel=0.02)[0].weight.grad)


def test_low_precision():
    """A bfloat16 model."""

    def run(model, compact):
        model.bfloat16()
        torch.compile(model, backend=compact)(batch().bfloat16()).float().mean().backward()

    assert is_sketched(compare(run, rel=0.02)[0].weight.grad)


def test_weights_are_not_kept_alive():
    """Neither proxies nor hooks hold the weight."""
    model = mlp()
    once(model, backend())
    reference = weakref.ref(model[0].weight)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None


def test_step_in_backward_keeps_no_weights_alive():
    """The same with an optimizer that listens to the weight."""
    model = mlp()
    optimizer = CompactAdamW(model.parameters(), step_in_backward=True)
    once(model, backend())
    reference = weakref.ref(model[0].weight)
    del model, optimizer
    torch._dynamo.reset()
    gc.collect()
    assert reference() is None


def test_copies_and_checkpoints():
    """A deep copy trains on its own proxies; state dicts know nothing of gradients."""
    model = mlp()
    compact = backend()
    once(model, compact)
    before = model[0].weight.grad.to_dense().clone()
    twin = copy.deepcopy(model)
    twin.zero_grad()
    once(twin, compact)
    torch.testing.assert_close(twin[0].weight.grad.to_dense(), before)
    torch.testing.assert_close(model[0].weight.grad.to_dense(), before)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer))
    model.zero_grad()
    once(twin, compact)
    torch.testing.assert_close(twin[0].weight.grad.to_dense(), 2 * before)
    assert model[0].weight.grad is None


def test_second_model():
    """Another instance through the same backend gets its own gradients."""
    compact, models = backend(), (mlp(), mlp())
    for model in models:
        once(model, compact)
    first, second = (model[0].weight for model in models)
    torch.testing.assert_close(first.grad.to_dense(), second.grad.to_dense())
    assert first.grad is not second.grad
    assert known_record(first) is not known_record(second)


# --- asking for a weight's gradient in other ways ------------------------------------------------


def test_autograd_grad_raises():
    """No gradient of the weight itself exists."""
    model = mlp()
    loss = torch.compile(model, backend=backend())(batch()).pow(2).mean()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):
        torch.autograd.grad(loss, model[0].weight)


@pytest.mark.xfail(strict=True, reason="None or zeros instead of the gradient")
@pytest.mark.parametrize("how", ["allow_unused", "materialize_grads"])
def test_autograd_grad_is_not_silent(how):
    """Either the gradient or an error."""
    model = mlp()
    loss = torch.compile(model, backend=backend())(batch()).pow(2).mean()
    try:
        (gradient,) = torch.autograd.grad(loss, model[0].weight, **{how: True})
    except RuntimeError:
        return
    assert gradient is not None
    assert dense_of(gradient).norm() > 0


@pytest.mark.xfail(strict=True, reason="backward(inputs=weights) leaves .grad None")
def test_backward_with_inputs():
    """The gradients that were asked for are there."""

    def run(model, compact):
        loss = torch.compile(model, backend=compact)(batch()).pow(2).mean()
        loss.backward(inputs=list(model.parameters()))

    compare(run)


WITH_A_HOOK = r"hook of the weight of shape \S+ \S+ \(2\.weight\) .* exclude the weight"


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_weights_are_refused(kind):
    """A hook would run without the gradient that it is there for."""
    model = mlp()
    getattr(model[2].weight, kind)(lambda value: None)
    with pytest.raises(RuntimeError, match=WITH_A_HOOK):
        once(model, backend())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("keeps", ["two passes", "zeros"])
def test_gradients_that_stay_are_right_with_cuda_graphs_or_raise(keeps):
    """A recorded graph writes its gradients where those of its last run are."""

    def train(mode):
        torch._dynamo.reset()
        model = mlp().cuda()
        step = torch.compile(model, backend=backend(inner="inductor", mode=mode))
        optimizer = CompactAdamW(model.parameters(), lr=1e-2)
        for _ in range(4):
            for _ in range(1 + (keeps == "two passes")):
                torch.compiler.cudagraph_mark_step_begin()
                step(batch().cuda()).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=keeps != "zeros")
        return [weight.detach().clone() for weight in model.parameters()]

    expected = train(None)
    try:
        weights = train("reduce-overhead")
    except RuntimeError as error:
        assert "has been overwritten" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=1e-4)


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("warm", [False, True])
def test_ddp_says_what_to_do(warm, request):
    """Also where the code was compiled before there were other processes."""
    model = mlp()
    step = torch.compile(model, backend=backend())
    if warm:
        step(batch()).pow(2).mean().backward()
    request.getfixturevalue("process_group")
    with pytest.raises(ValueError, match=r"need compact_fx.exchange_factors\(model\)"):
        DistributedDataParallel(step)(batch()).pow(2).mean().backward()


@pytest.mark.parametrize("collective", [dist.all_reduce, lambda tensor: dist.broadcast(tensor, 0)])
def test_collectives_are_refused(collective, request):
    """Their schemas do not say what they write: a gradient exchanged by hand would be lost."""
    model = mlp()
    once(model, backend())
    request.getfixturevalue("process_group")
    with pytest.raises(RuntimeError, match="does not know sketched gradients"):
        collective(model[0].weight.grad)


# --- checkpoints around graphs that blocks share ------------------------------------------------


class Layer(nn.Module):
    """Not an nn.Sequential: Dynamo does not compile torch's own containers in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Pair(nn.Module):
    """Two equal blocks, each compiled and checkpointed: they share one graph."""

    def __init__(self, use_reentrant=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Layer() for _ in range(2))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def test_a_checkpoint_recomputes_with_the_keys_of_its_own_block():
    """One block is stepped between forward and backward, the other is not."""
    exact, model = Pair(), Pair()
    full = backend(rank=1.0, projection="orthogonal", update_interval=1)
    for block in model.blocks:
        block.compile(backend=full)
    x = torch.randn(32, 64, requires_grad=True)
    exact(x).pow(2).mean().backward()
    loss = model(x).pow(2).mean()
    count_step(model.blocks[0].parameters())
    loss.backward()
    for expected, actual in zip(exact.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(dense_of(actual.grad), expected.grad, rtol=1e-4, atol=1e-6)


def test_another_forward_before_a_late_backward_is_refused():
    """Which projection to recompute in cannot be known then: an error, no wrong gradient."""
    model = Pair()
    compact = backend(update_interval=1)
    for block in model.blocks:
        block.compile(backend=compact)
    x = torch.randn(32, 64, requires_grad=True)
    loss = model(x).pow(2).mean()
    count_step(model.parameters())
    model(x)
    with pytest.raises(RuntimeError, match=r"call backward before optimizer\.step"):
        loss.backward()


def test_a_reentrant_checkpoint_sees_changes():
    """Its only forward with gradients is in the backward pass."""
    model = Pair(use_reentrant=True)
    compact = backend(update_interval=1)
    for block in model.blocks:
        block.compile(backend=compact)
    x = torch.randn(32, 64, requires_grad=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    keys = []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        keys.append(model.blocks[0].linear.weight.grad.basis.key)
        optimizer.step()
    assert len(set(keys)) == 3


def test_a_recomputation_that_delivers_nothing_is_forgotten():
    """A saliency map through a checkpoint, then a change of projections and an ordinary pass."""
    model = mlp()
    step = torch.compile(model, backend=backend(update_interval=1))
    x = batch().requires_grad_()
    torch.autograd.grad(checkpoint(step, x, use_reentrant=False).sum(), x)
    count_step(model.parameters())
    step(batch()).sum().backward()
    assert is_sketched(model[0].weight.grad)
