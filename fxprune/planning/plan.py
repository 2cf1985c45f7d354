"""Defines `Plan`: the regions to remove, the costs before and after, and the fingerprints of the graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from fxprune.errors import PlanError
from fxprune.graph.records import Link, Region, Rejection
from fxprune.planning.plan_schema import encode_json, read_record
from fxprune.planning.provenance import Provenance

VERSION = 4
"""Version of the plan file's schema. Files of version 1 (no latency), 2 (no constants) and 3 can be read too."""

Constant = Any
"""None, bool, int, float, str, or a tuple of these; in a file, a list in place of a tuple."""


@dataclass(frozen=True)
class Totals:
    """Costs of a whole model.

    Attributes
    ----------
    flops : float
        Floating point operations per calibration image at inference, two per multiply-add.
    params : int
        Number of values in all parameters.
    blocks : int
        Number of candidates that lie in no other candidate.
    latency_ms : float or None
        Milliseconds per call under the conditions in ``settings["latency"]``. Measured for the model before the
        removal, predicted for the model after it. None if the latency was not measured.
    """

    flops: float
    params: int
    blocks: int
    latency_ms: float | None = None


@dataclass(frozen=True)
class IslandRecord:
    """A captured graph in a plan.

    Attributes
    ----------
    name : str
        Path of the island in the model; "" is the model itself.
    fingerprint : str
        Digest of the graph, see `fxprune.graph.fx_utils.fingerprint`.
    opaque : tuple of str
        Paths below the island of modules that stay one node.
    constants : mapping of str to None, bool, int, float, str or tuple of these
        Arguments of its forward that are constants in the graph, because all calls gave the same.
    """

    name: str
    fingerprint: str
    opaque: tuple[str, ...]
    constants: Mapping[str, Constant] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", {name: _to_tuples(value) for name, value in self.constants.items()})


@dataclass(frozen=True)
class NodeRecord:
    """One node of a captured graph, with its scores and operations.

    Attributes
    ----------
    name : str
        Dotted path in the model of the module that the node calls. For other nodes: path of the island and node name.
    island, node : str
        Path of the island and name of the node.
    op : str
        Class of the layer, name of the function or method, ``input`` or ``output``.
    reads : tuple of str
        Nodes of the island whose values it reads.
    shape : tuple of int or None
        Shape of its value at the first call on the first calibration batch; None if the value is not a single tensor.
    grad_act : float or None
        ``E_x [sum |dL/dA * A|]`` with the loss and the gate of the criterion (`Criterion`). With ``"grad_act"``,
        ``"grad_delta"`` and ``"l1"`` this is the score of arXiv 2602.14040. None if no gradient reached the node.
    l1 : float or None
        Sum of the absolute values of its weights; None if it has no weights.
    flops : float
        Floating point operations per image, summed over all its calls.
    """

    name: str
    island: str
    node: str
    op: str
    reads: tuple[str, ...]
    shape: tuple[int, ...] | None
    grad_act: float | None
    l1: float | None
    flops: float


