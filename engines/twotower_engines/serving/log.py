"""The end of a Triton server's log, for a person who wonders why the server did not start."""

from __future__ import annotations

import re

NOISE = re.compile(
    r"pinned memory|CUDA driver|CudaDriver|NVML|DCGM|cudaError"  # of a machine that has no GPU
    r"|^[+|]|^I\d{4} \S+ \d+ \S+\] ?$",  # tables of what was loaded, and the lines above them
    re.IGNORECASE,
)
ERROR = re.compile(r"E\d{4} |error:|Traceback|terminate called|.*cannot open shared object")
# A model's exception, in quotes, with its calls after it, in one line that is hundreds long.
NOT_LOADED = re.compile(
    r"failed to load '(?P<model>\w+)' version \d+: (?:Internal: )?(?P<why>.*?)(?:\\n\\nAt:.*)?\"?$"
)


def end_of_log(text: str, lines: int) -> str:
    """Return the end of a log; where models could not be loaded, the reasons come last.

    Args:
        text: The log.
        lines: Most lines of it.
    """
    kept = [line for line in text.splitlines() if line and not NOISE.search(line)]
    reasons = {}
    for match in filter(None, map(NOT_LOADED.search, kept)):
        why = match["why"].replace(r"\n", " ").replace(r"\"", '"')
        reasons[match["model"]] = f"{match['model']} could not be loaded: {why}"
    # A model's own error is worth more than the messages of unloading after it.
    first = next((number for number, line in enumerate(kept) if ERROR.match(line)), None)
    kept = kept[-lines:] if first is None else kept[first : first + lines]
    return "\n".join(["the server's log says:", *(f"  {line}" for line in kept), *reasons.values()])
