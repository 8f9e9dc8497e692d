"""Ways to train a model that `pareto.py` compares: each makes a model and its optimizer."""

import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from compact_eager import EagerCompactAdamW, to_compact
from quality import low_rank_class
from torch import Tensor, nn
from torch.optim import Optimizer
from training import TENSORWISE, build, inputs_of, to_float8
from transformers import RobertaConfig, RobertaForSequenceClassification
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.llama import modeling_llama

from compact_fx import CompactAdamW, compact_backend

Shape = dict[str, int]
Rank = float | int

SHAPES: dict[str, Shape] = {
    "1b": {
        "layers": 6,
        "hidden": 2048,
        "mlp": 5632,
        "heads": 16,
        "kv_heads": 16,
        "vocabulary": 0,  # blocks without a head
        "batch": 8,
        "seq": 2048,
    },
    "8b": {
        "layers": 4,
        "hidden": 4096,
        "mlp": 14336,
        "heads": 32,
        "kv_heads": 8,
        "vocabulary": 0,
        "batch": 2,
        "seq": 2048,
    },
    "350m": {
        "layers": 24,
        "hidden": 1024,
        "mlp": 2736,
        "heads": 16,
        "kv_heads": 16,
        "vocabulary": 32000,
        "batch": 64,
        "seq": 256,
    },
    "roberta": {
        "layers": 12,
        "hidden": 768,
        "mlp": 3072,
        "heads": 12,
        "vocabulary": 50265,
        "batch": 16,
        "seq": 512,
    },
}
# The first is that of all methods; compact is measured with the others as well.
RANKS: dict[str, tuple[Rank, ...]] = {
    "1b": (0.25, 0.5, 0.125),
    "8b": (0.25, 0.125),
    "350m": (0.125, 0.25),
    "roberta": (8, 0.25),
}
CLASSES = 2  # of RoBERTa's head
LR = 1e-4


@dataclass(frozen=True)
class Case:
    """What a competitor is asked for.

    Attributes:
        name: of the shape.
        shape: sizes as in SHAPES.
        device: "cuda" or "cpu".
        inner: what compiles: "inductor", or "aot_eager" for a dry run.
        during: contexts that are left when all is measured.
    """

    name: str
    shape: Shape
    device: str
    inner: str
    during: ExitStack

    @property
    def is_encoder(self) -> bool:
        """Whether a classifier is fine-tuned, and not a language model trained."""
        return self.name == "roberta"


Training = tuple[nn.Module, Optimizer]
Competitor = Callable[[Case], Training]


def rank_label(rank: Rank) -> str:
    """As the paper writes it: n/4, or rank 8."""
    return f"n/{1 / rank:g}" if isinstance(rank, float) else f"rank {rank}"


def columns(rank: Rank, features: int) -> int:
    """The number that a rank is for so many features."""
    return max(1, round(rank * features)) if isinstance(rank, float) else rank


