"""Every way to train gives eager's gradients, or an error: orthogonal projections at full rank.

One judge for all: `same_gradients` trains one copy of a model as it is and one through the backend,
with dense and with sketched gradients.
"""

import copy
import functools
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.pytorch_utils import Conv1D

from compact_fx import CompactAdamW, compact_backend

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

TOLERANCE = 1e-4


def mlp(features: int = 64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 96), nn.Tanh(), nn.Linear(96, 48))


class Block(nn.Module):
    """A residual block that a person would compile or checkpoint on its own."""

    def __init__(self, features: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.up, self.down = nn.Linear(features, 128), nn.Linear(128, features)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Blocks(nn.Module):
    def __init__(self, run=lambda block, x: block(x), count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.run = run

    def forward(self, x):
        for block in self.blocks:
            x = self.run(block, x)
        return x


def batch(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.randn(*(shape or (32, 64)), generator=torch.Generator().manual_seed(seed))


def backend(**settings):
    exact = {"rank": 1.0, "gradients": "dense", "projection": "orthogonal"}
    return compact_backend(**exact | {"inner": "aot_eager", "strict": True} | settings)


def dense_of(gradient):
    return gradient.to_dense() if hasattr(gradient, "basis") else gradient


def once(step, model):
    """One forward and one backward pass."""
    step(batch()).pow(2).mean().backward()


@pytest.fixture(params=["dense", "sketched"])
def same_gradients(request):
    """Train a copy eagerly and one compiled; gradients must agree. Returns backend and model."""

    def compare(
        make=mlp,
        train=once,
        tolerance=TOLERANCE,
        compile=torch.compile,
        may_be_left_alone=False,
        **settings,
    ):
        reference, model = make(), make()
        train(reference, reference)
        torch._dynamo.reset()
        compact = backend(gradients=request.param, **settings)
        train(compile(model, backend=compact), model)
        sketched = [site for plan in compact.plans for site in plan.sketched]
        assert sketched or may_be_left_alone, "nothing was sketched"
        names = dict(reference.named_parameters())
        for name, weight in model.named_parameters():
            expected, actual = names[name].grad, dense_of(weight.grad)
            assert (expected is None) == (actual is None), name
            if expected is not None:
                error = (actual - expected).float().norm() / expected.float().norm()
                assert error < tolerance, (name, error.item())
        return compact, model

    return compare


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(same_gradients, dtype):
    """Rounding of P and of the sketch is all that differs."""

    def train(step, model):
        with torch.autocast("cpu", dtype):
            loss = step(batch()).float().pow(2).mean()
        loss.backward()

    same_gradients(train=train, tolerance=0.02)


def test_pure_bfloat16(same_gradients):
    """Weights, activations and gradients in bfloat16."""

    def train(step, model):
        step(batch().bfloat16()).float().pow(2).mean().backward()

    same_gradients(lambda: mlp().bfloat16(), train, tolerance=0.03)


def test_grad_scaler(same_gradients):
    """The scaled loss of float16 training, unscaled before clipping."""

    def train(step, model):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        scaler.scale(step(batch()).pow(2).mean()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    same_gradients(train=train)


# --- several passes, several shapes --------------------------------------------------------------


def test_accumulation(same_gradients):
    def train(step, model):
        for seed in range(3):
            (step(batch(seed=seed)).pow(2).mean() / 3).backward()

    same_gradients(train=train)


@pytest.mark.parametrize("rank", [1.0, 0.5])
@pytest.mark.parametrize("projection", ["orthogonal", "countsketch", "tracked"])
@pytest.mark.parametrize("transpose", [False, True])
def test_equal_gradients_have_memory_of_their_own(projection, rank, transpose):
    """Two layers on one input whose outputs are added: what is accumulated into one is its own."""

    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.a, self.b = nn.Linear(64, 96), nn.Linear(96, 48), nn.Linear(96, 48)
            if transpose:
                self.a, self.b = Conv1D(48, 96), Conv1D(48, 96)

        def forward(self, x):
            x = torch.tanh(self.up(x))
            return self.a(x) + self.b(x)

    model = Added()
    settings = {"rank": rank, "projection": projection}
    step = torch.compile(model, backend=backend(**settings))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracked projections want sketched gradients
        step(batch()).pow(2).mean().backward()
    of_one = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    step(batch()).pow(2).mean().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, 2 * of_one[name], msg=name)


def test_two_forwards_before_one_backward(same_gradients):
    def train(step, model):
        (step(batch(seed=1)).pow(2).mean() + step(batch(seed=2)).mean()).backward()

    same_gradients(train=train)


def test_a_smaller_last_batch(same_gradients):
    """Dynamo makes the batch symbolic; no more graphs than plain torch.compile."""

    def train(step, model):
        for rows in (32, 32, 7, 19):
            step(batch(rows, 64)).pow(2).mean().backward()

    plain = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    train(torch.compile(mlp(), backend=plain), None)
    compact, _ = same_gradients(train=train)
    assert len(compact.plans) <= plain.frame_count


def test_dynamic_batch_and_sequence(same_gradients):
    def train(step, model):
        for rows, length in ((4, 16), (3, 9), (5, 21)):
            x = batch(rows, length, 64)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            step(x).pow(2).mean().backward()

    compact, _ = same_gradients(train=train)
    assert len(compact.plans) == 1


@pytest.mark.parametrize("shape", [(2, 3, 5, 64), (64,)])
def test_inputs_of_other_dimensions(same_gradients, shape):
    same_gradients(train=lambda step, _: step(batch(*shape)).pow(2).mean().backward())


def test_inputs_that_are_not_contiguous(same_gradients):
    def train(step, model):
        step(batch(64, 8, 4).permute(1, 2, 0)).pow(2).mean().backward()
        step(batch(32, 128)[:, ::2]).pow(2).mean().backward()

    same_gradients(train=train)


# --- checkpointing -------------------------------------------------------------------------------


def checkpointed(block, x):
    return checkpoint(block, x, use_reentrant=False)


def selective(block, x):
    """Keep the results of matrix products, recompute the rest."""

    def policy(context, operator, *args, **kwargs):
        keep = operator in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


@pytest.mark.parametrize(
    ("run", "place"),
    [*((checkpointed, place) for place in ("auto", "early", "late")), (selective, "auto")],
)
def test_checkpointed_regions(same_gradients, run, place):
    """Inside of the compiled graph: sketches do not keep what is to be recomputed."""
    compact, _ = same_gradients(lambda: Blocks(run), place=place)
    (plan,) = compact.plans
    assert len(plan.sketched) == 4
    if place != "early":
        assert plan.account.bytes_after <= plan.account.bytes_before


def test_checkpoint_around_compiled_blocks(same_gradients):
    """Outside of the compiled graphs: the compiled block runs again in the backward pass."""

    def compile_blocks(model, backend):
        for block in model.blocks:
            block.compile(backend=backend)
        return model

    same_gradients(lambda: Blocks(checkpointed), compile=compile_blocks)


def test_gradient_checkpointing_of_transformers(same_gradients, make_llama, tokens):
    def make():
        model = make_llama(layers=1).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    def train(step, model):
        step(input_ids=tokens, labels=tokens).loss.backward()

    compact, _ = same_gradients(make, train)
    assert sum(len(plan.sketched) for plan in compact.plans) == 7


@pytest.mark.parametrize("budget", [0.3, 0.6])
@pytest.mark.filterwarnings("ignore:nothing is sketched.*sketching keeps")
def test_activation_memory_budget(same_gradients, budget):
    """Where torch's own choice for a budget keeps less, it is taken, and the plan says so."""
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compact, _ = same_gradients(Blocks, may_be_left_alone=True)
    (plan,) = compact.plans
    assert plan.account.bytes_after <= plan.account.bytes_before
    assert plan.sketched or all(s.reason.startswith("sketching keeps") for s in plan.sites)


# --- parts of models -----------------------------------------------------------------------------


def test_graph_breaks(same_gradients):
    def broken(block, x):
        torch._dynamo.graph_break()
        return block(x)

    compact, _ = same_gradients(lambda: Blocks(broken))
    assert len(compact.plans) > 1


def test_regional_compilation(same_gradients):
    """One backend for all blocks: equal blocks share a graph and a plan."""

    def compile_blocks(model, backend):
        for block in model.blocks:
            block.compile(backend=backend)
        return model

    compact, _ = same_gradients(lambda: Blocks(count=5), compile=compile_blocks)
    assert len(compact.plans) == 2  # the first block's input needs no gradient


def test_fullgraph(same_gradients):
    same_gradients(compile=functools.partial(torch.compile, fullgraph=True))


def test_max_autotune(same_gradients):
    """Inductor tries several kernels for each matmul."""
    same_gradients(inner="inductor", mode="max-autotune")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_max_autotune_on_cuda(same_gradients):
    """Triton's kernels against cuBLAS's, and CUDA graphs."""

    def train(step, model):
        step(batch(128, 64).cuda()).pow(2).mean().backward()

    same_gradients(lambda: mlp().cuda(), train, inner="inductor", mode="max-autotune")


def test_frozen_layers(same_gradients):
    def make():
        model = Blocks()
        model.blocks[0].requires_grad_(False)
        return model

    same_gradients(make)


def test_adapters_of_peft(same_gradients, make_llama, tokens):
    """The base is frozen; the adapters' own weights are sketched."""
    peft = pytest.importorskip("peft")

    def make():
        config = peft.LoraConfig(r=48, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
        torch.manual_seed(0)
        model = peft.get_peft_model(make_llama(layers=1), config)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.1)  # zero otherwise, and lora_A's gradient with it
        return model

    def train(step, model):
        step(input_ids=tokens, labels=tokens).loss.backward()

    compact, _ = same_gradients(make, train)
    assert all("lora_" in site.weight for site in compact.plans[0].sketched)


def test_outputs_that_are_also_kept(same_gradients, make_llama, tokens):
    """Hidden states are returned to the user, who derives a loss from them too."""

    def train(step, model):
        output = step(input_ids=tokens, labels=tokens, output_hidden_states=True)
        (output.loss + sum(h.pow(2).mean() for h in output.hidden_states)).backward()

    same_gradients(functools.partial(make_llama, layers=1), train)


def test_a_function_that_is_no_module(same_gradients):
    """Weights that a compiled function finds in its closure."""

    def train(step, model):
        first, second = model[0], model[2]

        def function(x):
            return F.linear(torch.tanh(F.linear(x, first.weight, first.bias)), second.weight)

        run = function if step is model else torch.compile(function, backend=step.compact)
        run(batch()).pow(2).mean().backward()

    def keep(model, backend):
        model.compact = backend
        return _Step(model)

    same_gradients(train=train, compile=keep)


class _Step:
    def __init__(self, model):
        self.compact = model.compact


@torch.library.custom_op("compact_fx_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@scaled.register_fake
def _(x):
    return torch.empty_like(x)


scaled.register_autograd(lambda ctx, gradient: gradient * 2)


class Between(nn.Module):
    """Two linear layers with an operator that a person wrote between them."""

    def __init__(self, operator):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 96), nn.Linear(96, 48)
        self.operator = operator

    def forward(self, x):
        return self.second(self.operator(torch.tanh(self.first(x))))


def test_custom_operators(same_gradients):
    same_gradients(lambda: Between(scaled))


if triton is not None:

    @triton.jit
    def double_kernel(x, out, count, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x + index, mask=index < count)
        tl.store(out + index, 2 * value, mask=index < count)


class Doubled(torch.autograd.Function):
    """A person's own Triton kernel, in both directions."""

    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        double_kernel[(-(-x.numel() // 256),)](x, out, x.numel(), BLOCK=256)
        return out

    @staticmethod
    def backward(ctx, gradient):
        return Doubled.forward(ctx, gradient.contiguous())


def doubled(x):
    """A function: torch 2.11's Dynamo does not follow `Doubled.apply` as an attribute."""
    return Doubled.apply(x)


@pytest.mark.skipif(not torch.cuda.is_available() or triton is None, reason="needs a CUDA GPU")
def test_triton_kernels(same_gradients):
    def train(step, model):
        step(batch().cuda()).pow(2).mean().backward()

    compact, _ = same_gradients(lambda: Between(doubled).cuda(), train, inner="inductor")
    assert len(compact.plans[0].sketched) == 2


# --- several models, and what happens to a model afterwards --------------------------------------


def test_two_models_with_one_backend():
    compact, first, second = backend(), mlp(), Blocks()
    for model in (first, second):
        reference = copy.deepcopy(model)
        once(torch.compile(model, backend=compact), model)
        once(reference, reference)
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert len(compact.plans) == 2


def test_two_backends_in_one_process():
    """Each compiles its own graphs with its own settings."""
    ranks = (8, 16)
    for rank in ranks:
        compact = backend(rank=rank)
        once(torch.compile(mlp(), backend=compact), None)
        assert {site.rank for site in compact.plans[0].sketched} == {rank}


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_a_model_can_be_copied_and_saved_afterwards(gradients):
    """Copies train on, and a checkpoint loads without this package."""
    model, compact = Blocks(), backend(gradients=gradients)
    model.compile(backend=compact)
    once(model, model)
    assert compact.plans[0].sketched
    twin = copy.deepcopy(model)
    assert set(twin.state_dict()) == set(Blocks().state_dict())
    once(twin, twin)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(dense_of(other.grad), dense_of(mine.grad))
    model.zero_grad()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    Blocks().load_state_dict(torch.load(buffer, weights_only=True))
    pickle.loads(pickle.dumps(model.state_dict()))


@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_a_compiled_optimizer_step(gradients):
    """torch.compile(optimizer.step): the same weights as without."""
    if gradients == "sketched" and torch.__version__ < "2.13":
        pytest.skip("Dynamo cannot trace it before")
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = mlp()
        step = torch.compile(model, backend=backend(gradients=gradients, rank=0.5))
        make = CompactAdamW if gradients == "sketched" else torch.optim.AdamW
        optimizer = make(model.parameters(), lr=1e-2)
        update = torch.compile(optimizer.step, backend="aot_eager") if compiled else optimizer.step
        for _ in range(3):
            optimizer.zero_grad()
            once(step, model)
            update()
        results.append([weight.detach().clone() for weight in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
