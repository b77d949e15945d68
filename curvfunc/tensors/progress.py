"""How far a loop is, where there are a terminal and tqdm to show it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["bar"]


@contextmanager
def bar(what: str, unit: str, total: int | None, show: bool, **options: Any) -> Iterator[Callable[[], Any]]:
    """Something to call after each step, which shows how far it is where somebody may look at it.

    Args:
        what: Stands before the bar.
        unit: What is counted.
        total: Number of steps, if it is known.
        show: False for no bar at all.
        **options: More of tqdm's.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    if not show or not sys.stderr.isatty():
        yield lambda: None
        return
    with tqdm(total=total, unit=unit, desc=what, **options) as shown:
        yield shown.update
