"""The sweep: each differentiable operation of torch inside a model, against plain autograd one sample and column at a time.

There are two outcomes, right or refused. What is refused stands in `REFUSED` with its reason.
"""

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from operations import OPERATIONS, Operation
from torch import Tensor

import curvfunc
from curvfunc import BatchGrad, DiagGGN, compute

N, C = 3, 2
RTOL = 1e-8
Params = dict[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated in favor of"),
    pytest.mark.filterwarnings("ignore:index_reduce.* is in beta"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized"),
]


# -- models with an operation in it


class Placement(NamedTuple):
    """A model with the operation in it; ``truth`` is the same model for plain autograd."""

    model_fn: Callable[[Params, Tensor], Tensor]
    truth: Callable[[Params, Tensor], Tensor]
    params: Params
    X: Tensor
    y: Tensor


def placements(operation: Operation) -> list[str]:
    """On hidden features, the same under vmap over samples, and with each of the tensors being a parameter."""
    found = ["hidden", "batched"]
    if operation.at_zero:
        return found
    if len(operation.shapes) == 1 and not operation.weights:
        found.append("parameter 0")
    elif operation.broadcasts and len(operation.shapes) > 1:
        found += [f"parameter {k}" for k in range(len(operation.shapes))]
    return found


@cache
def placed(name: str, where: str) -> Placement:
    """Features h = x W before the operation, a linear layer after it, and parameters in its arguments.

    A "batched" model uses a parameter in a way that no rule covers, so that it runs under vmap over samples.
    """
    operation = OPERATIONS[name]
    random = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    own = [int(k) for k in where.split()[1:]]
    hidden = [k for k in range(len(operation.shapes)) if k not in own]
    sizes = [torch.Size(operation.shapes[k]).numel() for k in hidden]
    samples = [noise(N, *shape) for shape in operation.shapes]
    params = {f"weight{k}": noise(*shape) for k, shape in enumerate(operation.weights)}
    with torch.no_grad():
        width = operation.function(*samples, *params.values())[0].numel()
    params |= {f"own{k}": noise(1, *operation.shapes[k]) for k in own}
    params |= {"before": noise(2, sum(sizes) if hidden else width), "after": noise(width, C), "shift": noise(1)}
    if operation.at_zero:
        params["before"].zero_()
    sampled = torch.addcmul if where == "batched" else lambda out, x, shift: out + x * shift

    def model(function: Callable[..., Tensor]) -> Callable[[Params, Tensor], Tensor]:
        def model_fn(p: Params, x: Tensor) -> Tensor:
            tensors = [p.get(f"own{k}") for k in range(len(operation.shapes))]
            if hidden:
                for k, h in zip(hidden, (x @ p["before"]).split(sizes, 1), strict=True):
                    tensors[k] = h.reshape(len(x), *operation.shapes[k])
            z = function(*tensors, *[p[f"weight{k}"] for k in range(len(operation.weights))])
            z = z.reshape(len(z), -1)
            z = z if hidden else z * (x @ p["before"])
            return sampled(z @ p["after"], x[:, :1], p["shift"])

        return model_fn

    X, y = noise(N, 2), torch.tensor([0, 1, 1])
    return Placement(model(operation.function), model(operation.truth or operation.function), params, X, y)


def direction(params: Params) -> Params:
    random = torch.Generator().manual_seed(1)
    return {k: torch.randn(p.shape, generator=random, dtype=p.dtype) for k, p in params.items()}


def along(params: Params, t: float) -> Params:
    return {k: p + t * u for (k, p), u in zip(params.items(), direction(params).values(), strict=True)}


def inner(a: Params, b: Params) -> Tensor:
    return sum([(a[k] * b[k]).sum() for k in a], torch.zeros((), dtype=torch.float64))


# -- the truth, by plain autograd one sample and one column at a time; the loss is cross-entropy, a mean

LINEAR = ("after", "shift")  # in these the model is linear: their Hessian's diagonal is that of the GGN


def gradients(out: Tensor, leaves: list[Tensor], column: Tensor | None = None, graph: bool = False) -> list[Tensor]:
    if not out.requires_grad:
        return [torch.zeros_like(p) for p in leaves]
    return list(torch.autograd.grad(out, leaves, column, retain_graph=True, create_graph=graph, materialize_grads=True))


def first_order(p: Placement, params: Params) -> tuple[Params, Params]:
    """The gradients of the samples and the GGN's diagonal."""
    grads: list[list[Tensor]] = []
    ggn = [torch.zeros_like(t) for t in params.values()]
    for n in range(N):
        leaves = [t.clone().requires_grad_() for t in params.values()]
        out = p.truth(dict(zip(params, leaves, strict=True)), p.X[n : n + 1])
        probabilities = out.detach().softmax(1)[0]
        rows = [gradients(out, leaves, column[None]) for column in torch.eye(C, dtype=out.dtype)]
        column = probabilities - torch.eye(C, dtype=out.dtype)[p.y[n]]
        grads.append(gradients(out, leaves, column[None] / N))
        for c in range(C):
            for d in range(C):
                m = (probabilities[c] * (c == d) - probabilities[c] * probabilities[d]) / N
                ggn = [total + m * a * b for total, a, b in zip(ggn, rows[c], rows[d], strict=True)]
    stacked = [torch.stack(g) for g in zip(*grads, strict=True)]
    return dict(zip(params, stacked, strict=True)), dict(zip(params, ggn, strict=True))


def second_order(p: Placement, params: Params, diagonal: bool) -> tuple[Params, Params]:
    """The Hessian's product with `direction`, and its diagonal for all parameters but the last, linear ones."""
    product, diagonals = ({k: torch.zeros_like(t) for k, t in params.items()} for _ in range(2))
    for n in range(N):
        leaves = {k: t.clone().requires_grad_() for k, t in params.items()}
        loss = F.cross_entropy(p.truth(leaves, p.X[n : n + 1]), p.y[n : n + 1]) / N
        first = dict(zip(leaves, gradients(loss, list(leaves.values()), graph=True), strict=True))
        for k, h in zip(leaves, gradients(inner(first, direction(params)), list(leaves.values())), strict=True):
            product[k] += h
        for k in leaves.keys() - {*LINEAR} if diagonal else ():
            for i, entry in enumerate(first[k].reshape(-1)):
                diagonals[k].view(-1)[i] += gradients(entry, [leaves[k]])[0].reshape(-1)[i]
    return product, diagonals


STEP = 1e-5


def truth(name: str, where: str) -> dict[str, Any]:
    """What each of `QUANTITIES` should be; None where torch has no second derivative to compare with."""
    return _truth(name, "hidden" if where == "batched" else where)  # the same function of the same parameters


@cache
def _truth(name: str, where: str) -> dict[str, Any]:
    placement = placed(name, where)
    params = placement.params
    grads, ggn = first_order(placement, params)
    grads_there, ggn_there = first_order(placement, along(params, 0.2))
    both = [{k: torch.stack([a[k], b[k]]) for k in params} for a, b in ((grads, grads_there), (ggn, ggn_there))]
    known = {"batch_grad": grads, "diag_ggn": ggn, "vmap": {"grad": both[0], "ggn": both[1]}}
    try:
        product, diagonal = second_order(placement, params, diagonal=True)
        ahead, behind = (second_order(placement, along(params, t), diagonal=False)[0] for t in (STEP, -STEP))
    except RuntimeError as error:
        if "is not implemented" not in str(error):
            raise
        return known | dict.fromkeys(("diag_hessian", "hessian_vp", "grad", "jvp", "third"))
    third = (inner(ahead, direction(params)) - inner(behind, direction(params))) / (2 * STEP)
    diagonal |= {k: ggn[k] for k in LINEAR}
    return known | {"diag_hessian": diagonal, "hessian_vp": product, "grad": product, "jvp": product, "third": third}


def check_truth(name: str, where: str) -> list[str]:
    """What plain autograd says of first and second derivatives is what central differences say."""
    placement, want = placed(name, where), truth(name, where)
    params = placement.params
    v = direction(params)

    def loss(p: Params) -> Tensor:
        outs = [placement.truth(p, placement.X[n : n + 1]) for n in range(N)]
        return F.cross_entropy(torch.cat(outs), placement.y)

    def gradient(p: Params) -> Params:
        leaves = [t.clone().requires_grad_() for t in p.values()]
        return dict(zip(p, gradients(loss(dict(zip(p, leaves, strict=True))), leaves), strict=True))

    problems = []
    slope = (loss(along(params, STEP)) - loss(along(params, -STEP))) / (2 * STEP)
    total = inner({k: g.sum(0) for k, g in want["batch_grad"].items()}, v)
    if not abs(slope - total) <= 1e-6 * (1 + abs(total)):
        problems.append(f"truth, {where}: gradient {total}, by differences {slope}")
    if want["hessian_vp"] is not None:
        ahead, behind = gradient(along(params, STEP)), gradient(along(params, -STEP))
        error = difference({k: (ahead[k] - behind[k]) / (2 * STEP) for k in params}, want["hessian_vp"])
        if not error < 1e-4:
            problems.append(f"truth, {where}: the Hessian is off by {error:.1e} from differences")
    return problems


# -- what curvfunc says


def product_sum(function: Callable[[Params], Params], v: Params) -> Callable[[Params], Tensor]:
    return lambda p: inner({k: t.sum(0) if t.ndim > v[k].ndim else t for k, t in function(p).items()}, v)


def by_vmap(model_fn: Any, params: Params, X: Tensor, y: Tensor) -> Any:
    specs = {"grad": BatchGrad(), "ggn": DiagGGN()}
    there = along(params, 0.2)
    stacked = {k: torch.stack([params[k], there[k]]) for k in params}
    return torch.vmap(lambda p: compute(model_fn, p, X, y, specs))(stacked)


def by_grad(model_fn: Any, params: Params, X: Tensor, y: Tensor) -> Params:
    summed = product_sum(lambda p: curvfunc.batch_grad(model_fn, p, X, y), direction(params))
    return torch.func.grad(summed)(params)


def by_jvp(model_fn: Any, params: Params, X: Tensor, y: Tensor) -> Params:
    run = lambda p: curvfunc.batch_grad(model_fn, p, X, y)
    return {k: t.sum(0) for k, t in torch.func.jvp(run, (params,), (direction(params),))[1].items()}


def third_derivative(model_fn: Any, params: Params, X: Tensor, y: Tensor) -> Tensor:
    v = direction(params)
    summed = product_sum(lambda p: curvfunc.hessian_vp(model_fn, p, X, y, v), v)
    return inner(torch.func.grad(summed)(params), v)


QUANTITIES: dict[str, Callable[..., Any]] = {
    "batch_grad": curvfunc.batch_grad,
    "diag_ggn": curvfunc.diag_ggn,
    "diag_hessian": curvfunc.diag_hessian,
    "hessian_vp": lambda model_fn, params, X, y: curvfunc.hessian_vp(model_fn, params, X, y, direction(params)),
    "vmap": by_vmap,
    "grad": by_grad,
    "jvp": by_jvp,
    "third": third_derivative,
}


def difference(got: Any, want: Any) -> float:
    """The largest relative error of a parameter's values; small values count by the size of the others."""
    if isinstance(want, Tensor):
        return (got - want).abs().item() / (1 + want.abs().item())
    assert got.keys() == want.keys()
    if isinstance(next(iter(want.values())), dict):
        return max([difference(got[k], want[k]) for k in want])
    scale = 1e-3 * (max([w.norm().item() for w in want.values()]) + 1)
    return max([_error(got[k], want[k]) / max(want[k].norm().item(), scale) for k in want])


def _error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = (got - want).norm().item()
    return error if error == error else float("inf")


# -- the sweep

NO_SECOND_DERIVATIVE = dict.fromkeys(("diag_hessian", "hessian_vp", "grad", "third"), "is not implemented")
NO_FORWARD_MODE = {"jvp": "Trying to use forward AD"}
ALL = ("batch_grad", "diag_ggn", "diag_hessian", "hessian_vp", "vmap", "grad", "third")

# What is refused: ``{operation: {quantity: part of the message}}``. All of these torch refuses itself.
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("ctc_loss", "multi_margin_loss", "multilabel_margin_loss"), NO_SECOND_DERIVATIVE | NO_FORWARD_MODE),
    **dict.fromkeys(("grid_sample bilinear", "grid_sample nearest", "grid_sample bicubic", "grid_sample 3d"), NO_FORWARD_MODE),
    **dict.fromkeys(("huber_loss", "index_reduce", "ormqr", "soft_margin_loss", "torch.cholesky", "zeta"), NO_FORWARD_MODE),
    "conv_tbc": dict.fromkeys(ALL, "view size is not compatible") | NO_FORWARD_MODE,  # its backward pass, of strided cotangents
    "F.rrelu": {"vmap": "vmap: we do not yet support aten::rrelu_with_noise"},
    "gaussian_nll_loss": {"vmap": "data-dependent control flow"},
    "scatter_reduce prod": {"jvp": "wrong forward-mode derivative"},  # which is our message, in place of a wrong number
}


