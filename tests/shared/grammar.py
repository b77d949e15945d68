"""Random models as source code: pieces that nest and follow each other, each a class of a few lines.

What flows through a model is ``h``, [N, D] or [N, T, D]. Each piece takes one and returns one of the same shape, so that
pieces follow each other in any order; N, T and D are often equal, so that sizes do not tell the axes apart. A piece is a
function that writes the class's parameters and its forward pass with a `Writer`, whose random choices (the variant of the
piece) come from a seed of its own: leaving out another piece does not change it.

Pieces of the group "mix" let samples influence each other, which the library may refuse. All others are models that have a
right answer.
"""

import itertools
import linecache
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from textwrap import dedent, indent
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["PIECES", "Node", "Piece", "Program", "Shape", "random_program", "single", "smaller"]


class Shape(NamedTuple):
    """N samples of T positions (none if 0) of D features."""

    n: int
    t: int
    d: int


class Piece(NamedTuple):
    """A kind of layer; ``time``: needs positions; ``pointwise``: acts on each entry of all axes but the last alone."""

    group: str
    write: Callable[["Writer"], None]
    arity: int
    time: bool
    pointwise: bool


PIECES: dict[str, Piece] = {}


def piece(group: str, *, arity: int = 0, time: bool = False, pointwise: bool = False) -> Callable[..., Any]:
    """Adds a piece under its function's name."""

    def add(write: Callable[["Writer"], None]) -> Callable[["Writer"], None]:
        PIECES[write.__name__] = Piece(group, write, arity, time, pointwise)
        return write

    return add


class Writer:
    """Writes one class. Calling it adds a line of the forward pass."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.n, self.t, self.d = shape
        self.random = random.Random(seed)
        self.top: list[str] = []
        self.init: list[str] = []
        self.forward: list[str] = []
        self.inner: list[Shape] = []

    def __call__(self, *lines: str) -> None:
        self.forward += lines

    @property
    def used(self) -> list[str]:
        """The lines of ``__init__`` without those that only variants that were not picked need."""
        body = "\n".join(self.forward)
        return [
            line
            for line in self.init
            if not (w := re.match(r"self\.(?:register_buffer\(\")?(w\d+)\b", line)) or w[1] in names(body)
        ]

    def pick(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, p: float = 0.5) -> bool:
        return self.random.random() < p

    def name(self) -> str:
        return f"w{len(self.init)}"

    def param(self, *shape: int, init: str | None = None) -> str:
        """A parameter, as an expression."""
        name = self.name()
        sizes = ", ".join(map(str, shape))
        self.init.append(f"self.{name} = nn.Parameter({init or f'0.5 * torch.randn({sizes})'})")
        return f"self.{name}"

    def buffer(self, value: str) -> str:
        name = self.name()
        self.init.append(f'self.register_buffer("{name}", {value})')
        return f"self.{name}"

    def attribute(self, value: str) -> str:
        """A submodule, or anything else that the module keeps."""
        name = self.name()
        self.init.append(f"self.{name} = {value}")
        return f"self.{name}"

    def define(self, text: str) -> None:
        """Code before the class."""
        if (text := dedent(text).strip()) not in self.top:
            self.top.append(text)

    def child(self, shape: Shape | None = None) -> str:
        """The next inner piece."""
        self.inner.append(shape or Shape(self.n, self.t, self.d))
        return f"self.f{len(self.inner) - 1}"

    def linear(self) -> None:
        """Makes ``h`` a new tensor, the result of an operation that the library sees."""
        d = self.d
        how = self.random.choice(["linear", "biased", "matmul", "einsum", "scale", "module"])
        if how == "linear":
            self(f"h = F.linear(h, {self.param(d, d)})")
        elif how == "biased":
            self(f"h = F.linear(h, {self.param(d, d)}, {self.param(d)})")
        elif how == "matmul":
            self(f"h = h @ {self.param(d, d)}")
        elif how == "einsum":
            self(f'h = torch.einsum("...i,io->...o", h, {self.param(d, d)})')
        elif how == "scale":
            self(f"h = h * {self.param(d)}")
        else:
            self(f"h = {self.attribute(f'nn.Linear({d}, {d})')}(h)")

    def activation(self) -> None:
        self(self.pick("h = torch.tanh(h)", "h = F.silu(h)", "h = F.softplus(h)", "h = F.gelu(h)", "h = torch.sigmoid(h)"))


def names(text: str) -> set[str]:
    return set(re.findall(r"\bw\d+\b", text))


# -- a program


@dataclass(frozen=True)
class Node:
    """A piece, the seed of its variant, and what is inside it."""

    name: str
    seed: int
    inner: tuple["Node", ...] = ()

    def __iter__(self) -> Iterator["Node"]:
        yield self
        for node in self.inner:
            yield from node


HEADER = """\
import torch
import torch.nn.functional as F
from torch import nn

import curvfunc

