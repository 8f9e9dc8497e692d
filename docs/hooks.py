"""mkdocs: the site lies as the repository does, so that links are right in both."""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from compact_fx.__main__ import main

ROOT = Path(__file__).parent.parent
SHOWN = (  # a link to anything else is an error of `mkdocs build --strict`
    "*.md",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/images/*",
    "examples/*.ipynb",
    "benchmarks/results/*",
    "compact_fx/config.py",
    "compact_fx/reading/ranks.py",
)
FENCE = re.compile(r"(?ms)^```.*?^```$")
HELP = re.compile(r"(?m)^(python -m compact_fx (.*)--help)$")


@event_priority(100)  # before the plugins, one of which renders notebooks
def on_files(files: Files, config: Any) -> None:
    """In place of what is in docs: what is shown, under its path in the repository."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in sorted(path for pattern in SHOWN for path in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Code ends what is before it, as on GitHub; a line that asks for help gets the answer."""
    markdown = FENCE.sub(r"\n\g<0>\n", markdown)
    return HELP.sub(lambda found: f"{found[1]}\n\n{_help_of(found[2].split())}", markdown)


def _help_of(command: list[str]) -> str:
    os.environ["COLUMNS"] = "78"
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return printed.getvalue().rstrip()
