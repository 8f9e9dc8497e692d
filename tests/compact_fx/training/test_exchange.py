"""Two gloo processes against one: `two_processes.py` runs, this judges."""

from contextlib import nullcontext
from datetime import timedelta
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compact_fx import SketchedGrad, _torch, compact_backend, exchange_factors
from compact_fx.training.exchange import Exchange, _Form, _Note, _Slot, different_settings


@pytest.fixture(scope="module")
def few(run_two):
    """What every run of the tests asks."""
    names = ("alone: full", "alone: quarter", "full, outside", "quarter")
    faults = ("unregistered", "other seed")
    return run_two("two_processes.py", *names, *faults)


FAULTS = {
    "other rank": r"ranks have different settings.* on rank 0: factor .* on rank 1: gradient",
    "other kind": r"ranks have different settings.*tracked.*on rank 1: .*gaussian",
    "other interval": "ranks have different settings.*update_interval=20.*update_interval=7",
    "other shapes": "ranks have different models: down.weight is",
    "other steps": "different steps of their weights.*load the same checkpoint",
    "join": r"join\(\) cannot be used.*drop_last=True",
    "step_in_backward": "step_in_backward=True steps before",
    "too late": r"comes before DistributedDataParallel\(model\)",
    "after DDP": r"comes before DistributedDataParallel\(model\)",
    "other names": "DistributedDataParallel exchanges up.weight as well",
    "unfrozen later": r"frozen.* when exchange_factors\(model\) was called is not exchanged",
    "nothing left": "needs a parameter that requires a gradient besides",
    "another module": "was called for weights of this model before, with another module",
    "another seed later": "gradients came on some ranks and not on others",
    "a new layer on one rank": "gradients came on some ranks and not on others",
}
SAME_GRADIENTS = {
    "three passes": "three passes",
    "three passes, blocks": "three passes",
    "three passes, one weight dense": "three passes",
    "three passes, synced": "three passes",
    "an eager pass": "three passes",
    "wrapped again": "three passes",
    "by turns": "by turns",
    "by turns, frozen between": "by turns",
    "by turns, dense": "by turns",
    "one has kept": "one has kept",
    "frozen at last": "frozen at last",
    "probed within": "three passes",
    "probed under no_sync": "one pass",
    "two graphs": "two graphs",
    "tied": "tied",
    "checkpointed": "checkpointed",
    "dense": "three passes",
    "dense, optimize_ddp=False": "three passes",
    "dense, static_graph": "three passes",
    "dense, gradient_as_bucket_view": "three passes",
    "dense, find_unused_parameters": "heads",
    "dense gradients, exchanged here": "heads",
}


@pytest.fixture(scope="module")
def many(run_two):
    """What CI asks."""
    alone = dict.fromkeys(f"alone: {name}" for name in SAME_GRADIENTS.values())
    others = (
        "alone: full",
        "full, inside",
        "traffic, sketched",
        "traffic, dense",
        "overlap, outside",
    )
    more = ("overlap, blocks", "scaled", "not a number", "clipped by value")
    last = "sketched and unused on one rank"  # only one of them raises: nothing comes after it
    return run_two("two_processes.py", *alone, *others, *more, *SAME_GRADIENTS, *FAULTS, last)


