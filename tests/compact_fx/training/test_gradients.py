"""SketchedGrad against the dense tensor it stands for, operator by operator."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compact_fx.projections import DRAWN, DrawnBasis, Projection
from compact_fx.training import gradients as sketched_grad
from compact_fx.training.gradients import ConsumedGrad, SketchedGrad


def sketched(dim=1, kind="gaussian", m=6, n=16, rank=4, key=7, seed=0, dtype=torch.float32):
    """A gradient of shape (m, n), or (n, m) where in_features come first."""
    generator = torch.Generator().manual_seed(seed)
    shape = (m, rank) if dim == 1 else (rank, m)
    factor = torch.randn(shape, generator=generator).to(dtype)
    projection = Projection(salt=1, features=n, rank=rank, kind=kind, dtype=torch.float32)
    return SketchedGrad(factor, DrawnBasis(projection=projection, seed=0, generation=key, dim=dim))


def dense_of(value):
    return value.to_dense() if isinstance(value, SketchedGrad) else value


def close(actual, expected):
    actual, expected = dense_of(actual), dense_of(expected)
    finite = expected.double().nan_to_num()
    scale = finite.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * scale)


def is_sketched(gradient):
    return isinstance(gradient, SketchedGrad) and gradient.factor is not None


@pytest.fixture(params=[(d, k) for d in (0, 1) for k in DRAWN], ids=lambda p: f"in{p[0]}-{p[1]}")
def pair(request):
    """A sketched gradient and a dense copy."""
    gradient = sketched(*request.param)
    return gradient, gradient.to_dense().clone()


def other(dim=1, **settings):
    return sketched(dim, seed=1, **settings)


STAY_SKETCHED = {
    "clone": lambda g: g.clone(),
    "detach": lambda g: g.detach(),
    "data": lambda g: g.data,
    "deepcopy": copy.deepcopy,
    "neg": lambda g: -g,
    "mul": lambda g: g * 3,
    "rmul": lambda g: 0.5 * g,
    "mul 0-d": lambda g: g * torch.tensor(0.25),
    "mul 0-d double": lambda g: g * torch.tensor(0.25, dtype=torch.float64),
    "div": lambda g: g / 3,
    "div 0-d": lambda g: g / torch.tensor(3.0),
    "add itself": lambda g: g + g,
    "add alpha": lambda g: torch.add(g, g, alpha=0.5),
    "data.mul_": lambda g: (g.data.mul_(3), g)[1],
    "detach_": lambda g: g.detach_().mul_(2),
    "zero_": lambda g: g.zero_(),
    "neg_": lambda g: g.neg_(),
    "mul_": lambda g: g.mul_(-2.5),
    "mul_ 0-d": lambda g: g.mul_(torch.tensor(0.3)),
    "imul": lambda g: g.__imul__(2),
    "div_": lambda g: g.div_(7),
    "div_ 0-d": lambda g: g.div_(torch.tensor(0.3)),
    "add_ itself": lambda g: g.add_(g),
    "_foreach_mul_": lambda g: (torch._foreach_mul_([g], 0.5), g)[1],
    "_foreach_mul_ 0-d": lambda g: (torch._foreach_mul_([g], torch.tensor(0.5)), g)[1],
    "_foreach_mul_ list": lambda g: (torch._foreach_mul_([g], [0.5]), g)[1],
    "_foreach_div_": lambda g: (torch._foreach_div_([g], 3.0), g)[1],
    "_foreach_zero_": lambda g: (torch._foreach_zero_([g]), g)[1],
}


@pytest.mark.parametrize("name", STAY_SKETCHED)
def test_stays_sketched(pair, name):
    """Copies and scaling work on the factor, in place where the operator is."""
    gradient, dense = pair
    result, expected = STAY_SKETCHED[name](gradient), STAY_SKETCHED[name](dense)
    close(result, expected)
    close(gradient, dense)
    assert is_sketched(result)
    assert is_sketched(gradient)


def without(g, h):
    return g - h


READ = {
    "sub": lambda g: without(g, g.clone() * 0.5),
    "sub plain": lambda g: without(g, 1.5),
    "add plain": lambda g: g + torch.arange(g.numel()).view(g.shape),
    "radd plain": lambda g: torch.ones(g.shape) + g,
    "mul plain": lambda g: g * torch.arange(g.numel()).view(g.shape),
    "mul row": lambda g: g * torch.arange(g.shape[1]),
    "div floor": lambda g: torch.div(g, 0.3, rounding_mode="floor"),
    "rdiv": lambda g: 1 / g,
    "isfinite": lambda g: g.isfinite().all(),
    "isnan": lambda g: torch.isnan(g).any(),
    "greater": lambda g: g > 0,
    "equal": lambda g: torch.equal(g, g),
    "eq": lambda g: g == g.clone(),
    "index": lambda g: g[2],
    "item": lambda g: g[2, 3].item(),
    "slices": lambda g: g[1:3, ::2],
    "mask": lambda g: g[g > 0],
    "list": lambda g: g[[0, 2]],
    "transposed": lambda g: g.T @ g,
    "flat": lambda g: g.reshape(-1),
    "view": lambda g: g.view(-1),
    "contiguous": lambda g: g.contiguous(),
    "double": lambda g: g.to(torch.float64),
    "half": lambda g: g.half().float(),
    "cpu": lambda g: g.cpu(),
    "sum": lambda g: g.sum(dim=0),
    "abs max": lambda g: g.abs().max(),
    "zeros_like": torch.zeros_like,
    "cat": lambda g: torch.cat([g, g]),
    "vector": lambda g: nn.utils.parameters_to_vector([g]),
    "flatten": lambda g: torch._utils._flatten_dense_tensors([g, g]),
    "_foreach_mul": lambda g: torch._foreach_mul([g], 2.0)[0],
    "_foreach_div list": lambda g: torch._foreach_div([g], [2.0])[0],
    "matmul": lambda g: g @ torch.ones(g.shape[1], 2),
    "norm 2": lambda g: torch.linalg.vector_norm(g, 2),
    "norm": lambda g: g.norm(),
    "norm p=2": lambda g: g.norm(2),
    "norm fro": lambda g: torch.norm(g, p="fro"),
    "norm 1": lambda g: g.norm(1),
    "norm 3": lambda g: torch.linalg.vector_norm(g, 3),
    "norm 0": lambda g: torch.linalg.vector_norm(g, 0),
    "norm inf": lambda g: torch.linalg.vector_norm(g, float("inf")),
    "norm -inf": lambda g: torch.linalg.vector_norm(g, float("-inf")),
    "norm rows": lambda g: torch.linalg.vector_norm(g, 2, dim=1),
    "norm kept": lambda g: torch.linalg.vector_norm(g, 2, keepdim=True),
    "norm double": lambda g: torch.linalg.vector_norm(g, 2, dtype=torch.float64),
    "matrix norm": torch.linalg.matrix_norm,
    "_foreach_norm": lambda g: torch._foreach_norm([g, torch.ones(2)])[0],
    "_foreach_norm inf": lambda g: torch._foreach_norm([g], float("inf"))[0],
}


@pytest.mark.parametrize("name", READ)
def test_reading_sees_the_dense_tensor(pair, name):
    """Other operators give what they give for a dense tensor, and leave the gradient sketched."""
    gradient, dense = pair
    result, expected = READ[name](gradient), READ[name](dense)
    if isinstance(expected, torch.Tensor):
        assert result.dtype == expected.dtype
        close(result, expected)
    else:
        assert result == pytest.approx(expected, rel=1e-5)
    assert is_sketched(gradient)


WRITE = {
    "clamp_": lambda g: g.clamp_(-0.5, 0.5),
    "clamp_ keywords": lambda g: g.clamp_(min=-0.5, max=0.5),
    "add_ plain": lambda g: g.add_(torch.ones(g.shape), alpha=0.5),
    "iadd plain": lambda g: g.__iadd__(torch.ones(g.shape)),
    "sub_ itself": lambda g: g.sub_(g, alpha=0.5),
    "mul_ plain": lambda g: g.mul_(torch.arange(g.numel()).view(g.shape)),
    "mul_ itself": lambda g: g.mul_(g),
    "mul_ one element": lambda g: g.mul_(torch.tensor([2.0])),
    "div_ floor": lambda g: g.div_(0.3, rounding_mode="floor"),
    "fill_": lambda g: g.fill_(2),
    "copy_": lambda g: g.copy_(torch.ones(g.shape)),
    "nan_to_num_": lambda g: torch.nan_to_num_(g),
    "masked_fill_": lambda g: g.masked_fill_(g.to_dense() > 0, 1.0),
    "lerp_": lambda g: g.lerp_(torch.ones(g.shape), 0.3),
    "out": lambda g: torch.add(torch.ones(g.shape), 1, out=g),
    "set by mask": lambda g: (g.__setitem__(torch.ones(g.shape) > 0, 1.0), g)[1],
    "set by list": lambda g: (g.__setitem__([0, 2], 1.0), g)[1],
    "set all": lambda g: (g.__setitem__(slice(None), 1.0), g)[1],
    "_foreach_add_": lambda g: (torch._foreach_add_([g], [torch.ones(g.shape)]), g)[1],
    "_foreach_clamp_min_": lambda g: (torch._foreach_clamp_min_([g], -0.5), g)[1],
    "_foreach_copy_": lambda g: (torch._foreach_copy_([g], [torch.ones(g.shape)]), g)[1],
}


@pytest.mark.parametrize("name", WRITE)
def test_other_writing_makes_it_dense(pair, name):
    """The gradient itself has the new values, and goes on as a dense one."""
    gradient, dense = pair
    assert WRITE[name](gradient) is gradient
    WRITE[name](dense)
    close(gradient, dense)
    assert gradient.factor is None
    for follower, function in (STAY_SKETCHED | WRITE).items():
        if follower != "deepcopy":
            close(function(gradient), function(dense))
        close(gradient, dense)
    assert gradient.factor is None


SHARED = {
    "data.clamp_": lambda g: g.data.clamp_(-0.1, 0.1),
    "data.add_": lambda g: g.data.add_(torch.ones(g.shape)),
    "data.copy_": lambda g: g.data.copy_(torch.ones(g.shape)),
    "detach.add_": lambda g: g.detach().add_(1),
    "set data": lambda g: setattr(g, "data", g.data * 3),
    "set data plain": lambda g: setattr(g, "data", torch.ones(g.shape)),
    "set row": lambda g: g.__setitem__(0, 0),
    "set rows": lambda g: g.__setitem__(slice(0, 2), 0),
    "set column": lambda g: g.__setitem__((slice(None), 0), 0),
    "row": lambda g: g[0].add_(3),
    "view": lambda g: g.view(-1).mul_(3),
    "reshape": lambda g: g.reshape(-1).mul_(3),
    "T": lambda g: g.T.mul_(3),
    "narrow": lambda g: g.narrow(0, 0, 2).zero_(),
    "split": lambda g: g.split(2)[0].zero_(),
    "iterate": lambda g: [row.zero_() for row in g],
    "diagonal": lambda g: g.diagonal().zero_(),
    "fill_diagonal_": lambda g: g.fill_diagonal_(2),
}


@pytest.mark.parametrize("name", SHARED)
def test_writing_through_a_view_arrives(name):
    """As with a dense tensor, or it raises; never silently lost."""
    gradient = sketched()
    dense = gradient.to_dense().clone()
    SHARED[name](dense)
    try:
        SHARED[name](gradient)
    except (RuntimeError, NotImplementedError):
        return
    close(gradient, dense)


def test_twice_in_a_list():
    """Tied weights may put one gradient into a list twice."""
    gradient = sketched()
    dense = gradient.to_dense().clone()
    ones = torch.ones(dense.shape)
    torch._foreach_add_([gradient, gradient], [ones, ones])
    torch._foreach_add_([dense, dense], [ones, ones])
    close(gradient, dense)


def test_deepcopy_of_a_dense_one():
    """torch asks of a wrapper that its clone is of its class."""
    gradient = sketched().clamp_(-0.5, 0.5)
    close(copy.deepcopy(gradient), gradient)


def test_another_basis():
    """The sum of two bases is dense, right, and warned of once."""
    sketched_grad._warn_of_two_bases.cache_clear()
    with pytest.warns(UserWarning, match="two projections are added"):
        result = sketched() + other(key=8)
    assert not isinstance(result, SketchedGrad)
    close(result, sketched().to_dense() + other(key=8).to_dense())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient = sketched()
        gradient += other(key=8)
        close(sketched() + other(dim=0, m=16, n=6), dense_sum())
    assert gradient.factor is None
    close(gradient, result)
    gradient += other(key=9)
    close(gradient, result + other(key=9).to_dense())


def dense_sum():
    return sketched().to_dense() + other(dim=0, m=16, n=6).to_dense()


@pytest.mark.parametrize("dim", [0, 1])
def test_same_basis(dim):
    """Sums in one basis are sums of factors; in place the storage stays."""
    first, second = sketched(dim), other(dim)
    expected = first.to_dense() + 0.5 * second.to_dense()
    result = torch.add(first, second, alpha=0.5)
    assert is_sketched(result)
    close(result, expected)
    storage = first.factor.data_ptr()
    first.add_(second, alpha=0.5)
    assert is_sketched(first)
    assert first.factor.data_ptr() == storage
    close(first, expected)
    close(first - second, expected - second.to_dense())


@settings(max_examples=60)
@given(
    m=st.integers(1, 12),
    n=st.integers(1, 40),
    fraction=st.floats(0, 1),
    dim=st.sampled_from([0, 1]),
    kind=st.sampled_from(DRAWN),
    key=st.integers(0, 2**63 - 1),
    number=st.floats(-4, 4, width=32),
)
def test_any_shape(m, n, fraction, dim, kind, key, number):
    """Shape, values, norm, scaling and sums for all shapes, ranks and keys."""
    same = {"m": m, "n": n, "rank": max(1, round(fraction * n)), "kind": kind, "key": key}
    gradient, second = sketched(dim, **same), other(dim, **same)
    p = gradient.basis.matrix(torch.device("cpu"), torch.float32)
    expected = gradient.factor @ p.T if dim == 1 else p @ gradient.factor
    assert gradient.shape == expected.shape
    assert gradient.stride() == expected.stride()
    close(gradient, expected)
    close(torch.linalg.vector_norm(gradient), torch.linalg.vector_norm(expected))
    scale = (gradient.to_dense().abs() + second.to_dense().abs()).max().item()
    both = expected + second.to_dense() * number
    torch.testing.assert_close(
        (gradient + second * number).to_dense(), both, rtol=1e-5, atol=1e-5 * scale * 5
    )


def test_describes_itself():
    """Printing shows no values and draws no projection."""
    gradient = sketched()
    expected = "SketchedGrad(shape=(6, 16), dtype=torch.float32, rank=4)"
    assert repr(gradient) == str(gradient) == f"{gradient}" == expected
    gradient.clamp_(0)
    assert repr(gradient).endswith("dense)")
    assert not gradient.requires_grad
    assert gradient.device == torch.device("cpu")


def test_saving():
    """A gradient is saved as the plain dense tensor that it stands for."""
    buffer = io.BytesIO()
    torch.save(sketched(), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is torch.Tensor
    close(loaded, sketched())


def test_state_of_sgd_loads():
    """The state of a plain optimizer is loadable as torch.load does by default."""
    weights, _ = weights_with_gradients()
    optimizer = torch.optim.SGD(weights, momentum=0.9)
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    torch.load(buffer)


@pytest.mark.parametrize(
    "read",
    [
        dense_of,
        torch.linalg.vector_norm,
        lambda gradient: gradient.add_(torch.ones(gradient.shape)).to_dense(),
        lambda gradient: nn.utils.get_total_norm([gradient], foreach=True),
    ],
)
def test_under_autocast(read):
    """Autocast is for the model: a gradient keeps its dtype and precision."""
    expected = read(sketched())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = read(sketched())
    torch.testing.assert_close(actual, expected)


def test_norm_of_infinite():
    """Clipping by an infinite norm gives zeros, by NaN it would spoil every weight."""
    gradient = sketched()
    gradient.factor[0, 0] = float("inf")
    assert torch.linalg.vector_norm(gradient.to_dense()).isinf()
    assert torch.linalg.vector_norm(gradient).isinf()


def test_norm_of_double():
    """A double gradient has a double's norm."""
    gradient = sketched(dtype=torch.float64)
    expected = torch.linalg.vector_norm(gradient.to_dense())
    torch.testing.assert_close(torch.linalg.vector_norm(gradient), expected, rtol=1e-12, atol=0)


