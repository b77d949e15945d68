"""Checks that run in several processes at once, with gloo; `run` starts these and returns what each of them has found."""

import copy
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from test_merging import EXACT, mlp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import curvfunc

SIZES = (5, 0, 7)  # samples of each rank
SUMS = (curvfunc.Loss(), curvfunc.Grad(), curvfunc.Variance(), curvfunc.SumGradSquared(), curvfunc.DiagGGN(), curvfunc.KFLR())
SHARDED = (*SUMS, curvfunc.DiagHessian(), curvfunc.BatchGrad())
SAMPLED = (curvfunc.KFAC(3), curvfunc.DiagGGN(2), curvfunc.SqrtGGN(2))
TIMEOUT = 3  # seconds, of groups that lose one


def problem(targets: str = "classes") -> tuple[nn.Module, Tensor, Tensor]:
    """A network and all samples, alike in all processes."""
    torch.manual_seed(5)
    net, X = mlp(), torch.randn(sum(SIZES), 4)
    y = torch.randint(3, (sum(SIZES),)) if targets == "classes" else torch.randn(sum(SIZES), 3)
    if targets == "ignored":
        y = torch.randint(3, (sum(SIZES),))
        y[[0, 3, 6, 11]] = -100
    return net, X, y


def share(rank: int, *tensors: Tensor, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    start = sum(sizes[:rank])
    return [t[start : start + sizes[rank]] for t in tensors]


def terms(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).cosh().sum(1).mean()


def per_label(out: Tensor, y: Tensor) -> Tensor:
    return (out.square().sum(1) * (y[:, 0] > 0)).sum() / (y[:, 0] > 0).sum()


def above_zero(out: Tensor, y: Tensor) -> Tensor:
    return (y[:, 0] > 0).sum()


LOSSES: dict[str, tuple[Callable[[], Any], str, Any]] = {
    "cross-entropy": (lambda: F.cross_entropy, "classes", None),
    "weights, ignored": (lambda: partial(F.cross_entropy, weight=torch.tensor([0.3, 1.0, 2.5])), "ignored", None),
    "sum": (lambda: nn.CrossEntropyLoss(reduction="sum"), "ignored", None),
    "squared error": (lambda: F.mse_loss, "numbers", None),
    "own": (lambda: terms, "numbers", None),
}

WEIGHED = LOSSES | {
    "own mean": (lambda: per_label, "numbers", above_zero),
    "own, told": (lambda: terms, "numbers", "mean"),
    "own sum": (lambda: lambda out, y: (out - y).cosh().sum(), "numbers", None),
}
OPERATORS: dict[str, Callable[..., curvfunc.LinearOperator]] = {
    "hessian": curvfunc.hessian_operator,
    "ggn": curvfunc.ggn_operator,
    "fisher": curvfunc.fisher_operator,
    "empirical fisher": partial(curvfunc.fisher_operator, empirical=True),
}


def applies(kind: str, name: str) -> bool:
    """Whether there is such a matrix: the Fisher needs a likelihood."""
    return kind != "fisher" or not name.startswith("own")


def world() -> Any:
    return dist.group.WORLD


def equal(rank: int, name: str, sizes: Sequence[int] = SIZES, group: Any = None) -> Any:
    make, targets, reduction = LOSSES[name]
    net, X, y = problem(targets)
    model_fn, params = curvfunc.functionalize(net)
    given = {"loss_fn": make(), "reduction": reduction, "group": group or world()}
    mine = share(rank, X, y, sizes=sizes)
    everything = curvfunc.compute(model_fn, params, *mine, EXACT, gather=True, **given)
    own = curvfunc.compute(model_fn, params, *mine, (curvfunc.BatchGrad(), curvfunc.SqrtGGN()), **given)
    return everything, own


def pair(rank: int, sizes: Sequence[int]) -> Any:
    """Two of them are a group."""
    group = dist.new_group([0, 1])
    return {name: equal(rank, name, sizes, group) for name in LOSSES} if rank < 2 else None


def loops(rank: int, folder: Path) -> Any:
    net, X, y = problem("ignored")
    model_fn, params = curvfunc.functionalize(net)
    X, y = share(rank, X, y)
    data = list(zip(X.split(3), y.split(3), strict=True)) if len(X) else []
    given = {"group": world(), "checkpoint": folder / "state.pt", "out": folder / "out", "every": 1}
    first = curvfunc.accumulate(model_fn, params, iter(data), EXACT, **given)
    again = curvfunc.accumulate(model_fn, params, iter(data), EXACT, **given)
    plain = curvfunc.accumulate(model_fn, params, iter(data), EXACT, group=world(), gather=True, store_on="cpu")
    return first, again, plain


def sampled(rank: int) -> Any:
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    generator = torch.Generator().manual_seed(rank)
    return curvfunc.compute(model_fn, params, *share(rank, X, y), SAMPLED, generator=generator, group=world(), gather=True)


def split(X: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(3), y.split(3), strict=True)) if len(X) else []


