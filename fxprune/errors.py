"""Every error and warning fxprune raises, in one tree.

::

    FxpruneError
    |-- BudgetError        the budget is no fraction, or more than the regions can give      (also ValueError)
    |-- BatchError         a calibration batch has a form, a label or a value that cannot be (also ValueError)
    |-- DatasetError       images or annotations are missing, broken, or contradict another  (also ValueError)
    |-- LossError          the loss is not a finite scalar that depends on the model         (also ValueError)
    |-- ModelError         the model cannot be analyzed as it was given                      (also TypeError)
    |   `-- NoRegionError  nothing in the model can be removed; says why, region by region
    |-- PlanError          a plan file is broken, or was made for another graph              (also ValueError)
    |-- SettingError       an option has a value that is not known                           (also ValueError)
    `-- StorageError       a save cannot be written, is missing or damaged, or does not fit    (also ValueError)

    FxpruneWarning         something the caller gave will not survive, or was left out       (a UserWarning)
"""

from __future__ import annotations


class FxpruneError(Exception):
    """Root of all errors that fxprune raises on purpose."""


class BudgetError(FxpruneError, ValueError):
    """The budget is no fraction in (0, 1), or exceeds what the regions can give."""


class BatchError(FxpruneError, ValueError):
    """A calibration batch has a form, a label or a value that cannot be used."""


class DatasetError(FxpruneError, ValueError):
    """Images or annotations on disk are missing, broken, or contradict each other."""


class LossError(FxpruneError, ValueError):
    """The loss of a batch is not a finite scalar that depends on the model."""


class ModelError(FxpruneError, TypeError):
    """The model cannot be analyzed as it was given."""


class NoRegionError(ModelError):
    """Nothing in the model can be removed; the message lists why."""


class PlanError(FxpruneError, ValueError):
    """A plan file is broken, or the plan was made for another graph."""


class SettingError(FxpruneError, ValueError):
    """An option has a value that is not known; the message lists the known ones."""


class StorageError(FxpruneError, ValueError):
    """A folder cannot be saved to, or what was saved in it is missing, damaged, or does not fit the model."""


class FxpruneWarning(UserWarning):
    """Something the caller set on the model will not survive the rewrite, or some of the data was left out."""
