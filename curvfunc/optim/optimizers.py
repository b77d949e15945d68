"""Transformations as optimizers of `torch.optim`, over the parameters of a module."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from curvfunc import kronecker
from curvfunc.engine.model import ModelFunction, functionalize
from curvfunc.optim.closures import Look
from curvfunc.optim.diagonal import scale_by_diagonal
from curvfunc.optim.kfac import scale_by_ekfac, scale_by_kfac
from curvfunc.optim.newton import newton_cg
from curvfunc.optim.step import measure
from curvfunc.optim.transformation import Transformation
from curvfunc.quantities.explain import explain
from curvfunc.quantities.quantity import Quantity
from curvfunc.quantities.specs import DiagGGN
from curvfunc.tensors.docstrings import documented, told

__all__ = ["EKFAC", "KFAC", "Diagonal", "NewtonCG", "Preconditioned"]

STATE = "curvature"  # the key of the transformation's state, beside those of the parameters

Make = Callable[[ModelFunction, dict[str, Tensor], Any], Transformation]


class Preconditioned(torch.optim.SGD):
    """SGD on preconditioned gradients: p ← p − lr · m, with m ← momentum · m + u, and u from any transformation.

    A step takes a batch, or a closure as all of `torch.optim` do:

    - ``step(X, y)`` computes loss, gradient and curvature from one forward pass, and returns the loss.
    - ``step(closure)`` takes the gradients that the closure left in ``param.grad``. When curvature is due, it looks on as the
      closure calls the model, and, on its output, `F.cross_entropy`, `F.mse_loss` or `F.binary_cross_entropy_with_logits` (or
      the modules of these); curvature then takes a forward pass of its own. What else the closure adds to the loss is in the
      gradient alone.

    Afterwards ``param.grad`` has the preconditioned gradient. ``precondition`` does only that, for other optimizers of
    torch.optim:

    >>> model = nn.Linear(4, 3)
    >>> kfac, adam = optim.KFAC(model, damping=0.01), torch.optim.Adam(model.parameters(), lr=0.01)
    >>> X, y = torch.randn(8, 4), torch.arange(8) % 3
    >>> loss = kfac.precondition(X, y)
    >>> adam.step()  # on K-FAC's gradients

    (Save the states of both.) Learning-rate schedulers, parameter groups with ``lr``, ``momentum``, ``weight_decay`` and
    ``nesterov`` of their own, ``state_dict``, hooks and ``zero_grad`` are torch's.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Transformation | Make,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        loss_fn: Callable[[Tensor, Any], Tensor] = F.cross_entropy,
        output_fn: Callable[[Any], Tensor] | None = None,
        generator: Generator | None = None,
        chunk_size: int | None = None,
        group: Any = None,
    ) -> None:
        """Take the parameters of a module.

        Args:
            model: The module.
            make: A transformation that ends without ``scale``; or a function that makes one of ``(model_fn, params, X)`` at
                the first step.
            params: Parameters of the module, or groups of them as dictionaries; all that require a gradient if None.
            lr: Learning rate.
            momentum: Of the preconditioned gradients.
            weight_decay: Added to the preconditioned gradients, and so decoupled from curvature.
            nesterov: Whether momentum is Nesterov's.
            loss_fn: ``(output, y) -> scalar``, for ``step(X, y)``.
            output_fn: As in `curvfunc.functionalize`.
            generator: Source of Monte-Carlo draws.
            chunk_size: Number of vectors that are backpropagated together.
            group: Process group, as in `curvfunc.optim.step`, for ``step(X, y)``.

        Raises:
            ValueError: For parameters that are not the model's, or a learning rate that is not finite.
        """
        self.model_fn, _ = functionalize(model, output_fn)
        self.make = make
        self.transformation = make if isinstance(make, Transformation) else None
        self.options: dict[str, Any] = {"generator": generator, "chunk_size": chunk_size, "group": group}
        self.loss_fn = loss_fn
        self.names = {id(p): name for name, p in model.named_parameters()}
        given = [p for p in model.parameters() if p.requires_grad] if params is None else params
        sgd: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(given, lr=lr, **sgd)
        self._named()
        self._check_rates()

    def step(self, X: Any = None, y: Any = None) -> Tensor:  # type: ignore[override]
        """One step on a batch (X, y), or with a closure in the place of X.

        Args:
            X: Input, a tensor [N, ...] or a pytree of tensors; or a closure without arguments that returns the loss, after its
                ``backward``.
            y: Targets, a tensor [N, ...] or a pytree of tensors; none with a closure.

        Returns:
            The loss before the step, a scalar.

        Raises:
            TypeError: If there is neither a batch nor a closure.
            ValueError: If the model does not use some of the parameters, a learning rate is not finite, or where
                `curvfunc.compute` or the transformation raise.
        """
        self._check_rates()
        loss = self.precondition(X, y)
        _plain(torch.optim.SGD.step)(self)
        return loss

    def precondition(self, X: Any = None, y: Any = None) -> Tensor:
        """Put the preconditioned gradient into ``param.grad``; the parameters stay as they are.

        Args:
            X: Input, a tensor [N, ...] or a pytree of tensors; or a closure without arguments that returns the loss, after its
                ``backward``.
            y: Targets, a tensor [N, ...] or a pytree of tensors; none with a closure.

        Returns:
            The loss, a scalar.

        Raises:
            TypeError: If there is neither a batch nor a closure.
            ValueError: If the model does not use some of the parameters, or where `curvfunc.compute` or the transformation
                raise.
        """
        params = self._named()
        values = {name: p.detach() for name, p in params.items()}
        loss, grads, updates = None, None, None
        loss_fn = self.loss_fn
        if X is None or (y is None and not callable(X)):
            raise TypeError(f"{type(self).__name__}: pass a batch, step(X, y), or a closure that returns the loss.")
        if y is None:
            if self.options["group"] is not None:
                raise ValueError("gradients of a closure are those of one process; with a process group, use step(X, y).")
            loss, seen = self._run(X)
            grads = {name: _grad(name, p) for name, p in params.items()}
            if seen is not None:
                X, y, loss_fn = seen
        transformation, state = self._ready(values, X)
        due = transformation.due(state)
        needs = transformation.needs(state, due)
        if grads is None:
            loss, grads, curvature = measure(self.model_fn, values, X, y, needs, loss_fn=loss_fn, **self.options)
        elif optree.tree_leaves(needs):
            _, _, curvature = measure(self.model_fn, values, X, y, needs, loss_fn=loss_fn, **self.options)
        else:
            curvature = needs
        with torch.no_grad():
            updates, self.state[STATE] = transformation.update(grads, state, values, curvature, due)  # type: ignore[index]
            for name, p in params.items():
                p.grad = updates[name].to(p.dtype)
        assert loss is not None
        return loss

    def _named(self) -> dict[str, Tensor]:
        """The parameters of all groups, by name."""
        own = [p for group in self.param_groups for p in group["params"]]
        strangers = [tuple(p.shape) for p in own if id(p) not in self.names]
        if strangers:
            raise ValueError(
                f"{type(self).__name__}: parameters of shapes {strangers} are none of the model's, so that it does "
                f"not use them. Pass "
                "model.parameters(), or some of them, of the same model (after the last .to() that replaces them)."
            )
        return {self.names[id(p)]: p for p in own}

    def _check_rates(self) -> None:
        for i, group in enumerate(self.param_groups):
            if not math.isfinite(float(group["lr"])):
                raise ValueError(
                    f"{type(self).__name__}: the learning rate of group {i} is {float(group['lr'])}; it must be finite."
                )

    def _ready(self, values: dict[str, Tensor], X: Any) -> tuple[Transformation, Any]:
        """The transformation and its state, made at the first step."""
        if self.transformation is None or STATE not in self.state:
            unused = [row.name for row in explain(self.model_fn, values, X).rows if row.rule == "unused"]
            if unused:
                raise ValueError(
                    f"{type(self).__name__}: the model's output does not depend on the parameters {unused}. Leave them out of "
                    "the optimizer (pass the others as params)."
                )
        if self.transformation is None:
            assert not isinstance(self.make, Transformation)
            self.transformation = self.make(self.model_fn, values, X)
        if STATE not in self.state:
            self.state[STATE] = self.transformation.init(values)  # type: ignore[index]
        return self.transformation, self.state[STATE]  # type: ignore[index]

    def _run(self, closure: Callable[[], Tensor]) -> tuple[Tensor, tuple[Any, Any, Any] | None]:
        """The closure's loss; where curvature is due, also the batch and the loss function that it used."""
        known = self.transformation
        with torch.enable_grad():
            if known is not None and STATE in self.state:
                state: Any = self.state[STATE]  # type: ignore[index]
                if not optree.tree_leaves(known.needs(state, known.due(state))):
                    return closure().detach(), None
            look = Look(self.model_fn)
            handle = self.model_fn.module.register_forward_hook(look.called, with_kwargs=True)
            try:
                with look:
                    loss = closure()
            finally:
                handle.remove()
        return loss.detach(), look.batch()


