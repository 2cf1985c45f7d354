"""Everything that fxprune uses of torch's private interface.

No other module uses private names of torch. So a change in torch needs a change in this module only. Every entry says
why it is needed, and `tests/runtime/test_torch_internals.py` has a test for it.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "ASSERTION",
    "COMPILED_CALL",
    "MADE_TENSOR",
    "BatchNormBase",
    "CompiledFrame",
    "FakeTensor",
    "FakeTensorMode",
    "ModuleCall",
    "OptimizedModule",
    "calling_module",
    "compiled_call_count",
    "compiled_frame",
    "convolution_padding",
    "current_size",
    "example_value",
    "guard_identity",
    "has_backward_hooks",
    "has_forward_hooks",
    "inner_compiler",
    "is_weight_input",
    "keep_when_copied",
    "layer_methods",
    "make_symbolic_tensor",
    "module_calls",
    "new_size_symbol",
    "owns_tensors",
    "provably_equal",
    "saved_tensor_hooks",
    "shapes_only",
    "size_formula",
    "symbolic_mode",
    "traced_calls",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "write_count",
]

# Nested containers ---------------------------------------------------------------------------------------------------

# tree_flatten, tree_leaves, tree_map_only, tree_unflatten: models return nested containers, some of classes that were
# registered with torch. Torch has no public form of these functions.

# Modules and graphs --------------------------------------------------------------------------------------------------

# BatchNormBase: base class of all batch norms. Public are only its subclasses.

ASSERTION: Callable[..., Any] = torch._assert
"""Function that traced programs call for an assertion. Torch has no public name for it."""

COMPILED_CALL = "_compiled_call_impl"
"""Attribute in which `module.compile()` keeps the compiled call. Needed because a copy must not have it."""

MADE_TENSOR = "_tensor_constant"
"""How the names begin that `torch.fx` gives to tensors that a program makes. Needed to find these tensors."""

_KEPT = "_user_preserved_attributes"


def keep_when_copied(gm: fx.GraphModule, attributes: Mapping[str, Any]) -> None:
    """Make `copy.deepcopy` of a graph module keep these attributes. Needed because it drops attributes of users."""
    gm.meta[_KEPT] = {**gm.meta.get(_KEPT, {}), **attributes}


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether a module has forward hooks or forward pre-hooks. Needed because torch has no function to list hooks."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a module has backward hooks or backward pre-hooks. Needed because torch has no function to list hooks."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def owns_tensors(module: nn.Module) -> bool:
    """Whether a module itself has entries for parameters or buffers. Needed because torch does not list empty ones."""
    return bool(module._parameters or module._buffers)


def write_count(tensor: torch.Tensor) -> int:
    """Return how often a tensor or a view of it was overwritten. Needed because no public function tells.

    Torch does not count for tensors of inference mode; of these, the result is 0.
    """
    return 0 if tensor.is_inference() else tensor._version


def convolution_padding(layer: nn.Module) -> list[int]:
    """Return a convolution's padding for `torch.nn.functional.pad`. Needed because `layer.padding` may be "same"."""
    padding: Any = layer._reversed_padding_repeated_twice
    return list(padding)


def layer_methods(layer: nn.Module) -> list[Callable[..., Any]]:
    """Return the methods that compute a layer's output. Needed because subclasses may override the second one.

    These are `forward` and, of a `Conv2d`, the method that `forward` calls.
    """
    names = ("forward", "_conv_forward") if isinstance(layer, nn.Conv2d) else ("forward",)
    return [getattr(layer, name) for name in names]


