"""The loss of a large vocabulary: logits that are never there whole."""

import pytest
import torch
from transformers import LlamaForCausalLM

from compact_fx import CompactBackend, SketchedGrad, compact_backend

CHUNKED = {"auto_chunker.enable": True, "auto_chunker.num_chunk": 4}


def step_of(model: LlamaForCausalLM, backend: object, tokens: torch.Tensor):
    """Loss and dense gradients of a compiled function that returns the loss alone."""
    torch._dynamo.reset()
    loss = torch.compile(lambda t: model(input_ids=t, labels=t).loss, backend=backend)(tokens)
    loss.backward()
    return loss.item(), {
        name: p.grad.to_dense() if isinstance(p.grad, SketchedGrad) else p.grad
        for name, p in model.named_parameters()
    }


def kept(backend: CompactBackend) -> int:
    (plan,) = backend.plans
    return plan.account.bytes_after


@pytest.mark.long
def test_inductors_chunks_of_the_loss(make_llama):
    """It wants a head that makes more than 8 times as much as it reads."""
    tokens = torch.randint(0, 256, (8, 128), generator=torch.Generator().manual_seed(1))
    settings = {"rank": 1.0, "projection": "orthogonal", "gradients": "dense", "strict": True}
    whole, chunked = (compact_backend(**settings, options=options) for options in ({}, CHUNKED))
    vocabulary = 2**13
    loss, expected = step_of(make_llama(layers=1, vocab_size=vocabulary), "eager", tokens)
    for backend in (whole, chunked):
        found, actual = step_of(make_llama(layers=1, vocab_size=vocabulary), backend, tokens)
        torch.testing.assert_close(found, loss, rtol=1e-5, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    logits = tokens.numel() * vocabulary * 4
    assert kept(whole) > logits > 4 * kept(chunked)
    (plan,) = chunked.plans
    assert len(plan.sketched) == 7
    (head,) = (site for site in plan.sites if "lm_head" in site.weight)
    assert head.reason
