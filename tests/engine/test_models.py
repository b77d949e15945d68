"""What users bring: low precision, checkpoints, compiled parts, subsets of parameters, operations of their own."""

import sys
import threading
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvfunc
from curvfunc import (
    KFAC,
    BatchGrad,
    BatchL2,
    DiagGGN,
    Direct,
    Grad,
    compute,
    explain,
    functionalize,
    kflr,
    operation,
    reference,
    rule,
    sqrt_ggn,
)

N = 4
QUANTITIES: dict[str, Callable[..., Any]] = {
    "batch_grad": curvfunc.batch_grad,
    "batch_l2": curvfunc.batch_l2,
    "diag_ggn": curvfunc.diag_ggn,
}

pytestmark = pytest.mark.usefixtures("float64")


def small() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5)),
        torch.randn(N, 3),
        torch.randint(5, (N,)),
    )


# -- Kronecker approximations


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kfac_approximations_of_shared_positions(approximation: str) -> None:
    """Eschenhagen et al. 2023: expand averages over positions, reduce averages inputs and sums cotangents first."""
    torch.manual_seed(0)
    module, X, y = nn.Linear(3, 5), torch.randn(N, 6, 3), torch.randint(5, (N,))
    model_fn, params = functionalize(module)
    roots = sqrt_ggn(lambda p, z: (z + p["z"]).mean(1), {"z": torch.zeros(6, 5)}, module(X).detach(), y)["z"]
    B, A = kflr(lambda p, x: model_fn(p, x).mean(1), params, X, y, kfac_approx=approximation)["weight"]
    if approximation == "expand":
        want = torch.einsum("vnso,vnsp->op", roots, roots), torch.einsum("nsi,nsj->ij", X, X) / (N * 6)
    else:
        summed, mean = roots.sum(2), X.mean(1)
        want = torch.einsum("vno,vnp->op", summed, summed), mean.T @ mean / N
    assert_close({"B": B, "A": A}, {"B": want[0], "A": want[1]})


def test_kfac_approximations_agree_without_shared_positions() -> None:
    module, X, y = small()
    model_fn, params = functionalize(module)
    results = [kflr(model_fn, params, X, y, kfac_approx=a) for a in (None, "expand", "reduce")]
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_embedding_has_one_hot_inputs(approximation: str) -> None:
    torch.manual_seed(0)
    weight, tokens, y = torch.randn(7, 5), torch.randint(7, (N, 6)), torch.randint(5, (N,))
    one_hot = F.one_hot(tokens, 7).double()
    looked_up = kflr(lambda p, x: F.embedding(x, p["w"]).mean(1), {"w": weight}, tokens, y, kfac_approx=approximation)
    multiplied = kflr(lambda p, x: (x @ p["w"]).mean(1), {"w": weight}, one_hot, y, kfac_approx=approximation)
    assert_close(looked_up, multiplied)
    assert [f.shape[0] for f in looked_up["w"]] == [7, 5]


def test_kfac_is_exact_for_inputs_first() -> None:
    """One sample through x @ W: the factors' product is the exact block, in the order of W's axes."""
    torch.manual_seed(0)
    params, X, y = {"w": torch.randn(3, 5)}, torch.randn(1, 3), torch.tensor([2])
    first, second = kflr(lambda p, x: x @ p["w"], params, X, y)["w"]
    root = sqrt_ggn(lambda p, x: x @ p["w"], params, X, y)["w"].flatten(2).flatten(0, 1)
    assert_close({"w": torch.kron(first, second)}, {"w": root.T @ root})


def test_unknown_approximation() -> None:
    with pytest.raises(ValueError, match='"expand", "reduce" or None'):
        KFAC(kfac_approx="exact")


# -- precision