torch.set_default_dtype(torch.float64)
"""
IMPORTS = {"partial(": "from functools import partial\n", "checkpoint(": "from torch.utils.checkpoint import checkpoint\n"}
LOSSES = {
    "F.cross_entropy": "nn.CrossEntropyLoss()",
    'partial(F.cross_entropy, reduction="sum")': 'nn.CrossEntropyLoss(reduction="sum")',
    "F.mse_loss": "nn.MSELoss()",
}
COUNTER = itertools.count()

# Right models that may be refused, on these paths (all if none): the answer is a ValueError or NotImplementedError.
REFUSABLE: dict[str, tuple[str, ...]] = {
    "cached": (),  # what an earlier call left on a module is of other parameters
    "changed": (),
    "dirty": (),
    "checkpointed": (),  # reentrant ones know ``backward`` only
    "seeded": (),  # one by one, samples would draw other numbers
    "own_generator": (),
    "buffers": ("vmap", "grad", "jvp"),  # torch.func does not change them in place
    "mix_by_buffer": ("vmap", "grad", "jvp"),
    **dict.fromkeys(
        ("complex_conv", "complex_in_place", "complex_linear", "complex_nonlinear", "complex_scale", "real_weight_on_complex"),
        ("vmap",),  # some gradients of complex numbers are views that it does not know
    ),
    "spectral": ("vmap",),
    "spectral_in_time": ("vmap",),
    "scripted_function": ("vmap", "grad", "jvp", "compile"),  # torch.func is wrong with nested levels there
    "scripted_module": ("vmap", "grad", "jvp", "compile"),
    "hidden": ("vmap", "grad", "jvp", "compile"),
    "hidden_then_in_place": ("vmap", "grad", "jvp", "compile"),
    "hidden_positions": ("vmap", "grad", "jvp", "compile"),
    "straight_through": ("vmap", "grad", "jvp", "compile"),
}


@dataclass(frozen=True)
class Program:
    """A model with data and a loss."""

    shape: Shape
    body: tuple[Node, ...]
    seed: int
    loss: str = "F.cross_entropy"
    function: bool = False  # the model as a plain function of a dictionary of parameters

    @property
    def pieces(self) -> list[str]:
        return sorted({node.name for top in self.body for node in top})

    @property
    def mixes(self) -> bool:
        return any(PIECES[name].group == "mix" for name in self.pieces)

    def may_refuse(self, path: str) -> bool:
        """Whether a refusal is an answer on a path."""
        if self.mixes or path in ("two losses", "threads"):
            return True
        return any(name in REFUSABLE and (not REFUSABLE[name] or path in REFUSABLE[name]) for name in self.pieces)

    @property
    def source(self) -> str:
        """The program up to its model, data and loss."""
        n, t, d = self.shape
        top, classes, number = [], [], itertools.count()

        def write(node: Node, shape: Shape) -> str:
            writer = Writer(shape, node.seed)
            PIECES[node.name].write(writer)
            name = f"Piece{next(number)}"
            children = [write(c, s) for c, s in zip(node.inner, writer.inner, strict=True)]
            init = writer.used + [f"self.f{i} = {child}()" for i, child in enumerate(children)]
            top.extend(text for text in writer.top if text not in top)
            lines = [f"class {name}(nn.Module):  # {node.name}"]
            if init:
                lines += ["    def __init__(self):", "        super().__init__()", *(f"        {line}" for line in init), ""]
            body = "\n".join([*writer.forward, "return h"])
            classes.append("\n".join([*lines, "    def forward(self, h):", indent(body, 8 * " ")]))
            return name

        names = [write(node, self.shape) for node in self.body]
        sizes = ", ".join(str(s) for s in (n, t, d) if s)
        parts = [
            HEADER,
            *top,
            *classes,
            f"def make():\n    torch.manual_seed({self.seed})\n    return nn.Sequential({', '.join(f'{x}()' for x in names)})",
            f"torch.manual_seed({self.seed})\nX, loss_fn = torch.randn({sizes}), {self.loss}\n"
            + ("y = torch.randn_like(make()(X).detach())" if "mse" in self.loss else f"y = torch.arange({n}) % 3"),
        ]
        text = "\n\n".join(part.strip() for part in parts) + "\n" + self.model()
        return "".join(line for name, line in IMPORTS.items() if name in text) + text

    def model(self) -> str:
        if self.function:
            return (
                "net = make()\nparams = {k: p.detach() for k, p in net.named_parameters()}\n"
                "model_fn = lambda p, x: torch.func.functional_call(net, p, (x,))\n"
            )
        return "net = make()\nmodel_fn, params = curvfunc.functionalize(net)\n"

    def run(self) -> dict[str, Any]:
        """What the program defines. Its source is known to ``inspect``, which scripting reads, and it is a module to dynamo."""
        number = next(COUNTER)
        name = f"<program {number}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(keepends=True), name)
        module = ModuleType(f"program_{number}")
        sys.modules[module.__name__] = module
        exec(compile(self.source, name, "exec"), vars(module))
        return vars(module)


def nodes(rng: random.Random, time: bool, depth: int, names: list[str], pointwise: bool = False) -> Node:
    """A random piece; its inner pieces one level less deep."""
    fits = [
        name
        for name in names
        if not (PIECES[name].arity and not depth)
        and not (PIECES[name].time and not time)
        and not (pointwise and not PIECES[name].pointwise)
    ]
    group = rng.choice(sorted({PIECES[name].group for name in fits}))
    name = rng.choice([name for name in fits if PIECES[name].group == group])
    inner = [nodes(rng, time and name != "fold", depth - 1, names, name == "sequence_first") for _ in range(PIECES[name].arity)]
    return Node(name, rng.randrange(10**6), tuple(inner))


def random_program(seed: int, names: list[str] | None = None) -> Program:
    """A program from a seed: one to three pieces between a layer and a head; one program in four mixes samples."""
    rng = random.Random(seed)
    time = rng.random() < 0.6
    n, t, d = rng.choice([3, 2, 4, 1]), rng.choice([3, 2, 4, 1]) if time else 0, rng.choice([3, 4])
    chosen = names or [name for name, p in PIECES.items() if p.group not in ("mix", "frame")]
    body = [nodes(rng, time, rng.choice([1, 1, 2]), chosen) for _ in range(rng.choice([1, 1, 2, 3]))]
    if names is None and rng.random() < 0.25:
        mixing = [name for name, p in PIECES.items() if p.group == "mix" and (time or not p.time)]
        body.insert(rng.randrange(len(body) + 1), Node(rng.choice(mixing), rng.randrange(10**6)))
    if rng.random() < 0.7:
        body.insert(0, Node("stem", rng.randrange(10**6)))
    body.append(Node("head", rng.randrange(10**6)))
    loss = rng.choice(["F.cross_entropy", *LOSSES])
    return Program(Shape(n, t, d), tuple(body), rng.randrange(1000), loss, rng.random() < 0.25)


def single(name: str, seed: int, *, time: bool | None = None) -> Program:
    """The smallest model with a piece: a layer, the piece, a head."""
    rng = random.Random(seed)
    piece = PIECES[name]
    time = piece.time or piece.arity > 0 if time is None else time or piece.time
    inner = [Node("linear", rng.randrange(10**6)) for _ in range(piece.arity)]
    body = (Node("stem", 0), Node(name, rng.randrange(10**6), tuple(inner)), Node("head", 0))
    return Program(Shape(3, rng.choice([2, 3]) if time else 0, rng.choice([3, 4])), body, rng.randrange(1000))


def smaller(program: Program) -> Iterator[Program]:
    """Programs with one thing less."""

    def without(node: Node) -> Iterator[Node]:
        yield from node.inner
        for i, child in enumerate(node.inner):
            for less in without(child):
                yield replace(node, inner=(*node.inner[:i], less, *node.inner[i + 1 :]))

    body = program.body
    for i in range(len(body)):
        if len(body) > 1:
            yield replace(program, body=body[:i] + body[i + 1 :])
        for less in without(body[i]):
            yield replace(program, body=(*body[:i], less, *body[i + 1 :]))
    n, t, d = program.shape
    needs_time = any(PIECES[name].time for name in program.pieces)
    if t and not needs_time:
        yield replace(program, shape=Shape(n, 0, d))
    if t > 2:
        yield replace(program, shape=Shape(n, 2, d))
    if n > 2:
        yield replace(program, shape=Shape(2, t, d))
    if program.function:
        yield replace(program, function=False)
    if program.loss != "F.cross_entropy":
        yield replace(program, loss="F.cross_entropy")


# -- the frame: what is at the start and the end


@piece("frame")
def stem(w: Writer) -> None:
    w.linear()


@piece("frame")
def head(w: Writer) -> None:
    if w.t:
        w(w.pick("h = h.mean(1)", "h = h[:, -1]", "h = h.sum(1)"))
    w(f"h = {w.attribute(f'nn.Linear({w.d}, 3)')}(h)")


# -- plain layers


@piece("plain", pointwise=True)
def linear(w: Writer) -> None:
    w.linear()


@piece("plain", pointwise=True)
def activation(w: Writer) -> None:
    w.linear()
    w.activation()


@piece("plain", pointwise=True)
def in_place_activation(w: Writer) -> None:
    w.linear()
    w(w.pick("h = F.relu_(h)", "h = F.silu(h, inplace=True)", "h.tanh_()", "h = F.elu_(h)", "h = F.leaky_relu_(h, 0.2)"))


@piece("plain", pointwise=True)
def norm(w: Writer) -> None:
    a, b = w.param(w.d), w.param(w.d)
    w(w.pick(f"h = F.layer_norm(h, ({w.d},), {a}, {b})", f"h = F.rms_norm(h, ({w.d},), {a}) + {b}"))


@piece("plain", time=True)
def channel_norm(w: Writer) -> None:
    a, b = w.param(w.d), w.param(w.d)
    groups = w.pick(1, w.d)
    w(
        w.pick(
            f"h = F.group_norm(h.mT, {groups}, {a}, {b}).mT",
            f"h = F.batch_norm(h.mT, {w.buffer(f'torch.zeros({w.d})')}, {w.buffer(f'torch.ones({w.d})')}, {a}, {b}).mT",
        )
    )


@piece("plain", pointwise=True)
def scale(w: Writer) -> None:
    w(f"h = h * {w.param(w.d)} + {w.param(w.d)}")


@piece("plain", time=True)
def positions(w: Writer) -> None:
    p = w.param(w.t, w.d)
    w(w.pick(f"h = h + {p}", f"h = h * {p}", f"h = h + {w.param(w.t + 2, w.d)}[: h.shape[1]]"))


@piece("plain", time=True)
def conv(w: Writer) -> None:
    w(f"h = F.conv1d(h.mT, {w.param(w.d, w.d, 3)}, {w.param(w.d)}, padding=1).mT")


@piece("plain", time=True)
def attention(w: Writer) -> None:
    d = w.d
    qkv = f"F.linear(h, {w.param(3 * d, d)}, {w.param(3 * d)})"
    if w.chance():
        w(f"q, k, v = {qkv}.chunk(3, -1)", "h = F.scaled_dot_product_attention(q, k, v)")
    else:
        w(f"q, k, v = {qkv}.unflatten(2, (3, 1, {d})).permute(2, 0, 3, 1, 4)")
        w("h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)")
    if w.chance(0.3):
        w.forward.clear()
        w.init.clear()
        m = w.attribute(f"nn.MultiheadAttention({d}, 1, batch_first=True)")
        w(f"h = {m}(h, h, h, need_weights={w.pick('False', 'True')})[0]")


@piece("plain", time=True)
def recurrent(w: Writer) -> None:
    kind = w.pick("GRU", "LSTM", "RNN")
    w(f"h = {w.attribute(f'nn.{kind}({w.d}, {w.d}, batch_first=True)')}(h)[0]")


@piece("plain", time=True)
def token(w: Writer) -> None:
    """A learned token in front, expanded to the batch, a mixing layer over positions, and the token off again."""
    t = w.pick(w.param(1, 1, w.d), w.param(w.d))
    w(f"h = torch.cat([{t}.expand(len(h), 1, -1), h], 1)")
    w(f"h = F.linear(h.mT, {w.param(w.t, w.t + 1)}).mT")


@piece("plain", pointwise=True)
def bottleneck(w: Writer) -> None:
    w(f"h = F.linear(torch.tanh(F.linear(h, {w.param(2, w.d)})), {w.param(w.d, 2)}, {w.param(w.d)})")


@piece("plain", time=True)
def latents(w: Writer) -> None:
    """Learned queries, one per position, pass a layer before they meet the samples."""
    w(f"q = F.linear({w.param(w.t, w.d)}, {w.param(w.d, w.d)})", "h = (q @ h.mT).softmax(-1) @ h")


@piece("plain", time=True)
def hyper(w: Writer) -> None:
    """The mean over time makes each sample a matrix of its own, added to a shared one."""
    d = w.d
    w(f"m = torch.tanh(F.linear(h.mean(1), {w.param(d * d, d)})).unflatten(1, ({d}, {d}))", f"h = h @ ({w.param(d, d)} + m)")


@piece("plain", time=True)
def own_kernel(w: Writer) -> None:
    """Each sample has a convolution of its own, by groups; the bias is shared."""
    d = w.d
    w("n, t, d = h.shape", f"k = F.linear(h.mean(1), {w.param(3 * d, d)}).reshape(n * d, 1, 3)")
    w(f"h = F.conv1d(h.mT.reshape(1, n * d, t), k, {w.param(d)}.repeat(n), padding=1, groups=n * d).view(n, d, t).mT")


@piece("plain", time=True)
def mix_time(w: Writer) -> None:
    w(f"h = F.linear(h.mT, {w.param(w.t, w.t)}).mT")


@piece("plain", pointwise=True)
def made(w: Writer) -> None:
    """A weight that comes from other parameters."""
    d = w.d
    a, b = w.param(d, d), w.param(d, 1)
    w(
        w.pick(
            f"h = F.linear(h, {a} + {b} @ {b}.t())",
            f"h = F.linear(h, F.normalize({a}, dim=1) * {b})",
            f"h = F.linear(h, F.linear({a}, {a}))",
            f"h = F.linear(h, torch.tril({a}))",
            f"h = F.linear(h, ({a} - {a}.mean(1, keepdim=True)) / {a}.std(1, keepdim=True))",
            f"h = F.linear(h, F.batch_norm({a}[None], None, None, {b}.flatten(), training=True)[0])",
            f"h = h @ torch.linalg.qr({a}).Q",
        )
    )


@piece("plain", pointwise=True)
def normalized(w: Writer) -> None:
    dim = w.pick("0", "1", "None")
    w(f"h = {w.attribute(f'nn.utils.parametrizations.weight_norm(nn.Linear({w.d}, {w.d}), dim={dim})')}(h)")


@piece("plain", pointwise=True)
def embedding(w: Writer) -> None:
    w("i = (h.detach() > 0).sum(-1)", f"h = h + F.embedding(i, {w.param(w.d + 1, w.d)})")


@piece("plain", pointwise=True)
def prelu(w: Writer) -> None:
    if w.chance():
        w(f"h = F.prelu(h, {w.param(1)})")
    else:
        a, b = w.param(1), w.param(w.d, w.d)
        w(f"h = F.linear(F.prelu(h, {a}), {b}, {a}.expand({w.d}))")


@piece("plain", pointwise=True)
def bilinear(w: Writer) -> None:
    w(f"h = F.bilinear(h, h.flip(-1), {w.param(w.d, w.d, w.d)}, {w.param(w.d)})")


@piece("plain", pointwise=True)
def buffers(w: Writer) -> None:
    w(f"h = (h - {w.buffer(f'torch.randn({w.d})')}) @ {w.param(w.d, w.d)}")


@piece("plain")
def alike(w: Writer) -> None:
    """Looks like what mixes samples, along another axis."""
    w(
        w.pick(
            "h = h.roll(1, -1)",
            "h = h.flip(-1)",
            "h = h.sort(-1).values",
            "h = h.cumsum(-1)",
            "h = h.softmax(-1)",
            "h = h - h.mean(-1, keepdim=True)",
            "h = F.normalize(h, dim=-1)",
            "h = torch.zeros_like(h).scatter_add(-1, h.argsort(-1), h)",
            "g = h.clone()\ng[..., 0] = h[..., -1]\nh = g",
            "h = h[..., torch.arange(h.shape[-1]).flip(0)]",
            "h = h / h.detach().norm(dim=-1, keepdim=True)",
            "h = h.transpose(0, 1).flip(1).roll(1, 0).flip(1).transpose(0, 1)",
        )
    )
    w.linear()


# -- layers around others


@piece("around", arity=1)
def residual(w: Writer) -> None:
    f = w.child()
    w(w.pick(f"h = h + {f}(h)", f"h = {f}(h).clone().add_(h)", f"g = {f}(h) * 1\ng += h\nh = g"))


@piece("around", arity=1)
def twice(w: Writer) -> None:
    f = w.child()
    w(f"h = {f}(torch.tanh({f}(h)))")


@piece("around", arity=2)
def product(w: Writer) -> None:
    w(f"h = {w.child()}(h) * torch.sigmoid({w.child()}(h))")


@piece("around", arity=2)
def concatenate(w: Writer) -> None:
    f, g = w.child(), w.child()
    w(f"h = F.linear(torch.cat([{f}(h), {g}(h)], -1), {w.param(w.d, 2 * w.d)})")


@piece("around", arity=1, time=True)
def fold(w: Writer) -> None:
    """Positions become samples of an inner network."""
    f = w.child(Shape(w.n * w.t, 0, w.d))
    w("n, t, d = h.shape", f"h = {f}(h.reshape(n * t, d)).view(n, t, d)")


@piece("around", arity=1, time=True)
def windows(w: Writer) -> None:
    """Windows of the sequence become samples."""
    size = w.pick(*[k for k in range(1, w.t + 1) if w.t % k == 0])
    f = w.child(Shape(w.n * w.t // size, size, w.d))
    w("n, t, d = h.shape", f"h = {f}(h.reshape(n * t // {size}, {size}, d)).reshape(n, t, d)")


@piece("around", arity=1, time=True)
def centered(w: Writer) -> None:
    """What the inner piece says of the mean over time goes to all positions."""
    w(f"h = h + {w.child()}(h.mean(1, keepdim=True).expand(-1, h.shape[1], -1))")


@piece("around", arity=1, time=True)
def flipped(w: Writer) -> None:
    w(f"h = {w.child()}(h.flip(1))")


@piece("around", arity=2, time=True)
def half_each(w: Writer) -> None:
    w(f"h = torch.where(torch.arange(h.shape[1])[:, None] % 2 == 0, {w.child()}(h), {w.child()}(h))")


@piece("around", arity=1, time=True)
def sequence_first(w: Writer) -> None:
    f = w.child(Shape(w.t, w.n, w.d))
    w(f"h = {f}(h.transpose(0, 1)).transpose(0, 1)")


@piece("around", arity=1)
def checkpointed(w: Writer) -> None:
    w.linear()  # a reentrant one has gradients only if its input has
    w(f"h = checkpoint({w.child()}, h, use_reentrant={w.pick('False', 'False', 'False', 'True')})")


# -- complex numbers


def complex_weight(w: Writer, *shape: int) -> str:
    """A complex tensor made of real parameters."""
    how = w.pick("pairs", "complex", "polar", "sum")
    if how == "pairs":
        return f"torch.view_as_complex({w.param(*shape, 2)})"
    a, b = w.param(*shape), w.param(*shape)
    return {"complex": f"torch.complex({a}, {b})", "polar": f"torch.polar({a}.exp(), {b})", "sum": f"({a} + 1j * {b})"}[how]


def to_complex(w: Writer) -> None:
    w(
        w.pick(
            "z = torch.view_as_complex(torch.stack([h, 0.5 * h.flip(-1)], -1))",
            "z = torch.complex(h, 0.5 * h.flip(-1))",
            "z = torch.fft.fft(h, dim=-1)",
            "z = h + 0.5j * h.flip(-1)",
            "z = torch.polar(F.softplus(h), h.flip(-1))",
        )
    )


def to_real(w: Writer) -> None:
    w(
        w.pick(
            "h = z.abs()",
            "h = z.real",
            "h = z.imag + z.real",
            "h = torch.view_as_real(z).sum(-1)",
            "h = torch.view_as_real(z)[..., 1]",
            "h = (z * z.conj()).real",
            "h = z.abs().square()",
            "h = torch.fft.ifft(z, dim=-1).real",
            "h = torch.view_as_real(z).flatten(-2)[..., ::2]",
            "h = z.angle()",
        )
    )


@piece("complex", pointwise=True)
def complex_scale(w: Writer) -> None:
    to_complex(w)
    c = complex_weight(w, w.d)
    w(
        w.pick(
            f"z = z * {c}",
            f"z = z * {c}.conj()",
            f"z = z + {c}",
            f"z = {c} * z",
            f"z = torch.mul(z, {c})",
            f"z = z / (2 + {c})",
        )
    )
    to_real(w)


@piece("complex", pointwise=True)
def complex_linear(w: Writer) -> None:
    to_complex(w)
    c = complex_weight(w, w.d, w.d)
    w(
        w.pick(
            f"z = z @ {c}",
            f"z = F.linear(z, {c})",
            f"z = F.linear(z, {c}, {complex_weight(w, w.d)})",
            f'z = torch.einsum("...i,oi->...o", z, {c})',
            f'z = torch.einsum("...i,io->...o", z, {c}.conj())',
            f"z = z @ {c}.mH",
            f"z = torch.matmul({c}, z.unsqueeze(-1)).squeeze(-1)",
        )
    )
    to_real(w)


@piece("complex", pointwise=True)
def real_weight_on_complex(w: Writer) -> None:
    to_complex(w)
    w(
        w.pick(
            f"z = z * {w.param(w.d)}",
            f"z = z / {w.param(w.d)}",
            f"z = z @ {w.param(w.d, w.d)}.to(z.dtype)",
            f"z = F.linear(z, {w.param(w.d, w.d)}.to(z.dtype))",
            f"z = z + {w.param(w.d)}",
            f"z = z * torch.exp(1j * {w.param(w.d)})",
            f"z = z * {w.param(1, init='torch.tensor(0.7)')}",
        )
    )
    to_real(w)


@piece("complex", pointwise=True)
def complex_in_place(w: Writer) -> None:
    to_complex(w)
    w("z = z * 1")
    c = complex_weight(w, w.d)
    w(w.pick(f"z += {c}", f"z.mul_({c})", f"z.real.add_({w.param(w.d)})", f"torch.view_as_real(z).mul_({w.param(w.d, 2)})"))
    to_real(w)


@piece("complex", pointwise=True)
def complex_nonlinear(w: Writer) -> None:
    to_complex(w)
    c = complex_weight(w, w.d)
    w(f"z = z * {c}", w.pick("z = torch.tanh(z)", "z = z * z", "z = (0.3 * z).exp()", "z = z.sigmoid()"))
    to_real(w)


@piece("complex", time=True)
def complex_conv(w: Writer) -> None:
    to_complex(w)
    w(f"z = F.conv1d(z.mT, {complex_weight(w, w.d, w.d, 3)}, padding=1).mT")
    to_real(w)


@piece("complex", pointwise=True)
def spectral(w: Writer) -> None:
    """A filter in Fourier space."""
    d = w.d
    w(
        w.pick(
            f"h = torch.fft.irfft(torch.fft.rfft(h, dim=-1) * {complex_weight(w, d // 2 + 1)}, n={d}, dim=-1)",
            f"h = torch.fft.ifft(torch.fft.fft(h, dim=-1) * {complex_weight(w, d)}, dim=-1).real",
            f"h = torch.fft.ifft(torch.fft.fft(h, dim=-1) * torch.fft.fft({w.param(d)})).real",
            f"h = torch.fft.fft(h @ {w.param(d, d)}, dim=-1).real",
        )
    )


@piece("complex", time=True)
def spectral_in_time(w: Writer) -> None:
    f = w.t // 2 + 1
    w(
        w.pick(
            f"h = torch.fft.irfft(torch.fft.rfft(h, dim=1) * {complex_weight(w, f, w.d)}, n={w.t}, dim=1)",
            f"h = torch.fft.fft2(h @ {w.param(w.d, w.d)}).real",
            f'h = torch.fft.irfft(torch.einsum("nti,tio->nto", torch.fft.rfft(h, dim=1), {complex_weight(w, f, w.d, w.d)}), n={w.t}, dim=1)',
        )
    )


# -- uses that a mode cannot see

SCALE = """
class {name}(torch.autograd.Function):
    {rule}
    @staticmethod
    def forward(ctx, x, w):
        {save}
        return x * w

    @staticmethod
    def backward(ctx, g):
        x, w = {load}
        return g * w, (g * x).reshape(-1, x.shape[-1]).sum(0)
