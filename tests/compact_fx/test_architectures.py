"""What people train: Hugging Face classes as they are, from small random configs."""

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from transformers.pytorch_utils import Conv1D

from compact_fx import CompactAdamW, SketchedGrad, compact_backend
from compact_fx.passes import store_low_bit

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a:UserWarning")

EXACT = {"rank": 1.0, "gradients": "dense", "projection": "orthogonal", "sketch_heads": True}

VOCABULARY = 128
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED_QUERY = {**TEXT, "num_key_value_heads": 2, "head_dim": 16}
ENCODER = {**TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
EXPERTS = {
    **GROUPED_QUERY,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 96,
}
SEQ2SEQ = {
    "vocab_size": VOCABULARY,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 160,
    "decoder_ffn_dim": 160,
    "dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# Without problem_type the first forward sets it, which compiles the model a second time.
LABELS = {"num_labels": 3, "problem_type": "single_label_classification"}
PATCHES = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    **LABELS,
}


def token_ids(batch, length, seed=1):
    return torch.randint(
        3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed)
    )


def text(length=32):
    tokens = token_ids(2, length)
    return {"input_ids": tokens, "labels": tokens}


def short_text():
    return text(8)


def translation():
    return {"input_ids": token_ids(2, 32), "labels": token_ids(2, 24, seed=2)}


def images(count=4):
    pixels = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": torch.arange(count) % 3}


def captioned_images():
    captions = {"input_ids": token_ids(4, 16), "return_loss": True}
    return {**captions, "pixel_values": images()["pixel_values"]}


def speech():
    features = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1))
    return {"input_features": features, "labels": token_ids(2, 24)}


