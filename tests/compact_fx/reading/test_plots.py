"""Pictures: files with something in them. (What they look like is for people to judge.)"""

import subprocess
import sys

import pytest
import torch
from torch import nn

from compact_fx import explain
from compact_fx.reading.memory import Moment
from compact_fx.reading.plots import from_snapshot, timeline

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(scope="module")
def found():
    """Of two layers."""
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    return explain(model, torch.zeros(512, 64), rank=0.25, recompute=False)


def check_picture(path):
    """A PNG of a readable size with several colors, ink and white space."""
    pixels = matplotlib.image.imread(path)[..., :3]
    height, width = pixels.shape[:2]
    assert width > 800
    assert height > 250
    white = (pixels > 0.99).all(axis=-1).mean()
    assert 0.3 < white < 0.99
    colors = {tuple(color) for color in (pixels[::5, ::5].reshape(-1, 3) * 8).astype(int)}
    assert len(colors) > 8


@pytest.mark.parametrize(
    "draw",
    [
        lambda found, path: found.plot(path),
        lambda found, path: found.plot(path, gpu_memory=2e6),
        lambda found, path: found.timeline(path),
        lambda found, path: found.report.plot(path),
    ],
)
def test_pictures_are_drawn(found, tmp_path, draw):
    """Into a folder that is not there yet; no figure stays open."""
    path = tmp_path / "new" / "memory.png"
    open_before = matplotlib.pyplot.get_fignums()
    assert draw(found, path) == path
    check_picture(path)
    assert matplotlib.pyplot.get_fignums() == open_before


def test_bars_end_at_the_peak(found, tmp_path, monkeypatch):
    """Their parts are all that is alive there; the title says of what."""
    widths, titles = [], []
    draw = matplotlib.axes.Axes.barh

    def barh(self, rows, width, **settings):
        widths.append(width)
        return draw(self, rows, width, **settings)

    monkeypatch.setattr(matplotlib.axes.Axes, "barh", barh)
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_title", lambda self, title, **_: titles.append(title)
    )
    found.plot(tmp_path / "m.png")
    ends = [sum(row) for row in zip(*widths, strict=True)]
    assert ends == pytest.approx([row.peak / 1e6 for row in found.memory.values()])
    described = "Sequential, 0.0166M parameters in float32, batch 512 x 64"
    assert (found.described, titles) == (described, [f"{described}: at the peak"])


def test_large_and_small_memory_have_units(tmp_path, monkeypatch):
    """No axis from 0.00 to 0.00 GB."""
    labels = []
    monkeypatch.setattr(
        matplotlib.axes.Axes, "set_ylabel", lambda self, label: labels.append(label)
    )
    for size in (3 * 10**6, 3 * 10**9):
        run = [Moment("forward", "a", size // 2), Moment("backward", "b", size)]
        timeline({"run": run}, tmp_path / "t.png")
    assert labels == ["MB alive", "GB alive"]


def test_snapshot_of_cuda():
    """Live bytes at each event; what was freed without being made was there before."""

    def event(action, size):
        return {"action": action, "size": size, "addr": 0, "frames": []}

    history = [
        event("segment_alloc", 10_000),
        event("alloc", 100),
        event("alloc", 300),
        event("free_requested", 100),
        event("free_completed", 100),
        event("free_completed", 350),  # 50 of them from before the history
        event("snapshot", 0),
    ]
    moments = from_snapshot({"device_traces": [[], history]}, device=1)
    assert [m.bytes for m in moments] == [150, 450, 350, 0]
    assert [m.phase for m in moments] == ["forward", "backward", "backward", "backward"]


@pytest.mark.parametrize(
    "snapshot",
    [
        {},
        {"device_traces": []},
        {"device_traces": [[]]},
        {"device_traces": [[{"action": "snapshot", "size": 0}]]},
    ],
)
def test_snapshot_without_history(snapshot):
    """The call that makes one."""
    with pytest.raises(ValueError, match="_record_memory_history"):
        from_snapshot(snapshot)


def test_without_matplotlib(tmp_path):
    """The package works, and a picture's error names the extra."""
    script = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from compact_fx import compact_backend\n"
        "report = compact_backend().report(); print(report)\n"
        "report.plot('x.png')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert "nothing was compiled" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "ImportError: pictures need matplotlib: pip install 'compact_fx[plots]'"
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_history_of_cuda(tmp_path):
    """Its peak is the allocator's, over what was there before."""
    model = nn.Sequential(nn.Linear(512, 2048), nn.Tanh(), nn.Linear(2048, 512)).cuda()
    x = torch.randn(4096, 512, device="cuda")
    model(x).sum().backward()  # libraries make their workspaces
    model.zero_grad(set_to_none=False)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.memory._record_memory_history()
    try:
        model(x).sum().backward()
        torch.cuda.synchronize()
        moments = from_snapshot(torch.cuda.memory._snapshot())
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    peak = torch.cuda.max_memory_allocated() - before
    assert max(moment.bytes for moment in moments) == pytest.approx(peak, rel=0.01)
    assert {moment.phase for moment in moments} == {"forward", "backward"}
    check_picture(timeline({"measured": moments}, tmp_path / "measured.png"))
