"""The package as people get it, and the rules that keep it readable."""

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import compact_fx

ROOT = Path(__file__).parent.parent


def test_wheel_holds_package_passes_and_type_marker(tmp_path: Path):
    """The passes' folder lies beside the package and is installed inside of it."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(tmp_path), str(ROOT)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "compact_fx/py.typed" in names
    assert "compact_fx/passes/choose_sites.py" in names
    target = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(target)
    code = "import compact_fx.passes.choose_sites as m; print(m.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(target), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(target) in done.stdout


def test_a_second_copy_of_the_passes_is_refused():
    """`import passes` from the root would register everything twice."""
    done = subprocess.run(
        [sys.executable, "-c", "import passes"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "import compact_fx.passes" in done.stderr


@pytest.mark.parametrize("folder", ["compact_fx", "passes"])
def test_private_torch_lives_in_one_file(folder: str):
    """Modules and attributes of torch with a leading underscore are touched in _torch.py only."""
    private = re.compile(
        r"(from torch[\w.]*\._\w+|import torch\._\w+|torch\._\w+\.|from torch[\w.]* import _)"
    )
    allowed = {"_torch.py"}
    for file in (ROOT / folder).rglob("*.py"):
        if file.name not in allowed:
            assert not private.search(file.read_text()), file.name


ROOMS = {  # each may import itself and those in its set
    "errors": set(),
    "_version": set(),
    "_torch": set(),
    "projections": {"_torch"},
    "config": {"errors", "projections"},
    "plan": {"projections"},
    "training": {"_torch", "config", "errors", "plan", "projections"},
    "passes": {"_torch", "config", "errors", "plan", "projections"},
    "compiler": {"_torch", "config", "errors", "passes", "plan", "training"},
    "reading": {
        "_torch",
        "compiler",
        "config",
        "errors",
        "passes",
        "plan",
        "projections",
        "training",
    },
    "backend": {
        "_torch",
        "compiler",
        "config",
        "errors",
        "passes",
        "plan",
        "reading",
        "training",
    },
    "integrations": {"backend", "training"},
}


def imports_of(file: Path) -> set[tuple[str, int]]:
    """What a file imports of this package, by room, with the line."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module == "compact_fx":
            names = [f"compact_fx.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("compact_fx."):
                found.add((name.split(".")[1], node.lineno))
    return found


def test_rooms_import_in_one_direction():
    """Mathematics knows nothing of graphs, passes nothing of training, nothing of what reads it."""
    seen = set()
    for folder in (ROOT / "compact_fx", ROOT / "passes"):
        for file in folder.rglob("*.py"):
            room = file.relative_to(folder).parts[0].removesuffix(".py")
            room = "passes" if folder.name == "passes" else room
            if room in ("__init__", "__main__"):
                continue
            seen.add(room)
            for target, line in imports_of(file):
                allowed = target == room or target in ROOMS[room]
                assert allowed, f"{file.name}:{line} imports {target}, {room} may not"
    assert seen == ROOMS.keys()


@pytest.mark.parametrize("room", ["projections", "passes", "training", "reading"])
def test_no_circle_within_a_room(room: str):
    """Files of one room import each other in one direction."""
    folder = ROOT / ("passes" if room == "passes" else f"compact_fx/{room}")
    graph: dict[str, set[str]] = {}
    for file in folder.glob("*.py"):
        own = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("compact_fx."):
                parts = (node.module or "").split(".")[1:]
                if parts[0] == room:
                    names = parts[1:2] or [alias.name for alias in node.names]
                    own |= set(names)
        graph[file.stem] = own - {file.stem}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_public_name_is_in_the_api_reference():
    """Pages of docs/api name what mkdocstrings renders there, each once."""
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    shown = re.findall(r"(?m)^::: compact_fx\.(\w+)$", pages)
    assert sorted(shown) == sorted(compact_fx.__all__)


def test_package_changelog_and_citation_have_one_version():
    """The newest dated entry of the changelog is the release that CITATION.cff names."""
    number = re.search(r'(?m)^version = "(.+)"$', (ROOT / "pyproject.toml").read_text())
    entry = re.search(r"(?m)^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert number
    assert entry
    assert citation["version"] == entry[1] == number[1]
    assert str(citation["date-released"]) == entry[2]


@pytest.mark.parametrize(("version", "fine"), [("2.10.1", False), ("2.9", False), ("2.11.0", True)])
def test_an_older_torch_is_refused_at_import(version, fine):
    """In one line, before anything private in torch is touched."""
    code = (
        "import torch; from torch.torch_version import TorchVersion; "
        f"torch.__version__ = TorchVersion({version!r}); import compact_fx"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode == 0) == fine
    if not fine:
        message = f"compact_fx needs torch 2.11 or newer, this is {version}"
        assert message in done.stderr.splitlines()[-1]
