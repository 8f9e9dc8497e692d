"""Joint graphs of small modules, and ways to count, run and compare graphs."""

from collections import Counter

import pytest
import torch
from torch import fx, nn

from compact_fx.compiler import GraphCompiler
from compact_fx.config import CompactConfig
from compact_fx.passes import joint_graph
from compact_fx.passes.joint_graph import JointGraph
from compact_fx.plan import ProjectionInput
from compact_fx.projections import RANDOM_PROJECTION, fold_in, source


class Calls(nn.Module):
    """A module with these parameters, buffers and submodules that calls a function of itself."""

    def __init__(self, function, **members):
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def _joint_of(module: nn.Module, *inputs: torch.Tensor, split: bool = True) -> JointGraph:
    """The joint graph as the backend gives it to the passes; nothing is compiled or run.

    Without `split`, it is as it was before `split_grouped_backward`.
    """
    found: list[JointGraph] = []

    def backend(graph_module, example_inputs):
        config = CompactConfig(gradients="dense", inner="aot_eager")
        with pytest.MonkeyPatch.context() as patch:
            if not split:
                patch.setattr(joint_graph, "split_grouped_backward", lambda module: 0)
            joint = GraphCompiler(config, {}, graph_module, example_inputs).visit(lambda j: j)
        assert joint is not None, "there is no joint graph without a backward pass"
        found.append(joint)
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    (joint,) = found
    return joint


def _values_of(joint: JointGraph, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random values for all inputs of a joint graph, by name; projection keys from the seed."""
    generator = torch.Generator().manual_seed(17)
    keys = {
        joint.inputs()[index].name: role.projection
        for index, role in joint.added.items()
        if isinstance(role, ProjectionInput)
    }
    values = {}
    for node in joint.module.graph.find_nodes(op="placeholder"):
        fake = node.meta["val"]
        if node.name in keys and fake.dim() == 2:  # tracked
            value = torch.randn(fake.shape, generator=generator, dtype=torch.float64)
            values[node.name] = torch.linalg.qr(value)[0].to(fake.dtype)
        elif node.name in keys:
            key = torch.tensor(fold_in(seed, keys[node.name]))
            reader = next(user for user in node.users if user.target is RANDOM_PROJECTION)
            values[node.name] = source(key, *reader.args[1:4])
        elif fake.dtype.is_floating_point:
            values[node.name] = torch.randn(fake.shape, generator=generator).to(fake.dtype)
        else:
            values[node.name] = torch.randint(0, 4, fake.shape, generator=generator)
    return values


def _evaluate(module: fx.GraphModule, values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a graph whose inputs have these values."""
    names = [node.name for node in module.graph.find_nodes(op="placeholder")]
    return list(module(*(values[name] for name in names)))


def _evaluate_cut(cut, num_fwd_outputs: int, values: dict[str, torch.Tensor]):
    """The outputs of the forward, then those of the backward that gets what the forward saved."""
    outputs = _evaluate(cut.forward, values)
    kept = outputs[num_fwd_outputs:]
    inputs = cut.backward.graph.find_nodes(op="placeholder")  # what was kept comes first
    saved = dict(zip((node.name for node in inputs[: len(kept)]), kept, strict=True))
    return outputs[:num_fwd_outputs] + _evaluate(cut.backward, {**values, **saved})


def _ops_of(module: fx.GraphModule) -> Counter:
    """How often each operator is called."""
    return Counter(node.target for node in module.graph.nodes if node.op == "call_function")


@pytest.fixture(scope="session")
def joint_of():
    return _joint_of


@pytest.fixture(scope="session")
def calls():
    return Calls


@pytest.fixture(scope="session")
def values_of():
    return _values_of


@pytest.fixture(scope="session")
def evaluate():
    return _evaluate


@pytest.fixture(scope="session")
def evaluate_cut():
    return _evaluate_cut


@pytest.fixture(scope="session")
def ops_of():
    return _ops_of