def _grad(name: str, p: Tensor) -> Tensor:
    if p.grad is None:
        raise ValueError(
            f"the closure left no gradient in parameter {name!r}. It has to call loss.backward(), and the loss to use it."
        )
    return p.grad


def _plain(step: Any) -> Any:
    """Torch's step without the hooks around it, which are around ours."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step


class KFAC(Preconditioned):
    """K-FAC: p ← p − lr · m, m ← momentum · m + u, and u = (B ⊗ A + δ)⁻¹ g of each layer's block, with averages of its factors.

    At their k-th renewal factors are averaged as F̄ ← (1 − w) F̄ + w F with w = max(1/k, 1 − β). The same as a pure
    transformation: `scale_by_kfac`.

    ``step(X, y)`` takes a batch, X [N, ...] and y [N, ...], and ``step(closure)`` a closure; both return the loss before it, a
    scalar. ``precondition`` stops at ``param.grad``. Schedulers, parameter groups and ``state_dict`` are torch's.

    References:
        Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate curvature"; Ba, Grosse, Martens
        2017, "Distributed second-order optimization using Kronecker-factored approximations", sec. 5 (clipping).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = optim.KFAC(model, lr=0.1, damping=0.03, factors_every=10, inverses_every=100)
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        >>> for _ in range(3):
        ...     loss = optimizer.step(torch.randn(16, 4), torch.arange(16) % 3)
        ...     scheduler.step()
    """

    @documented(told(Preconditioned.__init__) | told(scale_by_kfac), {})
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        spec: Any = None,
        damping: float = 0.03,
        split: str = "pi",
        decay: float = 0.95,
        kl_clip: float | None = None,
        factors_every: int = 10,
        inverses_every: int = 100,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        """Take the parameters of a module.

        Args:
            options: weight_decay, loss_fn, output_fn, generator, chunk_size and others of `Preconditioned`.
        """
        make: Any = partial(scale_by_kfac, spec=spec, damping=damping, split=split, decay=decay, kl_clip=kl_clip, dtype=dtype)
        make = partial(make, factors_every=factors_every, inverses_every=inverses_every)
        super().__init__(model, _of_structure(make), params, lr=lr, momentum=momentum, **options)


class EKFAC(Preconditioned):
    """E-KFAC: p ← p − lr · m, m ← momentum · m + u, and u = U (Λ + δ)⁻¹ Uᵀ g, with K-FAC's eigenbasis U of each layer's block.

    Λ are moving averages of second moments in that basis; they start anew at K-FAC's eigenvalues when it is renewed. The same
    as a pure transformation: `scale_by_ekfac`.

    ``step(X, y)`` takes a batch, X [N, ...] and y [N, ...], and ``step(closure)`` a closure; both return the loss before it, a
    scalar. ``precondition`` stops at ``param.grad``. Schedulers, parameter groups and ``state_dict`` are torch's.

    References:
        George, Laurent, Bouthillier, Ballas, Vincent 2018, "Fast approximate natural gradient descent in a Kronecker-factored
        eigenbasis".

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = optim.EKFAC(model, lr=0.1, damping=0.01)
        >>> optimizer.step(torch.randn(16, 4), torch.arange(16) % 3).shape
        torch.Size([])
    """

    @documented(told(Preconditioned.__init__) | told(scale_by_ekfac), {})
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        spec: Any = None,
        damping: float = 1e-3,
        decay: float = 0.95,
        kl_clip: float | None = None,
        factors_every: int = 10,
        bases_every: int = 100,
        moments_every: int = 10,
        dtype: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        """Take the parameters of a module.

        Args:
            options: weight_decay, loss_fn, output_fn, generator, chunk_size and others of `Preconditioned`.
        """
        make: Any = partial(scale_by_ekfac, spec=spec, damping=damping, decay=decay, kl_clip=kl_clip, dtype=dtype)
        make = partial(make, factors_every=factors_every, bases_every=bases_every, moments_every=moments_every)
        super().__init__(model, _of_structure(make), params, lr=lr, momentum=momentum, **options)


class Diagonal(Preconditioned):
    """A diagonal of curvature: p ← p − lr · m, m ← momentum · m + u, and u = clip(g / (max(D̄ᵖ, floor) + δ), ±clip).

    D̄ is a moving average of diagonals [*shape], of the GGN unless ``spec`` says otherwise. The same as a pure transformation,
    with the settings of well-known members of the family: `scale_by_diagonal`.

    ``step(X, y)`` takes a batch, X [N, ...] and y [N, ...], and ``step(closure)`` a closure; both return the loss before it, a
    scalar. ``precondition`` stops at ``param.grad``. Schedulers, parameter groups and ``state_dict`` are torch's.

    References:
        Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney 2021, "AdaHessian", eq. 9 and algorithm 1; Liu, Li, Hall, Liang, Ma
        2023, "Sophia", algorithm 3.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = optim.Diagonal(model, lr=0.1, damping=0.1)
        >>> optimizer.step(torch.randn(16, 4), torch.arange(16) % 3).shape
        torch.Size([])
    """

    @documented(told(Preconditioned.__init__) | told(scale_by_diagonal), {})
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        spec: Quantity | None = None,
        damping: float = 1e-3,
        exponent: float = 1.0,
        decay: float = 0.95,
        squares: bool = False,
        bias_correction: bool = True,
        floor: float = 0.0,
        clip: float | None = None,
        every: int = 1,
        **options: Any,
    ) -> None:
        """Take the parameters of a module.

        Args:
            spec: A quantity whose result has the parameter's shape; ``DiagGGN(mc_samples=1)`` if None.
            options: weight_decay, loss_fn, output_fn, generator, chunk_size and others of `Preconditioned`.
        """
        spec = DiagGGN(mc_samples=1) if spec is None else spec
        given: dict[str, Any] = {"damping": damping, "exponent": exponent, "decay": decay, "squares": squares}
        more: dict[str, Any] = {"bias_correction": bias_correction, "floor": floor, "clip": clip, "every": every}
        super().__init__(model, scale_by_diagonal(spec, **given, **more), params, lr=lr, momentum=momentum, **options)


class NewtonCG(Preconditioned):
    """Hessian-free optimization: p ← p − lr · u, and u solves (A + λ) u = g by conjugate gradients.

    A is the GGN or the Hessian of the batch. A learning rate of 1 takes whole steps, for which λ is adapted. The same as a pure
    transformation: `newton_cg`.

    ``step(X, y)`` takes a batch, X [N, ...] and y [N, ...], and ``step(closure)`` a closure; both return the loss before it, a
    scalar. ``precondition`` stops at ``param.grad``. Schedulers, parameter groups and ``state_dict`` are torch's.

    References:
        Martens 2010, "Deep learning via Hessian-free optimization", sec. 4.1 (damping), 4.4 (when to stop), 4.5 (start).

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> optimizer = optim.NewtonCG(model)
        >>> optimizer.step(torch.randn(16, 4), torch.arange(16) % 3).shape
        torch.Size([])
    """

    @documented(told(Preconditioned.__init__) | told(newton_cg), {})
    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1.0,
        matrix: str = "ggn",
        damping: float = 1.0,
        iterations: int = 50,
        tolerance: float = 5e-4,
        warm_start: float = 0.95,
        adapt: float = 1.5,
        mc_samples: int = 0,
        **options: Any,
    ) -> None:
        """Take the parameters of a module.

        Args:
            options: weight_decay, loss_fn, output_fn, generator, chunk_size and others of `Preconditioned`.
        """
        given: dict[str, Any] = {"damping": damping, "iterations": iterations, "tolerance": tolerance, "mc_samples": mc_samples}
        super().__init__(model, newton_cg(matrix, warm_start=warm_start, adapt=adapt, **given), params, lr=lr, **options)


def _of_structure(make: Callable[..., Transformation]) -> Make:
    make(kronecker.Structure(()))  # for its errors
    return lambda model_fn, params, X: make(kronecker.structure(model_fn, params, X))
