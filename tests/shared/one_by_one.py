"""Truth by plain autograd, one sample and one entry at a time: no vmap, no torch.func, nothing of the engine."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import curvfunc as cf
from curvfunc import losses

__all__ = ["Truth", "disagreements", "truth", "verify"]


@dataclass
class Truth:
    """Derivatives of each sample.

    Attributes:
        J: Per parameter the Jacobian of the model's output, [N, C, *shape].
        gradient: Of the loss with respect to the output, [N, C].
        M: The loss Hessian with respect to the output, [N, C, C].
        H: The Hessian of each sample's term of the loss, [N, P, P] over all parameters.
        out: The model's output.
        loss_fn: The loss.
        y: Targets.
    """

    J: dict[str, Tensor]
    gradient: Tensor
    M: Tensor
    H: Tensor
    out: Tensor
    loss_fn: Any
    y: Tensor

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """[..., P] as one tensor per parameter."""
        sizes = [j[0, 0].numel() for j in self.J.values()]
        return {
            k: part.reshape(flat.shape[:-1] + j.shape[2:])
            for (k, j), part in zip(self.J.items(), flat.split(sizes, -1), strict=True)
        }

    def flat(self) -> Tensor:
        """The Jacobian [N, C, P]."""
        return torch.cat([j.flatten(2) if j.ndim > 2 else j[..., None] for j in self.J.values()], dim=2)

    def blocks(self, matrices: Tensor) -> dict[str, Tensor]:
        """The diagonal blocks [..., numel, numel] of [..., P, P]."""
        found, start = {}, 0
        for k, j in self.J.items():
            stop = start + j[0, 0].numel()
            found[k], start = matrices[..., start:stop, start:stop], stop
        return found

    def batch_grad(self) -> dict[str, Tensor]:
        return self.split(torch.einsum("ncp,nc->np", self.flat(), self.gradient))

    def ggn(self) -> Tensor:
        """Of each sample, [N, P, P]."""
        J = self.flat()
        return torch.einsum("ncp,ncd,ndq->npq", J, self.M, J)

    def root(self, mc_samples: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """The columns [V, N, *shape] of the GGN's root."""
        loss = losses.normalize(self.loss_fn)
        if mc_samples:
            root = losses.sampled_root(loss, self.out, self.y, mc_samples, generator)
        else:
            root = losses.exact_root(loss, self.out, self.y)
        columns = root.columns(0, root.num)
        columns = columns.reshape(*columns.shape[:2], -1)
        return self.split(torch.einsum("vnc,ncp->vnp", columns, self.flat()))


def truth(
    model_fn: Callable[..., Tensor],
    params: dict[str, Tensor],
    X: Any,
    y: Tensor,
    loss_fn: Any = F.cross_entropy,
    hessian: bool = True,
) -> Truth:
    """All derivatives. The loss is that of the whole batch with the outputs of the other samples held fixed."""
    num = len(optree.tree_leaves(X)[0])
    with sdpa_kernel(SDPBackend.MATH):
        rows = [_sample(model_fn, params, optree.tree_map(lambda x, n=n: x[n : n + 1], X)) for n in range(num)]
        out = torch.cat([o.detach() for o, _ in rows])
        J = {k: torch.stack([_jacobian(o, leaves[k]) for o, leaves in rows]) for k in params}
        first, second = _of_loss(loss_fn, out, y)
        H = [torch.zeros(0)]
        if hessian:
            H = []
            for n, (o, leaves) in enumerate(rows):
                whole = torch.cat([out[:n], o, out[n + 1 :]])
                H.append(_hessian(loss_fn(whole, y), list(leaves.values())))
    return Truth(J, first, second, torch.stack(H), out, loss_fn, y)


def _sample(model_fn: Callable[..., Tensor], params: dict[str, Tensor], x: Any) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = {k: p.detach().clone().requires_grad_() for k, p in params.items()}
    return model_fn(leaves, x), leaves


def _jacobian(out: Tensor, p: Tensor) -> Tensor:
    if not out.requires_grad:
        return p.new_zeros(out.numel(), *p.shape)
    return torch.stack(
        [torch.autograd.grad(o, p, retain_graph=True, materialize_grads=True, allow_unused=True)[0] for o in out.flatten()]
    )


