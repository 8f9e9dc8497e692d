"""Moments in 8 bits: what a rounding does, and steps, rotations, copies and checkpoints of them."""

import copy
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from compact_fx import CompactAdamW, SketchedGrad, _torch, compact_backend, compact_optimizer
from compact_fx.projections import DrawnBasis, Projection, TrackedBasis, Version
from compact_fx.training import low_bit, stand_ins
from compact_fx.training.moments import SIGNS

FEATURES, RANK, ROWS = 64, 32, 160  # a factor of 5120 elements


def noise(number: int = 0) -> Tensor:
    return low_bit.noise_of(number, "exp_avg", torch.device("cpu"))


def spread(*shape: int, signed: bool = True) -> Tensor:
    """Numbers over five decades, some of them 0."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10 ** (-5 * torch.rand(shape, generator=generator) - 3)
    sizes[torch.rand(shape, generator=generator) < 0.1] = 0.0
    signs = torch.randint(2, shape, generator=generator) * 2 - 1
    return sizes * signs if signed else sizes.square()


def there_and_back(values: Tensor, signed: bool, number: int = 0) -> Tensor:
    codes, scale = low_bit.quantize(values, noise(number), signed=signed)
    assert codes.dtype is torch.uint8
    assert codes.shape == (values.numel(),)
    assert scale.shape == (-(-values.numel() // 256),)
    return low_bit.dequantize(codes, scale, signed=signed).view(values.shape)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(5000,), (3, 7, 256), (1, 5)])
def test_a_rounding_is_off_by_an_eighth_at_most(signed, shape):
    """Zeros stay, squares above 0 as well; what is rounded already stays to the bit."""
    values = spread(*shape, signed=signed)
    found = there_and_back(values, signed)
    assert ((found - values).abs() <= values.abs() / 8 + 2**-15 * values.abs().max()).all()
    large = values.abs() > values.abs().max() * 2**-15
    assert ((found - values).abs() <= values.abs() / 8)[large].all()
    assert (found[values == 0] == 0).all()
    assert torch.equal(there_and_back(found, signed, 1), found)
    if not signed:
        assert (found > 0).equal(values > 0)


@pytest.mark.parametrize("signed", [True, False])
def test_a_rounding_is_right_in_the_mean(signed):
    values = spread(2048, signed=signed)
    values = torch.where(values.abs() > values.abs().max() * 2**-14, values, 0.0)
    found = torch.stack([there_and_back(values, signed, number) for number in range(2000)])
    error = (found.mean(0) - values) / values.abs().clamp_min(1e-30)
    assert error.abs().max() < 6 * 0.125 / 2 / 2000**0.5
    assert error.mean().abs() < 3e-4


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_so(value):
    values = spread(512)
    values[3] = value
    found = there_and_back(values, signed=True)
    assert not found[3].isfinite()
    assert found[256:].isfinite().all()


@pytest.mark.long
@pytest.mark.parametrize("signed", [True, False])
def test_compiled_it_is_the_same(signed):
    values = spread(5000, signed=signed)
    back = low_bit.quantize(values, noise(), signed=signed)

    def quantize(values, noise):
        return low_bit.quantize(values, noise, signed=signed)

    def dequantize(codes, scale):
        return low_bit.dequantize(codes, scale, signed=signed)

    compiled = _torch.compile_function(quantize, values, noise())(values, noise())
    assert all(map(torch.equal, compiled, back))
    expected = low_bit.dequantize(*back, signed=signed)
    assert torch.equal(_torch.compile_function(dequantize, *back)(*back), expected)


# --- steps ---------------------------------------------------------------------------------------


def assert_rounded(found, exact):
    assert found.dtype is exact.dtype is torch.float32
    assert ((found - exact).abs() <= exact.abs() / 8 + 2**-15 * exact.abs().max()).all()


def factor_of(run):
    return run.weights[0].grad.factor.float()


class Run:
    """A sketched and two dense weights, one of them small, with gradients at random."""

    def __init__(self, projection="countsketch", dtype=torch.float32, **settings):
        torch.manual_seed(0)
        shapes = ((ROWS, FEATURES), (80, 64), (7, 9))
        self.weights = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
        self.projection = Projection(
            salt=1, features=FEATURES, rank=RANK, kind=projection, dtype=dtype
        )
        orthonormal = torch.linalg.qr(torch.randn(2, FEATURES, RANK)).Q.to(dtype)
        self.versions = [Version(matrix, n) for n, matrix in enumerate(orthonormal)]
        self.optimizer = self.make(**settings)

    def make(self, make=CompactAdamW, **settings):
        return make(self.weights, **{"lr": 1e-2, "state_dtype": "fp8"} | settings)

    def basis(self, generation):
        if self.projection.is_tracked:
            version = self.versions[generation]
            return TrackedBasis(projection=self.projection, seed=0, version=version, dim=1)
        return DrawnBasis(projection=self.projection, seed=0, generation=generation, dim=1)

    def step(self, *numbers):
        """The projection changes before step 3."""
        for number in numbers:
            generator = torch.Generator().manual_seed(number)
            sketched, *dense = self.weights
            factor = torch.randn(ROWS, RANK, generator=generator) + 0.3
            basis = self.basis(int(number >= 3))
            sketched.grad = SketchedGrad(factor.to(sketched.dtype), basis)
            for weight in dense:
                gradient = torch.randn(weight.shape, generator=generator) + 0.3
                weight.grad = gradient.to(weight.dtype)
            self.optimizer.step()

    def numbers(self, which=0):
        return low_bit.decode([self.optimizer.state[self.weights[which]]], SIGNS)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["countsketch", "tracked"])
def test_a_step_is_that_of_the_rounded_numbers(projection, dtype):
    """From moments in 8 bits as from the same in float32, rotated or projected on the way."""
    coded = Run(projection, dtype, refresh="project")
    coded.step(0, 1, 2)
    plain = Run(projection, dtype, refresh="project", state_dtype=torch.float32)
    weights = zip(coded.weights, plain.weights, strict=True)
    for number, (weight, other) in enumerate(weights):
        other.data.copy_(weight)
        plain.optimizer.state[other] = {
            name: value.clone().to(torch.float32 if number == 0 else dtype)
            for name, value in coded.numbers(number).items()
        }
    plain.optimizer._bases = {plain.weights[0]: coded.basis(0)}
    plain.versions = coded.versions
    before = coded.numbers()["exp_avg"]
    coded.step(3)
    plain.step(3)
    # torch steps dense weights of bf16 in bf16
    for number in range(3 if dtype is torch.float32 else 1):
        assert torch.equal(coded.weights[number], plain.weights[number])
    for name in ("exp_avg", "exp_avg_sq"):
        exact, found = plain.optimizer.state[plain.weights[0]][name], coded.numbers()[name]
        assert_rounded(found, exact)
        assert not torch.equal(found, exact)
    turned = coded.basis(0).change_to(coded.basis(1), before)
    kept = plain.optimizer.state[plain.weights[0]]["exp_avg"] - 0.1 * factor_of(plain)
    torch.testing.assert_close(kept, 0.9 * turned, rtol=1e-5, atol=1e-6)


def test_dense_weights_of_bf16_are_stepped_in_float32():
    run = Run(dtype=torch.bfloat16)
    exact = [nn.Parameter(weight.detach().float()) for weight in run.weights[1:]]
    run.step(0)
    for mine, weight in zip(exact, run.weights[1:], strict=True):
        mine.grad = weight.grad.float()
    torch.optim.AdamW(exact, lr=1e-2).step()
    for mine, weight in zip(exact, run.weights[1:], strict=True):
        assert torch.equal(mine.bfloat16(), weight)
    assert run.optimizer.state[run.weights[2]]["exp_avg"].dtype is torch.float32


def test_bytes_of_a_state():
    """One for each element and four for 256 of them; what is small is in float32."""
    run = Run()
    run.step(0, 1, 2, 3)
    storages, expected = {}, 0
    for weight, count in zip(run.weights, (ROWS * RANK, 80 * 64, 7 * 9), strict=True):
        state = run.optimizer.state[weight]
        moments = [v for k, v in state.items() if k.startswith("exp_avg")]
        size = 2 * (count + 4 * count // 256 if count >= 4096 else 4 * count)
        assert sum(value.nbytes for value in moments) == size
        expected += size
        storages |= {v.untyped_storage().data_ptr(): v.untyped_storage() for v in moments}
    assert sum(storage.nbytes() for storage in storages.values()) == expected


def test_numbers_are_gone_when_they_are_in_8_bits_again(monkeypatch):
    """Before the weights get their updates: what is alive then is part of the peak."""
    run = Run()
    run.step(1)
    numbers, alive = [], []
    decode, update = low_bit.decode, run.optimizer._update

    def decoded(states, signs):
        found = decode(states, signs)
        moments = (state[name] for state in found for name in signs if name in state)
        numbers.extend(map(weakref.ref, moments))
        return found

    def updated(*args):
        alive.extend(reference() is not None for reference in numbers)
        update(*args)

    monkeypatch.setattr(low_bit, "decode", decoded)
    monkeypatch.setattr(run.optimizer, "_update", updated)
    run.step(2)
    assert len(alive) == 2 * len(run.weights)
    assert sum(alive) == 2  # of the small weight, which stays in float32


def test_a_weight_that_is_not_stepped_keeps_no_memory_of_others():
    weights = [nn.Parameter(torch.randn(64, 128)) for _ in range(3)]
    optimizer = CompactAdamW(weights, state_dtype="fp8")
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    for state in optimizer.state.values():
        for value in state.values():
            assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("loaded", ["fp8", None])
def test_fused_kernels_find_moments_laid_out_as_weights(loaded):
    def train(is_transposed):
        generator = torch.Generator().manual_seed(0)

        def values():
            drawn = torch.randn(128, 64, generator=generator)
            return drawn.t().contiguous().t() if is_transposed else drawn

        weight = nn.Parameter(values())
        optimizer = CompactAdamW([weight], state_dtype="fp8", fused=True)
        for step in range(4):
            if step == 2:
                saved = copy.deepcopy(optimizer.state_dict())
                optimizer = CompactAdamW([weight], state_dtype=loaded, fused=True)
                optimizer.load_state_dict(saved)
            weight.grad = values()
            optimizer.step()
        return weight.detach()

    assert torch.allclose(train(True), train(False), atol=1e-6)


@pytest.mark.parametrize("restore", ["load", "deepcopy", "pickle"])
def test_a_copy_goes_on_to_the_bit(restore):
    """Roundings at random are part of the state; no generator of torch's is used."""
    run = Run()
    before = torch.get_rng_state()
    run.step(0, 1)
    assert torch.equal(torch.get_rng_state(), before)
    if restore == "load":
        file = io.BytesIO()
        torch.save(run.optimizer.state_dict(), file)
        file.seek(0)
        twin = Run()
        twin.weights = [nn.Parameter(weight.detach().clone()) for weight in run.weights]
        twin.optimizer = twin.make()
        twin.optimizer.load_state_dict(torch.load(file, weights_only=True))
    elif restore == "deepcopy":
        twin = copy.deepcopy(run)
    else:
        twin = pickle.loads(pickle.dumps(run))
    for steps in ((), (2, 3, 4)):
        run.step(*steps)
        twin.step(*steps)
        for mine, other in zip(run.weights, twin.weights, strict=True):
            assert torch.equal(mine, other)
            state, copied = run.optimizer.state[mine], twin.optimizer.state[other]
            assert {*state} == {*copied} - {"projection_steps"}
            for name, value in state.items():
                assert torch.equal(value, copied[name])
                assert value.dtype is copied[name].dtype


