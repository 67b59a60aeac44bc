"""Polygraphy's comparisons, without what it says about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def verdicts(
    ours: Mapping[str, Any], expected: Mapping[str, Any], tolerance: float
) -> dict[str, bool]:
    """Return whether each array is the expected one, as Polygraphy compares them.

    Args:
        ours: Arrays under test, of the same names and shapes: Polygraphy passes when one is absent.
        expected: Arrays to compare with. Whole numbers must be equal, as must infinities.
        tolerance: Share of an element that it may be off by, and as much of the array's largest
            magnitude beside it.
    """
    import numpy as np
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc

    results = RunResults()
    for name, outputs in (("ours", ours), ("expected", expected)):
        results.append(
            (name, [IterationResult(outputs=dict(outputs), runtime=0, runner_name=name)])
        )
    whole = [name for name, value in expected.items() if value.dtype.kind in "iub"]
    relative = {"": tolerance, **dict.fromkeys(whole, 0.0)}
    absolute = {name: relative.get(name, tolerance) * largest(expected[name]) for name in expected}
    function = SimpleCompareFunc(atol=absolute, rtol=relative, infinities_compare_equal=True)
    # infinities are subtracted, zeros divided by
    with quiet_polygraphy(), np.errstate(all="ignore"):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=function)
    ((_, (iteration,)),) = accuracy.items()
    return {name: bool(iteration[name]) for name in expected}


def largest(values: Any) -> float:
    """Return the largest magnitude of an array, infinities aside."""
    import numpy as np

    numbers = np.abs(values[np.isfinite(values)].astype(np.float64))
    return float(numbers.max(initial=0.0))


def differences(ours: Any, expected: Any) -> Any:
    """Return how far each element is off, in float64; equal infinities are not."""
    import numpy as np

    a, b = ours.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(a == b, 0.0, np.abs(a - b))


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