def operators(rank: int, sizes: Sequence[int] = SIZES, group: Any = None) -> dict[tuple[str, str], list[Tensor]]:
    """Of a batch each, and of data sets, where one without samples may be an empty one; and of both."""
    found = {}
    for name, (make, targets, reduction) in WEIGHED.items():
        net, X, y = problem(targets)
        model_fn, params = curvfunc.functionalize(net)
        X, y = share(rank, X, y, sizes=sizes)
        given = {"loss_fn": make(), "reduction": reduction, "group": group or world()}
        for kind, function in OPERATORS.items():
            if applies(kind, name):
                both = (X, y) if rank else ([(X[:0], y[:0]), (X, y)],)
                dense = [function(model_fn, params, *of, **given).dense() for of in ((X, y), (split(X, y),), both)]
                found[name, kind] = dense
    return found


def pairs_of_operators(rank: int, sizes: Sequence[int]) -> Any:
    group = dist.new_group([0, 1])
    return operators(rank, sizes, group) if rank < 2 else None


def drawn(rank: int) -> Any:
    """What processes draw is their own: the operator of all, and this one's."""
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    X, y = share(rank, X, y)
    found = []
    for of in ((X, y), (split(X, y),)):
        ask = lambda of=of, **given: curvfunc.ggn_operator(
            model_fn, params, *of, mc_samples=2, generator=torch.Generator().manual_seed(rank), **given
        ).dense()
        found.append((ask(group=world()), ask() if len(X) else None))
    return found


def products(rank: int) -> Any:
    """Of trees, and in estimators and linear systems, of a batch and of a data set."""
    net, X, y = problem("ignored")
    model_fn, params = curvfunc.functionalize(net)
    X, y = share(rank, X, y)
    found = []
    for of in ((X, y), (split(X, y),)):
        ggn = curvfunc.ggn_operator(model_fn, params, *of, group=world())
        trace = curvfunc.hutchinson_trace(ggn, 5, generator=torch.Generator().manual_seed(3))
        found.append((ggn @ params, curvfunc.eigsh(ggn, 2)[0], trace, (2 * ggn + 0.1).solve(params)))
    return found


class Changing:
    """A data set that has other batches at each pass in one of the processes."""

    def __init__(self, batches: Sequence[Any], changes: bool) -> None:
        self.batches, self.changes = batches, changes

    def __iter__(self) -> Iterator[Any]:
        return ((X + torch.randn(()) if self.changes else X, y) for X, y in self.batches)


