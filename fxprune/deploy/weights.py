"""Converts the weights of a network to safetensors and back, with all bits equal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fxprune.deploy.manifest import NAME, Manifest
from fxprune.errors import StorageError
from fxprune.runtime.json_text import first_few

LOAD_HINT = "load takes the model as it was built before pruning, with as many classes"
_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class WeightState:
    """The `state_dict` of a network in the form that a safetensors file can contain.

    Attributes
    ----------
    values : dict of str to Tensor
        Contiguous copies on the CPU. A tensor that several keys share is here once, under the first key.
    tied : dict of str to str
        For each other key of a shared tensor: its first key.
    channels_last : tuple of str
        Keys of the tensors with memory format channels last in the network.
    """

    values: dict[str, Tensor]
    tied: dict[str, str]
    channels_last: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file with the values."""
        try:
            return safetensors.torch.save(self.values, {"format": "pt"})
        except (KeyError, ValueError, safetensors.SafetensorError) as error:
            raise StorageError(f"safetensors cannot hold the weights ({error!r}); give them a plain dtype") from error


def collect_state(network: nn.Module) -> WeightState:
    """Copy the `state_dict` of a network.

    Raises
    ------
    StorageError
        If an entry is neither a parameter nor a buffer, such as a module's extra state. The message names it.

    Examples
    --------
    >>> collect_state(nn.Linear(2, 1)).values.keys()
    dict_keys(['weight', 'bias'])
    """
    state = network.state_dict(keep_vars=True)
    owned = {id(value) for value in (*network.parameters(), *network.buffers())}
    values: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Any, str] = {}
    last = []
    for key, value in state.items():
        if id(value) not in owned or value.layout != torch.strided or value.is_quantized:
            raise StorageError(
                f"{key!r} of the state_dict is no plain parameter or buffer but a {type(value).__name__};"
                " a save holds nothing else"
            )
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        first = seen.setdefault(place, key) if value.numel() else key
        if first != key:
            tied[key] = first
            continue
        values[key] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        if value.dim() in _FORMATS and value.stride() == _strides(value, _FORMATS[value.dim()]) != _strides(value):
            last.append(key)
    return WeightState(values, tied, tuple(last))


def _strides(value: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> tuple[int, ...]:
    return torch.empty(value.shape, device="meta", memory_format=memory_format).stride()


def read_weights(path: Path, content: bytes, manifest: Manifest) -> dict[str, Tensor]:
    """Read the weights of a saved model.

    Parameters
    ----------
    path : Path
        The file, for error messages.
    content : bytes
        Its content.
    manifest : Manifest
        The manifest of the folder.

    Returns
    -------
    dict of str to Tensor
        Value by key of the `state_dict`, on the CPU, with the memory format that it had in the saved network.

    Raises
    ------
    StorageError
        If the content is not in safetensors format, or a key that the manifest names is missing.
    """
    try:
        stored = safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise StorageError(f"{path}: not a safetensors file ({error}); copy the folder again, or save again") from error
    named = {*manifest.tied.values(), *manifest.channels_last}
    if lost := sorted(named - set(stored)):
        raise StorageError(f"{path}: lacks {first_few(lost)}, which {NAME} names; save the model again")
    for key in manifest.channels_last:
        memory_format = _FORMATS.get(stored[key].dim(), torch.contiguous_format)
        stored[key] = torch.empty_like(stored[key], memory_format=memory_format).copy_(stored[key])
    return stored | {key: stored[first] for key, first in manifest.tied.items()}


def load_state(network: nn.Module, values: Mapping[str, Tensor], manifest: Manifest, path: Path) -> None:
    """Set dtype and weights of a network to those of a saved model.

    The parameters stay the same objects. So `requires_grad` and shared tensors stay as they are in the network.

    Parameters
    ----------
    network : Module
        The pruned network. It is changed.
    values : mapping of str to Tensor
        Value by key of the `state_dict`.
    manifest : Manifest
        The manifest of the folder.
    path : Path
        The file of the weights, for error messages.

    Raises
    ------
    StorageError
        If keys or shapes differ, or the network shares one tensor between keys with different values. The message
        names the keys.
    """
    dtypes = [getattr(torch, name, None) for name in manifest.dtype]
    if len(dtypes) == 1 and isinstance(dtypes[0], torch.dtype):
        network.to(dtypes[0])
    state = network.state_dict(keep_vars=True)
    _refuse_misfit(state, values, f"{path} does not fit the pruned model", manifest)
    for key, target in state.items():
        value = values[key]
        if (target.dtype, target.stride()) == (value.dtype, value.stride()):
            target.data.copy_(value)
        else:
            target.data = value.to(target.device, copy=True)
    wrong = [key for key, value in network.state_dict().items() if not _equal_bits(value, values[key])]
    if wrong:
        raise StorageError(
            f"{path}: {first_few(wrong)} should have a value of its own but shares memory with another weight in this"
            f" model, which it did not in the saved one; {LOAD_HINT}"
        )


def _refuse_misfit(state: Mapping[str, Any], values: Mapping[str, Tensor], what: str, manifest: Manifest) -> None:
    lines = [f"{key!r} is missing in the file" for key in state if key not in values]
    lines += [f"{key!r} is not in the model" for key in sorted(values) if key not in state]
    for key in state:
        if key in values and _describe_value(state[key]) != _describe_value(values[key]):
            lines.append(
                f"{key!r} is {_describe_value(values[key])} in the file and {_describe_value(state[key])} in the model"
            )
    if lines:
        raise StorageError(
            f"{what}: {first_few(lines)}. It was saved from a {manifest.network}; {LOAD_HINT}. A model that was fused"
            " (convolution and norm in one) or otherwise changed after pruning must be saved before that"
        )


def _describe_value(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    kind = "complex" if value.is_complex() else "floating" if value.is_floating_point() else str(value.dtype)
    return f"{tuple(value.shape)} {kind}"


def _equal_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same dtype and equal bits. NaN equals NaN."""
    pair = [value.detach().cpu().reshape(-1).contiguous().view(torch.uint8) for value in (first, second)]
    return first.dtype == second.dtype and torch.equal(*pair)
