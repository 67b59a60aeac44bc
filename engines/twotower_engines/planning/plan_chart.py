"""The chart of `twotower plan --plot`: memory against what there is, and speed.

Needs matplotlib (extra [plot]), imported only when a chart is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twotower_contract.atomic import partial_file, reported
from twotower_engines.errors import PlanError
from twotower_engines.planning.fit import gib
from twotower_engines.planning.plan import GpuMemory
from twotower_engines.planning.plan_report import PlanReport
from twotower_engines.planning.plan_text import thousands
from twotower_engines.planning.precisions import BUILT
from twotower_engines.planning.roofline import ROWS
from twotower_engines.planning.skus import GIB

__all__ = ["draw_plans"]

SUFFIXES = (".png", ".svg", ".pdf")
PARTS = ("weights", "context states", "buffers of calls", "workspace", "libraries")
COLORS = ("#3b6ea5", "#e08a2e", "#7aa874", "#b05d8c", "#9a9a9a")
INK, FAINT, BAD, LATER = "#222222", "#8a8a8a", "#c0392b", "#a86a00"
CONTEXT_COLOR = "#e08a2e"


def draw_plans(reports: Sequence[PlanReport], path: Path) -> None:
    """Draw one SKU in detail, or several side by side.

    Args:
        reports: At least one.
        path: The file; its suffix decides the format.

    Raises:
        PlanError: matplotlib is missing, the suffix is unknown, or the file cannot be written.
    """
    if path.suffix not in SUFFIXES:
        raise PlanError(f"--plot is {path}: the name should end in {', '.join(SUFFIXES)}")
    try:
        import matplotlib
    except ImportError as problem:
        raise PlanError(
            "--plot needs matplotlib: install the extra [plot], `pip install twotower[plot]`"
        ) from problem
    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": FAINT,
        "text.color": INK,
        "svg.hashsalt": "twotower",  # the same plan gives the same file
    }
    with pyplot.rc_context(style):
        figure = _draw_one(pyplot, reports[0]) if len(reports) == 1 else _draw_many(pyplot, reports)
        try:
            with reported(path, PlanError), partial_file(path) as partial:
                suffix = path.suffix.removeprefix(".")
                figure.savefig(partial, dpi=150, bbox_inches="tight", format=suffix)
        finally:
            pyplot.close(figure)


def _parts(gpu: GpuMemory) -> tuple[float, ...]:
    """Return GiB per part, in the order of `PARTS`."""
    groups = (gpu.states, gpu.buffers, gpu.workspace)
    sizes = (gpu.weight_bytes, *(sum(group.values()) for group in groups), gpu.overhead)
    return tuple(size / GIB for size in sizes)


def _stack(axes: Any, place: float, gpu: GpuMemory, *, fits: bool) -> None:
    """Draw one GPU's memory as a stacked bar with a mark at its capacity."""
    left = 0.0
    for size, color in zip(_parts(gpu), COLORS, strict=True):
        axes.barh(place, size, left=left, height=0.6, color=color, alpha=1 if fits else 0.35)
        left += size
    capacity = gpu.capacity / GIB
    axes.plot([capacity] * 2, [place - 0.42, place + 0.42], color=INK if fits else BAD, lw=2)


def _legend(axes: Any, pyplot: Any, **place: Any) -> None:
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in COLORS]
    handles.append(pyplot.Line2D([], [], color=INK, lw=2, marker="|", ls=""))
    axes.legend(handles, [*PARTS, "usable memory"], frameon=False, fontsize=8, **place)