def refused(rank: int) -> dict[str, tuple[str, str]]:
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    first = rank == 0
    X, y = share(rank, X, y)
    numbers = torch.randn(len(X), 3)

    def ask(*of: Any, function: Any = curvfunc.ggn_operator, **given: Any) -> Any:
        return error(lambda: function(model_fn, given.pop("params", params), *(of or (X, y)), group=world(), **given))

    ggn = curvfunc.ggn_operator(model_fn, params, X, y, group=world())
    signs = torch.ones(ggn.shape[0])
    signs[1 + (rank == 1)] = -1
    changing = curvfunc.ggn_operator(model_fn, params, Changing(split(X, y), first), group=world())
    either: Any = lambda out, y: out.exp().sum() / (len(out) if y[0, 0] > 100 else 1)
    return {
        "vectors": error(lambda: ggn @ torch.full((ggn.shape[0],), 1.0 + (rank == 1))),
        "places": error(lambda: ggn @ signs),
        "numbers of vectors": error(lambda: ggn @ torch.zeros(ggn.shape[0], 2 + (rank == 1))),
        "vmap": error(lambda: torch.func.vmap(lambda v: ggn @ v, in_dims=1, out_dims=1)(torch.eye(ggn.shape[0]))),
        "pickled": error(lambda: pickle.dumps(ggn)),
        "copied": error(lambda: copy.deepcopy(ggn)),
        "changing": error(lambda: changing @ params),
        "matrix": ask(function=curvfunc.ggn_operator if first else curvfunc.hessian_operator),
        "draws": ask(mc_samples=1 + first),
        "one asks for what is not": ask(mc_samples=-1 if first else 0),
        "loss": ask(loss_fn=F.cross_entropy if first else partial(F.cross_entropy, label_smoothing=0.1)),
        "losses": ask(X, numbers + 200 * first, loss_fn=either),
        "values": ask(params={n: p + first for n, p in params.items()}),
        "containers": ask(params=dict(reversed(params.items())) if first else params),
        "no samples": ask(X[:0], y[:0]),
        "no batches": ask([]),
        "subsampling": ask(subsampling=[0]),
        "split": ask(split=lambda batch: batch),
        "reduction": ask(reduction="mean"),
        "unknown mean": ask(torch.randn(5, 4), torch.randn(5, 3), loss_fn=per_label),
        "one has bad targets": ask(X, torch.full_like(y, 9 if first else 0)),
        "one has an iterator": ask(iter([]) if first else []),
        "one has no targets": ask(X if first else []),
    }


def alone(rank: int) -> Any:
    """A group of two of them, and of one."""
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    last = dist.new_group([dist.get_world_size() - 1])
    if rank == dist.get_world_size() - 1:
        return curvfunc.compute(model_fn, params, X, y, EXACT, group=last)
    return error(lambda: curvfunc.compute(model_fn, params, X, y, EXACT, group=last))


def wrapped(rank: int) -> Any:
    net, X, y = problem()
    ddp = DistributedDataParallel(net)
    model_fn, params = curvfunc.functionalize(ddp)
    mine = share(rank, X, y)
    results = curvfunc.compute(model_fn, params, *mine, SHARDED, group=world(), gather=True)
    local = curvfunc.compute(model_fn, params, X[rank:], y[rank:], curvfunc.Grad()) if rank else None  # no message, so no hang
    ggn = curvfunc.ggn_operator(model_fn, params, *mine, group=world()).dense()
    inner = nn.Sequential(DistributedDataParallel(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))), nn.Linear(5, 3)).eval()
    inner_fn, inner_params = curvfunc.functionalize(inner)
    inside = curvfunc.compute(inner_fn, inner_params, X, y, curvfunc.DiagGGN()) if rank else None
    ddp(X).sum().backward()  # it still works
    return list(params), (results, ggn), local is not None, sorted(inside or ()), bool(net[0].weight.grad.abs().sum() > 0)


def sharded_model(net: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    fully_shard(net[0])
    return fully_shard(net)


def whole(tree: Any, like: dict[str, Any]) -> Any:
    """Full tensors of DTensors that are placed as the parameters."""
    from torch.distributed.tensor import DTensor

    if isinstance(tree, dict):
        for name, t in tree.items():
            if isinstance(t, DTensor):
                assert t.placements == like[name].placements
                assert t.shape == like[name].shape
                assert t.to_local().shape == like[name].to_local().shape
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tree.items()}
    return tree


def kinds(results: Any) -> list[str]:
    return [type(r["0.weight"]).__name__ if isinstance(r, dict) else type(r).__name__ for r in results]


