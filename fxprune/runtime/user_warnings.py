"""Issues warnings that point at the line of the caller, not at a line of fxprune."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

from fxprune.errors import FxpruneWarning

_PACKAGE = str(Path(__file__).resolve().parents[1])


def warn_user(message: str) -> None:
    """Issue an `FxpruneWarning` for the nearest line of code outside the package.

    Python 3.12 has ``skip_file_prefixes`` for this; 3.11 does not.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FxpruneWarning, stacklevel=level)
