"""BackPACK's extensions. Each names one of curvfunc's quantities and the attribute that receives the result.

=====================  ========================  ==========================================================
Extension              Attribute                 Computed
=====================  ========================  ==========================================================
``BatchGrad`` ...      ``grad_batch`` ...        in the caller's own backward pass, for any scalar
``DiagGGNExact`` ...   ``diag_ggn_exact`` ...    when the backward pass meets an extended loss, on the same graph
``DiagHessian``,       ``diag_h``, ``kfra``      likewise; by another forward pass if the extension was not active in the
``KFRA`` ...           ...                       first one, and that graph does not do
``GGNMP``, ``HMP``,    ``ggnmp``, ``hmp``,       likewise; by another forward pass if the matrix is not the GGN, or its root
``PCHMP``              ``pchmp``                 is large
=====================  ========================  ==========================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvfunc import quantities
from curvfunc.compat.backprop_extension import (  # noqa: F401  # some for those who look for them here
    FAIL_ERROR,
    FAIL_SILENT,
    FAIL_WARN,
    WRITE_A_QUANTITY,
    WRITE_A_RULE,
    BackpropExtension,
    BackpropStrategy,
    Curvature,
    ExpectationApproximation,
    FirstOrderBackpropExtension,
    FirstOrderModuleExtension,
    LossHessianStrategy,
    ModuleExtension,
    SecondOrderBackpropExtension,
)
from curvfunc.operators.linearization import GaussNewton, Hessian
from curvfunc.operators.positive_curvature import PositiveCurvature
from curvfunc.quantities.quantity import Quantity

__all__ = [
    "GGNMP",
    "HBP",
    "HMP",
    "KFAC",
    "KFLR",
    "KFRA",
    "PCHMP",
    "BatchDiagGGNExact",
    "BatchDiagGGNMC",
    "BatchDiagHessian",
    "BatchGrad",
    "BatchL2Grad",
    "DiagGGNExact",
    "DiagGGNMC",
    "DiagHessian",
    "SqrtGGNExact",
    "SqrtGGNMC",
    "SumGradSquared",
    "Variance",
]

Product = Callable[[Tensor], Tensor]


def _sum(ext: BackpropExtension, p: Tensor, one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        raise ValueError(
            f"two extended losses of this backward pass, of {len(one)} and {len(other)} samples, depend on a parameter of "
            f"shape {tuple(p.shape)}, so {type(ext).__name__} has no sum. Run one backward pass per loss."
        )
    return one + other


# -- first order


class BatchGrad(FirstOrderBackpropExtension):
    """Per-sample gradients, ``p.grad_batch`` [N, *shape]; see `curvfunc.batch_grad`."""

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        super().__init__("grad_batch", subsampling=subsampling)

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.BatchGrad()


class BatchL2Grad(FirstOrderBackpropExtension):
    """Squared norms of per-sample gradients, ``p.batch_l2`` [N]; see `curvfunc.batch_l2`."""

    def __init__(self) -> None:
        super().__init__("batch_l2")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.BatchL2()


class SumGradSquared(FirstOrderBackpropExtension):
    """Sum of squared per-sample gradients, ``p.sum_grad_squared`` [*shape]; see `curvfunc.sum_grad_squared`."""

    def __init__(self) -> None:
        super().__init__("sum_grad_squared")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.SumGradSquared()


class Variance(FirstOrderBackpropExtension):
    """Variance of per-sample gradients, ``p.variance`` [*shape]; see `curvfunc.variance`."""

    def __init__(self) -> None:
        super().__init__("variance")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.Variance()


# -- second order


class _Sampled:
    """An extension with a number of Monte-Carlo samples."""

    _mc_samples: int

    def get_num_mc_samples(self) -> int:
        """The number of Monte-Carlo samples."""
        return self._mc_samples


class DiagGGN(SecondOrderBackpropExtension):
    """Diagonal of the generalized Gauss-Newton matrix."""

    of_two_losses = _sum


class DiagGGNExact(DiagGGN):
    """Diagonal of the GGN, ``p.diag_ggn_exact`` [*shape]; see `curvfunc.diag_ggn`."""

    def __init__(self) -> None:
        super().__init__("diag_ggn_exact")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.DiagGGN()


class DiagGGNMC(_Sampled, DiagGGN):
    """Monte-Carlo diagonal of the GGN, ``p.diag_ggn_mc`` [*shape]; see `curvfunc.diag_ggn`."""

    def __init__(self, mc_samples: int = 1) -> None:
        self._mc_samples = mc_samples
        super().__init__("diag_ggn_mc")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.DiagGGN(self._mc_samples)


class BatchDiagGGN(SecondOrderBackpropExtension):
    """Each sample's part of the diagonal of the generalized Gauss-Newton matrix."""

    of_two_losses = _sum