def test_a_state_of_another_kind_is_loaded():
    """Numbers are rounded, codes become numbers; the run goes on."""
    plain, coded, again = Run(state_dtype=None), Run(), Run(state_dtype=None)
    plain.step(0, 1)
    coded.optimizer.load_state_dict(plain.optimizer.state_dict())
    again.optimizer.load_state_dict(coded.optimizer.state_dict())
    for which in range(3):
        state = again.optimizer.state[again.weights[which]]
        assert {*state} - {"projection_steps"} == {*plain.optimizer.state[plain.weights[which]]}
        for name in ("exp_avg", "exp_avg_sq"):
            exact = plain.optimizer.state[plain.weights[which]][name]
            found = coded.numbers(which)[name]
            assert_rounded(found, exact)
            assert torch.equal(found, exact) == (which == 2)
            assert torch.equal(state[name], found)
    coded.step(2)
    again.step(2)


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.RMSprop, {}),
        (torch.optim.NAdam, {}),
        (torch.optim.Adafactor, {}),
    ],
)
def test_classes_that_keep_what_is_known(make, settings):
    """After some steps weights are about where those with moments in float32 are."""
    settings = {"make": lambda params, **s: compact_optimizer(make, params, **s), **settings}
    coded, plain = Run(**settings), Run(**settings, state_dtype=None)
    start = [weight.detach().clone() for weight in coded.weights]
    for run in (coded, plain):
        run.step(*range(6))
    for mine, other, old in zip(coded.weights, plain.weights, start, strict=True):
        assert (mine - other).norm() < 0.1 * (other - old).norm()
    is_large = [weight.numel() >= 4096 for weight in coded.weights]
    is_coded = [low_bit.ROUNDINGS in coded.optimizer.state[w] for w in coded.weights]
    assert is_coded == (is_large if make is not torch.optim.Adafactor else [False] * 3)


