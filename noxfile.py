"""Developer sessions: ``nox`` runs them all, ``nox -s tests -- -k conv`` one of them with arguments."""

import re
import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
CONSTRAINTS = ("-c", "constraints.txt")
# What the results are compared with; without dependencies, for it asks for torchvision and does without
PEERS = ("backpack-for-pytorch==1.7.1", "unfoldNd==0.2.3")


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting."""
    session.install(*CONSTRAINTS, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def imports(session: nox.Session) -> None:
    """The contracts of the packages, in pyproject.toml."""
    session.install(*CONSTRAINTS, "import-linter")
    session.run("lint-imports")


@nox.session
def types(session: nox.Session) -> None:
    """Static types of the package."""
    session.install(*CONSTRAINTS, "-e", ".", "mypy", "numpy")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """The site, its gallery run, into docs/_build/html; a warning is an error."""
    session.install(*CONSTRAINTS, "-e", ".[docs]")
    session.run("sphinx-build", "-q", "-W", "--keep-going", "docs", "docs/_build/html", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no peer."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.run("pytest", *(session.posargs or ("-n", "auto")))


@nox.session
def parity(session: nox.Session) -> None:
    """All tests, those against peers included."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    session.install(*CONSTRAINTS, "--no-deps", *PEERS)
    session.run("pytest", *(session.posargs or ("-n", "auto")))


@nox.session
def transformers(session: nox.Session) -> None:
    """Models of Hugging Face transformers, random and small."""
    session.install(*CONSTRAINTS, "-e", ".[test]", "transformers")
    session.run("pytest", "tests/whole/test_transformers.py", *session.posargs, env={"HF_HUB_OFFLINE": "1"})


@nox.session
def laplace(session: nox.Session) -> None:
    """The back end of laplace-torch, which asks for torchvision and does without."""
    session.install(*CONSTRAINTS, "-e", ".[test]")
    peers = ("laplace-torch==0.3", "asdfghjkl", "curvlinops-for-pytorch", "backpack-for-pytorch==1.7.1")
    needed = ("torchmetrics", "lightning-utilities", "opt_einsum", "einops", "einconv", "linear_operator", "jaxtyping")
    session.install(*CONSTRAINTS, "--no-deps", *peers, *needed, "wadler_lindig", "tqdm", "unfoldNd==0.2.3")
    session.run("pytest", "tests/whole/test_laplace_torch.py", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """The example of the README."""
    session.install(*CONSTRAINTS, "-e", ".[examples]")
    session.run("python", "examples/digits.py", *session.posargs)
    session.run("python", "examples/distributed.py")


@nox.session
def package(session: nox.Session) -> None:
    """What users get: both distributions, and the README's first example in an environment with nothing but the wheel."""
    session.install("build", "twine")
    built, bare = Path(session.create_tmp()) / "dist", Path(session.create_tmp()) / "bare"
    for folder in (built, bare):
        shutil.rmtree(folder, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(built))  # the wheel is made of the source distribution
    wheel, source = sorted(built.iterdir(), key=lambda path: path.suffix != ".whl")
    session.run("twine", "check", "--strict", str(wheel), str(source))
    session.run("python", "-m", "venv", str(bare))
    python = str(bare / ("Scripts/python.exe" if (bare / "Scripts").exists() else "bin/python"))
    session.run(python, "-m", "pip", "install", "--quiet", *CONSTRAINTS, str(wheel), external=True)
    first = re.search(r"^```python\n(.*?)^```$(?:\s*^```text\n(.*?)^```$)?", Path("README.md").read_text("utf-8"), re.M | re.S)
    if first is None:
        session.error("README.md has no example")
    example = bare / "example.py"
    example.write_text(first[1], encoding="utf-8")
    with session.chdir(bare):  # so that the package is the one that was installed
        session.run(python, "-m", "curvfunc", external=True)
        printed = session.run(python, str(example), external=True, silent=True, stderr=None)
    if first[2] and str(printed).strip() != first[2].strip():
        session.error(f"the example printed\n{printed}\nand the README says\n{first[2]}")
