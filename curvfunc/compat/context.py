"""Which extensions are active, and whether forward passes are recorded.

BackPACK keeps this for the whole process. Here it belongs to a thread, so that threads with different extensions do not meet.
Hooks of a backward pass may run in other threads, which autograd has for each GPU and for passes inside of passes. So it lies
where torch keeps what these threads take over from the one that called ``backward``.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import isclass
from threading import RLock, local
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from curvfunc.compat.backprop_extension import BackpropExtension
from curvfunc.compat.extensions import MatrixProduct

__all__ = ["CTX", "LOCK", "State", "backpack", "disable", "paused", "retained", "state"]

Hook = Callable[[nn.Module], Any]

# For what all threads share.
LOCK = RLock()


def no_op(module: nn.Module) -> None:
    """The extension hook that is active when none was given."""


@dataclass
class State:
    """What holds for one thread, and for the backward passes that it calls.

    Attributes:
        active_exts: The active extensions.
        debug: Whether messages are printed.
        extension_hook: Called on each module in the backward pass.
        retain_graph: The flag that `backpack` was given.
        store_io: Whether forward passes are recorded.
        paused: How many of curvfunc's own calls run now, which are neither recorded nor reacted to.
        retained: How many backward passes keep the graph although the caller did not ask for it.
        running: Backward passes that run now, by autograd's own number (`curvfunc.compat.delivery.Pass`).
    """

    active_exts: tuple[BackpropExtension, ...] = ()
    debug: bool = False
    extension_hook: Hook = no_op
    retain_graph: bool = False
    store_io: bool = True
    paused: int = 0
    retained: int = 0
    running: dict[int, Any] = field(default_factory=dict)


KEY = "curvfunc.compat"
HELD = local()


def state() -> State:
    """That of this thread; in a hook, that of the thread that called ``backward``."""
    try:
        found: State = torch._C._get_obj_in_tls(KEY)
    except RuntimeError:
        found = HELD.state = State()  # torch 2.11 holds no reference
        torch._C._stash_obj_in_tls(KEY, found)
    return found


class _OfThread:
    """A field of the `State`, as an attribute of a class."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, cls: type, meta: type) -> Any:
        return getattr(state(), self.name)

    def __set__(self, cls: type, value: Any) -> None:
        setattr(state(), self.name, value)


class _Context(type):
    active_exts = _OfThread("active_exts")
    debug = _OfThread("debug")
    extension_hook = _OfThread("extension_hook")
    retain_graph = _OfThread("retain_graph")


class _Recorded(type):
    store_io = _OfThread("store_io")


class CTX(metaclass=_Context):
    """What is active in the backward passes of this thread; ``hook_handles`` are those of the whole process."""

    hook_handles: list[Any] = []  # noqa: RUF012 (its public form)

    @staticmethod
    def set_active_exts(active_exts: Iterable[BackpropExtension]) -> None:
        """Activate these extensions and no others."""
        state().active_exts = tuple(active_exts)

    @staticmethod
    def get_active_exts() -> tuple[BackpropExtension, ...]:
        """The active extensions."""
        return state().active_exts

    @staticmethod
    def is_active() -> bool:
        """Whether any extension is active."""
        return bool(state().active_exts)

    @staticmethod
    def is_extension_active(*extension_classes: type[BackpropExtension]) -> bool:
        """Whether an extension of one of these classes is active."""
        return any(isinstance(e, extension_classes) for e in state().active_exts)

    @staticmethod
    def add_hook_handle(hook_handle: Any) -> None:
        """Remember a handle for `remove_hooks`. Those of modules that are gone are forgotten."""
        with LOCK:
            CTX.hook_handles = [h for h in CTX.hook_handles if getattr(h, "alive", True)] + [hook_handle]

    @staticmethod
    def remove_hooks() -> None:
        """Undo every `extend` of this process."""
        with LOCK:
            handles, CTX.hook_handles = CTX.hook_handles, []
        for handle in handles:
            handle.remove()

    @staticmethod
    def get_debug() -> bool:
        """Whether messages are printed."""
        return state().debug

    @staticmethod
    def set_debug(debug: bool) -> None:
        """Choose whether messages are printed."""
        state().debug = debug

    @staticmethod
    def get_extension_hook() -> Hook:
        """The function that is called on each module in the backward pass."""
        return state().extension_hook

    @staticmethod
    def set_extension_hook(extension_hook: Hook) -> None:
        """Set the function that is called on each module in the backward pass."""
        state().extension_hook = extension_hook

    @staticmethod
    def get_retain_graph() -> bool:
        """The flag that `backpack` was given."""
        return state().retain_graph

    @staticmethod
    def set_retain_graph(retain_graph: bool) -> None:
        """Set the flag. It has no effect: what is recorded lives as long as the graph that ``backward`` keeps."""
        state().retain_graph = retain_graph


