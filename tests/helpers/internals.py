"""The message of tests of torch's private interface."""

import torch


def changed(entry: str, behaviour: str) -> str:
    """Say that torch changed, and which entry of `fxprune.runtime.torch_internals` to adapt."""
    return f"torch {torch.__version__} does not do what torch_internals.{entry} relies on: {behaviour}"
