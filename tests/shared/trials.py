"""What a program is put through: lines of code that call the library, and what they must give.

A trial is text that runs after the program's own and leaves ``got``, results by quantity, so that what is printed for a
failure is what ran. Its outcome, for each quantity:

- right: as `definition.Truth`, to 1e-9 in float64;
- refused: an error of the library's own, which tells the user what to do. Expected where samples influence each other, a
  defect elsewhere;
- crashed: any other error;
- wrong;
- not applicable: plain torch cannot do it either (no second derivative, no vmap over the model).
"""

import functools
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from definition import NoTruth, Truth
from grammar import LOSSES, Program
from torch import Tensor

from curvfunc.compat import CTX

__all__ = ["PATHS", "Outcome", "Trial", "outcomes", "text", "trials"]

FIRST = ("batch_grad", "batch_l2", "sum_grad_squared", "variance", "batch_dot")
GGN = ("diag_ggn", "sqrt_ggn", "batch_diag_ggn", "ggn_gram")
KRONECKER = ("kfac", "kflr", "kfac_empirical")
HESSIAN = ("diag_hessian", "hessian_vp", "hmp")
JACOBIANS = ("jvp", "batch_jac", "ntk")  # without y and loss_fn
QUANTITIES = (*FIRST, *GGN, *KRONECKER, "ggn_vp", "ggnmp", *HESSIAN, *JACOBIANS)
SPECS = {"batch_grad": "BatchGrad", "batch_l2": "BatchL2", "sum_grad_squared": "SumGradSquared", "variance": "Variance"}
SPECS |= {"diag_ggn": "DiagGGN", "batch_diag_ggn": "BatchDiagGGN", "sqrt_ggn": "SqrtGGN", "diag_hessian": "DiagHessian"}
EXTENSIONS = {
    "batch_grad": ("BatchGrad", "grad_batch"),
    "batch_l2": ("BatchL2Grad", "batch_l2"),
    "sum_grad_squared": ("SumGradSquared", "sum_grad_squared"),
    "variance": ("Variance", "variance"),
    "diag_ggn": ("DiagGGNExact", "diag_ggn_exact"),
    "sqrt_ggn": ("SqrtGGNExact", "sqrt_ggn_exact"),
    "batch_diag_ggn": ("BatchDiagGGNExact", "diag_ggn_exact_batch"),
    "kflr": ("KFLR", "kflr"),
    "diag_hessian": ("DiagHessian", "diag_h"),
    "hmp": ("HMP", "hmp"),
    "ggnmp": ("GGNMP", "ggnmp"),
}


class Outcome(NamedTuple):
    """What came of one quantity on one path."""

    kind: str
    detail: str = ""


class Trial(NamedTuple):
    """Code, the quantities it gives, and the numbers of samples, if some were picked."""

    path: str
    quantities: tuple[str, ...]
    code: str
    picked: tuple[int, ...] | None = None


# -- code


def call(quantity: str, params: str = "params", options: str = "") -> str:
    """A call of one function."""
    if quantity == "jvp":
        return f"curvfunc.jvp(model_fn, {params}, X, v{options})"
    if quantity in JACOBIANS:
        return f"curvfunc.{quantity}(model_fn, {params}, X{options})"
    if quantity in ("hmp", "ggnmp"):
        return f"{{k: f(V[k]) for k, f in curvfunc.{quantity}(model_fn, {params}, X, y, loss_fn=loss_fn{options}).items()}}"
    vector = ", v" if quantity in ("hessian_vp", "ggn_vp") else ""
    return f"curvfunc.{quantity}(model_fn, {params}, X, y{vector}, loss_fn=loss_fn{options})"


def got(quantity: str, expression: str) -> str:
    return f'got = {{"{quantity}": {expression}}}'