"""
SCALE_SETUP = """
class {name}(torch.autograd.Function):
    {rule}
    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g * w, (g * x).reshape(-1, x.shape[-1]).sum(0)
"""
MULTIPLY = SCALE.replace("x * w", "x @ w").replace(
    "g * w, (g * x).reshape(-1, x.shape[-1]).sum(0)", "g @ w.mT, x.reshape(-1, x.shape[-1]).mT @ g.reshape(-1, g.shape[-1])"
)
MULTIPLY_SETUP = SCALE_SETUP.replace("x * w", "x @ w").replace(
    "g * w, (g * x).reshape(-1, x.shape[-1]).sum(0)", "g @ w.mT, x.reshape(-1, x.shape[-1]).mT @ g.reshape(-1, g.shape[-1])"
)
TWO_RESULTS = """
class TwoResults(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x * w, x + b

    @staticmethod
    def backward(ctx, g, k):
        x, w = ctx.saved_tensors
        sum_up = lambda t: t.reshape(-1, x.shape[-1]).sum(0)
        return g * w + k, sum_up(g * x), sum_up(k)
"""
DIRTY = """
class AddInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b):
        ctx.mark_dirty(x)
        return x.add_(b)

    @staticmethod
    def backward(ctx, g):
        return g, g.reshape(-1, g.shape[-1]).sum(0)
