"""Polygraphy's comparisons, without what it says about them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy from narrating on stdout, where only results belong.

    It would also work out the statistics of every tensor for what it does not say: more than half
    of the time of a verification.
    """
    from polygraphy.comparator import util
    from polygraphy.logger import G_LOGGER

    logged = util.log_output_stats
    util.log_output_stats = lambda *_, **__: None
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            yield
    finally:
        util.log_output_stats = logged
