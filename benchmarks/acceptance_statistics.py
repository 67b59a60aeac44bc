"""Tokens per denoiser call by task, threshold and steps, from measured runs and traces.

Input: runs of NVIDIA's code on the released checkpoint and traces of masked counts, recorded by
junze-eng/twotower-repro on two A100 80 GB in bf16 at batch 1. Output: the table that
`twotower plan` ships, with the burst rates of `twotower_engines.planning.acceptance` fitted to it.

    python -m benchmarks.acceptance_statistics reference_runs.json denoise_traces.json \
        engines/twotower_engines/planning/data/acceptance.json

Tokens per call are total tokens over total calls: the mean of the runs' own ratios would give the
quick runs too much weight.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from twotower_contract.atomic import write_text
from twotower_engines.planning.acceptance import calls_per_block

BLOCK = 16
FITTED_STEPS = 16


def fit_burst_rate(tokens_per_call: float, block: int = BLOCK, steps: int = FITTED_STEPS) -> float:
    """Return the burst rate at which a block takes so many tokens per call, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        is_slow = calls_per_block(block, steps, middle).tokens_per_call < tokens_per_call
        low, high = (middle, high) if is_slow else (low, middle)
    return (low + high) / 2


def group(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum runs of the same task, threshold and steps, block size 16."""
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = defaultdict(list)
    for run in runs:
        if run["mode"] == "diff" and run.get("block_size") == BLOCK:
            groups[run["task"], run["threshold"], run["steps_per_block"]].append(run)
    rows = []
    for (task, threshold, steps), some in sorted(groups.items()):
        calls = sum(run["denoiser_calls"] for run in some)
        tokens = round(sum(run["denoiser_calls"] * run["tokens_per_call"] for run in some))
        rate = fit_burst_rate(tokens / calls) if steps == FITTED_STEPS else None
        rows.append(
            {
                "task": task,
                "threshold": threshold,
                "steps": steps,
                "runs": len(some),
                "tokens": tokens,
                "calls": calls,
                "seconds": round(sum(run["wall_s"] for run in some), 1),
                "burst_rate": None if rate is None else round(rate, 6),
            }
        )
    return rows


def fit_reference(rows: list[dict[str, Any]], ar: list[dict[str, Any]]) -> dict[str, Any]:
    """Fit seconds = calls x a + blocks x b, and the seconds of an autoregressive token."""
    calls = np.array([row["calls"] for row in rows], float)
    blocks = np.array([row["tokens"] / BLOCK for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    (call, block), *_ = np.linalg.lstsq(np.stack([calls, blocks], 1), seconds, rcond=None)
    worst = float(np.abs((calls * call + blocks * block) / seconds - 1).max())
    return {
        "meaning": "two A100 80 GB, bf16, batch 1: seconds = calls x denoiser_call + blocks x "
        f"context_extension, least squares over the measurements, worst misfit {worst:.1%}",
        "denoiser_call_seconds": round(float(call), 4),
        "context_extension_seconds": round(float(block), 4),
        "ar_token_seconds": round(
            sum(run["wall_s"] for run in ar) / sum(run["denoiser_calls"] for run in ar), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("traces", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    runs = json.loads(args.runs.read_text(encoding="utf-8"))["runs"]
    traces = json.loads(args.traces.read_text(encoding="utf-8"))["traces"]
    rows = group(runs)
    ar = [run for run in runs if run["mode"] == "ar" and run.get("max_new_tokens") == 256]
    result = {
        "format": "twotower-acceptance",
        "format_version": 1,
        "source": "junze-eng/twotower-repro: released checkpoint, NVIDIA's code with an exact "
        "recurrence, two A100 80 GB, bf16, batch 1, block size 16, temperature 0",
        "measurements": rows,
        "reference": fit_reference(rows, ar),
        "traces": [
            {"task": trace["task"], "threshold": trace["threshold"], "masked": block}
            for trace in traces
            for block in trace["blocks"]
        ],
    }
    write_text(args.output, json.dumps(result, indent=1) + "\n")
    for row in rows:
        ratio = row["tokens"] / row["calls"]
        print(f"{row['task']:11} {row['threshold']:.2f} {row['steps']:2} {ratio:5.2f} tokens/call")
    print(result["reference"])


if __name__ == "__main__":
    main()