class BatchDiagGGNExact(BatchDiagGGN):
    """Per-sample diagonal of the GGN, ``p.diag_ggn_exact_batch`` [N, *shape]; see `curvfunc.batch_diag_ggn`."""

    def __init__(self) -> None:
        super().__init__("diag_ggn_exact_batch")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.BatchDiagGGN()


class BatchDiagGGNMC(_Sampled, BatchDiagGGN):
    """Monte-Carlo per-sample diagonal of the GGN, ``p.diag_ggn_mc_batch`` [N, *shape]; see `curvfunc.batch_diag_ggn`."""

    def __init__(self, mc_samples: int = 1) -> None:
        self._mc_samples = mc_samples
        super().__init__("diag_ggn_mc_batch")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.BatchDiagGGN(self._mc_samples)


class SqrtGGN(SecondOrderBackpropExtension):
    """Root of the generalized Gauss-Newton matrix."""

    def of_two_losses(self, p: Tensor, one: Tensor, other: Tensor) -> Tensor:
        """The columns of both."""
        if one.shape[1:] != other.shape[1:]:
            _sum(self, p, one[0], other[0])
        return torch.cat([one, other])


class SqrtGGNExact(SqrtGGN):
    """Root of the GGN, ``p.sqrt_ggn_exact`` [C, N, *shape]; see `curvfunc.sqrt_ggn`."""

    def __init__(self, subsampling: Sequence[int] | None = None) -> None:
        super().__init__("sqrt_ggn_exact", subsampling=subsampling)

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.SqrtGGN()


class SqrtGGNMC(_Sampled, SqrtGGN):
    """Monte-Carlo root of the GGN, ``p.sqrt_ggn_mc`` [M, N, *shape]; see `curvfunc.sqrt_ggn`."""

    def __init__(self, mc_samples: int = 1, subsampling: Sequence[int] | None = None) -> None:
        self._mc_samples = mc_samples
        super().__init__("sqrt_ggn_mc", subsampling=subsampling)

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.SqrtGGN(self._mc_samples)


class HBP(SecondOrderBackpropExtension):
    """Kronecker factors of each parameter's block, a list of one or two: `KFAC`, `KFLR` or `KFRA`, by BackPACK's options.

    Args:
        curv_type: The matrix, of `Curvature`.
        loss_hessian_strategy: Of `LossHessianStrategy`.
        backprop_strategy: Of `BackpropStrategy`.
        ea_strategy: Of `ExpectationApproximation`.
        savefield: Name of the attribute.
    """

    _mc_samples: int = 1

    def __init__(
        self,
        curv_type: str = Curvature.GGN,
        loss_hessian_strategy: str = LossHessianStrategy.EXACT,
        backprop_strategy: str = BackpropStrategy.SQRT,
        ea_strategy: str = ExpectationApproximation.BOTEV_MARTENS,
        savefield: str = "hbp",
    ) -> None:
        super().__init__(savefield)
        self.curv_type, self.ea_strategy = curv_type, ea_strategy
        self.loss_hessian_strategy, self.backprop_strategy = loss_hessian_strategy, backprop_strategy

    def get_curv_type(self) -> str:
        """The matrix."""
        return self.curv_type

    def get_loss_hessian_strategy(self) -> str:
        """What goes back from the loss."""
        return self.loss_hessian_strategy

    def get_backprop_strategy(self) -> str:
        """How it goes back."""
        return self.backprop_strategy

    def get_ea_strategy(self) -> str:
        """How a layer's block is approximated."""
        return self.ea_strategy

    def quantity(self) -> Quantity:
        """Its spec."""
        specs: dict[tuple[str, str], Quantity] = {
            (LossHessianStrategy.EXACT, BackpropStrategy.SQRT): quantities.KFLR(),
            (LossHessianStrategy.SAMPLING, BackpropStrategy.SQRT): quantities.KFAC(self._mc_samples),
            (LossHessianStrategy.SUM, BackpropStrategy.BATCH_AVERAGE): quantities.KFRA(),
        }
        spec = specs.get((self.loss_hessian_strategy, self.backprop_strategy))
        known = self.curv_type == Curvature.GGN and self.ea_strategy == ExpectationApproximation.BOTEV_MARTENS
        if spec is None or not known:
            raise NotImplementedError(
                f"HBP: curv_type={self.curv_type!r}, loss_hessian_strategy={self.loss_hessian_strategy!r}, "
                f"backprop_strategy={self.backprop_strategy!r} and ea_strategy={self.ea_strategy!r} do not go together here. "
                "There are KFLR (exact, sqrt), KFAC (sampling, sqrt) and KFRA (sum, average), of the GGN, by Botev and Martens."
            )
        return spec


