"""Names of options that there are not."""

from __future__ import annotations

from twotower_contract.options import INPUTS, unknown_name


def test_a_name_of_any_length_is_refused_in_few_words() -> None:
    """To compare millions of characters would hold up all whose requests are read after it."""
    why = unknown_name(["max_tokens" + "x" * 10**7], INPUTS)
    assert why is not None
    assert len(why) < 1000
    assert "(the nearest is max_new_tokens)" in (unknown_name(["max_tokens"], INPUTS) or "")
