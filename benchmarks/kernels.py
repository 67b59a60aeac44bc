"""Times the kernels on this machine's GPU, against PyTorch and against the bytes they must move.

    python -m benchmarks.kernels                        # prints the table, writes it to results/
    python -m benchmarks.kernels --no-compile --budget 480    # within a call of ten minutes
    python -m benchmarks.kernels --only experts --tune  # sweeps tile sizes

Every case is saved as it is measured; one that fails is recorded, and the next one runs. Full-size
shapes, random data. A kernel is timed as it would run in an engine: captured in a CUDA
graph, over several sets of inputs, so that the last one's are not in the cache. PyTorch is timed
eagerly, and compiled. The bound is the bytes that any implementation must move, each once, over the
bandwidth that a large copy reaches here. Every kernel's result is compared with PyTorch's in
float32 before it is timed. `--tune` sweeps the tiles of the experts' products alone: the other ops'
follow from the sizes of the model.

Without a GPU the bounds are listed, for the bandwidth of an H200, and the times stay empty.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.kernel_cases import CASES, Case, expert_cases
from tests.support import kernel_launches
from twotower_contract.atomic import write_text
from twotower_engines.kernels.jit import SHARED_MEMORY_LIMIT, Launch

RESULTS = Path(__file__).with_name("results")
H200_COPY = 4.3e12
"""Bytes per second that a large copy reached on an H200, read and written bytes together."""

REPEATS = 30
CACHE_BYTES = 200e6
"""Inputs of all sets together: more than three times the largest L2 cache (60 MB)."""

MOST_SETS = 512


@dataclass
class Row:
    """One case's result; times in microseconds, None where nothing was measured."""

    op: str
    shape: str
    megabytes: float
    bound_us: float
    kernel_us: float | None = None
    eager_us: float | None = None
    compiled_us: float | None = None
    error: float | None = None
    most_of_bound: float | None = None
    least_speedup: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def of_bound(self) -> float | None:
        """Time over the bound."""
        return None if self.kernel_us is None else self.kernel_us / self.bound_us

    @property
    def speedup(self) -> float | None:
        """Over eager PyTorch."""
        if self.kernel_us is None or self.eager_us is None:
            return None
        return self.eager_us / self.kernel_us

    @property
    def reached(self) -> str:
        """Whether the case's goals are reached."""
        if self.kernel_us is None:
            return "failed" if self.notes else "not measured"
        goals = []
        if self.most_of_bound is not None and self.of_bound is not None:
            goals.append(self.of_bound <= self.most_of_bound)
        if self.least_speedup is not None and self.speedup is not None:
            goals.append(self.speedup >= self.least_speedup)
        return "yes" if goals and all(goals) else "no" if goals else "-"


def microseconds(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], graph: bool) -> float:
    """Median time of one call, over all sets of inputs."""

    def run() -> None:
        for inputs in sets:
            call(*inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    replay: Callable[[], Any] = run
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            run()
        replay = captured.replay
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(sets))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on this GPU, read and written bytes together."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    taken = microseconds(lambda: target.copy_(source), [()], graph=True)
    return 2 * source.numel() / (taken * 1e-6)


def relative_error(case: Case, inputs: tuple[Any, ...]) -> float:
    """Error of the kernel's result, against PyTorch in float32 on the same numbers."""
    assert case.baseline
    wide = [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in inputs]
    want, got = case.baseline(*wide), case.kernel(*inputs)
    if isinstance(want, tuple):
        want, got = want[case.compared], got[case.compared]
    return float((got.double() - want.double()).norm() / want.double().norm())


def expected(case: Case, bandwidth: float) -> Row:
    """A line before anything is measured: what can be counted."""
    return Row(
        case.op,
        case.shape,
        case.bytes / 1e6,
        1e6 * case.bytes / bandwidth,
        most_of_bound=case.most_of_bound,
        least_speedup=case.least_speedup,
    )


def measure(case: Case, row: Row, compiling: bool) -> None:
    """Fills a line; a failure becomes a note of it."""
    try:
        _measure(case, row, compiling)
    except Exception as error:
        text = str(error).strip().splitlines()
        row.notes.append(f"{type(error).__name__}: {text[0][:200] if text else 'no message'}")
    torch.cuda.empty_cache()


def _measure(case: Case, row: Row, compiling: bool) -> None:
    sets = [case.inputs() for _ in range(set_count(case.bytes))]
    if case.baseline:
        row.error = relative_error(case, sets[0])
        if not row.error <= case.tolerance:
            row.notes.append(f"WRONG: error {row.error:.1e}")
            return
    row.kernel_us = microseconds(case.kernel, sets, graph=True)
    if case.baseline:
        row.eager_us = microseconds(case.baseline, sets, graph=False)
        if compiling:
            compiled = torch.compile(case.baseline, dynamic=False)
            row.compiled_us = microseconds(compiled, sets, graph=False)


def set_count(size: float) -> int:
    """Sets of inputs after which the first one's bytes have left the cache."""
    return max(1, min(MOST_SETS, math.ceil(CACHE_BYTES / size)))


