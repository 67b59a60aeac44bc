"""What is refused, in few words whatever its size: they go to the caller and into the log."""

from __future__ import annotations

import pytest

from twotower_contract.options import INPUTS, OPTIONS, unknown_name


def test_a_name_of_any_length_is_refused_in_few_words() -> None:
    """To compare millions of characters would hold up all whose requests are read after it."""
    why = unknown_name(["max_tokens" + "x" * 10**7], INPUTS)
    assert why is not None
    assert len(why) < 1000
    assert "(the nearest is max_new_tokens)" in (unknown_name(["max_tokens"], INPUTS) or "")


@pytest.mark.parametrize("value", ["x" * 10**6, ["x" * 10**6], [[5] * 10**6], {"x" * 10**6: 5}])
def test_a_value_of_any_size_is_refused_in_few_words(value) -> None:
    for option in OPTIONS.values():
        why = option.refusal(value, "threshold")
        assert why is not None
        assert len(why) < 300, option.name
