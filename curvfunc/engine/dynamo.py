"""Calls inside ``torch.compile``: the engine runs while dynamo traces, and what the model reads becomes part of the key.

Dynamo does not look into the engine (``nonstrict_trace``); left to itself it would take everything that model and loss
read for constants: ``train()`` and ``eval()``, attributes of modules and other objects, captured numbers, entries of
dictionaries, hooks. Therefore it first traces model and loss as it traces any model, into a graph that is thrown away.
What stays are its guards on all that was read, so that a change compiles anew. Where dynamo cannot trace the model, the
graph ends before the call: an error that says where with ``fullgraph=True``, else an eager call.

Tensors that model and loss read besides their arguments (captured by a function, held by an object) are guarded by
shape and type only, so they cross the boundary as arguments, too: wherever the engine meets one of them in an
operation, the argument takes its place.
"""

import functools
import gc
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Generator, Tensor, nn
from torch._dynamo import config
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.exc import Unsupported, unimplemented
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource, NumpyTensorSource, TensorPropertySource
from torch._dynamo.variables import TensorVariable, TupleVariable, UserFunctionVariable, UserMethodVariable
from torch._dynamo.variables.base import AttributeMutationExisting, ValueMutationExisting, VariableTracker
from torch._dynamo.variables.dicts import ConstDictVariable
from torch._dynamo.variables.functions import FunctoolsPartialVariable, NestedUserFunctionVariable
from torch._dynamo.variables.misc import NewGlobalVariable
from torch._dynamo.variables.tensor import SymNodeVariable
from torch._guards import Source
from torch._subclasses.fake_tensor import fake_tensor_tls
from torch.fx.experimental.symbolic_shapes import guard_scalar
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import TensorWeakRef

from curvfunc import losses
from curvfunc.engine.model import ModelFunction, check_function

__all__ = ["call"]

# read by every module, and not guarded by torch
GLOBAL_HOOKS = [
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
]
DIFFERENTIABLE = torch.zeros((), requires_grad=True)  # makes a sum require grad, under torch.func transforms, too

SIDE_EFFECT = (
    "The forward pass changes an object, which would happen once, when it is compiled, and not at each call.",
    "Return what is to be kept, or keep it in a buffer that is changed in place. spectral_norm changes in training mode only; "
    "in place of torch.nn.utils.weight_norm there is torch.nn.utils.parametrizations.weight_norm.",
)


def call(
    evaluate: Callable[..., Any],
    model_fn: Any,
    params: Any,
    X: Any,
    y: Any,
    loss: losses.Loss,
    constants: tuple[Any, ...],
    tensors: dict[str, Any],
    generator: Generator | None,
) -> Any:
    """``evaluate(model_fn, params, X, y, loss, held, *constants, **tensors)`` as dynamo sees it, which traces this function.

    ``held`` are the tensors that model and loss read besides their arguments.
    """
    if generator is not None:
        raise ValueError(
            "a torch.Generator cannot enter torch.compile: draws inside compiled code come from the default generator "
            "(torch.manual_seed), fresh at each call. Pass generator=None."
        )
    check_function(model_fn)
    state = {}
    if isinstance(model_fn, ModelFunction):
        comptime(_refresh)
        state = model_fn.state(params)
    name, loss_fn, options = loss.name, loss.fn, loss.options

    def forward() -> None:
        sum(map(len, GLOBAL_HOOKS))
        with torch.enable_grad():  # as the engine, so that backward functions are looked into
            p = pytree.tree_map_only(Tensor, lambda t: t + DIFFERENTIABLE, params)
            out = model_fn.trace(p, state, X) if isinstance(model_fn, ModelFunction) else model_fn(p, X)
            if name is None and loss_fn is not losses.no_loss:
                loss_fn(out, y, **dict(options), **loss.tensors)

    def engine(read: Any, captured: Any) -> Any:
        return _traced(_Constant(read), params, state, X, y, loss.tensors, captured, tensors)

    results: Any = None
    comptime(_trace)  # sets it
    if results is None:  # dynamo gave up tracing this function, so that it runs
        return _eagerly(evaluate, model_fn, params, X, y, loss, constants, tensors)
    return results


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(
    evaluate: Callable[..., Any],
    model_fn: Any,
    params: Any,
    X: Any,
    y: Any,
    loss: losses.Loss,
    constants: tuple[Any, ...],
    tensors: dict[str, Any],
) -> Any:
    return evaluate(model_fn, params, X, y, loss, (), *constants, **tensors)


class _Constant:
    """What crosses the boundary as it is: the context of a pytree node."""

    def __init__(self, value: Any) -> None:
        self.value = value