def _of_loss(loss_fn: Any, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = out.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss_fn(leaf, y), leaf, create_graph=True)
    n, c = len(out), out[0].numel()
    second = torch.zeros(n, c, c, dtype=out.dtype)
    flat = first.reshape(n, c)
    for i in range(n):
        for j in range(c):
            if flat.requires_grad:
                (row,) = torch.autograd.grad(flat[i, j], leaf, retain_graph=True, materialize_grads=True)
                second[i, j] = row[i].flatten()
    return flat.detach(), second


def _hessian(value: Tensor, leaves: list[Tensor]) -> Tensor:
    if not value.requires_grad:
        return leaves[0].new_zeros([sum(p.numel() for p in leaves)] * 2)
    given: dict[str, Any] = {"materialize_grads": True, "allow_unused": True}
    first = torch.autograd.grad(value, leaves, create_graph=True, **given)
    rows = []
    for g in first:
        for unit in torch.eye(g.numel(), dtype=g.dtype):
            if g.requires_grad:
                row = torch.autograd.grad(g, leaves, unit.clone().reshape(g.shape), retain_graph=True, **given)
            else:
                row = tuple(torch.zeros_like(p) for p in leaves)
            rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows) if rows else leaves[0].new_zeros(0, 0)


def verify(
    model_fn: Callable[..., Tensor],
    params: dict[str, Tensor],
    X: Any,
    y: Tensor,
    *,
    loss_fn: Any = F.cross_entropy,
    rtol: float = 1e-9,
    hessian: bool = True,
) -> None:
    """Every quantity of the library against the truth. Kronecker factors: where there is one, which is then exact."""
    t = truth(model_fn, params, X, y, loss_fn, hessian)
    largest = {}
    for name, got, want in disagreements(model_fn, params, X, y, loss_fn, t, hessian):
        assert got.keys() == want.keys(), name
        scale = max((w.norm().item() for w in want.values()), default=0.0)
        for k, w in want.items():
            assert got[k].shape == w.shape, f"{name} of {k}: {tuple(got[k].shape)}, expected {tuple(w.shape)}"
            error = (got[k] - w).norm().item()
            if not error <= rtol * w.norm().item() + 1e-13 * scale + 1e-15:
                largest[f"{name} of {k}"] = error / (w.norm().item() or 1.0)
    assert not largest, largest


