"""Functions of Kronecker-factored matrices: equal to those of dense matrices, or an error."""

import io
import re
from typing import Any

import optree
import pytest
import torch
from helpers import assert_close
from torch import Tensor
from torch.utils import _pytree as pytree

from curvfunc import kronecker
from curvfunc.kronecker import Layout, Structure

F64 = torch.float64
LAYOUTS = (
    Layout("w", (3, 2, 2), F64, bias="b"),
    Layout("b", (3,), F64),
    Layout("exact", (2, 2), F64),
    Layout("scalar", (), F64),
    Layout("one", (1, 1), F64),
    Layout("swapped", (2, 3, 2), F64, split=(2, 3, 2), order=(1, 0, 2)),  # of a transposed convolution
)
STRUCTURE = Structure(LAYOUTS)
SHAPES = {layout.name: layout.shape for layout in LAYOUTS}
CASES = ["separate", "joined"]
RANKS = ["full", "deficient"]


def psd(n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    root = torch.randn(n, n if rank is None else rank, dtype=F64, generator=torch.Generator().manual_seed(seed + n))
    return root @ root.mT


def make(case: str, rank: str = "full") -> dict[str, tuple[Tensor, ...]]:
    low = None if rank == "full" else 1
    return {
        "w": (psd(3, low), psd(5 if case == "joined" else 4, low)),
        "b": (psd(3, low, seed=0),),
        "exact": (psd(4, low, seed=9),),
        "scalar": (psd(1, seed=3),),
        "one": (psd(1, seed=1), psd(1, seed=2)),
        "swapped": (psd(3, low, seed=4), psd(4, low, seed=5)),
    }


def explicit(case: str, factors: dict[str, tuple[Tensor, ...]]) -> dict[tuple[str, ...], Tensor]:
    """The blocks, entry by entry in the order of ``p.flatten()``."""
    B, A = factors["w"]
    w = torch.kron(B, A)
    blocks: dict[tuple[str, ...], Tensor] = {}
    if case == "joined":
        order = [5 * o + k for o in range(3) for k in range(4)] + [5 * o + 4 for o in range(3)]
        blocks["w", "b"] = w[order][:, order]
    else:
        blocks["w",], blocks["b",] = w, factors["b"][0]
    order = [4 * o + 2 * i + k for i in range(2) for o in range(3) for k in range(2)]
    swapped = torch.kron(*factors["swapped"])[order][:, order]
    blocks |= {("exact",): factors["exact"][0], ("scalar",): factors["scalar"][0]}
    return blocks | {("one",): torch.kron(*factors["one"]), ("swapped",): swapped}


def vectors(*lead: int) -> dict[str, Tensor]:
    return {name: torch.randn((*lead, *shape), dtype=F64) for name, shape in SHAPES.items()}


def product(blocks: dict[tuple[str, ...], Tensor], tree: dict[str, Tensor]) -> dict[str, Tensor]:
    results = {}
    for names, K in blocks.items():
        lead = tree[names[0]].shape[: tree[names[0]].ndim - len(SHAPES[names[0]])]
        flat = torch.cat([tree[n].reshape(*lead, -1) for n in names], -1) @ K
        sizes = [torch.Size(SHAPES[n]).numel() for n in names]
        results |= {n: t.reshape((*lead, *SHAPES[n])) for n, t in zip(names, flat.split(sizes, -1), strict=True)}
    return {name: results[name] for name in tree}


def damped(blocks: dict[tuple[str, ...], Tensor], damping: float) -> dict[tuple[str, ...], Tensor]:
    return {names: K + damping * torch.eye(len(K), dtype=K.dtype) for names, K in blocks.items()}


def matrix_power(K: Tensor, p: float) -> Tensor:
    values, U = torch.linalg.eigh(K)
    return (U * values**p) @ U.mT


def shifted_factors(factors: dict[str, tuple[Tensor, ...]], damping: float) -> dict[str, tuple[Tensor, ...]]:
    """Martens and Grosse's, factor by factor."""
    results = {}
    for name, own in factors.items():
        shifts = [damping]
        if len(own) == 2:
            B, A = own
            pi = ((B.trace() / len(B)) / (A.trace() / len(A))) ** 0.5
            shifts = [pi * damping**0.5, damping**0.5 / pi]
        results[name] = tuple([F + s * torch.eye(len(F), dtype=F64) for F, s in zip(own, shifts, strict=True)])
    return results


# --- equal to dense matrices ------------------------------------------------------------------------------------------

every = pytest.mark.parametrize(("case", "rank"), [(c, r) for c in CASES for r in RANKS])


@every
def test_the_matrices_themselves(case: str, rank: str) -> None:
    factors = make(case, rank)
    K, blocks = kronecker.decompose(factors, STRUCTURE), explicit(case, factors)
    assert_close(kronecker.dense(K), blocks)
    assert_close(kronecker.trace(K), {names: M.trace() for names, M in blocks.items()})
    ones = {name: torch.ones(shape, dtype=F64) for name, shape in SHAPES.items()}
    assert_close(kronecker.diagonal(K), product({n: M.diag().diag() for n, M in blocks.items()}, ones))
    for lead in ((), (4,), (2, 3)):
        v = vectors(*lead)
        assert_close(kronecker.matmul(K, v), product(blocks, v))


@every
@pytest.mark.parametrize("split", ["exact", "pi"])
@pytest.mark.parametrize("p", [-1, -0.5, 0.5, 1, 2, -2.5])
def test_powers(case: str, rank: str, split: str, p: float) -> None:
    factors, damping = make(case, rank), 0.3
    K = kronecker.decompose(factors, STRUCTURE)
    if split == "exact":
        blocks = damped(explicit(case, factors), damping)
    else:
        blocks = explicit(case, shifted_factors(factors, damping))
    want = {names: matrix_power(M, p) for names, M in blocks.items()}
    got = kronecker.power(K, p, damping=damping, split=split)
    assert_close(kronecker.dense(got), want)
    v = vectors(2)
    assert_close(kronecker.matmul(got, v), product(want, v))
    if p == -1:
        assert_close(kronecker.solve(K, v, damping=damping, split=split), product(want, v))
        assert_close(kronecker.dense(kronecker.inverse(K, damping=torch.tensor(damping), split=split)), want, rtol=1e-7)
        logdets = {names: torch.logdet(M) for names, M in blocks.items()}
        assert_close(kronecker.logdet(K, damping=damping, split=split), logdets)


@pytest.mark.parametrize("case", CASES)
def test_powers_without_damping(case: str) -> None:
    factors = make(case)
    K = kronecker.decompose(factors, STRUCTURE)
    inverse = {names: torch.linalg.inv(M) for names, M in explicit(case, factors).items()}
    assert_close(kronecker.dense(kronecker.inverse(K)), inverse, rtol=1e-8)
    assert_close(kronecker.dense(kronecker.inverse(kronecker.inverse(K))), explicit(case, factors), rtol=1e-8)
    deficient = kronecker.decompose(make(case, "deficient"), STRUCTURE)
    root = kronecker.power(deficient, 0.5)
    assert_close(kronecker.dense(kronecker.power(root, 2)), explicit(case, make(case, "deficient")))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("split", ["exact", "pi"])
def test_samples_have_the_inverse_as_covariance(case: str, split: str) -> None:
    factors, num, damping = make(case, "deficient"), 100_000, 0.5
    K = kronecker.decompose(factors, STRUCTURE)
    draws = kronecker.sample(K, num, damping=damping, split=split, generator=torch.Generator().manual_seed(1))
    again = kronecker.sample(K, num, damping=damping, split=split, generator=torch.Generator().manual_seed(1))
    assert_close(draws, again, rtol=0.0)
    for names, C in kronecker.dense(kronecker.inverse(K, damping=damping, split=split)).items():
        flat = torch.cat([draws[n].reshape(num, -1) for n in names], 1)
        # the entries of the sample covariance have variance (C_ij² + C_ii C_jj) / num, those of the mean C_ii / num
        deviation = ((C.square() + torch.outer(C.diag(), C.diag())) / num).sqrt()
        assert ((flat.mT @ flat / num - C).abs() < 5 * deviation).all()
        assert (flat.mean(0).abs() < 5 * (C.diag() / num).sqrt()).all()


def test_interpolation() -> None:
    old, new = make("joined"), make("joined", "deficient")
    want = {name: tuple([0.7 * a + 0.3 * b for a, b in zip(old[name], new[name], strict=True)]) for name in old}
    for weight in (0.3, torch.tensor(0.3, dtype=F64)):
        assert_close(kronecker.interpolate(old, new, weight), want)
    assert_close(kronecker.interpolate(old, new, 0), old, rtol=0.0)
    assert_close(kronecker.interpolate(old, new, 1), new, rtol=0.0)


# --- precision --------------------------------------------------------------------------------------------------------


def conditioned(n: int, condition: float, seed: int) -> Tensor:
    U = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=torch.Generator().manual_seed(seed)))[0]
    F = (U * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=F64)) @ U.mT
    return ((F + F.mT) / 2).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damping", [0.0, 1e-14, 1e-12, 1e-9, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize(
    "conditions", [(1, 1), (1e2, 1e3), (1e4, 1e4), (1e6, 1e6), (1e12, 1), (1e8, 1e4), (1, 1e12), (1e12, 1e12)]
)
@pytest.mark.parametrize("split", ["exact", "pi"])
def test_inverses_of_single_precision_are_right_or_refused(
    conditions: tuple[float, float], damping: float, dtype: torch.dtype, split: str
) -> None:
    """Relative residuals below 1e-3, also where the condition number is 1e12 and more."""
    structure = Structure((Layout("w", (12, 9), torch.float32),))
    B, A = conditioned(12, conditions[0], 1), conditioned(9, conditions[1], 2)
    K = kronecker.decompose({"w": (B, A)}, structure, dtype=dtype)
    v = torch.randn(12, 9, dtype=F64, generator=torch.Generator().manual_seed(3))
    try:
        x = kronecker.solve(K, {"w": v}, damping=damping, split=split)["w"]
    except ValueError as error:
        least = float(re.findall(r"at least ([\d.e+-]+)", str(error))[0])
        assert least > damping
        x = kronecker.solve(K, {"w": v}, damping=(damping := least), split=split)["w"]
    B, A = B.double(), A.double()
    if split == "pi":
        B, A = shifted_factors({"w": (B, A)}, damping)["w"]
    residual = B @ x @ A + (damping * x if split == "exact" else 0) - v
    assert residual.norm() < 1e-3 * v.norm()


