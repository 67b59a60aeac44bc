"""What a long load says on standard error, on a terminal and in a log."""

from __future__ import annotations

import pytest

from twotower_contract import progress
from twotower_engines.runtime.progress import ByteMeter


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def bind(meter, clock, seconds):
    clock[0] += 50  # checks and plans come before the first weight: not the link's fault
    for step in range(11):
        meter(step * 10**9, 10 * 10**9)
        clock[0] += seconds / 10


@pytest.mark.parametrize("seconds", [1.0, 20.0])
def test_a_log_has_one_line_for_what_took_long(capsys, clock, seconds):
    bind(ByteMeter("binding weights"), clock, seconds)
    said = capsys.readouterr().err
    assert said == ("" if seconds < 2 else "binding weights: 100% of 10.0 GB, 0.5 GB/s\n")


def test_a_terminal_has_one_line_that_is_drawn_again(capsys, clock, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    meter = ByteMeter("binding weights")
    bind(meter, clock, 20.0)
    said = capsys.readouterr().err
    assert said.startswith(
        "\r\x1b[Kbinding weights:  10% of 10.0 GB, 0.5 GB/s\r\x1b[Kbinding weights:  20%"
    )
    assert said.endswith("100% of 10.0 GB, 0.5 GB/s\n")
    assert said.count("\n") == 1


def test_prepared_calls_are_counted(capsys, clock):
    meter = ByteMeter("binding weights")
    for done in range(1, 46):
        meter.prepared(done, 45)
        clock[0] += 0.5
    assert capsys.readouterr().err == "preparing calls: 45 of 45, 22 s\n"
