"""Opens a model: builds it by its name on the command line, loads its weights, and applies its pruning."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
import torchvision
from torch import Tensor, nn

from fxprune.adapters.registry import unwrap
from fxprune.cli.options import ModelOptions
from fxprune.demo.bundled import CLASS_NAMES, load_detector
from fxprune.deploy.save_load import load
from fxprune.errors import ModelError, SettingError, StorageError
from fxprune.graph.fx_utils import is_within
from fxprune.runtime.json_text import first_few


def open_model(options: ModelOptions, device: str) -> nn.Module:
    """Build the model that the options name, in eval mode on the device.

    Weights are loaded, and a pruning is applied, if the options name them.

    Raises
    ------
    ModelError
        If the model cannot be built or loaded; the message says why.
    StorageError
        If the weights or the pruned folder do not fit the model.
    SettingError
        If an option cannot be used with the model.
    """
    torch_device = _device(device)
    torch.manual_seed(0)
    kind = options.model.partition(":")[0]
    model = BUILDERS.get(kind, _call_builder)(options)
    if options.weights is not None and not _is_name(options):
        fill_weights(unwrap(model), Path(options.weights))
    unwrap(model).eval()
    if options.pruned is not None:
        model = load(model, options.pruned)
    unwrap(model).to(torch_device)
    return model


def _device(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise SettingError(f"device {name!r} cannot be used here ({reason}); cpu always works") from error


def _is_name(options: ModelOptions) -> bool:
    """Return whether --weights is the name of torchvision weights, not of a file."""
    is_torchvision = options.model.startswith("torchvision:")
    return is_torchvision and not Path(str(options.weights)).suffix and not Path(str(options.weights)).exists()


# Builders ------------------------------------------------------------------------------------------------------------


def _bundled(options: ModelOptions) -> nn.Module:
    if options.classes not in (None, len(CLASS_NAMES)):
        raise SettingError(f"the bundled detector has {len(CLASS_NAMES)} classes; omit --classes")
    model: nn.Module = load_detector()
    cast(Any, model).names = list(CLASS_NAMES)
    return model


def _torchvision(options: ModelOptions) -> nn.Module:
    name = options.model.partition(":")[2]
    if name not in torchvision.models.list_models():
        raise ModelError(f"torchvision has no model {name!r}{_suggest(name, torchvision.models.list_models())}")
    arguments: dict[str, Any] = {} if options.classes is None else {"num_classes": options.classes}
    weights = _pretrained(name, str(options.weights)) if options.weights and _is_name(options) else None
    if "weights_backbone" in inspect.signature(torchvision.models.get_model_builder(name)).parameters:
        arguments["weights_backbone"] = None
    try:
        model = cast(nn.Module, torchvision.models.get_model(name, weights=weights, **arguments))
    except OSError as error:
        raise ModelError(
            f"the weights {weights} of {name} cannot be downloaded ({error}): no connection? Use a file: --weights FILE"
        ) from error
    except ValueError as error:
        raise SettingError(f"{name} cannot be built: {error}; see --classes and --weights") from error
    if weights is not None:
        cast(Any, model).names = list(weights.meta["categories"])
    return model


def _pretrained(name: str, weights: str) -> Any:
    known = torchvision.models.get_model_weights(name)
    if weights not in known.__members__:
        names = ", ".join(known.__members__)
        raise SettingError(f"{name} has no weights {weights!r}: there is no such file, and torchvision knows {names}")
    return known[weights]


def _ultralytics(options: ModelOptions) -> nn.Module:
    if importlib.util.find_spec("ultralytics") is None:
        raise ModelError('ultralytics is not installed; pip install "fxprune[ultralytics]"')
    os.environ.setdefault("YOLO_VERBOSE", "false")
    from ultralytics import YOLO

    name = options.model.partition(":")[2]
    if not name.endswith((".pt", ".yaml", ".yml")):
        raise ModelError(f"ultralytics:{name} is not the name of a .pt or .yaml file")
    try:
        model = YOLO(name)
    except Exception as error:  # ultralytics raises many types for a missing or unknown file
        reason = " ".join(str(error).replace("❌", "").split())
        raise ModelError(f"ultralytics cannot load {name} ({type(error).__name__}: {reason})") from error
    if options.classes is not None:
        if name.endswith(".pt"):
            raise SettingError(f"{name} has its own classes; --classes needs a .yaml")
        old: Any = unwrap(model)
        new = type(old)(old.yaml, nc=options.classes, verbose=False)
        new.args, new.task, model.model = old.args, old.task, new
    return cast(nn.Module, model)


def _call_builder(options: ModelOptions) -> nn.Module:
    """Call the user's own function; modules in the current directory can be imported."""
    module_name, _, function_name = options.model.partition(":")
    if not function_name:
        known = torchvision.models.list_models()
        hint = f"did you mean torchvision:{options.model}" if options.model in known else "see --help"
        raise ModelError(
            f"model {options.model!r} is not bundled, torchvision:NAME, ultralytics:FILE or module:function; {hint}"
        )
    if options.classes is not None:
        raise SettingError(f"--classes cannot be used with {options.model}; set the number of classes in the function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    function = getattr(_import(module_name), function_name, None)
    if function is None:
        raise ModelError(f"module {module_name} has no {function_name!r}")
    try:
        model = function if isinstance(function, nn.Module) else function()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{options.model} failed: {_failure(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{options.model} returned {type(model).__name__}; it must return a torch.nn.Module")
    return model


BUILDERS: dict[str, Callable[[ModelOptions], nn.Module]] = {
    "bundled": _bundled,
    "torchvision": _torchvision,
    "ultralytics": _ultralytics,
}
"""Builders by the text before the colon; any other text is the name of a module of the user."""


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and is_within(name, error.name):
            raise ModelError(f"there is no module {error.name!r}, neither installed nor in {os.getcwd()}") from error
        raise ModelError(f"importing {name} failed: {_failure(error)}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"importing {name} failed: {_failure(error)}") from error


def _failure(error: BaseException) -> str:
    """Describe an error in the user's code, with its place."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})"
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({last.filename}, line {last.lineno})"


def _suggest(name: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


# Weights -------------------------------------------------------------------------------------------------------------


def fill_weights(network: nn.Module, path: Path) -> None:
    """Load the weights of a file into a network; the keys must be the same.

    Parameters
    ----------
    network : Module
        The network; its weights are replaced.
    path : Path
        A safetensors file, or a file of ``torch.save(model.state_dict(), path)``. No code in it is run.

    Raises
    ------
    StorageError
        If the file has another format, or if keys or shapes differ; the message names them.
    """
    values, state = _read(path), network.state_dict()
    lines = [f"{key!r} is missing in the file" for key in state if key not in values]
    lines += [f"{key!r} is not in the model" for key in values if key not in state]
    for key, value in values.items():
        if key in state and state[key].shape != value.shape:
            lines.append(f"{key!r} is {tuple(value.shape)} in the file and {tuple(state[key].shape)} in the model")
    if lines:
        raise StorageError(f"{path} does not fit {type(network).__name__}: {first_few(lines)}; see --classes")
    network.load_state_dict(values)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load(path.read_bytes())
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise StorageError(
            f"{path} holds no plain weights ({type(error).__name__}); use a .safetensors file, or a file of"
            " torch.save(model.state_dict(), file); pickled models are not opened"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise StorageError(f"{path} holds a {type(content).__name__}, not a state_dict of tensors")
    return dict(content)
