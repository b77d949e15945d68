"""Formulas as MathML, which browsers draw by themselves: nothing is fetched, and nothing runs in the page.

The font is STIX Two Math (SIL Open Font License), as the package ziamath has it: few systems have one with large operators.
"""

from importlib.resources import files
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def inline(self: HTML5Translator, node: nodes.Node) -> None:
    """A formula in a line."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block(self: HTML5Translator, node: nodes.Node) -> None:
    """A formula on a line of its own; too wide ones scroll."""
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def copy_font(app: Sphinx, error: Exception | None) -> None:
    """Beside the style sheets."""
    if error is None and app.builder.format == "html":
        font = files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"
        Path(app.outdir, "_static", font.name).write_bytes(font.read_bytes())


def setup(app: Sphinx) -> dict[str, bool]:
    """The renderer's name is ``mathml``."""
    app.connect("build-finished", copy_font)
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
