"""What the README's picture of the ranks draws is what its table says."""

from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality_60m.jsonl"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import quality_results

    return quality_results


def test_ranks_at_their_best_rates_are_what_the_readme_says(results: ModuleType):
    """AdamW's loss, and how far each rank ends from it, of runs of one text."""
    rows = results.read(RESULTS)
    best = results.best_by_rank(rows)
    drawn = [row for runs in best.values() for same in runs.values() for row in same]
    assert len({row["data"] for row in drawn}) == 1
    losses = {s: {r: results.mean_of(same) for r, same in runs.items()} for s, runs in best.items()}
    assert {s: round(of[None], 3) for s, of in losses.items()} == {1000: 2.084, 3000: 1.75}
    percent = {
        s: {r: round(100 * (loss / of[None] - 1), 1) for r, loss in of.items() if r}
        for s, of in losses.items()
    }
    assert percent[1000] == {0.5: -0.7, 0.25: 3.1, 0.125: 8.1}
    assert percent[3000] == {0.5: 1.4, 0.25: 5.2}
    readme = (ROOT / "README.md").read_text()
    for text in ("-0.7 %", "to 3.1 %", "to 8.1 %", "1.4 % above AdamW", "rank 1/4 5.2 %"):
        assert text in readme


def test_other_settings_do_not_stand_for_a_rank(results: ModuleType):
    """A run that changes more than rates is not drawn, however good it is; nor is another text."""
    rows = results.read(RESULTS)
    before = results.best_by_rank(rows)
    good = before[1000][0.25][0]
    for change in ({"saved": "int8"}, {"projection": "gaussian"}, {"sketch_heads": True}):
        rows.append({**good, "loss": 1.0, "settings": {**good["settings"], **change}})
    rows.append({**good, "loss": 1.0, "data": "another"})
    assert results.best_by_rank(rows) == before


def test_the_picture_is_drawn(results: ModuleType, tmp_path: Path):
    pytest.importorskip("matplotlib")
    results.plot_ranks(results.read(RESULTS), tmp_path)
    assert (tmp_path / "quality_60m_ranks.png").stat().st_size > 10_000