@dataclass(frozen=True)
class Candidate:
    """A region with its score and costs.

    Attributes
    ----------
    region : Region
        The region. Its fields are also attributes of the candidate: `name`, `kind`, `island`, `exit`, `stand_in`,
        `nodes`, `layers`, `contiguous`.
    score : float
        Importance by the criterion; larger is more important.
    flops : float
        Floating point operations per image that its removal saves.
    params : int
        Number of parameter values that its removal saves, if nothing else is removed.
    block : bool
        Whether it lies in no other candidate.
    latency_ms : float or None
        Milliseconds per call that its removal saves; 0 if they are not larger than the noise, None if not measured.
    removed : bool
        Whether the plan removes it. Always False in an `Analysis`.

    Examples
    --------
    >>> least = min(analysis.regions, key=lambda candidate: candidate.score)   # doctest: +SKIP
    >>> least.name, least.kind, least.params                       # doctest: +SKIP
    ('backbone.body.layer3.4', 'bypass', 1114112)
    """

    region: Region
    score: float
    flops: float
    params: int
    block: bool
    latency_ms: float | None = None
    removed: bool = False

    @property
    def name(self) -> str:
        """Dotted path of the region in the model."""
        return self.region.name

    @property
    def kind(self) -> str:
        """Kind of the region: ``"bypass"`` or ``"drop"``."""
        return self.region.kind

    @property
    def island(self) -> str:
        """Path of its island; "" is the model itself."""
        return self.region.island

    @property
    def exit(self) -> str:
        """Node whose value is removed."""
        return self.region.exit

    @property
    def stand_in(self) -> str:
        """Node whose value is read instead."""
        return self.region.stand_in

    @property
    def nodes(self) -> tuple[str, ...]:
        """All removed nodes in graph order, including the exit."""
        return self.region.nodes

    @property
    def layers(self) -> tuple[str, ...]:
        """Dotted paths of the modules with weights, and of the constant weights, that are removed."""
        return self.region.layers

    @property
    def contiguous(self) -> bool:
        """Whether the stand-in is made contiguous."""
        return self.region.contiguous

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as plain data; the fields of the region are at the same level as its own."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "region"}
        return {**asdict(self.region), **own}

    @classmethod
    def from_dict(cls, row: Any, where: str, added: Mapping[str, Any]) -> Candidate:
        """Build a candidate from the output of `to_dict`.

        Parameters
        ----------
        row : mapping
            Output of `to_dict`.
        where : str
            Name of the row in messages.
        added : mapping
            Values of fields that older files do not have.

        Raises
        ------
        PlanError
            If a field is missing, unknown, or of another type. The message names the field.
        """
        if not isinstance(row, Mapping) or "region" in row:
            raise _fail(f"field {where!r} should be an object with the fields of a region and of its costs")
        names = {field.name for field in fields(Region)}
        region = read_record(Region, {name: row[name] for name in names if name in row}, where, _fail, added)
        own = {name: value for name, value in row.items() if name not in names}
        candidate: Candidate = read_record(cls, {**own, "region": region}, where, _fail, added)
        return candidate


def cost_of(record: Totals | Candidate, cost: str) -> float | None:
    """Return one of the costs of a model or a region.

    Parameters
    ----------
    record : Totals or Candidate
        Record of the model or of the region.
    cost : str
        ``"flops"``, ``"latency"`` (milliseconds), ``"params"`` or ``"blocks"``.

    Returns
    -------
    float or None
        None if the cost was not measured or is not known.

    Examples
    --------
    >>> cost_of(Totals(flops=4e9, params=11, blocks=3), "blocks")
    3.0
    """
    field = {"latency": "latency_ms", "blocks": "blocks" if isinstance(record, Totals) else "block"}.get(cost, cost)
    value = getattr(record, field, None)
    return None if value is None else float(value)