def saved_tensor_hooks() -> Any:
    """Return the hooks that pack tensors for the backward pass now, or None. Needed because torch has only setters."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def traced_calls(node: fx.Node) -> list[tuple[str, str]]:
    """Return key and path of the module calls in which `torch.fx` traced a node, outermost first.

    Needed because a graph has no other record of the modules that were traced into. Each call has its own key.
    """
    return [(str(key), str(path)) for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items()]


# Symbolic shapes -----------------------------------------------------------------------------------------------------

# FakeTensor, FakeTensorMode: a fake tensor has a shape and a dtype and no data; its sizes may be symbols. Of public
# interfaces only torch.export makes them, and it fails where a model cannot be exported as a whole.


def symbolic_mode() -> FakeTensorMode:
    """Return a mode that makes fake tensors. Needed because no public function creates one.

    Sizes that happen to be equal get different symbols. Operations may mix fake and real tensors.
    """
    return FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)


@contextmanager
def shapes_only(mode: FakeTensorMode) -> Iterator[None]:
    """Compute shapes and no values until the end of the block. Needed for operations with shape rules in Python."""
    with mode, enable_python_dispatcher(), torch.no_grad():
        yield


def make_symbolic_tensor(mode: FakeTensorMode, real: torch.Tensor, dynamic: Sequence[bool]) -> torch.Tensor:
    """Return a fake copy of a tensor whose `dynamic` sizes are symbols. Needed because torch's default fixes sizes."""
    sizes = [DimDynamic.DYNAMIC if is_dynamic else DimDynamic.STATIC for is_dynamic in dynamic]
    context: Any = StatelessSymbolicContext(dynamic_sizes=sizes, dynamic_strides=[DimDynamic.INFER_STRIDE] * real.ndim)
    return mode.from_tensor(real, symbolic_context=context)


def current_size(size: Any) -> int:
    """Return the number that a symbolic size stands for. Needed because `int(size)` would fix the symbol."""
    return size if isinstance(size, int) else int(size.node.hint)


def size_formula(size: Any) -> Any:
    """Return the sympy formula of a symbolic size. Needed to measure how long it is."""
    return size.node.expr


def new_size_symbol(mode: FakeTensorMode, value: int, name: str) -> Any:
    """Return a new symbolic size that stands for `value`. Needed to replace long formulas by short ones."""
    shape_env, source = mode.shape_env, ConstantSource(name)
    assert shape_env is not None
    symbol = shape_env.create_symbol(value, source, dynamic_dim=DimDynamic.DYNAMIC)
    return shape_env.create_symintnode(symbol, hint=value, source=source)


def provably_equal(first: Any, second: Any) -> bool:
    """Whether two sizes are equal for all values of their symbols. Needed because `==` would add an assumption."""
    return first is second or bool(statically_known_true(first == second))


# Dynamo --------------------------------------------------------------------------------------------------------------

# OptimizedModule: the class of the modules that torch.compile returns; no public module has it.
# The other names are imported where they are used: if torch moves one, only the backend fails.


def inner_compiler(inner: str | Callable[..., Any], options: Mapping[str, Any], mode: str | None) -> Callable[..., Any]:
    """Return the function ``(gm, example_inputs)`` of a backend with its options and mode.

    Needed because `torch.compile` takes modules and functions, and a backend has a graph.
    """
    from torch._dynamo.backends.registry import lookup_backend

    compile_: Callable[..., Any] = lookup_backend(inner) if isinstance(inner, str) else inner
    settings: dict[str, Any] = {"mode": mode} if mode else {}
    if inner == "inductor":
        from torch._inductor import list_mode_options

        settings = {"config_patches": {**(list_mode_options(mode) if mode else {}), **options}}
    elif options:
        settings["options"] = dict(options)
    return lambda gm, inputs: compile_(gm, inputs, **settings)


