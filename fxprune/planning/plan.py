"""The decision as a value: which regions go, what that saves, and the graphs it was made for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

from fxprune.errors import PlanError
from fxprune.graph.records import Link, Region, Rejection
from fxprune.planning.plan_schema import encode_json, read_record
from fxprune.planning.provenance import Provenance

VERSION = 2
"""Version of the plan file's schema; files of version 1, which know of no latency, are read as well."""


@dataclass(frozen=True)
class Totals:
    """What a whole model costs.

    Attributes
    ----------
    flops : float
        Floating point operations per calibration image at inference, two per multiply-add.
    params : int
        Values in all parameters.
    blocks : int
        Candidate regions that lie in no other one.
    latency_ms : float or None
        Milliseconds of a call on ``settings["latency"]``: measured before, predicted after; None if not measured.
    """

    flops: float
    params: int
    blocks: int
    latency_ms: float | None = None


@dataclass(frozen=True)
class IslandRecord:
    """A captured graph: its path, the digest of its structure, and the paths in it that stayed one node."""

    name: str
    fingerprint: str
    opaque: tuple[str, ...]


@dataclass(frozen=True)
class NodeRecord:
    """One node of a captured graph, and what the instrumented interpreter saw at it.

    Attributes
    ----------
    name : str
        Dotted path in the model of the module it calls, or of its island and the node's own name.
    island, node : str
        Where it stands.
    op : str
        What it does: the class of the layer, the name of the function or method, ``input`` or ``output``.
    reads : tuple of str
        Nodes of its island whose values it takes.
    shape : tuple of int or None
        Of its value on the first calibration batch, at its first call; None if that is no single tensor.
    grad_act : float or None
        ``E_x [sum |dL/dA * A|]`` in the pass of the criterion, so of its loss and with its gates (`Criterion`); the
        paper's own with ``"grad_act"``, ``"grad_delta"``, ``"l1"``. None if no gradient reached it.
    l1 : float or None
        Sum of its weights' absolute values; None if it has none.
    flops : float
        Operations per image, all its calls together.
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
        What can be removed. Its fields can be read off the candidate too: `name`, `kind`, `island`, `exit`, `stand_in`,
        `nodes`, `layers`.
    score : float
        Importance by the plan's criterion.
    flops : float
        Operations per image that go with it.
    params : int
        Parameters that go with it if nothing else goes.
    block : bool
        Whether it lies in no other candidate.
    latency_ms : float or None
        Milliseconds of a call that go with it, 0 if they cannot be told from noise, None if not measured.
    removed : bool
        Whether the plan removes it.
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
        """How it is removed: ``"bypass"`` or ``"drop"``."""
        return self.region.kind

    @property
    def island(self) -> str:
        """Path of the island it lies in."""
        return self.region.island

    @property
    def exit(self) -> str:
        """Node whose value is replaced."""
        return self.region.exit

    @property
    def stand_in(self) -> str:
        """Node whose value is read instead."""
        return self.region.stand_in

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes that are removed."""
        return self.region.nodes

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of the modules with weights that are removed."""
        return self.region.layers

    def to_dict(self) -> dict[str, Any]:
        """Return the candidate as plain data, the region's fields beside its own."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "region"}
        return {**asdict(self.region), **own}

    @classmethod
    def from_dict(cls, row: Any, where: str, added: Mapping[str, Any]) -> Candidate:
        """Read what `to_dict` returned; `where` names the row in errors.

        Raises
        ------
        PlanError
            If a field is missing, unknown, or holds something else; names it.
        """
        if not isinstance(row, Mapping) or "region" in row:
            raise _fail(f"field {where!r} should be an object with the fields of a region and of its costs")
        names = {field.name for field in fields(Region)}
        region = read_record(Region, {name: row[name] for name in names if name in row}, where, _fail)
        own = {name: value for name, value in row.items() if name not in names}
        found: Candidate = read_record(cls, {**own, "region": region}, where, _fail, added)
        return found


