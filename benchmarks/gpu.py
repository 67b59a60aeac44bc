"""The first hour with a GPU, in six minutes: tests, kernels, one step, and a wall of the results.

    python -m benchmarks.gpu                       # `make gpu`; results in benchmarks/results/
    python3 -m benchmarks.gpu --output $OUT        # a bare machine, from the repository's root

It needs the packages in `NEEDED` and cuda-bindings, and no TensorRT; our packages need not be
installed, and nothing is downloaded. In order of worth:

1. The gpu tests: the kernels against their references; the plugins' own PTX through the CUDA
   driver with TensorRT's argument list; CUDA's side of the runtime. Tests of plans skip where
   TensorRT is absent.
2. The kernels' times against the bytes that they must move, and against eager PyTorch.
3. A denoise step of the full-size model with random weights (63 GB), at 1, 4 and 16 rows.

A stage that hangs is ended, and the next one runs. The output of each is in `log`, and the wall
(`first-hour-GPU-DATE.md`) has one line for each test, kernel and step: reached, missed, failed, or
not run. The exit code is 0 where all of it ran, and nothing failed or was missed.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[1]
GPU_TESTS = ("tests/kernels/test_gpu.py", "tests/engines/runtime/test_gpu.py")
NEEDED = ("ml_dtypes", "numpy", "pytest", "torch", "triton")
"""What the stages import; cuda-bindings beside it, without which its tests are not run."""

GOOD = ("passed", "reached", "measured")


@dataclass(frozen=True)
class Line:
    """One line of the wall."""

    name: str
    state: str
    text: str = ""


def stages(output: Path) -> list[tuple[str, list[str], float]]:
    """Name, command and seconds of each stage: 360 seconds in all, at most."""
    python = [sys.executable, "-u", "-m"]
    pytest = [*python, "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *GPU_TESTS]
    kernels = [*python, "benchmarks.kernels", "--no-compile", "--budget", "100"]
    step = [*python, "benchmarks.denoiser_step"]
    return [
        ("tests", [*pytest, f"--junitxml={output / 'tests.xml'}"], 150.0),
        ("kernels", [*kernels, "--output", str(output)], 120.0),
        ("denoise step", [*step, "--output", str(output)], 90.0),
    ]


def run_stage(name: str, command: list[str], seconds: float, log: TextIO) -> str:
    """Run a command, with what it prints in the log and here; returns how it ended."""
    print(f"== {name}: {' '.join(command)}", file=log, flush=True)
    start = log.tell()
    begun = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"ended after {seconds:.0f} s"
    else:
        taken = time.monotonic() - begun
        print(f"== {name} took {taken:.0f} s, exit code {code}", file=log, flush=True)
        return "ended well" if code == 0 else f"exit code {code}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.flush()
        with Path(log.name).open() as written:
            written.seek(start)
            print(written.read(), flush=True)


def environment() -> dict[str, str]:
    """Variables of a stage: our packages from the tree, and kernels that are compiled."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT / name) for name in ("engines", "export", "client", ".")]
    return {**clean, "PYTHONPATH": os.pathsep.join([*paths, clean.get("PYTHONPATH", "")])}


def test_lines(report: Path) -> list[Line]:
    """One line per test of pytest's report, with what it recorded."""
    if not report.exists():
        return [Line("gpu tests", "FAILED", "pytest left no report: see the log")]
    lines = []
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "")
        bad = [*case.iter("failure"), *case.iter("error")]
        skipped = case.find("skipped")
        if bad:
            lines.append(Line(name, "FAILED", first_line(bad[0].get("message"))))
        elif skipped is not None:
            lines.append(Line(name, "not run", first_line(skipped.get("message"))))
        else:
            measured = (f"{one.get('name')}: {one.get('value')}" for one in case.iter("property"))
            lines.append(Line(name, "passed", "; ".join(measured)))
    return lines


def first_line(text: str | None) -> str:
    """The beginning of a message, for a cell of a table."""
    return (text or "no message").strip().splitlines()[0][:160].replace("|", "/")


