"""The tables of a plan, for people: one line per SKU, or everything about one."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from math import ceil

from twotower_contract.engine_set import MAX_SLOTS
from twotower_contract.sizes import conv_bytes, kv_bytes_per_token, ssm_bytes
from twotower_contract.skus import GIB
from twotower_contract.tables import aligned
from twotower_engines.planning import plan as memory_plan
from twotower_engines.planning import roofline
from twotower_engines.planning.acceptance import Acceptance
from twotower_engines.planning.fit import gib
from twotower_engines.planning.model_size import ModelSize
from twotower_engines.planning.plan import MemoryPlan
from twotower_engines.planning.plan_report import DISK_BYTES_PER_S, PlanReport
from twotower_engines.planning.roofline import ROWS, CallCost

THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95)
GROUPS = (
    *("context tower", "denoiser tower", "context states", "buffers of calls", "workspace"),
    *("libraries and graphs", "used", "free"),
)
"""Groups of the table of memory, in their order."""
GROUNDS = ("compiled", "arithmetic", "measured by others", "assumed")


def text_of_many(reports: Sequence[PlanReport], width: int | None = None) -> str:
    """Return one line per SKU, and the meaning of the columns.

    Args:
        reports: The plans.
        width: Columns of the terminal: a wider table is folded; None for no terminal.
    """
    first = reports[0].plan
    ends = _task_range(reports[0].acceptance)
    many = f"x{first.slots}"
    head = ["SKU", "memory", "flavour", "verdict", "GPUs", "precision", "weights", "used", "free"]
    head += ["slots", "context", "step ms", many, "tok/s", many]
    table = _columns([head, *(_line(report) for report in reports)], {0, 2, 3, 5}, width)
    notes = [
        "",
        "memory: GiB per GPU as CUDA sees it; weights, used and free: GiB on the fullest GPU.",
        f"slots: the most beside {first.context} tokens; context: the most beside {first.slots} "
        "slots.",
        f"step ms: a denoiser step of one row, and of {first.slots}; tok/s: of one request, and of "
        f"{first.slots}, at threshold {reports[0].threshold:g}, {ends}.",
        "verdict: `yes` can be built now, once the weights are in that precision (twotower "
        "quantize);",
        "  `no` does not fit, or the flavour has no kernels for that precision.",
        "Times are a floor where bytes bind, and an estimate where FLOPs do; `--sku NAME` shows "
        "which, and what is assumed.",
    ]
    parts = [_heading(first.model, first), "", table, *notes]
    instead: dict[tuple[str, ...], list[str]] = {}
    for report in reports:
        if report.refused is not None:
            instead.setdefault(report.nearest, []).append(report.sku.name)
    if instead:
        parts += ["", f"What would fit instead, {first.slots} slots x {first.context} tokens:"]
        for nearest, names in instead.items():
            parts += [f"  {', '.join(names)}:", *(f"    {one}" for one in nearest or ("nothing",))]
    return "\n".join(parts)


def text_of_one(
    report: PlanReport, others: Sequence[PlanReport] = (), width: int | None = None
) -> str:
    """Return everything about one SKU's plan.

    Args:
        report: The plan.
        others: Plans with the other flavours that serve the SKU.
        width: Columns of the terminal: wider tables are folded; None for no terminal.
    """
    plan, sku = report.plan, report.sku
    capability = sku.compute_capability or "no CUDA"
    peak = f"{sku.bandwidth / 1e9:,.0f} GB/s, {sku.achieved:.0%} of it achieved"
    parts = [
        _heading(plan.model, plan),
        f"{sku.title} ({capability}, {plan.flavour}): {gib(sku.memory)} of memory, {peak}, "
        f"{sku.flops / 1e12:,.4g} TFLOPS",
        *([f"note: {sku.note}"] if sku.note else []),
        *(f"warning: {warning}" for warning in plan.model.warnings),
        "",
        _verdict(report),
        "",
        *([_flavours(report, others, width), ""] if others else []),
        _memory_table(plan, width),
        f"Loading reads the weights: {ceil(report.loading()['seconds'])} s from a disk of "
        f"{DISK_BYTES_PER_S / 1e9:g} GB/s.",
        "",
        _stretch(report, width),
        "",
        _precision_text(report, width),
        "",
        _call_table(report, width),
        "",
        _token_table(report, width),
        "",
        *_basis(),
        "Sources:",
        *(f"- {text}" for text in _sources(report)),
    ]
    return "\n".join(parts)


def _basis() -> Iterator[str]:
    """Yield what the figures stand on: compiled, computed, measured by others, assumed."""
    for name in GROUNDS:
        yield f"{name.capitalize()}:"
        for basis in (memory_plan.BASIS, roofline.BASIS):
            yield from (f"- {text}" for text in basis.get(name, ()))
        yield ""


def _heading(model: ModelSize, plan: MemoryPlan) -> str:
    towers = " and ".join(model.towers)
    return (
        f"{model.parameters_in_words}, {towers} tower, {model.config.dtype}: "
        f"{plan.slots} slots x {plan.context} tokens"
    )


def _verdict(report: PlanReport) -> str:
    plan = report.plan
    what = f"{plan.placement}, {plan.precision}, prefill in chunks of {plan.max_tokens_per_call}"
    if not plan.fits:
        return f"DOES NOT FIT: {what}"
    if not plan.is_built:
        return f"FITS, but {plan.flavour} has no kernels for {plan.precision}: {what}"
    return f"FITS: {what}{_first_step(plan)}"


def _first_step(plan: MemoryPlan) -> str:
    """Say what comes before the build, where the weights are not in the plan's precision yet."""
    if plan.needs_quantizing:
        return f"; quantize first: twotower quantize CHECKPOINT OUT --format {plan.precision}"
    return ""


