"""BackPACK's module names, under which curvfunc.compat can be imported: ``backpack.utils.kroneckers`` and so on."""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from curvfunc.compat import context, examples, extensions, hessianfree, kronecker_lists, modules
from curvfunc.compat.backprop_extension import WRITE_A_RULE

__all__ = ["install", "register"]


class weight_jac_t_save_memory:
    """Accepted as a context manager, without effect: memory is bounded by working in blocks, always."""

    def __init__(self, save_memory: bool = True) -> None:
        self.save_memory = save_memory

    def __enter__(self) -> None:
        """Nothing."""

    def __exit__(self, *error: object) -> None:
        """Nothing."""


def _some(source: ModuleType, names: str) -> dict[str, Any]:
    return {name: getattr(source, name) for name in names.split()}


_FIRST = _some(extensions, "BatchGrad BatchL2Grad SumGradSquared Variance")
_SECOND = _some(
    extensions,
    "DiagGGNExact DiagGGNMC BatchDiagGGNExact BatchDiagGGNMC DiagHessian BatchDiagHessian HBP KFAC KFLR KFRA "
    "SqrtGGNExact SqrtGGNMC",
)
_HBP = _some(extensions, "HBP KFAC KFLR KFRA")
_HBP_OPTIONS = _some(extensions, "BackpropStrategy ExpectationApproximation LossHessianStrategy")
_PRODUCTS = _some(extensions, "GGNMP HMP PCHMP")
_HVP = _some(hessianfree, "hessian_vector_product")
_GGNVP = _some(hessianfree, "ggn_vector_product ggn_vector_product_from_plist")
_ROP = _some(hessianfree, "R_op jacobian_vector_product")
_LOP = _some(hessianfree, "L_op transposed_jacobian_vector_product")
_KRONECKERS = (
    "kfacs_to_mat two_kfacs_to_mat kfac_mat_prod apply_kfac_mat_prod inv_kfac_mat_prod apply_inv_kfac_mat_prod inv_kfacs "
    "is_matrix is_vector is_tensor_of_order all_tensors_of_order"
)

# BackPACK's modules, parents before children, and the names that each has.
LAYOUT: dict[str, dict[str, Any]] = {
    "context": _some(context, "CTX"),
    "extensions": _FIRST | _SECOND | _PRODUCTS,
    "extensions.backprop_extension": _some(extensions, "BackpropExtension FAIL_ERROR FAIL_WARN FAIL_SILENT"),
    "extensions.curvature": _some(extensions, "Curvature"),
    "extensions.module_extension": _some(extensions, "ModuleExtension"),
    "extensions.firstorder": _FIRST,
    "extensions.firstorder.base": _some(extensions, "FirstOrderBackpropExtension FirstOrderModuleExtension"),
    "extensions.firstorder.batch_grad": _some(extensions, "BatchGrad"),
    "extensions.firstorder.batch_l2_grad": _some(extensions, "BatchL2Grad"),
    "extensions.firstorder.sum_grad_squared": _some(extensions, "SumGradSquared"),
    "extensions.firstorder.variance": _some(extensions, "Variance"),
    "extensions.secondorder": _SECOND,
    "extensions.secondorder.base": _some(extensions, "SecondOrderBackpropExtension"),
    "extensions.secondorder.diag_ggn": _some(
        extensions, "DiagGGN DiagGGNExact DiagGGNMC BatchDiagGGN BatchDiagGGNExact BatchDiagGGNMC"
    ),
    "extensions.secondorder.diag_hessian": _some(extensions, "DiagHessian BatchDiagHessian"),
    "extensions.secondorder.hbp": _HBP | _HBP_OPTIONS,
    "extensions.secondorder.hbp.hbp_options": _HBP_OPTIONS,
    "extensions.secondorder.sqrt_ggn": _some(extensions, "SqrtGGN SqrtGGNExact SqrtGGNMC"),
    "extensions.curvmatprod": _PRODUCTS,
    "extensions.curvmatprod.hmp": _some(extensions, "HMP"),
    "extensions.curvmatprod.ggnmp": _some(extensions, "GGNMP"),
    "extensions.curvmatprod.pchmp": _some(extensions, "PCHMP"),
    "core": {},
    "core.layers": _some(modules, "Flatten"),
    "core.derivatives": {},
    "core.derivatives.convnd": {"weight_jac_t_save_memory": weight_jac_t_save_memory},
    "custom_module": _some(modules, "Pad Slicing"),
    "custom_module.branching": _some(modules, "Parallel SumModule _Branch"),
    "custom_module.pad": _some(modules, "Pad"),
    "custom_module.permute": _some(modules, "Permute"),
    "custom_module.reduce_tuple": _some(modules, "ReduceTuple"),
    "custom_module.scale_module": _some(modules, "ScaleModule"),
    "custom_module.slicing": _some(modules, "Slicing"),
    "branching": _some(modules, "Parallel SumModule"),
    "hessianfree": {},
    "hessianfree.hvp": _HVP,
    "hessianfree.ggnvp": _GGNVP,
    "hessianfree.rop": _ROP,
    "hessianfree.lop": _LOP,
    "utils": {},
    "utils.convert_parameters": _some(kronecker_lists, "vector_to_parameter_list"),
    "utils.kroneckers": _some(kronecker_lists, _KRONECKERS),
    "utils.module_classification": _some(modules, "is_loss is_nll is_no_op"),
    "utils.subsampling": _some(kronecker_lists, "subsample"),
    "utils.examples": _some(examples, "autograd_diag_ggn_exact get_mnist_dataloader load_mnist_dataset load_one_batch_mnist"),
}