def kernel_lines(document: dict[str, Any]) -> list[Line]:
    """One line per case of `benchmarks.kernels`."""
    lines = []
    words = {"yes": "reached", "no": "missed", "-": "measured", "failed": "FAILED"}
    for row in document["rows"]:
        state = words.get(row["reached"], row["reached"])
        text = f"bound {row['bound_us']:.1f} us"
        if row["kernel_us"] is not None:
            text = f"{row['kernel_us']:.1f} us, {row['of_bound']:.2f} of the bound"
        if row["most_of_bound"]:
            text += f", goal {row['most_of_bound']:.2f}"
        lines.append(Line(f"{row['op']} {row['shape']}", state, "; ".join([text, *row["notes"]])))
    return lines


def step_lines(document: dict[str, Any]) -> list[Line]:
    """One line per size of a denoise step."""
    lines = []
    for step in document["steps"]:
        rows = step["rows"]
        text = f"bound {step['bound_us'] / 1e3:.2f} ms ({step['gigabytes']:.1f} GB)"
        if step["step_us"] is not None:
            text += f", took {step['step_us'] / 1e3:.2f} ms, {step['of_bound']:.2f} of the bound"
        if step["roofline_us"] is not None:
            text += f", planned {step['roofline_us'] / 1e3:.2f} ms"
        state = "not measured" if step["step_us"] is None else "measured"
        lines.append(Line(f"denoise step, {rows} row{'s' * (rows > 1)}", state, text))
    return lines


def newest(output: Path, pattern: str, since: float) -> dict[str, Any] | None:
    """The JSON that a stage of this run has written; None where it wrote none."""
    written = [path for path in output.glob(pattern) if path.stat().st_mtime >= since]
    if not written:
        return None
    document: dict[str, Any] = json.loads(max(written, key=lambda p: p.stat().st_mtime).read_text())
    return document


def wall_lines(output: Path, since: float) -> tuple[list[Line], str]:
    """Every line of the wall, and the GPU's name."""
    lines = test_lines(output / "tests.xml")
    device = "unknown GPU"
    for pattern, read in (("kernels-*.json", kernel_lines), ("denoiser-step-*.json", step_lines)):
        document = newest(output, pattern, since)
        if document is None:
            lines.append(Line(pattern.split("-*")[0], "FAILED", "wrote no results: see the log"))
        else:
            device = document["device"]
            lines += read(document)
    return lines, device


def wall(lines: list[Line], device: str, endings: list[str]) -> str:
    """The page."""
    counts = {state: sum(line.state == state for line in lines) for state in dict.fromkeys(
        line.state for line in lines
    )}  # fmt: skip
    summary = ", ".join(f"{number} {state}" for state, number in counts.items())
    absent = " **Nothing ran: this machine has no GPU.**" if device == "no GPU" else ""
    head = f"# The first hour, {device}\n\n{summary}. {'; '.join(endings)}.{absent}\n"
    rows = [f"| {line.name} | {line.state} | {line.text} |" for line in lines]
    return "\n".join([head, "| what | state | numbers |", "|---|---|---|", *rows, ""])


def main() -> None:
    """Run all stages and print the wall."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    results = Path(__file__).with_name("results")
    parser.add_argument("--output", type=Path, default=results, help="folder of the results")
    output = parser.parse_args().output.absolute()
    absent = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if absent:
        parser.error(f"packages that are not installed: {', '.join(absent)}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "tests.xml").unlink(missing_ok=True)
    begun = time.time()
    endings = []
    with (output / "log").open("w+") as log:
        for name, command, seconds in stages(output):
            endings.append(f"{name}: {run_stage(name, command, seconds, log)}")
    lines, device = wall_lines(output, begun)
    page = wall(lines, device, endings)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    name = f"first-hour-{device.lower().replace(' ', '-')}-{today}.md"
    (output / name).write_text(page)
    print(page)
    sys.exit(0 if all(line.state in GOOD for line in lines) else 1)


if __name__ == "__main__":
    main()
