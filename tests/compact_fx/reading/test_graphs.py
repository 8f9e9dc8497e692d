"""Graphs before and after, for a person to read: kept when asked for, without data."""

import gc
import weakref

import pytest
import torch
from torch import fx, nn

from compact_fx import CompactedGraphs, compact_backend
from compact_fx.projections import RANDOM_PROJECTION
from compact_fx.reading.graphs import dot_of, text_of


class Layer(nn.Module):
    """One linear layer with a pointwise tail."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(64, 48)

    def forward(self, x):
        return self.proj(x).tanh()


def compiled(model, *args, **settings):
    defaults = {"rank": 0.25, "gradients": "dense", "projection": "countsketch"}
    defaults |= {"inner": "aot_eager", "strict": True, "recompute": False}
    backend = compact_backend(**defaults | settings)
    torch.compile(model, backend=backend)(*args)
    return backend


@pytest.fixture
def graphs() -> CompactedGraphs:
    """Of one layer."""
    return compiled(Layer(), torch.randn(128, 64), keep_graphs=True).graphs[0]


def count(module: fx.GraphModule, target) -> int:
    return sum(node.target is target for node in module.graph.nodes)


def test_kept_only_when_asked_for():
    """And then one for each plan."""
    x = torch.randn(128, 64)
    assert compiled(Layer(), x).graphs == []
    backend = compiled(Layer(), x, keep_graphs=True)
    assert [graphs.plan for graphs in backend.graphs] == backend.plans


def test_keep_graphs_decides_nothing():
    """The same plan, the same gradients."""
    results = []
    for keep in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Layer(), torch.randn(128, 64)
        settings = {"inner": "aot_eager", "strict": True, "keep_graphs": keep}
        backend = compact_backend(rank=0.25, gradients="dense", **settings)
        torch.compile(model, backend=backend)(x).sum().backward()
        results.append((backend.plans, model.proj.weight.grad))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_graphs_can_be_read(graphs):
    """Four GraphModules; parameters and their gradients have their own names."""
    for name in ("joint_before", "joint_after", "forward", "backward"):
        module = getattr(graphs, name)
        assert isinstance(module, fx.GraphModule)
        text = module.print_readable(print_output=False)
        assert "def forward" in text
        if name != "backward":
            assert "proj_weight" in text
    text = "\n".join(text_of(graphs.joint_after))
    assert "proj_weight: f32[48, 64]" in text
    assert "grad_proj_weight" in text
    assert "test_graphs.py" in text


@pytest.mark.parametrize("name", ["Wq", "LayerNormProj", "w_Q", "ABC", "q2Proj"])
def test_names_with_capitals_can_be_cut(name):
    """torch's partitioner looks up nodes by the names that fx gives to copies."""
    layer = nn.Sequential()
    layer.add_module(name, nn.Linear(64, 48))
    layer.add_module("tail", nn.GELU())
    (found,) = compiled(layer, torch.randn(128, 64), keep_graphs=True).graphs
    assert found.cut.bytes < found.cut_before.bytes


def test_one_node_for_each_projection(graphs):
    """x P in the forward, and P again for Pᵀ in the backward; none before."""
    assert count(graphs.joint_before, RANDOM_PROJECTION) == 0
    assert count(graphs.joint_after, RANDOM_PROJECTION) == len(graphs.plan.projections) == 1
    assert count(graphs.forward, RANDOM_PROJECTION) == 1
    assert count(graphs.backward, RANDOM_PROJECTION) == 1


def test_what_crosses_is_what_the_forward_returns(graphs):
    """The sketch in place of x."""
    received = graphs.backward.graph.find_nodes(op="placeholder")
    shapes = [tuple(node.meta["val"].shape) for node in received]
    assert (128, 16) in shapes
    assert (128, 64) not in shapes
    assert graphs.cut.bytes == graphs.plan.account.bytes_after
    assert graphs.cut_before.bytes == graphs.plan.account.bytes_before


def test_diff_has_what_changed_and_nothing_else(graphs):
    """The weight's gradient goes, four nodes and a table come; names and source lines are there."""
    lines = graphs.diff().splitlines()
    gone = [line for line in lines if line.startswith("-")]
    new = [line for line in lines if line.startswith("+")]
    assert len(gone) + len(new) == len(lines)
    assert all("tanh" not in line.split("#")[0] for line in lines)
    assert not any("grad_proj_bias" in line and "return" not in line for line in lines)
    (before,) = [line for line in gone if " = mm.default" in line]
    assert before.startswith("-grad_proj_weight: f32[48, 64] = mm.default(")
    assert "test_graphs.py" in before
    assert any(line.startswith("+grad_proj_weight_factor: f32[48, 16] = mm") for line in new)
    assert any(line.startswith("+grad_proj_weight_from_factor: f32[48, 64] = mm") for line in new)
    assert sum("random_projection" in line.split(" = ")[-1].split("(")[0] for line in new) == 1
    assert sum(" = mm.default" in line for line in new) == 3  # x P, dyᵀ z, Ĝ Pᵀ
    assert any(line.startswith("+table_") for line in new)


def test_untouched_graph_has_no_diff():
    """Left alone, nothing changes."""
    model = Layer()
    with pytest.warns(UserWarning, match="nothing is sketched"):
        backend = compiled(model, torch.randn(128, 64), keep_graphs=True, exclude=("*",))
    assert backend.graphs[0].diff() == ""


def test_no_data_is_held():
    """Shapes only: the model can go while the graphs are kept."""
    model = Layer()
    x = torch.randn(128, 64)
    backend = compiled(model, x, keep_graphs=True)
    (graphs,) = backend.graphs
    modules = [graphs.joint_before, graphs.joint_after, graphs.forward, graphs.backward]
    for module in modules:
        assert not list(module.parameters())
        assert not list(module.buffers())
        for node in module.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                assert isinstance(value, torch._subclasses.FakeTensor)
    gone = [weakref.ref(t) for t in (x, *model.parameters())]
    del model, x
    torch._dynamo.reset()
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    assert graphs.diff()


def test_graphviz_source(graphs):
    """Each node and edge once; the projection stands out."""
    text = dot_of(graphs.joint_after)
    nodes = list(graphs.joint_after.graph.nodes)
    assert text.count("[label=") == len(nodes)
    assert text.count(" -> ") == sum(len(node.all_input_nodes) for node in nodes)
    assert text.count("fillcolor=orange") == 1
    assert text.startswith("digraph {")
    assert text.endswith("}")
