"""The key schedule: projections change with the optimizer steps of the weights that they are of."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from compact_fx import CompactAdamW, compact_backend
from compact_fx.plan import Plan, ProjectionInput
from compact_fx.projections import Projection, drawn, fold_in
from compact_fx.training.inputs import GraphInputs
from compact_fx.training.watch import Watch
from compact_fx.training.weights import set_steps, steps_of


def weight_of(*shape):
    weight = nn.Parameter(torch.zeros(shape or (3, 2)))
    weight.grad = torch.zeros_like(weight)
    return weight


def plan_of(*salts):
    return Plan(
        sites=(),
        projections=tuple(
            Projection(salt=salt, features=8, rank=2, kind="gaussian", dtype=torch.float32)
            for salt in salts
        ),
        inputs=tuple(ProjectionInput(projection=i, owners=(i,)) for i in range(len(salts))),
    )


def inputs_of(plan, seed, interval):
    return GraphInputs(plan, Watch(), seed=seed, interval=interval)


def schedule_of(*weights, interval=1, seed=0):
    return inputs_of(plan_of(*range(len(weights))), seed=seed, interval=interval)


def values(keys):
    return [key.item() for key in keys]


def test_keys_are_those_of_seed_salt_and_generation():
    weights = [weight_of(), weight_of()]
    schedule = inputs_of(plan_of(11, 12), seed=5, interval=2)
    keys = schedule(weights)
    assert values(keys) == [fold_in(5, 11, 0), fold_in(5, 12, 0)]
    assert all(key.shape == () and key.dtype == torch.int64 for key in keys)
    optimizer = torch.optim.SGD(weights, lr=0.1)
    optimizer.step()
    optimizer.step()
    assert values(schedule(weights)) == [fold_in(5, 11, 1), fold_in(5, 12, 1)]


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_keys_change_exactly_every_update_interval_steps(interval, make):
    weight = weight_of()
    schedule, optimizer = schedule_of(weight, interval=interval), make([weight], lr=0.1)
    seen = []
    for _ in range(3 * interval):
        seen.append(values(schedule([weight])))
        optimizer.step()
    assert [step for step in range(1, len(seen)) if seen[step] != seen[step - 1]] == [
        step for step in range(1, len(seen)) if step % interval == 0
    ]


def test_steps_before_the_weight_was_tracked_do_not_count():
    weight = weight_of()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.step()
    steps_of(weight)
    assert steps_of(weight) == 0
    optimizer.step()
    steps_of(weight)
    assert steps_of(weight) == 1


def test_an_optimizer_of_other_weights_does_not_count():
    weight, other = weight_of(), weight_of()
    schedule = schedule_of(weight)
    before = schedule([weight])
    torch.optim.SGD([other], lr=0.1).step()
    assert schedule([weight]) is before
    assert steps_of(weight) == 0


def test_every_param_group_counts():
    first, second = weight_of(), weight_of()
    steps_of(first)
    steps_of(second)
    torch.optim.SGD([{"params": [first]}, {"params": [second], "lr": 0.2}], lr=0.1).step()
    assert (steps_of(first), steps_of(second)) == (1, 1)


def test_each_projection_follows_its_own_weight():
    first, second = weight_of(), weight_of()
    schedule = schedule_of(first, second)
    before = values(schedule([first, second]))
    torch.optim.SGD([second], lr=0.1).step()
    after = values(schedule([first, second]))
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_new_keys_are_new_tensors_and_old_ones_keep_their_values():
    weight = weight_of()
    schedule, optimizer = schedule_of(weight), torch.optim.SGD([weight], lr=0.1)
    old = schedule([weight])
    expected = values(old)
    optimizer.step()
    new = schedule([weight])
    assert values(old) == expected
    assert values(new) != expected
    assert new[0].data_ptr() != old[0].data_ptr()


def test_keys_of_several_projections_share_no_storage():
    weights = [weight_of(), weight_of(), weight_of()]
    keys = schedule_of(*weights)(weights)
    assert len({key.untyped_storage().data_ptr() for key in keys}) == 3
    assert all(key.storage_offset() == 0 for key in keys)


def test_accumulation_within_one_step_sees_one_generation():
    weight = weight_of()
    schedule, optimizer = schedule_of(weight, interval=2), torch.optim.SGD([weight], lr=0.1)
    first = schedule([weight])
    optimizer.step()
    for _ in range(5):
        (weight * 2).sum().backward()
        assert schedule([weight]) is first
    optimizer.step()
    assert values(schedule([weight])) != values(first)


def test_a_step_that_the_scaler_skips_does_not_count():
    weight = weight_of()
    schedule, optimizer = schedule_of(weight), torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = schedule([weight])

    weight.grad = torch.full_like(weight, float("inf"))
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    scaler.update()
    assert schedule([weight]) is before

    weight.grad = torch.ones_like(weight)
    scaler.step(optimizer)
    scaler.update()
    assert values(schedule([weight])) != values(before)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, CompactAdamW])
def test_a_fused_step_without_gradients_under_the_scaler_is_none(optimizer_class):
    """GradScaler then tells the optimizer of the number 0, where it has a tensor otherwise."""
    weight = weight_of()
    schedule_of(weight)([weight])
    other = weight_of()
    other.grad = None
    optimizer = optimizer_class([other], fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = other.detach().clone()
    scaler.scale(torch.zeros(()))
    scaler.step(optimizer)
    assert torch.equal(other, before)


def test_keys_depend_on_the_seed():
    weight = weight_of()
    first, second = (values(schedule_of(weight, seed=seed)([weight])) for seed in (0, 1))
    assert first != second


def test_two_graphs_of_one_weight_change_together():
    weight = weight_of()
    first = schedule_of(weight)
    torch.optim.SGD([weight], lr=0.1).step()
    second = schedule_of(weight)
    assert values(first([weight])) == values(second([weight]))


def test_a_weight_that_took_another_ones_place_counts_its_steps():
    """Blocks of one class share a compiled graph, and a parameter may be replaced."""
    planned, given = weight_of(), weight_of()
    schedule = schedule_of(planned)
    before = values(schedule([given]))
    torch.optim.SGD([given], lr=0.1).step()
    assert values(schedule([given])) != before


def test_weights_are_not_kept_alive():
    weight = weight_of()
    schedule = schedule_of(weight)
    schedule([weight])
    torch.optim.SGD([weight], lr=0.1).step()
    schedule([weight])
    alive = weakref.ref(weight)
    del weight
    gc.collect()
    assert alive() is None


def test_each_set_of_weights_has_its_own_keys():
    """Equal blocks share a compiled graph: the step of one must not change the other's keys."""
    first, second = weight_of(), weight_of()
    schedule = schedule_of(first)
    before = schedule([first]), schedule([second])
    torch.optim.SGD([first], lr=0.1).step()
    assert values(schedule([first])) != values(before[0])
    assert schedule([second]) is before[1]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_draw_once_a_generation(monkeypatch, use_reentrant):
    """A reentrant one is compiled in its backward pass, and runs there only."""
    calls = []
    original = drawn.countsketch_table

    def counted(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(drawn, "countsketch_table", counted)
    layer = torch.nn.Linear(64, 64)
    settings = {"gradients": "dense", "projection": "countsketch", "update_interval": 3}
    backend = compact_backend(rank=0.25, inner="aot_eager", strict=True, **settings)
    compiled = torch.compile(layer, backend=backend)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    steps = []
    for _ in range(6):
        calls.clear()
        x = torch.randn(32, 64, requires_grad=True)
        checkpoint(compiled, x, use_reentrant=use_reentrant).sum().backward()
        optimizer.step()
        steps.append(len(calls))
    assert steps[1:] == [0, 0, 1, 0, 0]


def test_weights_that_meet_have_one_projection_from_then_on():
    """Also in graphs that ran before in the same step."""
    first, second = weight_of(), weight_of()
    alone = inputs_of(plan_of(11), seed=0, interval=1), inputs_of(plan_of(12), seed=0, interval=1)
    keys = alone[0]([first]), alone[1]([second])
    assert values(keys[0]) != values(keys[1])
    shared = replace(plan_of(13), inputs=(ProjectionInput(projection=0, owners=(0, 1)),))
    together = inputs_of(shared, seed=0, interval=1)([first, second])
    assert values(together) == values(keys[0])
    assert values(alone[0]([first])) == values(alone[1]([second])) == values(together)


def test_a_projection_changes_with_the_most_stepped_of_its_weights():
    """One that is frozen, or in no graph for a while, does not hold it back."""
    first, second = weight_of(), weight_of()
    shared = replace(plan_of(13), inputs=(ProjectionInput(projection=0, owners=(0, 1)),))
    inputs = inputs_of(shared, seed=0, interval=2)
    before = values(inputs([first, second]))
    optimizer = torch.optim.SGD([second], lr=0.1)
    optimizer.step()
    assert values(inputs([first, second])) == before
    optimizer.step()
    changed = values(inputs([first, second]))
    assert changed != before
    alone = inputs_of(plan_of(13), seed=0, interval=2)
    assert values(alone([first])) == changed


def test_a_weight_that_joins_with_more_steps_changes_all_graphs():
    """Also those that have run before in the same step."""
    first, second = weight_of(), weight_of()
    set_steps([second], 4)
    alone = inputs_of(plan_of(13), seed=0, interval=2)
    shared = replace(plan_of(13), inputs=(ProjectionInput(projection=0, owners=(0, 1)),))
    together = inputs_of(shared, seed=0, interval=2)
    before = values(alone([first]))
    assert values(together([first, second])) != before
    assert values(alone([first])) == values(together([first, second]))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_cleared_within_the_step_count(set_to_none):
    """By a hook of the optimizer, or at the end of its own step."""
    weight = weight_of()
    steps_of(weight)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none=set_to_none))
    for _ in range(3):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert steps_of(weight) == 3
    optimizer.zero_grad()
    optimizer.step()
    assert steps_of(weight) == 3


