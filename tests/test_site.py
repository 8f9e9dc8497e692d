"""The site is built strictly, shows pages as GitHub does, and fetches nothing."""

import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="needs the extra `docs`")

from click.exceptions import ClickException
from markdown_it import MarkdownIt
from mkdocs.commands.build import build
from mkdocs.config import load_config

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"]
PAGES += [f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))]
SHOWN = ["h1", "h2", "h3", "p", "table", "td", "ul", "ol", "li", "pre", "img", "code", "strong"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_nothing_is_fetched_from_elsewhere(site: Path):
    """People may follow links out of it; a browser that shows a page may not."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", page.read_text())
        assert loaded
        assert not [tag for tag in loaded if re.search(r"(src|href)=[\"']?(https?:)?//", tag)]
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\([\"']?|@import [\"']?)(https?:)?//", sheet.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_what_github_shows(site: Path, page: str):
    """Python-Markdown wants blank lines and indents that CommonMark does not."""
    markdown = (ROOT / page).read_text()
    on_github = MarkdownIt("commonmark").enable("table").render(markdown)
    html = site / ("index.html" if page == "README.md" else page.replace(".md", ".html"))
    article = re.search(r"(?s)<article.*</article>", html.read_text())
    assert article
    for tag in SHOWN:
        count = [len(re.findall(rf"<{tag}[ >]", text)) for text in (article[0], on_github)]
        assert count[0] == count[1], tag


@pytest.mark.parametrize(
    "notebook", sorted(ROOT.glob("examples/*.ipynb")), ids=lambda file: file.stem
)
def test_notebooks_are_pages(site: Path, notebook: Path):
    """With their outputs, pictures among them."""
    page = (site / "examples" / notebook.name).with_suffix(".html").read_text()
    assert page.count('src="data:image/png;base64,') == notebook.read_text().count('"image/png"')


def test_links_to_nothing_stop_the_build(tmp_path: Path):
    """Pages, anchors, and files that the site does not hold."""
    links = ["docs/none.md", "docs/quality.md#none", "#none", "docs/images/none.png"]
    links += ["benchmarks/results/none.json", "compact_fx/backend.py", "/docs/quality.md"]
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path))

    def with_links(markdown: str, page, **_) -> str:
        broken = "".join(f"[x]({link})\n" for link in links)
        return f"{markdown}\n\n{broken}" if page.file.src_uri == "README.md" else markdown

    config.plugins.events["page_markdown"].append(with_links)
    with pytest.raises(ClickException, match=f"Aborted with {len(links)} warnings"):
        build(config)
