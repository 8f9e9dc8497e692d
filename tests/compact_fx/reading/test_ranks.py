"""One of several processes: against real shards, real factors, and numbers made by hand."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from compact_fx import CompactAdamW, compact_backend, explain
from compact_fx.passes.live_bytes import Moment
from compact_fx.projections import Projection
from compact_fx.reading.explanation import COMPILED, DENSE, SKETCHED
from compact_fx.reading.ranks import Held, Training, blocks_of, sent, with_ddp, with_fsdp
from compact_fx.training.weights import known_record

RANKS = 6  # no size here divides by it
NOTHING = (Moment("forward", "", 0),)


@pytest.mark.parametrize(
    ("collective", "ranks", "size"),
    [
        ("all_reduce", 1, 0),
        ("all_reduce", 2, 1000),
        ("all_reduce", 8, 1750),
        ("reduce_scatter", 8, 875),
        ("all_gather", 8, 875),
        ("broadcast", 8, 1000),
        ("broadcast", 1, 0),
    ],
)
def test_what_a_collective_sends(collective, ranks, size):
    """Of 1000 bytes."""
    assert sent(collective, 1000, ranks) == size


@pytest.fixture
def many_ranks():
    """This process as the first of several that do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield
    dist.destroy_process_group()


@pytest.fixture
def messages(monkeypatch):
    """Bytes that FSDP2 gives to each collective: of what all ranks get or give."""
    given = {"all_gather": 0, "reduce_scatter": 0}

    def counted(name, kind):
        collective = getattr(dist, name)

        def run(*args, **kwargs):
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            given[kind] += max(tensor.nbytes for tensor in tensors)
            return collective(*args, **kwargs)

        monkeypatch.setattr(dist, name, run)

    new = hasattr(dist, "all_gather_single")  # torch 2.13
    counted("all_gather_single" if new else "all_gather_into_tensor", "all_gather")
    counted("reduce_scatter_single" if new else "reduce_scatter_tensor", "reduce_scatter")
    return given


@pytest.mark.parametrize("parallel", ["fsdp", "zero2"])
def test_fsdp_is_what_fully_shard_does(make_llama, tokens, many_ranks, messages, parallel):
    """Parts of weights, gradients and moments, and every byte that a step sends."""
    model = make_llama(2)
    found = explain(model, input_ids=tokens, labels=tokens)
    rank = found.ranks(RANKS, parallel).each[COMPILED]
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=parallel == "fsdp")
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    parts = [weight.to_local().nbytes for weight in model.parameters()]
    assert rank.weights == sum(parts) + sum(buffer.nbytes for buffer in model.buffers())
    assert rank.gradients == sum(w.grad.to_local().nbytes for w in model.parameters())
    moments = [state[m] for state in optimizer.state.values() for m in ("exp_avg", "exp_avg_sq")]
    assert rank.moments == sum(moment.to_local().nbytes for moment in moments)
    share = (RANKS - 1) / RANKS
    assert rank.sent_weights == share * messages["all_gather"]
    assert rank.sent_gradients == share * messages["reduce_scatter"]
    assert rank.sent_projections == rank.projections == 0


def test_ddp_is_what_a_step_leaves(make_llama, tokens):
    """Factors, moments, P and Y as one process has them; a bucket for what DDP itself exchanges."""
    interval = {"update_interval": 10}
    batch = {"input_ids": tokens, "labels": tokens}
    model = make_llama(1)
    found = explain(model, **batch, **interval)
    each = found.ranks(8, "ddp").each
    rank, alone = each[SKETCHED], found.memory[SKETCHED]
    backend = compact_backend(inner="aot_eager", **interval)
    torch.compile(model, backend=backend)(**batch).loss.backward()
    CompactAdamW(model.parameters()).step()
    gradients, projections = 0, {}
    for weight in model.parameters():
        factor = getattr(weight.grad, "factor", None)
        gradients += (weight.grad if factor is None else factor).nbytes
        if factor is not None:
            basis = known_record(weight).basis
            projections[basis.projection] = basis.version.matrix
    assert rank.gradients == gradients
    assert (rank.weights, rank.moments) == (alone.weights, 2 * gradients)
    assert rank.sent_gradients == pytest.approx(2 * 7 / 8 * gradients, abs=1)
    elements = sum(matrix.numel() for matrix in projections.values())
    assert rank.projections == elements * (4 + 4)
    assert rank.sent_projections == pytest.approx((2 * 7 / 8 + 1) * 4 * elements / 10, abs=1)
    others = [w for n, w in model.named_parameters() if "norm" in n or "embed" in n]
    assert rank.whole == sum(weight.nbytes for weight in others)
    assert rank.peak == alone.peak + rank.whole
    assert each[DENSE].whole == sum(weight.nbytes for weight in model.parameters())


