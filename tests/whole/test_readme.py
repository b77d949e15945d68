"""The README's Python blocks run as printed and print what it says; its links, and those of CONTRIBUTING, lead somewhere."""

import functools

import pytest
import torch
from documents import ROOT, dead_links, run


def test_blocks_run_and_print_what_is_shown(monkeypatch: pytest.MonkeyPatch, compile_backend: str) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compile_backend))
    run(ROOT / "README.md")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/optimizers.md", "docs/physics.md"]
)
def test_links_into_the_repository_lead_somewhere(page: str) -> None:
    assert not dead_links(ROOT / page)
