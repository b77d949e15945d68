"""The README's Python blocks run as printed and print what it says; its links lead somewhere."""

import contextlib
import functools
import io
import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```$(?:\s*^```text\n(?P<output>.*?)^```$)?", re.MULTILINE | re.DOTALL)


def test_blocks_run_and_print_what_is_shown(monkeypatch: pytest.MonkeyPatch, compile_backend: str) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_backend))
    text = README.read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert blocks
    namespace: dict[str, object] = {}  # one session: a later block may use the names of an earlier one
    for block in blocks:
        first_line = text[: block.start()].count("\n") + 1
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * first_line + block["code"], str(README), "exec"), namespace)
        assert printed.getvalue() == (block["output"] or "")


def test_links_into_the_repository_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", README.read_text(encoding="utf-8"))
    assert targets
    missing = [target for target in targets if not (README.parent / target).exists()]
    assert not missing
