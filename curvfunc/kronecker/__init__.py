"""From Kronecker factors to steps, samples and determinants: algebra of block-diagonal K ≈ B ⊗ A in its eigenbasis.

`curvfunc.kfac` and its like give factors, `structure` tells what they belong to, `decompose` brings both together:

>>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
>>> X, y = torch.randn(8, 4), torch.arange(8) % 3
>>> structure = kronecker.structure(model_fn, params, X)
>>> grad, factors = compute(model_fn, params, X, y, (Grad(), KFAC(joined=True)))
>>> K = kronecker.decompose(factors, structure)
>>> step = kronecker.solve(K, grad, damping=0.01)

Everything is a pure function. Results are as precise as double precision makes them (or single precision, where asked
for); what rounding would spoil is an error that names the parameter and the damping that would do.
"""

from curvfunc.kronecker.algebra import dense, diagonal, inverse, logdet, matmul, power, sample, solve, trace
from curvfunc.kronecker.averages import interpolate
from curvfunc.kronecker.decomposition import Block, Decomposition, decompose, of_diagonal
from curvfunc.kronecker.ekfac import EKFAC, correct, ekfac
from curvfunc.kronecker.structure import Layout, Structure, structure

__all__ = [
    "EKFAC",
    "Block",
    "Decomposition",
    "Layout",
    "Structure",
    "correct",
    "decompose",
    "dense",
    "diagonal",
    "ekfac",
    "interpolate",
    "inverse",
    "logdet",
    "matmul",
    "of_diagonal",
    "power",
    "sample",
    "solve",
    "structure",
    "trace",
]