def test_most_of_double_precision_is_used() -> None:
    """What is refused is not what could be had."""
    structure = Structure((Layout("w", (12, 9), torch.float32),))
    B, A = conditioned(12, 1e5, 1), conditioned(9, 1e5, 2)
    kronecker.inverse(kronecker.decompose({"w": (B, A)}, structure))  # a condition number of 1e10
    kronecker.inverse(kronecker.decompose({"w": (B, conditioned(9, 1e12, 2))}, structure), damping=1e-6)


@pytest.mark.parametrize("fails", ["raises", "is not finite"])
def test_single_precision_is_tried_again(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eigh, asked = torch.linalg.eigh, []

    def failing(S: Tensor) -> Any:
        asked.append(S.dtype)
        if S.dtype == torch.float32:
            if fails == "raises":
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return torch.full((len(S),), torch.nan), S
        return eigh(S)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    factors = optree.tree_map(lambda t: t.float(), make("joined"))
    K = kronecker.decompose(factors, STRUCTURE, dtype=torch.float32)
    assert asked[:2] == [torch.float32, torch.float64]
    assert {t.dtype for t in optree.tree_leaves(K)} == {torch.float32}
    got = kronecker.dense(K)
    assert_close(got, optree.tree_map(lambda t: t.float(), explicit("joined", make("joined"))), rtol=1e-5)


def test_types() -> None:
    """Products have the types of the vectors, what is per parameter that of the parameters, matrices that of the decomposition."""
    structure = Structure((Layout("w", (3, 4), torch.float32),))
    K = kronecker.decompose({"w": (psd(3).float(), psd(4).float())}, structure)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert kronecker.matmul(K, {"w": torch.ones(3, 4, dtype=dtype)})["w"].dtype == dtype
    assert kronecker.diagonal(K)["w"].dtype == torch.float32
    assert kronecker.sample(K, damping=1.0)["w"].dtype == torch.float32
    assert kronecker.dense(K)["w",].dtype == kronecker.trace(K)["w",].dtype == torch.float64


# --- as a value -------------------------------------------------------------------------------------------------------


def test_it_is_a_tree_and_can_be_saved() -> None:
    K = kronecker.inverse(kronecker.decompose(make("joined"), STRUCTURE), damping=0.1)
    K = [K, kronecker.decompose(make("joined"), STRUCTURE)]
    for tree_map in (optree.tree_map, pytree.tree_map):
        doubled = tree_map(lambda t: 2 * t, K)
        assert [type(d) for d in doubled] == [kronecker.Decomposition] * 2
        for d, k in zip(doubled, K, strict=True):
            assert_close(d.values, tuple([2 * v for v in k.values]))
            assert (d.structure, d.blocks) == (k.structure, k.blocks)
    file = io.BytesIO()
    torch.save(K, file)
    file.seek(0)
    v = vectors()
    for before, after in zip(K, torch.load(file, weights_only=True), strict=True):
        assert after.structure == before.structure
        assert_close(kronecker.matmul(after, v), kronecker.matmul(before, v), rtol=0.0)


def test_nothing_is_changed() -> None:
    factors = make("joined")
    before = optree.tree_map(torch.clone, factors)
    K = kronecker.decompose(factors, STRUCTURE)
    leaves = optree.tree_map(torch.clone, optree.tree_leaves(K))
    kronecker.sample(K, damping=0.1)
    kronecker.solve(K, vectors(), damping=0.1, split="pi")
    kronecker.interpolate(factors, make("joined", "deficient"), 0.5)
    assert_close(factors, before, rtol=0.0)
    assert_close(optree.tree_leaves(K), leaves, rtol=0.0)


# --- transformations --------------------------------------------------------------------------------------------------


def everything(factors: Any, v: Any, damping: Any) -> Any:
    K = kronecker.decompose(factors, FEW)
    inverse = kronecker.inverse(K, damping=damping)
    step = kronecker.solve(K, v, damping=damping, split="pi")
    logdet = sum(kronecker.logdet(K, damping=damping).values())
    return inverse, step, logdet, kronecker.diagonal(inverse), kronecker.interpolate(factors, factors, 0.5)


FEW = Structure(LAYOUTS[:3])


def few(tree: Any) -> Any:
    return {name: tree[name] for name in FEW.names}


def test_compiled() -> None:
    """Without other code for other values."""
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for damping in (0.1, 0.2):
            given = few(make("joined")), few(vectors()), torch.tensor(damping, dtype=F64)
            got, want = compiled(*given), everything(*given)
            assert type(got[0]) is kronecker.Decomposition
            assert (got[0].structure, got[0].blocks) == (want[0].structure, want[0].blocks)
            assert_close(kronecker.dense(got[0]), kronecker.dense(want[0]))
            assert_close(got[1:], want[1:])


def test_compiled_with_a_decomposition_as_argument() -> None:
    torch._dynamo.reset()
    K, v = kronecker.decompose(few(make("joined")), FEW), few(vectors())
    step = torch.compile(
        lambda K, v: (kronecker.solve(K, v, damping=0.1), kronecker.sample(K, 3, damping=0.1)),
        fullgraph=True,
        backend="aot_eager",
    )
    solved, drawn = step(K, v)
    assert_close(solved, kronecker.solve(K, v, damping=0.1))
    assert drawn["w"].shape == (3, 3, 2, 2)
    assert not torch.equal(step(K, v)[1]["w"], drawn["w"])


def test_where_values_are_hidden_garbage_is_not_a_number() -> None:
    """Compiled code cannot raise for values; what would be an error is NaN."""
    structure, good = Structure((Layout("w", (2, 2), F64), Layout("v", (2, 2), F64))), torch.eye(2, dtype=F64)
    v = {"w": good, "v": good}
    bad: list[tuple[Tensor, float, str]] = [
        (torch.diag(torch.tensor([1.0, 0.0], dtype=F64)), 0.0, "at least"),
        (torch.diag(torch.tensor([1.0, -1.0], dtype=F64)), 0.0, "not positive semi-definite"),
        (good * torch.nan, 0.0, "not finite"),
        (good + torch.ones(2, 2, dtype=F64).triu(1), 0.0, "not symmetric"),
        (good, -1.0, "damping must be finite and not negative"),
    ]

    def step(F: Tensor, damping: Tensor) -> Any:
        factors = {"w": (F, good), "v": (good, good)}
        return kronecker.solve(kronecker.decompose(factors, structure), v, damping=damping)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for F, delta, message in bad:
        damping = torch.tensor(delta, dtype=F64)
        with pytest.raises(ValueError, match=message):
            step(F, damping)
        mapped = torch.func.vmap(step)(torch.stack([good, F]), damping.expand(2))
        for found in (compiled(F, damping), optree.tree_map(lambda t: t[1], mapped)):
            assert found["w"].isnan().any()
            assert found["v"].isnan().any() == (delta < 0)


def test_ensembles() -> None:
    both = [make("joined"), make("joined", "deficient")]
    v = [vectors(), vectors()]
    stack = lambda trees: optree.tree_map(lambda *t: torch.stack(t), *trees)
    step = lambda f, v: kronecker.solve(kronecker.decompose(f, STRUCTURE), v, damping=0.1)
    got = torch.func.vmap(step)(stack(both), stack(v))
    assert_close(got, stack([step(f, w) for f, w in zip(both, v, strict=True)]))


# --- bad input --------------------------------------------------------------------------------------------------------


def of(B: Tensor, A: Tensor) -> Any:
    return {"w": (B, A)}, Structure((Layout("w", (2, 3), F64),))


def eye(n: int) -> Tensor:
    return torch.eye(n, dtype=F64)


def test_factors_of_other_parameters() -> None:
    factors = make("separate")
    with pytest.raises(ValueError, match=r"factors is of other parameters.*lacks \['b'\] and has \['c'\]"):
        kronecker.decompose({("c" if n == "b" else n): f for n, f in factors.items()}, STRUCTURE)
    with pytest.raises(TypeError, match="factors must be a dictionary by parameter name, got list"):
        kronecker.decompose(list(factors.values()), STRUCTURE)
    with pytest.raises(ValueError, match=r"'w' have the shapes \[\(3, 3\), \(6, 6\)\].*parameter of shape \(3, 2, 2\)"):
        kronecker.decompose(factors | {"w": (eye(3), eye(6))}, STRUCTURE)
    with pytest.raises(ValueError, match=r"'w' have the shapes \[\(4, 4\), \(3, 3\)\]"):  # the other way round
        kronecker.decompose(factors | {"w": (eye(4), eye(3))}, STRUCTURE)
    with pytest.raises(ValueError, match=r"'swapped' have the shapes \[\(2, 2\), \(6, 6\)\]"):
        kronecker.decompose(factors | {"swapped": (eye(2), eye(6))}, STRUCTURE)
    with pytest.raises(ValueError, match="no bias that is only beside it"):
        kronecker.decompose(factors | {"one": (eye(1), eye(2))}, STRUCTURE)
    with pytest.raises(TypeError, match="factors of parameter 'one' must be a tuple of one or two tensors"):
        kronecker.decompose(factors | {"one": eye(1)}, STRUCTURE)
    with pytest.raises(TypeError, match=r"kronecker.structure\(model_fn, params, X\), got dict"):
        kronecker.decompose(factors, SHAPES)  # type: ignore[arg-type]


def test_vectors_of_other_parameters() -> None:
    K = kronecker.decompose(make("joined"), STRUCTURE)
    with pytest.raises(ValueError, match="vectors is of other parameters"):
        kronecker.matmul(K, {n: v for n, v in vectors().items() if n != "w"})
    with pytest.raises(ValueError, match=r"vectors has \(4, 3\) for parameter 'w'; \[\.\.\., \*\(3, 2, 2\)\]"):
        kronecker.matmul(K, vectors() | {"w": torch.ones(4, 3)})
    with pytest.raises(ValueError, match="different leading axes for parameters that are one block"):
        kronecker.matmul(K, vectors() | {"b": torch.ones(2, 3, dtype=F64)})


@pytest.mark.parametrize("damping", [-1e-9, float("nan"), float("inf"), torch.tensor(-1.0)])
def test_bad_damping(damping: Any) -> None:
    K = kronecker.decompose(make("joined"), STRUCTURE)
    for function in (kronecker.inverse, kronecker.logdet, kronecker.sample):
        with pytest.raises(ValueError, match="damping must be finite and not negative, got"):
            function(K, damping=damping)
    with pytest.raises(ValueError, match="tensor without axes, got shape"):
        kronecker.inverse(K, damping=torch.ones(2))
    with pytest.raises(TypeError, match="damping must be a number"):
        kronecker.inverse(K, damping="1")  # type: ignore[arg-type]


@every
@pytest.mark.parametrize("split", ["exact", "pi"])
def test_singular_factors_without_damping(case: str, rank: str, split: str) -> None:
    K = kronecker.decompose(make(case, rank), STRUCTURE)
    if rank == "full":
        kronecker.inverse(K, split=split)
        return
    names = "'w' and 'b'" if case == "joined" else "'w'"
    for function in (kronecker.inverse, kronecker.logdet, kronecker.sample):
        with pytest.raises(ValueError, match=f"the block of parameter {names} has eigenvalues from .*at least") as info:
            function(K, split=split)
    needed = float(re.findall(r"at least ([\d.e+-]+) would do", str(info.value))[0])
    assert 0 < needed < 1e-6
    for _ in range(len(LAYOUTS)):  # another block may need more
        try:
            kronecker.inverse(K, damping=needed, split=split)
            break
        except ValueError as error:
            needed = float(re.findall(r"at least ([\d.e+-]+) would do", str(error))[0])
    else:
        pytest.fail("no damping did")


def test_zero_factors() -> None:
    K = kronecker.decompose(*of(torch.zeros(2, 2, dtype=F64), eye(3)))
    for split in ("exact", "pi"):
        with pytest.raises(ValueError, match="'w' is zero, so with damping 0 it has no inverse. Any positive damping"):
            kronecker.inverse(K, split=split)
    with pytest.raises(ValueError, match="'w' is zero.*split=\"exact\" would do"):
        kronecker.inverse(K, damping=0.1, split="pi")
    v = torch.ones(2, 3, dtype=F64)
    assert_close(kronecker.solve(K, {"w": v}, damping=0.1)["w"], 10 * v)


@pytest.mark.parametrize("number", [0, 1])
def test_factors_that_are_no_second_moments(number: int) -> None:
    good = [eye(2), eye(3)]

    def bad(F: Tensor) -> Any:
        return of(*[F if i == number else G for i, G in enumerate(good)])

    F = good[number].clone()
    F[0, 0] = -2.0
    with pytest.raises(
        ValueError, match=f"factor {number} of parameter 'w' is not positive semi-definite.*damping of at least 2.2e"
    ):
        kronecker.decompose(*bad(F))
    for value in (float("nan"), float("inf")):
        F[0, 0] = value
        with pytest.raises(ValueError, match=f"factor {number} of parameter 'w'.*not finite"):
            kronecker.decompose(*bad(F))
    F = good[number].clone()
    F[0, 1] = 0.5
    with pytest.raises(ValueError, match=f"factor {number} of parameter 'w'.*not symmetric.*up to 0.5"):
        kronecker.decompose(*bad(F))
    with pytest.raises(TypeError, match="real floating-point"):
        kronecker.decompose(*bad(good[number].long()))


def test_other_bad_arguments() -> None:
    factors = make("joined")
    K = kronecker.decompose(factors, STRUCTURE)
    with pytest.raises(ValueError, match='split must be "exact" or "pi"'):
        kronecker.inverse(K, damping=1.0, split="half")
    with pytest.raises(ValueError, match='split="pi" damps the factors.*power was taken'):
        kronecker.inverse(kronecker.power(K, 2), damping=1.0, split="pi")
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64"):
        kronecker.decompose(factors, STRUCTURE, dtype=torch.float16)
    for weight in (-0.1, 1.1, float("nan"), torch.tensor(2.0)):
        with pytest.raises(ValueError, match="weight must be a number from 0 to 1"):
            kronecker.interpolate(factors, factors, weight)
    with pytest.raises(ValueError, match="different trees"):
        kronecker.interpolate(factors, {n: f for n, f in factors.items() if n != "b"}, 0.5)
    with pytest.raises(ValueError, match=r"w.1 has shape \(5, 5\) in old and \(4, 4\) in new"):
        kronecker.interpolate(factors, make("separate"), 0.5)
    with pytest.raises(ValueError, match="b.0 of new has entries that are not finite"):
        kronecker.interpolate(factors, factors | {"b": (torch.nan * eye(3),)}, 0.5)


# --- diagonals --------------------------------------------------------------------------------------------------------


def test_a_diagonal_is_its_own_basis() -> None:
    diagonal = {name: torch.rand(shape, dtype=F64) for name, shape in SHAPES.items()}
    D = kronecker.of_diagonal(diagonal, STRUCTURE)
    blocks = {(name,): d.flatten().diag() for name, d in diagonal.items()}
    assert_close(kronecker.dense(D), blocks)
    assert_close(kronecker.diagonal(D), diagonal)
    assert_close(kronecker.trace(D), {(name,): d.sum() for name, d in diagonal.items()})
    for lead in ((), (2, 3)):
        v = vectors(*lead)
        assert_close(kronecker.solve(D, v, damping=0.3), {name: v[name] / (d + 0.3) for name, d in diagonal.items()})
    assert_close(kronecker.logdet(D, damping=0.3), {(name,): (d + 0.3).log().sum() for name, d in diagonal.items()})
    draws = kronecker.sample(D, 20_000, damping=0.3, generator=torch.Generator().manual_seed(0))
    assert_close({n: t.square().mean(0) for n, t in draws.items()}, {n: 1 / (d + 0.3) for n, d in diagonal.items()}, rtol=0.05)


def test_what_is_no_diagonal() -> None:
    diagonal = {name: torch.ones(shape, dtype=F64) for name, shape in SHAPES.items()}
    with pytest.raises(ValueError, match="diagonal is of other parameters than the structure: it lacks .'w'."):
        kronecker.of_diagonal({n: d for n, d in diagonal.items() if n != "w"}, STRUCTURE)
    with pytest.raises(
        ValueError, match=r"the diagonal of parameter 'b' is torch.float64 \(4,\); real numbers of shape \(3,\)"
    ):
        kronecker.of_diagonal({**diagonal, "b": torch.ones(4, dtype=F64)}, STRUCTURE)
    for bad in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="the diagonal of parameter 'b' has entries that are negative or not finite"):
            kronecker.of_diagonal({**diagonal, "b": torch.full((3,), bad, dtype=F64)}, STRUCTURE)
    D = kronecker.of_diagonal({n: 0 * d for n, d in diagonal.items()}, STRUCTURE)
    with pytest.raises(ValueError, match=r"the block of parameter 'w' is zero.*Any positive damping would do"):
        kronecker.inverse(D)
    with pytest.raises(ValueError, match="has no eigenbasis but its own"):
        kronecker.EKFAC(decomposition=D).operands(STRUCTURE.names)
    with pytest.raises(ValueError, match="these eigenvalues are none"):
        kronecker.inverse(D, damping=1.0, split="pi")