class backpack:
    """Activate extensions: every backward pass inside the ``with`` block stores their results on the parameters.

    The forward pass of the extended modules may run inside the block or before it. The block holds for the thread that
    enters it; a thread that is started inside of it has none active.

    Args:
        exts: Instances of the classes in `curvfunc.compat.extensions`.
        extension_hook: Called during the backward pass on each module when its parameters have their results. It may
            delete them, so that memory stays flat.
        debug: Print what runs.
        retain_graph: Accepted. Whether a second backward pass can follow is decided by ``backward(retain_graph=...)``.

    Raises:
        ValueError: If one of ``exts`` is not an instance of an extension.

    Example:
        >>> import torch
        >>> from curvfunc.compat import backpack, extend, extensions
        >>> model, loss_fn = extend(torch.nn.Linear(4, 3)), extend(torch.nn.CrossEntropyLoss())
        >>> loss = loss_fn(model(torch.randn(8, 4)), torch.arange(8) % 3)
        >>> with backpack(extensions.BatchGrad(), extensions.KFLR()):
        ...     loss.backward()
        >>> model.weight.grad_batch.shape, [f.shape for f in model.weight.kflr]
        (torch.Size([8, 3, 4]), [torch.Size([3, 3]), torch.Size([4, 4])])
    """

    def __init__(
        self,
        *exts: BackpropExtension,
        extension_hook: Hook | None = None,
        debug: bool = False,
        retain_graph: bool = False,
    ) -> None:
        for ext in exts:
            if isclass(ext) and issubclass(ext, BackpropExtension):
                raise ValueError(
                    f"backpack takes instances of extensions, got the class {ext.__name__}: write {ext.__name__}()."
                )
            if not isinstance(ext, BackpropExtension):
                raise ValueError(
                    f"backpack takes instances of extensions such as BatchGrad(), got {ext!r} of type {type(ext).__name__}."
                )
        self.exts = exts
        self.extension_hook = no_op if extension_hook is None else extension_hook
        self.debug = debug
        self.retain_graph = retain_graph

    def __enter__(self) -> None:
        now = state()
        self._before = now.active_exts, now.debug, now.extension_hook, now.retain_graph
        self._set(self.exts, self.debug, self.extension_hook, self.retain_graph)
        self._mode = retaining() if any(isinstance(ext, MatrixProduct) for ext in self.exts) else nullcontext()
        self._mode.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._mode.__exit__(kind, error, trace)
        self._set(*self._before)
        state().running.clear()  # what passes that failed have left

    @staticmethod
    def _set(exts: tuple[BackpropExtension, ...], debug: bool, hook: Hook, retain_graph: bool) -> None:
        CTX.set_active_exts(exts)
        CTX.set_debug(debug)
        CTX.set_extension_hook(hook)
        CTX.set_retain_graph(retain_graph)


# What runs a backward pass.
PASSES = {torch.Tensor.backward, torch.autograd.backward, torch.autograd.grad}


class retaining(TorchFunctionMode):
    """Backward passes leave the graph as it is, for functions that are called after them."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func``, with ``retain_graph`` if it is a backward pass that would free the graph."""
        kwargs = kwargs or {}
        keeps = kwargs.get("create_graph") if kwargs.get("retain_graph") is None else kwargs["retain_graph"]
        if func not in PASSES or keeps or (now := state()).paused:
            return func(*args, **kwargs)
        now.retained += 1
        try:
            return func(*args, **{**kwargs, "retain_graph": True})
        finally:
            now.retained -= 1


def retained() -> bool:
    """Whether the backward pass that runs now keeps the graph, whoever asked for it."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


class disable(metaclass=_Recorded):
    """Do not record the forward passes of extended modules inside the ``with`` block, in this thread.

    They then run as if they were not extended; a backward pass through them under active extensions raises.
    """

    def __enter__(self) -> None:
        self._before = state().store_io
        state().store_io = False

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        state().store_io = self._before

    @staticmethod
    def should_store_io() -> bool:
        """Whether forward passes are recorded."""
        return state().store_io


@contextmanager
def paused() -> Iterator[None]:
    """Neither record calls nor react to backward passes: they are curvfunc's own."""
    now = state()
    now.paused += 1
    try:
        yield
    finally:
        now.paused -= 1