# --- utilities and optimizers --------------------------------------------------------------------


def weights_with_gradients(step=0):
    """Weights with sketched gradients (both orientations) and one dense; and a dense copy."""
    torch.manual_seed(0)
    weights, copies = [], []
    for dim in (0, 1, None):
        gradient = torch.ones(4) if dim is None else sketched(dim, seed=step)
        weights.append(nn.Parameter(torch.randn(gradient.shape)))
        copies.append(nn.Parameter(weights[-1].detach().clone()))
        weights[-1].grad, copies[-1].grad = gradient, dense_of(gradient).clone()
    return weights, copies


def same_gradients(weights, copies):
    for weight, copied in zip(weights, copies, strict=True):
        close(weight.grad, copied.grad)


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, float("inf")])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clip_grad_norm(foreach, norm_type, max_norm):
    """Gradients are clipped alike and stay sketched."""
    weights, copies = weights_with_gradients()
    clip = nn.utils.clip_grad_norm_
    close(
        clip(weights, max_norm, norm_type, foreach=foreach),
        clip(copies, max_norm, norm_type, foreach=foreach),
    )
    same_gradients(weights, copies)
    assert is_sketched(weights[0].grad)
    assert is_sketched(weights[1].grad)


@pytest.mark.parametrize("foreach", [True, False, None])
def test_other_utilities(foreach):
    """clip_grad_value_, get_total_norm and clip_grads_with_norm_."""
    weights, copies = weights_with_gradients()
    total = nn.utils.get_total_norm([w.grad for w in weights], foreach=foreach)
    close(total, nn.utils.get_total_norm([w.grad for w in copies], foreach=foreach))
    nn.utils.clip_grads_with_norm_(weights, 0.5, total, foreach=foreach)
    nn.utils.clip_grads_with_norm_(copies, 0.5, total, foreach=foreach)
    same_gradients(weights, copies)
    assert is_sketched(weights[0].grad)
    nn.utils.clip_grad_value_(weights, 0.01, foreach=foreach)
    nn.utils.clip_grad_value_(copies, 0.01, foreach=foreach)
    same_gradients(weights, copies)