def cost_of(record: Totals | Candidate, cost: str) -> float | None:
    """Read what a model or a region costs off its record.

    Parameters
    ----------
    record : Totals or Candidate
        Of a model, or of a region.
    cost : str
        ``"flops"``, ``"latency"`` (milliseconds), ``"params"`` or ``"blocks"``.

    Returns
    -------
    float or None
        None where it was not measured, or where the cost is not known.
    """
    field = {"latency": "latency_ms", "blocks": "blocks" if isinstance(record, Totals) else "block"}.get(cost, cost)
    value = getattr(record, field, None)
    return None if value is None else float(value)


@dataclass(frozen=True)
class Plan:
    """Which regions go.

    Attributes
    ----------
    budget : float
        Fraction of the model's cost that was to go.
    cost : str
        What the budget counts: ``flops``, ``latency``, ``params`` or ``blocks``.
    settings : mapping
        How it was made: criterion, seed, images, targets, shapes, versions.
    before, after : Totals
        The model as it was given, and as it will be. Convolutions that become narrower because they would read one
        tensor twice save a little more; `fxprune.report` of the pruned model counts that.
    islands : tuple of IslandRecord
        Graphs in which something goes.
    regions : tuple of Candidate
        Every region, removed or not.
    rejections : tuple of Rejection
        What cannot go, and why.
    nodes : tuple of NodeRecord
        Every node of every island, removed or not.
    links : tuple of Link
        What flows from island to island.

    Notes
    -----
    The file is strict JSON (UTF-8): one object with ``fxprune_plan``, the schema's version (2), and the attributes
    above under their names. ``before`` and ``after`` are objects with the fields of `Totals`; ``islands``, ``regions``,
    ``rejections``, ``nodes`` and ``links`` are lists of objects with the fields of `IslandRecord`, `Candidate`,
    `Rejection` (``{"name": str, "reason": str}``), `NodeRecord` and `Link`. Every field is there and no other; names
    are of modules and graph nodes, never of objects, so a plan holds on another machine. Whether it fits a model is
    decided by the fingerprints of its islands when it is applied, whatever version of torch made it.

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
        """The regions that go."""
        return tuple(candidate for candidate in self.regions if candidate.removed)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, ready for JSON."""
        rows = {**vars(self), "settings": dict(self.settings)}
        plain = {name: _to_plain(value) for name, value in rows.items()}
        return {"fxprune_plan": VERSION, **json.loads(json.dumps(plain))}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Read what `to_dict` gave.

        Raises
        ------
        PlanError
            If a field is missing or unknown, or the version is another one; names the field.
        """
        if not isinstance(data, Mapping) or "fxprune_plan" not in data:
            raise PlanError("this is no fxprune plan: it has no field 'fxprune_plan'")
        version = data["fxprune_plan"]
        if version not in (1, VERSION):
            raise PlanError(f"the plan has schema version {version!r}, this fxprune reads 1 and {VERSION}")
        added = {"latency_ms": None} if version == 1 else {}
        rest = {key: value for key, value in data.items() if key != "fxprune_plan"}
        parts: dict[str, Any] = {"before": Totals, "after": Totals}
        lists: dict[str, Any] = {"islands": IslandRecord, "regions": Candidate, "rejections": Rejection}
        lists |= {"nodes": NodeRecord, "links": Link}
        if "settings" in rest:
            if not isinstance(rest["settings"], Mapping):
                raise PlanError(f"plan field 'plan.settings' should be an object, is {rest['settings']!r}")
            rest["settings"] = Provenance(rest["settings"])
        for key, kind in parts.items():
            rest[key] = read_record(kind, rest.get(key), key, _fail, added)
        for key, kind in lists.items():
            rows = rest.get(key)
            if not isinstance(rows, list):
                raise PlanError(f"plan field {key!r} should be a list")
            read = Candidate.from_dict if kind is Candidate else partial(_read_row, kind)
            rest[key] = tuple(read(row, f"{key}[{index}]", added) for index, row in enumerate(rows))
        plan: Plan = read_record(cls, rest, "plan", _fail)
        return plan

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as JSON, one line a region and a node."""
        Path(path).write_text(encode_json(self.to_dict()), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan file.

        Raises
        ------
        PlanError
            If it is no JSON or no plan; names the file and what is wrong in it.
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


def _to_plain(value: Any) -> Any:
    """Turn records, and lists of them, into plain data."""
    if isinstance(value, (tuple, list)):
        return [_to_plain(row) for row in value]
    if isinstance(value, Candidate):
        return value.to_dict()
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
