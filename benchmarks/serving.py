"""What serving adds to the engines on this machine, in one run, and where the time goes.

    python -m benchmarks.serving           # a quarter of an hour

The trained tiny checkpoint, held-out prompts, greedy, threshold 0.9, on the CPU in float32. The
same requests go to the scheduler alone (no server, no text, one process), which is the loop of
`twotower run`, and to a real Triton server through our asynchronous client, by so many streams at
once; each stream sends one request after the other. Both use one thread for the engines; the
server, its Python model and the client share what is left of the machine, so the ratio holds for a
machine of this size and is less on a larger one.

Answers end by themselves, which this checkpoint's do soon, or have all the same length: benchmarks
of servers ask for that (`ignore_eos`), so that figures do not depend on what a model has to say.

All cases take turns. The machine's own speed changes from minute to minute, so a ratio is the
median of the ratios of runs that followed each other; times are those of the shortest run. Beside
each time stands the CPU time of the engine's thread, which other processes change less.

Last come the loops in the client that such a server spares (`client_loop`).
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.client_loop import (
    NEW_TOKENS,
    Answers,
    ContextThatTravels,
    Prompts,
    Workload,
    run_loops,
)
from benchmarks.record import machine, today, write_results
from benchmarks.serving_spans import SPANS
from tests.support import ROOT, TWOTOWER
from twotower_client import AsyncTwoTowerClient
from twotower_contract.engine_set import EngineSet, open_engine_set
from twotower_engines.artifacts.tokenizer import Tokenizer
from twotower_engines.generation.costs import costs_of_engines
from twotower_engines.generation.request import Request
from twotower_engines.generation.scheduler import Scheduler
from twotower_engines.runtime.interface import Runtime
from twotower_engines.runtime.onnxruntime import OnnxRuntime
from twotower_engines.runtime.opening import open_runtime
from twotower_engines.serving.package import package
from twotower_engines.serving.server import ServerOptions, TritonServer
from twotower_engines.serving.settings import Settings
from twotower_export.tiny.corpus import documents

WORKLOADS = (
    Workload("as they end", False, {1: 64, 16: 256, 32: 256, 128: 512}, {1: 32, 32: 96}),
    Workload("256 tokens each", True, {1: 16, 16: 64, 32: 128, 128: 256}, {1: 8, 32: 32}),
)
REPEATS = 9
OPTIONS = ServerOptions("127.0.0.1", 0, None, None)


@dataclass(frozen=True)
class Bare:
    """A run of the scheduler alone; times in seconds."""

    answers: Answers
    wall: float
    cpu: float
    turns: int


@dataclass(frozen=True)
class Served:
    """A run through the server.

    Attributes:
        wall: Seconds.
        spans: Where the time of the processes went, in seconds.
    """

    wall: float
    spans: Mapping[str, float]


Repeats = dict[tuple[Workload, int], list[tuple[Bare, Served]]]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engines = build(folder)
        tokenizer = Tokenizer(engines.folder)
        held_out = documents("held_out", seed=0)
        count = max(max(workload.requests.values()) for workload in WORKLOADS)
        prompts = [tokenizer.encode(next(held_out).prompt) for _ in range(count)]
        runtime = open_runtime(engines, threads=1)
        assert isinstance(runtime, OnnxRuntime)
        repeats: Repeats = {(one, streams): [] for one in WORKLOADS for streams in one.requests}
        with spans_server(engines, folder) as server:
            server.wait_until_ready()
            for _ in range(REPEATS):
                for (workload, streams), pairs in repeats.items():
                    asked = prompts[: workload.requests[streams]]
                    bare = run_bare(engines, runtime, asked, streams, workload)
                    served = run_served(server, folder, asked, streams, workload, bare.answers)
                    pairs.append((bare, served))
                    times = f"{bare.wall:.2f}, {served.wall:.2f} s"
                    print(f"{workload.name}, {streams} streams: {times}", flush=True)
        loops = folder / "loops"
        write_model(loops / "steps", "step_model")
        for tower in engines.build.plans:
            write_model(loops / tower, "tower_model")
        expected = {one: repeats[one, 1][0][0].answers for one in WORKLOADS}
        looped = run_loops(engines, runtime, loops, prompts, expected, REPEATS)
        runtime.close()
    rows = {
        one: [row_of(n, repeats[one, n], repeats[one, 1]) for n in one.requests]
        for one in WORKLOADS
    }
    write(rows, looped)


def build(folder: Path) -> EngineSet:
    """Export and build the shipped checkpoint with the verbs that a user would call."""
    checkpoint, bundle, engines = (str(folder / n) for n in ("checkpoint", "bundle", "engines"))
    for verb in (
        ["tiny", checkpoint, "--pretrained"],
        ["export", checkpoint, bundle],
        ["build", bundle, "--sku", "cpu", engines, "--slots", "128", "--context", "1024"],
    ):
        subprocess.run([*TWOTOWER, *verb], check=True, capture_output=True)
    return open_engine_set(Path(engines))


def run_bare(
    engines: EngineSet, runtime: Runtime, prompts: Prompts, streams: int, workload: Workload
) -> Bare:
    """Answer by the scheduler alone, with a new request for each that ends."""
    scheduler = Scheduler(runtime, streams, costs=costs_of_engines(engines))
    waiting, turns = list(enumerate(prompts)), 0
    answers: dict[str, list[int]] = {str(number): [] for number, _ in waiting}
    wall, cpu = time.perf_counter(), time.thread_time()
    while waiting or not scheduler.idle:
        while waiting and scheduler.active + scheduler.waiting < streams:
            number, prompt = waiting.pop(0)
            options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": workload.ignore_eos}
            scheduler.submit(Request(str(number), prompt, **options))
        for event in scheduler.turn():
            answers[event.request_id] += event.ids
        turns += 1
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    return Bare([tuple(ids) for ids in answers.values()], wall, cpu, turns)


def spans_server(engines: EngineSet, folder: Path) -> TritonServer:
    """Start a server whose model notes where its time goes."""
    package(engines, folder / "repository", Settings(engines.folder, threads=1))
    write_model(folder / "repository" / "twotower", "serving_spans")
    os.environ[SPANS] = str(folder / "spans.json")
    return TritonServer(folder / "repository", OPTIONS)


def write_model(folder: Path, module: str) -> None:
    """Let a model be that of a module of the benchmarks."""
    (folder / "1").mkdir(parents=True, exist_ok=True)
    code = f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
    (folder / "1/model.py").write_text(f"{code}from benchmarks.{module} import TritonPythonModel\n")


def run_served(
    server: TritonServer,
    folder: Path,
    prompts: Prompts,
    streams: int,
    workload: Workload,
    expected: Answers,
) -> Served:
    """Answer through the server, asked by so many streams at once."""
    before, client = spans(server, folder), time.process_time()
    wall = time.perf_counter()
    answers = asyncio.run(served_answers(server.grpc_address, prompts, streams, workload))
    wall, client = time.perf_counter() - wall, time.process_time() - client
    assert answers == expected, "the server answers as the engines do"
    after = spans(server, folder)
    gone = {name: after[name] - before.get(name, 0.0) for name in after}
    return Served(wall, {**gone, "client cpu": client})


async def served_answers(
    address: str, prompts: Prompts, streams: int, workload: Workload
) -> Answers:
    answers: dict[int, tuple[int, ...]] = {}
    waiting = list(enumerate(prompts))

    async def stream(client: AsyncTwoTowerClient) -> None:
        while waiting:
            number, prompt = waiting.pop(0)
            answer = await client.generate(
                prompt_ids=prompt, max_new_tokens=NEW_TOKENS, ignore_eos=workload.ignore_eos
            )
            answers[number] = answer.ids

    async with AsyncTwoTowerClient(address) as client:
        await asyncio.gather(*(stream(client) for _ in range(streams)))
    return [answers[number] for number in range(len(prompts))]


def spans(server: TritonServer, folder: Path) -> dict[str, float]:
    """Ask the model's process for its sums, and the kernel for the server's CPU time."""
    path = folder / "spans.json"
    path.unlink(missing_ok=True)
    path.with_suffix(".ask").touch()
    while not path.exists():
        time.sleep(0.01)
    times = Path(f"/proc/{server.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    ticks = os.sysconf("SC_CLK_TCK")
    return {**json.loads(path.read_text()), "triton cpu": sum(map(int, times)) / ticks}


def row_of(
    streams: int, repeats: Sequence[tuple[Bare, Served]], single: Sequence[tuple[Bare, Served]]
) -> dict[str, float]:
    """Return what came of the repeats at so many streams: times in seconds, parts per turn in ms.

    A wait for a core or for Python's lock is the engine's thread's: it has work, and stands.

    Args:
        single: The repeats of one stream at a time.
    """
    bare = min((bare for bare, _ in repeats), key=lambda one: one.wall)
    served = min((served for _, served in repeats), key=lambda one: one.wall)
    took, tokens = served.spans, count_tokens(bare)
    calls = took["extend cpu"] + took["denoise cpu"]
    engine, waited = took["engine thread cpu"], took["engine thread waited"]
    others = sum(value for name, value in took.items() if name.endswith(" thread cpu")) - engine
    parts = {
        "engine calls": calls,
        "scheduling": took["turn cpu"] - calls,
        "taking in, giving out": engine - took["turn cpu"],
        "waiting for a core": waited,
        "waiting for Python's lock": max(0.0, took["turn wall"] - took["turn cpu"] - waited),
        "no request there": max(0.0, served.wall - took["turn wall"] - (engine - took["turn cpu"])),
        "beside it: sending": took["sending thread cpu"],
        "beside it: other threads": others - took["sending thread cpu"],
        "beside it: Triton": took["triton cpu"],
        "beside it: the client": took["client cpu"],
    }
    turns = took["turn count"]
    return {
        "streams": streams,
        "tokens": tokens,
        "bare wall": bare.wall,
        "bare cpu": min(one.cpu for one, _ in repeats),
        "bare turns": bare.turns,
        "served wall": served.wall,
        "served cpu": min(one.spans["engine thread cpu"] for _, one in repeats),
        "turns": turns,
        "rows per step": took["rows"] / took["denoise count"],
        "ratio": median(served.wall / bare.wall for bare, served in repeats),
        **{
            f"{name}to one stream": median(
                (tokens / some[place].wall) / (count_tokens(one[0]) / one[place].wall)
                for some, one in zip(repeats, single, strict=True)
            )
            for place, name in enumerate(("bare ", ""))
        },
        "bare tokens per second": tokens / bare.wall,
        "tokens per second": tokens / served.wall,
        **{name: 1e3 * seconds / turns for name, seconds in parts.items()},
    }


def count_tokens(run: Bare) -> int:
    return sum(map(len, run.answers))


Rows = Mapping[Workload, list[dict[str, float]]]
Looped = Mapping[Workload, list[dict[str, Any]]]


def write(rows: Rows, looped: Looped) -> None:
    """Print the results as tables, and write both forms."""
    where = machine()
    lines = [
        "# Serving on the CPU",
        "",
        f"`python -m benchmarks.serving`, {today()}, {where}; trained tiny checkpoint,",
        f"engines on one thread. Times are the least of {REPEATS}, ratios the median of those",
        "within a repeat. CPU is that of the engine's thread.",
    ]
    for workload in WORKLOADS:
        tokens = rows[workload][0]["tokens"] / workload.requests[1]
        lines += ["", f"## Answers {workload.name}: {tokens:.0f} tokens in the mean"]
        lines += speed_lines(rows[workload]) + part_lines(rows[workload])
    lines += loop_lines(rows, looped) + aims(rows, looped)
    print("\n".join(lines))
    results = [
        {"workload": one.name, "rows": rows[one], "looped": looped[one]} for one in WORKLOADS
    ]
    write_results("serving-cpu", lines, {"machine": where, "results": results})


def speed_lines(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the table of times and speeds."""
    return [
        "",
        "| streams | alone, s (CPU) | served, s (CPU) | served / alone | turns, alone and served | "
        "tokens/s, alone | served | to one stream, alone | served |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['streams']} | {row['bare wall']:.2f} ({row['bare cpu']:.2f}) | "
            f"{row['served wall']:.2f} ({row['served cpu']:.2f}) | {row['ratio']:.2f} | "
            f"{row['bare turns']:.0f}, {row['turns']:.0f} | {row['bare tokens per second']:.0f} | "
            f"{row['tokens per second']:.0f} | {row['bare to one stream']:.2f}x | "
            f"{row['to one stream']:.2f}x |"
            for row in rows
        ),
    ]