def outcome(name: str, where: str, quantity: str) -> tuple[str, str]:
    """("right", ""), ("refused", the message) or ("wrong", how)."""
    model_fn, _, params, X, y = placed(name, where)
    want = truth(name, where)[quantity]
    try:
        got = QUANTITIES[quantity](model_fn, params, X, y)
    except Exception as error:
        return "refused", f"{type(error).__name__}: {error}"
    if want is None:
        return "wrong", "there is a result where torch has no second derivative"
    error = difference(got, want)
    tolerance = 1e-4 if quantity == "third" else RTOL
    return ("right", "") if error < tolerance else ("wrong", f"relative error {error:.1e}")


def asked(operation: Operation, where: str) -> list[str]:
    """The quantities that tell something new: products run the model in one way only, and so does forward mode."""
    again = {"batched": ("hessian_vp", "third", "jvp")}.get(where, () if where == "hidden" else ("jvp",))
    unknown = () if operation.differences else ("jvp", "third")
    return [quantity for quantity in QUANTITIES if quantity not in (*again, *unknown)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_right_or_refused(name: str) -> None:
    operation, problems, refused = OPERATIONS[name], [], set()
    expected = REFUSED.get(name, {})
    for where in placements(operation):
        if operation.differences and where != "batched":
            problems += check_truth(name, where)
        for quantity in asked(operation, where):
            kind, message = outcome(name, where, quantity)
            if kind == "refused" and quantity in expected and expected[quantity] in message:
                refused.add(quantity)
            elif kind != "right":
                problems.append(f"{quantity}, {where}: {kind}, {message}")
    if name != "conv_tbc":  # whose backward pass refuses strided cotangents
        placement = placed(name, "hidden")
        report = curvfunc.check(placement.model_fn, placement.params, placement.X, placement.y, samples=1)
        problems += [] if report else [f"check: {report}"]
    problems += [f"{quantity}: no longer refused" for quantity in expected.keys() - refused]
    assert not problems, "\n".join(problems)


def test_the_sweep_is_large() -> None:
    assert len(OPERATIONS) >= 550
    assert REFUSED.keys() <= OPERATIONS.keys()
