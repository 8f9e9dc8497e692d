"""The Trainer of transformers, as it is, with `CompactCallback`."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from compact_fx import CompactAdamW, compact_backend

pytest.importorskip("accelerate")
from compact_fx.integrations import CompactCallback

STEPS = 6


class Texts(Dataset):
    """Bytes that count on, from a start of their own."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = (torch.arange(32) + 11 * index) % 64
        return {"input_ids": tokens, "labels": tokens}


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def train(make_llama, tmp_path):
    """Losses of some steps, and the trainer; nothing but the model and the optimizer is ours."""

    def run(backend=None, folder="run", resume=False, steps=STEPS, **arguments):
        torch._dynamo.reset()
        model = make_llama(layers=1)
        optimizer, callbacks = None, [losses := Losses()]
        if backend is not None:
            callbacks.append(CompactCallback(backend))
            if backend.config.gradients == "sketched":
                optimizer = CompactAdamW(model.parameters(), lr=1e-2)
        settings = {
            "output_dir": str(tmp_path / folder),
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_steps": 3,
            "report_to": [],
            "use_cpu": True,
            "seed": 0,
            "lr_scheduler_type": "constant",
        }
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**settings | arguments),
            train_dataset=Texts(),
            optimizers=(optimizer, None),
            callbacks=callbacks,
        )
        trainer.train(resume_from_checkpoint=resume)
        return losses.losses, trainer

    return run


def backend(**settings):
    defaults = {"rank": 0.25, "gradients": "dense", "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_the_losses_are_those_of_plain_training(train, arguments):
    """With orthogonal projections at full rank."""
    expected, _ = train(**arguments)
    exact = backend(rank=1.0, projection="orthogonal")
    actual, _ = train(exact, **arguments)
    assert exact.plans[0].sketched
    assert len(actual) == STEPS
    assert actual == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("arguments", [{"bf16": True}, {"max_grad_norm": 0.1}])
def test_sketched_gradients(train, arguments):
    """Mixed precision and clipping: a sketched run learns."""
    compact = backend(gradients="sketched", rank=0.5)
    losses, _ = train(compact, steps=12, **arguments)
    assert compact.plans[0].factor_inputs
    assert losses[-1] < losses[0]


@pytest.mark.long
@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_resuming_gives_the_same_losses(train, gradients, make_llama, tmp_path):
    """Bit for bit, over a change of projections, and the checkpoint loads without this package."""
    settings = {"gradients": gradients, "update_interval": 4}
    whole, _ = train(backend(**settings), folder="whole")
    train(backend(**settings), folder="parts", steps=3)
    rest, trainer = train(backend(**settings), folder="parts", resume=True)
    assert rest[-3:] == whole[-3:]
    trainer.save_model(str(tmp_path / "saved"))
    model = make_llama(layers=1)
    loaded = type(model).from_pretrained(tmp_path / "saved")
    assert set(loaded.state_dict()) == set(model.state_dict())


def test_compiling_twice_is_refused(train):
    with pytest.raises(ValueError, match="torch_compile=True compiles the model a second time"):
        train(backend(), torch_compile=True)