@pytest.mark.parametrize("bad", [None, float("inf"), float("nan")])
@pytest.mark.parametrize("dense_too", [False, True])
def test_scaler(bad, dense_too):
    """Unscaled in the factor; a step with a non-finite gradient is skipped."""
    weights, copies = weights_with_gradients()
    if dense_too:
        weights[0].grad.clamp_(-0.5, 0.5)
        copies[0].grad.clamp_(-0.5, 0.5)
    if bad is not None:
        weights[1].grad.factor[2, 1] = bad
    before = [w.detach().clone() for w in weights]
    results = []
    for own in (weights, copies):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        optimizer = torch.optim.SGD(own, lr=0.1)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        results.append(scaler.get_scale())
    if bad is None:
        same_gradients(weights, copies)
        assert is_sketched(weights[1].grad) or dense_too
        for weight, copied in zip(weights, copies, strict=True):
            close(weight.detach(), copied.detach())
        assert results == [8.0, 8.0]
    else:
        assert results == [4.0, 8.0]
        for weight, old in zip(weights, before, strict=True):
            assert torch.equal(weight, old)


def test_scaler_leaves_the_others_sketched():
    """Unscaling beside a gradient that has become dense."""
    weights, _ = weights_with_gradients()
    weights[0].grad.clamp_(-0.5, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    scaler.unscale_(torch.optim.SGD(weights, lr=0.1))
    assert is_sketched(weights[1].grad)


@pytest.mark.parametrize("foreach", [True, False])
def test_zero_grad(foreach):
    """Both forms."""
    weights, _ = weights_with_gradients()
    optimizer = torch.optim.SGD(weights, foreach=foreach)
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(dense_of(w.grad), torch.zeros(w.shape)) for w in weights)
    assert is_sketched(weights[0].grad)
    optimizer.zero_grad()
    assert all(w.grad is None for w in weights)


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1}),
    "maximize": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
}