class Counting(torch.optim.Optimizer):
    """Counts in its groups."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                m.lerp_(p.grad, 0.1)
                p.sub_(m / (1 - 0.9 ** group["step"]), alpha=group["lr"])


def test_an_empty_weight_is_stepped_first():
    empty, full = nn.Parameter(torch.randn(0, 5)), nn.Parameter(torch.randn(64, 64))
    optimizer = CompactAdamW([empty, full], state_dtype="fp8")
    for given in ([empty], [empty, full]):
        for weight in given:
            weight.grad = torch.ones_like(weight)
        before = full.detach().clone()
        optimizer.step()
        assert torch.equal(before, full) is (len(given) == 1)


@pytest.mark.parametrize("make", [torch.optim.AdamW, Counting])
def test_some_at_once_is_all_at_once(make, monkeypatch):
    """The same to the bit, and what a class counts in its groups it counts once."""
    low_bit.noise_of.cache_clear()
    monkeypatch.setattr(low_bit, "_ROWS", 1)  # of all blocks, whatever is in front of them
    settings = {"make": lambda params, **s: compact_optimizer(make, params, **s)}
    whole = Run(**settings)
    whole.step(0, 1, 2, 3)
    monkeypatch.setattr(stand_ins, "_MOST_ELEMENTS", 5000)
    parts = Run(**settings)
    calls, inner = [], type(parts.optimizer)._inner_step

    def counted(optimizer):
        calls.append(sum(len(group["params"]) for group in optimizer.param_groups))
        return inner(optimizer)

    monkeypatch.setattr(type(parts.optimizer), "_inner_step", staticmethod(counted))
    parts.step(0, 1, 2, 3)
    assert calls == [1, 1, 1] * 4
    assert whole.optimizer.param_groups[0].get("step") == (4 if make is Counting else None)
    assert parts.optimizer.param_groups[0].get("step") == (4 if make is Counting else None)
    for mine, other in zip(whole.weights, parts.weights, strict=True):
        assert torch.equal(mine, other)
    low_bit.noise_of.cache_clear()


def test_moments_move_where_a_step_is_less_than_a_level():
    """β₂ = 0.999: gradients that become a tenth as large are seen within some hundred steps."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = CompactAdamW([weight], lr=1e-3, state_dtype="fp8")
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(4096)
    exact = torch.zeros(4096)
    for number in range(400):
        if number == 100:
            sizes[::2] = 0.1  # the others in their blocks stay
        weight.grad = sizes * torch.randn(4096, generator=generator)
        exact = 0.999 * exact + 0.001 * weight.grad.square()
        optimizer.step()
    found = low_bit.decode([optimizer.state[weight]], SIGNS)[0]["exp_avg_sq"]
    assert found[::2].mean() == pytest.approx(exact[::2].mean().item(), rel=0.05)
    assert found[1::2].mean() == pytest.approx(exact[1::2].mean().item(), rel=0.05)