"""
ROUND = """
class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, g):
        return g
"""


NAMES_OF_TORCH = {  # of operations that are linear, or piecewise; Kept ones also have an attribute that nodes of leaves have
    **{"SavedScale": "Relu", "KeptScale": "View", "SetupScale": "Add", "VmappableScale": "Clone"},
    **{"SavedMultiply": "Linear", "KeptMultiply": "Max", "SetupMultiply": "Sub", "VmappableMultiply": "Where"},
}


def function(w: Writer, name: str, plain: str, setup: str) -> str:
    """Defines one kind of autograd.Function; returns its name."""
    how = w.pick("Saved", "Kept", "Setup", "Vmappable")
    name, inputs = how + name, "ctx.inputs"
    if w.pick(True, False):
        name, inputs = NAMES_OF_TORCH[name], "ctx.variable"
    rule = "generate_vmap_rule = True\n" if how == "Vmappable" else ""
    save, load = (f"{inputs} = x, w", inputs) if how == "Kept" else ("ctx.save_for_backward(x, w)", "ctx.saved_tensors")
    text = (plain if how in ("Saved", "Kept") else setup).format(name=name, rule=rule, save=save, load=load)
    w.define(text.replace("    \n", ""))
    return name


def hide(w: Writer) -> None:
    """Makes ``h`` a new tensor by an operation with a parameter that torch functions do not show, or not by name."""
    d = w.d
    how = w.pick("scale", "multiply", "disabled", "scripted", "traced", "aten", "two", "underscore")
    if how == "scale":
        w(f"h = {function(w, 'Scale', SCALE, SCALE_SETUP)}.apply(h, {w.param(d)})")
    elif how == "multiply":
        w(f"h = {function(w, 'Multiply', MULTIPLY, MULTIPLY_SETUP)}.apply(h, {w.param(d, d)})")
    elif how == "disabled":
        name = w.pick("DisableTorchFunction", "DisableTorchFunctionSubclass")
        w(f"with torch._C.{name}():")
        w(
            w.pick(
                f"    h = h @ {w.param(d, d)}",
                f"    h = F.linear(h, {w.param(d, d)}, {w.param(d)})",
                f"    h = h * {w.param(d)}",
            )
        )
    elif how == "scripted":
        w.define("@torch.jit.script\ndef scripted(h, w):\n    return torch.matmul(h, w)")
        w(f"h = scripted(h, {w.param(d, d)})")
    elif how == "traced":
        w.define(f"traced = torch.jit.trace(lambda h, w: torch.matmul(h, w) * 2, (torch.randn(2, {d}), torch.randn({d}, {d})))")
        w(f"h = traced(h, {w.param(d, d)})")
    elif how == "aten":
        a = w.param(d, d)
        w(
            w.pick(
                f"h = torch.ops.aten.matmul.default(h, {a})",
                f"h = torch.ops.aten.linear(h, {a})",
                f"h = torch._C._nn.linear(h, {a})",
            )
        )
    elif how == "two":
        w.define(TWO_RESULTS)
        w(f"g, h = TwoResults.apply(h, {w.param(d)}, {w.param(d)})", "h = h + g")
    else:
        w(
            w.pick(
                f"h = h.__matmul__({w.param(d, d)})", f"h = {w.param(d)}.__rmul__(h)", f"h = torch.Tensor.mul(h, {w.param(d)})"
            )
        )


def change(w: Writer) -> None:
    """Changes ``h`` in place, by parameters or not."""
    d = w.d
    w(
        *w.pick(
            [f"h.add_({w.param(d)})"],
            [f"h += {w.param(d)}"],
            [f"h += {w.param(d)}", "F.relu_(h)"],
            [f"h += {w.param(d)}", f"h += {w.param(d)}"],
            [f"h += {w.param(d)}", "h = h.tanh_()"],
            [f"h.mul_({w.param(d)})"],
            [f"h *= {w.param(d)}", f"h += {w.param(d)}"],
            ["h.mul_(2)", f"h = h + {w.param(d)}"],
            [f"h[..., 0] += {w.param(1, init='torch.tensor(0.3)')}"],
            [f"h -= {w.param(d)}", "h.sigmoid_()"],
            [f"h.addcmul_({w.param(d)}, {w.param(d)})"],
            [f"h.copy_(h * {w.param(d)})"],
            [f"torch.add(h, {w.param(d)}, out=None)", f"h.add_({w.param(d)}, alpha=0.5)"],
        )
    )


@piece("hidden")
def hidden(w: Writer) -> None:
    hide(w)
    if w.chance(0.7):
        w(
            *w.pick(
                ["h = F.relu_(h)"],
                ["h = torch.tanh(h)"],
                [f"h = h + {w.param(w.d)}"],
                ["h = h * 2"],
                [f"h = h @ {w.param(w.d, w.d)}"],
            )
        )


@piece("hidden")
def hidden_then_in_place(w: Writer) -> None:
    hide(w)
    change(w)


@piece("hidden")
def dirty(w: Writer) -> None:
    w.define(DIRTY)
    w.linear()
    w(f"h = AddInPlace.apply(h, {w.param(w.d)})")
    if w.chance():
        w("h = torch.tanh(h)")


@piece("hidden")
def straight_through(w: Writer) -> None:
    w.define(ROUND)
    a = w.param(w.d, w.d)
    w(
        w.pick(
            f"h = F.linear(h, Round.apply({a}))",
            f"h = Round.apply(h @ {a})",
            f"h = F.linear(h, {a} + (torch.sign({a}) - {a}).detach())",
        )
    )


@piece("hidden", time=True)
def hidden_positions(w: Writer) -> None:
    """Parameters with a time axis in a function that the mode does not see."""
    w.define(
        """
        class AddPositions(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, p):
                return x + p

            @staticmethod
            def backward(ctx, g):
                return g, g.sum(0)
        """
    )
    w(f"h = AddPositions.apply(h, {w.param(w.t, w.d)})", w.pick("h += 1", "h = h.tanh_()", "h = h * 2"))


# -- scripted parts


@piece("scripted")
def scripted_function(w: Writer) -> None:
    d = w.d
    how = w.pick("tanh", "two", "branch", "traced")
    if how == "tanh":
        w.define("@torch.jit.script\ndef scripted_tanh(h, w, b):\n    return torch.tanh(torch.matmul(h, w) + b)")
        w(f"h = scripted_tanh(h, {w.param(d, d)}, {w.param(d)})")
    elif how == "two":
        w.define("@torch.jit.script\ndef scripted_gate(h, w):\n    return h * torch.sigmoid(w), h + w")
        w(f"g, h = scripted_gate(h, {w.param(d)})", "h = torch.tanh(h) + g")
    elif how == "branch":
        w.define(
            "@torch.jit.script\ndef scripted_branch(h, w):\n    if h.shape[-1] > 1:\n        h = torch.matmul(h, w)\n    return h.relu()"
        )
        w(f"h = scripted_branch(h, {w.param(d, d)})")
    else:
        w.define(
            f"traced_silu = torch.jit.trace(lambda h, w: F.silu(torch.matmul(h, w)), (torch.randn(2, {d}), torch.randn({d}, {d})))"
        )
        w(f"h = traced_silu(h, {w.param(d, d)})")


@piece("scripted")
def scripted_module(w: Writer) -> None:
    d = w.d
    sizes = f"2, {w.t}, {d}" if w.t else f"2, {d}"
    m = w.pick(
        f"torch.jit.script(nn.Linear({d}, {d}))",
        f"torch.jit.script(nn.Sequential(nn.Linear({d}, {d}), nn.Tanh()))",
        f"torch.jit.trace(nn.Linear({d}, {d}), torch.randn({sizes}))",
        f"torch.jit.trace(nn.Sequential(nn.Linear({d}, {d}), nn.GELU()), torch.randn({sizes}))",
    )
    w(f"h = {w.attribute(m)}(h)")


# -- parts of weights


@piece("parts", pointwise=True)
def part(w: Writer) -> None:
    """A part [D, D] of a matrix twice as long or wide, of its transpose, or of a vector."""
    d, rows, turned = w.d, w.chance(), w.chance()
    shape = (2 * d, d) if rows else (d, 2 * d)
    m = f"{w.param(*reversed(shape))}.t()" if turned else w.param(*shape)
    dim = 0 if rows else w.pick(1, -1)
    at = w.pick(0, 1)
    first, second, strided = (
        f"{m}[{':, ' * (not rows)}{s}]" for s in (f"{at * d}:{at * d + d}", f"{d - at * d}:{2 * d - at * d}", f"{at}::2")
    )
    pieces = w.pick(
        [f"{m}.chunk(2, {dim})[{at}]", f"{m}.chunk(2, {dim})[{1 - at}]"],
        [f"{m}.split({d}, dim={dim})[{at}]", f"{m}.split({d}, dim={dim})[{1 - at}]"],
        [f"{m}.split([{d}, {d}], {dim})[{at}]", f"torch.split({m}, {d}, {dim})[{1 - at}]"],
        [f"{m}.narrow({dim}, {at * d}, {d})", f"{m}.narrow({dim}, {d - at * d}, {d})"],
        [f"{m}.tensor_split(2, {dim})[{at}]", f"{m}.tensor_split(2, {dim})[{1 - at}]"],
        [first, second],
        [strided, first],
        [f"{m}.unflatten({dim}, (2, {d})).select({dim if rows else 1}, {at})", second],
        [f"{m}.index_select({dim}, torch.arange({d}) * 2)", strided],
        [f"{m}.narrow({dim}, 1, {d})", f"{m}.narrow({dim}, {d // 2}, {d})"],
    )
    use = w.pick("F.linear({h}, {a})", "{h} @ {a}", "{h} @ {a}.t()", 'torch.einsum("...i,oi->...o", {h}, {a})')
    w(f"g = {use.format(h='h', a=pieces[0])}")
    w(w.pick("h = g", f"h = g + {use.format(h='h', a=pieces[1])}", f"h = {use.format(h='torch.tanh(g)', a=pieces[1])}"))


@piece("parts", pointwise=True)
def columns(w: Writer) -> None:
    """Some columns of a square weight on some of the features; the rest of it may be in use or not."""
    d, k = w.d, w.pick(1, 2)
    a = w.param(d, d)
    m = w.pick(a, f"{a}.t()")
    c = f"{m}.split([{k}, {d - k}], {w.pick(1, -1)})"
    how = w.pick("first", "second", "both", "narrow")
    if how == "first":
        w(f"h = F.linear(h[..., :{k}], {c}[0])")
    elif how == "second":
        w(f"h = F.linear(h[..., {k}:], {c}[1])")
    elif how == "both":
        w(f"h = F.linear(h[..., :{k}], {c}[0]) + F.linear(torch.tanh(h[..., {k}:]), {c}[1])")
    else:
        w(f"h = h[..., :{k}] @ {m}.narrow(1, {d - k}, {k}).t()")


@piece("parts", time=True)
def kernel_part(w: Writer) -> None:
    """A part of a convolution's kernel."""
    d, at = w.d, w.pick(0, 1)
    rows, columns, taps = w.param(2 * d, d, 3), w.param(d, 2 * d, 3), w.param(d, d, 6)
    kernel = w.pick(
        f"{rows}.chunk(2)[{at}]",
        f"{rows}[{at}::2]",
        f"{columns}.chunk(2, 1)[{at}]",
        f"{columns}[:, {at * d}:{at * d + d}]",
        f"{columns}.transpose(0, 1).split({d})[{at}].transpose(0, 1)",
        f"{taps}[..., {at}::2]",
        f"{taps}.narrow(-1, {at}, 3)",
    )
    w(f"h = F.conv1d(h.mT, {kernel}, padding=1).mT")


