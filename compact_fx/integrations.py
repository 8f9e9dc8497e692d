"""For the Trainer of transformers; `import compact_fx` does not need it."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

from compact_fx.backend import CompactBackend
from compact_fx.training.distributed import exchange_factors
from compact_fx.training.weights import set_steps


class CompactCallback(TrainerCallback):  # type: ignore[misc]
    """Compiles the Trainer's model with a compact backend, and resumes where a checkpoint stood.

    ::

        backend = compact_backend(rank=0.25)
        trainer = Trainer(model, args, ..., callbacks=[CompactCallback(backend)])

    Leave `torch_compile` off. State-dict keys stay as they are. With `gradients="sketched"` give
    the Trainer a `CompactAdamW` as well: `Trainer(..., optimizers=(optimizer, None))`, with FSDP2
    `Trainer(..., optimizer_cls_and_kwargs=(CompactAdamW, {"lr": 1e-3}))`. Of several processes it
    calls `exchange_factors` where that is needed.
    """

    def __init__(self, backend: CompactBackend) -> None:
        self.backend = backend

    def on_init_end(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """With several processes: say what they exchange before the Trainer wraps the model."""
        config = self.backend.config
        needs_exchange = config.gradients == "sketched" or config.kind == "tracked"
        if model is not None and needs_exchange and not args.fsdp:
            exchange_factors(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Compile the model in place, and count the steps that it has seen before."""
        if args.torch_compile:
            raise ValueError(
                "torch_compile=True compiles the model a second time: leave it off with "
                "CompactCallback"
            )
        assert model is not None
        model.compile(backend=self.backend)
        set_steps(model.parameters(), state.global_step)
