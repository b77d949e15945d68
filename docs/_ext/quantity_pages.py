"""One page per quantity, out of ``quantities.toml``, the tables of measurements, and the docstrings."""

import re
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

DOCS = Path(__file__).parents[1]
LIBRARIES = ("BackPACK", "curvlinops", "Opacus", "laplace-torch", "torch.func", "others")


def table() -> dict[str, dict[str, Any]]:
    """The entries of ``quantities.toml`` by page."""
    return tomllib.loads((DOCS / "quantities.toml").read_text(encoding="utf-8"))


def measured() -> dict[str, dict[str, str]]:
    """Cells of the table in ``performance.md``, by column and net."""
    lines = [line for line in (DOCS / "performance.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: {row[0]: row[i] for row in rows if len(row) == len(head)} for i, name in enumerate(head) if i}


def costs(columns: list[str]) -> list[str]:
    """What was measured, a row per net; nothing if nothing was."""
    cells = measured()
    if not columns:
        return []
    nets = [net for net in cells[columns[0]] if any(cells[c][net] != "–" for c in columns)]
    rows = [f"| {net} | " + " | ".join(cells[c][net] for c in columns) + " |" for net in nets]
    return [
        "",
        "| net | " + " | ".join(f"`{c}`" for c in columns) + " |",
        "|---|" + "---|" * len(columns),
        *rows,
        "",
        "Time together with the gradient, in gradients: eager / compiled, and in brackets how many times as fast as the "
        "fastest other library; see [](../performance.md) for machine and command.",
    ]


def page(name: str, entry: dict[str, Any]) -> str:
    """The Markdown of a page."""
    lines = [f"# {entry['title']}", "", entry["about"].strip(), "", "$$", entry["formula"].strip(), "$$", ""]
    lines += ["## Shapes", "", "| asked for by | result |", "|---|---|"]
    for asked, shape in entry["shapes"].items():
        lines.append(f"| {' or '.join(f'`{part}`' for part in asked.split(' or '))} | {shape} |")
    shapes = " ".join(entry["shapes"].values())
    columns = "; V is C, or `mc_samples`" if "[V, N" in shapes else "; V vectors at once" if "[V, *" in shapes else ""
    lines += ["", f"N samples, a parameter of shape `*shape`, C entries of one sample's output{columns}.", ""]
    lines += ["## Cost", "", entry["cost"].strip(), *costs(entry.get("measured", [])), ""]
    if "example" in entry:
        lines += ["## Example", "", "```python", entry["example"].strip(), "```", ""]
    if "pictures" in entry:
        lines += ["## In pictures", ""]
        for script, told in entry["pictures"].items():
            lines += [
                f":::{{figure}} ../auto_gallery/images/sphx_glr_plot_{script}_001_2_00x.png",
                f":target: ../auto_gallery/plot_{script}.html",
                "",
                f"{told} [The script](../auto_gallery/plot_{script}.rst)",
                ":::",
                "",
            ]
    others = entry.get("elsewhere", {})
    lines += ["## Elsewhere", "", "| library | its name |", "|---|---|"]
    listed = [library for library in LIBRARIES if library != "others" or library in others]
    lines += [f"| {library} | {others.get(library, '–')} |" for library in listed]
    lines += ["", "## Reference", "", "```{eval-rst}", ".. currentmodule:: curvfunc", ""]
    for part in entry["names"]:
        kind = "class" if part[0].isupper() else "function"
        lines += [f".. auto{kind}:: curvfunc.{part}", *(["   :members:"] if part in entry.get("members", []) else []), ""]
    return "\n".join([*lines, "```", ""])


def write(app: Sphinx) -> None:
    """Pages that changed, and no others, so that a second build is quick."""
    folder = DOCS / "quantities"
    entries = table()
    for name, entry in entries.items():
        path, text = folder / f"{name}.md", page(name, entry)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.stem not in {*entries, "index"}:
            path.unlink()
    listed = (folder / "index.md").read_text(encoding="utf-8")
    missing = [name for name in entries if not re.search(rf"^{name}$", listed, re.MULTILINE)]
    assert not missing, f"docs/quantities/index.md lacks {missing}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Before anything is read."""
    app.connect("builder-inited", write, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
