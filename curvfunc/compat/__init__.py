"""BackPACK's names and behaviour: legacy code runs with one import changed.

    from curvfunc.compat import backpack, extend
    from curvfunc.compat.extensions import BatchGrad, KFAC

or, without any change, after ``curvfunc.compat.install()``. Results are attributes of the parameters, as in BackPACK 1.7.1;
this package is the only part of curvfunc that changes modules. The functional form of every name is in ``docs/backpack.md``.
"""

from curvfunc.compat import extensions, hessianfree
from curvfunc.compat.context import CTX, backpack, disable
from curvfunc.compat.names import install, register
from curvfunc.compat.recording import extend, memory_cleanup

__all__ = ["CTX", "backpack", "disable", "extend", "extensions", "hessianfree", "install", "memory_cleanup"]

register()