def assert_alike(actual, expected, relative=1e-5):
    """Tensors by name, None where there is none."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            assert (actual[name] - value).norm() <= relative * value.norm().clamp(min=1e-3), name


def assert_equal(first, second):
    """To the bit."""
    assert all(torch.equal(first[name], second[name]) for name in first)


def check_losses(result, expected):
    """The mean over ranks is the loss of one process."""
    means = (torch.tensor(result[0][0]) + torch.tensor(result[1][0])) / 2
    torch.testing.assert_close(means, torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)


def test_full_rank_is_one_process(few):
    """Half the batch each: the same losses and weights as one process with all of it."""
    first, second = few["full, outside"]
    check_losses(few["full, outside"], few["alone: full"][0])
    assert_alike(first[1], few["alone: full"][0][1])
    assert_equal(first[1], second[1])


def test_tracked_projections_are_one(few):
    """50 steps as one process that accumulates both halves; after 100 all ranks have the same."""
    losses, at_50, at_100, generation, matrix = few["quarter"][0]
    *_, others_at_100, others_generation, others_matrix = few["quarter"][1]
    check_losses(few["quarter"], few["alone: quarter"][0])
    assert losses[-1] < losses[0]
    assert_alike(at_50, few["alone: quarter"][0][1])
    assert_equal(at_100, others_at_100)
    assert generation == others_generation == 5
    assert torch.equal(matrix, others_matrix)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("unregistered", "exchange_factors(model)"),
        ("other seed", "ranks have different settings. The gradient of"),
    ],
)
def test_all_ranks_are_told(few, name, text):
    """Before anything steps."""
    assert all(text in of_rank for of_rank in few[name])


MINE = "factor (8, 2); rank=2 of 8; seed=0"


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            "factor (8, 4); rank=4 of 8; seed=0",
            "0: factor (8, 2); rank=2 of 8, and on rank 3: factor (8, 4); rank=4 of 8.",
        ),
        (f"{MINE}; follow=0.5", f"0: {MINE}, and on rank 3: follow=0.5."),
        (None, f"0: {MINE}, and on rank 3: not sketched."),
    ],
)
def test_what_ranks_have_alike_is_not_said(other, said):
    text = str(different_settings("up.weight", {0: MINE, 3: other}))
    assert f"The gradient of up.weight is on rank {said} Give all ranks the same" in text


@pytest.mark.long
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(many, name):
    """On all ranks."""
    for of_rank in many[name]:
        with pytest.raises(Exception, match=f"(?s){FAULTS[name]}"):
            raise RuntimeError(of_rank)


@pytest.mark.long
def test_a_sketched_weight_that_one_rank_does_not_use(many):
    """That rank says so; the other one finds it gone."""
    assert "head.weight has arrived on other ranks" in many["sketched and unused on one rank"][1]


@pytest.mark.long
@pytest.mark.parametrize("name", SAME_GRADIENTS)
def test_gradients_are_those_of_one_process(many, name):
    """In full rank: however often they are sent, and from whatever graph they come."""
    first, second = (r[0] if isinstance(r, tuple) else r for r in many[name])
    assert_alike(first, many[f"alone: {SAME_GRADIENTS[name]}"][0])
    assert_equal_gradients(first, second)


def assert_equal_gradients(first, second):
    """To the bit, None included."""
    for name, value in first.items():
        assert (value is None) == (second[name] is None)
        assert value is None or torch.equal(value, second[name])


@pytest.mark.long
def test_full_rank_inside(many):
    """DDP around a compiled model."""
    check_losses(many["full, inside"], many["alone: full"][0])
    assert_alike(many["full, inside"][0][1], many["alone: full"][0][1])


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SAME_GRADIENTS if "passes" in name][:3])
def test_no_sync_sends_nothing(many, name):
    """And the next pass sends as much as one pass."""
    _, before, after = many[name][0]
    assert before == 0
    assert after == 7168 + 3  # the three weights, and who had them


@pytest.mark.long
def test_traffic_is_that_of_factors(many):
    """r/n of what dense gradients take."""
    sketched, dense = many["traffic, sketched"][0], many["traffic, dense"][0]
    assert (sketched - 3) / (dense - 3) == 0.25


@pytest.mark.long
@pytest.mark.parametrize("name", ["overlap, outside", "overlap, blocks"])
def test_factors_are_sent_while_backward_runs(many, name):
    """Those of later layers before the gradient of the input is there."""
    assert many[name][0] == ["sent", "sent", "input", "sent"]


@pytest.mark.long
def test_an_overflow_on_one_rank(many):
    """All of them skip the step."""
    scales, steps, weights = many["scaled"][0]
    assert scales == [4.0, 2.0, 2.0]
    assert steps == 2
    assert many["scaled"][1][:2] == (scales, steps)
    assert_equal(weights, many["scaled"][1][2])


@pytest.mark.long
def test_no_number_on_one_rank(many):
    """It reaches the gradients of all, and P is finite and the same."""
    (reached, matrix), (others_reached, others_matrix) = many["not a number"]
    assert reached
    assert others_reached
    assert matrix.isfinite().all()
    assert torch.equal(matrix, others_matrix)


@pytest.mark.long
def test_clipping_by_value_keeps_ranks_alike(many):
    """Each fits its own factor to what was clipped: to the bit as the others do."""
    assert_equal(*many["clipped by value"])


# --- in one process -------------------------------------------------------------------------------


def test_without_processes_nothing_is_done():
    """The same script runs alone."""
    model = nn.Linear(8, 8)
    exchange_factors(model)
    assert not model.weight._post_accumulate_grad_hooks


def test_one_process_under_ddp(process_group):
    """The same script runs on one GPU: sketched gradients are not DistributedDataParallel's."""

    class Model(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Model(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 16)), torch.randn(8, 32)
    model(x).pow(2).mean().backward()
    exact = [weight.grad.clone() for weight in model.parameters()]
    exchange_factors(model)
    settings = {"rank": 1.0, "projection": "orthogonal", "min_features": 8}
    backend = compact_backend(inner="aot_eager", **settings)
    step = torch.compile(DistributedDataParallel(model), backend=backend)
    for _ in range(2):
        model.zero_grad()
        step(x).pow(2).mean().backward()
    assert isinstance(model[0].weight.grad, SketchedGrad)
    for weight, expected in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(weight.grad + 0, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "counts", [[(3, 5)] * 3, [(2, 5), (3, 5), (4, 5)], [(5, 3), (3, 4), (3, 4)]]
)
def test_steps_that_differ_are_found(process_group, monkeypatch, counts):
    """By all ranks, also where a sum or a mean of the steps is the same."""
    sent = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: sent.append(tensor) or Mock())
    with torch.device("meta"):  # a person's default device
        notes = [_Note(None, [], steps) for steps in counts]
    for mine in sent:
        mine.copy_(torch.stack(sent).amax(0))
    for note in notes:
        context = pytest.raises(RuntimeError, match="different steps of their weights")
        with nullcontext() if len(set(counts)) == 1 else context:
            note.check()


