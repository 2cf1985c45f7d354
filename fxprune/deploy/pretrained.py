"""Defines `from_pretrained`, which loads a pruned model of Hugging Face transformers from a folder."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import PlanError, SettingError, StorageError
from fxprune.planning.plan import Plan
from fxprune.planning.pretrained_config import PLANS_KEY, WEIGHTS_KEY, read_plans
from fxprune.rewriting.apply import apply
from fxprune.rewriting.history import attach_history, structural_changes
from fxprune.runtime.json_text import first_few

_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
_HUB_FILES = ["*.json", "*.safetensors", "*.py"]
_OF_THE_MODEL = ("dtype", "torch_dtype", "quantization_config")
"""Arguments that are not for the configuration, although it has attributes of these names."""


def from_pretrained(cls: Any, folder: str | PathLike[str], **kwargs: Any) -> Any:
    """Load a pruned model of Hugging Face transformers that its `save_pretrained` wrote.

    transformers builds the model and loads the weights; in between the plans of the folder are applied. A folder of
    a `Trainer` checkpoint works as well. The `from_pretrained` of the class itself refuses such a folder.

    Parameters
    ----------
    cls : type
        The class of the model, or an Auto class such as `AutoModelForObjectDetection`.
    folder : path or str
        The folder, or the name of a repository on the hub.
    **kwargs
        Arguments of the class's own `from_pretrained`, such as `dtype`.

    Returns
    -------
    Module
        The pruned model in eval mode. With ``output_loading_info=True`` a tuple of it and the loading info, as from the
        class's own method.

    Raises
    ------
    StorageError
        If the folder has no plan, or its weights do not fit the pruned model. The message names the weights.
    PlanError
        If a plan is invalid, or the class builds a model of another structure.
    SettingError
        If `cls` is no class of transformers, or transformers is not installed.

    Examples
    --------
    >>> pruned.save_pretrained("pruned")                                                   # doctest: +SKIP
    >>> again = fxprune.from_pretrained(AutoModelForObjectDetection, "pruned")             # doctest: +SKIP
    """
    reader = _config_reader(cls)
    place = _find_folder(folder, kwargs)
    own = {name: kwargs.pop(name) for name in _OF_THE_MODEL if name in kwargs}
    with_info, trust = kwargs.pop("output_loading_info", False), kwargs.get("trust_remote_code")
    config, rest = _read_config(reader, place, kwargs)
    builder = _Builder(_model_class(cls, config, trust), read_plans(vars(config), place), place)
    for key in {PLANS_KEY, WEIGHTS_KEY} & set(vars(config)):
        delattr(config, key)
    model, info = builder.loader().from_pretrained(place, config=config, output_loading_info=True, **own, **rest)
    _refuse_misfit(info, place)
    builder.finish(model)
    return (model, info) if with_info else model


class _Builder:
    """Builds a model as its class does, and applies plans to it."""

    def __init__(self, kind: type[nn.Module], plans: Sequence[Plan], place: Path) -> None:
        self.kind, self.plans, self.place = kind, plans, place
        self.buffers: dict[str, Tensor] = {}

    def loader(self) -> Any:
        """Return a subclass of which a call gives the pruned model, an instance of the class itself.

        Its `from_pretrained` calls it to build the model, and loads the weights into what it gets.
        """
        body = {"__new__": lambda _, *args, **kwargs: self._build(*args, **kwargs), "__module__": self.kind.__module__}
        return type(self.kind.__name__, (self.kind,), body)

    def _build(self, *args: Any, **kwargs: Any) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model = self.kind(*args, **kwargs)
            for plan in self.plans:
                try:
                    model = apply(model, plan)
                except PlanError as error:
                    raise PlanError(
                        f"{self.place}: {error}. Give the class that was saved, and no arguments that change its layers"
                    ) from error
        self.buffers = {name: value.clone() for name, value in _unsaved_buffers(model)}
        _forget_removed_ties(model)
        return model

    def finish(self, model: nn.Module) -> None:
        """Restore the history, and the buffers that no file has: the loader computes them by the class of a module."""
        with torch.no_grad():
            for name, value in _unsaved_buffers(model):
                value.copy_(self.buffers[name])
        attach_history(model, [plan.to_dict() for plan in self.plans], structural_changes(model))


def _forget_removed_ties(model: Any) -> None:
    """Leave removed weights out of what the loader ties: it ties each weight of a group to the first one."""
    groups: dict[str, list[str]] = {}
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        groups.setdefault(source, [source]).append(name)
    there = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    left = [[name for name in group if name in there] for group in groups.values()]
    model.all_tied_weights_keys = {name: group[0] for group in left for name in group[1:]}


def _unsaved_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict()
    yield from ((name, value) for name, value in model.named_buffers() if name not in saved)


def _find_folder(folder: str | PathLike[str], kwargs: dict[str, Any]) -> Path:
    """Return a local folder with the files; the arguments that say where they are on the hub are taken out."""
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    subfolder = kwargs.pop("subfolder", "")
    if not os.path.isdir(folder):
        import huggingface_hub

        try:
            folder = huggingface_hub.snapshot_download(str(folder), allow_patterns=_HUB_FILES, **hub)
        except Exception as error:  # of the network, of the name, of permissions
            raise StorageError(
                f"{folder} is no folder, and no repository that could be downloaded ({error}); give the folder that"
                " save_pretrained of the pruned model wrote"
            ) from error
    return Path(folder, subfolder)


def _read_config(reader: Any, place: Path, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the configuration and the arguments that are not for it."""
    config = kwargs.pop("config", None) or place
    if not isinstance(config, (str, PathLike)):
        return copy.deepcopy(config), kwargs
    config, rest = reader.from_pretrained(config, return_unused_kwargs=True, **kwargs)
    return config, rest


def _config_reader(cls: Any) -> Any:
    """Return the class that reads the configuration for a model class or an Auto class."""
    try:
        import transformers
    except ImportError as error:
        raise SettingError("from_pretrained needs transformers: pip install transformers") from error
    if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
        return getattr(cls, "config_class", None) or transformers.AutoConfig
    if isinstance(cls, type) and not issubclass(cls, nn.Module) and hasattr(cls, "from_config"):
        return transformers.AutoConfig
    raise SettingError(
        f"cls is {getattr(cls, '__name__', cls)!r}; give a model class of transformers, or an Auto class such as"
        " AutoModelForObjectDetection. Other models: fxprune.save and fxprune.load"
    )


def _model_class(cls: Any, config: Any, trust: bool | None) -> type[nn.Module]:
    """Return a model class, or the one that an Auto class chooses for a configuration."""
    kind: type[nn.Module] = cls
    if not issubclass(cls, nn.Module):
        with torch.random.fork_rng(devices=[]):
            kind = type(cls.from_config(config, trust_remote_code=trust))
    return kind


def _refuse_misfit(info: Mapping[str, Iterable[Any]], place: Path) -> None:
    """Raise `StorageError` if the loader did not find a weight, found one too many, or one of another shape."""
    lines = [f"{key!r} is missing in the files" for key in sorted(info["missing_keys"])]
    lines += [f"{key!r} is not in the model" for key in sorted(info["unexpected_keys"])]
    lines += [f"{key!r} has another shape" for key in sorted(key for key, *_ in info["mismatched_keys"])]
    if lines:
        raise StorageError(
            f"{place}: the weights do not fit the pruned model: {first_few(lines)}. Save the model again with its"
            " save_pretrained"
        )