DECODERS = {
    "llama": (hf.LlamaForCausalLM, TEXT),
    "qwen2": (hf.Qwen2ForCausalLM, GROUPED_QUERY),
    "qwen3": (hf.Qwen3ForCausalLM, GROUPED_QUERY),
    "gemma": (hf.GemmaForCausalLM, GROUPED_QUERY),
    "gemma2": (hf.Gemma2ForCausalLM, {**GROUPED_QUERY, "num_hidden_layers": 2}),
    "gemma3": (hf.Gemma3ForCausalLM, GROUPED_QUERY),
    "mistral": (hf.MistralForCausalLM, {**GROUPED_QUERY, "sliding_window": 16}),
    "phi": (hf.PhiForCausalLM, {**TEXT, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": (hf.Phi3ForCausalLM, {**GROUPED_QUERY, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt2": (
        hf.GPT2LMHeadModel,
        {**TEXT, "num_hidden_layers": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "gpt_neox": (hf.GPTNeoXForCausalLM, {**TEXT, "hidden_dropout": 0.0}),
    "opt": (
        hf.OPTForCausalLM,
        {**TEXT, "ffn_dim": 160, "word_embed_proj_dim": 64, "dropout": 0.0},
    ),
    "falcon": (hf.FalconForCausalLM, {**TEXT, "alibi": False}),
    "mixtral": (hf.MixtralForCausalLM, EXPERTS),
    "qwen2_moe": (hf.Qwen2MoeForCausalLM, EXPERTS),
    "olmoe": (hf.OlmoeForCausalLM, EXPERTS),
    "gpt_oss": (hf.GptOssForCausalLM, EXPERTS),
    "llama4": (
        hf.Llama4ForCausalLM,
        {**EXPERTS, "intermediate_size_mlp": 160, "attention_chunk_size": 16},
    ),
}
ARCHITECTURES = {
    **{name: (*entry, text) for name, entry in DECODERS.items()},
    "bert": (hf.BertForMaskedLM, ENCODER, text),
    "roberta": (hf.RobertaForMaskedLM, ENCODER, text),
    "distilbert": (
        hf.DistilBertForMaskedLM,
        {
            "vocab_size": VOCABULARY,
            "dim": 64,
            "hidden_dim": 160,
            "n_layers": 1,
            "n_heads": 4,
            "max_position_embeddings": 64,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text,
    ),
    # Two layers with one set of weights.
    "albert": (
        hf.AlbertForMaskedLM,
        {**ENCODER, "embedding_size": 32, "num_hidden_layers": 2},
        text,
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 160,
            "num_layers": 1,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "use_cache": False,
            "decoder_start_token_id": 0,
        },
        translation,
    ),
    "bart": (
        hf.BartForConditionalGeneration,
        {**SEQ2SEQ, "max_position_embeddings": 64},
        translation,
    ),
    "whisper": (
        hf.WhisperForConditionalGeneration,
        {
            **SEQ2SEQ,
            "num_mel_bins": 16,
            "max_source_positions": 32,
            "max_target_positions": 64,
        },
        speech,
    ),
    "vit": (hf.ViTForImageClassification, {**ENCODER, **PATCHES}, images),
    "swin": (
        hf.SwinForImageClassification,
        {
            "embed_dim": 32,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "image_size": 32,
            "patch_size": 4,
            "window_size": 4,
            **LABELS,
            "drop_path_rate": 0.0,
        },
        images,
    ),
    "clip": (
        hf.CLIPModel,
        {"text_config": TEXT, "vision_config": PATCHES, "projection_dim": 48},
        captioned_images,
    ),
    "mamba": (
        hf.MambaForCausalLM,
        {**TEXT, "state_size": 8, "use_mambapy": False},
        short_text,
    ),
}
# Their gradients are no products of an activation, or are of too few features.
LEFT_ALONE = ("index_put", "convolution_backward", "sum.dim", "mul.Tensor", "frozen", "in_features")


def build(name):
    """The model, the same each time, and its batch."""
    model_class, settings, batch = ARCHITECTURES[name]
    torch.manual_seed(0)
    return model_class(model_class.config_class(**settings)).train(), batch()


def train(model, batch, optimizer, backend=None, steps=3):
    """The losses of some steps, and the gradients of the first; sketched ones as dense."""
    step = model if backend is None else torch.compile(model, backend=backend)
    losses, gradients = [], {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step(**batch)["loss"]
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = {n: w.grad for n, w in model.named_parameters() if w.grad is not None}
            gradients = {
                n: g.to_dense() if isinstance(g, SketchedGrad) else g.clone()
                for n, g in gradients.items()
            }
        optimizer.step()
    return losses, gradients


def assert_equal(actual, expected):
    """Each gradient within 1e-4 of its norm; zeros, as of the biases of keys, are rounding."""
    assert set(actual) == set(expected)
    noise = 1e-7 * max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).norm() <= 1e-4 * gradient.norm() + noise, name


def assert_every_linear_is_sketched(model, plan):
    """All uses of all linear weights, of 32 features or more; nothing else has another reason."""
    linear = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module.weight.shape[1] >= 32
    }
    experts = {n: w for n, w in model.named_parameters() if ".experts." in n and w.dim() == 3}
    linear |= {id(weight) for weight in experts.values()}
    sketched = {id(model.get_parameter(site.weight)) for site in plan.sketched}
    assert linear <= sketched
    for site in plan.sites:
        if site.placement is None:
            assert any(reason in site.reason for reason in LEFT_ALONE), site


def every_architecture(*in_every_run):
    """The others are long."""
    long = pytest.mark.long
    names = [pytest.param(n, marks=() if n in in_every_run else long) for n in ARCHITECTURES]
    return pytest.mark.parametrize("name", names)


@every_architecture("gemma2", "gpt2", "mixtral", "gpt_oss", "bert", "t5", "swin", "mamba")
def test_dense_gradients_are_exact(name):
    """At full rank three steps are those of eager; all linear layers are sketched."""
    model, batch = build(name)
    losses, exact = train(model, batch, torch.optim.AdamW(model.parameters(), lr=1e-3))

    model, batch = build(name)
    backend = compact_backend(**EXACT, inner="aot_eager", strict=True, place="late")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    compact_losses, compact = train(model, batch, optimizer, backend)
    assert_equal(compact, exact)
    assert compact_losses == pytest.approx(losses, rel=1e-3)
    (plan,) = backend.plans
    assert_every_linear_is_sketched(model, plan)
    if name in DECODERS:
        share = sum(plan.cost_of(site).flops_before for site in plan.sketched)
        assert share >= 0.95 * sum(cost.flops_before for cost in plan.account.sites)


@every_architecture("llama", "gpt2", "mixtral", "gpt_oss", "t5")
def test_sketched_gradients_are_g_p_pt(name):
    """Never more bytes; a factor of G P Pᵀ where the whole gradient is sketched, else exact."""
    model, batch = build(name)
    losses, exact = train(model, batch, torch.optim.SGD(model.parameters(), lr=0.0), steps=1)

    model, batch = build(name)
    settings = {"gradients": "sketched", "projection": "countsketch", "sketch_heads": True}
    backend = compact_backend(rank=0.25, inner="aot_eager", strict=True, **settings)
    optimizer = CompactAdamW(model.parameters(), lr=1e-3)
    compact_losses, compact = train(model, batch, optimizer, backend)
    (plan,) = backend.plans
    assert plan.account.bytes_after <= plan.account.bytes_before
    assert compact_losses[0] == pytest.approx(losses[0], rel=1e-5)
    assert compact_losses[2] < compact_losses[0]

    names = {id(weight): name for name, weight in model.named_parameters()}
    own_name = {site.index: names[id(model.get_parameter(site.weight))] for site in plan.sites}
    partly = {own_name[site.index] for site in plan.sketched}
    for proxy in plan.factor_inputs:
        weight = own_name[proxy.index]
        partly.remove(weight)
        assert isinstance(model.get_parameter(weight).grad, SketchedGrad)
        p = plan.projections[proxy.projection](backend.config.seed)
        g = exact[weight]
        exact[weight] = (g @ p) @ p.T if proxy.dim == g.dim() - 1 else p @ (p.T @ g)
    # What is left is a tied embedding, or sketched in two ways.
    reasons = {own_name[site.index]: site.reason for site in plan.sketched}
    assert all(reasons[weight] for weight in partly), partly
    assert not any(".experts." in weight for weight in partly)
    for weight in partly:
        compact.pop(weight)
        exact.pop(weight)
    assert_equal(compact, exact)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "mixtral",
        *(pytest.param(n, marks=pytest.mark.long) for n in ("gemma2", "t5", "swin", "mamba")),
    ],
)
def test_gradients_are_near_with_eight_bits(name, monkeypatch):
    """Also where a mask with infinities crosses (qwen3); the loss stays exact."""
    monkeypatch.setattr(store_low_bit, "SMALLEST", 2**10)
    model, batch = build(name)
    losses, exact = train(model, batch, torch.optim.SGD(model.parameters(), lr=0.0), steps=1)
    model, batch = build(name)
    backend = compact_backend(
        rank=1.0,
        projection="orthogonal",
        gradients="dense",
        saved="int8",
        sketch_heads=True,
        place="late",
        inner="aot_eager",
        strict=True,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    compact_losses, compact = train(model, batch, optimizer, backend, steps=1)
    assert compact_losses == pytest.approx(losses, rel=1e-5)
    (plan,) = backend.plans
    assert plan.account.bytes_after < 0.65 * plan.account.bytes_before
    noise = 1e-3 * max(gradient.norm() for gradient in exact.values())
    for weight, gradient in exact.items():
        assert (compact[weight] - gradient).norm() <= 0.02 * (gradient.norm() + noise), weight


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit", "mixtral", "llama4"])
def test_through_inductor(name, expected_gradients):
    """The generated code computes what the graphs say."""
    model, batch = build(name)
    _, exact = train(model, batch, torch.optim.SGD(model.parameters(), lr=0.0), steps=1)
    model, batch = build(name)
    settings = {"gradients": "dense", "projection": "countsketch"}
    backend = compact_backend(rank=0.25, strict=True, exclude=("*embed*",), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, compact = train(model, batch, optimizer, backend, steps=1)
    assert_equal(compact, expected_gradients(exact, backend))


ON_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.filterwarnings("ignore:nothing is sketched in a graph")
@pytest.mark.parametrize(
    ("device", "inner"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=ON_CUDA)],
)
def test_experts_in_bfloat16(device, inner):
    """There torch's own grouped matmul is used; exact but for rounding of P and of z."""
    batch = {name: tensor.to(device) for name, tensor in text().items()}
    gradients = []
    backend = compact_backend(**EXACT, inner=inner, strict=True)
    nothing = compact_backend(gradients="dense", exclude=("*",), inner=inner, strict=True)
    for compiler in (nothing, backend):
        model = build("olmoe")[0].bfloat16().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        gradients.append(train(model, batch, optimizer, compiler, steps=1)[1])
    assert_every_linear_is_sketched(model, backend.plans[0])
    for name, gradient in gradients[0].items():
        error = (gradients[1][name].float() - gradient.float()).norm() / gradient.float().norm()
        assert error < 0.02, name


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        ("batched_mm", "its gradient is no matmul: aten.index_put.default"),
        pytest.param("eager", None, marks=pytest.mark.long),
    ],
)
def test_other_ways_to_run_experts_are_left_alone(implementation, reason):
    """One outer product for each token, or a loop that Dynamo does not compile: exact both."""
    (model, batch), (reference, _) = build("olmoe"), build("olmoe")
    reference.set_experts_implementation(implementation)
    _, exact = train(reference, batch, torch.optim.SGD(reference.parameters(), lr=0.0), steps=1)
    model.set_experts_implementation(implementation)
    backend = compact_backend(**EXACT, inner="aot_eager", strict=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    _, compact = train(model, batch, optimizer, backend, steps=1)
    assert_equal(compact, exact)
    sites = [site for plan in backend.plans for site in plan.sites if ".experts." in site.weight]
    assert [site.reason for site in sites] == ([reason] * 2 if reason else [])


class ConvNet(nn.Module):
    """A residual block: convolutions, normalisation, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.block = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.Conv2d(64, 64, 1, bias=False),
            nn.BatchNorm2d(64),
        )
        self.head = nn.Linear(64, 3)

    def forward(self, pixel_values, labels):
        x = self.stem(pixel_values)
        x = (x + self.block(x)).relu().mean((2, 3))
        return {"loss": F.cross_entropy(self.head(x), labels)}


class Recurrent(nn.Module):
    """An LSTM that reads bytes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 64)
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.head = nn.Linear(64, VOCABULARY)

    def forward(self, input_ids, labels):
        y, _ = self.lstm(self.embed(input_ids))
        return {"loss": F.cross_entropy(self.head(y).flatten(0, 1), labels.flatten())}