def test_messages_wait_as_long_as_those_of_the_group(process_group):
    """A rank that is gone is told of when its own messages would tell it."""
    exchange = Exchange({}, None, list)
    assert _torch.timeout_of(exchange._group) == timedelta(seconds=77)


def test_ranks_that_do_not_come_are_told_of(process_group, monkeypatch):
    monkeypatch.setattr(dist, "new_group", Mock(side_effect=dist.DistStoreError("wait timeout")))
    with pytest.raises(RuntimeError, match="give all ranks the same compact_backend") as caught:
        Exchange({}, None, list)
    assert isinstance(caught.value.__cause__, dist.DistStoreError)


def test_a_ddp_that_is_gone_is_in_nobodys_way(process_group):
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    ddp = DistributedDataParallel(model)
    ddp.itself = [ddp]
    with pytest.raises(ValueError, match="comes before DistributedDataParallel"):
        exchange_factors(torch.compile(ddp))
    with pytest.raises(ValueError, match="comes before DistributedDataParallel"):
        exchange_factors(model)
    del ddp
    exchange_factors(model)
    ddp = DistributedDataParallel(model)
    assert all(parameter.dim() == 1 for parameter in _torch.parameters_of_ddp(ddp))
    exchange_factors(model)  # it has left the weight alone


def test_buckets(process_group, monkeypatch):
    """In the order of arrival, one dtype each, none above the limit but single weights."""
    monkeypatch.setattr("compact_fx.training.exchange.BUCKET_BYTES", 100)
    weights = {name: nn.Parameter(torch.zeros(1)) for name in "abcde"}
    exchange = Exchange(weights, None, list)
    sizes = {"a": 10, "b": 50, "c": 10, "d": 10, "e": 8}
    forms = {
        _Slot(name, "factor", 0): _Form(
            (size,), torch.bfloat16 if name == "d" else torch.float32, "", 2.0
        )
        for name, size in sizes.items()
    }
    exchange._agree(forms)
    names = [[slot.weight for slot in bucket] for bucket in exchange._buckets]
    assert names == [["a"], ["b"], ["c", "e"], ["d"]]
