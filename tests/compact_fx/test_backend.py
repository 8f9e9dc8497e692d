"""The backend object: settings reach it, failures leave things whole, seeds and steps are right."""

import warnings

import pytest
import torch
from torch import nn

import compact_fx.compiler
import compact_fx.passes.apply_plan
from compact_fx import CannotCompact, CompactAdamW, compact_backend, count_step, explain
from compact_fx.training import weights as weights_module
from compact_fx.training.weights import steps_of


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32), nn.Tanh(), nn.Linear(32, 8)
    )


def batch() -> torch.Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(2))


def backend(**settings):
    defaults = {"rank": 0.25, "gradients": "dense", "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


def losses(steps: int, optimizer_of=None, model=None, micro_batches: int = 1, **settings):
    """Losses of a training run, its backend and its model."""
    model = model or mlp()
    compact = backend(**settings)
    step = torch.compile(model, backend=compact)
    optimizer = (optimizer_of or (lambda w: torch.optim.AdamW(w, lr=1e-2)))(model.parameters())
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(micro_batches):
            loss = step(batch()).pow(2).mean()
            loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, compact, model


@pytest.mark.parametrize("cleared", [False, True])
def test_a_step_that_was_seen_is_not_to_be_counted_by_hand(cleared):
    """It says so, and not that a run without sketches had been seen."""
    weights_module._warn_of_second_count.cache_clear()
    model, compact = mlp(), compact_backend(inner="aot_eager", strict=True)
    step, optimizer = torch.compile(model, backend=compact), CompactAdamW(model.parameters())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            step(batch()).sum().backward()
            optimizer.step()
            if cleared:
                optimizer.zero_grad()
            count_step(model.parameters())
            optimizer.zero_grad()
    (warning,) = caught
    assert "leave the call away" in str(warning.message)
    assert warning.filename == __file__
    assert steps_of(model[0].weight) == 6
    assert not compact.report().unsketched


def test_same_seed_same_losses():
    """Bit for bit, over changes of the projections; another seed gives others."""
    first, *_ = losses(12, update_interval=4)
    torch._dynamo.reset()
    assert losses(12, update_interval=4)[0] == first
    torch._dynamo.reset()
    assert losses(12, update_interval=4, seed=1)[0] != first


def test_no_recompilation_over_three_intervals():
    """The keys are inputs of the graph, so their change is none of Dynamo's business."""
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        _, compact, _ = losses(13, update_interval=4)
    assert len(compact.plans) == 1


def test_projection_changes_with_the_optimizer_only(expected_gradients, relative_error):
    """Within one step all micro-batches see one projection; after the interval another."""
    model, compact = mlp(), backend(update_interval=2)
    step = torch.compile(model, backend=compact)
    exact_model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.0)
    exact_model(batch()).pow(2).mean().backward()
    exact = {name: weight.grad for name, weight in exact_model.named_parameters()}
    for steps in range(5):
        for micro_batches in (1, 2, 3):
            step(batch()).pow(2).mean().backward()
            other.step()
            for name, gradient in expected_gradients(exact, compact, steps // 2).items():
                actual = model.get_parameter(name).grad / micro_batches
                assert relative_error(actual, gradient) < 1e-4, (name, steps)
        optimizer.step()
        optimizer.zero_grad()


def test_backward_after_a_change_uses_the_forwards_projection(expected_gradients, relative_error):
    """A graph that is still alive when the projections change keeps its own keys."""
    model, compact = mlp(), backend(update_interval=1, recompute=False, place="early")
    step = torch.compile(model, backend=compact)
    exact_model = mlp()
    exact_model(batch()).pow(2).mean().backward()
    exact = {name: weight.grad for name, weight in exact_model.named_parameters()}
    loss = step(batch()).pow(2).mean()
    count_step(model.parameters())
    loss.backward()
    for name, gradient in expected_gradients(exact, compact, 0).items():
        assert relative_error(model.get_parameter(name).grad, gradient) < 1e-4, name


def test_no_grad_and_eval_cost_nothing(monkeypatch):
    """Graphs without a backward pass are compiled as they are, without analysis."""
    model, compact = mlp(), backend()
    monkeypatch.setattr(compact_fx.compiler, "choose_sites", lambda *_: pytest.fail("analysed"))
    expected = mlp()(batch())
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=compact)(batch()), expected)
    torch._dynamo.reset()
    with torch.inference_mode():
        torch.compile(model.eval(), backend=compact)(batch())
    torch._dynamo.reset()
    torch.compile(model.requires_grad_(False), backend=compact)(batch())
    assert compact.plans == []


