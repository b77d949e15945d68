"""Kronecker factors."""

import itertools
from functools import partial
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor

from curvfunc import losses
from curvfunc.reference.calls import Chain
from curvfunc.reference.dense import Indices, LossFn, ModelFn, curvature, jacobian, outputs, pick, picked, sample
from curvfunc.reference.layers import layers

__all__ = ["kfac", "kfac_empirical", "kflr", "kfra"]


def kfac(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    mc_samples: int = 1,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices = None,
    generator: torch.Generator | None = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Kronecker factors of each parameter's block of the GGN, ``block ~ B \otimes A``.

    Let ``x[n, s, k]`` be the input of a layer (for a convolution the patch under the kernel at output position s),
    ``z[n, s, o]`` its output and ``D[n, c, s, o] = d f_n[c] / d z[n, s, o]``. The weight's factors are

    ========================  ====================================================  ===========================
    layer                     B[o, p]                                               A[k, l]
    ========================  ====================================================  ===========================
    ``F.linear``              ``sum_{n,c,d,s} D[n,c,s,o] M[n,c,d] D[n,d,s,p]``      ``mean_{n,s} x x^T``
    ``F.conv1d/2d/3d``        ``sum_{n,c,d,s,t} D[n,c,s,o] M[n,c,d] D[n,d,t,p]``    ``mean_n sum_s x x^T``
    ========================  ====================================================  ===========================

    With ``kfac_approx="expand"`` every layer has the first row's factors; with ``"reduce"`` it has those of its summed
    cotangents and averaged inputs, ``sum_s D[n,c,s,o]`` and ``mean_s x[n,s,k]``, as if they were at one position.

    Transposed convolutions are as convolutions, with x what each entry of the kernel meets. A weight that several calls
    share has the positions of all of them side by side in s. The groups of a convolution each see patches of their own: A
    is the mean over groups. Every other parameter (a bias, a norm's scale, a weight that is used in any other way) has one
    factor, its exact block ``sum_{n,c,d} J[n,c,p] M[n,c,d] J[n,d,q]``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, convex in the output.
        mc_samples: Number of samples from the likelihood that the loss implies; 0 is the exact curvature of the loss.
        kfac_approx: How shared positions are treated: None, ``"expand"`` or ``"reduce"``, see above.
        joined: Whether inputs that meet a bias, too, have a one appended, so that the weight's factors are those of both.
        generator: Source of the samples.
        subsampling: Samples to use: B sums and A averages over them; None is all.
        chunk_size: No effect.

    Returns:
        A tuple of factors per parameter: ``(B [o, o], A [k, k])``, or ``(block [P, P],)``.

    References:
        Martens & Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, ICML 2015.
        Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016.
        Eschenhagen et al., Kronecker-factored approximate curvature for modern neural network architectures,
        NeurIPS 2023 ("expand", eq. 22, and "reduce").
    """
    out, J = jacobian(model_fn, params, X)
    M = curvature(loss_fn, out, y, mc_samples, generator)
    return _factors(model_fn, params, X, J, M, kfac_approx, joined, subsampling)


def kflr(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    """Kronecker factors with the exact curvature of the loss: :func:`kfac` with ``mc_samples=0``.

    References:
        Botev, Ritter & Barber, Practical Gauss-Newton optimisation for deep learning, ICML 2017, sec. 3.3.
    """
    exact: dict[str, Any] = {"mc_samples": 0, "kfac_approx": kfac_approx, "joined": joined}
    return kfac(model_fn, params, X, y, loss_fn=loss_fn, subsampling=subsampling, **exact)


def kfac_empirical(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    kfac_approx: str | None = None,
    joined: bool = False,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Kronecker factors of each parameter's block of the empirical Fisher, ``sum_n g_n g_n^T / R ~ B \\otimes A``.

    ``g_n = dL / d theta`` through sample n, and R is the factor of the mean in the loss (1 for a sum), so that ``g_n / R`` is
    the gradient of the sample's own terms, and R their share. With ``x[n, s, k]`` the input of a layer and ``G[n, s, o]`` the
    gradient of the loss with respect to its output at position s,

    ===========  ==========================================  ==========================
    kfac_approx  B[o, p]                                     A[k, l]
    ===========  ==========================================  ==========================
    "expand"     ``sum_{n,s} G G^T / R``                     ``mean_{n,s} x x^T``
    "reduce"     ``sum_n (sum_s G)(sum_s G)^T / R``          ``mean_n (mean_s x)(mean_s x)^T``
    None         as "expand" for linear layers, for convolutions B of "reduce" and A = ``mean_n sum_s x x^T``
    ===========  ==========================================  ==========================

    Every other parameter has its exact block. What counts as a layer, and groups of a convolution: see ``kfac``.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples.
        kfac_approx: "expand", "reduce" or None.
        joined: Whether inputs that meet a bias, too, have a one appended.
        subsampling: Samples to use: B sums and A averages over them; None is all.
        chunk_size: No effect.

    Returns:
        A tuple of factors per parameter: ``(B [o, o], A [k, k])``, or ``(block [P, P],)``.

    References:
        Kunstner, Balles, Hennig, Limitations of the empirical Fisher approximation for natural gradient descent, NeurIPS 2019.
    """
    out, J = jacobian(model_fn, params, X)
    dL = torch.func.grad(loss_fn)(out, y).reshape(len(out), -1)
    M = torch.einsum("nc,nd->ncd", dL, dL) * _averaged_terms(loss_fn, out, y)  # 1 / R
    return _factors(model_fn, params, X, J, M, kfac_approx, joined, subsampling)


def _factors(
    model_fn: ModelFn, params: Any, X: Any, jac: Any, M: Tensor, kfac_approx: str | None, joined: bool, subsampling: Indices
) -> Any:
    """The factors of :func:`kfac` for any ``M [N, C, C]``."""
    per_sample = [layers(model_fn, params, sample(X, n)) for n in picked(len(M), subsampling)]
    M = pick(M, subsampling)

    def factors(i: int, J: Tensor) -> tuple[Tensor, ...]:
        uses = [layer for of_sample in per_sample if (layer := of_sample[i]) is not None]
        if not uses:
            J = pick(J, subsampling)
            return (torch.einsum("ncp,ncd,ndq->pq", J, M, J),)
        x, D = torch.stack([use.x for use in uses]), torch.stack([use.D for use in uses])
        x = F.pad(x, (0, 1), value=1.0) if joined and uses[0].biased else x
        if kfac_approx == "reduce":
            x, D = x.mean(2, keepdim=True), D.sum(2, keepdim=True)
        A, positions = _second_moment(x), x.shape[2]
        if kfac_approx == "expand" or (kfac_approx is None and uses[0].op is F.linear):
            return torch.einsum("ncso,ncd,ndsp->op", D, M, D), A / positions
        return torch.einsum("ncso,ncd,ndtp->op", D, M, D), A

    leaves, treespec = optree.tree_flatten(jac)
    return optree.tree_unflatten(treespec, [factors(i, J) for i, J in enumerate(leaves)])


def _averaged_terms(loss_fn: LossFn, out: Tensor, y: Any) -> float:
    """How many terms (or how much weight) the loss averages: by how much larger the sum of these terms is; 1 for a sum.

    For a loss without a ``reduction`` they are the samples, if it does not grow when the batch counts twice.
    """
    loss = losses.normalize(loss_fn)
    if (known := losses.unmasked(loss, out, y)) is not None:
        loss, out, y = known.loss, known.moved(out), known.y
    L = loss(out, y)
    if loss.name is None:
        twice = loss(torch.cat([out, out]), optree.tree_map(lambda t: torch.cat([t, t]), y))
        return len(out) if torch.isclose(twice, L) else 1.0
    summed = partial(loss.fn, **{**dict(loss.options), **loss.tensors, "reduction": "sum"})
    return float(summed(out, y) / L)


def kfra(
    model_fn: ModelFn,
    params: Any,
    X: Any,
    y: Any,
    *,
    loss_fn: LossFn = F.cross_entropy,
    subsampling: Indices = None,
    chunk_size: int | None = None,
) -> Any:
    r"""Kronecker factors whose output factor is averaged over samples at each step back, ``block ~ B \otimes A``.

    A chain model computes ``z_0, z_1, ..., z_L = f`` one after another. Let ``J_l[n] = d z_l[n] / d z_{l-1}[n]``. Then

    - ``G_L = sum_n M[n]``,
    - ``G_{l-1} = mean_n J_l[n]^T G_l J_l[n]``.

    At a layer with output z_l, whose entries are (s, o), and input ``x[n, s, k]`` (see :func:`kfac`), the weight's factors
    are

    ========================  ==============================  ===========================
    layer                     B[o, p]                         A[k, l]
    ========================  ==============================  ===========================
    ``F.linear``              ``sum_s G_l[(s, o), (s, p)]``   ``mean_{n,s} x x^T``
    ``F.conv1d/2d/3d``        ``sum_{s,t} G_l[(s,o), (t,p)]`` ``mean_n sum_s x x^T``
    ========================  ==============================  ===========================

    Any other parameter of the operation that made z_l has one factor, ``mean_n K[n]^T G_l K[n]`` with
    ``K[n] = d z_l[n] / d theta``.

    The z_l are the results of calls of torch that all that comes later goes through. If an operation's result is no z_l,
    since the graph branches around it, its G is that of one step back from the next z_l.

    Args:
        model_fn: ``(params, X) -> output [N, *out]``, each sample's output a function of that sample alone, in which each
            parameter is used once.
        params: Pytree of tensors.
        X: Pytree of tensors with leading axis N.
        y: Targets, whatever ``loss_fn`` takes.
        loss_fn: ``(output, y) -> scalar``, a sum or a mean over samples, convex in the output.
        subsampling: Samples to use: G_L sums and all means average over them; None is all.
        chunk_size: No effect.

    Returns:
        A tuple of factors per parameter: ``(B [o, o], A [k, k])``, or ``(block [P, P],)``.

    Raises:
        NotImplementedError: If a parameter is used more than once, or a tensor comes from no call of torch.

    References:
        Botev, Ritter & Barber, Practical Gauss-Newton optimisation for deep learning, ICML 2017, sec. 3.2, eqs. 19 ff.
        Grosse & Martens, A Kronecker-factored approximate Fisher matrix for convolution layers, ICML 2016, eq. 32.
    """
    out = outputs(model_fn, params, X)
    samples = [sample(X, n) for n in picked(len(out), subsampling)]
    chains = [Chain(model_fn, params, x) for x in samples]
    of_samples = [layers(model_fn, params, x) for x in samples]

    def back(G: Tensor, jacobians: list[Tensor]) -> Tensor:
        return torch.stack([J.mT @ G @ J for J in jacobians]).mean(0)

    links = chains[0].links
    G = dict.fromkeys(links[-1:], pick(curvature(loss_fn, out, y, 0, None), subsampling).sum(0))
    for k, after in reversed(list(itertools.pairwise(links))):
        G[k] = back(G[after], [chain.jacobian(after, k) for chain in chains])

    def factors(i: int, p: Tensor) -> tuple[Tensor, ...]:
        k = chains[0].use(i)
        if k is None:
            return (p.new_zeros(p.numel(), p.numel()),)
        after = min(link for link in links if link >= k)
        at_k = G[k] if k in G else back(G[after], [chain.jacobian(after, k) for chain in chains])
        uses = [layer for of_sample in of_samples if (layer := of_sample[i]) is not None]
        if not uses:
            return (back(at_k, [chain.parameter_jacobian(k, i) for chain in chains]),)
        A, (_, positions, o) = _second_moment(torch.stack([use.x for use in uses])), uses[0].D.shape
        if uses[0].op is F.linear:
            return torch.einsum("sosp->op", at_k.reshape(positions, o, positions, o)), A / positions
        return torch.einsum("ospt->op", at_k.reshape(o, positions, o, positions)), A

    leaves, tree = optree.tree_flatten(params)
    return optree.tree_unflatten(tree, [factors(i, p) for i, p in enumerate(leaves)])


def _second_moment(x: Tensor) -> Tensor:
    """``mean_n sum_s x x^T`` of inputs ``[n, g, s, k]``, the mean over groups."""
    return torch.einsum("ngsk,ngsl->kl", x, x) / (x.shape[0] * x.shape[1])