STACKED = "stacked = {k: torch.stack([p, 1.2 * p]) for k, p in params.items()}\n"
ALONG = "v = {k: torch.cos(torch.arange(p.numel()) + 1.0).reshape(p.shape) for k, p in params.items()}\n"
BLOCKS = "V = {k: torch.cos(torch.arange(2 * p.numel()) + 1.0).reshape(2, *p.shape) for k, p in params.items()}\n"
WEIGHTS = "W = {k: torch.cos(torch.arange(len(X) * p.numel()) + 1.0).reshape(len(X), *p.shape) for k, p in params.items()}\n"


def eager(program: Program) -> Iterator[Trial]:
    for q in QUANTITIES:
        yield Trial("eager", (q,), vectors(q) + got(q, call(q)))


def vectors(quantity: str) -> str:
    return {"hessian_vp": ALONG, "ggn_vp": ALONG, "jvp": ALONG, "hmp": BLOCKS, "ggnmp": BLOCKS}.get(quantity, "")


def together(program: Program) -> Iterator[Trial]:
    specs = ", ".join(f'"{q}": curvfunc.{spec}()' for q, spec in SPECS.items())
    yield Trial("together", tuple(SPECS), f"got = curvfunc.compute(model_fn, params, X, y, {{{specs}}}, loss_fn=loss_fn)")


def subsampling(program: Program) -> Iterator[Trial]:
    picked = (program.shape.n - 1, 0, 0)
    first = ("batch_grad", "batch_l2", "variance", "batch_dot", "batch_jac", "ntk")
    for q in (*first, "diag_ggn", "sqrt_ggn", "hessian_vp", "ggn_vp", "kflr", "kfac_empirical"):
        yield Trial("subsampling", (q,), vectors(q) + got(q, call(q, options=f", subsampling={list(picked)}")), picked)


def chunks(program: Program) -> Iterator[Trial]:
    for q in ("batch_grad", "batch_l2", "diag_ggn", "sqrt_ggn", "diag_hessian", "hmp", "batch_jac"):
        yield Trial("chunk_size=1", (q,), vectors(q) + got(q, call(q, options=", chunk_size=1")))


def under_vmap(program: Program) -> Iterator[Trial]:
    for q in ("batch_grad", "batch_l2", "diag_ggn", "diag_hessian", "hessian_vp", "ggn_vp", "batch_jac"):
        yield Trial(
            "vmap", (q,), vectors(q) + STACKED + got(q, f'torch.vmap(lambda p: {call(q, "p")}, randomness="same")(stacked)')
        )


def under_grad(program: Program) -> Iterator[Trial]:
    code = f"f = lambda p: sum((g * W[k]).sum() for k, g in {call('batch_grad', 'p')}.items())\n"
    yield Trial("grad", ("batch_grad",), WEIGHTS + code + got("batch_grad", "torch.func.grad(f)(params)"))


def under_jvp(program: Program) -> Iterator[Trial]:
    code = f"torch.func.jvp(lambda p: {call('batch_grad', 'p')}, (params,), (v,))[1]"
    yield Trial("jvp", ("batch_grad",), ALONG + got("batch_grad", code))


def compiled(program: Program) -> Iterator[Trial]:
    for q in ("batch_grad", "diag_ggn", "hessian_vp", "batch_jac"):
        code = f'torch.compile(lambda params, X, y: {call(q)}, backend="aot_eager")(params, X, y)'
        yield Trial("compile", (q,), vectors(q) + got(q, code))


def again(program: Program) -> Iterator[Trial]:
    """A second call, with other parameters; buffers that the first one moved on are another model's."""
    if {"buffers", "mix_by_buffer"} & {*program.pieces}:
        return
    for q in ("batch_grad", "diag_ggn", "ggn_vp"):
        first = f"other = {{k: 1.2 * p for k, p in params.items()}}\nfirst = {call(q)}\nparams = other\n"
        yield Trial("again", (q,), vectors(q) + first + got(q, call(q)))