def test_frozen_and_excluded_weights_have_reasons():
    """Left-alone weights get exact gradients and say why in the plan."""
    model, reference = mlp(), mlp()
    model[2].weight.requires_grad_(False)
    compact = backend(exclude=("4.*",))
    torch.compile(model, backend=compact)(batch()).pow(2).mean().backward()
    reference(batch()).pow(2).mean().backward()
    reasons = {site.weight: site.reason for site in compact.plans[0].sites}
    assert reasons == {
        "0.weight": "",
        "2.weight": "frozen, or no gradient reaches it",
        "4.weight": "in exclude",
    }
    torch.testing.assert_close(model[4].weight.grad, reference[4].weight.grad)
    assert model[2].weight.grad is None


@pytest.mark.parametrize("name", ["choose_sites", "rewrite_weight_grads", "expand_projections"])
def test_a_failing_pass_leaves_everything_whole(monkeypatch, name):
    """A warning says why, the gradients are exact, and Dynamo's graph is as it was."""

    def fail(*_):
        raise RuntimeError("planted")

    home = compact_fx.compiler if name == "choose_sites" else compact_fx.passes.apply_plan
    monkeypatch.setattr(home, name, fail)
    graphs = []

    class Watched:
        def __call__(self, module, inputs):
            before = module.print_readable(print_output=False)
            compiled = compact(module, inputs)
            graphs.append((before, module.print_readable(print_output=False)))
            return compiled

    compact = backend(strict=False)
    model, reference = mlp(), mlp()
    with pytest.warns(UserWarning, match=f"without sketches: RuntimeError in {name}: planted"):
        torch.compile(model, backend=Watched())(batch()).pow(2).mean().backward()
    reference(batch()).pow(2).mean().backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert graphs[0][0] == graphs[0][1]
    assert compact.plans == []


def test_strict_raises(monkeypatch):
    """With strict=True a person hears of it at once."""
    monkeypatch.setattr(
        compact_fx.compiler,
        "choose_sites",
        lambda *_: (_ for _ in ()).throw(RuntimeError("planted")),
    )
    with pytest.raises(Exception, match="planted") as caught:
        torch.compile(mlp(), backend=backend())(batch())
    assert CannotCompact.__name__ in str(caught.value)


def test_pattern_without_match_warns_with_the_nearest():
    """A typo in a pattern is not silent."""
    with pytest.warns(UserWarning, match=r"'1\.weight' matches no weight.*0\.weight"):
        torch.compile(mlp(), backend=backend(exclude=("1.weight",)))(batch())
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.compile(mlp(), backend=backend(exclude=("4.weight",)))(batch())


def test_explain_warns_of_patterns_as_well():
    x = torch.randn(64, 64, device="meta")
    with pytest.warns(UserWarning, match=r"'1\.weight' matches no weight.*0\.weight") as caught:
        explain(mlp(), x, rank=8, exclude=("1.weight",))
    assert caught[0].filename == __file__


def test_a_model_compiled_in_place_keeps_its_own_backend():
    """The report of the outer one says what to look for."""

    class Block(nn.Module):  # Dynamo does not compile torch's own containers in place
        def __init__(self):
            super().__init__()
            self.layers = mlp()

        def forward(self, x):
            return self.layers(x)

    outer, model = backend(), Block()
    model.compile(backend="aot_eager")
    torch.compile(model, backend=outer)(batch()).sum().backward()
    assert "model.compile()" in str(outer.report())


def test_rank_above_in_features_is_left_alone():
    """An absolute rank that does not fit has its reason."""
    compact = backend(rank=80)
    torch.compile(mlp(), backend=compact)(batch()).sum().backward()
    reasons = {site.weight: site.reason for site in compact.plans[0].sites}
    assert reasons["0.weight"] == "rank 80 > in_features 64"
    assert reasons["2.weight"] == ""


def test_nothing_sketched_warns():
    """A rank that fits no weight is not silent."""
    with pytest.warns(UserWarning, match="nothing is sketched in a graph: .*rank 1000 >"):
        torch.compile(mlp(), backend=backend(rank=1000))(batch())


def test_entry_point_takes_settings_and_mode():
    """torch.compile(backend="compact") is the same backend."""
    model, reference = mlp(), mlp()
    exact = {"rank": 1.0, "gradients": "dense", "projection": "orthogonal"}
    options = exact | {"inner": "aot_eager", "strict": True}
    compiled = torch.compile(model, backend="compact", options=options)
    compiled(batch()).pow(2).mean().backward()
    reference(batch()).pow(2).mean().backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    with pytest.raises(Exception, match="'rnak' is not a setting"):
        torch.compile(mlp(), backend="compact", options={"rnak": 0.5})(batch())
    with pytest.raises(Exception, match="mode='fastest'"):
        torch.compile(mlp(), backend="compact", mode="fastest")(batch())


def test_torch_compiles_options_are_refused():
    """They would be lost: the backend object has its own."""
    with pytest.raises(Exception, match="would be lost"):
        torch.compile(mlp(), backend=backend(), options={"max_autotune": True})(batch())


