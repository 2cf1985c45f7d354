"""Defines the options of the commands in groups. A command takes whole groups; `typer` gets the single options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import torchvision
import typer

from fxprune.attribution.criteria import CRITERIA
from fxprune.errors import SettingError
from fxprune.healing.methods import METHODS
from fxprune.planning.analysis import COSTS
from fxprune.planning.analyzer import AnalysisOptions
from fxprune.profiling.latency import BACKENDS, choose_backend
from fxprune.runtime.options import REMOVED_KEYWORDS, check_choice
from fxprune.runtime.progress import Progress
from fxprune.search.plan_search import DEFAULT_TRIES, STRATEGIES

MODEL_PANEL, DATA_PANEL, SCORES_PANEL, RESULT_PANEL = "Model", "Data", "Pruning", "Result"


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    """Return an option under a heading of the help, for `typing.Annotated`."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=more.pop("show_default", True), **more)


def choice(panel: str, text: str, known: Iterable[str], **more: Any) -> Any:
    """Return an option that accepts the known names; other names are a usage error that lists them."""
    allowed = list(known)

    def check(param: typer.CallbackParam, value: Any) -> Any:
        for name in value if isinstance(value, (list, tuple)) else [value]:
            try:
                if name is not None:
                    check_choice(str(param.name), name, allowed)
            except SettingError as error:
                raise typer.BadParameter(str(error)) from None
        return value

    text = f"{text}: {', '.join(allowed)}."
    return option(panel, text, callback=check, autocompletion=lambda: allowed, metavar="NAME", **more)


def removed(keyword: str) -> Any:
    """Return an option of earlier versions. It is not in the help, and its use is an error."""

    def refuse(value: Any) -> None:
        if value is not None:
            raise typer.BadParameter(f"this option is gone: {REMOVED_KEYWORDS[keyword]}")

    return typer.Option(f"--{keyword}", hidden=True, callback=refuse)


def _known_models() -> list[str]:
    detectors = torchvision.models.list_models(module=torchvision.models.detection)
    return ["bundled", *(f"torchvision:{name}" for name in detectors)]