pytree.register_pytree_node(_Constant, lambda c: ([], c.value), lambda _, value: _Constant(value))


@torch._dynamo.nonstrict_trace
def _traced(
    read: _Constant,
    params: Any,
    state: dict[str, Tensor],
    X: Any,
    y: Any,
    loss_tensors: dict[str, Tensor],
    captured: Sequence[Tensor],
    tensors: dict[str, Any],
) -> Any:
    what: _Read = read.value()
    model_fn, loss_fn = what.model_fn, what.loss_fn
    given = {id(t): argument for ref, argument in zip(what.tensors, captured, strict=True) if (t := ref()) is not None}

    def model(p: Any, x: Any) -> Any:
        with _Arguments(given):
            out = model_fn.apply(p, state, x) if isinstance(model_fn, ModelFunction) else model_fn(p, x)
        return _replaced(out, given)

    def custom(*args: Any, **kwargs: Any) -> Any:
        with _Arguments(given):
            return loss_fn(*args, **kwargs)

    custom.__name__ = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    loss = losses.rebuild(what.loss_name, custom if what.loss_name is None else loss_fn, what.options, loss_tensors)
    try:
        with _no_constants():
            held = (*state.values(), *captured)
            return what.evaluate(model, params, X, y, loss, held, *what.constants, **tensors)
    except Exception as error:
        what.errors.append(error)
        raise


@contextmanager
def _no_constants() -> Iterator[None]:
    """Refuse tensors that operations meet although they are no arguments: the compiled code would keep them for ever."""
    before, fake_tensor_tls.allow_non_fake_inputs_override = fake_tensor_tls.allow_non_fake_inputs_override, False
    compiling, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True  # which torch 2.11 forgets here
    try:
        yield
    except AssertionError as error:
        if "convert all Tensors to FakeTensors" not in str(error):
            raise
        raise NotImplementedError(
            "the model or the loss uses a tensor that is none of its arguments where torch.compile cannot see it, in an "
            "autograd.Function for instance. Pass it in params or X, or register it as a buffer of the module. "
            f"({str(error).rpartition('Found in ')[2]})"
        ) from error
    finally:
        fake_tensor_tls.allow_non_fake_inputs_override, torch.compiler._is_compiling_flag = before, compiling