@pytest.mark.parametrize("form", ["foreach", "fused", "plain"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:gradients with two projections")
def test_plain_optimizers(name, form):
    """Three steps, in the last of which the projection has changed."""
    optimizer_class, arguments = OPTIMIZERS[name]
    weights, copies = weights_with_gradients()
    how = {"foreach": form == "foreach", "fused": form == "fused"}
    first = optimizer_class(weights, **arguments, **how)
    second = optimizer_class(copies, **arguments, **how)
    for step, key in enumerate((7, 7, 8)):
        for weight, copied, dim in zip(weights, copies, (0, 1, None), strict=True):
            if dim is not None:
                weight.grad = sketched(dim, seed=step, key=key)
                copied.grad = weight.grad.to_dense().clone()
        first.step()
        second.step()
        for weight, copied in zip(weights, copies, strict=True):
            close(weight.detach(), copied.detach())


def test_consumed():
    """A consumed gradient has the weight's shape, prints, and raises for any use."""
    gradient = ConsumedGrad(torch.zeros(3, 5))
    assert gradient.shape == (3, 5)
    assert repr(gradient) == "ConsumedGrad(shape=(3, 5))"
    weight = nn.Parameter(torch.zeros(3, 5))
    weight.grad = gradient
    for use in (
        lambda: gradient + 1,
        lambda: gradient.mul_(2),
        lambda: gradient.zero_(),
        lambda: gradient[0],
        lambda: gradient.norm(),
        lambda: gradient.clone(),
        lambda: nn.utils.clip_grad_norm_([weight], 1.0),
        lambda: torch.optim.SGD([weight]).step(),
        lambda: torch.optim.SGD([weight]).zero_grad(set_to_none=False),
        lambda: sketched(m=3, n=5, rank=2) + gradient,
        lambda: gradient.add_(sketched(m=3, n=5, rank=2)),
    ):
        with pytest.raises(RuntimeError, match="step_in_backward"):
            use()
    torch.optim.SGD([weight]).zero_grad()
    assert weight.grad is None


# ---------------------------------------------------------------------------------------------
# Experts: a batch of matrices with one projection
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [True, False])
def test_a_batch_is_matrix_by_matrix(last):
    """Dense values, norm, compression and what stays sketched, for (3, m, n) and (3, n, m)."""
    matrices = [sketched(int(last), seed=i) for i in range(3)]
    basis = DrawnBasis(projection=matrices[0].basis.projection, seed=0, generation=7, dim=1 + last)
    gradient = SketchedGrad(torch.stack([g.factor for g in matrices]), basis)
    dense = torch.stack([g.to_dense() for g in matrices])
    assert gradient.shape == dense.shape
    close(gradient, dense)
    close(gradient.norm(), dense.norm())
    close(basis.compress(dense), torch.stack([g.basis.compress(g.to_dense()) for g in matrices]))
    for change in (lambda g: g + g, lambda g: g * 3, lambda g: g.clone().div_(2)):
        assert is_sketched(change(gradient))
        close(change(gradient), change(dense))
    close(gradient - 1.5, dense - 1.5)


def test_old_versions_are_forgotten():
    """Their tables would fill a device's memory."""
    projection = Projection(salt=99, features=64, rank=16, kind="countsketch", dtype=torch.float32)
    cpu = torch.device("cpu")
    basis = DrawnBasis(projection=projection, seed=0, generation=1, dim=1)
    first = basis.matrix(cpu, torch.float32)
    table = weakref.ref(basis.source(cpu))
    del basis
    gc.collect()
    assert table() is None
    again = DrawnBasis(projection=projection, seed=0, generation=1, dim=1).matrix(
        cpu, torch.float32
    )
    assert torch.equal(again, first)


def test_what_inference_mode_draws_serves_training_too():
    """A norm that is asked for there must not leave tensors that no backward pass may keep."""
    projection = Projection(salt=98, features=64, rank=16, kind="countsketch", dtype=torch.float32)
    with torch.inference_mode():
        basis = DrawnBasis(projection=projection, seed=0, generation=5, dim=1)
        basis.matrix(torch.device("cpu"), torch.float32)
    assert not basis.source(torch.device("cpu")).is_inference()


@pytest.mark.parametrize("kind", DRAWN)
def test_a_part_without_rows_has_no_norm(kind):
    """Of a sharded gradient, where there are fewer rows than processes."""
    gradient = sketched(kind=kind, m=0)
    assert gradient.norm() == 0
    assert torch.nn.utils.get_total_norm([gradient, sketched(kind=kind)]) > 0