@piece("parts", pointwise=True)
def rows(w: Writer) -> None:
    d = w.d
    a, b = w.param(2 * d, d), w.param(2 * d)
    w(
        w.pick(
            f"h = F.linear(h, {a}[:{d}], {b}[{d}:])",
            f"h = F.linear(h, {a}[{d}:], {b}.chunk(2)[1]) * {b}[:{d}]",
            f"h = F.linear(h, {a}[::2], {b}[1::2])",
            f"h = F.linear(h, {a}[:{d}]) + F.linear(torch.tanh(h), {a}[{d}:])",
            f"h = torch.cat([F.linear(h, row[None]) for row in {a}[:{d}]], -1)",
            f"h = h * {a}[0] + {a}[1]",
            f"h = sum(h * row for row in {a}.unbind(0)[:2]) + {b}[:{d}]",
            f"s, t = {b}.chunk(2)\nh = h * s + t",
            f"s, t = {b}.view(2, {d})\nh = F.layer_norm(h, ({d},), s, t)",
        )
    )


# -- results that share memory, or are expanded


@piece("shared", pointwise=True)
def shared(w: Writer) -> None:
    d = w.d
    a, b = w.param(d), w.param(d)
    w(
        w.pick(
            f"h = h @ {w.param(d, d)} + {a} + {b}",
            f"h = h + {a} + {b}",
            f"h = (h + {a}) + {a}",
            f"h = F.linear(h, {w.param(d, d)}, {a}) + {b}",
            f"h = h + ({a} + {b})",
            f"h = h + {a} - {b}",
            f"h = h + torch.stack([{a}, {b}]).sum(0)",
            f"h = h + {a}.expand_as(h)",
            f"h = h + {a}.view(1, -1).expand(len(h), -1)" if not w.t else f"h = h + {a}[None, None].expand(len(h), {w.t}, -1)",
            f"h = torch.add(torch.add(h, {a}), {b}, alpha=1)",
            f"h = h + {w.param(1)} + {w.param(1)}",
            f"h = h + {a}.clone() + {b}.view(-1)",
        )
    )