def disagreements(
    model_fn: Callable[..., Tensor], params: dict[str, Tensor], X: Any, y: Tensor, loss_fn: Any, t: Truth, hessian: bool = True
) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Tensor]]]:
    """Name, result and truth of every quantity."""
    given = (model_fn, params, X, y)

    def draws() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    def each(f: Callable[[Tensor], Tensor], values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: f(v) for k, v in values.items()}

    g = t.batch_grad()
    specs = (cf.BatchGrad(), cf.Grad(), cf.BatchL2(), cf.SumGradSquared(), cf.Variance(), cf.BatchDot())
    truths = (
        g,
        each(lambda g: g.sum(0), g),
        each(lambda g: _flat(g, 1).square().sum(1), g),
        each(lambda g: g.square().sum(0), g),
        each(lambda g: g.square().mean(0) - g.mean(0).square(), g),
        each(lambda g: _flat(g, 1) @ _flat(g, 1).mT, g),
    )
    for spec, want in zip(specs, truths, strict=True):
        yield f"{type(spec).__name__}", cf.compute(*given, spec, loss_fn=loss_fn), want
    for spec, got, want in zip(specs, cf.compute(*given, specs, loss_fn=loss_fn), truths, strict=True):
        yield f"{type(spec).__name__} with others", got, want
    ggn, root, drawn = t.ggn(), t.root(0, None), t.root(2, draws())
    blocks = t.blocks(ggn.sum(0))
    diagonal = ggn.diagonal(dim1=1, dim2=2)
    yield "diag_ggn", cf.diag_ggn(*given, loss_fn=loss_fn), t.split(diagonal.sum(0))
    yield "batch_diag_ggn", cf.batch_diag_ggn(*given, loss_fn=loss_fn), t.split(diagonal)
    yield "sqrt_ggn", cf.sqrt_ggn(*given, loss_fn=loss_fn), root
    yield "sqrt_ggn, chunks", cf.sqrt_ggn(*given, loss_fn=loss_fn, chunk_size=1), root
    sampled: dict[str, Any] = {"loss_fn": loss_fn, "mc_samples": 2}
    yield "diag_ggn, drawn", cf.diag_ggn(*given, **sampled, generator=draws()), each(lambda s: s.square().sum((0, 1)), drawn)
    yield "sqrt_ggn, drawn", cf.sqrt_ggn(*given, **sampled, generator=draws()), drawn
    gram = each(lambda s: torch.einsum("vnp,wmp->vnwm", _flat(s, 2), _flat(s, 2)), root)
    yield "ggn_gram", cf.ggn_gram(*given, loss_fn=loss_fn), gram
    exact = {k: f[0] for k, f in cf.kflr(*given, loss_fn=loss_fn).items() if len(f) == 1}
    yield "kflr", exact, {k: blocks[k] for k in exact}
    exact = {k: f[0] for k, f in cf.kfac(*given, **sampled, generator=draws()).items() if len(f) == 1}
    yield "kfac", exact, {k: torch.einsum("vnp,vnq->pq", _flat(drawn[k], 2), _flat(drawn[k], 2)) for k in exact}
    v = {k: torch.randn_like(p) for k, p in params.items()}
    flat = torch.cat([t.flatten() for t in v.values()])
    several = {k: torch.randn(2, *p.shape, dtype=p.dtype) for k, p in params.items()}
    yield "ggn_vp", cf.ggn_vp(*given, v, loss_fn=loss_fn), t.split(ggn.sum(0) @ flat)
    yield "jvp", {"": cf.jvp(model_fn, params, X, v)}, {"": (t.flat() @ flat).reshape(t.out.shape)}
    products = {k: f(several[k]) for k, f in cf.ggnmp(*given, loss_fn=loss_fn).items()}
    jacobian = cf.batch_jac(model_fn, params, X)
    yield "batch_jac", jacobian, {k: J.reshape(jacobian[k].shape) for k, J in t.J.items()}
    rows = each(lambda J: _flat(J, 2), t.J)
    yield "ntk", cf.ntk(model_fn, params, X), each(lambda J: torch.einsum("ncp,mdp->ncmd", J, J), rows)
    first, second = (optree.tree_map(lambda x, part=part: x[part], X) for part in (slice(None, 1), slice(1, None)))
    want = each(lambda J: torch.einsum("ncp,mdp->ncmd", J[:1], J[1:]), rows)
    yield "ntk of two batches", cf.ntk(model_fn, params, first, second), want
    yield "ggnmp", products, {k: (_flat(s, 1) @ blocks[k]).reshape(s.shape) for k, s in several.items()}
    if not hessian:
        return
    diagonal, blocks = t.H.diagonal(dim1=1, dim2=2), t.blocks(t.H.sum(0))
    yield "diag_hessian", cf.diag_hessian(*given, loss_fn=loss_fn), t.split(diagonal.sum(0))
    yield "batch_diag_hessian", cf.batch_diag_hessian(*given, loss_fn=loss_fn), t.split(diagonal)
    signs = draws()
    z = torch.stack([2 * torch.randint(0, 2, flat.shape, generator=signs) - 1 for _ in range(2)]).to(flat.dtype)
    numel = {k: params[k].numel() for k in sorted(params)}  # the order of draws
    drawn = dict(zip(numel, z.split(list(numel.values()), 1), strict=True))
    z = torch.cat([drawn[k] for k in params], 1)
    estimate = (z * torch.einsum("npq,mq->nmp", t.H, z)).mean(1)
    yield "diag_hessian, drawn", cf.diag_hessian(*given, **sampled, generator=draws()), t.split(estimate.sum(0))
    yield "batch_diag_hessian, drawn", cf.batch_diag_hessian(*given, **sampled, generator=draws()), t.split(estimate)
    yield "hessian_vp", cf.hessian_vp(*given, v, loss_fn=loss_fn), t.split(t.H.sum(0) @ flat)
    products = {k: f(several[k]) for k, f in cf.hmp(*given, loss_fn=loss_fn).items()}
    yield "hmp", products, {k: (_flat(s, 1) @ blocks[k]).reshape(s.shape) for k, s in several.items()}


def _flat(t: Tensor, lead: int) -> Tensor:
    """[*lead, *shape] as [*lead, numel]."""
    return t.reshape(*t.shape[:lead], -1)
