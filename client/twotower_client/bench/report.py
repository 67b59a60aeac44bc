"""A load test's results for people: tables on the terminal, and one page with charts."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower_client.bench.summary import LATENCIES, RATES
from twotower_client.errors import RequestRefusedError
from twotower_contract.charts import STYLE, Series, chart
from twotower_contract.tables import aligned

KIND = "twotower bench"
COLUMNS = {
    "level": "load",
    "completed": "done",
    "failed": "failed",
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "tokens_per_denoiser_call": "tokens/call",
    "median_ttft_ms": "first block, ms",
    "p99_ttft_ms": "p99",
    "median_itl_ms": "per block, ms",
    "p99_itl_ms": "p99",
    "median_e2el_ms": "answer, ms",
    "p99_e2el_ms": "p99",
}


def read_result(path: Path) -> dict[str, Any]:
    """Read what `--save` wrote.

    Raises:
        RequestRefusedError: The file is no result of a load test.
        OSError: It cannot be read.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise RequestRefusedError(
            f"{path}: is no JSON ({problem}); name a file of --save"
        ) from None
    if not isinstance(result, dict) or result.get("kind") != KIND:
        raise RequestRefusedError(f"{path}: is no result of `{KIND}`; name a file of --save")
    return result


def table(result: dict[str, Any]) -> str:
    """Return a table with one row for each load, and the errors by kind below."""
    rows = [[_shown(level[name]) for name in COLUMNS] for level in result["levels"]]
    lines = aligned([list(COLUMNS.values()), *rows])
    for level in result["levels"]:
        for kind, error in level["errors"].items():
            lines.append(f"{level['level']}: {error['count']} x {kind}: {error['first']}")
        if level["max_send_delay_ms"] > 100:
            lines.append(
                f"{level['level']}: requests left up to {level['max_send_delay_ms']:.0f} ms late; "
                "this machine cannot send so many"
            )
    return "\n".join(lines)


def comparison(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return a table of what changed at the loads that both results have.

    Raises:
        RequestRefusedError: They have none in common.
    """
    names = [*RATES, *(f"{kind}_{one}_ms" for one in LATENCIES for kind in ("median", "p99"))]
    rows = [["load", "figure", "before", "after", "change"]]
    for before, after in _pairs(old, new):
        for name in names:
            values = before[name], after[name]
            change = f"{values[1] / values[0] - 1:+.1%}" if all(values) else ""
            rows.append([after["level"], name, *map(_shown, values), change])
    return "\n".join(aligned(rows))


def page(results: Sequence[dict[str, Any]]) -> str:
    """Return a page with charts and tables of one result, or of two; it fetches nothing."""
    newest = results[-1]["levels"]
    more = [comparison(*results), table(results[0])] if len(results) > 1 else []
    return PAGE.format(
        style=STYLE,
        table=html.escape(table(results[-1])),
        more="".join(f"<pre>{html.escape(text)}</pre>" for text in more),
        charts="".join([*_charts_by_load(results), *_curves(newest)]),
        about=html.escape(json.dumps(results[-1]["about"], indent=1)),
    )


def _charts_by_load(results: Sequence[dict[str, Any]]) -> list[str]:
    """Return a chart of each rate and latency over the loads; a line for each result."""
    names = ("before", "after") if len(results) > 1 else ("",)
    latencies = {f"p99_{key}_ms": f"{title}, p99, ms" for key, title in LATENCIES.items()}
    places = {level["level"]: place for place, level in enumerate(results[-1]["levels"], 1)}
    charts = []
    for key, title in {**RATES, **latencies}.items():
        lines = []
        for name, result in zip(names, results, strict=True):
            levels = [one for one in result["levels"] if one["level"] in places and one[key]]
            points = sorted((places[one["level"]], one[key]) for one in levels)
            lines.append(Series(name, points))
        charts.append(chart(title, lines, {place: name for name, place in places.items()}))
    return charts


def _curves(levels: Sequence[dict[str, Any]]) -> list[str]:
    """Return a chart of each latency's distribution; a line for each load."""
    charts = []
    for key, title in LATENCIES.items():
        lines = [
            Series(
                level["level"],
                [(ms, share / 100) for share, ms in enumerate(level[f"{key}_curve_ms"])],
            )
            for level in levels
        ]
        charts.append(chart(f"{title}: share of all below so many ms", lines))
    return charts


def _pairs(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the loads of the same name in both results."""
    before = {level["level"]: level for level in old["levels"]}
    pairs = [(before[level["level"]], level) for level in new["levels"] if level["level"] in before]
    if not pairs:
        raise RequestRefusedError(
            "the two results have no load in common: "
            f"{', '.join(before)}, and {', '.join(level['level'] for level in new['levels'])}"
        )
    return pairs


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:.0f}"
    return str(value)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>twotower bench</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0 auto; max-width: 80rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }}
pre {{ overflow-x: auto; font-size: .8rem; }}
{style}
</style>
</head>
<body>
<h1>twotower bench</h1>
<pre>{table}</pre>
<div class="charts">{charts}</div>
{more}
<h2>How it was measured</h2>
<pre>{about}</pre>
</body>
</html>
"""