def register() -> None:
    """Make BackPACK's modules importable below `curvfunc.compat`; modules that it has gain the names they lack."""
    root = "curvfunc.compat"
    for name, contents in LAYOUT.items():
        full = f"{root}.{name}"
        module = sys.modules.get(full)
        if module is None:
            module = sys.modules[full] = ModuleType(full, f"BackPACK's ``{name}``, see `curvfunc.compat`.")
        module.__path__ = getattr(module, "__path__", [])
        for key, value in contents.items():
            setattr(module, key, value)
        parent, _, child = full.rpartition(".")
        setattr(sys.modules[parent], child, module)
    sys.meta_path.append(_Explain())


class _Explain(MetaPathFinder):
    """Says what to do instead of importing one of BackPACK's modules that curvfunc does not have."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Raise for what no other finder found."""
        if fullname.startswith("curvfunc.compat.") or (
            fullname.startswith("backpack.") and sys.modules.get("backpack") is sys.modules["curvfunc.compat"]
        ):
            raise ModuleNotFoundError(
                f"curvfunc.compat has no {fullname.removeprefix('curvfunc.compat.')}: BackPACK's derivative classes and "
                f"module extensions have no counterpart. {WRITE_A_RULE}",
                name=fullname,
            )
        return None


def install() -> None:
    """Register `curvfunc.compat` under the name ``backpack``, so that code which imports BackPACK runs unchanged.

    Call it before that code is imported. It holds for this process.

    Raises:
        RuntimeError: If BackPACK itself was imported before.

    Example:
        >>> import curvfunc.compat
        >>> curvfunc.compat.install()  # doctest: +SKIP
        >>> from backpack import backpack, extend  # doctest: +SKIP
    """
    ours, present = sys.modules["curvfunc.compat"], sys.modules.get("backpack")
    if present is ours:
        return
    if present is not None:
        raise RuntimeError(
            f"BackPACK is imported already, from {getattr(present, '__file__', '?')}. Call curvfunc.compat.install() before "
            "anything imports backpack."
        )
    sys.modules["backpack"] = ours
    for name in LAYOUT:
        sys.modules[f"backpack.{name}"] = sys.modules[f"curvfunc.compat.{name}"]
