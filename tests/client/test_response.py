"""How the client words what servers say. The messages are those of a real Triton 2.51."""

from __future__ import annotations

import copy
import pickle

import pytest

import twotower_client as tt
from twotower_client.response import error_of, too_late
from twotower_contract.statuses import text_of, try_again


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("INVALID_ARGUMENT", tt.RequestRefusedError),
        ("UNAVAILABLE", tt.ServerBusyError),
        ("DEADLINE_EXCEEDED", tt.DeadlineError),
        ("INTERNAL", tt.RequestFailedError),
    ],
)
def test_an_error_has_the_kind_of_its_status(status, kind) -> None:
    error = error_of(f"{status}: threshold is 2: it must be less")
    assert type(error) is kind
    assert str(error).endswith("threshold is 2: it must be less")
    assert status not in str(error)


def test_a_busy_server_says_how_long_to_wait() -> None:
    """Through a copy, too, which a stream keeps, and through a pickle, as between processes."""
    error = error_of(text_of("busy", f"4 requests wait already; {try_again(2.5)}"))
    for one in (error, copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(one), one.retry_after) == (tt.ServerBusyError, 2.5)
        assert str(one) == "the server says: 4 requests wait already; try again in 2.5 s"
    assert error_of(text_of("busy", "the server is shutting down")).retry_after is None
    assert error_of(text_of("late", "not finished")).retry_after is None


def test_a_dead_process_is_named_with_the_remedy() -> None:
    error = error_of("Stub process 'twotower_0_0' is not healthy.")
    assert type(error) is tt.ServerUnavailableError
    assert "try again when the server has started it again" in str(error)


@pytest.mark.parametrize(
    "message",
    [
        "Request for unknown model: 'twotower' is not found",
        "unexpected inference input 'colour' for model 'twotower'",
    ],
)
def test_messages_of_triton_itself_are_left_to_be_looked_into(message) -> None:
    assert error_of(message) is None


def test_which_limit_ended_the_wait() -> None:
    assert type(too_late(10, 3, 5, 0)) is tt.DeadlineError
    assert type(too_late(10, 8, 5, 0)) is tt.InactivityError
    assert issubclass(tt.InactivityError, tt.DeadlineError)