def training(*held, projections=(), timeline=NOTHING):
    return Training(
        held=held,
        inputs=7,
        buffers=5,
        states=2,
        projections=projections,
        interval=10,
        timeline=timeline,
    )


def tracked(features, rank):
    return Projection(features=features, rank=rank, kind="tracked", dtype=torch.bfloat16, salt=0)


def test_a_factor_is_sharded_where_it_is_as_long_as_its_weight():
    """In rows or columns; dense where columns do not come out even; P and Y are everywhere."""
    rows = Held(shape=(10, 8), itemsize=2, block="a", factor=(10, 2))
    columns = Held(shape=(6, 8), itemsize=2, block="b", factor=(2, 8), kept=1)
    uneven = Held(shape=(6, 9), itemsize=2, block="b", factor=(2, 9), kept=1)
    rank = with_fsdp(training(rows, columns, uneven, projections=[tracked(8, 2)]), 4)
    assert rank.gradients == 2 * (
        3 * 2 + 2 * 2 + 2 * 9
    )  # (3, 2) of (10, 2); (2, 2); (2, 9) of (6, 9)
    assert rank.sent_gradients == 3 * rank.gradients
    assert rank.weights == 2 * (3 * 8 + 6 * 2 + 2 * 9) + 5
    assert rank.projections == 8 * 2 * (2 + 4)
    assert rank.sent_projections == (2 * 3 * 64 // 4 + 32) // 10


@pytest.mark.parametrize("reshards", [True, False])
def test_memory_of_a_shard(reshards):
    """What is gathered at a time, and gradients on their way, lie on what one process has."""
    inner = [Held(shape=(size,), itemsize=1, block=f"h.{size}") for size in (40, 80)]
    head = Held(shape=(20,), itemsize=1, block="")
    timeline = (
        Moment("forward", "mm", 1000),
        Moment("backward", "mm", 1100, 100),
        Moment("backward", "return", 140, 140),
    )
    rank = with_fsdp(training(*inner, head, timeline=timeline), 4, reshards=reshards)
    parts = 10 + 20 + 5
    gathered, on_the_way = 20 + (2 * 80 if reshards else 40 + 80), 20 + 2 * 80
    assert rank.whole == gathered + on_the_way
    lasting = parts + 2 * parts + 7 + 5
    assert rank.peak == lasting + gathered + on_the_way + 1000 + 100 // 4


def test_frozen_weights_are_gathered_and_send_nothing():
    frozen = Held(shape=(8, 8), itemsize=2, block="a", trained=False)
    rank = with_fsdp(training(frozen), 4)
    assert (rank.gradients, rank.moments, rank.sent_gradients) == (0, 0, 0)
    assert rank.sent_weights == 2 * 3 * 32
    alone = explain(nn.Linear(8, 8), torch.zeros(4, 8)).memory[COMPILED]
    assert with_ddp(training(frozen), 4, alone).sent == 0


def test_blocks_are_members_of_the_outermost_list():
    """An expert of a layer is no block."""
    layer = nn.Module()
    layer.experts, layer.norm = nn.ModuleList([nn.Linear(2, 2)]), nn.LayerNorm(2)
    model = nn.Module()
    model.embed, model.h = nn.Embedding(2, 2), nn.ModuleList([layer])
    assert blocks_of(model) == {
        "embed.weight": "",
        "h.0.experts.0.weight": "h.0",
        "h.0.experts.0.bias": "h.0",
        "h.0.norm.weight": "h.0",
        "h.0.norm.bias": "h.0",
    }
    assert blocks_of(nn.Sequential(nn.Linear(2, 2))) == {"0.weight": "0", "0.bias": "0"}


def test_ranks_in_tables_and_data():
    """Rows of both have one name each; what is sent adds up; what cannot be is told."""
    model, x = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)), torch.zeros(512, 64)
    found = explain(model, x)
    ranks = found.ranks(2, "fsdp")
    data = ranks.to_dict()
    assert (data["world_size"], data["parallel"]) == (2, "fsdp")
    assert list(data["each"]) == [COMPILED, DENSE, SKETCHED]
    rank = data["each"][SKETCHED]
    assert rank["sent"] == sum(v for name, v in rank.items() if name.startswith("sent_")) > 0
    first, *rows = ranks.table("tsv").splitlines()
    assert first.startswith("MB, one of 2 (fsdp)")
    assert [row.split("\t")[0].strip() for row in rows] == list(data["each"])
    assert str(ranks) == ranks.table()
    with pytest.raises(ValueError, match=r"world_size=2\.0 must be an int ≥ 1"):
        found.ranks(2.0, "ddp")
    with pytest.raises(ValueError, match="parallel='tp' must be one of 'ddp', 'fsdp', 'zero2'"):
        found.ranks(2, "tp")