def _flavours(report: PlanReport, others: Sequence[PlanReport], width: int | None) -> str:
    """Return a line for each flavour, and where its engines can be built."""
    many = f"x{report.plan.slots}"
    rows = [("flavour", "built", "verdict", "workspace", "step ms", many, "tok/s", many)]
    for one in (report, *others):
        plan = one.plan
        where = "on any machine" if plan.flavour == "tensorrt-rtx" else "on the GPU, with [kernels]"
        workspace = max(sum(gpu.workspace.values()) for gpu in plan.gpus)
        verdict, *_, step, many_steps, rate, many_rates = _line(one)[3:]
        cells = (verdict, gib(workspace), step, many_steps, rate, many_rates)
        rows.append((plan.flavour, where, *cells))
    return "\n".join(["By flavour:", _columns(rows, {0, 1, 2}, width)])


def _line(report: PlanReport) -> tuple[str, ...]:
    """Return the row of one SKU."""
    plan, sku = report.plan, report.sku
    fullest = min(plan.gpus, key=lambda gpu: gpu.free)
    verdict = "yes" if plan.buildable else "no"
    sizes = (fullest.weight_bytes, fullest.total, fullest.free)
    memory = (verdict, f"{len(plan.gpus)}", plan.precision, *(f"{n / GIB:.1f}" for n in sizes))
    name = (sku.name, f"{sku.memory / GIB:.1f}", plan.flavour)
    if not plan.fits:
        return (*name, *memory, *("-",) * 6)
    stretch = (_most(report.most_slots), _thousands(report.most_context))
    if not report.has_denoiser:
        speed = tuple(f"{report.autoregressive(rows):,.0f}" for rows in (1, plan.slots))
        return (*name, *memory, *stretch, "-", "-", *speed)
    steps = tuple(f"{report.denoiser(rows).total_seconds * 1e3:.1f}" for rows in (1, plan.slots))
    return (*name, *memory, *stretch, *steps, *(_range(report, rows) for rows in (1, plan.slots)))


