"""From quantities to steps: preconditioned gradients as pure transformations, and as optimizers of `torch.optim`.

A transformation is a pair of pure functions, ``init(params) -> state`` and ``update(grads, state, params, curvature) ->
(updates, state)``, which says besides what curvature it needs at a step. `step` asks for that together with loss and gradient:

>>> model_fn, params = functionalize(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
>>> X, y = torch.randn(8, 4), torch.arange(8) % 3
>>> method = optim.chain(optim.scale_by_kfac(kronecker.structure(model_fn, params, X)), optim.momentum(0.9), optim.scale(-0.1))
>>> state = method.init(params)
>>> for _ in range(3):
...     loss, params, state = optim.step(model_fn, method, params, state, X, y)

`KFAC`, `EKFAC`, `Diagonal` and `NewtonCG` do the same as a `torch.optim.Optimizer`. What is but a transformation of gradients
(schedules, Adam's moments, weight decay) is left to torch.optim: ``precondition`` leaves its result in ``param.grad``.
"""

from curvfunc.optim.diagonal import scale_by_diagonal
from curvfunc.optim.exact_scale import scale_exactly
from curvfunc.optim.kfac import scale_by_ekfac, scale_by_kfac
from curvfunc.optim.newton import newton_cg
from curvfunc.optim.optimizers import EKFAC, KFAC, Diagonal, NewtonCG, Preconditioned
from curvfunc.optim.step import step
from curvfunc.optim.transformation import Local, Locally, Transformation, apply_updates, chain, momentum, scale

__all__ = [
    "EKFAC",
    "KFAC",
    "Diagonal",
    "Local",
    "Locally",
    "NewtonCG",
    "Preconditioned",
    "Transformation",
    "apply_updates",
    "chain",
    "momentum",
    "newton_cg",
    "scale",
    "scale_by_diagonal",
    "scale_by_ekfac",
    "scale_by_kfac",
    "scale_exactly",
    "step",
]
