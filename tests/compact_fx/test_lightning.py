"""PyTorch Lightning's Trainer, as it is: the model inside of the module is compiled."""

import pytest
import torch
from torch.utils.data import DataLoader

from compact_fx import CompactAdamW, compact_backend, set_steps

lightning = pytest.importorskip("pytorch_lightning")
STEPS = 6


class Module(lightning.LightningModule):
    """What a person writes; `backend` and its optimizer are all that is ours."""

    def __init__(self, model, backend=None):
        super().__init__()
        self.model, self.backend = model, backend
        self.losses = []

    def configure_model(self):
        if self.backend is not None:
            self.model.compile(backend=self.backend)

    def on_train_start(self):
        set_steps(self.parameters(), self.global_step)  # resume a run with dense gradients

    def training_step(self, tokens):
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        sketched = self.backend is not None and self.backend.config.gradients == "sketched"
        return (CompactAdamW if sketched else torch.optim.AdamW)(self.parameters(), lr=1e-2)


@pytest.fixture
def train(make_llama, tmp_path):
    """Losses of some steps; a checkpoint after each epoch of three."""

    def run(backend=None, resume=None, **arguments):
        torch._dynamo.reset()
        module = Module(make_llama(layers=1), backend)
        checkpoints = lightning.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
        trainer = lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            default_root_dir=tmp_path,
            logger=False,
            callbacks=[checkpoints],
            enable_progress_bar=False,
            enable_model_summary=False,
            **arguments,
        )
        # Equal batches: Lightning does not resume at the batch where it stopped.
        texts = [(torch.arange(32) + 11 * (index % 4)) % 64 for index in range(12)]
        trainer.fit(module, DataLoader(texts, batch_size=4), ckpt_path=resume)
        return module.losses

    return run


def backend(**settings):
    defaults = {"rank": 0.25, "gradients": "dense", "projection": "countsketch"}
    return compact_backend(**defaults | {"inner": "aot_eager", "strict": True} | settings)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, marks=pytest.mark.long),
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    ],
    ids=["plain", "2"],
)
@pytest.mark.parametrize("gradients", ["dense", "sketched"])
def test_the_losses_are_those_of_plain_training(train, gradients, arguments):
    """With orthogonal projections at full rank; Adam on rotated factors takes steps of its own."""
    expected = train(**arguments)
    exact = backend(rank=1.0, projection="orthogonal", gradients=gradients)
    actual = train(exact, **arguments)
    assert exact.plans[0].sketched
    assert len(actual) == len(expected)
    if gradients == "dense":
        assert actual == pytest.approx(expected, rel=1e-4)
    else:
        assert actual[0] == pytest.approx(expected[0], rel=1e-4)
        assert actual[-1] < 0.9 * actual[0]


@pytest.mark.parametrize("gradients", [pytest.param("dense", marks=pytest.mark.long), "sketched"])
def test_resuming_gives_the_same_losses(train, gradients, make_llama, tmp_path):
    """Bit for bit, over a change of projections, and the checkpoint loads without this package."""
    settings = {"gradients": gradients, "update_interval": 4}
    whole = train(backend(**settings))
    rest = train(backend(**settings), resume=tmp_path / "step=3.ckpt")
    assert rest == whole[3:]
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in make_llama(layers=1).state_dict()}