# What backward passes take for a constant and forward-mode derivatives, in torch itself, do not.
CONSTANT = re.compile(r"detach|no_grad|\.data\b|max_norm|Round|float\(|item\(|tolist")

SHIM = "from curvfunc.compat import backpack, extend, extensions\n"


def shim(program: Program) -> Iterator[Trial]:
    groups = (FIRST[:4], ("diag_ggn", "sqrt_ggn", "batch_diag_ggn", "kflr"), ("diag_hessian",), ("hmp", "ggnmp"))
    for quantities in groups:
        active = ", ".join(f"extensions.{EXTENSIONS[q][0]}()" for q in quantities)
        code = SHIM + f"net, loss = extend(make()), extend({LOSSES[program.loss]})\n"
        code += f"with backpack({active}):\n    loss(net(X), y).backward()\n"
        code += "got = {q: {k: getattr(p, field, None) for k, p in net.named_parameters()} for q, field in "
        code += repr([(q, EXTENSIONS[q][1]) for q in quantities]) + "}"
        yield Trial("shim", quantities, code)


def two_losses(program: Program) -> Iterator[Trial]:
    """One model on two batches: a parameter's results are of both."""
    code = SHIM + f"net, loss = extend(make()), extend({LOSSES[program.loss]})\nX2 = 0.5 * X.flip(-1)\n"
    code += "with backpack(extensions.BatchGrad(), extensions.DiagGGNExact()):\n    (loss(net(X), y) + loss(net(X2), y)).backward()\n"
    code += 'got = {"batch_grad": {k: getattr(p, "grad_batch", None) for k, p in net.named_parameters()},\n'
    code += '       "diag_ggn": {k: getattr(p, "diag_ggn_exact", None) for k, p in net.named_parameters()}}'
    yield Trial("two losses", ("batch_grad", "diag_ggn"), code)


def threads(program: Program) -> Iterator[Trial]:
    code = SHIM + "import threading\nbarrier, got, failed = threading.Barrier(2, timeout=20), {}, []\n"
    code += f"""
def run(net, quantity, extension, field, foreign):
    try:
        loss = extend({LOSSES[program.loss]})
        barrier.wait()
        with backpack(extension):
            barrier.wait()
            loss(net(X.clone()), y).backward()
            barrier.wait()
        got[quantity] = {{k: getattr(p, field, None) for k, p in net.named_parameters()}}
        assert not any(hasattr(p, foreign) for p in net.parameters()), f"{{quantity}}: has the other thread's {{foreign}}"
    except threading.BrokenBarrierError:
        pass
    except Exception as error:
        failed.append(error)
        barrier.abort()

both = [(extend(make()), "batch_grad", extensions.BatchGrad(), "grad_batch", "diag_ggn_exact"),
        (extend(make()), "diag_ggn", extensions.DiagGGNExact(), "diag_ggn_exact", "grad_batch")]
both = [threading.Thread(target=run, args=args) for args in both]
[t.start() for t in both], [t.join() for t in both]
if failed:
    raise failed[0]
from curvfunc.compat import CTX
assert not CTX.get_active_exts(), "extensions are active after both threads ended"
"""
    yield Trial("threads", ("batch_grad", "diag_ggn"), code)


PATHS: dict[str, Callable[[Program], Iterator[Trial]]] = {
    "eager": eager,
    "together": together,
    "subsampling": subsampling,
    "chunk_size=1": chunks,
    "vmap": under_vmap,
    "grad": under_grad,
    "jvp": under_jvp,
    "compile": compiled,
    "again": again,
    "shim": shim,
    "two losses": two_losses,
    "threads": threads,
}
SHIMS = ("shim", "two losses", "threads")


def trials(program: Program, paths: Sequence[str]) -> list[Trial]:
    return [trial for path in paths for trial in PATHS[path](program)]


