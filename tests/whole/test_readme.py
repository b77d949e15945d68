"""The README's Python blocks run as printed and print what it says. Its links are looked at with those of the site."""

import functools

import pytest
import torch
from documents import ROOT, run


def test_blocks_run_and_print_what_is_shown(monkeypatch: pytest.MonkeyPatch, compile_backend: str) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_backend))
    run(ROOT / "README.md")
