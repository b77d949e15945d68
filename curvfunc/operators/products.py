"""Products with the model's Jacobian and with curvature matrices, none of which is ever formed.

Two kinds of functions:

- `hmp`, `ggnmp`, `pchmp` linearize once and return one function per parameter, the product with the parameter's
  diagonal block, which can be called again and again without another forward pass. (`curvfunc.operators` does the same
  for the whole matrix.)
- `hessian_vp`, `ggn_vp`, `fisher_vp`, `jvp`, `vjp` are pure functions of everything, for use under ``torch.func.vmap``,
  ``torch.func.grad`` and ``torch.compile``.

Attention runs by its mathematical definition (``SDPBackend.MATH``), since the fused kernels have no second derivative.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch

from curvfunc import losses
from curvfunc.engine import compiled, scripted
from curvfunc.engine.leaves import leaf, will_be_differentiated
from curvfunc.operators.linearization import (
    EmpiricalFisher,
    GaussNewton,
    Hessian,
    Jacobian,
    Problem,
    Product,
    batched,
    check_vector,
    differentiate,
    linearize,
    linearized,
    read_vector,
)
from curvfunc.operators.positive_curvature import PositiveCurvature
from curvfunc.tensors.docstrings import ARGUMENTS, documented, entries
from curvfunc.tensors.inputs import check_generator, explain_limits, flatten_params, read_batch
from curvfunc.tensors.ownership import apart, own
from curvfunc.tensors.samples import check_crosses
from curvfunc.tensors.samples import leaves as tensors_of

__all__ = ["fisher_vp", "ggn_vp", "ggnmp", "hessian_vp", "hmp", "jvp", "pchmp", "vjp"]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor

SHARED = ARGUMENTS | entries(
    """
    v: Vector, a pytree like ``params``, [*shape] per parameter, of its dtypes and devices.
    empirical: Whether it is the empirical Fisher.
    subsampling: Indices [M] of samples (a sequence or a tensor, repeats allowed): the matrix becomes the part R Σ_{n∈I} of
        these samples, R stays that of the whole batch, and the cost is that of the subset. A sample that is listed twice has
        the same Monte-Carlo draws both times.
    chunk_size: Number of vectors that are multiplied together; by default chosen by memory.
    """
)
_documented = documented(SHARED)


# -- diagonal blocks, linearized once


@_documented
def hmp(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Products with the diagonal blocks of the Hessian, v ↦ (∂²L / ∂p²) v for each parameter p.

    The model runs once, here. The functions hold on to its graph, about the memory of two backward passes, until the
    last of them is gone; they refuse to work (as autograd does) once a parameter that the graph needs was changed in
    place.

    Returns:
        A pytree like ``params`` with one function per parameter, which maps [V, *shape] to [V, *shape].

    Raises:
        ValueError: Also when a function gets the wrong shape or dtype.
        RuntimeError: When a function is called after a tensor that its graph needs was changed in place.
        NotImplementedError: Inside ``torch.func`` transforms and ``torch.compile``, which no function can leave.

    References:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian". BackPACK's ``HMP`` (``p.hmp``).

    Example:
        >>> import curvfunc
        >>> model_fn, params = curvfunc.functionalize(torch.nn.Linear(4, 3))
        >>> products = hmp(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)
        >>> products["weight"](torch.randn(5, 3, 4)).shape
        torch.Size([5, 3, 4])
    """
    return blocks("hmp", Hessian(), model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


@_documented
def ggnmp(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Products with the diagonal blocks of the generalized Gauss-Newton matrix, v ↦ R Σₙ Jₙᵀ ∇²ℓₙ Jₙ v per parameter.

    Jₙ is the Jacobian of sample n's output, ∇²ℓₙ the Hessian of its loss with respect to the output. Draws are made once, here.
    A loss need not be convex. The functions hold on to the graph of the model, as those of `hmp` do.

    Returns:
        A pytree like ``params`` with one function per parameter, which maps [V, *shape] to [V, *shape].

    Raises:
        ValueError: Also when a function gets the wrong shape or dtype.
        RuntimeError: When a function is called after a tensor that its graph needs was changed in place.
        NotImplementedError: Inside ``torch.func`` transforms and ``torch.compile``, which no function can leave.

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent". BackPACK's
        ``GGNMP``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> block = ggnmp(model_fn, params, X, y)["bias"](torch.eye(3))
        >>> torch.allclose(block.diagonal(), diag_ggn(model_fn, params, X, y)["bias"])
        True
    """
    matrix = GaussNewton(check_draws("ggnmp", mc_samples))
    return blocks("ggnmp", matrix, model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size)


@_documented
def pchmp(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    *,
    modify: Literal["clip", "abs"] = "clip",
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
) -> Any:
    """Products with the diagonal blocks of the positive-curvature Hessian, a positive semi-definite Hessian.

    On a network of (piecewise) linear and elementwise operations a diagonal block of the Hessian is

        H = R Σₙ Jₙᵀ ∇²ℓₙ Jₙ + Σ_m J_mᵀ diag(r_m) J_m,    r_m = φ_m''(z_m) ⊙ δ_m,

    m running over the elementwise operations, z_m their input, J_m its Jacobian, and δ_m the gradient of the loss with
    respect to their output. The positive-curvature Hessian has max(r_m, 0) ("clip") or |r_m| ("abs") in place of r_m.
    Skip connections and other branches are covered. Every elementwise operation that autograd records counts on its
    own.

    Args:
        modify: "clip" or "abs", what takes the place of r_m.

    Returns:
        A pytree like ``params`` with one function per parameter, which maps [V, *shape] to [V, *shape].

    Raises:
        ValueError: If the loss is not convex; also when a function gets the wrong shape or dtype.
        RuntimeError: When a function is called after a tensor that its graph needs was changed in place.
        NotImplementedError: If the graph has another non-linear operation (softmax, a norm, a product of activations)
            or a parameter enters twice, so that the blocks have terms of no definite sign; the message names it. Inside
            ``torch.func`` transforms and ``torch.compile``.

    References:
        Chen, Chou, Chang 2018, "BDA-PCH", arXiv:1802.06502. BackPACK's ``PCHMP``; release 1.7.1
        multiplies r_m by δ_m once more, so that its values agree where r_m = 0 only.

    Example:
        >>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 3)))
        >>> products = pchmp(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)
        >>> bool((torch.linalg.eigvalsh(products["0.bias"](torch.eye(5))) > -1e-5).all())
        True
    """
    if modify not in ("clip", "abs"):
        raise ValueError(f'pchmp: modify must be "clip" or "abs", got {modify!r}.')
    matrix = PositiveCurvature(modify)
    return blocks("pchmp", matrix, model_fn, params, X, y, loss_fn, subsampling, None, chunk_size)


def blocks(
    caller: str,
    matrix: Any,
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    loss_fn: LossFunction,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    """One function per parameter, for any matrix."""
    names, leaves, rebuild, product = linearize(
        caller, matrix, model_fn, params, X, y, loss_fn, subsampling, generator, chunk_size
    )
    return rebuild([block(product, leaves, i, name, chunk_size) for i, name in enumerate(names)])


def block(
    product: Product, leaves: Sequence[Tensor], i: int, name: str, chunk_size: int | None = None
) -> Callable[[Tensor], Tensor]:
    """The product with the block of one parameter."""

    def multiply(v: Tensor) -> Tensor:
        """Multiply [V, *shape] with the block."""
        check_vector(f"v of parameter {name!r}", v, leaves[i], batched=True)
        try:
            return batched(product, leaves, [i], [v], chunk_size)[0]
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            raise RuntimeError(
                f"the product with the block of parameter {name!r} needs its graph as it was, and a tensor of it was "
                "modified by an inplace operation since, such as optimizer.step(). Multiply before that, or make new products "
                "after it."
            ) from error

    return multiply


# -- pure functions


@_documented
def hessian_vp(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
) -> Any:
    """Product of the Hessian with a vector, ∇²L v. For many products at the same point use `hessian_operator`.

    Returns:
        A pytree like ``params``, [*shape] per parameter.

    Raises:
        RuntimeError: If an operation has no second derivative in PyTorch.

    References:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> hessian_vp(model_fn, params, X, y, v=params)["weight"].shape
        torch.Size([3, 4])
    """
    return _product(Hessian(), model_fn, params, X, y, v, loss_fn, subsampling, None)


@_documented
def ggn_vp(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
) -> Any:
    """Product of the generalized Gauss-Newton matrix with a vector, R Σₙ Jₙᵀ ∇²ℓₙ Jₙ v.

    Jₙ is the Jacobian of sample n's output, ∇²ℓₙ the Hessian of its loss with respect to the output. With ``mc_samples`` each
    call draws anew, while `ggn_operator` draws once.

    Returns:
        A pytree like ``params``, [*shape] per parameter.

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> G, H = (f(model_fn, params, X, y, v=params) for f in (ggn_vp, hessian_vp))
        >>> torch.allclose(G["weight"], H["weight"], atol=1e-6)  # for a model that is linear in its parameters
        True
    """
    matrix = GaussNewton(check_draws("ggn_vp", mc_samples))
    return _product(matrix, model_fn, params, X, y, v, loss_fn, subsampling, generator)


@_documented
def fisher_vp(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    empirical: bool = False,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
) -> Any:
    """Product of the Fisher information with a vector.

    - Fisher, of the likelihood that cross-entropy, squared error or BCE with logits implies: R Σₙ E[∇ℓ(fₙ, ŷ) ∇ℓ(fₙ,
      ŷ)ᵀ] v with ŷ from the model; equal to the GGN. With ``mc_samples`` the mean over that many draws is the
      expectation.
    - empirical Fisher, of the targets themselves: Σₙ gₙ gₙᵀ v with gₙ = R ∇ℓₙ as in `curvfunc.batch_grad`. Its diagonal
      is `curvfunc.sum_grad_squared`. For a mean over N samples, N times this is (1/N) Σₙ ∇ℓₙ ∇ℓₙᵀ v.

    Returns:
        A pytree like ``params``, [*shape] per parameter.

    Raises:
        ValueError: If ``mc_samples`` is given for the empirical Fisher, which has no draws.
        NotImplementedError: If a custom loss implies no likelihood.

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> Fv = fisher_vp(model_fn, params, X, y, params, empirical=True)["bias"]
        >>> Fv.shape
        torch.Size([3])
    """
    matrix = fisher_matrix("fisher_vp", loss_fn, empirical, mc_samples)
    return _product(matrix, model_fn, params, X, y, v, loss_fn, subsampling, generator)


@_documented
def jvp(model_fn: Model, params: Any, X: Any, v: Any, *, subsampling: Indices | None = None) -> Tensor:
    """Jacobian-vector product of the model by its parameters, J v: the output's directional derivative.

    Args:
        subsampling: Indices [M] of samples, repeats allowed: the rows of J are those of these samples, M in place of N.

    Returns:
        [N, ...] like the output.

    References:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian" (the R-operator). BackPACK's ``R_op``, curvlinops'
        ``JacobianLinearOperator``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> jvp(model_fn, params, torch.randn(8, 4), v=params).shape
        torch.Size([8, 3])
    """
    result: Tensor = _product(Jacobian(), model_fn, params, X, None, v, None, subsampling, None)
    return result


@_documented
def vjp(model_fn: Model, params: Any, X: Any, u: Tensor, *, subsampling: Indices | None = None) -> Any:
    """Vector-Jacobian product of the model by its parameters, Jᵀ u.

    Args:
        u: Vector [N, ...] like the output; with ``subsampling``, [M, ...] like that of the subset.
        subsampling: Indices [M] of samples, repeats allowed: the rows of J are those of these samples, M in place of N.

    Returns:
        A pytree like ``params``, [*shape] per parameter.

    References:
        BackPACK's ``L_op``, curvlinops' ``TransposedJacobianLinearOperator``.

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> vjp(model_fn, params, torch.randn(8, 4), torch.randn(8, 3))["weight"].shape
        torch.Size([3, 4])
    """
    return _product("transposed jacobian", model_fn, params, X, None, u, None, subsampling, None)


def fisher_matrix(caller: str, loss_fn: Any, empirical: bool, mc_samples: int) -> GaussNewton | EmpiricalFisher:
    """The matrix that the options of `fisher_vp` mean."""
    if empirical:
        if check_draws(caller, mc_samples):
            raise ValueError(f"{caller}: the empirical Fisher has no draws; leave mc_samples at 0.")
        return EmpiricalFisher()
    if losses.normalize(loss_fn).name is None:
        raise NotImplementedError(
            f"{caller}: a custom loss implies no likelihood, so there is no Fisher information but the empirical one. "
            "Use a cross-entropy, squared error or BCE-with-logits loss, empirical=True, or the GGN."
        )
    return GaussNewton(check_draws(caller, mc_samples))


def check_draws(caller: str, mc_samples: int) -> int:
    """The number of Monte-Carlo draws, if it is one."""
    if isinstance(mc_samples, bool) or not isinstance(mc_samples, int):
        raise TypeError(f"{caller}: mc_samples must be an int, got {mc_samples!r} of type {type(mc_samples).__name__}.")
    if mc_samples < 0:
        raise ValueError(f"{caller}: mc_samples must be 0 (exact) or positive, got {mc_samples}.")
    return mc_samples


def _product(
    matrix: Any,
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    loss_fn: Any,
    subsampling: Indices | None,
    generator: Generator | None,
) -> Any:
    loss = losses.Loss(None, losses.no_loss) if loss_fn is None else losses.normalize(loss_fn)
    check_generator(generator)
    if torch.compiler.is_compiling():
        compiled.refuse_export()
        return _compiled(matrix, model_fn, params, X, y, v, loss, subsampling, generator)
    return compiled.uncompiled(_evaluate)(matrix, model_fn, params, X, y, v, loss, subsampling, generator)


def _evaluate(
    matrix: Any,
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    loss: losses.Loss,
    subsampling: Indices | None,
    generator: Generator | None,
) -> Any:
    """One product, with a graph of its own level where torch.func transforms are active."""
    names, tensors, rebuild = flatten_params(params)
    batch = read_batch(X, X if y is None else y, subsampling, may_be_empty=losses.is_sum(loss))
    transposed = isinstance(matrix, str)
    vector = [v] if transposed else read_vector("v", v, names, tensors, batched=False)
    create_graph = will_be_differentiated([*tensors, *tensors_of(batch.X), *vector])
    problem = Problem(model_fn, names, rebuild, batch, loss, generator, create_graph)

    def forward(*leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
        out = problem.forward(leaves)
        if transposed:
            check_vector("u", v, out, batched=False)
            return out, differentiate([out], leaves, [v], create_graph=create_graph)
        product = linearized(matrix, problem, leaves, out)
        return out, product(range(len(leaves)), vector, create_graph)

    if _functorch.peek_interpreter_stack() is None:
        with torch.enable_grad():
            leaves = [p.view_as(p) if p.requires_grad and create_graph else leaf(p) for p in tensors]
            result = forward(*leaves)[1]
    else:
        try:
            with scripted.refused():
                result = torch.func.vjp(forward, *tensors, has_aux=True)[2]  # type: ignore[misc]
        except RuntimeError as error:
            explain_limits(error)
            raise
    result = apart(result)
    result = own(result, lambda: [*tensors, *vector, *tensors_of(X), *tensors_of(y), *loss.tensors.values()])
    return result[0] if isinstance(matrix, Jacobian) else rebuild(result)


def _compiled(
    matrix: Any,
    model_fn: Any,
    params: Any,
    X: Any,
    y: Any,
    v: Any,
    loss: losses.Loss,
    subsampling: Indices | None,
    generator: Generator | None,
) -> Any:
    check_crosses("X", X)
    if y is not None:
        check_crosses("y", y)
    tensors = {"v": v} | ({"subsampling": subsampling} if isinstance(subsampling, Tensor) else {})
    indices = None if subsampling is None or "subsampling" in tensors else tuple(subsampling)
    options = (matrix,) if isinstance(matrix, str) else tuple([getattr(matrix, f.name) for f in fields(matrix)])
    y = X if y is None else y  # None cannot cross
    return compiled.call(_of_constants, model_fn, params, X, y, loss, (type(matrix), options, indices), tensors, generator)


def _of_constants(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    loss: losses.Loss,
    held: Sequence[Tensor],
    cls: type,
    options: tuple[Any, ...],
    indices: tuple[int, ...] | None,
    v: Any,
    subsampling: Tensor | None = None,
) -> Any:
    return _evaluate(cls(*options), model_fn, params, X, y, v, loss, indices if subsampling is None else subsampling, None)