def test_gradients_that_a_closure_clears_do_not_count():
    weight = weight_of()
    assert steps_of(weight) == 0
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.step(optimizer.zero_grad)
    optimizer.step(closure=optimizer.zero_grad)
    assert steps_of(weight) == 0


class GradientsOfItsOwn(torch.optim.SGD):
    """Makes them within its step, without a closure."""

    def step(self):
        self.forward_and_backward()
        return super().step()


@pytest.mark.parametrize("is_hooked", [False, True])
def test_a_weight_that_is_met_within_a_step_counts(is_hooked):
    class Optimizer(GradientsOfItsOwn):
        pass

    if is_hooked:  # torch hooks the step of a class when it is made for the first time
        GradientsOfItsOwn([weight_of()], lr=0.1)
    steps_of(weight_of())  # optimizers are watched
    weight = weight_of()
    optimizer = Optimizer([weight], lr=0.1)
    schedule = schedule_of(weight)
    optimizer.forward_and_backward = lambda: schedule([weight])
    optimizer.step()
    assert steps_of(weight) == 1
    optimizer.step()
    assert steps_of(weight) == 2


def test_weights_that_a_step_takes_in_count():
    class Master(torch.optim.Optimizer):
        """Holds copies, and has the weights themselves for as long as it steps."""

        def __init__(self, weights):
            self.weights = weights
            super().__init__([torch.zeros(1)], {})

        def step(self):
            self.param_groups[0]["params"] = self.weights

    weight = weight_of()
    assert steps_of(weight) == 0
    optimizer = Master([weight])
    for number in range(1, 4):
        optimizer.step()
        assert steps_of(weight) == number
        optimizer.param_groups[0]["params"] = [torch.zeros(1)]

    later = weight_of()
    assert steps_of(later) == 0
    optimizer = torch.optim.SGD([weight_of()], lr=0.1)
    hook = optimizer.register_step_pre_hook(
        lambda optimizer, *_: optimizer.add_param_group({"params": [later]})
    )
    optimizer.step()
    hook.remove()
    assert steps_of(later) == 1


def test_graphs_have_one_key_where_the_most_stepped_weight_is_gone():
    first, second = weight_of(), weight_of()
    plan = plan_of(0)
    both = inputs_of(
        replace(plan, inputs=(ProjectionInput(projection=0, owners=(0, 1)),)), seed=0, interval=5
    )
    both([first, second])
    optimizer = torch.optim.SGD([first], lr=0.1)
    for _ in range(7):
        optimizer.step()
    alone = inputs_of(plan, seed=0, interval=5)
    assert values(both([first, second])) == values(alone([second])) == [fold_in(0, 0, 1)]
    del first, optimizer, both
    gc.collect()
    later = inputs_of(plan, seed=0, interval=5)
    assert values(alone([second])) == values(later([second])) == [fold_in(0, 0, 0)]
