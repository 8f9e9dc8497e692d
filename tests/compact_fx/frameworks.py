"""A run under a framework that wraps the model itself; `test_frameworks.py` starts it and judges.

python frameworks.py FRAMEWORK ACCUMULATION FOLDER, alone or as one process of torchrun

FRAMEWORK is a name and, after commas, `fsdp` (the framework calls `fully_shard`), `placed` (this
script does, with `shard_placement`) and `full` (full rank).
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import (
    CompactAdamW,
    CompactBackend,
    compact_backend,
    exchange_factors,
    shard_placement,
)
from compact_fx.training.weights import known_record

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
STEPS, BATCH = 6, 2
FRAMEWORK, *HOW = sys.argv[1].split(", ")
BY_BLOCKS = "fsdp" in HOW or "placed" in HOW
IS_SHARDED = BY_BLOCKS and RANKS > 1
SKETCHED = "model.layers.0.mlp.down_proj.weight"
TEXTS = [(torch.arange(16) * (1 + index % 3) + 11 * index) % 64 for index in range(64)]

Result = tuple[list[float], nn.Module]
"""The loss of each pass, or of each step, and what was trained."""


def make() -> tuple[LlamaForCausalLM, CompactBackend]:
    """Ranks begin apart, but with FSDP2, which leaves values alone: the first one's come to all.

    accelerate shards the first dimension of all weights. So the model has no wide ones there, whose
    sketch would be another in one process.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64 if "fsdp" in HOW else 96,
        num_hidden_layers=2 if BY_BLOCKS else 1,
        num_attention_heads=4,
        vocab_size=64,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0 if BY_BLOCKS else RANK)
    sketch = {"rank": 1.0, "projection": "orthogonal"} if "full" in HOW else {"rank": 0.25}
    settings = {"inner": "aot_eager", "strict": True, "update_interval": 2}
    return model, compact_backend(**sketch, **settings)


def compile_blocks(model: LlamaForCausalLM, backend: CompactBackend) -> None:
    for block in model.model.layers:
        block.compile(backend=backend)


def say_there_are_gpus() -> None:
    """With CPUs accelerate takes DDP in place of FSDP2, which itself runs on them."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    PartialState(cpu=True)._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def of_trainer(accumulation: int, folder: Path) -> Result:
    from transformers import Trainer, TrainingArguments

    from compact_fx.integrations import CompactCallback

    model, backend = make()
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        fsdp=IS_SHARDED,
        lr_scheduler_type="constant",
    )
    own = {
        "callbacks": [CompactCallback(backend)],
        "optimizers": (CompactAdamW(model.parameters(), lr=1e-2), None),
    }
    if BY_BLOCKS:  # the Trainer takes no optimizer that is made before weights are sharded
        del own["optimizers"]
        own["optimizer_cls_and_kwargs"] = (CompactAdamW, {"lr": 1e-2})
    if IS_SHARDED:
        say_there_are_gpus()
    elif BY_BLOCKS:  # what FSDP2's hooks leave of the graph
        compile_blocks(model, backend)
        del own["callbacks"]
    trainer = Trainer(
        model,
        args,
        train_dataset=[{"input_ids": text, "labels": text} for text in TEXTS],
        **own,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def of_accelerate(accumulation: int, folder: Path) -> Result:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    model, backend = make()
    own = {}
    if IS_SHARDED:
        say_there_are_gpus()
        wrap = "no_wrap" if "placed" in HOW else "transformer_based_wrap"
        own["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy=wrap)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, **own)
    if BY_BLOCKS:
        compile_blocks(model, backend)
    else:
        exchange_factors(model)
        model.compile(backend=backend)
    if IS_SHARDED and "placed" in HOW:
        for module in (*model.model.layers, model):
            fully_shard(module, shard_placement_fn=shard_placement)
    step, optimizer, batches = accelerator.prepare(
        model, CompactAdamW(model.parameters(), lr=1e-2), DataLoader(TEXTS, BATCH)
    )
    losses: list[float] = []
    for tokens in batches:
        with accelerator.accumulate(step):
            loss = step(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(step.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) == STEPS * accumulation:
            break
    return losses, model


def of_lightning(accumulation: int, folder: Path) -> Result:
    import pytorch_lightning as lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.backend = make()
            self.losses: list[float] = []

        def configure_model(self) -> None:
            self.model.compile(backend=self.backend)
            exchange_factors(self)

        def training_step(self, tokens: Tensor) -> Tensor:
            loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return CompactAdamW(self.parameters(), lr=1e-2)

    module = Module()
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp" if RANKS > 1 else "auto",
        accumulate_grad_batches=accumulation,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,  # it would shuffle
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batches = [range(start, start + BATCH) for start in range(0, len(TEXTS), BATCH)]
    trainer.fit(module, DataLoader(TEXTS, batch_sampler=batches[RANK::RANKS]))
    return module.losses, module.model


def main() -> None:
    torch.set_num_threads(1)
    accumulation, folder = int(sys.argv[2]), Path(sys.argv[3])
    runs = {"trainer": of_trainer, "accelerate": of_accelerate, "lightning": of_lightning}
    losses, model = runs[FRAMEWORK](accumulation, folder)
    of_steps = torch.tensor(losses).view(STEPS, -1).mean(1)
    assert any(isinstance(weight, DTensor) for weight in model.parameters()) == IS_SHARDED
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    basis = known_record(model.get_parameter(SKETCHED)).basis
    matrix = basis.matrix(torch.device("cpu"), torch.float32)
    torch.save((of_steps, state, basis.generation, matrix), folder / f"{RANKS}-{RANK}.pt")
    if dist.is_initialized():  # else gloo's threads may outlive the interpreter, which aborts
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
