"""What several tests share: a small LLaMA, a batch, and gradients of a step."""

import gc
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from compact_fx import CompactBackend

Gradients = dict[str, Tensor]


# There is a worker for each core, and tensors this small are slower on several threads.
torch.set_num_threads(1)

# Compilers make many objects: Python looks for garbage less often, which saves a tenth of the time.
gc.set_threshold(20_000)

# The same examples each time, however busy the machine is.
settings.register_profile("compact_fx", deadline=None, derandomize=True)
settings.load_profile("compact_fx")


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No compiled code is carried over from another test."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def sees_requires_grad() -> Iterator[None]:
    """Dynamo compiles anew when a weight is frozen or not; torch 2.11 overlooks that by default."""
    with torch._dynamo.config.patch(skip_tensor_guards_with_matching_dict_tags=False):
        yield


@pytest.fixture(scope="session")
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """The same small LLaMA each time, as Hugging Face ships it."""

    def make(layers: int = 2, **overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        settings = {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "vocab_size": 256,
            "max_position_embeddings": 128,
            "use_cache": False,
        }
        return LlamaForCausalLM(LlamaConfig(**settings | overrides))

    return make


@pytest.fixture(scope="session")
def tokens() -> Tensor:
    """A batch of 4 × 64 bytes."""
    return torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def gradients_of() -> Callable[..., tuple[float, Gradients]]:
    """Loss and gradients of one step of a language model, compiled with a backend or eager."""

    def run(model: nn.Module, tokens: Tensor, backend: Any = None) -> tuple[float, Gradients]:
        step = model if backend is None else torch.compile(model, backend=backend)
        model.zero_grad()
        loss = step(input_ids=tokens, labels=tokens).loss
        loss.backward()
        named = model.named_parameters()
        return loss.item(), {n: w.grad.clone() for n, w in named if w.grad is not None}

    return run


@pytest.fixture
def expected_gradients() -> Callable[..., Gradients]:
    """G P Pᵀ for sketched weights (P Pᵀ G where x is on the left), G for all others."""

    def expect(exact: Gradients, backend: CompactBackend, generation: int = 0) -> Gradients:
        result = dict(exact)
        for plan in backend.plans:
            for site in plan.sketched:
                assert site.projection is not None
                p = plan.projections[site.projection](backend.config.seed, generation)
                g = exact[site.weight]
                left = g.shape[-2:] == (site.in_features, site.out_features)
                left = left and site.in_features != site.out_features
                left = left != (site.side == "output")
                result[site.weight] = p @ (p.T @ g) if left else (g @ p) @ p.T
        return result

    return expect


@pytest.fixture
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """‖a − b‖ / ‖b‖."""

    def error(actual: Tensor, expected: Tensor) -> float:
        return ((actual - expected).norm() / expected.norm()).item()

    return error


@pytest.fixture
def kept_bytes() -> Callable[..., int]:
    """What autograd keeps of a run, as its own hooks count it."""

    def count(run: Callable[[], object], free: Iterable[Tensor]) -> int:
        lasting = {tensor.untyped_storage().data_ptr() for tensor in free}
        kept: dict[int, Tensor] = {}  # the tensors stay alive, so that no address is used twice

        def pack(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage().data_ptr()
            if address not in lasting:
                kept[address] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = run()
        del output
        return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    return count


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One gloo process."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{tmp_path / 'store'}",
        rank=0,
        world_size=1,
        timeout=timedelta(seconds=77),
    )
    yield
    dist.destroy_process_group()
