"""Values and keywords of options: known, unknown, removed."""

from __future__ import annotations

import pytest

from fxprune.errors import SettingError
from fxprune.runtime.options import REMOVED_KEYWORDS, REMOVED_VALUES, check_choice, refuse_removed_keywords


def test_check_choice_accepts_known_values_alone() -> None:
    check_choice("heal", "none", ("none", "affine"))
    with pytest.raises(SettingError, match=r"heal 'luck' is not known; known: none, affine, or a callable"):
        check_choice("heal", "luck", ("none", "affine"), others=", or a callable")
    with pytest.raises(SettingError, match=r"heal \['none'\] is not known"):
        check_choice("heal", ["none"], ("none", "affine"))


@pytest.mark.parametrize(("option", "value"), list(REMOVED_VALUES))
def test_check_choice_of_a_removed_value_says_what_to_use(option: str, value: str) -> None:
    with pytest.raises(SettingError) as caught:
        check_choice(option, value, ("none",))
    assert str(caught.value) == f"{option}={value!r} is gone: {REMOVED_VALUES[option, value]}"


def test_removed_keywords_are_refused_and_others_pass() -> None:
    @refuse_removed_keywords
    def function(*, seed: int = 0) -> int:
        """Return the seed."""
        return seed

    assert function(seed=3) == 3
    assert function.__doc__ == "Return the seed."
    for keyword, advice in REMOVED_KEYWORDS.items():
        with pytest.raises(SettingError, match=f"{keyword}= is gone") as caught:
            function(**{keyword: 1})
        assert advice in str(caught.value)
    with pytest.raises(TypeError, match="luck"):
        function(luck=1)  # type: ignore[call-arg]
