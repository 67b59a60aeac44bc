"""Figures of a load: rates, and latencies as percentiles.

Names are those of vLLM's `bench serve` where the thing is the same: ttft is the time to the first
tokens (here the first block), itl the time between two responses of one answer (two blocks), tpot
the time per token after the first response, e2el the time of the whole answer; in milliseconds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from twotower_client.bench.load import Level, Record

PERCENTILES = (50, 90, 95, 99)
LATENCIES = {
    "ttft": "time to first block",
    "itl": "time between blocks",
    "tpot": "time per token",
    "e2el": "whole answer",
}
RATES = {
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "total_token_throughput": "tokens/s, prompts too",
    "tokens_per_denoiser_call": "tokens per denoiser call",
}
CURVE_POINTS = 101  # of a curve of latencies, one per percentile


def summarize(level: Level, seconds: float, records: Sequence[Record]) -> dict[str, Any]:
    """Return the figures of one load, ready for JSON.

    Rates count what arrived while requests were still begun, latencies all complete answers.

    Args:
        level: The load.
        seconds: Seconds that rates are counted over.
        records: Its requests.
    """
    complete = [record for record in records if record.error is None]
    failed = [record for record in records if record.error is not None]
    arrived = sum(tokens for record in records for at, tokens in record.blocks if at <= seconds)
    read = sum(
        record.prompt_tokens
        for record in records
        if record.blocks and record.blocks[0][0] <= seconds
    )
    calls = sum(record.denoiser_calls for record in complete)
    tokens = sum(record.tokens for record in complete)
    figures: dict[str, Any] = {
        "level": level.name,
        "max_concurrency": level.concurrency,
        "request_rate": level.rate,
        "duration": seconds,
        "completed": len(complete),
        "failed": len(failed),
        "total_input_tokens": sum(record.prompt_tokens for record in complete),
        "total_output_tokens": tokens,
        "request_throughput": sum(record.ended <= seconds for record in complete) / seconds,
        "output_throughput": arrived / seconds,
        "total_token_throughput": (arrived + read) / seconds,
        "tokens_per_denoiser_call": tokens / calls if calls else None,
        "max_send_delay_ms": 1e3 * max((record.delay for record in records), default=0.0)
        if level.rate is not None
        else 0.0,
        "errors": _errors(failed),
    }
    for name, values in _latencies(complete).items():
        figures |= _percentiles(name, values)
    return figures


def _latencies(complete: Sequence[Record]) -> dict[str, list[float]]:
    """Return every latency in seconds, by name."""
    several = [record for record in complete if record.tokens > record.blocks[0][1]]
    return {
        "ttft": [record.blocks[0][0] - record.sent for record in complete],
        "itl": [
            later - earlier
            for record in complete
            for (earlier, _), (later, _) in itertools.pairwise(record.blocks)
        ],
        "tpot": [
            (record.ended - record.blocks[0][0]) / (record.tokens - record.blocks[0][1])
            for record in several
        ],
        "e2el": [record.ended - record.sent for record in complete],
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, Any]:
    """Return mean, spread, percentiles and curve of a latency in milliseconds; None without any."""
    names = ["mean", "median", "std", *(f"p{one}" for one in PERCENTILES)]
    keys = [f"{one}_{name}_ms" for one in names]
    if not seconds:
        return {**dict.fromkeys(keys), f"{name}_curve_ms": []}
    values = 1e3 * np.array(seconds)
    found = [values.mean(), np.median(values), values.std(), *np.percentile(values, PERCENTILES)]
    curve = np.percentile(values, np.linspace(0, 100, CURVE_POINTS))
    rounded = [round(float(value), 3) for value in found]
    return {**dict(zip(keys, rounded, strict=True)), f"{name}_curve_ms": curve.round(3).tolist()}


def _errors(failed: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """Return how often each kind of error came, with the text of the first."""
    kinds = [record.error for record in failed if record.error is not None]
    first = dict(reversed(kinds))
    return {
        kind: {"count": count, "first": first[kind]}
        for kind, count in Counter(kind for kind, _ in kinds).most_common()
    }