@piece("shared", time=True)
def expanded(w: Writer) -> None:
    """The gradient of a position is the same for all of them."""
    a = w.param(w.t, w.d)
    w(
        w.pick(
            f"h = h + {a}.sum(0)",
            f"h = h.mean(1, keepdim=True) + {a}",
            f"h = h.sum(1, keepdim=True).expand_as(h) + {a}",
            f"h = h + {a}.mean()",
        )
    )


# -- scalars


@piece("scalar", pointwise=True)
def scalar(w: Writer) -> None:
    t = w.param(1, init=f"torch.tensor({w.pick(0.7, 1.3)})")
    w(
        w.pick(
            f"h = h / {t}",
            f"h = h * {t}",
            f"h = {t} * h",
            f"h = h + {t}",
            f"h = h - {t}",
            f"h = h * {t}.exp()",
            f"h = (h / {t}).softmax(-1)",
            f"h = F.softplus(h) ** {t}",
            f"h = torch.lerp(h, torch.tanh(h), {t})",
            f"h = h * torch.sigmoid({t}) + torch.tanh(h) * (1 - torch.sigmoid({t}))",
            f"h = torch.where(h > 0, h, {t} * h)",
            f"h = F.linear(h, {t} * {w.param(w.d, w.d)})",
            f"h = h * {t}\nh += {t}",
            f"h = h @ {w.param(w.d, w.d)}\nh *= {t}",
            f"h = torch.addcmul(h, {t}, torch.tanh(h))",
            f"h = torch.minimum(h, {t})",
        )
    )


# -- in place


@piece("in place", pointwise=True)
def in_place(w: Writer) -> None:
    w.linear()
    d = w.d
    w(
        *w.pick(
            [f"h += {w.param(d)}", "F.relu_(h)"],
            [f"h += {w.param(d)}", f"h += {w.param(d)}"],
            [f"g = h + {w.param(d)}", "h += 1", "h = h + g"],
            [f"g = h + {w.param(d)}", "h += 1", "h = g"],
            [f"h += {w.param(d)}", f"h *= {w.param(d)}"],
            [f"h = h.add_({w.param(d)}).relu_()"],
            [f"h.add_({w.param(d)}).mul_({w.param(d)})", "h = F.silu(h, inplace=True)"],
            [f"h.mul_({w.param(d)}).add_({w.param(d)})"],
            ["g = h.clone()", f"g += {w.param(d)}", "h = F.relu_(g) + h"],
            [f"h -= {w.param(d)}", "h.clamp_(min=0)"],
            [f"h += {w.param(d)}", f"h = h @ {w.param(d, d)}", f"h += {w.param(d)}"],
            ["g = torch.tanh(h)", f"h = g * {w.param(d)}", "h += g"],
            [f"h.addcmul_({w.param(d)}, {w.param(d)})", "h.tanh_()"],
            [f"h.lerp_({w.param(d)}, 0.3)"],
            ["g = h * 2", "h.zero_()", f"h = h + g + {w.param(d)}"],
            [f"h.copy_({w.param(d)} + h.tanh())"],
            [f"h += h * {w.param(d)}"],
        )
    )


@piece("in place")
def views(w: Writer) -> None:
    """Changes views of ``h``."""
    w.linear()
    d = w.d
    w(
        *w.pick(
            ["v = h[..., :2]", f"v += {w.param(2)}"],
            [f"h[..., 0] = {w.param(1, init='torch.tensor(0.4)')}"],
            [f"h[..., 1:] *= {w.param(d - 1)}"],
            [f"h.view(-1, {d}).add_({w.param(d)})"],
            [f"h.transpose(0, -1).mul_({w.param(d)}.reshape({', '.join(['-1'] + ['1'] * (2 if w.t else 1))}))"],
            ["F.relu_(h[..., :2])"],
            [f"h[..., 0].add_(h[..., 1] * {w.param(1, init='torch.tensor(0.4)')})"],
            [f"h.view(-1, {d})[:, ::2].mul_(2)", f"h = h + {w.param(d)}"],
            ["h.select(-1, 1).copy_(h.select(-1, 0))", f"h = h * {w.param(d)}"],
            [f"h.index_add_(-1, torch.tensor([0]), h[..., 1:2] * {w.param(1)})"],
            ["h.masked_fill_(h.detach() > 0.5, 0.5)", f"h = h + {w.param(d)}"],
            [f"a, b = h.split([1, {d - 1}], -1)", f"h = torch.cat([a, b * {w.param(d - 1)}], -1)"],
            ["v = h.unsqueeze(0)", f"v += {w.param(d)}", "F.relu_(v)"],
            ["v = h.expand_as(h)", f"h = h.unflatten(-1, (1, {d})).flatten(-2)", f"h += {w.param(d)}"],
            ["v = h.detach()", f"h = h + v * {w.param(d)}"],
        )
    )


@piece("in place", time=True)
def views_in_time(w: Writer) -> None:
    w.linear()
    d = w.d
    w(
        *w.pick(
            [f"h[:, 0] += {w.param(d)}"],
            [f"h[:, -1] = {w.param(d)}"],
            [f"h.select(1, 0).mul_({w.param(d)})"],
            ["for t in range(h.shape[1]):", f"    h[:, t].add_({w.param(w.t, d)}[t])"],
            [f"h.mT.mul_({w.param(d, 1)})"],
            [f"h[:, ::2] = h[:, ::2] * {w.param(d)}"],
            [f"h.transpose(0, 1).add_({w.param(w.t, 1, d)})"],
        )
    )


# -- tied weights