def text(program: Program, trial: Trial) -> str:
    """What to run to see it, and the definition of a sample's gradient to compare with."""
    term = "(F.cross_entropy(out[n], y[n]) / len(X))"
    if "mse" in program.loss:
        term = "(F.mse_loss(out[n], y[n], reduction='sum') / y.numel())"
    elif "sum" in program.loss:
        term = "F.cross_entropy(out[n], y[n])"
    plain = ""
    if "use_reentrant=True" in program.source:
        plain = """
# plain autograd loses what a module keeps from a reentrant checkpoint's first run, which is without a graph
torch.utils.checkpoint.CheckpointFunction = type("Plain", (), {"apply": staticmethod(lambda f, _, *args: f(*args))})
"""
    definition = f"""{plain}
# the definition, sample by sample
net, want = make(), []
out = net(X.clone())
for n in range(len(X)):
    net.zero_grad()
    {term}.backward(retain_graph=True)
    want.append({{k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in net.named_parameters()}})
"""
    return program.source + trial.code.strip() + "\n" + (definition if trial.quantities[0] in FIRST else "")


# -- outcomes


class Case:
    """A program that runs, with the truth at each point that trials ask for."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.namespace = program.run()
        self.X = self.namespace["X"].clone()
        self.found: dict[Any, Truth] = {}
        self.nudge = 1.0  # of the parameters, in their last digits
        if not self.truth().leaves:
            raise RuntimeError("the program has no parameters")
        _ = self.truth().grads  # what plain autograd cannot run is no program

    @functools.cached_property
    def make(self) -> Any:
        """Makes the module, with second derivatives at zeros that torch's own prelu lacks."""
        if "F.prelu(" not in self.program.source:
            return self.namespace["make"]
        own: dict[str, Any] = {"__name__": "written_out", "written_out_prelu": _prelu}
        exec(self.program.source.replace("F.prelu(", "written_out_prelu("), own)
        return own["make"]

    def truth(self, scale: float = 1.0, X: Tensor | None = None) -> Truth:
        """At the parameters times ``scale``, and at other inputs, which the module meets after its own."""
        scale *= self.nudge
        key = (scale, X is None)
        if key not in self.found:
            make, values = self.make, None
            if scale != 1.0:
                values = {k: scale * p.detach() for k, p in make().named_parameters()}

            def met() -> torch.nn.Module:
                net: torch.nn.Module = make()
                with torch.no_grad():
                    net(self.X.clone())
                return net

            with Reseeded():
                self.found[key] = Truth(
                    make if X is None else met,
                    self.X if X is None else X,
                    self.namespace["y"],
                    self.namespace["loss_fn"],
                    values,
                )
        return self.found[key]

    def run(self, trial: Trial) -> dict[str, Any]:
        """What the trial's code gets, from a module made for it."""
        self.namespace["X"] = self.X.clone()
        name = "<trial>"
        try:
            with Reseeded():
                exec(compile(self.program.model() + trial.code, name, "exec"), self.namespace)
        finally:
            CTX.set_active_exts([])
        if not torch.equal(self.namespace["X"], self.X):
            raise AssertionError("X was changed")
        marks = [
            a
            for t in [*self.namespace["net"].parameters(), *self.namespace["net"].buffers()]
            for a in vars(t)
            if "curvfunc" in a
        ]
        if marks and trial.path not in SHIMS:
            raise AssertionError(f"left {marks} on the module's tensors")
        return self.namespace["got"]

    def want(self, trial: Trial, quantity: str) -> Any:
        """What a trial must give."""
        truth = self.truth()
        like = {k: p.detach() for k, p in truth.leaves.items()}
        along = {k: torch.cos(torch.arange(p.numel()) + 1.0).reshape(p.shape) for k, p in like.items()}
        blocks = {k: torch.cos(torch.arange(2 * p.numel()) + 1.0).reshape(2, *p.shape) for k, p in like.items()}
        if trial.path in ("vmap", "grad", "jvp") and self.draws and not self.draws_alike(trial.path):
            raise NoTruth
        if trial.path in ("grad", "jvp"):
            if not truth.smooth:
                raise NoTruth
            if trial.path == "jvp":
                if CONSTANT.search(self.program.source):
                    raise NoTruth
                return truth.tree(truth.each_along(truth.flat(along)))
            weights = {
                k: torch.cos(torch.arange(truth.N * p.numel()) + 1.0).reshape(truth.N, *p.shape) for k, p in like.items()
            }
            return truth.tree(truth.weighted(truth.flat(weights)))
        if quantity == "jvp":
            return {"": (truth.jacobian @ truth.flat(along)).reshape(truth.out.shape)}
        vector = blocks if quantity in ("hmp", "ggnmp") else along
        if trial.path == "vmap":
            parts = [self.truth(s).quantity(quantity, vector=vector) for s in (1.0, 1.2)]
            return {k: torch.stack([part[k] for part in parts]) for k in like}
        if trial.path == "again":
            return self.truth(1.2).quantity(quantity, vector=vector)
        if trial.path == "two losses":
            parts = [t.quantity(quantity) for t in (truth, self.truth(X=0.5 * self.X.flip(-1)))]
            return {k: parts[0][k] + parts[1][k] for k in like}
        return truth.quantity(quantity, trial.picked, vector)

    def draws_alike(self, path: str) -> bool:
        """Whether the model draws the same numbers under torch.func, where operations draw in their own ways, as without it."""
        own = dict(self.namespace, X=self.X.clone())
        code = "net = make()\nparams = {k: p.detach() for k, p in net.named_parameters()}\n" + STACKED
        code += "call = lambda p: torch.func.functional_call(net, p, (X,))\n"
        under = 'torch.vmap(call, randomness="same")(stacked)' if path == "vmap" else "torch.func.vjp(call, params)[0][None]"
        try:
            with Reseeded():
                exec(code + f"out = {under}", own)
        except RuntimeError:  # torch.func cannot run it so; what is not seen to differ is judged
            return True
        return all(torch.allclose(o, self.truth(s).out) for o, s in zip(own["out"], (1.0, 1.2), strict=False))

    @functools.cached_property
    def draws(self) -> bool:
        """Whether the model draws from the default generator, or seeds it, which all threads share."""
        with Reseeded():
            net, before = self.namespace["make"](), torch.get_rng_state()
            net(self.X.clone())
            return not torch.equal(before, torch.get_rng_state())

    def rounding(self, trial: Trial, quantity: str, want: dict[str, Tensor]) -> float:
        """How much the truth itself changes at parameters that differ in their last digits.

        Where large numbers cancel, all that is left of the definition may be their rounding: weights in front of a
        normalization that leaves nothing of them have the gradient zero, of which plain autograd has 1e-12.
        """
        found = 0.0
        for nudge in (1 - 2e-15, 1 + 1e-15, 1 + 3e-15):
            self.nudge = nudge
            try:
                other = self.want(trial, quantity)
            except NoTruth:
                continue
            finally:
                self.nudge = 1.0
            found = max(found, *(float((other[k] - w).norm()) for k, w in want.items()))
        largest = max(float(w.norm()) for w in want.values())
        return min(10 * found, 1e-9 * max(1.0, largest))  # and what jumps there is no rounding

    def check(self, trial: Trial, quantity: str, result: Any) -> str:
        """What is wrong with a result; nothing if it is right."""
        if quantity in KRONECKER:
            return self.factors(trial, quantity, result)
        want = self.want(trial, quantity)
        if not all(w.isfinite().all() for w in want.values()):
            raise NoTruth
        if quantity == "jvp":
            result = {"": result}
        if trial.path in SHIMS:
            if quantity in ("hmp", "ggnmp") and trial.path == "shim":
                vectors = {
                    k: torch.cos(torch.arange(2 * p.numel()) + 1.0).reshape(2, *p.shape) for k, p in self.truth().leaves.items()
                }
                result = {k: f and f(vectors[k]) for k, f in result.items()}
            # as in BackPACK a parameter that the backward pass does not reach gets nothing
            result = {k: torch.zeros_like(want[k]) if r is None and not want[k].any() else r for k, r in result.items()}
            if missing := [k for k, r in result.items() if r is None]:
                return f"no result for {missing}"
        # the difference of two numbers that may be equal
        scale = max(t.norm() for t in self.truth().quantity("sum_grad_squared").values()) if quantity == "variance" else None
        wrong = difference(result, want, scale)
        if wrong and "F.cross_entropy" in self.program.source:  # p - p² where the probability p is nearly one
            wrong = difference(result, want, scale, 1e-15 * float(self.truth().jacobian.norm()) ** 2)
        if wrong and result.keys() == want.keys():
            wrong = difference(result, want, scale, self.rounding(trial, quantity, want))
        return wrong or (memory(result, self.namespace) if trial.path == "eager" else "")

    def factors(self, trial: Trial, quantity: str, result: dict[str, Any]) -> str:
        """Kronecker factors: shapes, positive semi-definite, blocks that stand alone exact, for one sample and position all."""
        truth = self.truth()
        picked = trial.picked or range(truth.N)
        for name, factors in result.items():
            p = truth.leaves[name]
            if factors is None:
                if truth.tree(truth.grads)[name].any():
                    return f"no result for {name}"
                continue
            sizes = [len(f) for f in factors]
            if torch.Size(sizes).numel() != p.numel():
                return f"{name}: factors of {sizes} for {tuple(p.shape)}"
            for f in factors:
                if not f.isfinite().all() or difference({"": f.mT}, {"": f}):
                    return f"{name}: a factor is not finite or not symmetric"
                values = torch.linalg.eigvalsh(f)
                if len(values) and values.min() < -1e-9 * max(1e-9, float(values.abs().max())):
                    return f"{name}: a factor has the eigenvalue {values.min():.1e}"
            if quantity in ("kflr", "kfac_empirical") and len(factors) == 1:
                want = truth.blocks(picked) if quantity == "kflr" else truth.empirical_blocks(picked)
                if error := difference({name: factors[0]}, {name: want[name]}, max(b.norm() for b in want.values())):
                    return error
        return ""


