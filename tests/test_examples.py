"""The examples run as people run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


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


@pytest.mark.parametrize("config", sorted(EXAMPLES.glob("configs/llama_*.json")))
def test_configs_are_llamas(config: Path):
    """Every configuration is one that Hugging Face's class takes."""
    from transformers import LlamaConfig

    llama = LlamaConfig(**json.loads(config.read_text()))
    assert llama.hidden_size % llama.num_attention_heads == 0
