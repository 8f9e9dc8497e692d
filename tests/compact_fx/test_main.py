"""The command line: tables, JSON, graphs; and one line for whatever a person gets wrong."""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from compact_fx import __main__ as command_line
from compact_fx.__main__ import _size, main

TINY = Path(__file__).parents[2] / "examples" / "configs" / "llama_tiny.json"
SMALL = ["--layers", "1", "--batch", "2", "--seq", "32"]


def config(tmp_path: Path, **changes: object) -> str:
    """A file with a small LLaMA's configuration and these changes."""
    content = {**json.loads(TINY.read_text()), "num_hidden_layers": 1, **changes}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return str(path)


EXPLAIN = ["explain", "--hf-config", str(TINY), *SMALL]
GRAPH = ["graph", "--hf-config", str(TINY), *SMALL, "--projection", "gaussian"]


@pytest.fixture(scope="module")
def explained_once():
    """What `GRAPH` asks, of a LLaMA, for all tests of what is then done with it."""
    args = command_line._parser().parse_args(GRAPH)
    return command_line._explained(args, args.batch, args.rank)


@pytest.fixture
def explained(explained_once, monkeypatch):
    """No command traces a model."""
    monkeypatch.setattr(command_line, "_explained", lambda *_, **__: explained_once)


class Words(nn.Module):
    """A language model of one linear layer, for tests of what is around it."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(48, 64), nn.Linear(64, 48)

    def forward(self, input_ids, labels):
        loss = nn.functional.cross_entropy(
            self.head(self.table(input_ids)).flatten(0, 1), labels.flatten()
        )
        return {"loss": loss}


def test_explain(capsys, tmp_path):
    """Breakdown and report; pictures where asked for."""
    pytest.importorskip("matplotlib")
    plots = ["--plot", str(tmp_path / "m.png"), "--timeline", str(tmp_path / "t.png")]
    assert main([*EXPLAIN, *plots]) == 0
    printed = capsys.readouterr()
    words = ("compact, sketched", "optimizer", "model.layers.0.mlp.down_proj", "out 128 → 32")
    for word in words:
        assert word in printed.out
    assert (tmp_path / "m.png").stat().st_size > 10_000
    assert (tmp_path / "t.png").stat().st_size > 10_000
    assert "wrote" in printed.err


@pytest.mark.parametrize("is_person", [True, False])
def test_who_waits_is_told_what_for(capsys, monkeypatch, is_person):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_person)
    command_line._say("tracing ...")
    assert capsys.readouterr() == ("", "tracing ...\n" if is_person else "")


def test_explain_as_json(capsys):
    """Settings reach the plan; nothing else is on stdout."""
    options = [
        "--rank",
        "16",
        "--gradients",
        "dense",
        "--no-recompute",
        "--json",
        "--exclude",
        "lm_head*",
    ]
    ranks = ["--world-size", "4", "--parallel", "fsdp"]
    assert main([*EXPLAIN, *options, "--dtype", "float32", "--optimizer", "sgd", *ranks]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ranks"]["each"]["torch.compile"]["moments"] == 0
    assert data["ranks"]["each"]["compact, sketched"]["sent_weights"] > 0
    (graph,) = data["report"]["graphs"]
    sites = {site["weight"]: site for site in graph["sites"]}
    assert sites["model.layers.0.mlp.up_proj.weight"]["rank"] == 16
    assert sites["model.layers.0.mlp.up_proj.weight"]["placement"] == "early"
    assert graph["totals"]["projection_bytes"] == 0  # as of no tracked ones
    assert not any("layers.1" in name for name in sites)
    assert sites["lm_head.weight"]["reason"] == "in exclude"
    assert {saved["dtype"] for saved in graph["saved_after"]} >= {"float32"}
    assert data["memory"]["eager"]["optimizer"] == 0


@pytest.mark.long
def test_fit(capsys):
    """A recommendation in code, a table of what fits, and that it is a prediction."""
    command = ["fit", "--hf-config", str(TINY), "--seq", "32", "--rank", "0.25", "--gpu", "200MB"]
    assert main([*command, "--reserve", "20MiB", "--exclude", "*.q_proj.*"]) == 0
    first, _, _, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("compact_backend(rank=0.25, exclude=('*.q_proj.*',)")
    assert "CompactAdamW(params" in first
    assert {row.split()[3] for row in rest[1 : rest.index("")]} == {"yes", "no"}
    note = " ".join(rest)
    assert f"Predicted, not measured: {TINY}," in note
    assert "billion weights in bfloat16, sequences of 32 tokens." in note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "1GB"], "--reserve 1000000000 bytes must be less than --gpu 1000000000"),
        (["--gpu", "24GB", "--tflops", "0"], "--tflops 0.0 must be"),
        (["--gpu", "24GB", "--batch", "0"], "--batch 0 must be ≥ 1"),
        (["--gpu", "24GB", "--rank", "0.25", "2.0"], "rank=2.0 must be a float in"),
    ],
)
def test_impossible_gpus(capsys, options, message):
    """One line, before anything is traced."""
    assert main(["fit", "--hf-config", str(TINY), *options]) == 2
    check_error(capsys, message)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 10**9), ("80GiB", 80 * 2**30), ("1.5 TB", 1.5e12), ("24", None), ("x GB", None)],
)
def test_sizes(text, size):
    """Decimal and binary units; none is an error."""
    if size is not None:
        assert _size(text) == size
        return
    with pytest.raises(argparse.ArgumentTypeError, match="no number with one of MB, MiB, GB"):
        _size(text)


@pytest.mark.parametrize("with_dot", [True, False])
def test_graph(capsys, tmp_path, monkeypatch, explained, with_dot):
    """Text for each graph and the diff, and SVG if graphviz is there."""
    programs, out = tmp_path / "bin", tmp_path / "new" / "graphs"
    programs.mkdir()
    if with_dot:
        dot = programs / "dot"
        dot.write_text(
            '#!/bin/sh\n[ "$1 $2" = "-Tsvg -o" ] && { echo "<svg>"; /bin/cat; } > "$3"\n'
        )
        dot.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    assert main([*GRAPH, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    names = {"joint_before", "joint_after", "forward", "backward"}
    files = {f"0_{name}.txt" for name in names} | {"0_diff.txt"}
    files |= {f"0_{name}.svg" for name in names} if with_dot else set()
    assert {path.name for path in out.iterdir()} == files
    assert set(printed.out.split()) == {str(out / name) for name in files}
    assert ("graphviz" in printed.err) is not with_dot
    halves = (out / "0_forward.txt").read_text() + (out / "0_backward.txt").read_text()
    assert re.search("random_projection.*gaussian", halves)
    diff = (out / "0_diff.txt").read_text()
    assert "-grad_model_layers_0_mlp_down_proj_weight: bf16[128, 344] = mm.default(" in diff
    if with_dot:
        assert "digraph" in (out / "0_joint_after.svg").read_text()


def test_dot_that_fails(capsys, tmp_path, monkeypatch, explained):
    """One line, not a traceback."""
    (tmp_path / "dot").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "dot").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*GRAPH, "--out", str(tmp_path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_env(capsys, monkeypatch):
    """What a bug report needs."""
    monkeypatch.setattr("compact_fx.__main__._inductor", lambda: "works")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    for word in ("python", "torch", "triton", "CUDA", "Inductor", "works"):
        assert word in printed


def test_several_batches_and_ranks_are_rows(capsys, monkeypatch):
    """The peaks that each has alone."""
    sizes = SimpleNamespace(max_position_embeddings=32)
    monkeypatch.setattr(command_line, "_model", lambda _: (Words(), sizes))
    command = ["explain", "--hf-config", str(TINY), "--seq", "32", "--json"]
    assert main([*command, "--batch", "2", "4", "--rank", "0.25", "16"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch"], row["rank"]) for row in rows] == [(2, 0.25), (2, 16), (4, 0.25), (4, 16)]
    assert main([*command, "--batch", "4", "--rank", "16"]) == 0
    alone = json.loads(capsys.readouterr().out)["memory"]
    assert rows[-1]["peaks"] == {variant: row["peak"] for variant, row in alone.items()}

    assert main([*command[:-1], "--batch", "2", "4"]) == 0
    printed = capsys.readouterr().out
    assert "compact, sketched, MB" in printed
    assert len(printed.splitlines()) == 6

    assert main([*command, "--batch", "2", "4", "--plot", "m.png"]) == 2
    check_error(capsys, "--plot is of one --batch and one --rank")


def saved_by(capsys, *options):
    """Bytes that torch.compile keeps."""
    # As many tokens that activations are more than the weights that autocast casts.
    size = ["--layers", "1", "--batch", "16", "--seq", "256"]
    assert main(["explain", "--hf-config", str(TINY), *size, "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)["memory"]["torch.compile"]


def test_explain_with_checkpoints_and_autocast(capsys):
    """Less is saved; with autocast weights are in float32, and activations are not."""
    plain, checkpointed = saved_by(capsys), saved_by(capsys, "--checkpoint")
    assert checkpointed["saved"] < plain["saved"]
    wide, autocast = saved_by(capsys, "--dtype", "float32"), saved_by(capsys, "--autocast")
    assert autocast["weights"] == wide["weights"] == 2 * plain["weights"]
    assert autocast["saved"] < wide["saved"]


def test_a_model_of_the_local_cache(capsys, tmp_path, monkeypatch):
    """By its name on the hub; what is not there is not fetched, and said."""
    import huggingface_hub

    cached = {("org/tiny", "config.json"): config(tmp_path)}

    def look_up(name, file):
        return cached.get((name, file))

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", look_up)
    small = ["--batch", "2", "--seq", "32"]
    assert main(["explain", "--hf-config", "org/tiny", *small]) == 0
    assert "model.layers.0.mlp.down_proj" in capsys.readouterr().out
    assert main(["explain", "--hf-config", "org/other", *small]) == 2
    check_error(capsys, "org/other is no file, and not in the hub's local cache: get its config")


def test_a_reader_that_is_gone(monkeypatch, explained):
    """No traceback; what is printed later goes nowhere."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(EXPLAIN) == 0
        print("more", flush=True)