class Reseeded:
    """The default generator from a seed, and no warnings; both as before afterwards."""

    def __enter__(self) -> None:
        self.state, self.catch = torch.get_rng_state(), warnings.catch_warnings()
        self.catch.__enter__()
        warnings.simplefilter("ignore")
        torch.manual_seed(0)

    def __exit__(self, *error: Any) -> None:
        self.catch.__exit__(*error)
        torch.set_rng_state(self.state)


def difference(got: dict[str, Tensor], want: dict[str, Tensor], scale: Any = None, cancelled: float = 0.0) -> str:
    """Equal to 1e-9 of each leaf's norm, or to rounding: of the largest leaf's, or of probabilities that cancel."""
    if got.keys() != want.keys():
        return f"results for {sorted(got)}, expected {sorted(want)}"
    rounding = 1e-12 * float(scale or max((w.norm() for w in want.values()), default=0)) + max(1e-12, cancelled)
    for name, w in want.items():
        g = got[name]
        if g.shape != w.shape:
            return f"{name}: shape {tuple(g.shape)}, expected {tuple(w.shape)}"
        error = float((g.detach() - w).norm())
        if not error <= 1e-9 * float(w.norm()) + rounding:
            return f"{name}: error {error:.1e} of {float(w.norm()):.1e}"
    return ""


