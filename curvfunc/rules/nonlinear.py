"""Which operations curve, and how, by the node that autograd keeps for them.

The Hessian of a composition is made of the second derivatives of its operations. The autograd graph lists the operations
that really ran, so that none can hide in a composite. What is not listed here counts as unknown.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch.autograd.graph import Node

__all__ = [
    "COMPOSITES",
    "Curve",
    "curve",
    "is_diagonal",
    "is_linear",
    "is_once_differentiable",
    "is_product",
    "is_reshape",
    "name_of",
    "operation",
    "takes_data",
]


@dataclass(frozen=True)
class Curve:
    """Where the second derivative of an operation z = f(a, b, ...) can be nonzero.

    Attributes:
        elementwise: The inputs in which f is smooth and elementwise: ∂²f/∂a² is diagonal, and autograd has it.
        unknown: The inputs in which nothing is known; None stands for all.
        additive: Whether ∂²f/∂a∂b = 0 for each two inputs.
    """

    elementwise: tuple[int, ...] = ()
    unknown: tuple[int, ...] | None = ()
    additive: bool = False


UNKNOWN = Curve(unknown=None)
LINEAR = Curve(additive=True)  # linear by pieces, too
MULTILINEAR = Curve()
SMOOTH = Curve(elementwise=(0,))

# Python functions that are elementwise as a whole, though made of operations that are not.
COMPOSITES = frozenset({F.softsign})

_LINEAR = """
    Add Sub Rsub Neg Sum Mean Cumsum Cat Stack Select Slice Split SplitWithSizes Unbind Index IndexSelect Gather Diagonal
    Transpose Permute T Expand Repeat Roll Flip Tril Triu Squeeze Unsqueeze View UnsafeView ReshapeAlias Alias Clone
    ToCopy AsStrided Unfold Im2Col Col2Im ConstantPadNd Embedding BackwardHookFunction
    Complex ViewAsComplex ViewAsReal Conj ConjPhysical FftR2C FftC2R FftC2C
    ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D ReplicationPad3D
    AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D PixelShuffle PixelUnshuffle ChannelShuffle NativeDropout
    UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D
    UpsampleTrilinear3D"""
_PIECEWISE_LINEAR = """
    Relu Threshold LeakyRelu RreluWithNoise Hardtanh Hardsigmoid Hardshrink Softshrink Abs Clamp ClampMin ClampMax
    Maximum Minimum Max Min Amax Amin Sort Topk Where MaskedFill NanToNum Round Floor Ceil Trunc Sign Frac
    MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D AdaptiveMaxPool3D"""
_MULTILINEAR = "Mul Mm Bmm Mv Dot Addmm Baddbmm Addmv Addcmul Linear Convolution Trilinear PreluKernel"
_SMOOTH = """
    Sigmoid Tanh Gelu Silu Mish Elu Celu Softplus LogSigmoid Hardswish
    Exp Exp2 Expm1 Log Log2 Log10 Log1P Sqrt Rsqrt Reciprocal Sin Cos Tan Asin Acos Atan Sinh Cosh Tanh Asinh Acosh Atanh
    Erf Erfc Erfinv Logit Lgamma"""
_NORMS = "NativeLayerNorm NativeGroupNorm"
_DIAGONAL = """
    Add Sub Rsub Neg Mul Div Clone Alias ToCopy View UnsafeView ReshapeAlias Squeeze Unsqueeze NativeDropout
    Relu Threshold LeakyRelu RreluWithNoise Hardtanh Hardsigmoid Hardshrink Softshrink Abs Clamp Where MaskedFill
    PreluKernel"""

_ONCE = {"Hardsigmoid", "WeightNormInterface", "Logcumsumexp", "Sinc", "EmbeddingBag", "Cdist"}
_RESHAPES = {"Clone", "Alias", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}
_PRODUCTS = {"Mm", "Bmm", "Addmm", "Linear", "Convolution"}
_BY_DATA = {*_PRODUCTS, "Gather", "Index", "IndexSelect"}

_CURVES = {
    **dict.fromkeys(_LINEAR.split(), LINEAR),
    **dict.fromkeys(_PIECEWISE_LINEAR.split(), LINEAR),
    **dict.fromkeys(_MULTILINEAR.split(), MULTILINEAR),
    **dict.fromkeys(_SMOOTH.split(), SMOOTH),
    **dict.fromkeys(_NORMS.split(), Curve(unknown=(0,))),  # x̂ γ + β: linear in γ and in β
    "Div": Curve(elementwise=(1,)),
}
_BATCH_NORMS = {f"{library}BatchNormBackward0" for library in ("Native", "Cudnn", "Miopen")}
_DIAGONALS = {*_DIAGONAL.split(), *_SMOOTH.split()}
_POWERS = {"PowBackward0": SMOOTH, "PowBackward1": Curve(elementwise=(0, 1)), "PowBackward2": Curve(elementwise=(0,))}


def name_of(node: Node) -> str:
    """What torch calls the operation behind a node; none for functions of users, which may have the names of torch's."""
    if isinstance(node, torch._C._FunctionBase):
        made_by = getattr(node, "_forward_cls", None)
        if made_by is None or not made_by.__module__.startswith(("torch.", "curvfunc.")):
            return ""
    return node.name()


def curve(node: Node) -> Curve:
    """What is known of the operation behind a node."""
    name = name_of(node)
    if name in _BATCH_NORMS:  # by running statistics it is a scaling; instance norms use their own
        return UNKNOWN if getattr(node, "_saved_training", True) else MULTILINEAR
    known = _curve(name)
    return UNKNOWN if (known.elementwise or name == "AbsBackward0") and _is_complex(node) else known


def _is_complex(node: Node) -> bool:
    """Whether an operation takes or makes complex numbers: as maps of pairs of reals, elementwise ones are not diagonal."""
    places = [(node, 0), *node.next_functions]
    return any(n is not None and n._input_metadata[number].dtype.is_complex for n, number in places)


@cache
def _curve(name: str) -> Curve:
    return _POWERS.get(name) or _CURVES.get(_without_number(name), UNKNOWN)


def is_diagonal(node: Node) -> bool:
    """Whether entry i of the output depends on entry i of each input only, counted flat, up to broadcasting."""
    name = name_of(node)
    if name in _BATCH_NORMS:
        return not getattr(node, "_saved_training", True)
    return operation(node) in _DIAGONALS


def is_reshape(node: Node) -> bool:
    """Whether the entries stay the same, in the same order."""
    return operation(node) in _RESHAPES


def is_linear(node: Node) -> bool:
    """Whether the operation is linear, up to a constant, in any one of its inputs."""
    name = operation(node)
    return name in _PRODUCTS or (name in _LINEAR.split() and name not in ("NativeDropout", "Embedding"))


def is_product(node: Node) -> bool:
    """Whether the operation is a linear layer, a convolution or a product of matrices."""
    return operation(node) in _PRODUCTS


def takes_data(node: Node) -> bool:
    """Whether the Jacobian of a linear operation has another input in it, beyond layers' weights."""
    return operation(node) in _BY_DATA


def is_once_differentiable(node: Node) -> bool:
    """Whether the operation's backward pass has no derivative or a wrong one, although what runs in its place has one."""
    name = operation(node)
    return name in _ONCE or name.startswith("ScaledDotProduct")


def operation(node: Node) -> str:
    """``AddmmBackward0`` is ``Addmm``; the digits number the overloads, which all behave alike."""
    return _without_number(name_of(node))


def _without_number(name: str) -> str:
    return name.rstrip("0123456789").removesuffix("Backward")
