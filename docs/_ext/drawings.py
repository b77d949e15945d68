"""Drawings of what may import what, from the mermaid text that pages have: as SVG, by layers, with nothing fetched.

Only what such a drawing needs is read: lines ``a --> b`` and ``a -.-> b``.
"""

import re
from html import escape
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

WIDTH, HEIGHT, ACROSS, DOWN = 104, 30, 116, 74  # of a box, and from one to the next
EDGE = re.compile(r"^\s*(\w+)\s+(-->|-\.->)\s+(\w+)\s*$")


def layers(edges: list[tuple[str, str, str]]) -> list[list[str]]:
    """Names by their longest path to the ground, the highest first; within a layer near what they point to."""
    names = list(dict.fromkeys(name for start, _, end in edges for name in (start, end)))
    below = {name: [end for start, _, end in edges if start == name] for name in names}

    def height(name: str) -> int:
        return 1 + max(map(height, below[name]), default=-1)

    rows: list[list[str]] = [[] for _ in range(1 + max(map(height, names)))]
    for name in names:
        rows[height(name)].append(name)
    place: dict[str, float] = {}
    for row in rows:
        row.sort(key=lambda name: sum(place[end] for end in below[name]) / max(1, len(below[name])))
        place |= {name: i - (len(row) - 1) / 2 for i, name in enumerate(row)}
    return rows[::-1]


def svg(text: str) -> str:
    """The drawing."""
    edges = [m.groups() for line in text.splitlines() if (m := EDGE.match(line))]
    rows = layers(edges)
    width, height = ACROSS * max(map(len, rows)) + 8, DOWN * (len(rows) - 1) + HEIGHT + 16
    at = {
        name: (width / 2 + ACROSS * (i - (len(row) - 1) / 2), 8 + HEIGHT / 2 + DOWN * depth)
        for depth, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    parts = []
    for start, arrow, end in edges:
        (x, y), (u, v) = at[start], at[end]
        y, v = y + HEIGHT / 2, v - HEIGHT / 2 - 5
        middle, dashes = (y + v) / 2, ' stroke-dasharray="4 4"' if arrow == "-.->" else ""
        parts.append(f'<path d="M{x:g},{y:g} C{x:g},{middle:g} {u:g},{middle:g} {u:g},{v:g}"{dashes} marker-end="url(#tip)"/>')
    for name, (x, y) in at.items():
        parts.append(f'<rect x="{x - WIDTH / 2:g}" y="{y - HEIGHT / 2:g}" width="{WIDTH}" height="{HEIGHT}" rx="6"/>')
        parts.append(f'<text x="{x:g}" y="{y + 4.5:g}">{escape(name)}</text>')
    tip = '<defs><marker id="tip" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path class="tip" d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    told = "; ".join(f"{start} to {end}" for start, _, end in edges)
    return (
        f'<figure class="drawing"><svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="Arrows: {escape(told)}">{tip}{"".join(parts)}</svg></figure>'
    )


class Mermaid(SphinxDirective):
    """A fence of mermaid text."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """The drawing as it goes into the page."""
        return [nodes.raw("", svg("\n".join(self.content)), format="html")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Fences get to the directive by ``myst_fence_as_directive``."""
    app.add_directive("mermaid", Mermaid)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
