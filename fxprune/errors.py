"""Defines every error and warning that fxprune raises, in one tree.

::

    FxpruneError
    |-- BudgetError        the budget is no fraction, or more than the regions can save      (also ValueError)
    |-- BatchError         a calibration batch has an unusable form, label or value          (also ValueError)
    |-- DatasetError       images or annotations are missing, broken or contradictory        (also ValueError)
    |-- LossError          the loss is not a finite scalar that depends on the model         (also ValueError)
    |-- ModelError         the model cannot be analyzed in its present form                  (also TypeError)
    |   `-- NoRegionError  nothing in the model can be removed; the message lists the reasons
    |-- PlanError          a plan file is broken, or was made for another graph              (also ValueError)
    |-- SettingError       an option has an unknown value                                    (also ValueError)
    `-- StorageError       a save cannot be written, is missing or damaged, or does not fit  (also ValueError)

    FxpruneWarning         something set on the model is lost, or data was left out          (a UserWarning)
"""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

_PACKAGE_FOLDER = str(Path(__file__).resolve().parent)


class FxpruneError(Exception):
    """Base class of all errors that fxprune raises on purpose."""


class BudgetError(FxpruneError, ValueError):
    """The budget is not in (0, 1), or is more than the regions can save."""


class BatchError(FxpruneError, ValueError):
    """A calibration batch has an unusable form, label or value."""


class DatasetError(FxpruneError, ValueError):
    """Images or annotations on disk are missing, broken, or contradict each other."""


class LossError(FxpruneError, ValueError):
    """The loss of a batch is not a finite scalar that depends on the model."""


class ModelError(FxpruneError, TypeError):
    """The model cannot be analyzed in its present form."""


class NoRegionError(ModelError):
    """Nothing in the model can be removed; the message lists the reasons."""


class PlanError(FxpruneError, ValueError):
    """A plan file is broken, or the plan was made for another graph."""


class SettingError(FxpruneError, ValueError):
    """An option has an unknown value; the message lists the known values."""


class StorageError(FxpruneError, ValueError):
    """A save cannot be written to its folder, is missing or damaged, or does not fit the model."""


class FxpruneWarning(UserWarning):
    """Something that the caller set on the model is lost in the rewrite, or some of the data was left out."""


def warn_user(message: str) -> None:
    """Issue an `FxpruneWarning` for the nearest line of code outside the package.

    Python 3.12 has ``skip_file_prefixes`` for this; 3.11 does not.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE_FOLDER):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, FxpruneWarning, stacklevel=level)