def calling_module() -> nn.Module | None:
    """Return the module whose compiled call is running, or None.

    Needed for the backend in its string form: torch passes it a graph and the options, and no reference to the module.
    Dynamo's guards and sources start at the frame that is compiled. After a graph break this frame may belong to a
    submodule, which has no reference to the whole model. So this function searches the frames of the callers.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        own = frame.f_locals.get("self")
        if isinstance(own, OptimizedModule):
            return own._orig_mod
        if isinstance(own, nn.Module) and own._compiled_call_impl is not None:  # set by `module.compile()`
            return own
        frame = frame.f_back
    return None


def compiled_call_count() -> int:
    """Return the number of calls of compiled modules and functions so far in this process.

    Needed to distinguish two calls of a model: in one call, a graph may run several times.
    """
    from torch._dynamo.mutation_guard import GenerationTracker

    return GenerationTracker.generation


@dataclass(frozen=True)
class CompiledFrame:
    """The Python frame that Dynamo is compiling.

    Attributes
    ----------
    module : Module or None
        The module whose method it is; None if it is a function.
    variables : mapping of str to object
        Its arguments and local variables.
    """

    module: nn.Module | None
    variables: Mapping[str, Any]


_RESUME_FUNCTION = re.compile(r"^torch_dynamo_resume_in_(.*)_at_\d+$")


def compiled_frame() -> CompiledFrame | None:
    """Return the frame that Dynamo is compiling, or None.

    Needed because operations outside of module calls carry no module in Dynamo's graphs: the module is the frame's.
    """
    from torch._dynamo.symbolic_convert import tls

    translator = getattr(tls, "current_tx", None)
    if translator is None:
        return None
    root = translator.output.root_tx
    name = root.f_code.co_name
    resumed = _RESUME_FUNCTION.match(name)
    return CompiledFrame(_module_of_method(resumed[1] if resumed else name, root.f_locals), root.f_locals)


def _module_of_method(function: str, variables: Mapping[str, Any]) -> nn.Module | None:
    bound = variables.get("fn")
    if function == "inner" and inspect.ismethod(bound):  # Dynamo's own wrapper around a method of a torch.nn module
        return bound.__self__ if isinstance(bound.__self__, nn.Module) else None
    for name, value in variables.items():
        if isinstance(value, nn.Module):
            method: Any = getattr(type(value), function, None)
            code = getattr(inspect.unwrap(method), "__code__", None) if callable(method) else None
            if code is not None and code.co_varnames[:1] == (name,):
                return value
    return None


def guard_identity(names: Iterable[str]) -> None:
    """Run the code that Dynamo is compiling only as long as these variables of the frame are the same objects.

    Needed because Dynamo runs one code for several modules of equal structure, and a plan removes a region of one.
    """
    from torch._dynamo.guards import GuardBuilder
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None:
        guards = context.guards_context.dynamo_guards
        sources = {guard.name: guard.originating_source for guard in guards}
        for name in names:
            source = sources.get(f"L['{name}']")
            if source is not None:  # Dynamo guards every variable that the graph depends on
                guards.add(source.make_guard(GuardBuilder.ID_MATCH))


_ROOT = re.compile(r"^[LG]\['(\w+)'\](?:\.__self__)?\.?")
_CALL_NUMBER = re.compile(r"@\d+$")


@dataclass(frozen=True)
class ModuleCall:
    """A module call that contains a node of one of Dynamo's graphs.

    Attributes
    ----------
    key : str
        Identifies the call: all nodes of the call have it, and no other node.
    module_id : int or None
        `id` of the called module.
    variable : str
        Variable of the compiled frame through which the program reaches the module.
    path : str
        Dotted path from this variable to the module; "" if the variable is the module.
    """

    key: str
    module_id: int | None
    variable: str
    path: str


def module_calls(node: fx.Node) -> list[ModuleCall]:
    """Return the module calls that contain a node, outermost first. Needed because Dynamo's graphs have no modules."""
    calls = []
    for key, (spelled, _) in (node.meta.get("nn_module_stack") or {}).items():
        root, identity = _ROOT.match(spelled), _CALL_NUMBER.sub("", str(key))
        path = spelled[root.end() :] if root else spelled
        calls.append(ModuleCall(str(key), int(identity) if identity.isdigit() else None, root[1] if root else "", path))
    return calls


def example_value(node: fx.Node) -> Any:
    """Return the fake value of a node of one of Dynamo's graphs, or None. Needed for its shape and dtype."""
    return node.meta.get("example_value")


_WEIGHT = re.compile(r"_(parameters|buffers)_")


def is_weight_input(node: fx.Node) -> bool:
    """Whether a placeholder is a parameter or a buffer. Needed because Dynamo makes these inputs of the graph."""
    return node.op == "placeholder" and _WEIGHT.search(str(node.target)) is not None