@pytest.mark.parametrize("quantity", QUANTITIES)
def test_autocast(quantity: str) -> None:
    """Under autocast results have the parameters' type, and the precision of the forward pass."""
    module, X, y = small()
    model_fn, params = functionalize(module.float())
    X = X.float()
    want = QUANTITIES[quantity](model_fn, params, X, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = QUANTITIES[quantity](model_fn, params, X, y)
    assert all(g.dtype == torch.float32 for g in got.values())
    assert_close(got, want, rtol=0.02)  # bfloat16 has 8 significant bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_types(dtype: torch.dtype) -> None:
    module, X, y = small()
    model_fn, params = functionalize(module.to(dtype))
    grads, squares, factors = compute(model_fn, params, X.to(dtype), y, (BatchGrad(), DiagGGN(), KFAC(0)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(g.dtype == dtype for g in grads.values())
    assert all(g.dtype == wide for g in squares.values())
    assert all(f.dtype == wide for t in factors.values() for f in t)


WIDE = ["batch_l2", "sum_grad_squared", "variance", "diag_ggn", "batch_diag_ggn", "kflr", "kfra", "diag_hessian",
        "batch_diag_hessian"]  # fmt: skip


@pytest.mark.parametrize("model", ["tanh", "norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantity", WIDE)
def test_sums_of_squares_are_in_single_precision(quantity: str, dtype: torch.dtype, model: str) -> None:
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3)]
    if model == "norm" and quantity != "kfra":
        layers.insert(3, nn.LayerNorm(4))
    module, X, y = nn.Sequential(*layers).to(dtype), torch.randn(6, 5).to(dtype), torch.arange(6) % 3
    unused = {"unused": torch.zeros(2, dtype=dtype)}
    model_fn, params = functionalize(module)
    got = getattr(curvfunc, quantity)(lambda p, x: model_fn({k: p[k] for k in params}, x), {**params, **unused}, X, y)
    assert {t.dtype for t in optree.tree_leaves(got)} == {torch.float32}
    assert not any(t.any() for t in optree.tree_leaves(got.pop("unused")))
    want = getattr(curvfunc, quantity)(*functionalize(module.double()), X.double(), y)
    assert_close(optree.tree_map(Tensor.double, got), want, rtol=20 * torch.finfo(dtype).eps)


def test_squares_do_not_underflow_in_half_precision() -> None:
    module, X, y = small()
    model_fn, params = functionalize(module.half())
    tiny = 1e-5 * X.half()  # squares of order 1e-10 are zero in float16
    got = curvfunc.sum_grad_squared(model_fn, params, tiny, y)["0.weight"]
    assert got.dtype == torch.float32
    assert (got > 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_on_cuda(dtype: torch.dtype) -> None:
    module, X, y = small()
    model_fn, params = functionalize(module.float().cuda())
    X, y = X.float().cuda(), y.cuda()
    want = curvfunc.diag_ggn(model_fn, params, X, y)
    with torch.autocast("cuda", dtype=dtype):
        assert_close(curvfunc.diag_ggn(model_fn, params, X, y), want, rtol=0.02)


# -- how models run


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 5), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.ones((), requires_grad=True)  # as usual in training; without it checkpoints have no gradient
        h = checkpoint(lambda x: torch.tanh(self.inner(x)), x, use_reentrant=self.reentrant)
        return self.outer(h)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_activation_checkpoints(quantity: str, reentrant: bool) -> None:
    module, X, y = small()
    checkpointed = Checkpointed(reentrant)
    checkpointed.load_state_dict(dict(zip(checkpointed.state_dict(), module.state_dict().values(), strict=True)))
    model_fn, params = functionalize(checkpointed)
    want = QUANTITIES[quantity](*functionalize(module), X, y)
    got = QUANTITIES[quantity](model_fn, params, X, y)
    assert_close(dict(zip(want, got.values(), strict=True)), want)
    one = torch.vmap(lambda p: QUANTITIES[quantity](model_fn, p, X, y))({k: v[None] for k, v in params.items()})
    assert_close({k: v[0] for k, v in one.items()}, got)


@pytest.mark.parametrize("part", ["whole", "part"])
def test_models_with_compiled_code(part: str) -> None:
    torch._dynamo.reset()
    module, X, y = small()
    want = curvfunc.batch_grad(*functionalize(module), X, y)
    if part == "whole":
        module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    else:
        module[0].compile(backend="eager")
    got = curvfunc.batch_grad(*functionalize(module), X, y)
    assert_close(dict(zip(want, got.values(), strict=True)), want)


def test_one_dropout_mask_for_all() -> None:
    """Gradients of a single sample's masked linear map tell the mask; all quantities see the same one."""
    torch.manual_seed(0)
    params, X, y = {"w": torch.randn(5, 50)}, torch.ones(N, 50), torch.randint(5, (N,))
    model_fn = lambda p, x: F.linear(F.dropout(x, 0.5), p["w"])
    out, grads, norms = compute(model_fn, params, X, y, (curvfunc.Output(), BatchGrad(), BatchL2()))
    masks = grads["w"].abs().sum(1) > 0
    assert_close({"w": out}, {"w": 2 * masks.double() @ params["w"].T})
    assert_close(norms, {"w": grads["w"].square().sum((1, 2))})
    assert len({tuple(m.tolist()) for m in masks}) == N


def test_what_functions_of_users_keep_under_names_of_autograd() -> None:
    """The nodes of leaves have a ``variable``; behind another one's, parameters may be used where calls cannot be seen."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x**2

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.save_for_backward(*inputs)
            ctx.variable = torch.ones(3)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g * ctx.saved_tensors[0]

        @staticmethod
        def vmap(info: Any, dims: Any, x: Tensor) -> tuple[Tensor, int]:
            return Square.apply(x), dims[0]

    def model_fn(p: dict[str, Tensor], x: Tensor, square: Callable[[Tensor], Tensor] = Square.apply) -> Tensor:
        h = x @ p["a"].t()
        with torch._C.DisableTorchFunction():
            h = h * p["w"]
        return square(h) + p["b"]

    torch.manual_seed(0)
    params = {"a": torch.randn(5, 3), "w": torch.randn(5), "b": torch.randn(5)}
    X, y = torch.randn(N, 3), torch.randint(5, (N,))
    expected = reference.batch_grad(lambda p, x: model_fn(p, x, torch.square), params, X, y)
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), expected)


# -- parameters


def test_a_subset_of_parameters_stops_the_backward_pass() -> None:
    """Below the deepest layer that is asked for nothing is backpropagated."""
    reached: list[str] = []

    class Noted(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor, name: str) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            ctx.name = inputs[1]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
            reached.append(ctx.name)
            return g, None

        @staticmethod
        def vmap(info: Any, dims: Any, x: Tensor, name: str) -> tuple[Tensor, int]:
            return Noted.apply(x, name), dims[0]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(Noted.apply(self.b(Noted.apply(self.a(x), "a")), "b"))

    _, X, y = small()
    model_fn, params = functionalize(Net())
    full = curvfunc.diag_ggn(model_fn, params, X, y)
    assert set(reached) == {"a", "b"}
    reached.clear()
    last = {k: v for k, v in params.items() if k.startswith("c")}
    got = curvfunc.diag_ggn(model_fn, last, X, y)
    assert reached == []
    assert_close(got, {k: full[k] for k in last})


def test_frozen_parameters_get_nothing() -> None:
    module, X, y = small()
    module[0].requires_grad_(False)
    model_fn, params = functionalize(module)
    assert list(params) == ["2.weight", "2.bias"]
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), reference.batch_grad(model_fn, params, X, y))


def test_parameters_outside_of_a_module() -> None:
    """A temperature beside the module's parameters, in a nested pytree."""
    module, X, y = small()
    inner, params = functionalize(module)
    both = {"net": params, "rest": [torch.tensor(2.0)]}
    model_fn = lambda p, x: inner(p["net"], x) / p["rest"][0].exp()
    got, want = (f(model_fn, both, X, y) for f in (curvfunc.diag_ggn, reference.diag_ggn))
    assert_close(got, want)


def test_complex_parameters_are_refused() -> None:
    _, X, y = small()
    with pytest.raises(TypeError, match="'w' has dtype torch.complex"):
        curvfunc.batch_grad(lambda p, x: (x @ p["w"]).abs(), {"w": torch.randn(3, 5, dtype=torch.cfloat)}, X, y)


def test_packed_sequences_are_refused() -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, [3] * len(x), batch_first=True)
            return self.head(self.lstm(packed)[1][0][0])

    model_fn, params = functionalize(Packed())
    with pytest.raises(NotImplementedError, match="packed sequences"):
        curvfunc.batch_grad(model_fn, params, torch.randn(N, 3, 3), torch.randint(5, (N,)))


def test_output_fn_chooses() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.head(x), "features": x}

    _, X, y = small()
    model_fn, params = functionalize(Two(), output_fn=lambda out: out["logits"])
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), reference.batch_grad(model_fn, params, X, y))