def test_report_lists_every_weight():
    """Before and after a compilation."""
    compact = backend()
    assert "nothing was compiled" in str(compact.report())
    torch.compile(mlp(), backend=compact)(batch()).sum().backward()
    text = str(compact.report())
    assert "3 of 3 weight gradients sketched" in text or "2 of 3" in text
    for name in ("0.weight", "2.weight", "4.weight"):
        assert name in text


def test_dynamic_batch_does_not_recompile():
    """Sketches need no size of the batch: another batch size is another call, no other graph."""
    model, reference, compact = mlp(), mlp(), backend(rank=1.0, projection="orthogonal")
    step = torch.compile(model, backend=compact, dynamic=True)
    for rows in (128, 96, 33):
        x = torch.randn(rows, 64)
        model.zero_grad(), reference.zero_grad()
        step(x).pow(2).mean().backward()
        reference(x).pow(2).mean().backward()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert len(compact.plans) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, relative_error, expected_gradients):
    """Weights stay float32, products are rounded, gradients are those of rounded eager."""
    model, reference, compact = mlp(), mlp(), backend(rank=1.0, projection="orthogonal")
    step = torch.compile(model, backend=compact)
    for run in (step, reference):
        with torch.autocast("cpu", dtype):
            loss = run(batch()).float().pow(2).mean()
        loss.backward()
    assert len(compact.plans[0].sketched) == 3
    for name, weight in reference.named_parameters():
        actual = model.get_parameter(name).grad
        assert actual.dtype is torch.float32
        assert relative_error(actual, weight.grad) < (3e-2 if dtype is torch.bfloat16 else 4e-3)


class Centered(nn.Module):
    """A matmul input made from a buffer that the forward then updates, as in DINO."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 48)
        self.register_buffer("center", torch.ones(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x.softmax(-1) - self.center)
        with torch.no_grad():
            self.center.mul_(0.5)
        return y


@pytest.mark.parametrize("place", ["auto", "early", "late"])
def test_nothing_is_rebuilt_from_what_the_forward_changed(place, relative_error):
    """The backward must not see the new value of a buffer."""

    def gradient(compile_with=None):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Centered()
        step = model if compile_with is None else torch.compile(model, backend=compile_with)
        step(batch()).pow(2).mean().backward()
        return model.fc.weight.grad

    compact = backend(rank=1.0, projection="orthogonal", place=place)
    assert relative_error(gradient(compact), gradient()) < 1e-4
    assert len(compact.plans[0].sketched) == 1


def test_another_part_of_a_gradient_is_in_the_report():
    """A tied embedding: the matmul is sketched, the lookup is exact and says so."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(96, 64)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.embed(ids).tanh() @ self.embed.weight.T

    compact = backend(sketch_heads=True)
    ids = torch.randint(0, 96, (4, 32))
    torch.compile(Tied(), backend=compact)(ids).pow(2).mean().backward()
    sketched, exact = compact.plans[0].sites
    assert (sketched.rank, sketched.reason) == (16, "")
    assert exact.reason.startswith("another part: its gradient is no matmul")


@pytest.mark.parametrize(("words", "is_head"), [(96, True), (48, False)])
def test_a_head_behind_a_graph_break_is_one(words, is_head):
    """As where a message of the model's breaks the graph; also in `explain`'s analysis."""

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(words, 64)
            self.fc = nn.Linear(64, 64, bias=False)
            self.head = nn.Linear(64, words, bias=False)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.table(ids).tanh()
            torch._dynamo.graph_break()
            return self.head(self.fc(x).tanh())

    ids, loss = torch.randint(0, words, (4, 32)), lambda y: y.pow(2).mean()
    for sketch_heads in (False, True):
        compact = backend(sketch_heads=sketch_heads)
        torch._dynamo.reset()
        loss(torch.compile(Broken(), backend=compact)(ids)).backward()
        found = explain(Broken(), ids, loss=loss, sketch_heads=sketch_heads)
        for plans in (compact.plans, found.report.plans):
            reasons = {site.weight: site.reason for plan in plans for site in plan.sites}
            assert reasons["fc.weight"] == ""
            is_left = is_head and not sketch_heads
            assert reasons["head.weight"] == (
                f"a head over {words} words: sketch_heads=False" if is_left else ""
            )


def test_the_most_frequent_reason_comes_first():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    patterns = {"1.weight": 65, "*": 66}
    with pytest.warns(UserWarning, match="graph: rank 66 > in_features 64; rank 65 > in_features"):
        torch.compile(model, backend=backend(rank=patterns))(batch())


def test_tracked_projections_want_sketched_gradients():
    with pytest.warns(UserWarning, match="gradients='sketched' with CompactAdamW"):
        compact_backend(gradients="dense", projection="tracked")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compact_backend(projection="tracked", gradients="sketched")
        compact_backend()