def _memory_table(plan: MemoryPlan, width: int | None) -> str:
    """Return the bytes per GPU, a line per part."""
    names: dict[tuple[str, str], None] = {}
    cells: list[dict[tuple[str, str], int]] = []
    for gpu in plan.gpus:
        groups = {f"{tower} tower": parts for tower, parts in gpu.weights.items()} | {
            "context states": gpu.states,
            "buffers of calls": gpu.buffers,
            "workspace": gpu.workspace,
        }
        cell: dict[tuple[str, str], int] = {}
        for group, parts in groups.items():
            cell[group, ""] = sum(parts.values())
            cell |= {(group, part): size for part, size in parts.items()}
        cell["libraries and graphs", ""] = gpu.overhead
        cell["used", ""] = gpu.total
        cell["free", ""] = gpu.free
        cells.append(cell)
        names |= dict.fromkeys(cell)
    is_cpu = plan.sku.compute_capability is None
    titles = ("memory",) if is_cpu else tuple(f"GPU {index}" for index in range(len(plan.gpus)))
    # a small model in GiB would be a column of zeros
    name_of_unit, unit = ("GiB", GIB) if plan.gpus[0].weight_bytes > GIB else ("MiB", 1 << 20)
    rows: list[tuple[str, ...]] = [(name_of_unit, *titles)]
    for name in sorted(names, key=lambda name: GROUPS.index(name[0])):
        label = f"  {name[1]}" if name[1] else name[0]
        values = [cell.get(name) for cell in cells]
        rows.append((label, *("" if size is None else _cell(size / unit) for size in values)))
    return _columns(rows, {0}, width)


def _cell(size: float) -> str:
    return f"{size:.2f}" if abs(size) >= 0.005 else f"{size:.4f}"


def _stretch(report: PlanReport, width: int | None) -> str:
    plan = report.plan
    model, item = plan.model, roofline.machine_of(plan).item
    fixed = ssm_bytes(model.config) + conv_bytes(model.config, item)
    grows = plan.context * kv_bytes_per_token(model.config, item)
    text = (
        f"A slot takes {gib(fixed + grows)}: {gib(fixed)} of Mamba states and "
        f"{kv_bytes_per_token(model.config, item):,} B per token of context."
    )
    if not any(report.slots_by_context.values()):
        return f"{text} Not even one slot of 4096 tokens fits."
    rows: list[tuple[str, ...]] = [
        ("context", *(_thousands(context) for context in report.slots_by_context)),
        ("slots", *(_most(slots) for slots in report.slots_by_context.values())),
    ]
    most = f"Beside {plan.slots} slots fit {report.most_context} tokens of context."
    return "\n".join([text, "What fits at most:", _columns(rows, {0}, width), most])


def _precision_text(report: PlanReport, width: int | None) -> str:
    rows = [("precision", "weights", "fits on", "")]
    for row in report.precision_table():
        on = "does not fit" if row["gpus"] is None else f"{row['gpus']} x {report.sku.name}"
        if not row["computed_by_sku"]:
            on = f"not on {report.sku.name}"
        missing = "" if row["built"] else " (no kernels)"
        rows.append((row["precision"], gib(row["weight_bytes"]), on, row["summary"] + missing))
    return _columns(rows, {0, 2, 3}, width)


def _call_table(report: PlanReport, width: int | None) -> str:
    """Return bytes and time of a denoiser step and a context extension, by rows."""
    rows: list[tuple[str, ...]] = []
    for count in ROWS:
        extension = report.extension(count)
        line: tuple[str, ...] = (*_call_cells(extension), _bound(extension, report.plan))
        if report.has_denoiser:
            step, uniform = report.denoiser(count), report.denoiser(count, "uniform")
            line = (
                *_call_cells(step),
                _bound(step, report.plan),
                *_call_cells(uniform),
                *_call_cells(extension),
            )
        rows.append((str(count), *line))
    head: tuple[str, ...] = ("rows", "experts", "GB", "ms", "bound by")
    title = "Context extension (16 tokens a row):"
    if report.has_denoiser:
        title = "Denoiser step (16 tokens a row); the same with uniform routing; context extension:"
        head += ("experts", "GB", "ms") * 2
    prefill = report.prefill()
    return "\n".join(
        [
            title,
            _columns([head, *rows], {4}, width),
            f"Prefill of one request: {prefill['tokens_per_second']:,.0f} tokens/s in chunks of "
            f"{prefill['chunk']}.",
        ]
    )


def _call_cells(call: CallCost) -> tuple[str, str, str]:
    size = call.total_bytes / 1e9
    return (
        f"{call.distinct:.0f}",
        f"{size:.1f}" if size >= 0.05 else f"{size:.4f}",
        f"{call.total_seconds * 1e3:.2f}",
    )


def _bound(call: CallCost, plan: MemoryPlan) -> str:
    """Name the part that takes longest, and whether bytes or operations limit it."""
    part, seconds = max(call.seconds.items(), key=lambda pair: pair[1])
    if part not in call.bytes:
        return part
    memory = call.bytes[part] / (plan.sku.bandwidth * plan.sku.achieved)
    return f"{part}, {'bytes' if memory >= seconds * 0.999 else 'FLOPs'}"