@dataclass(frozen=True)
class ModelOptions:
    """The model and its weights."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="bundled, torchvision:NAME, ultralytics:FILE (.yaml or .pt), or your own module:function. A .pt file"
            " is a pickle and can run code; use only files that you trust.",
            show_default=False,
            autocompletion=_known_models,
        ),
    ]
    classes: Annotated[
        int | None,
        option(
            MODEL_PANEL,
            "Number of classes of the model; torchvision counts the background as a class.",
            min=1,
            metavar="N",
        ),
    ] = None
    weights: Annotated[
        str | None,
        option(
            MODEL_PANEL,
            "A .safetensors file, a state_dict file, or a name of torchvision weights such as DEFAULT.",
            metavar="FILE",
        ),
    ] = None
    pruned: Annotated[
        Path | None,
        option(MODEL_PANEL, "Use the pruned model in a folder that --out or fxprune.save wrote.", metavar="FOLDER"),
    ] = None


@dataclass(frozen=True)
class DataOptions:
    """The images, and how the model runs on them."""

    images: Annotated[
        Path | None,
        option(
            DATA_PANEL,
            "Folder of images; without --annotations, the model's own outputs are the labels.",
            metavar="FOLDER",
        ),
    ] = None
    annotations: Annotated[Path | None, option(DATA_PANEL, "COCO annotations of --images.", metavar="FILE.json")] = None
    data: Annotated[
        Path | None, option(DATA_PANEL, "Data set in the ultralytics format, instead of --images.", metavar="FILE.yaml")
    ] = None
    limit: Annotated[
        int | None,
        option(
            DATA_PANEL,
            "Maximum number of images, evenly spread; default: 64 to calibrate, 256 to calibrate with healing, all to"
            " evaluate.",
            min=1,
            metavar="N",
        ),
    ] = None
    size: Annotated[
        int | None,
        option(DATA_PANEL, "Side in pixels of the square input of an ultralytics model.", min=1, metavar="N"),
    ] = None
    batch: Annotated[int, option(DATA_PANEL, "Images per forward pass.", min=1, metavar="N")] = 16
    device: Annotated[str, option(DATA_PANEL, "cpu, cuda, cuda:1, mps, ...", metavar="NAME")] = "cpu"


@dataclass(frozen=True)
class ScoreOptions:
    """How regions are scored."""

    criterion: Annotated[str, choice(SCORES_PANEL, "Criterion of importance", CRITERIA)] = "fisher"
    shapes: Annotated[str | None, removed("shapes")] = None
    seed: Annotated[
        int, option(SCORES_PANEL, "Seed of the samplers in the loss and of random scores.", metavar="N")
    ] = 0
    latency_backend: Annotated[
        str | None,
        choice(SCORES_PANEL, "Measure milliseconds on this backend (with --cost latency, default eager)", BACKENDS),
    ] = None

    def for_analysis(self, cost: str, progress: Progress) -> AnalysisOptions:
        """Return the options of an analysis for a budget in the given cost."""
        backend = choose_backend(cost, self.latency_backend)
        return AnalysisOptions(self.criterion, seed=self.seed, latency_backend=backend, progress=progress)


CostName = Annotated[str, choice(SCORES_PANEL, "Unit of the budget", COSTS)]


@dataclass(frozen=True)
class BudgetOptions:
    """The budget and its unit."""

    budget: Annotated[
        float, option(SCORES_PANEL, "Fraction of the cost to remove, in (0, 1).", "--budget", "-b", metavar="SHARE")
    ] = 0.1
    cost: CostName = "flops"


HealName = Annotated[str, choice(SCORES_PANEL, "Heal the pruned model; only mimic_labelled needs labels", METHODS)]
StepsNumber = Annotated[
    int,
    option(
        SCORES_PANEL,
        "Most training steps of --heal mimic and mimic_labelled; 4 images each.",
        min=1,
        metavar="N",
    ),
]
MeasureFlag = Annotated[
    bool,
    option(
        SCORES_PANEL,
        "Measure what the pruned model still finds and its milliseconds, on up to 64 images that pruning did not use.",
        "--measure/--no-measure",
        metavar="",
    ),
]


@dataclass(frozen=True)
class PruneOptions:
    """How the plan is found, and how the pruned model is healed."""

    strategy: Annotated[
        str,
        choice(SCORES_PANEL, "One plan by scores, or the best of several plans by trial", STRATEGIES),
    ] = "one_shot"
    tries: Annotated[
        int, option(SCORES_PANEL, "Maximum number of plans that --strategy search tries.", min=1, metavar="N")
    ] = DEFAULT_TRIES
    heal: HealName = "affine"
    steps: StepsNumber = 400
    measure: MeasureFlag = True


@dataclass(frozen=True)
class HealOptions:
    """How a pruned model is healed and measured. Without images it is neither."""

    heal: HealName = "none"
    steps: StepsNumber = 400
    measure: MeasureFlag = True


JsonFlag = Annotated[bool, option(RESULT_PANEL, "One JSON document on stdout.", "--json", metavar="")]
ForceFlag = Annotated[bool, option(RESULT_PANEL, "Replace the output of an earlier run.", "--force", metavar="")]
DebugFlag = Annotated[
    bool, typer.Option("--debug", metavar="", help="Show the traceback of an error, and all warnings.")
]


@dataclass(frozen=True)
class OutputOptions:
    """Where results are written."""

    out: Annotated[Path | None, option(RESULT_PANEL, "Folder to write.", "--out", "-o", metavar="FOLDER")] = None
    force: ForceFlag = False
    json: JsonFlag = False


def read_numbers(text: str) -> list[float]:
    """Read numbers that are separated by commas.

    Examples
    --------
    >>> read_numbers("0.1, 0.2")
    [0.1, 0.2]
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0.1,0.2,0.3") from error


def spread_signature(function: Callable[..., Any], given: Iterable[type]) -> inspect.Signature:
    """Return the signature of a command with single options instead of groups, and with ``--debug``.

    Parameters
    ----------
    function : callable
        The command. Its parameters are groups (dataclasses of this module) or single annotated options.
    given : iterable of type
        Parameters of these types are not options; they are omitted.

    Examples
    --------
    >>> def command(budget: BudgetOptions) -> None: ...
    >>> list(spread_signature(command, ()).parameters)
    ['budget', 'cost', 'debug']
    """
    hidden = tuple(given)
    parameters = []
    for name, hint, default in _parameters(function):
        if is_dataclass(hint) and isinstance(hint, type):
            hints = get_type_hints(hint, include_extras=True)
            if hint not in hidden:
                parameters += [_keyword(field.name, hints[field.name], field.default) for field in fields(hint)]
        else:
            parameters.append(_keyword(name, hint, default))
    return inspect.Signature([*parameters, _keyword("debug", DebugFlag, False)])


def gather_arguments(
    function: Callable[..., Any], values: Mapping[str, Any], given: Mapping[type, Any]
) -> dict[str, Any]:
    """Return the arguments of a command from the values of single options: the groups are built again."""
    arguments = {}
    for name, hint, _ in _parameters(function):
        if isinstance(hint, type) and hint in given:
            arguments[name] = given[hint]
        elif is_dataclass(hint) and isinstance(hint, type):
            arguments[name] = hint(**{field.name: values[field.name] for field in fields(hint)})
        else:
            arguments[name] = values[name]
    return arguments


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Return name, type and default of every parameter."""
    hints = get_type_hints(function, include_extras=True)
    return [(name, hints[name], each.default) for name, each in inspect.signature(function).parameters.items()]


def _keyword(name: str, hint: Any, default: Any) -> inspect.Parameter:
    given = inspect.Parameter.empty if default is MISSING else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=given, annotation=hint)