class KFAC(_Sampled, HBP):
    """Kronecker factors from Monte-Carlo draws, the list ``p.kfac``; see `curvfunc.kfac`."""

    def __init__(self, mc_samples: int = 1) -> None:
        self._mc_samples = mc_samples
        super().__init__(
            loss_hessian_strategy=LossHessianStrategy.SAMPLING, backprop_strategy=BackpropStrategy.SQRT, savefield="kfac"
        )


class KFLR(HBP):
    """Kronecker factors from the exact loss Hessian, the list ``p.kflr``; see `curvfunc.kflr`."""

    def __init__(self) -> None:
        super().__init__(
            loss_hessian_strategy=LossHessianStrategy.EXACT, backprop_strategy=BackpropStrategy.SQRT, savefield="kflr"
        )


class KFRA(HBP):
    """Kronecker factors with averaging at each layer, the list ``p.kfra``; see `curvfunc.kfra`."""

    def __init__(self) -> None:
        super().__init__(
            loss_hessian_strategy=LossHessianStrategy.SUM, backprop_strategy=BackpropStrategy.BATCH_AVERAGE, savefield="kfra"
        )


class DiagHessian(SecondOrderBackpropExtension):
    """Diagonal of the Hessian, ``p.diag_h`` [*shape]; see `curvfunc.diag_hessian`."""

    of_two_losses = _sum

    def __init__(self) -> None:
        super().__init__("diag_h")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.DiagHessian()


class BatchDiagHessian(SecondOrderBackpropExtension):
    """Each sample's part of the Hessian's diagonal, ``p.diag_h_batch`` [N, *shape]; see `curvfunc.batch_diag_hessian`."""

    of_two_losses = _sum

    def __init__(self) -> None:
        super().__init__("diag_h_batch")

    def quantity(self) -> Quantity:
        """Its spec."""
        return quantities.BatchDiagHessian()


# -- products


class MatrixProduct(SecondOrderBackpropExtension):
    """A function on each parameter that multiplies [V, *shape] with its block of a curvature matrix.

    While one is active, backward passes leave the graph in memory (`curvfunc.compat.graphs` says for whom). The functions
    work as long as the extended module is there.
    """

    def matrix(self) -> Any:
        """The matrix, as `curvfunc.operators.linearization` knows it."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it multiplies with. {WRITE_A_QUANTITY}")


def _both(ext: BackpropExtension, p: Tensor, one: Product, other: Product) -> Product:
    return lambda v: one(v) + other(v)


class HMP(MatrixProduct):
    """Products with Hessian blocks, ``p.hmp``; see `curvfunc.hmp`."""

    def __init__(self, savefield: str = "hmp") -> None:
        super().__init__(savefield)

    of_two_losses = _both

    def matrix(self) -> Any:
        """The Hessian."""
        return Hessian()


class GGNMP(MatrixProduct):
    """Products with GGN blocks, ``p.ggnmp``; see `curvfunc.ggnmp`."""

    def __init__(self, savefield: str = "ggnmp") -> None:
        super().__init__(savefield)

    of_two_losses = _both

    def matrix(self) -> Any:
        """The GGN."""
        return GaussNewton()


class PCHMP(MatrixProduct):
    """Products with blocks of the positive-curvature Hessian, ``p.pchmp``; see `curvfunc.pchmp`.

    Args:
        savefield: Name of the attribute.
        modify: ``"clip"`` or ``"abs"``, what becomes of negative curvature.
    """

    def __init__(self, savefield: str = "pchmp", modify: Literal["clip", "abs"] = "clip") -> None:
        super().__init__(savefield)
        self._modify = modify

    def get_modification_mode(self) -> str:
        """What becomes of negative curvature."""
        return self._modify

    def matrix(self) -> Any:
        """The positive-curvature Hessian."""
        return PositiveCurvature(self._modify)
