"""How the client words what servers say. The messages are those of a real Triton 2.51."""

from __future__ import annotations

import pytest

import twotower_client as tt
from twotower_client.response import error_of, too_late


def test_a_refusal_is_told_without_the_names_of_models() -> None:
    error = error_of("in ensemble 'twotower', request refused: threshold is 2; it must be less")
    assert type(error) is tt.RequestRefusedError
    assert str(error) == "threshold is 2; it must be less"


def test_a_dead_process_is_named_with_the_remedy() -> None:
    error = error_of("in ensemble 'twotower', Stub process 'generate_0_0' is not healthy.")
    assert type(error) is tt.RequestFailedError
    assert "does not come back" in str(error)
    assert "restart the server" in str(error)


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
