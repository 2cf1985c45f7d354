"""fxprune: a compiler pass over torch.fx that finds the blocks a detector does not need and removes them."""

from fxprune.driver import analyze, apply, compile  # noqa: A004
from fxprune.errors import (
    BatchError,
    BudgetError,
    FxpruneError,
    FxpruneWarning,
    LossError,
    ModelError,
    NoRegionError,
    PlanError,
    SettingError,
)
from fxprune.plan import Plan
from fxprune.report import report
from fxprune.version import __version__

__all__ = [
    "BatchError",
    "BudgetError",
    "FxpruneError",
    "FxpruneWarning",
    "LossError",
    "ModelError",
    "NoRegionError",
    "Plan",
    "PlanError",
    "SettingError",
    "__version__",
    "analyze",
    "apply",
    "compile",
    "report",
]
