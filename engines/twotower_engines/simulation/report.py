"""Outcomes of simulations as tables and as a chart."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_contract.tables import aligned
from twotower_engines.simulation.simulate import PERCENTILES, Outcome

COLUMNS = ("load", "tokens/s", "first block s", "gap ms", "whole s", "rows/call", "tokens/row")
BAR = 48
LETTERS = "#cp-wo."
"""One for each cause of `Outcome.row_share`, in its order."""


def table(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """Return a line for each load: rates, and times at the 50th, 95th and 99th percentile."""
    rows = [COLUMNS]
    for name, one in outcomes:
        rows.append(
            (
                name,
                f"{one.tokens_per_second:,.0f}",
                _times(one.first_block, 1),
                _times(one.block_gap, 1e3),
                _times(one.whole, 1),
                f"{one.rows_per_denoiser_call:.1f}",
                f"{one.tokens_per_denoiser_row:.2f}",
            )
        )
    lines = aligned(rows, left=())
    shown = ", ".join(map(str, PERCENTILES[:-1]))
    lines.append(f"times at the {shown} and {PERCENTILES[-1]}th percentile")
    return "\n".join(lines)


def chart(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """Return where the slots' time goes, as a bar of letters for each load."""
    causes = list(outcomes[0][1].row_share)
    width = max(len(name) for name, _ in outcomes)
    lines = ["time of the slots:"]
    lines += [f"  {letter} {cause}" for letter, cause in zip(LETTERS, causes, strict=True)]
    for name, one in outcomes:
        bar, total = "", 0.0
        for letter, share in zip(LETTERS, one.row_share.values(), strict=True):
            total += share
            bar += letter * (round(total * BAR) - len(bar))
        lines.append(f"{name.rjust(width)} |{bar}| {one.row_share[causes[0]]:.0%} {causes[0]}")
    return "\n".join(lines)


def passes(outcomes: Sequence[tuple[str, Outcome]]) -> str:
    """Return the engines' calls and the share of the time that each kind takes."""
    lines = []
    for name, one in outcomes:
        c = one.counters
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in one.busy_share.items())
        reused = f"; {c.reused_tokens:,} of {c.prompt_tokens:,} prompt tokens reused"
        lines.append(
            f"{name}: {c.denoiser_calls:,} denoiser and {c.context_calls:,} context calls in "
            f"{one.seconds:.1f} s ({shares}){reused if c.reused_tokens else ''}"
        )
        if len(one.first_block_of) > 1:
            of = (f"{who} {_times(each, 1)} s" for who, each in one.first_block_of.items())
            lines.append(f"{name}: first block of {', of '.join(of)}")
    return "\n".join(lines)


def _times(values: dict[int, float], scale: float) -> str:
    """Return the percentiles of a time with three digits each."""
    return " ".join(f"{scale * one:.3g}" for one in values.values())