def _draw_many(pyplot: Any, reports: Sequence[PlanReport]) -> Any:
    """Memory of the fullest GPU on the left, tokens per second on the right, a row per SKU."""
    height = 1.9 + 0.34 * len(reports)
    figure, (memory, speed) = pyplot.subplots(
        1, 2, figsize=(12, height), sharey=True, width_ratios=(1.25, 1)
    )
    first = reports[0]
    widest = max(
        max(gpu.total, gpu.capacity) / GIB
        for report in reports
        for gpu in report.plan.gpus
        if report.sku.name != "cpu" or report.plan.fits
    )
    for place, report in enumerate(reports):
        gpu = min(report.plan.gpus, key=lambda one: one.free)
        _stack(memory, place, gpu, fits=report.plan.fits)
        memory.text(
            1.01,
            place,
            _short_verdict(report),
            transform=memory.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=_verdict_color(report),
        )
        if report.plan.fits:
            _speeds(speed, place, report)
    memory.set_yticks(range(len(reports)), [report.sku.name for report in reports])
    memory.set_ylim(len(reports) - 0.4, -0.6)
    memory.set_xlim(0, widest * 1.02)
    memory.set_xlabel("GiB on the fullest GPU")
    _log_axis(speed.xaxis, speed.set_xscale)
    speed.set_xlabel(f"tokens/s at threshold {first.threshold:g} (ceiling)")
    speed.tick_params(left=False)
    speed.grid(axis="x", color="#e6e6e6", which="major")
    speed.set_axisbelow(True)
    _legend(memory, pyplot, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    tasks = first.acceptance.tasks
    handles = [
        pyplot.Line2D([], [], color=color, lw=5, solid_capstyle="butt")
        for color in (COLORS[0], CONTEXT_COLOR)
    ]
    slots = first.plan.slots
    names = [f"one request, {tasks[0]} to {tasks[-1]}", f"{slots} requests together"]
    speed.legend(
        handles, names, frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0)
    )
    figure.subplots_adjust(wspace=0.5)
    figure.suptitle(_title(first), x=0.125, ha="left", y=0.9 + 0.85 / height, fontsize=11)
    return figure


def _speeds(axes: Any, place: float, report: PlanReport) -> None:
    """Draw the ranges of tokens per second, of one row and of all slots."""
    for rows, color, shift in ((1, COLORS[0], -0.17), (report.plan.slots, CONTEXT_COLOR, 0.17)):
        if report.has_denoiser:
            tasks = report.acceptance.tasks
            ends = [report.throughput(task, rows).tokens_per_second for task in tasks]
            low, high = min(ends), max(ends)
        else:
            low = high = report.autoregressive(rows)
        alpha = 1.0 if report.refused is None else 0.35
        axes.plot(
            [low, high],
            [place + shift] * 2,
            lw=5,
            color=color,
            alpha=alpha,
            solid_capstyle="butt",
            marker="|" if low == high else None,
        )


def _verdict_color(report: PlanReport) -> str:
    if not report.plan.fits:
        return BAD
    return INK if report.refused is None else LATER


def _short_verdict(report: PlanReport) -> str:
    plan = report.plan
    count = len(plan.gpus)
    where = f"{count} GPU{'s' if count > 1 else ''}, {plan.precision}"
    if report.sku.compute_capability is None:
        where = plan.precision
    if not plan.fits:
        return "does not fit"
    return where if plan.precision in BUILT else f"{where} (not built yet)"


def _draw_one(pyplot: Any, report: PlanReport) -> Any:
    """Memory per GPU, slots against context, time per step, tokens per second."""
    figure, grid = pyplot.subplots(2, 2, figsize=(11, 7.4), height_ratios=(0.7, 1))
    _draw_memory(grid[0][0], pyplot, report)
    _draw_frontier(grid[0][1], report)
    _draw_steps(grid[1][0], report)
    _draw_tokens(grid[1][1], report)
    figure.subplots_adjust(hspace=0.6, wspace=0.22, top=0.9)
    figure.suptitle(
        f"{report.sku.title}: {_title(report)}", x=0.125, ha="left", y=0.975, fontsize=11
    )
    return figure


def _draw_memory(axes: Any, pyplot: Any, report: PlanReport) -> None:
    gpus = report.plan.gpus
    for place, gpu in enumerate(gpus):
        _stack(axes, place, gpu, fits=report.plan.fits)
        note = f"{gib(gpu.free)} free" if gpu.free >= 0 else f"{gib(-gpu.free)} too much"
        share = 0.99
        axes.text(
            share * gpu.weight_bytes / GIB,
            place,
            note,
            va="center",
            ha="right",
            fontsize=8,
            color="white" if gpu.free >= 0 else BAD,
        )
    names = ["memory"] if report.sku.compute_capability is None else None
    axes.set_yticks(range(len(gpus)), names or [f"GPU {index}" for index in range(len(gpus))])
    middle = (len(gpus) - 1) / 2
    axes.set_ylim(middle + 1.2, middle - 1.2)
    axes.set_xlim(0, max(max(gpu.total, gpu.capacity) for gpu in gpus) / GIB * 1.03)
    axes.set_xlabel("GiB")
    axes.set_title(f"Memory: {_short_verdict(report)}", loc="left", fontsize=10)
    _legend(axes, pyplot, loc="upper center", bbox_to_anchor=(0.45, -0.26), ncols=3)


