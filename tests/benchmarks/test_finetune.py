"""The fine-tuning benchmark: tiny runs of both tasks, gone on with, and its table."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers

ROOT = Path(__file__).parents[2]
WORDS = ["grain", "oil", "wheat", "crude", "tonnes", "barrels"]
TINY: dict[str, Any] = {"inner": "aot_eager", "lr": 1e-3}


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The benchmark as a module; its language model reads some of the package's own files."""
    for name in ("tqdm", "peft", "numpy"):
        pytest.importorskip(name)
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # it sets this: undone at the end
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import finetune
    import quality
    import sources

    monkeypatch.setattr(sources, "roots", lambda: [ROOT / "compact_fx"])
    monkeypatch.setattr(quality, "VALIDATION_BATCHES", 1)
    monkeypatch.setitem(quality.SHAPES, "tiny", (32, 1, 64, 2, sources.BYTES, 4, 32))
    finetune.pretrained.cache_clear()
    finetune.tasks.labelled.cache_clear()
    return finetune


@pytest.fixture
def data(finetune: ModuleType, tmp_path: Path) -> Path:
    """A folder as `pack` lays it out, with a BERT of random weights and texts of three words."""
    from transformers import BertConfig, BertModel

    encoder = finetune.tasks.encoder
    folder = (tmp_path / "data" / encoder.WEIGHTS).parent
    folder.mkdir(parents=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=16, intermediate_size=64, **sizes)
    config.save_pretrained(folder)
    save_file(BertModel(config, add_pooling_layer=False).state_dict(), folder / "model.safetensors")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    tables = tmp_path / "data" / encoder.DATASETS
    tables.mkdir(parents=True)
    rows = [f"{('wheat', 'oil')[i % 2]}\t{' '.join(WORDS[i % 2 :: 2])}" for i in range(32)]
    lines = ["Category\tText", "d\tstring", "class\t", *rows]
    for name in encoder.DATA:
        for part in ("train", "test"):
            (tables / f"{name}-{part}.tab").write_text("\n".join(lines) + "\n")
    return tmp_path / "data"


@pytest.fixture
def run(
    finetune: ModuleType, data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[list[dict[str, Any]]], list[dict[str, Any]]]:
    """Run a list as the command line does; returns all results so far."""

    def call(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        listed, out = tmp_path / "runs.json", tmp_path / "out.jsonl"
        listed.write_text(json.dumps([{**TINY, **one} for one in runs]))
        places = ["--data", str(data), "--cache", str(tmp_path / "cache"), "--device", "cpu"]
        files = ["--runs", str(listed), "--out", str(out), "--table", str(out)]
        monkeypatch.setattr(sys, "argv", ["finetune.py", *places, *files])
        finetune.main()
        return [json.loads(line) for line in out.read_text().splitlines()]

    return call


def test_runs_are_gone_on_with(run, capsys):
    """Nothing twice, the best rate for another seed; a run that fails does not end the others."""
    full = {"steps": 3}
    first = run([{"steps": 3, "method": "lora", "rank": 4, "lr": "best"}, full])
    assert [row["settings"]["method"] for row in first] == ["full"]
    assert "no run with seed 0 says which rate is best" in capsys.readouterr().out
    rows = run([full, {**full, "lr": "best", "seed": 1}])
    assert rows[:-1] == first
    assert rows[1]["settings"] == {**rows[0]["settings"], "seed": 1}
    assert all(row["metric"] in range(101) for row in rows)
    assert {"data", "wall_s", "commit", "torch"} <= rows[0].keys()
    assert "| AdamW | 0.001 | 0.001   | 2       |" in capsys.readouterr().out


@pytest.mark.long
def test_adapters_get_the_memory_of_projections(run, capsys):
    """As near as a whole rank can be; only adapters and the head are trained."""
    settings = {"steps": 2, "rank": 8, "update_interval": 10}
    tracked, lora = run([{**settings, "method": method} for method in ("compact", "lora")])
    counts = 1000  # at most: of steps, 4 bytes for each weight
    for held in (tracked["bytes"], lora["bytes"]):
        assert 0 <= held["optimizer"] - 2 * held["gradients"] < counts
    of_one_rank = 4 * 4 * (4 * (32 + 32) + 2 * (32 + 64))
    difference = sum(tracked["bytes"].values()) - sum(lora["bytes"].values())
    assert abs(difference) <= of_one_rank / 2 + counts
    assert lora["lora_rank"] * of_one_rank == 4 * lora["bytes"]["adapters"]
    assert tracked["bytes"]["projections"] > 0 == lora["bytes"]["projections"]
    assert "| tracked rank 8, update_interval 10 " in capsys.readouterr().out


@pytest.mark.long
def test_language_model_is_pretrained_once(run, tmp_path, capsys):
    """Every run begins with one checkpoint."""
    lm = {"task": "lm", "model": "tiny", "pretrain": 2, "steps": 2}
    rows = run([lm, {**lm, "method": "compact", "rank": 4}])
    assert len({row["data"] for row in rows}) == 1
    assert all(3 < row["metric"] < 7 for row in rows)
    (weights,) = (tmp_path / "cache").glob("tiny_2_*.pt")
    assert capsys.readouterr().out.count(weights.name) == 1


def test_table_takes_the_best_rate_of_each_method(finetune):
    """By seed 0: more accuracy is better, and less loss; mean and deviation are over seeds."""
    memory = dict.fromkeys(("gradients", "optimizer", "projections", "adapters"), 1_000_000)
    measured = {"training_loss": 0.5, "step_ms": 1.0, "peak_gb": None, "bytes": memory}
    rows = []
    for task in ("reuters-r8", "lm"):
        for lr, seed, metric in ((1e-4, 0, 2.0), (4e-4, 0, 1.0), (1e-4, 1, 3.0), (4e-4, 1, 9.0)):
            settings = finetune.settings_of({"task": task, "lr": lr, "seed": seed}, None)
            rows.append({"settings": settings, "metric": metric, "data": "same", **measured})
    accuracy, loss = finetune.table(rows).split("\n\n")
    assert "| 0.0001 | 0.0001 0.0004 | 2       | 2.50 ± 0.71 " in accuracy
    assert "| 0.0004 | 0.0001 0.0004 | 2       | 5.0000 ± 5.6569 " in loss


def test_listed_runs_are_valid(finetune):
    """Each is a run, and what says which rate is best comes before it is asked for."""
    listed = json.loads((ROOT / "benchmarks/runs/finetune.json").read_text())
    rows: list[dict[str, Any]] = []
    for one in listed:
        settings = finetune.resolved(finetune.settings_of(one, None), rows)
        rows.append({"settings": settings, "metric": 1.0})
    assert len({finetune.key_of(row["settings"]) for row in rows}) == len(listed)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"task": "sorting"}, "tasks reuters-r8, 20newsgroups, lm"),
        ({"method": "prefix"}, "methods full, compact, lora"),
        ({"method": "lora"}, "a rank is for all methods but full"),
        ({"pretrain": 3}, "unknown pretrain"),
        ({"steps": 1}, "2 are the least"),
    ],
)
def test_wrong_runs(finetune, wrong, says):
    """A run that cannot be says why before any other begins."""
    with pytest.raises(ValueError, match=says):
        finetune.settings_of(wrong, None)
