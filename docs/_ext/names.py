"""Names: docstrings as reStructuredText, names in backticks as links, and the check that every public name has its page."""

import importlib
import inspect
import re
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

import curvfunc

logger = logging.getLogger(__name__)
ESCAPED = re.compile(r"(``(?s:.+?)``|`[^`]+`|\*\*\w.*?\w\*\*|(?<!\w)\*\w(?:[^*\n]*\w)?\*(?!\w))|([*|])|(\w)_(?![\w`])")
# On these pages a bare class name is BackPACK's or another's
OF_OTHERS = ("backpack", "architecture", "laplace", "quantities/index")


def public() -> dict[str, Any]:
    """Every public name with its module, and what it is."""
    found = {f"curvfunc.{name}": getattr(curvfunc, name) for name in curvfunc.__all__}
    for name, value in list(found.items()):
        if inspect.ismodule(value):
            found |= {f"{name}.{part}": getattr(value, part) for part in value.__all__}
    return found


PUBLIC = public()
# What a module's function is called without its module, where no other has the name, and it is no word
SHORT = {name.rpartition(".")[2]: name for name in PUBLIC if name.count(".") == 2 and "_" in name and ".reference." not in name}


def escaped(found: re.Match[str]) -> str:
    """A literal without blanks at its end, which would not end it; or a character that is to be itself."""
    if found[1]:
        return f"{found[1][:-2].rstrip()}``" if found[1].endswith("``") else found[1]
    return f"\\{found[2]}" if found[2] else rf"{found[3]}\_"


def escape(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Formulas keep their stars, bars and underscores: docstrings are for ``help`` first. Code and tables stay as they are."""
    made: list[str] = []
    for block in re.split(r"\n(?:[ ]*\n)+", "\n".join(lines)):
        first = block.lstrip()
        if first.startswith("==="):
            made.append("::\n\n" + "\n".join(f"    {line}" for line in block.splitlines()))
        elif first.startswith(">>>"):
            made.append(block)
        else:
            made.append(ESCAPED.sub(escaped, block))
    lines[:] = [*"\n\n".join(made).splitlines(), ""]


def value_of(target: str, module: str | None) -> Any:
    """The object of a dotted name, as seen from a module; None if there is none."""
    for full in (target, f"{module}.{target}", f"curvfunc.{target}"):
        parts = full.split(".")
        for end in range(len(parts), 0, -1):
            try:
                value: Any = importlib.import_module(".".join(parts[:end]))
                for part in parts[end:]:
                    value = getattr(value, part)
            except (ImportError, AttributeError, ValueError):
                continue
            return value
    return None


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contnode: nodes.Node) -> nodes.Node | None:
    """Inner names of public objects lead to these; inner objects have no page; what does not exist is left to the warning."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    value = value_of(target, node.get("py:module"))
    if value is None:
        return None if target.startswith("curvfunc") else contnode
    documented = env.get_domain("py").objects  # type: ignore[attr-defined]
    for name, entry in documented.items():
        if PUBLIC.get(name) is value and not inspect.ismodule(value):
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, contnode, name)
    return contnode


def link(app: Sphinx, tree: nodes.document) -> None:
    """Code that is a public name becomes a link, in pages that are Markdown."""
    page = app.env.docname
    for literal in list(tree.findall(nodes.literal)):
        text = literal.astext().removesuffix("()")
        around = up_from(literal)
        linked = any(isinstance(up, nodes.reference | nodes.title | addnodes.pending_xref) for up in around)
        if linked or literal.get("classes"):
            continue
        if any("elsewhere" in up.get("ids", ()) for up in around if isinstance(up, nodes.section)):
            continue
        others = page.startswith(OF_OTHERS) and text[:1].isupper()
        full = next(
            (name for name in (text, f"curvfunc.{text}", SHORT.get(text)) if name in PUBLIC and not (others and name != text)),
            None,
        )
        if full is None or inspect.ismodule(PUBLIC[full]):
            continue
        xref = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=full, refexplicit=True, refwarn=True)
        xref["refdoc"] = page
        literal.replace_self(xref)
        xref += literal


def up_from(node: nodes.Node) -> list[nodes.Node]:
    """All that a node is part of."""
    found = []
    while node.parent is not None:
        node = node.parent
        found.append(node)
    return found


def every_name_has_a_page(app: Sphinx, env: BuildEnvironment) -> None:
    """A public name without a page is a warning, and so an error."""
    documented = env.get_domain("py").objects  # type: ignore[attr-defined]
    for name in sorted(PUBLIC.keys() - documented.keys()):
        logger.warning("the public name %s has no page: put it into docs/api or docs/quantities.toml", name)


def outside(app: Sphinx, page: str, text: list[str]) -> None:
    """What stands beside ``docs`` in the repository has a page here."""
    text[0] = text[0].replace("](../CONTRIBUTING.md)", "](contributing.md)")


def included(app: Sphinx, path: Any, page: str, text: list[str]) -> None:
    """And its links are from there."""
    text[0] = re.sub(r"\]\((?!docs/|https?://|#)", "](../", text[0]).replace("](docs/", "](")


class EveryName(SphinxDirective):
    """All public names, module by module, each leading to its page."""

    def run(self) -> list[nodes.Node]:
        """A paragraph for each module."""
        made: list[nodes.Node] = []
        modules = {"curvfunc": ""} | {name: name.removeprefix("curvfunc.") for name in PUBLIC if inspect.ismodule(PUBLIC[name])}
        for module in modules:
            names = [n for n, value in PUBLIC.items() if n.rpartition(".")[0] == module and not inspect.ismodule(value)]
            line = nodes.paragraph("", "", nodes.strong("", module), nodes.Text(": "))
            for i, name in enumerate(sorted(names, key=str.lower)):
                xref = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=name, refexplicit=True, refwarn=True)
                xref["refdoc"] = self.env.docname
                xref += nodes.literal("", name.removeprefix(f"{module}."))
                line += [nodes.Text(", "), xref] if i else [xref]
            made.append(line)
        return made


def setup(app: Sphinx) -> dict[str, bool]:
    """Docstrings are escaped before napoleon reads them."""
    app.add_directive("every_name", EveryName)
    app.connect("autodoc-process-docstring", escape, priority=100)
    app.connect("source-read", outside)
    app.connect("include-read", included)
    app.connect("missing-reference", resolve)
    app.connect("doctree-read", link)
    app.connect("env-check-consistency", every_name_has_a_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
