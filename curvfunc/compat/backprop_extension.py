"""What BackPACK's extensions are made of: their base classes, and the options of `HBP`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from curvfunc.quantities.quantity import Quantity

__all__ = [
    "FAIL_ERROR",
    "FAIL_SILENT",
    "FAIL_WARN",
    "WRITE_A_QUANTITY",
    "WRITE_A_RULE",
    "BackpropExtension",
    "BackpropStrategy",
    "Curvature",
    "ExpectationApproximation",
    "FirstOrderBackpropExtension",
    "FirstOrderModuleExtension",
    "LossHessianStrategy",
    "ModuleExtension",
    "SecondOrderBackpropExtension",
]

FAIL_ERROR, FAIL_WARN, FAIL_SILENT = "ERROR", "WARNING", "SILENT"

WRITE_A_RULE = (
    "curvfunc knows how an operation differentiates from one rule per operation, for all quantities at once: register a "
    "function with curvfunc.rule, or do nothing, since an operation without a rule is handled by vmap."
)
WRITE_A_QUANTITY = (
    "A new quantity is a function of curvfunc's results: curvfunc.compute(model_fn, params, X, y, specs), or a subclass "
    "of curvfunc.Quantity with the names of its contractions."
)


class BackpropExtension:
    """What `backpack` activates.

    Attributes:
        savefield: Name of the attribute of each parameter that receives the result.
    """

    def __init__(
        self,
        savefield: str,
        module_exts: Any = None,
        fail_mode: str = FAIL_ERROR,
        subsampling: Sequence[int] | None = None,
    ) -> None:
        if fail_mode not in (FAIL_WARN, FAIL_ERROR, FAIL_SILENT):
            raise AssertionError(f"no valid fail mode: {fail_mode}")
        if module_exts:
            raise NotImplementedError(
                f"{type(self).__name__}: module extensions per layer class are not supported. {WRITE_A_QUANTITY} {WRITE_A_RULE}"
            )
        self.savefield = savefield
        self._fail_mode = fail_mode
        self._subsampling = subsampling

    def quantity(self) -> Quantity:
        """The spec of the quantity."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it computes. {WRITE_A_QUANTITY}")

    def set_module_extension(self, module: Any, extension: Any, overwrite: bool = False) -> None:
        """Not supported: a layer is added with a rule."""
        raise NotImplementedError(f"set_module_extension is not supported. {WRITE_A_RULE}")

    def expects_backpropagation_quantities(self) -> bool:
        """Whether an extended loss is needed."""
        return True

    def get_subsampling(self) -> Sequence[int] | None:
        """Indices of the samples, None for all."""
        return self._subsampling

    def of_two_losses(self, p: Tensor, one: Any, other: Any) -> Any:
        """The result for the sum of two losses, from those for each of them.

        Raises:
            ValueError: If it cannot be had from them.
        """
        raise ValueError(
            f"two extended losses of this backward pass depend on a parameter of shape {tuple(p.shape)}, and "
            f"{type(self).__name__} of their sum cannot be had from that of each. Run one backward pass per loss, or use "
            "curvfunc's functions, whose loss may be a sum."
        )


class FirstOrderBackpropExtension(BackpropExtension):
    """What needs the gradients only, and so works with any scalar."""

    def expects_backpropagation_quantities(self) -> bool:
        """An extended loss is not needed."""
        return False


class SecondOrderBackpropExtension(BackpropExtension):
    """What needs the loss Hessian, and so an extended loss."""


class ModuleExtension:
    """BackPACK's base class for what one layer class does for one extension. Not supported: see the error."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise NotImplementedError(f"{cls.__name__}: module extensions are not supported. {WRITE_A_RULE}")


class FirstOrderModuleExtension:
    """BackPACK's base class for first-order module extensions. Not supported: see the error."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        raise NotImplementedError(f"{cls.__name__}: module extensions are not supported. {WRITE_A_RULE}")


# -- options of HBP


class Curvature:
    """The matrices that `HBP` can approximate, as BackPACK names them."""

    HESSIAN, GGN, PCH_CLIP, PCH_ABS = "hessian", "ggn", "pch-clip", "pch-abs"


class LossHessianStrategy:
    """What goes back from the loss: a root of its Hessian, draws, or the sum over samples."""

    EXACT, SAMPLING, SUM = "exact", "sampling", "sum"


class BackpropStrategy:
    """How it goes back: as columns, or averaged over samples at each layer."""

    SQRT, BATCH_AVERAGE = "sqrt", "average"


class ExpectationApproximation:
    """How a layer's block is approximated."""

    BOTEV_MARTENS, CHEN = "E[J^T E(H) J]", "E(J^T) E(H) E(J)"