def _draw_frontier(axes: Any, report: PlanReport) -> None:
    found = {context: slots for context, slots in report.slots_by_context.items() if slots}
    axes.set_title("Slots that fit beside a context", loc="left", fontsize=10)
    if not found:
        axes.text(0.5, 0.5, "not one slot fits", ha="center", transform=axes.transAxes, color=BAD)
        axes.set_axis_off()
        return
    bars = axes.bar(range(len(found)), list(found.values()), color=COLORS[0], width=0.62)
    axes.bar_label(bars, fontsize=8, color=INK)
    axes.set_xticks(range(len(found)), [thousands(context) for context in found])
    axes.set_xlabel("tokens of context per slot")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)


def _draw_steps(axes: Any, report: PlanReport) -> None:
    axes.set_title("Time of a call (floor)", loc="left", fontsize=10)
    extension = [report.extension(rows).total_seconds * 1e3 for rows in ROWS]
    if report.has_denoiser:
        measured = [report.denoiser(rows).total_seconds * 1e3 for rows in ROWS]
        uniform = [report.denoiser(rows, "uniform").total_seconds * 1e3 for rows in ROWS]
        axes.fill_between(ROWS, measured, uniform, color=COLORS[0], alpha=0.15, lw=0)
        axes.plot(ROWS, uniform, color=COLORS[0], lw=1, ls=":", label="denoiser, uniform routing")
        axes.plot(ROWS, measured, color=COLORS[0], lw=2, marker="o", ms=4, label="denoiser step")
    axes.plot(
        ROWS, extension, color=CONTEXT_COLOR, lw=2, marker="s", ms=4, label="context extension"
    )
    axes.set_ylim(0)
    axes.set_ylabel("ms")
    _rows_axis(axes)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_tokens(axes: Any, report: PlanReport) -> None:
    axes.set_title(
        f"Tokens per second of all rows at threshold {report.threshold:g} (ceiling)",
        loc="left",
        fontsize=10,
    )
    if report.has_denoiser:
        tasks = report.acceptance.tasks
        shades = ("#9dbbd9", "#6a97c4", "#2f5d8f")
        for task, color in zip(tasks, shades, strict=True):
            values = [report.throughput(task, rows).tokens_per_second for rows in ROWS]
            calls = report.acceptance.calls(task, report.threshold)
            label = f"{task}: {calls.tokens_per_call:.2f} tokens per call"
            axes.plot(ROWS, values, color=color, lw=2, marker="o", ms=4, label=label)
    plain = [report.autoregressive(rows) for rows in ROWS]
    axes.plot(ROWS, plain, color=FAINT, lw=1.5, ls="--", label="autoregressive")
    axes.axvspan(report.most_slots + 0.01, ROWS[-1] * 1.3, color=BAD, alpha=0.06, lw=0)
    _log_axis(axes.yaxis, axes.set_yscale)
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    _rows_axis(axes)
    if report.most_slots < ROWS[-1]:
        most = report.most_slots
        why = f"more than {most} slots do not fit" if most else "not one slot fits"
        axes.set_xlabel(f"rows ({why})")
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def _log_axis(axis: Any, set_scale: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib import ticker

    set_scale("log")
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _rows_axis(axes: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ROWS, [str(rows) for rows in ROWS])
    axes.set_xlim(0.85, ROWS[-1] * 1.2)
    axes.set_xlabel("rows")


def _title(report: PlanReport) -> str:
    plan = report.plan
    return f"{plan.model.parameters_in_words}, {plan.slots} slots x {plan.context} tokens"