@pytest.mark.long
def test_a_reader_that_stops_early():
    """`| head`: no traceback."""
    command = [sys.executable, "-m", "compact_fx", *EXPLAIN]
    pipe = f"{shlex.join(command)} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", pipe], capture_output=True, text=True)
    assert done.stdout.startswith("LlamaForCausalLM, ")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert done.returncode == 0


def test_as_a_program():
    """`python -m compact_fx`; an error is one line there too."""
    command = [sys.executable, "-m", "compact_fx", "explain", "--hf-config", "none.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("compact_fx: cannot read none.json")
    assert len(done.stderr.splitlines()) == 1


WRONG_CONFIGS = [
    ({"model_type": None}, "no model_type"),
    ({"model_type": 5}, "no model_type"),
    ({"model_type": "nonsense"}, "model_type 'nonsense' is not one"),
    ({"architectures": ["NoSuchModel"]}, "architecture 'NoSuchModel' is not one"),
    ({"architectures": ["LlamaConfig"]}, "makes no model"),
    ({"architectures": "LlamaForCausalLM"}, "must be a list"),
    ({"hidden_size": 100, "num_attention_heads": 3}, "100.*3"),
    ({"hidden_size": "wide"}, "hidden_size"),
    ({"vocab_size": -5}, "makes no model"),
    (
        {"model_type": "vit", "architectures": ["ViTModel"], "num_attention_heads": 4},
        "does not train on 2 x 32 tokens",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_CONFIGS)
def test_wrong_configurations(capsys, tmp_path, changes, message):
    """One line that says what is wrong, exit code 2."""
    path = config(tmp_path, **changes)
    assert main(["explain", "--hf-config", path, "--batch", "2", "--seq", "32"]) == 2
    check_error(capsys, message)


@pytest.mark.parametrize("content", ["no json", "[1, 2]", "", "\xff"])
def test_files_that_are_no_configuration(capsys, tmp_path, content):
    """Nor JSON, or not an object, or not text."""
    path = tmp_path / "config.json"
    path.write_bytes(content.encode("latin-1"))
    assert main(["explain", "--hf-config", str(path)]) == 2
    check_error(capsys, "cannot read|no model_type")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch 0 must be ≥ 1"),
        (["--seq", "-1"], "--seq -1 must be ≥ 1"),
        (["--layers", "0"], "--layers 0 must be ≥ 1"),
        (["--seq", "513"], "--seq 513 is more than max_position_embeddings 512"),
        (["--rank", "0"], "rank=0 must be a float in"),
        (["--rank", "2.0"], "rank=2.0 must be a float in"),
        (["--rank", "-1"], "rank=-1.0 must be"),
        (["--world-size", "8"], "--world-size and --parallel go together"),
    ],
)
def test_impossible_shapes_and_settings(capsys, options, message):
    """The same for what is typed."""
    assert main([*EXPLAIN, *options]) == 2
    check_error(capsys, message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--world-size", "0", "--parallel", "ddp"], "world_size=0 must be an int ≥ 1"),
        (["--plot", "/dev/null/x.png"], "/dev/null"),
    ],
)
def test_what_is_impossible_after_all(capsys, explained, options, message):
    """Where a model was explained before."""
    assert main([*EXPLAIN, *options]) == 2
    check_error(capsys, message)


@pytest.mark.parametrize("arguments", [[], ["explain"], ["explain", "--rank", "x"], ["fly"]])
def test_usage(capsys, arguments):
    """argparse's own errors have the same exit code."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def check_error(capsys, message):
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("compact_fx: ")
    assert re.search(message, line), line