class _Arguments(TorchFunctionMode):
    """Puts arguments of the compiled code in place of the tensors that were read when it was traced."""

    def __init__(self, given: Mapping[int, Tensor]) -> None:
        super().__init__()
        self.given = given

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` with the arguments."""
        return func(*_replaced(args, self.given), **_replaced(kwargs or {}, self.given))


def _replaced(tree: Any, given: Mapping[int, Tensor]) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: given.get(id(t), t), tree) if given else tree


# -- what runs at compile time, with dynamo's view of the call


class _Read(NamedTuple):
    """The call as it is, but for its tensors."""

    evaluate: Callable[..., Any]
    model_fn: Any
    loss_name: str | None
    loss_fn: Any
    options: tuple[tuple[str, Any], ...]
    constants: tuple[Any, ...]
    tensors: list[TensorWeakRef]  # which model and loss read
    errors: list[Exception]  # of the engine, which dynamo would hide


def _refresh(context: ComptimeContext) -> None:
    """Have a model function find its tensors where submodules were replaced, and guard on that none will be."""
    variable: Any = _variable(context, "model_fn")
    noted = _object(context, "model_fn", variable).refresh()
    submodules = AttrSource(variable.source, "_submodules")
    for i, (_, key, _) in enumerate(noted):
        held = GetItemSource(GetItemSource(submodules, i), 0)
        install_guard(DictGetItemSource(held, key).make_guard(GuardBuilder.ID_MATCH))


def _trace(context: ComptimeContext) -> None:
    """Trace ``forward`` for its guards, then ``engine``, and set ``results`` in the frame that is traced."""
    tx = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    model_fn, loss_fn = (_object(context, name, _variable(context, name)) for name in ("model_fn", "loss_fn"))
    _check_unchanged(tx.output.side_effects, [model_fn, loss_fn])
    tensors = _captured(_guard(tx, _variable(context, "forward")))
    if isinstance(model_fn, ModelFunction):
        tensors = [(t, source) for t, source in tensors if not model_fn.holds(t)]
    evaluate, name, options, constants = (
        _constant(_variable(context, n)) for n in ("evaluate", "name", "options", "constants")
    )
    read = _Read(evaluate, model_fn, name, loss_fn, options, constants, [TensorWeakRef(t) for t, _ in tensors], [])
    arguments = TupleVariable([VariableTracker.build(tx, t, source) for t, source in tensors])
    constant: Any = lambda: read  # functions can be constants
    try:
        results = _variable(context, "engine").call_function(tx, [UserFunctionVariable(constant), arguments], {})
    except Unsupported:
        if not read.errors:
            raise
        _refuse(f"{type(read.errors[0]).__name__}: {read.errors[0]}")
    tx.symbolic_locals["results"] = results


def _guard(tx: Any, forward: VariableTracker) -> Any:
    """Trace ``forward`` into a graph of its own, which nothing comes of but guards; the tracer knows what it read."""
    output, draws = tx.output, len(tx.output.random_calls)
    before, output.side_effects = output.side_effects, output.side_effects.clone()
    output.side_effects.save_for_backward = [*before.save_for_backward]
    output.side_effects.tensor_hooks = {**before.tensor_hooks}
    try:
        with (
            output.subtracer("forward", None) as tracer,
            output.shape_env.ignore_fresh_unbacked_symbols(),
            # the engine meets the numbers themselves, and runs recurrent networks
            config.patch(specialize_int=True, specialize_float=True, allow_rnn=True),
        ):
            forward.call_function(tx, [], {})
    except Unsupported as error:
        if "side effect" not in str(error):
            raise
        _refuse(*SIDE_EFFECT, error)
    finally:
        after, output.side_effects = output.side_effects, before
    if len(output.random_calls) > draws:
        _refuse("The model draws from Python's random module, once when it is compiled.", "Draw with torch.rand.")
    stored = before.store_attr_mutations
    for item in after.keepalive:  # dynamo goes on to know what it met, and forgets what was made
        variable = after.id_to_variable[id(item)]
        if _existed(variable):
            if after.store_attr_mutations.get(variable) != stored.get(variable) and _differs(after, variable, item):
                _refuse(*SIDE_EFFECT)
            if id(item) not in before.id_to_variable:
                before.id_to_variable[id(item)] = variable
                before.keepalive.append(item)
    for guard in [*output.guards]:  # torch does not check these, for speed
        if guard.create_fn is GuardBuilder.EMPTY_NN_MODULE_HOOKS_DICT:
            install_guard(guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
    return tracer


def _captured(tracer: Any) -> list[tuple[Tensor, Source]]:
    """The tensors that were read, and where from; numbers that dynamo has made symbols of become constants again."""
    found = []
    for proxy in tracer.lifted_freevars:
        example, argument = proxy.node.meta["example_value"], _graph_argument(proxy)
        if isinstance(example, torch.SymFloat | torch.SymBool):
            guard_scalar(example)
        elif argument is None or isinstance(argument.source, TensorPropertySource):  # made in the graph, or a size
            continue
        elif isinstance(example, torch.SymInt):
            guard_scalar(example)
        elif isinstance(argument.source, NumpyTensorSource):
            _refuse(
                f"The model or the loss reads {argument.source.base.name}, an array or number of numpy, as a constant.",
                "Make it a tensor or a Python number.",
            )
        elif argument.example is not DIFFERENTIABLE:
            found.append((argument.example, argument.source))
    return found


def _refuse(explanation: str, remedy: str | None = None, cause: Unsupported | None = None) -> NoReturn:
    """End the graph before the call."""
    given: dict[str, Any] = {} if cause is None else {"from_exc": cause}
    hints = [] if remedy is None else [remedy]
    unimplemented(gb_type="curvfunc call that cannot be compiled", context="", explanation=explanation, hints=hints, **given)


def _constant(variable: Any) -> Any:
    """The Python value of a constant, also where dynamo has made a symbol of a number."""
    variable = variable.realize()
    if isinstance(variable, TupleVariable):
        return tuple(map(_constant, variable.items))
    return variable.evaluate_expr() if isinstance(variable, SymNodeVariable) else variable.as_python_constant()


def _existed(variable: VariableTracker) -> bool:
    """Whether it stands for an object that was there before dynamo traced."""
    return isinstance(variable.mutation_type, AttributeMutationExisting | ValueMutationExisting)


def _variable(context: ComptimeContext, name: str) -> VariableTracker:
    return context.get_local(name)._i_will_not_complain_if_bc_breaks_VariableTracker().realize()


def _object(context: ComptimeContext, name: str, variable: Any) -> Any:
    """The object itself that a variable of the traced frame stands for."""
    variable = variable.realize()
    try:
        return variable.as_python_constant()
    except NotImplementedError:
        pass
    output = context._i_will_not_complain_if_bc_breaks_InstructionTranslator().output
    whole = functools.partial(_object, context, name)
    if variable.source is not None:
        return variable.source.get_value({"G": output.root_tx.f_globals, "L": output.root_tx.f_locals}, {}, {})
    if isinstance(variable, UserMethodVariable):
        return types.MethodType(variable.fn, whole(variable.obj))
    if isinstance(variable, FunctoolsPartialVariable):
        fn, *args = map(whole, (variable.func, *variable.args))
        return functools.partial(fn, *args, **{key: whole(value) for key, value in variable.keywords.items()})
    if isinstance(variable, NestedUserFunctionVariable):
        closure: Any = variable.closure
        contents = [output.side_effects.load_cell(cell) for cell in closure.items] if closure else []
        if not any(value is variable for value in contents):  # no function that calls itself
            cells = tuple([types.CellType(whole(value)) for value in contents])
            defaults = variable.defaults.as_python_constant() if variable.defaults else None
            code, fn_name = variable.get_code(), variable.fn_name.as_python_constant()
            function = types.FunctionType(code, variable.f_globals, fn_name, defaults, cells)
            function.__kwdefaults__ = variable.kwdefaults.as_python_constant() if variable.kwdefaults else None
            return function
    return _refuse(
        f"{name} is made inside the compiled function, of values that are known only when it runs.",
        "Make it outside of the compiled function, and pass such values in params or X.",
    )


def _graph_argument(proxy: Any) -> Any:
    """What a tensor or number that the model read is as an argument of the whole graph; None if it is none."""
    tracer = proxy.tracer
    while tracer.parent is not None:
        outer = [o for o, inner in tracer.lifted_freevars.items() if inner is proxy]
        if not outer:
            return None
        proxy, tracer = outer[0], tracer.parent
    return proxy.node.meta.get("grapharg")


def _check_unchanged(side_effects: Any, functions: list[Any]) -> None:
    """What the compiled function has changed so far is seen by dynamo alone until the graph ends."""
    changed: set[Any] = set()
    for item in side_effects.keepalive:
        variable = side_effects.id_to_variable[id(item)]
        if _existed(variable) and not isinstance(variable, TensorVariable) and _differs(side_effects, variable, item):
            source: Any = variable.source
            changed.add(source.global_name if isinstance(variable, NewGlobalVariable) else id(item))
    for found in _reachable(functions) if changed else ():
        if (found if isinstance(found, str) else id(found)) in changed:
            what = f"The global {found!r}" if isinstance(found, str) else f"An object of type {type(found).__name__}"
            _refuse(
                f"{what}, which the model or the loss may read, was changed inside the compiled function before the call.",
                "Change it outside of the compiled function; model.train() and model.eval(), for instance.",
            )


def _differs(side_effects: Any, variable: Any, item: Any) -> bool:
    """Whether the changes to an object, if any, leave it other than it is."""
    if not side_effects.is_modified(variable):
        return False
    try:
        if isinstance(variable, ConstDictVariable) and isinstance(item, dict):
            now = {key.vt.as_python_constant(): value for key, value in variable.items.items()}
            return now.keys() != item.keys() or not all(_stands_for(value, item[key]) for key, value in now.items())
        stored = side_effects.store_attr_mutations.get(variable)
        if stored and hasattr(item, "__dict__"):
            return not all(name in vars(item) and _stands_for(v, vars(item)[name]) for name, v in stored.items())
    except NotImplementedError:
        pass
    return True


def _stands_for(variable: VariableTracker, value: Any) -> bool:
    variable = variable.realize()
    if isinstance(variable, TensorVariable):
        argument = _graph_argument(variable.proxy)
        return argument is not None and argument.example is value
    return type(value) in (bool, int, float, str, type(None)) and variable.as_python_constant() == value


def _reachable(roots: list[Any]) -> Iterator[Any]:
    """What functions and objects hold and refer to: the objects, and the names of globals."""
    todo, seen = [*roots], set()
    while todo:
        found = todo.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        if isinstance(found, types.FunctionType | type) and (found.__module__ or "").partition(".")[0] in ("torch", "builtins"):
            continue
        if isinstance(found, types.FunctionType):
            names = {name for code in _codes(found.__code__) for name in code.co_names}
            yield from names
            values = [found.__globals__[name] for name in names if name in found.__globals__]
            modules = [value for value in values if isinstance(value, types.ModuleType)]
            values += [vars(module)[name] for module in modules for name in names if name in vars(module)]
            todo += [*values, sys.modules.get(found.__module__), found.__defaults__, found.__kwdefaults__, found.__closure__]
        elif isinstance(found, type):
            todo += [*vars(found).values(), *found.__bases__]
        elif not isinstance(found, Tensor | types.ModuleType | types.BuiltinFunctionType):
            todo += gc.get_referents(found)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)