@dataclass(frozen=True)
class Plan:
    """The regions to remove for one budget.

    Attributes
    ----------
    budget : float
        Fraction of the model's cost that the plan removes at least, in (0, 1).
    cost : str
        Unit of the budget: ``"flops"``, ``"latency"``, ``"params"`` or ``"blocks"``.
    settings : Provenance
        Criterion, seed, images, source of the targets, library versions, and the results of a search or of healing.
    before, after : Totals
        Costs of the model before and after the removal. Convolutions that would read one tensor twice become narrower,
        which saves a little more; `fxprune.report` of the pruned model counts that.
    islands : tuple of IslandRecord
        Graphs from which regions are removed.
    regions : tuple of Candidate
        All candidates, removed or not.
    rejections : tuple of Rejection
        Layers and regions that cannot be removed, with the reasons.
    nodes : tuple of NodeRecord
        All nodes of all islands, removed or not.
    links : tuple of Link
        Data flow between islands.

    Notes
    -----
    The file is strict JSON in UTF-8. It is one object with ``fxprune_plan``, the version of the schema (4), and the
    attributes above under their names. ``before`` and ``after`` are objects with the fields of `Totals`. ``islands``,
    ``rejections``, ``nodes`` and ``links`` are lists of objects with the fields of `IslandRecord`, `Rejection`
    (``{"name": str, "reason": str}``), `NodeRecord` and `Link`; the objects of ``regions`` are described by
    `Candidate.to_dict`. All fields are required, and unknown fields are an error. The names are those of modules and
    graph nodes, so a plan is valid on another machine. `fxprune.apply` compares the fingerprints of the islands with
    the model; the version of torch does not matter.

    Examples
    --------
    >>> plan = analysis.plan(0.1)                        # doctest: +SKIP
    >>> plan.save("plan.json")                           # doctest: +SKIP
    >>> pruned = fxprune.apply(model, Plan.load("plan.json"))  # doctest: +SKIP
    """

    budget: float
    cost: str
    settings: Provenance
    before: Totals
    after: Totals
    islands: tuple[IslandRecord, ...]
    regions: tuple[Candidate, ...]
    rejections: tuple[Rejection, ...]
    nodes: tuple[NodeRecord, ...]
    links: tuple[Link, ...]

    @property
    def removed(self) -> tuple[Candidate, ...]:
        """The candidates that the plan removes."""
        return tuple(candidate for candidate in self.regions if candidate.removed)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, ready for JSON."""
        rows = {**vars(self), "settings": dict(self.settings)}
        plain = {name: _to_plain(value) for name, value in rows.items()}
        return {"fxprune_plan": VERSION, **json.loads(json.dumps(plain))}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Build a plan from the output of `to_dict`.

        Raises
        ------
        PlanError
            If a field is missing, unknown or of another type, or if the schema version cannot be read. The message
            names the field.
        """
        if not isinstance(data, Mapping) or "fxprune_plan" not in data:
            raise PlanError("this is no fxprune plan: it has no field 'fxprune_plan'")
        version = data["fxprune_plan"]
        if version not in (1, 2, 3, VERSION):
            raise PlanError(f"the plan has schema version {version!r}, this fxprune reads 1 to {VERSION}")
        added: dict[str, Any] = {"latency_ms": None} if version == 1 else {}
        added |= {"constants": {}} if version < 3 else {}
        added |= {"contiguous": False} if version < VERSION else {}
        values = {key: value for key, value in data.items() if key != "fxprune_plan"}
        records: dict[str, Any] = {"before": Totals, "after": Totals}
        lists: dict[str, Any] = {"islands": IslandRecord, "regions": Candidate, "rejections": Rejection}
        lists |= {"nodes": NodeRecord, "links": Link}
        if "settings" in values:
            if not isinstance(values["settings"], Mapping):
                raise PlanError(f"plan field 'plan.settings' should be an object, is {values['settings']!r}")
            values["settings"] = Provenance(values["settings"])
        for key, kind in records.items():
            values[key] = read_record(kind, values.get(key), key, _fail, added)
        for key, kind in lists.items():
            rows = values.get(key)
            if not isinstance(rows, list):
                raise PlanError(f"plan field {key!r} should be a list")
            read = Candidate.from_dict if kind is Candidate else partial(_read_row, kind)
            values[key] = tuple(read(row, f"{key}[{index}]", added) for index, row in enumerate(rows))
        plan: Plan = read_record(cls, values, "plan", _fail)
        return plan

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan to a JSON file, with one line per region and per node.

        Parameters
        ----------
        path : str or path-like
            The file. An existing file is replaced.
        """
        Path(path).write_text(encode_json(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan file.

        Parameters
        ----------
        path : str or path-like
            A file that `save` wrote.

        Returns
        -------
        Plan

        Raises
        ------
        PlanError
            If the file is not JSON or not a plan. The message names the file and the error in it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: not a JSON file ({error})") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def _fail(text: str) -> PlanError:
    return PlanError(f"plan {text}")


def _read_row(kind: Any, row: Any, where: str, added: Mapping[str, Any]) -> Any:
    return read_record(kind, row, where, _fail, added)


def _to_tuples(value: Any) -> Any:
    return tuple(map(_to_tuples, value)) if isinstance(value, (list, tuple)) else value


def _to_plain(value: Any) -> Any:
    """Convert records, and sequences of records, to plain data."""
    if isinstance(value, (tuple, list)):
        return [_to_plain(row) for row in value]
    if isinstance(value, Candidate):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
