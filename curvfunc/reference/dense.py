"""What every quantity is made of: J, dL, M and its root S, and H, all dense. The notation is that of the package."""

from collections.abc import Callable, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from curvfunc import losses

__all__ = [
    "Indices",
    "LossFn",
    "ModelFn",
    "TwiceDifferentiable",
    "as_tree",
    "curvature",
    "gradient",
    "hessian",
    "jacobian",
    "outputs",
    "pick",
    "picked",
    "root",
    "sample",
    "side_by_side",
]

ModelFn = Callable[[Any, Any], Tensor]
LossFn = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor | None


def sample(X: Any, n: int) -> Any:
    """Sample n, as a batch of one."""
    return optree.tree_map(lambda x: x[n : n + 1], X)


def picked(N: int, subsampling: Indices) -> list[int]:
    """The samples to use, as numbers in 0 ... N - 1."""
    return torch.arange(N).tolist() if subsampling is None else torch.arange(N)[_index(subsampling)].tolist()


def pick(per_sample: Tensor, subsampling: Indices) -> Tensor:
    """The picked slices of axis 0."""
    return per_sample if subsampling is None else per_sample[_index(subsampling).to(per_sample.device)]


def _index(subsampling: Sequence[int] | Tensor) -> Tensor:
    return torch.as_tensor(subsampling, device="cpu")


def outputs(model_fn: ModelFn, params: Any, X: Any) -> Tensor:
    """Outputs ``[N, *out]``, one sample at a time."""
    return torch.cat([model_fn(params, sample(X, n)).detach() for n in range(len(optree.tree_leaves(X)[0]))])


def jacobian(model_fn: ModelFn, params: Any, X: Any) -> tuple[Tensor, Any]:
    """Outputs ``[N, *out]`` and the pytree of ``J [N, C, P]``, one sample at a time."""

    def output(params: Any, x: Any) -> tuple[Tensor, Tensor]:
        f = model_fn(params, x)
        return f.flatten(), f

    N = len(optree.tree_leaves(X)[0])
    # chunk_size=1 runs one backward pass per output entry without vmap: it needs no batching rule of any operation
    of_sample = jacrev(output, has_aux=True, chunk_size=1)
    jacobians, outputs = zip(*(of_sample(params, sample(X, n)) for n in range(N)), strict=True)
    return torch.cat(outputs), optree.tree_map(lambda *J: torch.stack([j.reshape(len(j), -1) for j in J]), *jacobians)


def root(loss_fn: LossFn, out: Tensor, y: Any, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Columns ``S [V, N, C]`` of the curvature of the loss."""
    loss = losses.normalize(loss_fn)
    if mc_samples == 0:
        S = losses.exact_root(loss, out, y)
    else:
        S = losses.sampled_root(loss, out, y, mc_samples, generator)
    return S.columns(0, S.num).reshape(S.num, len(out), -1)


def curvature(loss_fn: LossFn, out: Tensor, y: Any, mc_samples: int, generator: torch.Generator | None) -> Tensor:
    """Curvature ``M [N, C, C]`` of the loss, exact (``mc_samples=0``) or sampled."""
    if mc_samples == 0:
        N, C = len(out), out[0].numel()
        return torch.einsum("ncnd->ncd", torch.func.hessian(loss_fn)(out, y).reshape(N, C, N, C))
    S = root(loss_fn, out, y, mc_samples, generator)
    return torch.einsum("vnc,vnd->ncd", S, S)


def hessian(model_fn: ModelFn, params: Any, X: Any, y: Any, loss_fn: LossFn) -> Tensor:
    """``H [N, P, P]`` over the entries of all parameters side by side, by plain autograd: a sample and a row at a time.

    Sample n's part is the Hessian of the loss with the outputs of all other samples held fixed.
    """
    leaves, tree = optree.tree_flatten(params)
    leaves = [p.detach().requires_grad_() for p in leaves]
    N = len(optree.tree_leaves(X)[0])
    with torch.enable_grad(), TwiceDifferentiable():
        f = [model_fn(optree.tree_unflatten(tree, leaves), sample(X, n)) for n in range(N)]

        def of_sample(n: int) -> Tensor:
            out = torch.cat([f[m] if m == n else f[m].detach() for m in range(N)])
            slope = gradient(loss_fn(out, y), leaves, create_graph=True)
            return torch.stack([gradient(entry, leaves) for entry in slope])

        return torch.stack([of_sample(n) for n in range(N)])


def gradient(value: Tensor, leaves: Sequence[Tensor], create_graph: bool = False) -> Tensor:
    """Gradient ``[P]`` of a number by the entries of all leaves side by side; zero where it does not depend on them."""
    if not value.requires_grad:
        return side_by_side([torch.zeros_like(p) for p in leaves])
    grads = torch.autograd.grad(
        value, leaves, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return side_by_side(grads)


def side_by_side(params: Any) -> Tensor:
    """The entries of all parameters ``[P]``."""
    return torch.cat([p.reshape(-1) for p in optree.tree_leaves(params)])


def as_tree(flat: Tensor, params: Any) -> Any:
    """``[..., P]`` over the entries of all parameters, as a pytree of ``[..., *shape]``."""
    leaves, tree = optree.tree_flatten(params)
    parts = flat.split([p.numel() for p in leaves], dim=-1)
    return optree.tree_unflatten(tree, [part.reshape(part.shape[:-1] + p.shape) for part, p in zip(parts, leaves, strict=True)])


class TwiceDifferentiable(TorchFunctionMode):
    """Runs attention and weight norm by their definitions.

    In torch 2.13 the fused kernels of attention have no second derivative, and that of the kernel of weight norm is wrong.
    """

    def __enter__(self) -> "TwiceDifferentiable":
        self.attention = sdpa_kernel(SDPBackend.MATH)
        self.attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.attention.__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_weight_norm if func is torch._weight_norm else func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    return v * (g / v.square().sum(axes, keepdim=dim != -1).sqrt())
