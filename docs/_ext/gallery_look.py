"""How all pictures of the gallery look, and what each script starts from; so that scripts need to say neither."""

import random
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from cycler import cycler

# Okabe and Ito's palette: told apart by colour-blind readers, and in grey
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LOOK = {
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "font.size": 10,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": False,
    "grid.color": "0.9",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "image.cmap": "magma",
}
# The order in which a reader meets them
ORDER = [
    *("glance", "signal", "subsampling", "jacobians", "ntk", "diag_ggn_step", "kfac_adam", "curvature_training", "spectrum"),
    *("transformer", "pinn", "laplace", "influence", "private", "ensemble", "compiled"),
]


class InOrder:
    """Sorts the gallery's files as `ORDER` does; what is not in it comes last."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, filename: str) -> tuple[int, str]:
        """The key of a file."""
        name = Path(filename).stem.removeprefix("plot_")
        return (ORDER.index(name) if name in ORDER else len(ORDER), name)


def reset(gallery_conf: dict[str, Any], fname: str) -> None:
    """The look, one thread, float32, and seeds."""
    plt.rcParams.update(LOOK)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
