"""Single calls of engines, without a server: the half of `twotower bench` that ENGINES names."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twotower_contract.atomic import write_text
from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_contract.progress import StatusLine
from twotower_contract.tables import aligned
from twotower_engines.runtime.interface import DenoiseRow, ExtendRow, PredictRow

if TYPE_CHECKING:
    from twotower_engines.generation.costs import Costs
    from twotower_engines.runtime.interface import Runtime

SECONDS = 0.5  # of measuring each call
WARM_UP, LEAST_CALLS = 2, 5
PROMPT_TOKENS = 32  # in every slot before the calls that are measured
BLOCK = 16


@dataclass(frozen=True, slots=True)
class CallTime:
    """Latency of one kind of call over so many rows.

    Attributes:
        call: denoise, commit (a finished block), token, prefill (a whole chunk) or predict.
        rows: Rows of the call.
        tokens: Tokens of each row.
        calls: Calls that were measured.
        median_ms: Median latency.
        p99_ms: 99th percentile.
        floor_ms: Least time by the planner; None where it knows no such machine.
    """

    call: str
    rows: int
    tokens: int
    calls: int
    median_ms: float
    p99_ms: float
    floor_ms: float | None


def measure_engines(folder: str, seconds: float | None, save: Path | None, as_json: bool) -> None:
    """Measure every kind of call of an engine set, and print what it takes.

    Args:
        folder: The engine set.
        seconds: Seconds for each call and number of rows; `SECONDS` where None.
        save: File for the result as JSON; None for none.
        as_json: Whether to print JSON instead of a table.

    Raises:
        EngineSetError: There is no engine set, or several.
    """
    from twotower_engines.generation.costs import LinearCosts, costs_of_engines
    from twotower_engines.runtime.opening import open_runtime
    from twotower_engines.runtime.progress import ByteMeter

    engines = open_engine_set(Path(folder))
    costs = costs_of_engines(engines)
    known = None if isinstance(costs, LinearCosts) else costs
    runtime = open_runtime(engines, None, None, ByteMeter("binding weights"))
    line = StatusLine(10.0)
    times = []
    try:
        for one in _calls(runtime, known, seconds or SECONDS):
            times.append(one)
            if line.is_due():
                line.draw(f"{one.call}: {one.rows} rows")
    finally:
        line.clear()
        runtime.close()
    result = {"kind": "twotower bench engines", **_about(engines)}
    result["calls"] = [asdict(one) for one in times]
    text = json.dumps(result)
    if save is not None:
        write_text(save, text + "\n")
    print(text if as_json else _table(times))


def _calls(runtime: Runtime, costs: Costs | None, seconds: float) -> Iterator[CallTime]:
    """Measure each kind of call with 1, 2, 4 ... rows."""
    limits = runtime.limits
    block = min(BLOCK, limits.block_size_max)
    kinds = [("token", 1), ("commit", block), ("prefill", limits.max_tokens_per_call)]
    if runtime.has_denoiser:
        kinds = [("denoise", block), *kinds, ("predict", 1)]
    for call, tokens in kinds:
        rows = 1
        while rows <= limits.slots:
            run = _caller(runtime, call, rows, tokens)
            latencies = _measured(run, seconds)
            cost = None
            if costs is not None:
                kind = costs.denoise if call in ("denoise", "predict") else costs.extend
                cost = 1e3 * kind(rows, tokens)
            median, high = np.percentile(1e3 * np.array(latencies), (50, 99)).round(4).tolist()
            yield CallTime(call, rows, tokens, len(latencies), median, high, cost)
            rows *= 2


def _caller(runtime: Runtime, call: str, rows: int, tokens: int) -> Callable[[], float]:
    """Return what makes one call and returns the seconds that it took."""
    lengths = 0

    def fill() -> None:
        nonlocal lengths
        prompt = _ids(min(PROMPT_TOKENS, runtime.limits.max_tokens_per_call))
        for slot in range(rows):
            runtime.reset(slot)
        runtime.extend([ExtendRow(slot, prompt) for slot in range(rows)])
        one = [ExtendRow(slot, prompt[:1], keep_previous=True) for slot in range(rows)]
        runtime.extend(one)
        lengths = prompt.size + 1

    fill()

    def run() -> float:
        nonlocal lengths
        if call == "denoise":
            masked = np.full(tokens, runtime.mask_token_id, np.int32)
            blocks = [DenoiseRow(slot, masked, 0.9, 16) for slot in range(rows)]
            return _timed(lambda: runtime.denoise(blocks))
        if call == "predict":
            last = [PredictRow(slot, int(_ids(1)[0])) for slot in range(rows)]
            return _timed(lambda: runtime.predict(last))
        if lengths + tokens > runtime.limits.context:
            fill()
        lengths += tokens
        parts = [ExtendRow(slot, _ids(tokens), logits=call == "token") for slot in range(rows)]
        return _timed(lambda: runtime.extend(parts))

    return run


def _ids(count: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    return np.arange(32, 32 + count, dtype=np.int32) % 97 + 32


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _measured(run: Callable[[], float], seconds: float) -> list[float]:
    """Return latencies in seconds, after some calls that do not count."""
    for _ in range(WARM_UP):
        run()
    latencies: list[float] = []
    end = time.perf_counter() + seconds
    while len(latencies) < LEAST_CALLS or time.perf_counter() < end:
        latencies.append(run())
    return latencies


def _about(engines: EngineSet) -> dict[str, object]:
    build = engines.build
    names = {"sku": build.sku, "flavour": build.flavour, "precision": build.precision}
    return {"engines": str(engines.folder), **names, "context": build.limits.context}


def _table(times: list[CallTime]) -> str:
    rows = [["call", "rows", "tokens", "median ms", "p99 ms", "floor ms", "of floor", "tokens/s"]]
    for one in times:
        floor = one.floor_ms
        rows.append(
            [
                *(one.call, str(one.rows), str(one.tokens)),
                *(f"{one.median_ms:.3f}", f"{one.p99_ms:.3f}"),
                *((f"{floor:.3f}", f"{one.median_ms / floor:.2f}x") if floor else ("-", "-")),
                f"{1e3 * one.rows * one.tokens / one.median_ms:.0f}",
            ]
        )
    return "\n".join(aligned(rows))
