"""Python blocks of the README and of other pages."""

from __future__ import annotations

import re

from tests.helpers.paths import ROOT

README = ROOT / "README.md"


def blocks_under(heading: str, text: str) -> list[str]:
    """The python blocks between a heading and the next one of its level."""
    _, found, rest = text.partition(f"\n{heading}\n")
    assert found, f"the README has no heading {heading!r}"
    section = re.split(rf"\n{heading.split()[0]} ", rest)[0]
    return blocks_in(section)


def blocks_in(text: str) -> list[str]:
    """All python blocks."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)
