"""Many streams for minutes, with everything that callers do: nothing is left, no answer changes."""

from __future__ import annotations

import pytest

from tests.support.soak import MOST_FILES, WAYS, Soaked, soak

pytestmark = pytest.mark.server


def check(soaked: Soaked, least: int) -> None:
    assert set(soaked.counts) >= set(WAYS)
    assert sum(soaked.counts.values()) > least
    assert soaked.grown < 32 * 2**20, soaked
    assert soaked.files < MOST_FILES, soaked
    assert soaked.left == 0, soaked


def test_two_minutes_of_64_streams(soaking) -> None:
    """It has run beside the other tests of servers, on a server of its own, with less priority."""
    check(soaking(), 200)


@pytest.mark.slow
def test_five_minutes_of_64_streams(server) -> None:
    check(soak(server, 64, 300.0), 1000)