# -- rules of one's own


@operation
def gate(x: Tensor, w: Tensor) -> Tensor:
    """A user's operation, z[n] = tanh(x[n]) * w."""
    return torch.tanh(x) * w


def gated(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(gate(x, params["gate"]), params["head"])


def test_a_rule_of_ones_own() -> None:
    _, X, y = small()
    params = {"gate": torch.rand(3), "head": torch.randn(5, 3)}
    assert explain(gated, params, X).rows[0].rule == "mul"
    want = {q: f(gated, params, X, y) for q, f in QUANTITIES.items()}

    @rule(gate, parameters="w", samples_first=True)
    def _(x: Tensor, w: Tensor) -> dict[str, Direct]:
        return {"w": Direct(lambda g: g * torch.tanh(x), w.shape)}

    assert explain(gated, params, X).rows[0][:3] == ("gate", "plain", "gate")
    for name, quantity in QUANTITIES.items():
        assert_close(quantity(gated, params, X, y), want[name])
    flipped = lambda p, x: gated(p, x).flip(0).flip(0)
    assert explain(flipped, params, X).rows[0][:3] == ("gate", "vmap", "gate")
    assert_close(curvfunc.diag_ggn(flipped, params, X, y), want["diag_ggn"])


def test_a_rule_names_arguments_that_exist() -> None:
    with pytest.raises(ValueError, match=r"\['weight'\] are not among"):
        rule(gate, parameters="weight")(lambda x, w: {})


def test_explain_prints_a_table() -> None:
    module, X, _ = small()
    model_fn, params = functionalize(module)
    lines = str(explain(model_fn, params, X)).splitlines()
    assert lines[0].split() == ["parameter", "path", "rule", "why"]
    assert [line.split() for line in lines[2:]] == [[name, "plain", "linear"] for name in params]


def test_compiled_functions_take_batches_of_any_size() -> None:
    """The last batch of an epoch is smaller: shapes become symbols then, and results stay right."""
    torch._dynamo.reset()
    module, X, y = small()
    model_fn, params = functionalize(module)
    specs = (BatchGrad(), BatchL2(), DiagGGN(), KFAC(0))
    step = torch.compile(lambda p, X, y: compute(model_fn, p, X, y, specs), fullgraph=True, backend="aot_eager")
    X, y = torch.cat([X, X + 1]), torch.cat([y, y])
    for n in (4, 7, 5):
        assert_close(step(params, X[:n], y[:n]), compute(model_fn, params, X[:n], y[:n], specs))


def test_a_module_in_place_of_its_function() -> None:
    module, X, y = small()
    with pytest.raises(TypeError, match=r"Sequential; a function of .*curvfunc\.functionalize"):
        curvfunc.batch_grad(module, dict(module.named_parameters()), X, y)


def test_threads_take_turns() -> None:
    """Each call has its own tensors in the module's places, whatever others ask for at once, and the module gets back its own."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model_fn, params = functionalize(module)
    X, y = torch.randn(N, 3), torch.randint(2, (N,))
    subsets = [{k: p * (i + 2) for k, p in params.items() if part in k} for i, part in enumerate(("weight", "bias", ""))]
    functions = [model_fn, model_fn, functionalize(module)[0]]
    specs = [Grad(), BatchGrad(), DiagGGN()]
    expected = [compute(model_fn, subset, X, y, specs) for subset in subsets]
    own = [*module.parameters()]
    wrong: list[Any] = []

    def work(function: Any, subset: dict[str, Tensor], results: Any) -> None:
        try:
            for _ in range(40):
                assert_close(compute(function, subset, X, y, specs), results)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=given) for given in zip(functions, subsets, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert all(p is q for p, q in zip(module.parameters(), own, strict=True))


HOOKS: dict[str, tuple[Any, bool]] = {
    "looks": (lambda g: None, False),
    "returns it": (lambda g: g, False),
    "returns its values": (lambda g: g.clamp(-1e9, 1e9), False),
    "doubles": (lambda g: 2 * g, True),
    "doubles in place": (lambda g: g.mul_(2), True),
}


@pytest.mark.parametrize("where", ["layer", "activation", "output", "parameter"])
@pytest.mark.parametrize("name", HOOKS)
def test_hooks_may_look_at_gradients_and_not_change_them(name: str, where: str) -> None:
    """A backward pass to the edges of a graph would have some of them, and not others; for the gradient alone all count."""
    hook, changes = HOOKS[name]
    X, y = torch.randn(5, 3), torch.arange(5) % 2
    params = {"w": torch.randn(3, 4), "v": torch.randn(4, 2)}

    def model(p: Any, x: Tensor, hooked: bool = True) -> Tensor:
        h = x @ p["w"]
        t = h.tanh()
        out = t @ p["v"]
        if hooked:
            {"layer": h, "activation": t, "output": out, "parameter": p["w"]}[where].register_hook(hook)
        return out

    specs = (curvfunc.Grad(), curvfunc.BatchGrad(), curvfunc.DiagGGN())
    if changes or where == "parameter":
        with pytest.raises(ValueError, match="a hook of the model .* (changes gradients|registered with a parameter)"):
            curvfunc.compute(model, params, X, y, specs)
        if name == "doubles":
            leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
            want = torch.autograd.grad(F.cross_entropy(model(leaves, X), y), [*leaves.values()])
            assert_close(curvfunc.compute(model, params, X, y, curvfunc.Grad()), dict(zip(leaves, want, strict=True)))
    else:
        without = lambda p, x: model(p, x, hooked=False)
        assert_close(curvfunc.compute(model, params, X, y, specs), curvfunc.compute(without, params, X, y, specs), 1e-10)


class Hooked(nn.Module):
    """Two layers; ``change`` maps gradients, in a hook that is registered in some way."""

    def __init__(self, way: str, change: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.a, self.b, self.way, self.seen = nn.Linear(3, 4), nn.Linear(4, 2), way, list[str]()

        def hook(*given: Any) -> Any:
            self.seen.append(way)
            gradients = given[1] if len(given) > 1 and isinstance(given[0], nn.Module) else given[0]
            found = tuple(None if g is None else change(g) for g in gradients)
            return None if all(g is None for g in found) else found

        self.hook = hook
        layer, _, how = way.partition(" ")
        if how.startswith("register"):
            getattr(getattr(self, layer), how)(hook)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        t = h.tanh()
        out: Tensor = self.b(t)
        match self.way if out.requires_grad else "nothing":
            case "layer":
                h.grad_fn.register_hook(self.hook)  # type: ignore[union-attr]
            case "before layer":
                h.grad_fn.register_prehook(self.hook)  # type: ignore[union-attr]
            case "behind":
                t.grad_fn.next_functions[0][0].register_prehook(self.hook)  # type: ignore[union-attr]
            case "activation":
                t.grad_fn.register_hook(self.hook)  # type: ignore[union-attr]
            case "output":
                out.grad_fn.register_prehook(self.hook)  # type: ignore[union-attr]
        return out


WAYS = ["layer", "before layer", "behind", "activation", "output", "a register_backward_hook", "b register_backward_hook"]
WAYS += ["b register_full_backward_hook", "a register_full_backward_pre_hook", "b register_full_backward_pre_hook"]


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["looks", "returns it", "returns its values", "doubles", "doubles in place"])
def test_hooks_of_nodes_and_modules(name: str, way: str) -> None:
    """Some of them would not run in a backward pass to the edges of a graph; where they look, they have seen something."""
    hook, changes = HOOKS[name]
    module = Hooked(way, hook)
    (model_fn, params), X, y = functionalize(module), torch.randn(5, 3), torch.arange(5) % 2
    without, _ = functionalize(Hooked("nothing", hook))
    for specs in ((BatchGrad(),), (BatchL2(),), (curvfunc.Grad(), DiagGGN()), (curvfunc.DiagHessian(),)):
        module.seen.clear()
        if changes:
            with pytest.raises(ValueError, match="hook of the model|full backward hook of Linear"):
                compute(model_fn, params, X, y, specs)
            continue
        found = compute(model_fn, params, X, y, specs)
        assert module.seen
        for result, expected in zip(found, compute(without, params, X, y, specs), strict=True):
            assert_close(result, expected)


def test_nodes_that_a_model_looks_at_are_as_they_are() -> None:
    seen: list[Any] = []

    def model_fn(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = x @ p["w"]
        node: Any = h.grad_fn
        is_node = isinstance(node, torch.autograd.graph.Node)
        seen[:] = [node.name(), type(node).__name__, is_node, node == h.grad_fn, repr(node), {node: 1}[h.grad_fn]]
        node.metadata["mine"] = 1
        assert h.detach().grad_fn is None
        edge = torch.autograd.graph.get_gradient_edge(h)
        (g,) = torch.autograd.grad(h.sum(), [edge], retain_graph=True)
        return h + 0 * g.sum()

    params, X, y = {"w": torch.randn(3, 4)}, torch.randn(5, 3), torch.arange(5) % 4
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), reference.batch_grad(lambda p, x: x @ p["w"], params, X, y))
    assert seen[:4] == ["MmBackward0", "MmBackward0", True, True]
    assert "MmBackward0" in seen[4]


def test_parameters_that_a_module_holds_no_longer() -> None:
    """Without them in params the module runs as it is; with them, the message says which they are."""
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    model_fn, params = curvfunc.functionalize(net)
    X, y = torch.randn(5, 3), torch.arange(5) % 2
    curvfunc.batch_grad(model_fn, params, X, y)
    net[0].bias = None
    with pytest.raises(ValueError, match=r"params has \['0.bias'\], which the module holds no longer"):
        curvfunc.batch_grad(model_fn, params, X, y)
    del params["0.bias"]
    again, own = curvfunc.functionalize(net)
    assert_close(curvfunc.batch_grad(model_fn, params, X, y), curvfunc.batch_grad(again, own, X, y))
