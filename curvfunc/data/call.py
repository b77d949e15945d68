"""One batch, of one process or of several."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch._C import _functorch

from curvfunc.data.loop import accumulate
from curvfunc.data.scales import Reduction
from curvfunc.quantities.call import compute as compute_alone
from curvfunc.tensors.docstrings import documented
from curvfunc.tensors.processes import Processes

__all__ = ["compute"]


@documented()
def compute(
    model_fn: Callable[[Any, Any], Tensor],
    params: Any,
    X: Any,
    y: Any,
    specs: Any,
    *,
    loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
    subsampling: Sequence[int] | Tensor | None = None,
    generator: Generator | None = None,
    chunk_size: int | None = None,
    out: Any = None,
    reduction: Reduction | None = None,
    group: Any = None,
    gather: bool = False,
) -> Any:
    """Several quantities at once, from one forward pass and one backward pass per kind of cotangent.

    Args:
        specs: Any pytree of specs such as ``(Loss(), Grad(), DiagGGN(mc_samples=1))``.
        subsampling: Indices [M] of samples for everything but `Loss`, `Output` and `Grad`, which are of the whole batch. The
            subset has a forward pass of its own, which costs as much as it is large; but if the model draws random numbers,
            as dropout does, one pass of the whole batch serves everything, so that each sample has one mask in a call,
            also where it is listed twice. Draws from the default generators of torch, Python and numpy, and from
            generators that are passed to torch's operations, are noticed.
        generator: Source of Monte-Carlo draws, on the device of the data; torch's default generator if None. Specs with the
            same ``mc_samples`` share their draws. Cannot be used inside ``torch.compile``.
        out: Tensors for the results to be written to, as an earlier call with the same specs returned them, of the same shapes;
            None in place of a result, or of all, means new memory. Large results (`BatchGrad`, `SqrtGGN`, `BatchDiagGGN`) are
            formed there, without a copy: memory that is new at each step costs more than the arithmetic. Not for calls that
            are differentiated.
        reduction: In a group, for losses of one's own: "sum", "mean" over samples, or, for any other mean, a function
            ``(output, y) -> W`` that returns what it divides by. By default sums and means over samples are told from each
            other by gradients.
        group: A process group of torch.distributed, such as ``torch.distributed.group.WORLD``: the results are those of one
            batch with the samples of all its processes, each of which calls with its own X and y and the same everything
            else. These may be of different sizes, or have no samples (N = 0). Each process has all sums, and the results per
            sample of its own samples, at the scale of all (`Output`, `BatchGrad`, ...). Results have no graph. Monte-Carlo
            draws are each process's own: seed generators differently. There is no subsampling and no ``out``. If a process
            fails, the others raise, and if it is gone, they do within the timeout of the group.

            Parameters may be DTensors, as ``fully_shard`` makes them, sharded over this group. They are gathered as a whole
            once, not layer by layer, for as long as the call takes. Results with an entry for each of a parameter's
            (`Grad`, `SumGradSquared`, `Variance`, `DiagGGN`, `DiagHessian`) are DTensors with its placements, scattered
            where it is sharded along its first axis. Kronecker factors have no axis of shards, and results per sample are
            of samples that one process has alone: these are ordinary tensors.
        gather: In a group, whether each process gets the results of all samples, in the order of ranks.

    Returns:
        The tree of ``specs`` with each spec replaced by its result; where ``out`` has tensors, by these. All others are
        dense and share memory with nothing, so that each can be changed in place and be passed as ``out``. `Loss` gives a
        scalar, `Output` [N, ...]; others a pytree like ``params``, of the shapes that the function of their name tells:
        [*shape] per parameter for `Grad`, [N, *shape] for `BatchGrad`, and so on.

    Raises:
        RuntimeError: If another process of the group has failed or is gone; the message names it if it can.

    Example:
        >>> from curvfunc import BatchL2, Grad, Loss
        >>> model_fn, params = functionalize(nn.Linear(4, 3))
        >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
        >>> loss, (grad, norms) = compute(model_fn, params, X, y, (Loss(), (Grad(), BatchL2())))
        >>> grad["weight"].shape, norms["bias"].shape
        (torch.Size([3, 4]), torch.Size([8]))
    """
    if group is None:
        if gather or reduction is not None:
            raise ValueError("gather and reduction are for results of several processes. Pass group=, or leave them out.")
        given = {"loss_fn": loss_fn, "subsampling": subsampling, "generator": generator, "chunk_size": chunk_size, "out": out}
        return compute_alone(model_fn, params, X, y, specs, **given)
    if torch.compiler.is_compiling() or _functorch.peek_interpreter_stack() is not None:
        raise ValueError("compute with group= sends messages to other processes, which no transformation can contain.")
    with Processes(group).phase():
        if subsampling is not None or out is not None:
            name = "out" if subsampling is None else "subsampling"
            raise ValueError(f"{name} is for the results of one process. Leave it out, or group.")
    options: dict[str, Any] = {"loss_fn": loss_fn, "reduction": reduction, "generator": generator, "chunk_size": chunk_size}
    return accumulate(model_fn, params, [(X, y)], specs, progress=False, group=group, gather=gather, **options)