def competitors(name: str) -> dict[str, Competitor]:
    """Everybody, by a name for people, for one of SHAPES."""
    rank, *others = RANKS[name]
    at = rank_label(rank)
    ours = partial(compact, rank=rank)
    low_bit: dict[str, Any] = {"saved": "int8"}
    graphs = {"mode": "reduce-overhead"}
    smallest = {"state_dtype": "fp8", **low_bit}
    chunked: dict[str, Competitor] = {}
    if name == "350m":  # where logits are much of all
        chunked["torch.compile, loss in chunks"] = partial(compiled, chunks=True)
        chunked[f"compact {at}, loss in chunks"] = partial(ours, chunks=True)
        label = f"compact {at}, int8, 8-bit moments, loss in chunks"
        chunked[label] = partial(ours, chunks=True, **smallest)
        label = f"compact {at}, int8, loss in chunks, CUDA graphs"
        chunked[label] = partial(ours, chunks=True, **low_bit, **graphs)
    captured: dict[str, Competitor] = {}
    if name in ("roberta", "350m", "8b"):
        captured["torch.compile, CUDA graphs"] = partial(compiled, **graphs)
    if name in ("roberta", "350m"):  # whose kernels are shorter than it takes to launch them
        captured[f"compact {at}, CUDA graphs"] = partial(ours, **graphs)
        captured[f"compact {at}, int8, CUDA graphs"] = partial(ours, **low_bit, **graphs)
    if name == "roberta":  # half of torch.compile's peak, in no more time than that takes
        label = f"compact {at}, memory budget 0.45, CUDA graphs"
        captured[label] = partial(ours, memory_budget=0.45, **graphs)
    if name == "8b":  # float8 casts weights and activations with many short kernels
        label = "torchao float8 tensorwise, CUDA graphs"
        captured[label] = partial(compiled, float8="tensorwise", **graphs)
        label = "compact n/8, float8 tensorwise, CUDA graphs"
        captured[label] = partial(compact, rank=1 / 8, float8=TENSORWISE, **graphs)
    return {
        "torch.compile": compiled,
        f"compact {at}": ours,
        f"compact {at}, int8": partial(ours, **low_bit),
        f"compact {at}, int8, 8-bit moments": partial(ours, **smallest),
        **chunked,
        **captured,
        "eager": eager,
        "torch.compile, checkpointing": partial(compiled, checkpointing=True),
        f"compact {at}, checkpointing": partial(ours, checkpointing=True),
        f"compact {at}, 8-bit moments, checkpointing": partial(
            ours, checkpointing=True, state_dtype="fp8"
        ),
        f"compact {at}, int8, 8-bit moments, checkpointing": partial(
            ours, checkpointing=True, **smallest
        ),
        **{
            f"compact {rank_label(other)}{label}": partial(compact, rank=other, **settings)
            for other in others
            for label, settings in {
                "": {},
                ", int8, 8-bit moments": smallest,
                ", float8 tensorwise": {"float8": TENSORWISE},
                ", float8 rowwise_with_gw_hp": {"float8": "rowwise_with_gw_hp"},
                **{
                    f", float8 tensorwise, memory budget {share}": {
                        "float8": TENSORWISE,
                        "memory_budget": share,
                    }
                    for share in (0.7, 0.6)
                },
                ", float8 tensorwise, int8, 8-bit moments": {"float8": TENSORWISE, **smallest},
                ", 8-bit moments, checkpointing": {"state_dtype": "fp8", "checkpointing": True},
            }.items()
        },
        **{
            f"torch.compile, memory budget {share}": partial(budgeted, share=share)
            for share in (0.8, 0.6, 0.4, 0.2)
        },
        "torch.compile, fp8 activations": fp8_activations,
        **{
            f"torchao float8 {recipe}": partial(compiled, float8=recipe)
            for recipe in ("tensorwise", "rowwise", "rowwise_with_gw_hp", TENSORWISE)
        },
        f"compact {at}, float8 tensorwise": partial(ours, float8=TENSORWISE),
        f"compact {at}, float8 tensorwise, int8, 8-bit moments": partial(
            ours, float8=TENSORWISE, **smallest
        ),
        f"paper in eager, {at}": partial(paper, rank=rank),
        f"GaLore {at}": partial(galore, rank=rank),
        f"APOLLO {at}": partial(apollo, rank=rank),
        f"LoRA {at}": partial(lora, rank=rank),
        f"VeLoRA {at}": partial(lora, rank=rank, velora=True),
        "torchao AdamW8bit": adamw_8bit,
        "Liger kernels": liger,
        "Liger kernels, torch.compile": partial(liger, is_compiled=True),
    }


# --- models and batches --------------------------------------------------------------------------


def batch_of(case: Case) -> tuple[dict[str, Tensor], Tensor | None]:
    """Inputs, and for blocks a target: the same for every competitor."""
    torch.manual_seed(1)
    if case.is_encoder:
        shape, device = case.shape, case.device
        size = (shape["batch"], shape["seq"])
        tokens = torch.randint(2, shape["vocabulary"], size, device=device)  # 1 is padding
        labels = torch.randint(CLASSES, size[:1], device=device)
        # As tokenizers give one; without it transformers makes one that torch has no fused
        # attention for where it is compiled.
        mask = torch.ones_like(tokens)
        return {"input_ids": tokens, "attention_mask": mask, "labels": labels}, None
    inputs = inputs_of(case.shape, case.device)
    embedded = inputs.get("inputs_embeds")
    return inputs, None if embedded is None else torch.randn_like(embedded)