def exact_and_compact(model_class, batch):
    """Gradients of eager and at full rank, and the backend."""
    found = []
    backend = compact_backend(**EXACT, inner="aot_eager", strict=True)
    for compiler in (None, backend):
        torch.manual_seed(0)
        model = model_class()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found.append(train(model, batch, optimizer, compiler, steps=1)[1])
    return *found, backend


def test_convolutions_are_left_alone():
    exact, compact, backend = exact_and_compact(ConvNet, images())
    assert_equal(compact, exact)
    (plan,) = backend.plans
    reasons = {site.weight: site.reason for site in plan.sites}
    no_matmul = "its gradient is no matmul: aten.convolution_backward.default"
    convolutions = ("stem.weight", "block.0.weight", "block.3.weight")
    assert reasons == {**dict.fromkeys(convolutions, no_matmul), "head.weight": ""}


def test_dynamo_does_not_compile_recurrent_kernels():
    """An nn.LSTM runs as it is: Dynamo hands no graph of it to any backend."""
    exact, compact, backend = exact_and_compact(Recurrent, text())
    assert_equal(compact, exact)
    if torch.__version__ < "2.15":
        assert backend.plans == []
        assert "nothing was compiled" in str(backend.report())
    else:  # what is around it is compiled
        assert not any("lstm" in site.weight for plan in backend.plans for site in plan.sites)


def test_an_unrolled_lstm_is_exact():
    """With Dynamo's `allow_rnn` it is a chain of matmuls, one use of its weight a time step."""
    with torch._dynamo.config.patch(allow_rnn=True):
        exact, compact, backend = exact_and_compact(Recurrent, short_text())
    assert_equal(compact, exact)
    (plan,) = backend.plans
    uses = [site for site in plan.sites if site.weight == "lstm.weight_hh_l0"]
    assert [site.reason for site in uses if site.placement is None] == [
        "another part: its gradient is a product of no activation"  # the first state is zeros
    ]
    assert len(uses) == 8
