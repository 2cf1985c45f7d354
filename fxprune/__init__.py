"""fxprune: a compiler pass over torch.fx that finds the blocks a detector does not need and removes them."""

from fxprune.compilation import compile  # noqa: A004
from fxprune.datasets import CocoDataset
from fxprune.drawing import draw
from fxprune.driver import analyze, apply
from fxprune.errors import (
    BatchError,
    BudgetError,
    DatasetError,
    FxpruneError,
    FxpruneWarning,
    LossError,
    ModelError,
    NoRegionError,
    PlanError,
    SettingError,
    StorageError,
)
from fxprune.evaluation import evaluate
from fxprune.folding import fold_norms
from fxprune.healing import heal
from fxprune.loading import batches
from fxprune.plan import Plan
from fxprune.report import report
from fxprune.storage import load, save
from fxprune.version import __version__

__all__ = [
    "BatchError",
    "BudgetError",
    "CocoDataset",
    "DatasetError",
    "FxpruneError",
    "FxpruneWarning",
    "LossError",
    "ModelError",
    "NoRegionError",
    "Plan",
    "PlanError",
    "SettingError",
    "StorageError",
    "__version__",
    "analyze",
    "apply",
    "batches",
    "compile",
    "draw",
    "evaluate",
    "fold_norms",
    "heal",
    "load",
    "report",
    "save",
]
