"""Finds the blocks that a detector does not need and replaces them by identities: a compiler pass over torch.fx."""

from fxprune.adapters.ultralytics.trainer import trainer
from fxprune.datasets.agreement import Agreement, agreement
from fxprune.datasets.batches import batches
from fxprune.datasets.coco import CocoDataset
from fxprune.datasets.evaluation import evaluate
from fxprune.datasets.folders import ImageFolder, YoloDataset
from fxprune.deploy.dynamo_backend import pruning_backend
from fxprune.deploy.pretrained import from_pretrained
from fxprune.deploy.save_load import load, save
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
from fxprune.graph.records import Rejection
from fxprune.healing.heal import heal
from fxprune.planning.analysis import Analysis
from fxprune.planning.analyzer import analyze
from fxprune.planning.plan import Candidate, Plan
from fxprune.reporting.report import Report, report
from fxprune.rewriting.apply import apply
from fxprune.rewriting.fold_norms import fold_norms
from fxprune.search.compile import compile  # noqa: A004
from fxprune.version import __version__
from fxprune.visualize.draw import draw

__all__ = [
    "Agreement",
    "Analysis",
    "BatchError",
    "BudgetError",
    "Candidate",
    "CocoDataset",
    "DatasetError",
    "FxpruneError",
    "FxpruneWarning",
    "ImageFolder",
    "LossError",
    "ModelError",
    "NoRegionError",
    "Plan",
    "PlanError",
    "Rejection",
    "Report",
    "SettingError",
    "StorageError",
    "YoloDataset",
    "__version__",
    "agreement",
    "analyze",
    "apply",
    "batches",
    "compile",
    "draw",
    "evaluate",
    "fold_norms",
    "from_pretrained",
    "heal",
    "load",
    "pruning_backend",
    "report",
    "save",
    "trainer",
]


def __dir__() -> list[str]:
    return __all__