# --- with compiled models ------------------------------------------------------------------------


def losses_of(projection, state_dtype, in_backward=False):
    """Of a model over five changes of the projection, or without one."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = step = nn.Sequential(nn.Linear(128, 192), nn.Tanh(), nn.Linear(192, 8))
    if projection is not None:
        settings = {"projection": projection, "update_interval": 8, "place": "late"}
        compact = compact_backend(rank=0.25, inner="aot_eager", strict=True, **settings)
        step = torch.compile(model, backend=compact)
    optimizer = CompactAdamW(
        model.parameters(), lr=3e-3, state_dtype=state_dtype, step_in_backward=in_backward
    )
    losses, generator = [], torch.Generator().manual_seed(0)
    for _ in range(40):
        x = torch.randn(128, 128, generator=generator)
        optimizer.zero_grad()
        loss = (step(x) - x[:, :8].sin()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    moment = optimizer.state[model[0].weight]["exp_avg"]
    assert moment.dtype is (torch.uint8 if state_dtype == "fp8" else torch.float32)
    assert moment.shape == (192, 128 if projection is None else 32)
    return losses


@pytest.mark.parametrize("projection", [None, "countsketch", "tracked"])
def test_trains_as_with_moments_in_float32(projection):
    """Dense and sketched, over changes of the projection; in the backward pass just the same."""
    exact, coded = losses_of(projection, None), losses_of(projection, "fp8")
    assert losses_of(projection, "fp8", in_backward=True) == coded
    drop = exact[0] - exact[-1]
    assert drop > 0.1 * exact[0]
    assert coded != exact
    assert coded[-1] == pytest.approx(exact[-1], abs=0.05 * drop)


# --- what is refused -----------------------------------------------------------------------------


def without_a_scale(state):
    del state["exp_avg_scale"]


def without_codes(state):
    state["exp_avg"] = state["exp_avg"].float()


def with_a_short_scale(state):
    state["exp_avg_sq_scale"] = state["exp_avg_sq_scale"][:-1]


def with_negative_roundings(state):
    state[low_bit.ROUNDINGS] = torch.tensor(-1)


def without_roundings(state):
    del state[low_bit.ROUNDINGS]


DAMAGES = [without_a_scale, without_codes, with_a_short_scale, with_negative_roundings]


@pytest.mark.parametrize("state_dtype", ["fp8", None])
@pytest.mark.parametrize("damage", [*DAMAGES, without_roundings])
def test_a_damaged_state_changes_nothing(damage, state_dtype):
    run, other = Run(), Run(state_dtype=state_dtype)
    run.step(0)
    saved = copy.deepcopy(run.optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5
    damage(saved["state"][1])
    other.step(1)
    before = copy.deepcopy(other.optimizer.state_dict())
    with pytest.raises(ValueError, match=r"is damaged: (exp_avg.* needs exp_avg|roundings=)"):
        other.optimizer.load_state_dict(saved)
    after = other.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, state in before["state"].items():
        assert all(torch.equal(v, after["state"][number][k]) for k, v in state.items())


@pytest.mark.parametrize(
    ("make", "settings", "name"),
    [(torch.optim.Adamax, {}, "exp_inf"), (torch.optim.RMSprop, {"centered": True}, "grad_avg")],
)
def test_a_class_that_keeps_something_else_is_refused(make, settings, name):
    """A centred RMSprop takes the root of a difference of moments."""
    with pytest.raises(TypeError, match=f"{make.__name__} cannot .*fp8.* it keeps '{name}'"):
        compact_optimizer(make, [nn.Parameter(torch.ones(3))], state_dtype="fp8", **settings)


def test_what_is_no_type_is_refused():
    with pytest.raises(ValueError, match=r"state_dtype='int4' must be .* None, or \"fp8\""):
        CompactAdamW([nn.Parameter(torch.ones(3))], state_dtype="int4")


def test_sharded_weights_are_refused(process_group):
    model = nn.Linear(64, 64)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r'state_dtype="fp8" .* type DTensor'):
        CompactAdamW(model.parameters(), state_dtype="fp8")


@pytest.mark.filterwarnings("ignore:CompactAdamW steps dense gradients")
def test_no_state_is_lost_where_memory_runs_out(monkeypatch):
    """While dense weights of one step get their stand-ins."""
    weights = [nn.Parameter(spread(80, 64).bfloat16()) for _ in range(3)]
    optimizer = CompactAdamW(weights, lr=1e-2, state_dtype="fp8")
    for weight in weights:
        weight.grad = spread(80, 64).bfloat16()
    optimizer.step()
    before = {weight: dict(optimizer.state[weight]) for weight in weights}
    calls = []

    def lay_out(*_):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(stand_ins, "_lay_out", lay_out)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    for weight in weights:
        state = optimizer.state[weight]
        assert state.keys() == before[weight].keys()
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], before[weight][name])


def test_all_weights_are_rounded_at_once_and_in_few_lengths(monkeypatch):
    """Also of odd sizes and other numbers of steps: a length is a kernel to compile."""
    calls = []

    def run(function, first, *others, **settings):
        calls.append(function.__name__)
        return function(first, *others, **settings)

    monkeypatch.setattr(low_bit, "_run", run)
    states = [{"exp_avg": spread(n), "exp_avg_sq": spread(n, signed=False)} for n in (4097, 5120)]
    low_bit.encode(states[:1], SIGNS)
    states[0] = low_bit.decode(states[:1], SIGNS)[0]
    before = [{k: v.clone() for k, v in state.items()} for state in states]
    calls.clear()
    low_bit.encode(states, SIGNS)
    decoded = low_bit.decode(states, SIGNS)
    rounded = [name for name in calls if name != "_noise"]
    assert rounded == ["quantize", "quantize", "dequantize", "dequantize"]
    for old, new in zip(before, decoded, strict=True):
        for name in SIGNS.keys() & old.keys():
            assert ((new[name] - old[name]).abs() <= old[name].abs() / 7 + 1e-7).all()
    lengths = {len(low_bit._joined([torch.empty(256 * n)])) for n in range(1, 4097)}
    assert len(lengths) < 8 * 13
    for n in (1, 17, 4095):
        assert 256 * n <= len(low_bit._joined([torch.empty(256 * n)])) <= 256 * n * 1.125


@pytest.mark.long
@pytest.mark.parametrize("signed", [True, False])
def test_compiled_kernels_do_what_operators_do(signed):
    """What a GPU runs, here in C++: to the bit."""

    def compiled(function, *tensors, **settings):
        like = tuple((t.shape, t.dtype, t.device) for t in tensors)
        return low_bit._compiled(function, tuple(settings.items()), like)(*tensors)

    key = torch.tensor(2**40 + 7)
    noise = compiled(low_bit._noise, key)
    assert torch.equal(noise, low_bit._noise(key))
    values = spread(4096, signed=signed)
    codes, scale = low_bit.quantize(values, noise, signed=signed)
    found, found_scale = compiled(low_bit.quantize, values, noise, signed=signed)
    assert torch.equal(found, codes)
    assert torch.equal(found_scale, scale)
    back = compiled(low_bit.dequantize, codes, scale, signed=signed)
    assert torch.equal(back, low_bit.dequantize(codes, scale, signed=signed))


@pytest.mark.parametrize("shape", [(96, 64), (4097,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("projection", ["countsketch", "tracked"])
def test_moments_are_joined_only_where_they_lie_apart(projection, dtype, shape, monkeypatch):
    """To the bit what joining makes, rotated or projected on the way, or with a weight left out."""
    copies, cat = [], torch.cat

    def counted(tensors):
        joined = cat(tensors)
        if joined.dtype is torch.float32 and len(joined) >= low_bit.SMALLEST:
            copies[-1] += 1
        return joined

    def train():
        run = Run(projection, dtype)
        run.weights.append(nn.Parameter(torch.randn(shape).to(dtype)))
        run.optimizer = run.make(refresh="project")
        copies.clear()
        for number in (0, 1, 2, 3, None, 4):
            copies.append(0)
            if number is None:
                run.weights[1].grad = None
                run.optimizer.step()
            else:
                run.step(number)
        return run

    monkeypatch.setattr(torch, "cat", counted)
    run = train()
    # In the first step they are torch's; and what does not fill its blocks lies apart.
    assert copies == ([2, 0, 0, 0, 0, 0] if shape == (96, 64) else [2] * 6)
    monkeypatch.setattr(low_bit, "_is_in_a_row", lambda *_: False)
    joined = train()
    assert copies == [2] * 6
    for mine, other in zip(run.weights, joined.weights, strict=True):
        assert torch.equal(mine, other)
        state, expected = run.optimizer.state[mine], joined.optimizer.state[other]
        assert state.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize("change", ["replaced", "in another order", "of less than they lie in"])
def test_moments_that_no_longer_lie_in_a_row_are_joined(change):
    def states():
        made = [{"exp_avg": spread(n).clone() * (i + 1)} for i, n in enumerate((5120, 4096, 4352))]
        low_bit.encode(made, SIGNS)
        return low_bit.decode(made, SIGNS)

    changed = states()
    if change == "replaced":
        changed[1]["exp_avg"] = changed[1]["exp_avg"] + 1.0
    elif change == "in another order":
        changed[1:] = changed[:0:-1]
    else:
        changed = [{**state, "exp_avg": state["exp_avg"][:4096]} for state in changed]
    apart = [{k: v.clone() for k, v in state.items()} for state in changed]
    for some in (changed, apart):
        low_bit.encode(some, SIGNS)
    for state, expected in zip(changed, apart, strict=True):
        assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("signed", [True, False])
def test_on_cuda_codes_are_those_of_a_cpu(signed):
    """One kernel each; a division may differ in its last bit, and so one code in thousands."""
    values = spread(96, 300, signed=signed)
    states = [{"exp_avg" if signed else "exp_avg_sq": v} for v in (values, values.cuda())]
    for state in states:
        low_bit.encode([state], SIGNS)
    (on_cpu, on_cuda), name = states, next(iter(states[0]))
    assert (on_cuda[name].cpu() == on_cpu[name]).float().mean() > 0.999
    assert on_cuda[name + "_scale"].cpu().equal(on_cpu[name + "_scale"])
    back = low_bit.decode([on_cuda], SIGNS)[0][name].cpu()
    large = values.abs() > values.abs().max() * 2**-14
    assert ((back - values).abs() <= values.abs() / 7)[large].all()
