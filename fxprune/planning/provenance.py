"""How a plan was made: a read-only mapping, with typed views of the entries that reports and searches read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxprune.runtime.json_text import replace_nonfinite


class Provenance(Mapping[str, Any]):
    """The settings a plan was made with, and what was measured meanwhile.

    Entries are plain data and go to JSON as they are. Files of other versions may hold other entries, or entries of
    another kind: the properties then give None or nothing.

    Parameters
    ----------
    entries : mapping
        Criterion, seed, images, targets, versions and the like, by name.

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
        """Return a copy with entries added or replaced; a number that is not finite becomes None."""
        return Provenance({**self._entries, **replace_nonfinite(entries)})

    def without(self, *names: str) -> Provenance:
        """Return a copy without some entries."""
        return Provenance({name: value for name, value in self._entries.items() if name not in names})

    @property
    def criterion(self) -> str:
        """What regions were scored by."""
        return str(self._entries.get("criterion"))

    @property
    def strategy(self) -> str | None:
        """How the plan was found, if not by scores alone."""
        found = self._entries.get("strategy")
        return found if isinstance(found, str) else None

    @property
    def tried(self) -> int | None:
        """Plans that a search tried."""
        found = self._entries.get("tried")
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def loss_increase(self) -> float | None:
        """How much the loss had grown in the trial of the plan."""
        return as_number(self._entries.get("loss_increase"))

    @property
    def agreement(self) -> float | None:
        """The mAP of the trial of the plan, with the unpruned model's boxes as truth."""
        return as_number(self._entries.get("agreement"))

    @property
    def latency(self) -> Mapping[str, Any]:
        """What milliseconds were measured on: backend, device, images, threads, rounds, floor."""
        return as_mapping(self._entries.get("latency"))

    @property
    def latency_floor(self) -> float:
        """Share of its own latency that the model strays from itself by; 0 where none was measured."""
        return as_number(self.latency.get("floor")) or 0.0

    @property
    def healing(self) -> Mapping[str, Any]:
        """How the pruned model was healed, and what that did; empty if it was not."""
        return as_mapping(self._entries.get("heal"))

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that the plan was made with."""
        return {name: str(version) for name, version in as_mapping(self._entries.get("versions")).items()}


def as_number(value: object) -> float | None:
    """Return a number as float, and None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def as_mapping(value: object) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one for anything else."""
    return value if isinstance(value, Mapping) else {}