def part_lines(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Return the table of where a turn's time goes."""
    names = list(rows[0])[list(rows[0]).index("engine calls") :]
    lines = [
        "",
        "Where the time of a turn goes, in ms, and as a share of the engine's calls:",
        "",
        "| | " + " | ".join(f"{row['streams']} streams" for row in rows) + " |",
        "|---|" + "---:|" * len(rows),
    ]
    for name in names:
        cells = (f"{row[name]:.2f} ({row[name] / row['engine calls']:.0%})" for row in rows)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def loop_lines(rows: Rows, looped: Looped) -> list[str]:
    """Return the table of loops in the client."""
    lines = [
        "",
        "## Loops in the client",
        "",
        *wrapped(
            "They ask a model of Triton's over gRPC for each call of a tower and wait for it. The "
            "denoiser's call refines, so that ids come back and not logits. Either each call "
            "brings the context's states, as the towers' graphs need it in a stock backend: "
            "Triton's implicit states belong to one model, and here the denoiser reads what the "
            "context tower makes. Or one model keeps the states, which is written for this. The "
            "engines are the server's, and calls are not batched."
        ),
        "",
        "| answers | states | loops at once | tokens/s | 32 streams of the server to this |",
        "|---|---|---:|---:|---:|",
    ]
    for workload in WORKLOADS:
        best = by_streams(rows[workload])[32]["tokens per second"]
        lines += [
            f"| {workload.name} | {one['states']} | {one['loops']} | "
            f"{one['tokens per second']:.0f} | {best / one['tokens per second']:.1f}x |"
            for one in looped[workload]
        ]
    return lines


def by_streams(rows: Sequence[dict[str, float]]) -> dict[int, dict[str, float]]:
    return {int(row["streams"]): row for row in rows}


def aims(rows: Rows, looped: Looped) -> list[str]:
    """Return lines that compare with what was aimed at, and say whose the rest is."""
    columns: list[list[str]] = []
    for workload in WORKLOADS:
        some = by_streams(rows[workload])
        own = some[16]["scheduling"] + some[16]["taking in, giving out"]
        loop = slowest_loop(looped[workload])
        columns.append(
            [
                *(f"{some[streams]['ratio']:.2f}" for streams in (1, 16, 128)),
                f"{own / some[16]['engine calls']:.0%}",
                f"{some[32]['to one stream']:.1f}x",
                f"{some[32]['tokens per second'] / loop:.1f}x",
            ]
        )
    names = [
        "served / alone, 1 stream | at most 1.10",
        "served / alone, 16 streams | at most 1.10",
        "served / alone, 128 streams | at most 1.15",
        "16 streams: scheduling, taking in and giving out, to calls | below 15%",
        "32 streams to one, tokens/s | at least 4x",
        "32 streams to one loop in the client whose states travel | at least 10x",
    ]
    return [
        "",
        "## Aims, and where this run stands",
        "",
        "| | aim | " + " | ".join(workload.name for workload in WORKLOADS) + " |",
        "|---|---:|" + "---:|" * len(WORKLOADS),
        *(f"| {' | '.join(cells)} |" for cells in zip(names, *columns, strict=True)),
        "",
        *reasons(by_streams(rows[WORKLOADS[0]]), slowest_loop(looped[WORKLOADS[0]])),
    ]


def slowest_loop(looped: Sequence[dict[str, Any]]) -> float:
    """Return tokens per second of one loop whose states travel."""
    return next(
        float(row["tokens per second"])
        for row in looped
        if row["loops"] == 1 and row["states"] == ContextThatTravels.states
    )


def reasons(rows: Mapping[int, dict[str, float]], loop: float) -> list[str]:
    """Return lines that say where the rest of the time goes with answers that end soon."""
    one, some, many = rows[1], rows[16], rows[32]
    own = some["scheduling"] + some["taking in, giving out"]
    waits = some["waiting for a core"] + some["waiting for Python's lock"]
    beside = [value for name, value in some.items() if name.startswith("beside it")]
    outside = some["beside it: Triton"] + some["beside it: the client"]
    return [
        *wrapped(
            f"- Served to alone, 16 streams: beside {some['engine calls']:.1f} ms of calls, a turn "
            f"takes the engine's thread {own:.1f} ms for all that serving needs of it, and the "
            f"thread waits {waits:.1f} ms for a core or for Python's lock. Meanwhile the cores do "
            f"{sum(beside):.1f} ms of other work, {outside / sum(beside):.0%} of it in Triton and "
            "in the client: responses on their way through gRPC. With one stream the way from "
            "the end of an answer to the next request counts as well: "
            f"{one['no request there']:.2f} ms a turn, more the shorter answers are."
        ),
        *wrapped(
            f"- 32 streams to one: the engines alone give {many['bare to one stream']:.1f}x. "
            "Weights so small lie in a cache, so that a call with more rows saves only what each "
            "operator costs by itself."
        ),
        *wrapped(
            "- To a loop in the client: the engines alone, without any server, give "
            f"{many['bare tokens per second'] / loop:.1f}x with 32 rows at once."
        ),
    ]


def wrapped(text: str) -> list[str]:
    """Return the lines of a paragraph, or of an item of a list."""
    return textwrap.wrap(text, 100, subsequent_indent="  " * text.startswith("- "))


if __name__ == "__main__":
    main()
