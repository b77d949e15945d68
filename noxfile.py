"""Developer sessions: ``nox`` runs them all, ``nox -s tests -- -k conv`` one of them with arguments."""

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
    session.install(*CONSTRAINTS, "-e", ".", "mypy")
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