@piece("tied", pointwise=True)
def tied(w: Writer) -> None:
    d = w.d
    a, b = w.param(d, d), w.param(d)
    w(
        w.pick(
            f"h = F.linear(torch.tanh(F.linear(h, {a})), {a}.t())",
            f"h = F.linear(torch.tanh(F.linear(h, {a})), {a})",
            f"h = h @ {a} + torch.tanh(h) @ {a}.t()",
            f"h = h * {b} + {b}",
            f"h = F.linear(h, {a}, {b}) * {b}",
            f"h = F.linear(h, {a}) + {a}.sum(0)",
            f"h = F.layer_norm(h, ({d},), {b}, {b})",
            f"i = (h.detach() > 0).sum(-1).clamp(max={d - 1})\nh = F.linear(h + F.embedding(i, {a}), {a})",
            f"h = F.linear(h, {a}, {a}[0])",
        )
    )


@piece("tied", pointwise=True)
def tied_modules(w: Writer) -> None:
    d = w.d
    if w.chance():
        m = w.attribute(f"nn.Linear({d}, {d})")
        w(f"h = {m}(torch.tanh({m}(h)))")
    else:
        a, b = w.attribute(f"nn.Linear({d}, {d})"), w.attribute(f"nn.Linear({d}, {d})")
        w.init.append(f"{b}.weight = {a}.weight")
        w(f"h = {b}(torch.tanh({a}(h)))")


# -- parameters that the forward pass changes


@piece("changed", pointwise=True)
def changed(w: Writer) -> None:
    """Changes that a second forward pass would not make again."""
    d = w.d
    how = w.pick("embedding", "functional", "clamp", "norm")
    if how == "embedding":
        w("i = (h.detach() > 0).sum(-1)", f"h = h + {w.attribute(f'nn.Embedding({d + 1}, {d}, max_norm=0.5)')}(i)")
    elif how == "functional":
        w("i = (h.detach() > 0).sum(-1)", f"h = h + F.embedding(i, {w.param(d + 1, d)}, max_norm=0.5)")
    elif how == "clamp":
        a = w.param(d, d)
        w("with torch.no_grad():", f"    {a}.clamp_(-0.3, 0.3)", f"h = F.linear(h, {a})")
    else:
        a = w.param(d, d)
        w("with torch.no_grad():", f"    {a}.div_({a}.norm(dim=1, keepdim=True).clamp(min=0.5) / 0.5)", f"h = h @ {a}")


# -- randomness with a seed of its own


@piece("random")
def seeded(w: Writer) -> None:
    w(f"torch.manual_seed({w.pick(1, 2, 3)})")
    w(
        w.pick(
            "h = F.dropout(h, 0.5)",
            "h = h + torch.randn_like(h)",
            "h = h * (torch.rand(len(h), *[1] * (h.ndim - 1)) > 0.5)",
            "h = h * torch.rand(h.shape[-1])",
            "h = F.dropout(h, 0.5, True, False) * 2",
            f"h = h + F.dropout(h @ {w.param(w.d, w.d)}, 0.3)",
            "h = h.where(torch.bernoulli(torch.full_like(h, 0.5)) > 0, 0.1 * h)",
        )
    )
    if w.chance():
        w.linear()


@piece("random")
def own_generator(w: Writer) -> None:
    w("g = torch.Generator().manual_seed(1)", "h = h * (torch.rand(h.shape, generator=g) > 0.3)")


# -- state that a module keeps between calls


@piece("cache")
def cached(w: Writer) -> None:
    """A tensor made of parameters is kept, as LeViT keeps its attention biases in eval mode."""
    d = w.d
    b = w.param(d)
    if w.chance(0.6):
        c = w.attribute("{}")
        w(
            f'if "b" not in {c}:',
            f'    {c}["b"] = {w.pick(f"{b} * 2", f"{b}[torch.arange({d})]", f"{b}.exp()", b)}',
            f'h = h + {c}["b"]',
        )
    else:
        c = w.attribute("None")
        a = w.param(d, d)
        w(f"if {c} is None:", f"    {c} = {a} @ {a}.t()", f"h = h @ {c}")


@piece("cache")
def harmless_cache(w: Writer) -> None:
    """What is kept does not depend on parameters or data."""
    c = w.attribute("None")
    w(f"if {c} is None:", f"    {c} = torch.linspace(0, 1, {w.d})", f"h = (h + {c}) @ {w.param(w.d, w.d)}")


@piece("cache")
def kept_features(w: Writer) -> None:
    """Features stay on the module, as hooks keep them."""
    w.linear()
    c = w.attribute("[]")
    w(f"{c}.append(h)", f"{w.attribute('None')} = h.detach()")


# -- parameters without influence


@piece("unused")
def unused(w: Writer) -> None:
    d = w.d
    a = w.param(d, d)
    w.linear()
    w(
        w.pick(
            f"# {a} is unused",
            f"g = h @ {a}",
            f"with torch.no_grad():\n    g = h @ {a}\nh = h + g",
            f"h = h + (h @ {a}).detach()",
            f"h = h + h.detach() @ {a}.detach()",
            f"h = h + 0 * (h @ {a})",
            f"if h.shape[-1] > 10:\n    h = h @ {a}",
            f"h = h + (h @ {a} > 0)",
        )
    )


@piece("unused")
def no_graph(w: Writer) -> None:
    """Nothing before has a gradient."""
    w.linear()
    w(w.pick("h = h.detach()", "with torch.no_grad():\n    h = torch.tanh(h)"))  # torch.func differentiates through ``.data``


@piece("unused")
def detached(w: Writer) -> None:
    """Gradients stop, in part."""
    a = w.param(w.d, w.d)
    w(
        w.pick(
            f"h = h + (torch.tanh(h @ {a}) - h).detach() * h",
            f"h = h.detach() @ {a} + h",
            f"g = h @ {a}\nh = g * g.detach().sigmoid()",
            f"with torch.no_grad():\n    g = torch.tanh(h)\nh = g @ {a} + h",
        )
    )


# -- kernels of torch that are known for trouble


@piece("kernels")
def kernels(w: Writer) -> None:
    d = w.d
    a = w.param(d, d)
    w(
        w.pick(
            f"h = torch.cdist(h, {a})" if w.t else f"h = torch.cdist(h[:, None], {a})[:, 0]",
            f"h = torch.select_scatter(h, {w.param(1)}.expand(h.shape[:-1]) * h[..., 1], -1, 0)",
            f"m = h.unsqueeze(-1) * {a} + 3 * torch.eye({d})\nh = torch.linalg.solve(m, h.unsqueeze(-1)).squeeze(-1)",
            f"m = h.unsqueeze(-1) * {a} + 3 * torch.eye({d})\nh = h * torch.linalg.slogdet(m)[1].unsqueeze(-1)",
            f"m = h.unsqueeze(-1) * {a} + 3 * torch.eye({d})\nh = h * torch.linalg.det(m).unsqueeze(-1)",
            f"h = torch.logcumsumexp(h @ {a}, -1)",
            f"h = torch.cumprod(h @ {a}, -1)",
            f"h = torch.linalg.inv({a} + 3 * torch.eye({d})) @ h.unsqueeze(-1)\nh = h.squeeze(-1)",
            f"h = F.hardtanh(h @ {a}) + h",
            f"h = torch.slice_scatter(h, h[..., :1] * {w.param(1)}, -1, 0, 1)",
            f"h = F.normalize(h @ {a}, dim=-1)",
            f"h = torch.logsumexp(h.unsqueeze(-1) + {a}, -2)",
            f"h = F.glu(F.linear(h, {w.param(2 * d, d)}))",
            f"h = torch.nn.functional.unfold(h.reshape(-1, 1, 1, {d}), (1, 1)).reshape(h.shape) @ {a}",
        )
    )


# -- samples that influence each other


@piece("mix")
def mix_mean(w: Writer) -> None:
    w(
        w.pick(
            "h = h - h.mean(0)",
            "h = h + h.mean(0, keepdim=True)",
            "h = h - h.amax(0)",
            "h = h * torch.sigmoid(h.mean())",
            "h = h / (1 + h.square().sum())",
            "h = F.layer_norm(h, h.shape)",
            'h = h + torch.einsum("n...->...", h)',
        )
    )