def fully_sharded(rank: int) -> Any:
    net, X, y = problem()
    model_fn, before = curvfunc.functionalize(net)
    net = sharded_model(net)
    net[2].bias.requires_grad_(False)
    found = []
    for step in range(2):
        params = curvfunc.functionalize(net)[1] if step else {n: p for n, p in net.named_parameters() if p.requires_grad}
        function = curvfunc.functionalize(net)[0] if step else model_fn  # made before it was sharded
        results = curvfunc.compute(function, params, *share(rank, X, y), SHARDED, group=world(), gather=True)
        found.append((kinds(results), [whole(r, params) for r in results]))
        net(X)  # leaves whole parameters of the root in their places
    assert list(before) == [n for n, _ in net.named_parameters()]
    net(X).sum().backward()
    refused = error(lambda: curvfunc.compute(model_fn, params, X, y, curvfunc.Grad()))
    two = dist.new_group([0, 1])
    others = error(lambda: curvfunc.compute(model_fn, params, X, y, curvfunc.Grad(), group=two)) if rank < 2 else None
    operator = error(lambda: curvfunc.ggn_operator(model_fn, params, X, y, group=world()))
    return found, net[0].weight.grad is not None, refused, others, operator


def placements(rank: int) -> Any:
    """Parameters of a plain function: replicated, and sharded along another axis."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    net, X, y = problem()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    function, params = curvfunc.functionalize(net)
    places = [Shard(1), Replicate(), Shard(0), Shard(0)]
    params = {n: distribute_tensor(p, mesh, [k]) for (n, p), k in zip(params.items(), places, strict=True)}
    results = curvfunc.accumulate(lambda p, X: function(p, X), params, [share(rank, X, y)], SHARDED, group=world(), gather=True)
    return kinds(results), [whole(r, params) for r in results]


def error(call: Callable[[], Any]) -> tuple[str, str]:
    """Kind and message of the error that a call raises."""
    try:
        call()
    except Exception as raised:
        return type(raised).__name__, str(raised)
    return "", "no error"


def differing(rank: int) -> dict[str, tuple[str, str]]:
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    first = rank == 0
    X, y = share(rank, X, y)

    def ask(params: Any = params, specs: Any = curvfunc.Grad(), X: Tensor = X, y: Tensor = y, **given: Any) -> Any:
        return error(
            lambda: curvfunc.compute(model_fn, params, X, y, specs, group=world(), gather=given.pop("gather", False), **given)
        )

    other = {n: p[:2] if n == "2.bias" else p for n, p in params.items()}
    changed = {n: p + first for n, p in params.items()}
    meta = {n: p.to("meta") for n, p in params.items()}
    bad = torch.full_like(y, 7)
    batches = [(X, y), (X, y.double()), (X, y)]
    labels: Any = partial(F.cross_entropy, label_smoothing=0.1)
    found = {
        "specs": ask(specs=curvfunc.Grad() if first else curvfunc.Variance()),
        "loss": ask(loss_fn=F.cross_entropy if first else labels),
        "shapes": ask(other if first else params),
        "values": ask(changed),
        "devices": ask(meta if first else params),
        "gather": ask(gather=first),
        "one raises": ask(y=bad if first else y),
        "one raises at once": ask(specs="Grad" if first else curvfunc.Grad()),
        "one subsamples": ask(subsampling=[0] if first else None),
        "no samples": ask(X=X[:0], y=y[:0]),
        "gram": ask(specs=curvfunc.BatchDot()),
        "kfra": ask(specs=curvfunc.KFRA()),
        "out": ask(out={"0.weight": params["0.weight"]}),
        "own mean": ask(X=torch.randn(5, 4), y=torch.randn(5, 3), loss_fn=per_label),
        "decay": error(lambda: curvfunc.accumulate(model_fn, params, [(X, y)], curvfunc.Grad(), group=world(), decay=0.9)),
        "files": error(
            lambda: curvfunc.accumulate(
                model_fn, params, [], curvfunc.BatchGrad(), group=world(), gather=True, out="/tmp/never"
            )
        ),
        "in the loop": error(
            lambda: curvfunc.accumulate(model_fn, params, batches if first else [], curvfunc.Grad(), group=world())
        ),
    }
    longer = nn.Sequential(nn.Linear(4, 5), nn.Unflatten(1, (1, 5)), nn.Linear(5, 3))
    function, weights = curvfunc.functionalize(longer)
    weights = {n: torch.ones_like(p) for n, p in weights.items()}
    lengths = torch.randn(4, 1 + first, 3)
    found["shapes of samples"] = error(
        lambda: curvfunc.compute(
            lambda p, X: function(p, X[:, :4]).expand(len(X), X.shape[1] - 4, 3),
            weights,
            torch.randn(4, 5 + first),
            lengths,
            curvfunc.Output(),
            loss_fn=F.mse_loss,
            group=world(),
            gather=True,
        )
    )
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).eval()
    function, weights = curvfunc.functionalize(norm)
    weights = {n: torch.ones_like(p) for n, p in weights.items()}
    norm[1].running_mean += rank
    found["buffers"] = error(lambda: curvfunc.compute(function, weights, X, y, curvfunc.Grad(), group=world()))
    net.train(first)
    found["mode"] = ask()
    found["as before"] = error(lambda: equal(rank, "cross-entropy"))
    return found


def deadly(batches: Sequence[Any], rank: int) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if number == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def late(rank: int) -> Any:
    """One that does not come, for as long as the others wait for it."""
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    if rank == 1:
        time.sleep(TIMEOUT + 2.5)
        return None
    start = time.monotonic()
    return error(lambda: curvfunc.compute(model_fn, params, X, y, SUMS, group=group)), time.monotonic() - start


def killed(rank: int) -> Any:
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    net, X, y = problem()
    model_fn, params = curvfunc.functionalize(net)
    ggn = curvfunc.ggn_operator(model_fn, params, X, y, group=dist.new_group(timeout=timedelta(seconds=TIMEOUT)))
    start = time.monotonic()
    found = error(lambda: curvfunc.accumulate(model_fn, params, deadly([(X, y)] * 3, rank), SUMS, group=group))
    return found, time.monotonic() - start, error(lambda: ggn @ params)


def work(rank: int, size: int, folder: Path, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    limit = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size, timeout=limit)
    found = []
    for name, given in calls:
        found.append(globals()[name](rank, *given))
        torch.save(found, folder / f"{rank}.pt")
    os._exit(0)  # there may be no group left to leave


def run(size: int, folder: Path, *calls: tuple[Any, ...], limit: float = 120) -> dict[int, list[Any]]:
    """What each process has found, by rank; of one that was killed, what it had before."""
    context = mp.get_context("spawn")
    listed = [(name, given) for name, *given in calls]
    processes = [context.Process(target=work, args=(rank, size, folder, listed)) for rank in range(size)]
    for p in processes:
        p.start()
    try:
        for p in processes:
            p.join(limit)
            assert p.exitcode in (0, -signal.SIGKILL), f"a process hangs, or has failed: {p.exitcode}"
    finally:
        for p in processes:
            if p.is_alive():
                p.kill()
    return results(size, folder)


def results(size: int, folder: Path) -> dict[int, list[Any]]:
    """What each process has written."""
    return {rank: torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)}


def shared_folder(factory: Any, name: str) -> Path:
    """A folder of this run of pytest, the same for all workers of xdist."""
    run_of_xdist = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    return factory.mktemp(name) if run_of_xdist is None else factory.getbasetemp().parent / f"{name}-{run_of_xdist}"


def run_once(size: int, folder: Path, *calls: tuple[Any, ...], limit: float = 120) -> dict[int, list[Any]]:
    """As `run`, by the first of those that call with this folder; the others wait for what it finds."""
    folder.mkdir(exist_ok=True)
    done = folder / "done"
    try:
        (folder / "claimed").touch(exist_ok=False)
    except FileExistsError:
        until = time.monotonic() + limit + 30
        while not done.exists():
            assert time.monotonic() < until, "the processes hang, or have failed in another worker"
            time.sleep(0.1)
        return results(size, folder)
    try:
        return run(size, folder, *calls, limit=limit)
    finally:  # where it failed there is nothing to read
        done.touch()
