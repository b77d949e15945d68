"""Formulas as MathML, which browsers draw by themselves: nothing is fetched, and nothing runs in the page.

The font is STIX Two Math (SIL Open Font License), as the package ziamath has it: few systems have one with large operators.
"""

import re
from importlib.resources import files
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator


def convert(latex: str, display: str = "inline") -> str:
    r"""MathML, in which the bars of a norm, without ``\left``, have the size of letters and not of the whole formula."""
    formula: str = latex2mathml.converter.convert(latex, display=display)
    return re.sub(r"<mo>(&#x02016;|&#x02225;|&#x02223;|&#x0007C;|\||‖|∥|∣)</mo>", r'<mo stretchy="false">\1</mo>', formula)


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