@piece("mix")
def mix_without_gradient(w: Writer) -> None:
    w(
        w.pick(
            "h = h - h.detach().mean(0)",
            "with torch.no_grad():\n    m = h.mean(0)\nh = h - m",
            "h = h * (h > h.detach().median())",
            "h = h.where(h > h.mean(0).detach(), 0.1 * h)",
            "h = h + h.detach().flip(0)",
            "h = h / h.detach().norm()",
            "h = h + h.detach()[:1]",
            "h = h[h.detach().flatten(1).sum(1).argsort()]",
        )
    )


@piece("mix")
def mix_by_value(w: Writer) -> None:
    w(
        w.pick(
            "h = h * float(h.mean())",
            "h = h + h.mean().item()",
            "h = h * 2 if h.detach().sum() > 0 else h * 3",
            "h = h + torch.tensor(h.detach().flatten(1).sum(0).tolist()).sum()",
            "h = h + torch.from_numpy(h.detach().numpy().mean(0))",
            "h = h * float(h.detach()[0].sum())",
        )
    )


@piece("mix")
def mix_by_size(w: Writer) -> None:
    w(
        w.pick(
            "h = h / len(h)",
            "h = h * h.shape[0]",
            "h = h + torch.arange(len(h)).reshape(-1, *[1] * (h.ndim - 1))",
            "h = h / h.numel()",
        )
    )


CENTER = """
class Center(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x - x.mean(0)

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)
"""
CENTER_SETUP = """
class CenterSetup(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x - x.mean(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g - g.mean(0)
"""


@piece("mix")
def mix_in_function(w: Writer) -> None:
    name = w.pick("Center", "CenterSetup")
    w.define(CENTER if name == "Center" else CENTER_SETUP)
    w(f"h = {name}.apply(h)")


@piece("mix")
def mix_in_hidden_norm(w: Writer) -> None:
    w.define(
        """
        class BatchNorm(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                s = (x.var(0, unbiased=False) + 0.1).rsqrt()
                xhat = (x - x.mean(0)) * s
                ctx.save_for_backward(xhat, s, w)
                return xhat * w

            @staticmethod
            def backward(ctx, g):
                xhat, s, w = ctx.saved_tensors
                gw = (g * xhat).reshape(-1, xhat.shape[-1]).sum(0)
                g = g * w
                return (g - g.mean(0) - xhat * (g * xhat).mean(0)) * s, gw
        """
    )
    w(f"h = BatchNorm.apply(h, {w.param(w.d)})")


@piece("mix")
def mix_cumulative(w: Writer) -> None:
    w(
        w.pick(
            "h = h.cumsum(0)",
            "h = h.cumprod(0)",
            "h = h.logcumsumexp(0)",
            "h = h.cummax(0).values",
            "h = torch.diff(h, dim=0, prepend=h[:1])",
        )
    )


@piece("mix")
def mix_order(w: Writer) -> None:
    w(
        w.pick(
            "h = h.roll(1, 0)",
            "h = h.roll(1)",
            "h = h.flip(0)",
            "h = h.sort(0).values",
            "h = h[torch.randperm(len(h), generator=torch.Generator().manual_seed(1))]",
            "h = h[torch.arange(len(h)).flip(0)]",
            "h = h.index_select(0, torch.arange(len(h)).flip(0))",
            "h = torch.cat([h[1:], h[:1]])",
            "h = torch.stack(list(h)[::-1])",
            "h = h.transpose(0, 1).reshape(h.shape)",
            "h = h[[-1] * len(h)]",
            "h = h.gather(0, torch.zeros_like(h, dtype=torch.long))",
            "h = torch.take_along_dim(h, h.argsort(0), 0)",
        )
    )


@piece("mix")
def mix_batch_norm(w: Writer) -> None:
    a, b = w.param(w.d), w.param(w.d)
    w(
        w.pick(
            f"h = (h - h.mean(0)) / (h.var(0, unbiased=False) + 0.1).sqrt() * {a} + {b}",
            f"v, m = torch.var_mean(h, 0, unbiased=False)\nh = (h - m) * torch.rsqrt(v + 0.1) * {a}",
            f"h = F.batch_norm(h.reshape(-1, {w.d}), None, None, {a}, {b}, training=True, eps=0.1).view(h.shape)",
            f"h = {w.attribute(f'nn.BatchNorm1d({w.d}, eps=0.1)')}(h.reshape(-1, {w.d})).view(h.shape)",
        )
    )


@piece("mix")
def mix_softmax(w: Writer) -> None:
    w(
        w.pick(
            "h = h.softmax(0)",
            "h = h.log_softmax(0)",
            "h = F.normalize(h, dim=0)",
            "h = h - h.logsumexp(0)",
            "h = h / h.norm(dim=0)",
        )
    )


@piece("mix")
def mix_gram(w: Writer) -> None:
    w(
        "g = h.flatten(1)",
        w.pick(
            "g = g @ g.mT @ g",
            'g = torch.einsum("nd,md->nm", g, g) @ g',
            "g = F.scaled_dot_product_attention(g[None], g[None], g[None])[0]",
            "g = g + torch.cdist(g, g + 1).sum(1, keepdim=True)",
        ),
        "h = h + g.view(h.shape)",
    )


@piece("mix")
def mix_by_zero(w: Writer) -> None:
    """Values show nothing, gradients do."""
    c = w.param(1, init="torch.zeros(())")
    w(
        w.pick(
            f"h = h + {c} * h.mean(0)",
            f"h = h + {c} * h.roll(1, 0)",
            f"h = torch.lerp(h, h.flip(0), {c})",
            f"h = h + torch.tanh({c} * h.cumsum(0))",
        )
    )


@piece("mix")
def mix_copy(w: Writer) -> None:
    w(
        *w.pick(
            ["g = h.clone()", "g[0] = h[-1]", "h = g"],
            ["g = h * 1", "g[1:] += h[:-1]", "h = g"],
            ["g = h * 2", "g[-1].copy_(h[0])", "h = g"],
            ["g = torch.empty_like(h)", "for i in range(len(h)):", "    g[i] = h[i - 1]", "h = g"],
            ["g = h * 1", "g.copy_(h.flip(0))", "h = g"],
            ["g = h * 1", "g.select(0, 0).add_(h.sum(0))", "h = g"],
            ["g = torch.zeros_like(h)", "g[:] = h.flip(0)", "h = g"],
        )
    )


@piece("mix")
def mix_scatter(w: Writer) -> None:
    w(
        w.pick(
            "h = torch.zeros_like(h).index_add(0, torch.arange(len(h)).flip(0), h)",
            "h = h.index_add(0, torch.zeros(len(h), dtype=torch.long), h)",
            "h = h.scatter_add(0, torch.zeros_like(h, dtype=torch.long), h)",
            "h = torch.zeros_like(h).index_copy(0, torch.arange(len(h)).roll(1), h)",
            "h = torch.zeros_like(h).scatter(0, torch.zeros_like(h, dtype=torch.long) + torch.arange(len(h)).flip(0).reshape(-1, *[1] * (h.ndim - 1)), h)",
            "h = h.index_put((torch.tensor([0]),), h[-1:], accumulate=True)",
        )
    )


@piece("mix")
def mix_by_buffer(w: Writer) -> None:
    m = w.buffer(f"torch.zeros({w.d})")
    mean = f"h{'.detach()' if w.chance() else ''}.reshape(-1, {w.d}).mean(0)"
    w(
        *w.pick(
            ["with torch.no_grad():", f"    {m}.mul_(0.9).add_(0.1 * {mean})", f"h = h - {m}"],
            ["with torch.no_grad():", f"    {m}.copy_({mean})", f"h = h - {m}"],
            [f"{m}.lerp_({mean}.detach(), 0.1)", f"h = h * {m}.clone()"],
            [f"{m} = 0.9 * {m} + {mean}", f"h = h - {m}"],
        )
    )


@piece("mix", time=True)
def mix_axes(w: Writer) -> None:
    """The first axis taken for that of time."""
    n, d = w.n, w.d
    m = w.pick(f"nn.GRU({d}, {d})", f"nn.RNN({d}, {d})", f"nn.LSTM({d}, {d})")
    w(
        w.pick(
            f"h = {w.attribute(m)}(h)[0]",
            f"h = {w.attribute(f'nn.MultiheadAttention({d}, 1)')}(h, h, h)[0]",
            f"h = F.linear(h.transpose(0, 2), {w.param(n, n)}).transpose(0, 2)",
            f"h = F.conv1d(h.permute(1, 2, 0), {w.param(d, d, 3)}, padding=1).permute(2, 0, 1)",
            f'h = torch.einsum("ntd,nm->mtd", h, {w.param(n, n)})',
        )
    )
