"""The examples run as people run them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.long
def test_pretrain_llama_compares_backends(tmp_path: Path):
    """A few steps of the real thing: a table, a figure and numbers that make sense."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    command = [sys.executable, str(EXAMPLES / "pretrain_llama.py"), "--out", str(tmp_path)]
    small = ["--steps", "4", "--batch", "2", "--seq", "64", "--backend", "eager", "compact"]
    done = subprocess.run([*command, *small, "--warm"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "validation loss" in done.stdout
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "results.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_pretrain_llama_on_two_processes(tmp_path: Path, parallel: str):
    """Under torchrun; the first process prints and writes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, str(EXAMPLES / "pretrain_llama.py"), "--parallel", parallel, "--warm"]
    small = ["--steps", "3", "--batch", "2", "--seq", "32", "--backend", "compact"]
    done = subprocess.run(
        [*command, *small, "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("validation loss") == 1
    assert json.loads((tmp_path / "results.json").read_text())


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("configs/llama_*.json")))
def test_configs_are_llamas(config: Path):
    """Every configuration is one that Hugging Face's class takes."""
    from transformers import LlamaConfig

    llama = LlamaConfig(**json.loads(config.read_text()))
    assert llama.hidden_size % llama.num_attention_heads == 0


@pytest.mark.long
def test_inspect_graphs_prints_both():
    """A sketch in place of the linear layer's input, and of the block's matmul inputs."""
    command = [sys.executable, str(EXAMPLES / "inspect_graphs.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = dict(part.split("\n\n", 1) for part in done.stdout.split("\n=== ")[1:])
    names = ("joint graph before", "diff", "forward", "backward")
    assert list(parts) == [f"{model}: {name}" for model in ("linear", "block") for name in names]
    assert "-grad_weight: f32[48, 64] = mm.default(" in parts["linear: diff"]
    assert parts["linear: forward"].count("random_projection.default(") == 1
    assert "random_projection" not in parts["block: joint graph before"]
    assert parts["block: forward"].count("random_projection.default(") == 3  # qkv, gate/up, down
    assert parts["block: backward"].count("random_projection.default(") == 4  # and o_proj, late
    assert "grad_block_mlp_down_proj_weight_factor: f32[64, 44]" in parts["block: diff"]


@pytest.mark.long
@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_run(notebook: Path):
    """Every cell without an error, from an empty kernel in the folder of the examples."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    cells = nbformat.read(notebook, as_version=4)
    folder = {"metadata": {"path": str(EXAMPLES)}}
    client = nbclient.NotebookClient(cells, timeout=600, kernel_name="python3", resources=folder)
    client.execute(env={**os.environ, "OMP_NUM_THREADS": "1"})  # there is a worker for each core


@pytest.mark.parametrize("notebook", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_are_committed_as_they_ran(notebook: Path):
    """Each cell once and in order, with small pictures, and nothing of the machine it ran on."""
    content = json.loads(notebook.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output.get("name") for output in outputs} <= {None, "stdout"}  # no warnings
    shown = [output.get("data", {}) for output in outputs]
    pictures = [data["image/png"] for data in shown if "image/png" in data]
    assert pictures
    assert max(map(len, pictures)) < 100_000
    assert not re.search(r"/(home|root|work|tmp|usr)/", json.dumps(outputs))


@pytest.mark.long
def test_train_8b_trains_its_tiny_shape():
    """The code of the 8B run: layers of their own, steps in the backward pass, a loss in parts."""
    command = [sys.executable, str(EXAMPLES / "train_8b.py"), "--tiny", "--steps", "6"]
    done = subprocess.run([*command, "--lr", "1e-2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3].rstrip(",")) for line in done.stdout.splitlines()[:6]]
    assert losses[-1] < losses[0] - 0.1
    assert "7 of 7 weight gradients sketched" in done.stdout
    assert "1 of 1 weight gradients sketched" in done.stdout  # the head


@pytest.mark.long
def test_train_8b_counts_its_weights():
    """All that `--count` says of weights and factors is what the model has."""
    command = [sys.executable, str(EXAMPLES / "train_8b.py"), "--count"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = {line[:40].strip(): float(line.split()[-1]) for line in done.stdout.splitlines()[2:]}
    assert sizes["weights"] == 16.06  # 8.03e9 in bf16
    assert sizes["all"] < 24
