"""Pages whose Python blocks are to run as printed."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Run the blocks of a page in one session, and compare what each prints with the text block after it; all names then."""
    text = page.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    namespace: dict[str, Any] = {}  # a later block may use the names of an earlier one
    for block in blocks:
        first_line = text[: block.start()].count("\n") + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * first_line + block["code"], str(page), "exec"), namespace)
        assert printed.getvalue() == (block["output"] or "")
    return namespace


def dead_links(page: Path) -> list[str]:
    """Links into the repository that lead nowhere."""
    text = without_code(page)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    return [target for target in targets if not (page.parent / target).exists()]


def dead_anchors(page: Path) -> list[str]:
    """Links to headings of pages, of this one or another, that there are not."""
    found = re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", without_code(page))
    pages = {target: (page.parent / target if target else page) for target, _ in found}
    there = {target: anchors(path) for target, path in pages.items() if path.suffix == ".md" and path.exists()}
    return [f"{target}#{anchor}" for target, anchor in found if target in there and anchor not in there[target]]


def anchors(page: Path) -> set[str]:
    """What GitHub, and the site, call the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def without_code(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
