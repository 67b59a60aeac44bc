"""The number of distinct experts that a batch of tokens is routed to, per layer.

`data/routing_statistics.json` is the measurement (made by `benchmarks/routing_statistics.py`); for
models of other shapes, and as the pessimistic end, uniform routing has a formula.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Literal

from twotower_contract.json_file import read_json
from twotower_contract.sizes import uniform_experts
from twotower_engines.errors import PlanError

DATA_FILE = Path(__file__).with_name("data") / "routing_statistics.json"

Routing = Literal["denoiser block", "context block", "context token"]


@functools.cache
def load_routing() -> dict[str, dict[int, float]]:
    """Return the mean number of distinct experts: table, then rows of the batch."""
    document = read_json(DATA_FILE, PlanError)
    document.check_format("twotower-routing", 1)
    return {
        name: {int(rows): one.number("mean") for rows, one in table.sections("rows").items()}
        for name, table in document.sections("tables").items()
    }


@functools.cache
def measured_shape() -> tuple[int, int]:
    """Return experts and experts per token of the model that was measured."""
    document = read_json(DATA_FILE, PlanError)
    return document.integer("num_experts"), document.integer("num_experts_per_tok")


def distinct_experts(
    table: Routing,
    rows: int,
    tokens: int,
    experts: int,
    chosen: int,
    routing: Literal["measured", "uniform"] = "measured",
) -> float:
    """Return how many distinct experts a layer reads for a batch, on average.

    Args:
        table: Measurement to use: blocks of 16 in either tower, or single tokens.
        rows: Rows of the batch.
        tokens: Tokens of each row. A longer or shorter row counts as more or fewer rows.
        experts: Routed experts of a layer.
        chosen: Experts per token.
        routing: `uniform` takes the formula; so does a model of another shape.
    """
    if routing == "uniform" or (experts, chosen) != measured_shape():
        return uniform_experts(rows * tokens, experts, chosen)
    per_row = 1 if table == "context token" else 16
    points = load_routing()[table]
    at = rows * tokens / per_row
    least, most = min(points), max(points)
    if at <= least:
        # less than one measured block: a power of the tokens that meets one token and the block
        if per_row == 1:
            return points[least]
        growth = math.log(points[least] / chosen) / math.log(least * per_row)
        return chosen * math.pow(rows * tokens, growth)
    if at >= most:
        return points[most]
    low = max(rows for rows in points if rows <= at)
    high = min(rows for rows in points if rows > at)
    share = math.log(at / low) / math.log(high / low)
    return points[low] + share * (points[high] - points[low])
