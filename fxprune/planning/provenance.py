"""Defines `Provenance`: the settings of a plan, as a read-only mapping with typed properties."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxprune.runtime.json_text import replace_nonfinite


class Provenance(Mapping[str, Any]):
    """The settings of a plan, with the results of its search and healing.

    Entries are plain data and are written to JSON without change. Files of other versions may contain other entries or
    other types: in this case the properties return None or an empty value.

    Parameters
    ----------
    entries : mapping
        Criterion, seed, images, targets, versions and more, by name.

    Examples
    --------
    >>> made = Provenance({"criterion": "fisher", "tried": "many"})
    >>> made["criterion"], made.tried
    ('fisher', None)
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self._entries: dict[str, Any] = dict(entries)

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Provenance({self._entries!r})"

    def with_entries(self, **entries: Any) -> Provenance:
        """Return a copy with entries added or replaced; numbers that are not finite become None."""
        return Provenance({**self._entries, **replace_nonfinite(entries)})

    def without(self, *names: str) -> Provenance:
        """Return a copy without the named entries."""
        return Provenance({name: value for name, value in self._entries.items() if name not in names})

    @property
    def criterion(self) -> str:
        """Name of the criterion."""
        return str(self._entries.get("criterion"))

    @property
    def strategy(self) -> str | None:
        """Strategy of the search; None if the plan was chosen by scores alone."""
        value = self._entries.get("strategy")
        return value if isinstance(value, str) else None

    @property
    def tried(self) -> int | None:
        """Number of plans that the search tried."""
        value = self._entries.get("tried")
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    @property
    def loss_increase(self) -> float | None:
        """Loss increase of the plan in the search, see `fxprune.healing.loss_change`."""
        return as_number(self._entries.get("loss_increase"))

    @property
    def agreement(self) -> float | None:
        """The mAP of the plan in the search, with the boxes of the original model as ground truth."""
        return as_number(self._entries.get("agreement"))

    @property
    def latency(self) -> Mapping[str, Any]:
        """Conditions of the latency measurement: backend, device, images, threads, rounds, floor."""
        return as_mapping(self._entries.get("latency"))

    @property
    def latency_floor(self) -> float:
        """Difference between two timings of the same model, as a share of its latency; 0 if not measured."""
        return as_number(self.latency.get("floor")) or 0.0

    @property
    def healing(self) -> Mapping[str, Any]:
        """Healing method and its results; empty if the model was not healed."""
        return as_mapping(self._entries.get("heal"))

    @property
    def measured(self) -> Mapping[str, Any]:
        """What the pruned model still finds and how fast it is; empty if it was not measured."""
        return as_mapping(self._entries.get("measured"))

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries by which the plan was made."""
        return {name: str(version) for name, version in as_mapping(self._entries.get("versions")).items()}


def as_number(value: object) -> float | None:
    """Return a number as float; None for any other value."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping without change; an empty mapping for any other value."""
    return value if isinstance(value, Mapping) else {}
