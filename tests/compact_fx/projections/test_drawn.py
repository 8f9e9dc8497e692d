"""Projections: the right distribution, a function of the key alone, the same in every form.

Statistical tests have fixed seeds and state their bound as k standard errors with the rate at which
a right implementation would fail for a random seed: 5 σ is 6e-7 for one comparison.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from compact_fx.projections import (
    DRAWN,
    RANDOM_PROJECTION,
    Projection,
    draw,
    fold_in,
    random_projection,
    salt_of,
)
from compact_fx.projections.countsketch import (
    countsketch_columns,
    countsketch_rows,
    countsketch_table,
)
from compact_fx.projections.hashed import _words

INDEPENDENT = ("gaussian", "rademacher", "sparse")  # entries are; those of "orthogonal" are not
MOMENTS = {  # of √r·P: E[q⁴], and the variances of q² and q⁴
    "gaussian": (3.0, 2.0, 96.0),
    "rademacher": (1.0, 0.0, 0.0),
    "sparse": (3.0, 2.0, 18.0),
}
EXTREME_KEYS = (0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def key_of(seed, salt=0, generation=0):
    return torch.tensor(fold_in(seed, salt, generation), dtype=torch.int64)


def standardized(kind, n=512, rank=512, **settings):
    """Entries with mean 0 and variance 1."""
    return random_projection(0, n, rank, kind=kind, **settings).double() * math.sqrt(rank)


def assert_uncorrelated(a, b):
    # 5 σ of a mean of products of independent standardized entries: false alarm 6e-7.
    assert abs((a * b).mean().item()) < 5 / math.sqrt(a.numel())


# ---------------------------------------------------------------------------------------------
# Distribution
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("salt", [1, 2, 3])
def test_mean_variance_and_kurtosis(kind, salt):
    entries = standardized(kind, salt=salt)
    kurtosis, var_square, var_fourth = MOMENTS[kind]
    # 5 σ each, three comparisons: false alarm 2e-6; 1e-6 for float32.
    k = 5 / math.sqrt(entries.numel())
    assert abs(entries.mean().item()) < k
    assert abs(entries.pow(2).mean().item() - 1) < k * math.sqrt(var_square) + 1e-6
    assert abs(entries.pow(4).mean().item() - kurtosis) < k * math.sqrt(var_fourth) + 1e-6


def test_gaussian_entries_follow_the_normal_distribution():
    entries = standardized("gaussian").flatten().sort().values
    expected = torch.special.ndtr(entries)
    observed = (torch.arange(entries.numel()) + 0.5) / entries.numel()
    # Kolmogorov-Smirnov: P(√N·D > 2.7) < 2·exp(-2·2.7²) = 1e-6.
    assert (observed - expected).abs().max().item() < 2.7 / math.sqrt(entries.numel())


def test_rademacher_and_sparse_take_only_their_values():
    assert set(standardized("rademacher").unique().round(decimals=5).tolist()) == {-1.0, 1.0}
    root = round(math.sqrt(3), 5)
    assert set(standardized("sparse").unique().round(decimals=5).tolist()) == {-root, 0.0, root}


def test_countsketch_has_one_fair_sign_in_each_row():
    p = torch.stack([random_projection(seed, 512, 128, kind="countsketch") for seed in range(64)])
    assert set(p.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert torch.equal(p.abs().sum(-1), torch.ones(64, 512))
    assert torch.equal(p.abs().sum(-2), torch.full((64, 128), 4.0))
    signs = p.sum(-1).double()
    # 5 σ, and neighbours, columns' members and draws are independent: four times 6e-7.
    assert abs(signs.mean().item()) < 5 / math.sqrt(signs.numel())
    assert_uncorrelated(signs[:, 1:], signs[:, :-1])
    assert_uncorrelated(signs[:, 128:], signs[:, :-128])
    assert_uncorrelated(signs[1:], signs[:-1])


def test_rows_of_countsketch_meet_as_independent_columns_would():
    """Once in `rank` draws, whichever two blocks they are of."""
    count, rank = 6400, 16
    columns = torch.stack(
        [
            random_projection(seed, 64, rank, kind="countsketch").abs().argmax(1)
            for seed in range(count)
        ]
    )
    pairs = [(0, 16), (0, 17), (5, 40), (15, 63), (20, 50)]
    rates = torch.tensor([(columns[:, i] == columns[:, j]).double().mean() for i, j in pairs])
    # 5 σ of a rate, five comparisons: false alarm 3e-6.
    assert (rates - 1 / rank).abs().max() < 5 * math.sqrt(1 / rank / count)


@settings(max_examples=60)
@given(n=st.integers(1, 400), rank=st.integers(1, 80), seed=st.integers(0, 2**40))
def test_tables_of_countsketch_multiply_with_it(n, rank, seed):
    """x P and F Pᵀ by gathering, for any shape."""
    key = key_of(seed)
    p = draw(key, n, rank, "countsketch", torch.float64)
    x, factor = torch.randn(3, n, dtype=torch.float64), torch.randn(3, rank, dtype=torch.float64)
    table = countsketch_table(key, n, rank)
    assert torch.equal(draw(table, n, rank, "countsketch", torch.float64), p)
    rows, signs = countsketch_rows(table, n, rank, torch.float64)
    assert max(rows.shape[-2:-1]) < 8
    torch.testing.assert_close((x[:, rows] * signs).flatten(1, -2).sum(1), x @ p)
    columns, signs = countsketch_columns(table, n, rank, torch.float64)
    assert torch.equal(factor[:, columns] * signs, factor @ p.T)


@pytest.mark.parametrize("seed", range(4))
def test_every_bit_of_the_words_is_fair(seed):
    words = _words(key_of(seed, salt=7), 512, 512)
    assert words.dtype == torch.int64
    assert words.min() >= 0
    assert words.max() < 2**32
    bits = (words[..., None] >> torch.arange(32)) & 1
    # 5.5 σ, 32 comparisons: false alarm 1.2e-6.
    assert (bits.double().mean((0, 1)) - 0.5).abs().max() < 5.5 * 0.5 / 512


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbouring_rows_and_columns_are_uncorrelated(kind, lag):
    entries = standardized(kind, salt=lag)
    assert_uncorrelated(entries[lag:], entries[:-lag])
    assert_uncorrelated(entries[:, lag:], entries[:, :-lag])


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("other", [{"seed": 1}, {"salt": 1}, {"generation": 1}])
def test_neighbouring_seeds_salts_and_generations_are_uncorrelated(kind, other):
    first = standardized(kind)
    arguments = {"seed": 0, **other}
    second = random_projection(n=512, rank=512, kind=kind, **arguments).double() * math.sqrt(512)
    assert not torch.equal(first, second)
    assert_uncorrelated(first, second)


def test_seed_salt_and_generation_are_not_interchangeable():
    keys = {fold_in(a, b, c) for a in range(12) for b in range(12) for c in range(12)}
    assert len(keys) == 12**3
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_singular_values_are_within_the_marchenko_pastur_edges(kind):
    n, rank = 1024, 256
    values = torch.linalg.svdvals(random_projection(3, n, rank, kind=kind).double())
    # Davidson-Szarek: past an edge by t with probability ≤ exp(-rank·t²/2), 1e-6 for this t.
    t = math.sqrt(2 * math.log(1e6) / rank)
    low, high = math.sqrt(n / rank) - 1, math.sqrt(n / rank) + 1
    assert low - t < values.min().item() < low + t
    assert high - t < values.max().item() < high + t


# E‖P Pᵀ - I‖², as a function of n and r.
SPREAD = {
    "gaussian": lambda n, r: n * (n + 1) / r,
    "rademacher": lambda n, r: n * (n - 1) / r,
    "sparse": lambda n, r: n * (n + 1) / r,
    "orthogonal": lambda n, r: n * (n - r) / r,
    # Pairs of rows of different blocks meet in one column with probability 1 / r.
    "countsketch": lambda n, r: (n * n - n // r * r * r - (n % r) ** 2) / r,
}


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize(("n", "rank"), [(32, 8), (21, 20)])
def test_the_mean_of_p_pt_is_the_identity(kind, n, rank):
    total, count = torch.zeros(n, n, dtype=torch.float64), 600
    for seed in range(count):
        p = random_projection(seed, n, rank, kind=kind).double()
        total += p @ p.T
    error = (total / count - torch.eye(n)).pow(2).sum().item()
    # ‖mean - I‖² is about χ² with n(n-1)/2 degrees of freedom; 6 σ: false alarm below 1e-6.
    bound = SPREAD[kind](n, rank) / count * (1 + 6 * math.sqrt(4 / (n * (n - 1))))
    assert error < bound


@pytest.mark.parametrize("kind", DRAWN)
def test_an_estimated_product_has_the_right_mean(kind):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 24, generator=generator, dtype=torch.float64)
    estimates = []
    for seed in range(600):
        p = random_projection(seed, 24, 6, kind=kind).double()
        estimates.append((x @ p) @ (p.T @ x.T))
    samples = torch.stack(estimates)
    scores = (samples.mean(0) - x @ x.T) / (samples.std(0) / math.sqrt(len(samples)) + 1e-6)
    # 5.5 σ, 36 different entries: false alarm 1.4e-6.
    assert scores.abs().max().item() < 5.5


# ---------------------------------------------------------------------------------------------
# Orthogonal
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [5, 123, 1000, 1376])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 1.0])
def test_orthogonal_columns_are_orthonormal_up_to_scale(n, fraction):
    rank = max(1, round(n * fraction))
    p = random_projection(1, n, rank, kind="orthogonal").double()
    expected = torch.eye(rank, dtype=torch.float64) * (n / rank)
    torch.testing.assert_close(p.T @ p, expected, rtol=0, atol=4e-6 * n / rank)


@pytest.mark.parametrize("n", [1, 5, 123, 1000, 1376])
def test_orthogonal_at_full_rank_loses_nothing(n):
    p = random_projection(2, n, n, kind="orthogonal").double()
    torch.testing.assert_close(p @ p.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=4e-6)


def test_orthogonal_columns_differ_between_seeds():
    first, second = (random_projection(seed, 64, 8, kind="orthogonal") for seed in (0, 1))
    assert not torch.equal(first.abs(), second.abs())
    assert not torch.equal(first.sign(), second.sign())


# ---------------------------------------------------------------------------------------------
# A function of the key alone
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_the_float32_result_rounded(kind, dtype):
    reference = random_projection(5, 40, 12, kind=kind)
    assert reference.dtype == torch.float32
    assert torch.equal(random_projection(5, 40, 12, kind=kind, dtype=dtype), reference.to(dtype))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", DRAWN)
def test_the_default_dtype_plays_no_part(kind, default):
    expected = draw(key_of(3), 48, 12, kind, torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(draw(key_of(3), 48, 12, kind, torch.float32), expected)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", DRAWN)
def test_global_random_state_plays_no_part(kind):
    torch.manual_seed(0)
    first = random_projection(5, 40, 12, kind=kind)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(random_projection(5, 40, 12, kind=kind), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", INDEPENDENT)
def test_rows_do_not_depend_on_how_many_there_are(kind):
    assert torch.equal(
        random_projection(5, 100, 12, kind=kind)[:40], random_projection(5, 40, 12, kind=kind)
    )


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("value", EXTREME_KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_keys_are_finite(kind, value, dtype):
    p = draw(torch.tensor(value), 64, 16, kind, dtype)
    assert p.isfinite().all()
    assert p.count_nonzero() > 0


@settings(max_examples=60)
@given(
    n=st.integers(1, 90),
    rank=st.integers(1, 90),
    kind=st.sampled_from(DRAWN),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    value=st.integers(0, 2**63 - 1),
)
def test_any_projection_is_finite_and_repeatable(n, rank, kind, dtype, value):
    rank = min(rank, n) if kind == "orthogonal" else rank
    key = torch.tensor(value)
    p = draw(key, n, rank, kind, dtype)
    assert p.shape == (n, rank)
    assert p.dtype == dtype
    assert p.isfinite().all()
    assert torch.equal(p, RANDOM_PROJECTION(key, n, rank, kind, dtype))
    assert key.item() == value


def test_a_projection_draws_what_random_projection_does():
    salt = salt_of("layers.0.weight")
    projection = Projection(salt=salt, features=48, rank=6, kind="sparse", dtype=torch.bfloat16)
    expected = random_projection(
        3, 48, 6, salt=salt, generation=2, kind="sparse", dtype=torch.bfloat16
    )
    assert torch.equal(projection(3, generation=2), expected)
    assert not torch.equal(projection(3, generation=3), expected)


def test_salts_tell_names_apart_and_fit_into_a_key():
    salts = [salt_of(f"layers.{i}.{name}") for i in range(200) for name in ("weight", "bias")]
    assert len(set(salts)) == len(salts)
    assert all(0 <= salt < 2**63 for salt in salts)


# ---------------------------------------------------------------------------------------------
# The custom op
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_op_is_draw(kind, dtype):
    key = key_of(9)
    expected = draw(key, 33, 7, kind, dtype)
    assert torch.equal(RANDOM_PROJECTION(key, 33, 7, kind, dtype), expected)


@pytest.mark.parametrize("kind", DRAWN)
def test_the_op_passes_opcheck(kind):
    torch.library.opcheck(RANDOM_PROJECTION, (key_of(0), 16, 4, kind, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_kernel_agrees_with_the_real_one(dtype):
    real = RANDOM_PROJECTION(key_of(0), 33, 7, "gaussian", dtype)
    with FakeTensorMode() as mode:
        fake = RANDOM_PROJECTION(mode.from_tensor(key_of(0)), 33, 7, "gaussian", dtype)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert fake.device == real.device


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"kind='cauchy'.*gaussian, rademacher, sparse, orthog"):
        random_projection(0, 8, 2, kind="cauchy")


@pytest.mark.parametrize("rank", [0, -3])
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_a_rank_below_one_is_named_with_what_is_allowed(kind, rank):
    with pytest.raises(ValueError, match=rf"rank={rank} .*n=8.*≥ 1"):
        random_projection(0, 8, rank, kind=kind)


@pytest.mark.parametrize("rank", [0, 9])
def test_an_orthogonal_rank_above_n_is_named_with_what_is_allowed(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} .*n=8.*1\.\.8"):
        random_projection(0, 8, rank, kind="orthogonal")


def test_a_rank_above_n_is_possible_for_independent_entries():
    assert random_projection(0, 8, 20, kind="gaussian").shape == (8, 20)


# ---------------------------------------------------------------------------------------------
# Compiled, and on a GPU
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DRAWN)
def test_compiled_by_inductor_equals_eager(kind):
    torch._dynamo.reset()
    key = key_of(4)
    compiled = torch.compile(draw, fullgraph=True)(key, 24, 8, kind, torch.float32)
    torch.testing.assert_close(
        compiled, draw(key, 24, 8, kind, torch.float32), rtol=1e-6, atol=1e-6
    )


@needs_cuda
@pytest.mark.parametrize("kind", DRAWN)
@pytest.mark.parametrize("n", [5, 1000, 1376])
def test_cuda_equals_cpu(kind, n):
    on_cpu = random_projection(4, n, 5, kind=kind)
    on_cuda = random_projection(4, n, 5, kind=kind, device="cuda").cpu()
    torch.testing.assert_close(on_cuda, on_cpu, rtol=1e-6, atol=1e-6)


@needs_cuda
@pytest.mark.parametrize("kind", INDEPENDENT)
def test_words_on_cuda_equal_those_on_cpu(kind):
    key = key_of(4)
    assert torch.equal(_words(key.cuda(), 300, 70).cpu(), _words(key, 300, 70))