TILES = tuple(
    Launch({"BLOCK_F": f, "BLOCK_T": t, "BLOCK_K": k}, warps, stages)
    for f, k, warps in ((64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 128, 4), (128, 32, 8))
    for t in (16, 32, 64)
    for stages in (2, 3, 4, 5)
    if (f + t) * k * 2 * stages <= SHARED_MEMORY_LIMIT
)
"""Tiles of the experts' products that `--tune` tries; each takes a second or two to compile."""


def tune(device: str, deadline: float) -> list[dict[str, Any]]:
    """Times of the expert kernels over tile sizes, best first per number of tokens.

    Each is printed as it comes; what has not begun by the deadline is left out.
    """
    found: list[dict[str, Any]] = []
    for case, config in itertools.product(expert_cases(device), TILES):
        if time.monotonic() > deadline:
            print("out of time: not every configuration was tried", file=sys.stderr)
            break
        one: dict[str, Any] = {"shape": case.shape, **config.constants}
        one |= {"warps": config.num_warps, "stages": config.num_stages}
        try:
            call = functools.partial(kernel_launches.sparse_experts, config=config)
            one["us"] = microseconds(call, [case.inputs()], graph=True)
        except Exception as error:
            one["error"] = f"{type(error).__name__}: {error}"[:200]
        found.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)
    return sorted(found, key=lambda one: (one["shape"], one.get("us", math.inf)))


COLUMNS = (
    *("op", "shape", "MB", "bound us", "kernel us", "x bound"),
    *("eager us", "compiled us", "x eager", "reached"),
)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"

    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * 7 + "---|"]
    for row in rows:
        values = (
            row.megabytes,
            row.bound_us,
            row.kernel_us,
            row.of_bound,
            row.eager_us,
            row.compiled_us,
            row.speedup,
        )
        cells = " | ".join(number(value) for value in values)
        state = "; ".join([row.reached, *row.notes])
        lines.append(f"| {row.op} | {row.shape} | {cells} | {state} |")
    return "\n".join(lines)


def report(rows: Sequence[Row], device: str, bandwidth: float, on_gpu: bool) -> str:
    """The page that is printed and kept."""
    if on_gpu:
        measured = (
            f"Measured on {device} with torch {torch.__version__} and Triton "
            f"{triton.__version__}: a large copy moves {bandwidth / 1e12:.2f} TB/s, which is what "
            "the bounds are for. Kernels in a CUDA graph, PyTorch as it launches itself; medians."
        )
    else:
        measured = (
            "**Nothing here was measured: this machine has no GPU, and the columns of times are "
            f"empty.** The bounds are bytes over {bandwidth / 1e12:.1f} TB/s, what an H200 copies "
            "at. `python -m benchmarks.kernels` on a GPU fills the table."
        )
    return f"# Kernels, {device}\n\n{measured}\n\n{table(rows)}\n"


def save(path: Path, text: str) -> None:
    """Beside, then renamed."""
    write_text(path, text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(CASES), help="one op")
    parser.add_argument("--tune", action="store_true", help="sweep the experts' tiles instead")
    parser.add_argument(
        "--no-compile", dest="compiling", action="store_false", help="leave torch.compile out"
    )
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after that"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget

    on_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if on_gpu else "no GPU"
    if options.tune:
        if not on_gpu:
            parser.error("--tune needs a GPU")
        print(json.dumps(tune("cuda", deadline), indent=1))
        return
    torch.manual_seed(0)
    bandwidth = copy_bandwidth() if on_gpu else H200_COPY
    names = [options.only] if options.only else list(CASES)
    cases = list(
        itertools.chain.from_iterable(CASES[name]("cuda" if on_gpu else "cpu") for name in names)
    )
    rows = [expected(case, bandwidth) for case in cases]
    keep = functools.partial(write, options.output, rows, device, bandwidth, on_gpu)
    page = keep()
    for case, row in zip(cases, rows, strict=True):
        if not on_gpu or time.monotonic() > deadline:
            break
        print(f"{case.op} {case.shape}", file=sys.stderr, flush=True)
        measure(case, row, options.compiling)
        page = keep()
    print(page)
    if any(row.notes for row in rows):
        sys.exit(1)


def write(output: Path, rows: Sequence[Row], device: str, bandwidth: float, on_gpu: bool) -> str:
    """Keeps what is known so far, as JSON and as the page, which is returned."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    stem = f"kernels-{device.lower().replace(' ', '-')}-{today}"
    document = {
        "device": device,
        "measured": on_gpu,
        "date": today,
        "copy_bytes_per_second": bandwidth,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": [
            asdict(row) | {"of_bound": row.of_bound, "speedup": row.speedup, "reached": row.reached}
            for row in rows
        ],
    }
    page = report(rows, device, bandwidth, on_gpu)
    output.mkdir(parents=True, exist_ok=True)
    save(output / f"{stem}.json", json.dumps(document, indent=1) + "\n")
    save(output / f"{stem}.md", page)
    return page


if __name__ == "__main__":
    main()