def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    return torch.where(x > 0, x, (weight.reshape(-1, *[1] * (x.ndim - 2)) if weight.numel() > 1 else weight) * x)


def memory(result: dict[str, Tensor], namespace: dict[str, Any]) -> str:
    """Results are tensors of their own."""
    owners: dict[int, str] = {
        t.untyped_storage().data_ptr(): k for k, t in {**namespace["params"], "X": namespace["X"]}.items() if t.numel()
    }
    for name, t in result.items():
        if t.numel() and (other := owners.setdefault(t.untyped_storage().data_ptr(), f"result {name}")) != f"result {name}":
            return f"{name}: shares memory with {other}"
        if torch._debug_has_internal_overlap(t) == 1:
            return f"{name}: overlaps itself, strides {t.stride()}"
    return ""


def applicable(case: Case, trial: Trial) -> bool:
    """Whether plain torch can do what a trial asks for, as far as that is known."""
    code = {
        "vmap": STACKED + 'torch.vmap(lambda p: torch.func.functional_call(net, p, (X,)), randomness="same")(stacked)',
        "grad": "torch.func.grad(lambda p: loss_fn(torch.func.functional_call(net, p, (X,)), y))(params)",
        "jvp": "L = lambda p: loss_fn(torch.func.functional_call(net, p, (X,)), y)\n"
        "torch.func.jvp(torch.func.grad(L), (params,), (params,))",
        "two losses": f"loss = {LOSSES[case.program.loss]}\n(loss(net(X), y) + loss(net(0.5 * X.flip(-1)), y)).backward()",
        "compile": 'torch.compile(lambda p, X: torch.func.functional_call(net, p, (X,)), backend="aot_eager")(params, X)',
    }.get(trial.path)
    if code is None:
        return True
    case.namespace["X"] = case.X.clone()
    code = "net = make()\nparams = {k: p.detach() for k, p in net.named_parameters()}\n" + code
    try:
        with Reseeded():
            exec(code, case.namespace)
    except Exception:
        return False
    return True