def _token_table(report: PlanReport, width: int | None) -> str:
    """Return the expected tokens per second: by rows at the threshold, and by threshold."""
    tasks = report.acceptance.tasks
    if not report.has_denoiser:
        rows = [("rows", "tok/s"), *((str(n), f"{report.autoregressive(n):,.0f}") for n in ROWS)]
        return "\n".join(["Tokens per second, autoregressive:", _columns(rows, (), width)])
    measured = (
        f"{task} {report.acceptance.calls(task, report.threshold).tokens_per_call:.2f}"
        for task in tasks
    )
    head = ("rows", *tasks, "ar", "block every", "95% within")
    lines: list[tuple[str, ...]] = [head]
    for count in ROWS:
        middle = report.throughput(tasks[len(tasks) // 2], count)
        lines.append(
            (
                str(count),
                *(f"{report.throughput(task, count).tokens_per_second:,.0f}" for task in tasks),
                f"{report.autoregressive(count):,.0f}",
                _milliseconds(middle.block_seconds),
                _milliseconds(middle.slow_block_seconds),
            )
        )
    by_threshold: list[tuple[str, ...]] = [("threshold", *(f"{one:g}" for one in THRESHOLDS))]
    for count in sorted({1, report.plan.slots}):
        values = (_range(report, count, threshold) for threshold in THRESHOLDS)
        by_threshold.append((f"tok/s x{count}", *values))
    most = report.most_slots
    beyond = f"More than {most} slots do not fit at this context."
    return "\n".join(
        [
            f"Tokens per second of all rows, at threshold {report.threshold:g} (tokens per "
            f"denoiser call: {', '.join(measured)}):",
            _columns(lines, (), width),
            *([beyond] if most < MAX_SLOTS else []),
            f"By threshold, {_task_range(report.acceptance)}:",
            _columns(by_threshold, {0}, width),
        ]
    )


def _sources(report: PlanReport) -> list[str]:
    reference = report.acceptance.reference
    found: dict[str, list[str]] = {}
    for key, source in report.sku.sources.items():
        found.setdefault(source, []).append(key)
    texts = [f"{', '.join(keys)}: {source}" for source, keys in found.items()]
    return [
        *texts,
        f"routing and acceptance: {report.acceptance.source}",
        "measured there, for comparison: "
        f"{reference.denoiser_call * 1e3:.0f} ms per denoiser call, "
        f"{reference.context_extension * 1e3:.0f} ms per context extension, "
        f"{1 / reference.ar_token:.1f} tokens/s autoregressive",
    ]


def _task_range(acceptance: Acceptance) -> str:
    return f"from task `{acceptance.tasks[0]}` to `{acceptance.tasks[-1]}`"


def _range(report: PlanReport, rows: int, threshold: float | None = None) -> str:
    tasks = report.acceptance.tasks
    ends = (
        report.throughput(task, rows, threshold).tokens_per_second for task in (tasks[0], tasks[-1])
    )
    return "-".join(f"{value:,.0f}" if value >= 10 else f"{value:.1f}" for value in ends)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _most(slots: int) -> str:
    return f"{slots}+" if slots == MAX_SLOTS else str(slots)


def _thousands(tokens: int) -> str:
    """Write a number of tokens, in units of 1024 from 1024 on."""
    return f"{tokens // 1024}K" if tokens >= 1024 else str(tokens)


def _columns(
    rows: Sequence[Sequence[str]], left: Container[int] = (), width: int | None = None
) -> str:
    """Align cells; fold a table that is wider than a terminal.

    Each part repeats the first column, and has as many others as the terminal is wide.
    """
    parts: list[list[int]] = [[]]
    for column in range(1, len(rows[0])):
        wanted = [0, *parts[-1], column]
        size = sum(max(len(row[i]) for row in rows) + 2 for i in wanted) - 2
        if width is not None and size > width and parts[-1]:
            parts.append([])
        parts[-1].append(column)
    return "\n\n".join(
        "\n".join(
            aligned(
                [[row[i] for i in (0, *part)] for row in rows],
                {place for place, i in enumerate((0, *part)) if i in left},
            )
        )
        for part in parts
    )
