"""What every quantity of a program is, by plain autograd: no vmap, no torch.func, one sample and one column at a time.

With L = R sum_n l_n(f_n) and f = model(X) on the whole batch, everything follows from the gradient of one sample's term,
from the rows of the Jacobian of f, and from second derivatives by double backward. Samples that influence each other are no
exception: the term of sample n is differentiated through all that it depends on.

A checkpoint is the function that it runs. Plain autograd of a reentrant one is not: its first run is without a graph, and so
is what a module keeps from it, a table made of parameters for instance, whose gradient it then takes for zero.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvfunc import losses

__all__ = ["NoTruth", "Truth"]

Tree = dict[str, Tensor]


class NoTruth(Exception):
    """Plain autograd has no answer."""


def _weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    others = [d for d in range(v.ndim) if dim == -1 or d != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=dim != -1))


class Transparent:
    """A reentrant checkpoint as the function that it runs."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


class Truth:
    """The definitions at one point. ``values``: the parameters' values if not those that the model is made with."""

    def __init__(self, make: Callable[[], nn.Module], X: Tensor, y: Tensor, loss_fn: Any, values: Tree | None = None) -> None:
        self.make, self.X, self.y, self.loss_fn, self.values = make, X.clone(), y, loss_fn, values
        self.N = len(X)
        self.out, self.leaves = self._forward()
        self.names = list(self.leaves)

    def _forward(self) -> tuple[Tensor, dict[str, nn.Parameter]]:
        net = self.make()
        with torch.no_grad():
            for name, p in net.named_parameters():
                if self.values is not None:
                    p.copy_(self.values[name])
        # the fused kernels have no second derivative, and torch's weight norm a wrong one
        checkpoints = patch.object(torch.utils.checkpoint, "CheckpointFunction", Transparent)
        with sdpa_kernel(SDPBackend.MATH), patch.object(torch, "_weight_norm", _weight_norm), checkpoints:
            return net(self.X.clone()), dict(net.named_parameters())

    def term(self, out: Tensor, n: int) -> Tensor:
        """R l_n(f_n)."""
        fn = getattr(self.loss_fn, "func", self.loss_fn)
        total = fn(out[n : n + 1], self.y[n : n + 1], reduction="sum")
        if fn is not self.loss_fn:  # reduction="sum"
            return total
        return total / (out.numel() if fn is F.mse_loss else self.N)

    def _row(self, scalar: Callable[[Tensor], Tensor], out: Tensor, leaves: dict[str, nn.Parameter]) -> Tree:
        """The gradient of one scalar, by ``backward``, which checkpoints want."""
        for p in leaves.values():
            p.grad = None
        value = scalar(out)
        if not value.requires_grad:
            return {name: torch.zeros_like(p) for name, p in leaves.items()}
        value.backward(retain_graph=True)
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone() for name, p in leaves.items()}

    def flat(self, tree: Tree) -> Tensor:
        """All parameters side by side in the last axis."""
        lead = next(iter(tree.values())).ndim - next(iter(self.leaves.values())).ndim
        return torch.cat([tree[k].flatten(lead) if tree[k].ndim > lead else tree[k][..., None] for k in self.names], -1)

    def tree(self, flat: Tensor) -> Tree:
        """The inverse of `flat`."""
        parts = flat.split([p.numel() for p in self.leaves.values()], -1)
        return {k: t.reshape(t.shape[:-1] + self.leaves[k].shape) for k, t in zip(self.names, parts, strict=True)}

    # -- first order and Gauss-Newton

    @functools.cached_property
    def grads(self) -> Tensor:
        """[N, P]."""
        rows = [self._row(lambda out, n=n: self.term(out, n), self.out, self.leaves) for n in range(self.N)]
        return torch.stack([self.flat(row) for row in rows])

    @functools.cached_property
    def jacobian(self) -> Tensor:
        """[N, C, P]."""
        C = self.out[0].numel()
        rows = [
            self.flat(self._row(lambda out, n=n, c=c: out[n].reshape(-1)[c], self.out, self.leaves))
            for n in range(self.N)
            for c in range(C)
        ]
        return torch.stack(rows).reshape(self.N, C, -1)

    @functools.cached_property
    def root(self) -> Tensor:
        """[V, N, P], in the columns of the library's losses, whose squares are checked."""
        root = losses.exact_root(losses.normalize(self.loss_fn), self.out.detach(), self.y)
        S = root.columns(0, root.num).reshape(root.num, self.N, -1)
        for n in range(self.N):
            f = self.out.detach().clone().requires_grad_()
            (g,) = torch.autograd.grad(self.term(f, n), f, create_graph=True)
            rows = [torch.autograd.grad(x, f, retain_graph=True)[0][n].reshape(-1) for x in g[n].reshape(-1)]
            torch.testing.assert_close(S[:, n].mT @ S[:, n], torch.stack(rows), rtol=1e-10, atol=1e-12)
        return torch.einsum("ncp,vnc->vnp", self.jacobian, S)

    # -- second order

    def _double(self, scalar: Callable[[Tensor, Sequence[Tensor]], Tensor]) -> Tensor:
        """The gradient [P] of a scalar made of the outputs and the gradient of a term."""
        leaves = list(self.leaves.values())
        value = scalar(self.out, leaves)
        if not value.requires_grad:
            return torch.zeros(sum(p.numel() for p in leaves))
        rows = torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        return self.flat(dict(zip(self.names, rows, strict=True)))

    def _gradient(self, out: Tensor, samples: Sequence[int], leaves: Sequence[Tensor]) -> Tensor:
        """The gradient [P] of some terms, with a graph."""
        total = sum((self.term(out, n) for n in samples), torch.zeros(()))
        if not total.requires_grad:
            return torch.zeros(sum(p.numel() for p in leaves))
        rows = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True, materialize_grads=True)
        return self.flat(dict(zip(self.names, rows, strict=True)))

    def along(self, v: Tensor, samples: Sequence[int] | None = None) -> Tensor:
        """The Hessian of some terms times ``v`` [P]."""
        chosen = range(self.N) if samples is None else samples
        return self._double(lambda out, leaves: self._gradient(out, chosen, leaves) @ v)

    def each_along(self, v: Tensor) -> Tensor:
        """The Hessian of each term times ``v`` [N, P]."""
        return torch.stack([self.along(v, [n]) for n in range(self.N)])

    def weighted(self, weights: Tensor) -> Tensor:
        """The derivative [P] of the inner product of all samples' gradients with ``weights`` [N, P]."""
        return sum((self.along(weights[n], [n]) for n in range(self.N)), torch.zeros(()))

    @functools.cached_property
    def hessian(self) -> Tensor:
        """[P, P], row by row."""
        leaves = list(self.leaves.values())
        gradient = self._gradient(self.out, range(self.N), leaves)
        return torch.stack([self._double(lambda out, leaves, g=g: g) for g in gradient])

    @functools.cached_property
    def smooth(self) -> bool:
        """Whether plain autograd differentiates twice, to finite values."""
        try:
            return bool(self.hessian.isfinite().all())
        except (RuntimeError, NotImplementedError):
            return False

    # -- the quantities

    def quantity(self, name: str, picked: Sequence[int] | None = None, vector: Any = None) -> Any:
        """As the function of that name returns it."""
        index = list(range(self.N)) if picked is None else list(picked)
        g = self.grads[index]
        per = lambda t: self.tree(t)
        if name == "batch_grad":
            return per(g)
        if name == "batch_l2":
            return {k: t.reshape(len(t), -1).square().sum(1) for k, t in per(g).items()}
        if name == "sum_grad_squared":
            return per(g.square().sum(0))
        if name == "variance":
            return per(g.square().mean(0) - g.mean(0).square())
        if name == "batch_dot":
            return {k: (m := t.reshape(len(t), -1)) @ m.mT for k, t in per(g).items()}
        if name in ("diag_hessian", "hessian_vp", "hmp") and not self.smooth:
            raise NoTruth
        if name == "diag_hessian":
            return per(self.hessian.diagonal() if picked is None else self._diagonal(index))
        if name == "hessian_vp":
            return per(self.along(self.flat(vector), index))
        if name == "hmp":
            return self._blocks(self.hessian, vector)
        if name == "batch_jac":
            return {k: J.reshape(len(J), *self.out.shape[1:], *J.shape[2:]) for k, J in per(self.jacobian[index]).items()}
        if name == "ntk":
            J = {k: t.reshape(*t.shape[:2], -1) for k, t in per(self.jacobian[index]).items()}
            return {k: torch.einsum("ncp,mdp->ncmd", t, t) for k, t in J.items()}
        root = self.root[:, index]
        if name == "sqrt_ggn":
            return per(root)
        if name == "diag_ggn":
            return per(root.square().sum((0, 1)))
        if name == "batch_diag_ggn":
            return per(root.square().sum(0))
        if name == "ggn_gram":
            return {k: torch.einsum("vnp,wmp->vnwm", t.flatten(2) if t.ndim > 2 else t[..., None], t.flatten(2) if t.ndim > 2 else t[..., None]) for k, t in per(root).items()}  # fmt: skip
        if name == "ggn_vp":
            return per(torch.einsum("vnp,vnq,q->p", root, root, self.flat(vector)))
        if name == "ggnmp":
            return self._blocks(torch.einsum("vnp,vnq->pq", root, root), vector)
        raise AssertionError(name)

    def blocks(self, picked: Sequence[int]) -> Tree:
        """The exact block [P, P] of the Gauss-Newton matrix of each parameter."""
        root = self.tree(self.root[:, list(picked)])
        flat = {k: t.reshape(*t.shape[:2], -1) for k, t in root.items()}
        return {k: torch.einsum("vnp,vnq->pq", t, t) for k, t in flat.items()}

    def empirical_blocks(self, picked: Sequence[int]) -> Tree:
        """The exact block [P, P] of the empirical Fisher of each parameter, with R once."""
        fn = getattr(self.loss_fn, "func", self.loss_fn)
        terms = 1 if fn is not self.loss_fn else self.out.numel() if fn is F.mse_loss else self.N  # as in `term`
        flat = {k: g.reshape(len(g), -1) for k, g in self.tree(self.grads[list(picked)]).items()}
        return {k: terms * g.mT @ g for k, g in flat.items()}

    def _diagonal(self, index: Sequence[int]) -> Tensor:
        eye = torch.eye(self.grads.shape[1])
        return torch.stack([self.along(e, index) @ e for e in eye])

    def _blocks(self, matrix: Tensor, vectors: Tree) -> Tree:
        sizes = [p.numel() for p in self.leaves.values()]
        rows = matrix.split(sizes, 0)
        blocks = [row.split(sizes, 1)[i] for i, row in enumerate(rows)]
        return {
            k: (vectors[k].reshape(len(vectors[k]), -1) @ block).reshape(vectors[k].shape)
            for k, block in zip(self.names, blocks, strict=True)
        }