def outcomes(case: Case, trial: Trial) -> dict[str, Outcome]:
    """What comes of a trial, by quantity."""
    if trial.path == "threads" and case.draws:
        return dict.fromkeys(trial.quantities, Outcome("not applicable", "threads share the default generator"))
    try:
        results = case.run(trial)
    except AssertionError as error:
        return dict.fromkeys(trial.quantities, Outcome("wrong", str(error)[:300]))
    except Exception as error:
        kind = "refused" if refusal(error) or compiled_refusal(case, trial, error) else "crashed"
        needs_smooth = trial.path in ("grad", "jvp") or any(q in HESSIAN for q in trial.quantities)
        if (needs_smooth and not case.truth().smooth) or not applicable(case, trial):
            kind = "not applicable"
        return dict.fromkeys(trial.quantities, Outcome(kind, f"{type(error).__name__}: {shortened(error)}"))
    found = {}
    for q in trial.quantities:
        try:
            problem = case.check(trial, q, results[q]) if q in results else "no result"
            found[q] = Outcome("wrong", problem) if problem else Outcome("right")
        except NoTruth:
            found[q] = Outcome("not applicable", "no truth")
        except (RuntimeError, ValueError, TypeError) as error:  # a product that refuses when it multiplies
            found[q] = Outcome("refused" if refusal(error) else "crashed", f"{type(error).__name__}: {shortened(error)}")
    return found


def refusal(error: BaseException) -> bool:
    """Whether an error is the library's answer and no accident on the way: a ``raise`` statement of its own."""
    if not isinstance(error, (ValueError, RuntimeError, TypeError)):
        return False
    last = traceback.extract_tb(error.__traceback__)[-1]
    return "curvfunc" in last.filename and (last.line or "").startswith("raise")


def compiled_refusal(case: Case, trial: Trial, error: BaseException) -> bool:
    """Whether compiled code raises what the plain call refuses with; torch makes another type of it."""
    if trial.path != "compile":
        return False
    (plain,) = (t for t in eager(case.program) if t.quantities == trial.quantities)
    try:
        case.run(plain)
    except Exception as refused:
        return refusal(refused) and shortened(refused)[:60] in shortened(error)
    return False


def shortened(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]
