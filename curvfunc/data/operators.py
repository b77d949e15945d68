"""Curvature matrices as linear operators, of one batch or of a data set.

Of one batch (X and y), the model runs once, and every product is linear work on the graph that it left behind. Of a data set
(an iterable of batches in place of X, and no y) each product goes through all batches, and runs the model on each: its time is
that of as many passes over the data as there are products, its memory that of one batch. A product with a matrix [P, K]
is one pass.

Over a data set all products are those of one matrix: the random numbers of each batch, of Monte-Carlo draws and of dropout, are
the same in each pass, and what a model keeps in buffers and attributes is put back after each batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from curvfunc.data.group_operators import Part, batch_part, data_part, group_operator
from curvfunc.data.passes import data_operator
from curvfunc.data.scales import Reduction
from curvfunc.operators.linear_operators import LinearOperator
from curvfunc.operators.linearization import GaussNewton, Hessian
from curvfunc.operators.one_batch import batch_operator
from curvfunc.operators.products import SHARED, check_draws, fisher_matrix
from curvfunc.tensors.docstrings import documented, entries
from curvfunc.tensors.processes import Processes

__all__ = ["fisher_operator", "ggn_operator", "hessian_operator"]

Model = Callable[[Any, Any], Tensor]
LossFunction = Callable[[Tensor, Any], Tensor]
Indices = Sequence[int] | Tensor
Split = Callable[[Any], tuple[Any, Any]]
Device = torch.device | str

_documented = documented(
    SHARED
    | entries(
        """
        X: Input of a batch, a tensor [N, ...] or a pytree of tensors with leading sample axis N; or, if ``y`` is left out, an
            iterable of batches over which several passes can be made, such as a DataLoader or a list. Each is a pair (X, y), or
            a mapping whose targets are at "labels" or "label". The scale is that of one batch of all samples, whatever the loss
            divides by. The data is read once when the operator is made, and has to give the same batches in each pass; if the
            second pass is found to differ, or later ones to lead the model to other outputs, the product is refused.
        y: Targets of a batch, a tensor [N, ...] or a pytree likewise; None if X is a data set.
        subsampling: Indices [M] of samples, of one batch only, repeats allowed: the matrix becomes the part of these samples,
            at the scale of the whole batch.
        split: ``batch -> (X, y)`` for batches of another kind.
        device: Where batches of a data set are copied to.
        reduction: For losses other than cross-entropy, squared error and BCE with logits, over a data set: "sum", "mean" over
            samples, or, for any other mean, a function ``(output, y) -> W`` of a batch that returns what it divides by. By
            default sums and means over samples are told from each other by the gradients of each batch, and anything else is
            refused.
        progress: Whether products over a data set that take longer than a second show a bar, where there are a terminal and
            tqdm; in a group, that of its first process.
        group: A process group of torch.distributed: the matrix is that of the samples of all its processes, at the scale that
            one batch of them would have. Each passes its own X and y, or data set, of any sizes, also none (N = 0, an empty
            list), and the same everything else. Products are made by all processes at once, with the same vector, and all have
            the result: where an estimator draws vectors, seed it alike everywhere. Monte-Carlo draws and dropout are each
            process's own. There is no subsampling, and ``reduction`` is for batches, too. If a process fails, the others raise,
            here and at products, and if it is gone, they do within the timeout of the group.
        """
    )
)


@_documented
def hessian_operator(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any = None,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    subsampling: Indices | None = None,
    chunk_size: int | None = None,
    split: Split | None = None,
    device: Device | None = None,
    reduction: Reduction | None = None,
    progress: bool = True,
    group: Any = None,
) -> LinearOperator:
    """The Hessian ∇²L at ``params`` as a linear operator, of one batch (X, y) or of a data set in place of X.

    Of one batch the model runs once, here; memory and lifetime are those of `curvfunc.hmp`. With ``group=`` it is that of the
    samples of several processes.

    Returns:
        A `LinearOperator` of shape (P, P), [P, P] as a matrix, with P the number of entries of all parameters.

    Raises:
        ValueError: For data that has no answer, or gives other batches at a later pass.
        RuntimeError: If another process of the group has failed or is gone, here or at a product.
        NotImplementedError: Inside ``torch.func`` transforms and ``torch.compile``.

    References:
        Pearlmutter 1994, "Fast exact multiplication by the Hessian". curvlinops' ``HessianLinearOperator``.

    Example:
        >>> import curvfunc
        >>> model_fn, params = curvfunc.functionalize(torch.nn.Linear(4, 3))
        >>> H = hessian_operator(model_fn, params, torch.randn(8, 4), torch.arange(8) % 3)
        >>> H.shape, (H @ torch.randn(15)).shape, (H @ params)["weight"].shape
        ((15, 15), torch.Size([15]), torch.Size([3, 4]))
        >>> batches = [(torch.randn(n, 4), torch.arange(n) % 3) for n in (8, 8, 5)]
        >>> curvfunc.hutchpp_trace(hessian_operator(model_fn, params, batches), 30).shape
        torch.Size([])
    """
    given = _Given(subsampling, split, device, reduction, progress, group)
    return _operator("hessian_operator", Hessian, model_fn, params, X, y, loss_fn, None, chunk_size, given)


@_documented
def ggn_operator(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any = None,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    split: Split | None = None,
    device: Device | None = None,
    reduction: Reduction | None = None,
    progress: bool = True,
    group: Any = None,
) -> LinearOperator:
    """The generalized Gauss-Newton matrix R Σₙ Jₙᵀ ∇²ℓₙ Jₙ at ``params`` as a linear operator, of one batch or of a data set.

    Jₙ is the Jacobian of sample n's output, ∇²ℓₙ the Hessian of its loss with respect to the output. Draws (``mc_samples``) are
    the same in all products. Of one batch the model runs once, here, and the operator holds on to its graph.

    Returns:
        A `LinearOperator` of shape (P, P), [P, P] as a matrix, with P the number of entries of all parameters.

    Raises:
        ValueError: For data that has no answer, or gives other batches at a later pass.
        RuntimeError: If another process of the group has failed or is gone, here or at a product.
        NotImplementedError: Inside ``torch.func`` transforms and ``torch.compile``.

    References:
        Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient descent".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> G = ggn_operator(model_fn, params, X, y)
        >>> torch.allclose(G.dense().diagonal(), G.flatten(diag_ggn(model_fn, params, X, y)), atol=1e-6)
        True
    """
    matrix = lambda: GaussNewton(check_draws("ggn_operator", mc_samples))
    given = _Given(subsampling, split, device, reduction, progress, group)
    return _operator("ggn_operator", matrix, model_fn, params, X, y, loss_fn, generator, chunk_size, given)


@_documented
def fisher_operator(
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any = None,
    *,
    loss_fn: LossFunction = F.cross_entropy,
    empirical: bool = False,
    mc_samples: int = 0,
    subsampling: Indices | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    split: Split | None = None,
    device: Device | None = None,
    reduction: Reduction | None = None,
    progress: bool = True,
    group: Any = None,
) -> LinearOperator:
    """The Fisher information, or the empirical one, at ``params`` as a linear operator, of one batch or of a data set.

    - Fisher, of the likelihood that cross-entropy, squared error or BCE with logits implies: R Σₙ E[∇ℓ(fₙ, ŷ) ∇ℓ(fₙ, ŷ)ᵀ] with
      ŷ from the model; equal to the GGN. With ``mc_samples`` the mean over that many draws, the same in all products.
    - empirical Fisher, of the targets themselves: Σₙ gₙ gₙᵀ with gₙ = R ∇ℓₙ as in `curvfunc.batch_grad`.

    Of one batch the model runs once, here, and the operator holds on to its graph.

    Returns:
        A `LinearOperator` of shape (P, P), [P, P] as a matrix, with P the number of entries of all parameters.

    Raises:
        ValueError: For data that has no answer, or gives other batches at a later pass; if ``mc_samples`` is given for the
            empirical Fisher, which has no draws.
        RuntimeError: If another process of the group has failed or is gone, here or at a product.
        NotImplementedError: If a custom loss implies no likelihood. Inside ``torch.func`` transforms and ``torch.compile``.

    References:
        Martens 2020, "New insights and perspectives on the natural gradient method".

    Example:
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> F_emp = fisher_operator(model_fn, params, X, y, empirical=True)
        >>> torch.allclose(F_emp.dense().diagonal(), F_emp.flatten(sum_grad_squared(model_fn, params, X, y)), atol=1e-6)
        True
    """
    matrix = lambda: fisher_matrix("fisher_operator", loss_fn, empirical, mc_samples)
    given = _Given(subsampling, split, device, reduction, progress, group)
    return _operator("fisher_operator", matrix, model_fn, params, X, y, loss_fn, generator, chunk_size, given)


@dataclass(frozen=True)
class _Given:
    """Options that are only of one batch, those that are only of a data set, and whose the samples are."""

    subsampling: Indices | None
    split: Split | None
    device: Device | None
    reduction: Reduction | None
    progress: bool
    group: Any

    def check(self, caller: str, is_data: bool) -> None:
        """Raise where one is given for what it is not."""
        if self.subsampling is not None and (is_data or self.group is not None):
            raise ValueError(f"{caller}: subsampling is of one batch. Pass a data set of the samples that you mean.")
        only = {"split": self.split, "device": self.device, "reduction": self.reduction if self.group is None else None}
        for name in () if is_data else [name for name, value in only.items() if value is not None]:
            raise ValueError(f"{caller}: {name} is for data sets, and X and y are one batch. Leave it out, or pass [(X, y)].")


def _operator(
    caller: str,
    make: Callable[[], Any],
    model_fn: Model,
    params: Any,
    X: Any,
    y: Any,
    loss_fn: LossFunction,
    generator: Generator | None,
    chunk_size: int | None,
    given: _Given,
) -> LinearOperator:
    def of_data(matrix: Any, progress: bool) -> tuple[Any, ...]:
        options = generator, chunk_size, given.split, given.device, progress
        return (caller, matrix, model_fn, params, X, loss_fn, given.reduction, *options)

    def part(matrix: Any, processes: Processes) -> Part:
        given.check(caller, y is None)
        if y is None:
            return data_part(of_data(matrix, given.progress and processes.rank == 0))
        about = caller, matrix, model_fn, params, X, y, loss_fn, None, chunk_size
        return batch_part(about, generator, given.reduction)

    if given.group is not None:
        return group_operator(caller, given.group, make, model_fn, params, loss_fn, given.reduction, part)
    matrix = make()
    given.check(caller, y is None)
    if y is None:
        return data_operator(*of_data(matrix, given.progress))
    return batch_operator(caller, matrix, model_fn, params, X, y, loss_fn, given.subsampling, generator, chunk_size)
