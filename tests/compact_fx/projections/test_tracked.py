"""The mathematics of a projection that follows the gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compact_fx.projections import (
    Projection,
    TrackedBasis,
    Version,
    begin,
    finite_of,
    follow,
    unit_of,
)
from compact_fx.projections.tracked import energy, inverse_of_lower, orthonormal
from compact_fx.training.moments import carry

CPU = torch.device("cpu")


def start(n=48, rank=12, dtype=torch.float32, key=5):
    return begin(key, n, rank, dtype, None)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def next_of(p, y, keys, columns):
    """`follow`, with directions that a key stands for."""
    n, rank = p.shape[1:]
    explored = torch.stack([normal(n, rank - columns, seed=1000 + key) for key in keys])
    return follow(p, y, explored, columns)


def off_orthonormal(p):
    p = p.double()
    return (p.mT @ p - torch.eye(p.shape[-1])).abs().max().item()


@pytest.mark.parametrize("rank", [1, 12, 48])
def test_it_begins_with_orthonormal_columns(rank):
    p = start(rank=rank)
    assert p.shape == (48, rank)
    assert off_orthonormal(p) < 1e-5
    assert torch.equal(p, start(rank=rank))
    assert not torch.equal(p, start(rank=rank, key=6))


@settings(max_examples=60)
@given(
    n=st.integers(1, 40),
    share=st.floats(0, 1),
    follows=st.floats(0, 1),
    decay=st.floats(0, 12),
    size=st.sampled_from([1e-20, 1.0, 1e20]),
    batch=st.integers(1, 3),
)
def test_it_is_orthonormal_whatever_it_has_seen(n, share, follows, decay, size, batch):
    rank = max(1, round(share * n))
    columns = round(follows * rank)
    p = torch.stack([start(n, rank, key=i) for i in range(batch)])
    # Columns from equal to almost parallel: singular values down to 10⁻¹².
    spectrum = 10 ** -torch.linspace(0, decay, n)
    rows = torch.linalg.qr(normal(batch, n, n, seed=n))[0] * spectrum
    y = size * (rows @ (rows.mT @ p))
    new, kept, held = next_of(p, y, list(range(batch)), columns)
    assert off_orthonormal(new) < 1e-5
    assert new.dtype == p.dtype
    assert not kept.any()
    assert held.isnan().all() if columns == rank < n else (held > 0).all()


def test_the_largest_columns_come_first_and_what_explores_is_random():
    p = start()
    y = normal(48, 12) * torch.tensor([1.0, 9, 2, 8, 1, 1, 7, 1, 1, 1, 1, 1])
    (new,), _, _ = next_of(p[None], y[None], [1], 3)
    chosen = torch.linalg.qr(y[:, [1, 3, 6]])[0]
    # The first k span what the k largest do.
    for k in (1, 2, 3):
        inside = torch.linalg.qr(y[:, [1, 3, 6][:k]])[0]
        torch.testing.assert_close(inside @ (inside.T @ new[:, :k]), new[:, :k])
    assert (chosen.T @ new[:, 3:]).abs().max() < 1e-5
    (other,), _, _ = next_of(p[None], y[None], [2], 3)
    torch.testing.assert_close(other[:, :3], new[:, :3])
    assert (other[:, 3:] - new[:, 3:]).abs().max() > 0.1


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_it_stays_where_it_has_seen_nothing(value):
    p = torch.stack([start(key=1), start(key=2)])
    y = normal(2, 48, 12)
    y[0] = value
    new, kept, _ = next_of(p, y, [1, 2], 3)
    assert kept.tolist() == [True, False]
    assert torch.equal(new[0], p[0])
    assert off_orthonormal(new[1]) < 1e-5


@pytest.mark.parametrize("columns", [0, 3, 12])
def test_a_gradient_of_low_rank_is_no_obstacle(columns):
    p = start()
    y = normal(48, 2) @ normal(2, 12, seed=1)
    (new,), kept, _ = next_of(p[None], y[None], [1], columns)
    assert not kept.any()
    assert off_orthonormal(new) < 1e-5


def test_a_batch_is_what_its_members_are_alone():
    p = torch.stack([start(key=i) for i in range(5)])
    y = normal(5, 48, 12)
    whole = next_of(p, y, list(range(5)), 3)
    alone = [next_of(p[i : i + 1], y[i : i + 1], [i], 3) for i in range(5)]
    for i, values in enumerate(whole):
        assert torch.equal(values, torch.cat([one[i] for one in alone]))


def test_parallel_columns_fall_back_to_reflections():
    matrices = normal(2, 20, 4)
    matrices[0, :, 1] = matrices[0, :, 0]
    result = orthonormal(matrices.double())
    assert off_orthonormal(result) < 1e-10


@pytest.mark.parametrize("size", [1, 128, 256, 300, 129, 768])
def test_triangles_are_inverted_by_halves(size):
    wide = normal(3, size, size + 8).double()
    lower = torch.linalg.cholesky(wide @ wide.mT / size)
    inverse = inverse_of_lower(lower)
    identity = torch.eye(size, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(inverse @ lower, identity, rtol=0, atol=1e-10)
    assert torch.equal(inverse, inverse.tril())


def test_factors_and_directions_are_scaled_and_cleaned():
    factor = normal(6, 4) * 1e4
    torch.testing.assert_close(unit_of(factor), factor / factor.norm())
    assert unit_of(factor.half()).norm().item() == pytest.approx(1, rel=1e-3)
    assert torch.equal(unit_of(torch.zeros(3, 2)), torch.zeros(3, 2))
    y = torch.tensor([1.0, math.inf, -math.inf, math.nan])
    assert finite_of(y).tolist() == [1.0, 0.0, 0.0, 0.0]


def test_energy_is_estimated_from_what_explores():
    """Over 200 draws of the exploring columns the mean is within 4 σ of ‖G P‖² / ‖G‖²."""
    n, rank, columns = 64, 16, 4
    g = normal(200, n) * torch.linspace(2, 0.1, n)
    truth, estimates = [], []
    seen = g.T @ (g @ start(n, rank))
    for key in range(200):
        (p,), _, _ = next_of(start(n, rank, key=key)[None], seen[None], [key], columns)
        y = g.T @ (g @ p)
        truth.append(((g @ p).square().sum() / g.square().sum()).item())
        estimates.append(energy(p[None], 7 * y[None], columns).item())
    errors = torch.tensor(estimates) - torch.tensor(truth)
    assert errors.mean().abs() < 4 * errors.std() / math.sqrt(len(errors)) + 5e-3
    assert errors.std() < 0.1


def test_at_full_rank_it_holds_everything():
    p = start(16, 16)
    g = normal(30, 16)
    assert energy(p[None], (g.T @ (g @ p))[None], 4).item() == pytest.approx(1)


# --- as a basis -----------------------------------------------------------------------------------


def basis_of(p, dim=1):
    n, rank = p.shape
    projection = Projection(salt=1, features=n, rank=rank, kind="tracked", dtype=p.dtype)
    return TrackedBasis(projection=projection, seed=0, version=Version(p, 3), dim=dim)


@pytest.mark.parametrize("dim", [0, 1])
def test_moments_are_rotated_from_one_version_to_another(dim):
    old, new = basis_of(start(key=1), dim), basis_of(start(key=2), dim)
    change = start(key=1).T @ start(key=2)
    moment = normal(10, 12) if dim else normal(12, 10)
    rotated = moment @ change if dim else change.T @ moment
    squares = moment.square() @ change.square() if dim else change.square().T @ moment.square()
    torch.testing.assert_close(old.change_to(new, moment), rotated)
    turn = old.turn_to(new, moment)
    torch.testing.assert_close(turn, change)
    torch.testing.assert_close(old.turned(moment.square(), turn.square()), squares)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
def test_moments_of_16_bits_are_rotated_as_exactly_as_they_are_kept(dtype, dim):
    old, new = (basis_of(begin(key, 512, 256, torch.float32, None), dim) for key in (1, 2))
    shape = (300, 256) if dim else (256, 300)
    state = {"exp_avg": normal(*shape).to(dtype), "exp_avg_sq": normal(*shape).square().to(dtype)}
    turn = old.turn_to(new, state["exp_avg"])
    exact = [
        old.turned(state["exp_avg"].double(), turn.double()),
        old.turned(state["exp_avg_sq"].double(), turn.double().square()),
    ]
    carry(state, old, new, "project")
    for moment, right in zip(state.values(), exact, strict=True):
        assert moment.dtype == dtype
        error = (moment.double() - right).norm() / right.norm()
        assert error < torch.finfo(dtype).eps  # that of rounding alone is near a third of it


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_nearest_factor_of_any_gradient_is_that_of_least_squares(dtype, dim):
    """Also where P is rounded, so that its columns are not quite orthonormal."""
    basis = basis_of(start(n=256, rank=64, dtype=dtype), dim)
    gradient = normal(30, 256) if dim else normal(256, 30)
    p = basis.matrix(CPU, torch.float64)
    rows = gradient.double().mT if dim else gradient.double()
    exact = torch.linalg.lstsq(p, rows).solution
    fitted = basis.fit(gradient).double()
    error = (fitted.mT if dim else fitted) - exact
    assert error.norm() < 5e-5 * exact.norm()


def test_the_same_version_is_the_same_projection():
    p = start()
    basis = basis_of(p)
    assert basis.is_same(basis.along(0))
    assert not basis.is_same(basis_of(p))
    assert basis.along(1) is basis
    assert basis.generation == 3
    assert basis.gain == 2
    factor = normal(10, 12)
    torch.testing.assert_close(basis.norm(factor), basis.expand(factor).norm())
    torch.testing.assert_close(basis.fit(basis.expand(factor)), factor, rtol=1e-4, atol=1e-5)
    assert basis.matrix(CPU, torch.float64).dtype == torch.float64