def make(case: Case, *, checkpointing: bool = False) -> nn.Module:
    """The model of the case, in bf16, with the same weights each time."""
    shape = case.shape
    if case.is_encoder:
        config = RobertaConfig(
            hidden_size=shape["hidden"],
            intermediate_size=shape["mlp"],
            num_hidden_layers=shape["layers"],
            num_attention_heads=shape["heads"],
            vocab_size=shape["vocabulary"],
            max_position_embeddings=shape["seq"] + 2,
            num_labels=CLASSES,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        with torch.device(case.device):
            model: Any = RobertaForSequenceClassification(config)
        model = model.to(torch.bfloat16)
    else:
        model = build(shape, case.device)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def linears_of(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of the transformer's blocks: what low-rank methods treat apart."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.search(r"\blayers?\.\d+\.", name)
    }


def fused_adamw(model: nn.Module) -> Optimizer:
    """torch's AdamW for what is trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.AdamW(trained, lr=LR, fused=True)


# --- torch ---------------------------------------------------------------------------------------


def eager(case: Case) -> Training:
    """The model as it is."""
    model = make(case)
    return model, fused_adamw(model)


CHUNKS = {"auto_chunker.enable": True}  # of Inductor


class LossAlone(nn.Module):
    """A language model whose logits nobody gets: Inductor may make them in chunks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> CausalLMOutput:
        return CausalLMOutput(loss=self.model(**inputs).loss)


def compiled(
    case: Case,
    *,
    checkpointing: bool = False,
    float8: str | None = None,
    chunks: bool = False,
    mode: str | None = None,
) -> Training:
    """torch.compile, with products in float8 by one of torchao's recipes if asked."""
    model = make(case, checkpointing=checkpointing)
    if float8 is not None:
        model = to_float8(model, float8)
    if chunks:
        model = LossAlone(model)
        model.compile(backend=case.inner, options=CHUNKS)
    else:
        model.compile(backend=case.inner, mode=mode)
    return model, fused_adamw(model)


def budgeted(case: Case, *, share: float) -> Training:
    """torch.compile that recomputes until so much of its activations is left."""
    case.during.enter_context(torch._functorch.config.patch(activation_memory_budget=share))
    return compiled(case)


def fp8_activations(case: Case) -> Training:
    """torch.compile that keeps what is large for the backward pass in float8, scaled by rows."""
    settings = {"quant_type": "torch.float8_e4m3fn", "size_in_mb": 1, "exclude_primals": True}
    options = {"activation_quantization_aten_pass": settings}
    case.during.enter_context(torch._inductor.config.patch(post_grad_fusion_options=options))
    return compiled(case)


# --- this package, and the paper's method as published -------------------------------------------


def compact(
    case: Case,
    *,
    rank: Rank,
    checkpointing: bool = False,
    state_dtype: Any = None,
    float8: str | None = None,
    chunks: bool = False,
    **settings: Any,
) -> Training:
    """Tracked projections; a classifier's head trains in full, as with the other methods."""
    model = make(case, checkpointing=checkpointing)
    if float8 is not None:
        model = to_float8(model, float8)
    exclude = ("classifier.*",) if case.is_encoder else ()
    settings |= {"rank": rank, "exclude": exclude, "inner": case.inner}
    if chunks:
        model = LossAlone(model)
        settings["options"] = CHUNKS
    model.compile(backend=compact_backend(strict=True, **settings))
    return model, CompactAdamW(model.parameters(), lr=LR, fused=True, state_dtype=state_dtype)


def paper(case: Case, *, rank: Rank) -> Training:
    """A function of autograd in each linear layer, and no compiler."""
    model = make(case)
    to_compact(linears_of(model), partial(columns, rank))
    return model, EagerCompactAdamW(model.parameters(), lr=LR)


# --- other methods -------------------------------------------------------------------------------


def low_rank(case: Case, optimizer_class: Any, *, rank: Rank, **settings: Any) -> Training:
    """torch.compile, and an optimizer that projects gradients of the blocks' matrices."""
    model = make(case)
    groups: dict[int, list[Tensor]] = defaultdict(list)
    for linear in linears_of(model).values():
        groups[columns(rank, min(linear.weight.shape))].append(linear.weight)
    chosen = {id(weight) for weights in groups.values() for weight in weights}
    rest = [weight for weight in model.parameters() if id(weight) not in chosen]
    own = {"update_proj_gap": 200, "proj_type": "std", **settings}
    projected = [{"params": weights, "rank": number, **own} for number, weights in groups.items()]
    optimizer = optimizer_class([{"params": rest}, *projected], lr=LR, no_deprecation_warning=True)
    model.compile(backend=case.inner)
    return model, optimizer


def galore(case: Case, *, rank: Rank) -> Training:
    """GaLore with the settings of its README."""
    return low_rank(case, low_rank_class("galore_torch", "adamw"), rank=rank, scale=0.25)


def apollo(case: Case, *, rank: Rank) -> Training:
    """APOLLO with the settings of its README."""
    settings = {"scale": 1.0, "proj": "random", "scale_type": "channel"}
    return low_rank(case, low_rank_class("apollo_torch", "apollo"), rank=rank, **settings)


def lora(case: Case, *, rank: Rank, velora: bool = False) -> Training:
    """Adapters at the blocks' linear layers, compiled; all else is frozen but a classifier."""
    from peft import LoraConfig, get_peft_model

    own: dict[str, Any] = {}
    if velora:
        from peft import VeloraConfig  # not in every version

        own["velora_config"] = VeloraConfig()
    model = make(case)
    config = LoraConfig(
        r=columns(rank, case.shape["hidden"]),
        target_modules=list(linears_of(model)),
        modules_to_save=["classifier"] if case.is_encoder else None,
        **own,
    )
    adapted: Any = get_peft_model(model, config, autocast_adapter_dtype=False)
    adapted.compile(backend=case.inner)
    return adapted, fused_adamw(adapted)


def adamw_8bit(case: Case) -> Training:
    """torch.compile with torchao's AdamW, whose moments have 8 bits."""
    from torchao.optim import AdamW8bit

    model = make(case)
    model.compile(backend=case.inner)
    return model, AdamW8bit(model.parameters(), lr=LR)


def liger(case: Case, *, is_compiled: bool = False) -> Training:
    """Liger's kernels for LLaMA, with its loss in chunks where there is a head."""
    if case.is_encoder:
        raise NotImplementedError("Liger has no kernels for RoBERTa")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    # What Liger puts in the place of transformers' own is taken out again at the end.
    replaced = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
    own = {name: getattr(modeling_llama, name) for name in replaced}
    case.during.enter_context(mock.patch.multiple(modeling_llama, **own))
    model = make(case)
    has_head = case.shape["vocabulary"] > 0
    apply_liger_kernel_to_llama(fused_linear_cross_entropy=has_head, model=model)
    if is_compiled:
        model.compile(backend=case.inner)
    return model, fused_adamw(model)
